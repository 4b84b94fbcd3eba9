"""The data of a run's page: what a real run writes, how often, and that nothing stops the run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from conftest import FEW_TARGETS, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.errors import UserError
from megaman.pages import training_page
from megaman.sequences import spread
from megaman.training import export, prepare
from megaman.training.history import RunHistory, Sample
from megaman.training.pace import Pace
from megaman.training.report import COST_SHARE, StepReport, TrainingReport
from megaman.training.series import Smoothed, bucket_ends, last_of_each, thin
from megaman.training.tensorboard import open_training_log

FLAGS = ["--data_dir", ROOT / "demo" / "held_out", "--validation_steps", 2, *FEW_TARGETS]

HPARAMS = {"_hparams_/experiment", "_hparams_/session_start_info"}


def data_of(folder: Path, name: str) -> dict:
    text = (folder / training_page.FOLDER / name).read_text(encoding="ascii")
    start = f'trainingReport("{name}",'
    assert text.startswith(start) and text.endswith(");\n")
    return json.loads(text[len(start) : -3])


@pytest.fixture(scope="module")
def trained(train_here, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--max_train_steps", 3, "--num_validation_images", 1, "--save_steps", 2]
    train_here(folder, "out", *FLAGS, *flags)
    return folder / "out"


def test_a_finished_run_leaves_its_record(trained):
    live, about = data_of(trained, "live.js"), data_of(trained, "about.js")
    assert (live["state"], live["step"], live["total_steps"]) == ("finished", 3, 3)
    assert len(live["curves"]["smoothed"]) == len(live["curves"]["gradient_norm"]["mean"]) == 3
    assert [sample["step"] for sample in live["samples"]] == [0, 2, 3]
    files = [image["file"] for image in about["sheet"]]
    files += [image["file"] for sample in live["samples"] for image in sample["images"]]
    assert len(files) == 8 + 3
    assert all((trained / file).is_file() for file in files)
    assert "--lora_path" in live["generate"]
    assert about["commands"]["resume"].endswith("--resume_from_checkpoint latest")
    assert {row[0] for group in about["settings"] for row in group["rows"]} >= {"lora_rank", "seed"}


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megaman")
    (tmp_path / training_page.FOLDER).write_text("a file in the way")
    report = TrainingReport(tmp_path, RunHistory(), is_active=True)
    report.begin(lambda thumbnails: {}, StepReport(0, 9, 0.0))
    for step in (1, 2):
        report._next_write = 0.0
        report.update(StepReport(step, 9, 0.0))
    assert len(caplog.messages) == 1 and "training continues" in caplog.messages[0]
    (tmp_path / training_page.FOLDER).unlink()
    report.end("stopped")  # the folder can be made again


def test_a_failure_is_what_the_page_ends_with(tmp_path):
    report = TrainingReport(tmp_path, RunHistory(), is_active=True)
    report.begin(lambda thumbnails: {}, StepReport(0, 9, 0.0))
    report.end("failed", reason="\udcff memory")
    report.end("stopped")
    live = data_of(tmp_path, "live.js")
    assert live["state"] == live["ended"] == "failed"
    assert live["reason"] == "\udcff memory"


@pytest.mark.parametrize("phase", ["encode_latents", "export_lora"])
def test_a_failure_outside_the_loop_is_shown(phase, train_here, trained, tmp_path, monkeypatch):
    """Before the page is begun anew, and after the last step."""
    shutil.copytree(trained.parent, tmp_path, dirs_exist_ok=True)
    owner = {"encode_latents": prepare, "export_lora": export}[phase]

    def fail(*_) -> None:
        raise UserError(f"{phase} broke")

    monkeypatch.setattr(owner, phase, fail)
    flags = ["--max_train_steps", 3, "--num_validation_images", 1, "--save_steps", 2]
    with pytest.raises(UserError):
        train_here(tmp_path, "out", *FLAGS, *flags, "--resume_from_checkpoint", "latest")
    live = data_of(tmp_path / "out", "live.js")
    assert (live["state"], live["reason"], live["step"]) == ("failed", f"{phase} broke", 3)
    assert live["curves"]["smoothed"], "the rest stays"


def test_only_an_active_report_writes(tmp_path):
    report = TrainingReport(tmp_path, RunHistory(), is_active=False)
    report.begin(lambda thumbnails: {}, StepReport(0, 9, 0.0))
    report.end("stopped")
    assert not list(tmp_path.iterdir())


def test_a_write_is_followed_by_a_hundred_times_its_cost(tmp_path):
    report = TrainingReport(tmp_path, RunHistory(), is_active=True)
    report.begin(lambda thumbnails: {}, StepReport(0, 9, 0.0))
    assert COST_SHARE >= 100
    report.update(StepReport(5, 9, 0.0))
    assert data_of(tmp_path, "live.js")["step"] == 0, "the last write was just now"


def test_files_outside_the_folder_are_not_shown(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "a.png").write_bytes(b"")
    history = RunHistory()
    files = ["a.png", "missing.png", "../secret.png", str(tmp_path / "secret.png")]
    history.add_samples(0, [Sample(file, "a robot", 0) for file in files])
    report = TrainingReport(folder, history, is_active=True)
    report.begin(lambda thumbnails: {}, StepReport(0, 9, 0.0))
    (shown,) = data_of(folder, "live.js")["samples"]
    assert [image["file"] for image in shown["images"]] == ["a.png"]


def test_curves_are_thinned_by_minimum_mean_and_maximum():
    ends = bucket_ends(10, 4)
    assert ends == [2, 5, 7, 10]
    values = [1.0, 3.0, None, 2.0, 4.0, None, None, 0.123456789, 7.0, 1.0]
    thinned = thin(values, ends)
    assert thinned.low == [1.0, 2.0, None, 0.12346]
    assert thinned.mean[:3] == [2.0, 3.0, None]
    assert thinned.high == [3.0, 4.0, None, 7.0]
    assert last_of_each(values, ends) == [3.0, 4.0, None, 1.0]
    assert bucket_ends(3) == [1, 2, 3] and bucket_ends(0) == []
    assert len(bucket_ends(100_000)) == 600
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1], 4) == [1]


def test_the_smoothed_loss_has_no_bias_at_the_start():
    smoothed = Smoothed()
    for value in (2.0, None, 2.0, 4.0):
        smoothed.add(value)
    assert smoothed.values[:3] == pytest.approx([2.0, 2.0, 2.0])
    assert 2.0 < (smoothed.values[3] or 0) < 4.0


def test_time_left_counts_steps_and_pauses():
    now = 100.0
    pace = Pace(10, lambda step: 10 // 5 - step // 5, first_pause=4.0, clock=lambda: now)
    assert not pace.has_measured
    pace.resume()
    now += 10.0  # five steps
    pace.pause(5, 1)
    assert pace.seconds_per_step == pace.recent_seconds_per_step == 2.0
    now += 8.0  # sample images
    pace.resume()
    assert pace.seconds_left(5) == pytest.approx(5 * 2.0 + (4.0 + 8.0) / 2)


def test_tensorboard_has_curves_prompts_and_the_table_of_runs(trained):
    (folder,) = (trained.parent / "logs-out").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    curves = {"train/loss", "train/loss_smoothed", "train/gradient_norm", "train/learning_rate"}
    assert curves | {"final/loss_smoothed"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss_smoothed")] == [1, 2, 3]
    assert events.Tags()["images"] == ["validation/00"]
    assert "volto" in events.SummaryMetadata("validation/00").display_name
    assert HPARAMS <= set(events.summary_metadata)


def test_each_evaluation_is_in_tensorboard_once(tmp_path):
    history = RunHistory()
    log = open_training_log(tmp_path, purge_step=3)
    for step in (0, 2, 4):
        history.add_evaluation(step, "held_out", step + 1.0)
        history.add_evaluation(step, "ema", float("nan"))
        log.add_evaluations(history.evaluations)
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("held_out/loss")] == [2, 4]
    assert events.Tags()["scalars"] == ["held_out/loss"]


def test_a_run_that_resumes_elsewhere_has_its_own_curves(trained, train_here):
    before = sorted((trained.parent / "logs-out").glob("**/events*"))
    flags = ["--max_train_steps", 3, "--logging_dir", "logs-out"]
    train_here(
        trained.parent, "elsewhere", *FLAGS, *flags, "--resume_from_checkpoint", "out/checkpoint-2"
    )
    folders = sorted(path.name for path in (trained.parent / "logs-out").iterdir())
    assert len(folders) == 2 and folders[0].startswith("elsewhere-")
    assert sorted((trained.parent / "logs-out").glob("out-*/events*")) == before
