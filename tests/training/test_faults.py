"""Failing writes, full disks, numbers that are not finite: nothing that was saved before is
lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW_SAMPLING_STEPS, FEW_TARGETS, ROOT
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman import files
from megaman.errors import UserError
from megaman.lora import adapter, saving
from megaman.models.base import load_base
from megaman.pages.training_page import LIVE, read_data
from megaman.training import checkpoint, output
from megaman.training.adapters import Adapters
from megaman.training.checkpoint import read_train_state
from megaman.training.optimizer import PATIENCE, SkippedSteps
from megaman.training.optimizer_state import TENSORS
from megaman.training.tensorboard import TrainingLog

FIXED = ["--data_dir", ROOT / "demo" / "held_out", "--learning_rate", 1e-3, *FEW_TARGETS]
FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Counts the calls by which a save reaches the disk, and lets one of them fail."""

    def __init__(self, monkeypatch, fail_at: int):
        self.count, self.fail_at = 0, fail_at
        for module, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "mkdir"),
            (Path, "mkdir"),
            (Path, "write_text"),
        ):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))
        monkeypatch.setattr(saving, "save_file", self.counted(saving.save_file, half=True))

    def counted(self, real, half=False):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.fail_at:
                if half:  # a full disk leaves a part of the file
                    Path(args[1]).write_bytes(b"half a file")
                raise FULL
            return real(*args, **kwargs)

        return call


@pytest.fixture(scope="module")
def trained(train_here, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder, "out", *FIXED, "--max_train_steps", 2, "--save_steps", 1)
    return folder


def whole_checkpoints(folder: Path) -> list[Path]:
    found = output.find_all(folder)
    for path in found:
        assert read_train_state(path).step == output.step_of(path)
        load_file(path / "adapter_model.safetensors")
        load_file(path / TENSORS)
    return found


@pytest.fixture(scope="module")
def adapted(base_folder):
    """The base's UNet and text encoder with a LoRA each, and an optimizer that took a step."""
    base = load_base(str(base_folder), torch.float32)
    adapters = Adapters(
        "base",
        base.unet,
        adapter.inject(base.unet, 2, 4, ["to_q"]),
        base.text_encoder,
        adapter.inject(base.text_encoder, 2, 4, ["q_proj"]),
    )
    trainable = adapters.parameters
    optimizer = torch.optim.AdamW(trainable, fused=True)
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return adapters, optimizer


@pytest.mark.slow
def test_every_call_of_a_save_fails_once(adapted, tmp_path):
    """The second checkpoint over the limit of one, and lora_weights/ over an earlier one: each
    write, flush and rename fails once; the earlier state still loads, there is no half file, and
    the same save works afterwards."""
    adapters, optimizer = adapted
    out = tmp_path / "out"
    folder = output.OutputFolder(out, None, (), checkpoints_total_limit=1)
    models = {"unet": adapters.unet, "text_encoder": adapters.text_encoder}

    def save(step: int) -> None:
        state = checkpoint.TrainState(step, 0, "logs", 1.0, {})
        checkpoint.save(folder.checkpoint_folder(step), adapters, optimizer, state)
        folder.prune_checkpoints(step)
        saving.save_lora(folder.lora_weights, models, "base", {"ss_steps": str(step)})

    save(1)
    shutil.copytree(out, tmp_path / "earlier")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, fail_at=0)
        save(2)
    assert disk.count > 25
    for number in range(1, disk.count + 1):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "earlier", out)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=number)
            with contextlib.suppress(OSError, UserError):
                save(2)
        assert whole_checkpoints(out), number
        for path in (out / "checkpoint-1", out / "checkpoint-2"):
            if path.is_dir():
                load_file(path / "text_encoder" / "adapter_model.safetensors")
        for name in (
            "adapter_model.safetensors",
            "pytorch_lora_weights.safetensors",
            "megaman_lora.safetensors",
            "text_encoder/adapter_model.safetensors",
        ):
            load_file(out / "lora_weights" / name)
        assert {path.name for path in out.iterdir()} <= {
            "checkpoint-1",
            "checkpoint-2",
            "lora_weights",
        }, number
        save(3)
        assert [output.step_of(path) for path in whole_checkpoints(out)] == [3]


def test_a_run_whose_disk_fails_once_continues_or_ends_in_a_line(trained, train_here, tmp_path):
    """A third step with its checkpoint and the final LoRA; every call in the long form, each ninth
    here."""
    flags = [
        *FIXED,
        "--max_train_steps",
        3,
        "--save_steps",
        1,
        "--resume_from_checkpoint",
        "latest",
    ]
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(trained, tmp_path / "count")
        disk = Disk(patch, fail_at=0)
        train_here(tmp_path / "count", "out", *flags)
    assert disk.count > 30
    home = tmp_path / "home"
    home.mkdir()
    outcomes = set()
    for number in range(
        1, disk.count + 1, 1 if os.environ.get("HYPOTHESIS_PROFILE") == "searching" else 9
    ):
        cwd = tmp_path / str(number)
        shutil.copytree(trained, cwd)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(home))
            Disk(patch, fail_at=number)
            outcomes.add(attempt(train_here, cwd, flags))
        folder = cwd / "out"
        assert {1, 2} <= {output.step_of(path) for path in whole_checkpoints(folder)}
        assert {path.name for path in folder.iterdir()} <= {
            *(
                "checkpoint-1",
                "checkpoint-2",
                "checkpoint-3",
                "samples-0",
                "lora_weights",
                "training_config.json",
            ),
            "dataset_problems.json",
            "training_report",
            "training_report.html",
        }
        if (folder / "lora_weights").exists():
            load_file(folder / "lora_weights" / "megaman_lora.safetensors")
        train_here(
            cwd, "out", *flags[:-4], *("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
        )
        shutil.rmtree(cwd)
    assert "continued" in outcomes


def attempt(train_here, cwd, flags) -> str:
    """What a run with a failing disk does: it ends well, perhaps with its LoRA in another place, or
    in one line."""
    try:
        train_here(cwd, "out", *flags)
    except (UserError, OSError):  # run_script prints them as a line
        return "one line"
    except AssertionError:  # exit code 1
        (rescued,) = cwd.glob("megaman_lora_rescued_*")
        load_file(rescued / "adapter_model.safetensors")
    return "continued"


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="mounts a tmpfs",
)
def test_a_full_file_system_loses_nothing(forked, base_folder, tmp_path):
    """6 MB, filled by the run itself: a line for each failed save, and the LoRA in another place
    at the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=6m tmpfs '{disk}' 2>/dev/null"):
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        flags = """--max_train_steps 12 --save_steps 2 --num_validation_images 1
            --validation_steps 4 --lora_rank 64 --resolution 32"""
        words = [
            "--pretrained_model_name",
            base_folder,
            "--data_dir",
            ROOT / "demo" / "held_out",
            "--output_dir",
            disk / "out",
            "--logging_dir",
            disk / "logs",
            *flags.split(),
        ]
        done = forked.run(
            ["megaman_lora.py", *words],
            tmp_path,
            FEW_SAMPLING_STEPS,
        )
        assert "Traceback" not in done.stderr
        assert "no checkpoint (" in done.stdout and "training continues" in done.stdout
        assert done.returncode == 1
        (rescued,) = tmp_path.glob("megaman_lora_rescued_*")
        assert rescued.name in done.stdout
        load_file(rescued / "adapter_model.safetensors")
        assert whole_checkpoints(disk / "out")
        assert not list((disk / "out").glob("*.aside"))
    finally:
        os.system(f"umount '{disk}'")


def test_a_folder_moved_aside_by_a_killed_run_comes_back(tmp_path):
    weights = tmp_path / "lora_weights"
    weights.mkdir()
    (weights / "kept").write_text("", encoding="utf-8")
    weights.rename(tmp_path / "lora_weights.77.former.aside")
    (tmp_path / "checkpoint-5.77.aside").mkdir()
    (tmp_path / "training_config.json.77.aside").write_text("{", encoding="utf-8")
    (tmp_path / "mine.aside").write_text("", encoding="utf-8")
    output.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lora_weights", "mine.aside"}
    assert (weights / "kept").exists()


def test_a_replaced_folder_is_never_lost_when_putting_it_back_fails(tmp_path, monkeypatch):
    folder = tmp_path / "lora_weights"
    folder.mkdir()
    (folder / "kept").write_text("", encoding="utf-8")
    real, count = os.replace, 0

    def failing(source, target):
        nonlocal count
        count += 1
        if count >= 2:
            raise FULL
        return real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError), files.replacing_folder(folder) as aside:
        (aside / "new").write_text("", encoding="utf-8")
    monkeypatch.undo()
    output.tidy(tmp_path)
    assert (folder / "kept").exists()


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: [])(0)) < 2, reason="workers need a second core"
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs workers that are forked, to break them")
def test_a_worker_that_dies_ends_in_a_line(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr("megaman.data.dataset.MegaManDataset.load_crops", lambda *args: os._exit(1))
    with pytest.raises(UserError, match="--dataloader_num_workers 0"):
        flags = ["--max_train_steps", 2, "--dataloader_num_workers", 2, "--cache_dir", "cache"]
        train_here(tmp_path, "out", *FIXED, *flags)


# TensorBoard


def test_curves_that_cannot_be_written_are_written_later(tmp_path, caplog):
    from torch.utils.tensorboard import SummaryWriter

    caplog.set_level(logging.INFO)
    broken = True

    def open_writer(purge_step):
        if broken:
            raise FULL
        return SummaryWriter(str(tmp_path), purge_step=purge_step)

    log = TrainingLog(open_writer, None)
    for step in range(1, 4):
        log.add("add_scalar", "train/loss", step / 2, step)
        log.flush()
    assert len(caplog.messages) == 1 and "No space left" in caplog.messages[0]
    broken = False
    log.add("add_scalar", "train/loss", 2.0, 4)
    log.close()
    assert len(caplog.messages) == 2
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
    ]


def test_a_writer_that_breaks_midway_leaves_no_gap_and_no_double(tmp_path, capfd, caplog):
    from torch.utils.tensorboard import SummaryWriter

    caplog.set_level(logging.INFO)
    writers = []

    def open_writer(purge_step):
        writers.append(SummaryWriter(str(tmp_path), purge_step=purge_step))
        return writers[-1]

    log = TrainingLog(open_writer, None)
    for step in range(1, 7):
        log.add("add_scalar", "train/loss", float(step), step)
        if step == 3:  # the file's own thread hits a full disk
            writer = writers[0].file_writer.event_writer._async_writer._writer
            writer.write = lambda data: (_ for _ in ()).throw(FULL)
        log.flush()
    log.close()
    assert len(writers) == 2 and len(caplog.messages) == 2
    assert "Traceback" not in capfd.readouterr().err
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]


def test_a_logging_dir_that_cannot_be_made_is_named_and_training_continues(
    train_here, tmp_path, capsys
):
    (tmp_path / "logs-out").write_text("a file where the folder should be", encoding="utf-8")
    train_here(tmp_path, "out", *FIXED, "--max_train_steps", 2)
    said = capsys.readouterr().out
    assert said.count("TensorBoard's curves cannot be written") == 1
    assert "done in" in said and "tensorboard --logdir" not in said, "where there are no curves"
    page = read_data(tmp_path / "out", LIVE)
    assert page is not None and page["tensorboard"] == ""


# Numbers that go wrong


def spoil(monkeypatch, calls: set[int]):
    real, count = UNet2DConditionModel.forward, 0

    def forward(self, *args, **kwargs):
        nonlocal count
        count += 1
        result: Any = real(self, *args, **kwargs)
        return type(result)(sample=result.sample * float("nan")) if count in calls else result

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    train_here, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, {2, 4})
    state = train_here(tmp_path, "out", *FIXED, "--max_train_steps", 5)
    said = capsys.readouterr().out
    assert "gradients that were not finite: step 2, 4 skipped, 2 so far" in said
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    steps = {
        key: value
        for key, value in load_file(tmp_path / "out" / "checkpoint-5" / TENSORS).items()
        if key.endswith(":step")
    }
    assert {float(value) for value in steps.values()} == {
        3.0
    }  # AdamW's own count: three steps were taken


def test_many_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(
    train_here, tmp_path, monkeypatch
):
    spoil(monkeypatch, set(range(3, 100)))
    with pytest.raises(
        UserError,
        match=rf"not finite in {PATIENCE} steps in a row.*--learning_rate.*--lora_alpha",
    ):
        train_here(tmp_path, "out", *FIXED, "--max_train_steps", 50, "--save_steps", 2)
    latest = whole_checkpoints(tmp_path / "out")[-1]
    assert all(
        torch.isfinite(tensor).all()
        for tensor in load_file(latest / "adapter_model.safetensors").values()
    )


def test_a_learning_rate_that_is_far_too_high_ends_in_that_line(train_here, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        train_here(
            tmp_path,
            "out",
            *FIXED[:2],
            "--learning_rate",
            1,
            "--lora_alpha",
            65536,
            "--max_train_steps",
            200,
        )


def test_good_steps_in_between_start_the_count_again():
    skipped = SkippedSteps()
    for step in range(1, 60):
        assert skipped.add([step % PATIENCE == 0], step) == ([] if step % PATIENCE == 0 else [step])
    assert skipped.total == 54


def test_images_that_are_not_numbers_are_reported_and_training_continues(
    train_here, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, {1})
    train_here(tmp_path, "out", *FIXED, "--max_train_steps", 2, "--num_validation_images", 1)
    said = capsys.readouterr().out
    assert "step 0: no sample images (The images came out as NaN" in said
    assert {path.name for path in (tmp_path / "out").glob("samples-*")} == {"samples-2"}


def test_validation_that_fails_is_reported_and_training_continues(
    train_here, tmp_path, monkeypatch, capsys
):
    from megaman.sampling import denoise

    def failing(*args, **kwargs):
        raise RuntimeError("something in the sampler")

    monkeypatch.setattr(denoise, "generate_images", failing)
    train_here(tmp_path, "out", *FIXED, "--max_train_steps", 2, "--num_validation_images", 1)
    said = capsys.readouterr().out
    assert "step 0: no sample images (something in the sampler)" in said
    assert (tmp_path / "out" / "lora_weights").is_dir()
