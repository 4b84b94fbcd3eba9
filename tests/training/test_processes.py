"""Several processes train what one process trains, and end together when one of them dies."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import FEW_TARGETS, ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from megaman.errors import UserError
from megaman.training.step_images import StepImages, plan_step_images

SIZES = {"images": [(64, 64)] * 4 + [(48, 120)] * 3 + [(150, 64)], "others": [(64, 64)] * 3}
SIZES["held_out"] = SIZES["others"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    """Three buckets of four, three and one image, class images and held-out images, and a text
    encoder in training."""
    folder = tmp_path_factory.mktemp("data")
    sources = iter(sorted((ROOT / "demo" / "images").glob("volto_*.png")))
    for name, sizes in SIZES.items():
        (folder / name).mkdir()
        for size, source in zip(sizes, sources, strict=False):
            Image.open(source).convert("RGB").resize(size).save(folder / name / source.name)
            shutil.copy(source.with_suffix(".txt"), folder / name)
    return [
        *("--data_dir", folder / "images", "--class_data_dir", folder / "others"),
        *("--validation_data_dir", folder / "held_out", "--eval_steps", 2, "--enable_bucket"),
        *("--train_text_encoder", "--text_encoder_lr", 1e-3, "--learning_rate", 1e-3),
        *("--adam_epsilon", 1e-2, "--center_crop", "--save_steps", 2, "--max_train_steps", 4),
        *FEW_TARGETS,
    ]


@pytest.fixture(scope="module")
def start_two(base_folder, forked) -> Callable[..., list]:
    """Start two processes, as torchrun does."""

    def start(cwd: Path, output_dir: str, *flags) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [
            *("--pretrained_model_name", base_folder, "--output_dir", output_dir),
            *("--resolution", 64, "--num_validation_images", 0, "--seed", 0, *flags),
        ]
        runs = []
        for rank in ("0", "1"):
            env = shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            runs.append(forked.start(["megaman_lora.py", *words], cwd, env=env))
        return runs

    return start


@pytest.fixture(scope="module")
def whole(flags, train_here, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(folder, "out", *flags, "--train_batch_size", 4)
    return folder


def assert_same(folder: Path, other: Path) -> None:
    """Both runs have the same LoRAs, in the UNet and in the text encoder, and the same best one."""
    for name in ("lora_weights", "lora_weights/text_encoder", "lora_weights_best"):
        ours, theirs = [
            load_file(path / "out" / name / "adapter_model.safetensors") for path in (folder, other)
        ]
        assert ours.keys() == theirs.keys()
        assert max(float(tensor.abs().max()) for key, tensor in ours.items() if "_B" in key) > 1e-4
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5


def test_two_processes_train_what_one_does(whole, flags, start_two, train_here, tmp_path, capsys):
    """Two images each, in batches that cannot always be halved; each image is encoded once. One
    process that resumes the run continues with the same images."""
    cache = ["--cache_dir", tmp_path / "cache"]
    runs = start_two(tmp_path, "out", *flags, "--train_batch_size", 2, *cache)
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert "4 images (2 x 1 accumulated x 2 processes)" in outputs[0][0]
    assert not outputs[1][0], "one process reports"
    assert_same(whole, tmp_path)
    keys = []
    for shard in (tmp_path / "cache").glob("moments/*/*.safetensors"):
        with safe_open(shard, "pt") as file:
            keys += file.keys()
    assert len(keys) == len(set(keys)) == 14

    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    shutil.rmtree(tmp_path / "out" / "lora_weights")
    resume = ["--resume_from_checkpoint", "latest"]
    train_here(tmp_path, "out", *flags, "--train_batch_size", 2, *resume)
    said = capsys.readouterr().out
    assert "4 images a step as with 2 processes: 2 x 2 accumulated x 1 process" in said
    assert_same(whole, tmp_path)


def test_when_a_process_dies_the_other_ends_and_two_resume(whole, flags, start_two, tmp_path):
    """What one process has begun, two resume; one of them is killed, the first as well, with which
    all are connected, and two end the run."""
    shutil.copytree(whole / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    flags = [*flags, "--train_batch_size", 4, "--resume_from_checkpoint", "latest"]
    for victim in (1, 0):
        runs = start_two(tmp_path, "out", *flags, "--max_train_steps", 1000)
        while not (tmp_path / "out" / "checkpoint-4").exists() and runs[0].poll() is None:
            time.sleep(0.1)
        runs[victim].kill()
        said, errors = runs[1 - victim].communicate(60)
        assert runs[1 - victim].returncode == 1, said + errors
        assert errors == (
            f"error: Process {victim} has died, so the others end. "
            "Resume with --resume_from_checkpoint latest\n"
        )
        resumed = "4 images a step as with 1 process: 2 x 1 accumulated x 2 processes"
        assert (resumed in said) == (victim == 1), "the first process reports"
        for later in (tmp_path / "out").glob("checkpoint-*"):
            if later.name != "checkpoint-2":
                shutil.rmtree(later)

    runs = start_two(tmp_path, "out", *flags)
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert_same(whole, tmp_path)


def plan(saved: tuple[int, int, int] | None, now: tuple[int, int, int], has_buckets: bool = False):
    """plan_step_images for (batch size, accumulation steps, processes) of a checkpoint and now."""

    def config(size: int, steps: int) -> Any:
        optimizer = SimpleNamespace(train_batch_size=size, gradient_accumulation_steps=steps)
        buckets = SimpleNamespace(enable_bucket=has_buckets)
        return SimpleNamespace(optimizer=optimizer, buckets=buckets)

    state = None
    if saved:
        images, world_size, _ = plan_step_images(config(*saved[:2]), saved[2], None)
        settings = images.settings(has_buckets)
        state = cast(Any, SimpleNamespace(world_size=world_size, settings=settings))
    return plan_step_images(config(*now[:2]), now[2], state)[:2]


def test_a_resumed_run_keeps_the_images_of_its_steps():
    assert plan(None, (2, 3, 4)) == (StepImages(8, 3, 2), 4)
    assert plan((2, 1, 4), (2, 1, 1)) == (StepImages(2, 4, 2), 4), "accumulates"
    assert plan((2, 1, 4), (2, 1, 1), has_buckets=True) == (StepImages(8, 1, 2), 4)
    assert plan((4, 1, 1), (4, 1, 2)) == (StepImages(4, 1, 4), 1), "two at once in each"
    assert plan((2, 1, 2), (4, 1, 1)) == (StepImages(4, 1, 4), 1), "the flags follow already"
    assert plan((2, 1, 1), (4, 1, 1)) == (StepImages(4, 1, 4), 1), "which is refused elsewhere"
    with pytest.raises(UserError, match=r"6 images, which 4 processes cannot .* 1 or 2 or 3 or 6"):
        plan((3, 2, 1), (3, 2, 4))
