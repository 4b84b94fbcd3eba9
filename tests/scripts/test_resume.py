"""A run that was stopped at a checkpoint and resumed ends like the uninterrupted one, bit for bit
on a CPU."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import FEW_TARGETS, ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.errors import UserError


@pytest.fixture
def train(train_here, tmp_path, capsys):
    """train(output_dir, *flags): saves every third step; .said is what it printed."""

    def run(output_dir: str, *flags) -> dict[str, torch.Tensor]:
        fixed = [
            "--data_dir",
            ROOT / "demo" / "held_out",
            "--train_batch_size",
            2,
            "--learning_rate",
            1e-3,
        ]
        warmup = min(
            2, flags[flags.index("--max_train_steps") + 1] - 1
        )  # below the steps, or it is refused
        schedule = [
            "--lr_scheduler",
            "cosine",
            "--lr_warmup_steps",
            warmup,
            "--save_steps",
            3,
            *FEW_TARGETS,
        ]
        state = train_here(tmp_path, output_dir, *fixed, *schedule, *flags)
        run.said = capsys.readouterr().out
        return state

    return run


def stop_at(folder, step: int) -> None:
    """Leave what a run leaves that was stopped after the checkpoint of this step."""
    shutil.rmtree(folder / "lora_weights")
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def shown_by_page(folder) -> dict:
    """What the page of a run shows, in everything but times, memory and the folders' names."""
    text = (folder / "training_report" / "live.js").read_text()
    live = json.loads(text[text.index(",") + 1 : -3])
    times = {"started", "updated", "elapsed", "seconds_left", "seconds_per_step", "stale_after"}
    others = {"images_per_second", "memory", "lora", "generate", "tensorboard"}
    return {key: value for key, value in live.items() if key not in times | others}


def make_older(folder) -> None:
    """Put a run's curves a second back: TensorBoard orders files by their second and then by a
    counter as text, and here a run resumes within the second."""
    for path in folder.rglob("events.out.tfevents.*"):
        words = path.name.split(".")
        words[3] = str(int(words[3]) - 1)
        path.rename(path.with_name(".".join(words)))


@pytest.mark.parametrize("how", ["latest", "checkpoint-3"])
def test_resumed_equals_undisturbed(train, tmp_path, how):
    undisturbed = train("whole", "--max_train_steps", 5)
    train("halves", "--max_train_steps", 5)
    stop_at(tmp_path / "halves", 3)
    make_older(tmp_path / "logs-halves")
    resumed = train("halves", "--max_train_steps", 5, "--resume_from_checkpoint", how)
    assert "resuming   halves/checkpoint-3, step 3" in train.said.replace("\\", "/")
    assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)
    folders = [tmp_path / name / "checkpoint-5" for name in ("whole", "halves")]
    whole, halves = (load_file(folder / "optimizer.safetensors") for folder in folders)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    records = [json.loads((folder / "run_history.json").read_text()) for folder in folders]
    assert records[0] == records[1]
    assert len(records[0]["loss"]) == len(records[0]["gradient_norm"]) == 5
    shown = [shown_by_page(tmp_path / name) for name in ("whole", "halves")]
    assert shown[0] == shown[1] and shown[0]["state"] == "finished"

    (folder,) = (tmp_path / "logs-halves").iterdir()
    (other,) = (tmp_path / "logs-whole").iterdir()
    for tag in ("train/loss", "train/learning_rate"):
        curves = [
            [
                (event.step, event.value)
                for event in EventAccumulator(str(path)).Reload().Scalars(tag)
            ]
            for path in (folder, other)
        ]
        assert curves[0] == curves[1]


def test_convolutions_resume_bit_exactly_too(train, tmp_path):
    """Their LoRA has other strides in memory than in the files, and AdamW goes through its moments
    by address."""
    flags = ["--max_train_steps", 5, "--target_modules", "to_q", "conv1", "conv_in"]
    undisturbed = train("run", *flags)
    stop_at(tmp_path / "run", 3)
    resumed = train("run", *flags, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)


def test_dropout_resumes_bit_for_bit_too(train, tmp_path):
    """What dropout zeroes depends on the seed and the micro-batch, not on earlier computations."""
    dropping = [
        "--max_train_steps",
        5,
        "--lora_dropout",
        0.3,
        "--use_rslora",
        "--gradient_accumulation_steps",
        2,
    ]
    undisturbed = train("run", *dropping)
    stop_at(tmp_path / "run", 3)
    resumed = train("run", *dropping, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)
    stop_at(tmp_path / "run", 3)
    with pytest.raises(UserError, match="use_rslora was True and is now False"):
        train(
            "run",
            "--max_train_steps",
            5,
            "--gradient_accumulation_steps",
            2,
            "--resume_from_checkpoint",
            "latest",
        )


def test_nothing_to_resume_starts_from_scratch_and_says_so(train):
    train("new", "--max_train_steps", 1, "--resume_from_checkpoint", "latest")
    assert "no checkpoint yet: starting from scratch" in train.said


def test_a_finished_run_can_be_lengthened(train, tmp_path):
    train("run", "--max_train_steps", 3)
    train("run", "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "training_state.json").read_text())
    assert state["step"] == 5
    assert state["elapsed"] > 0


def test_other_settings_are_refused_by_name(train):
    train("run", "--max_train_steps", 1)
    with pytest.raises(UserError, match="lora_rank was 4 and is now 8"):
        train("run", "--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--lora_rank", 8)


def test_an_unfinished_checkpoint_is_never_the_latest(train, tmp_path):
    train("run", "--max_train_steps", 3)
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-9.1234.aside")
    (tmp_path / "run" / "checkpoint-7").mkdir()
    train("run", "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert "checkpoint-3, step 3" in train.said


def test_a_folder_that_is_no_checkpoint(train):
    train("run", "--max_train_steps", 1)
    with pytest.raises(UserError, match="--resume_from_checkpoint checkpoint-77 is no checkpoint"):
        train("run", "--max_train_steps", 2, "--resume_from_checkpoint", "checkpoint-77")


def test_resuming_from_another_folder_spares_what_is_here(train, tmp_path):
    for name in ("here", "there"):
        train(name, "--max_train_steps", 1)
    before = (tmp_path / "here" / "lora_weights" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="--output_dir here holds an earlier run"):
        train(
            "here",
            "--max_train_steps",
            2,
            "--resume_from_checkpoint",
            tmp_path / "there" / "checkpoint-1",
        )
    assert (
        tmp_path / "here" / "lora_weights" / "adapter_model.safetensors"
    ).stat().st_mtime_ns == before
    train(
        "new",
        "--max_train_steps",
        2,
        "--resume_from_checkpoint",
        tmp_path / "there" / "checkpoint-1",
    )
    assert (tmp_path / "new" / "checkpoint-2").is_dir()


def test_taken_up_again_from_the_middle(train, tmp_path):
    """Checkpoints later than where the run resumes stay, are named, and do not count for the
    limit."""
    train("run", "--max_train_steps", 9)
    train(
        "run",
        "--max_train_steps",
        7,
        "--resume_from_checkpoint",
        "checkpoint-3",
        "--checkpoints_total_limit",
        1,
    )
    assert "checkpoint-9 is later and stays" in train.said
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert left == {"checkpoint-7", "checkpoint-9"}


def test_a_checkpoint_beyond_the_end_is_refused(train):
    train("run", "--max_train_steps", 4)
    with pytest.raises(UserError, match="is at step 4, beyond the 2"):
        train("run", "--max_train_steps", 2, "--resume_from_checkpoint", "latest")


WHOLE = '{"step": 1, "seed": 0, "log_dir": "logs", "elapsed": 1.0, "settings": {}, "scaler": null}'


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", '{"step": 1}'),
        WHOLE.replace('"step": 1', '"step": "one"'),
        WHOLE.replace('"settings": {}', '"settings": []'),
        WHOLE.replace('"log_dir": "logs"', '"log_dir": 3'),
        WHOLE.replace("1.0", "Infinity"),
        WHOLE.replace("null", '{"scale": "large"}'),
    ],
)
def test_a_damaged_state_ends_in_a_line(train, tmp_path, content):
    train("run", "--max_train_steps", 1)
    (tmp_path / "run" / "checkpoint-1" / "training_state.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        train("run", "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
