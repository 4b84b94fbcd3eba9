"""Ctrl-C, SIGTERM and SIGHUP while training: the step is finished, a checkpoint saved, the command
to resume printed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from megaman.training.output import find_all, step_of
from megaman.training.signals import StoppedError, StopSignal

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="signals are sent in another way there"
)
FLAGS = """--output_dir out --logging_dir logs --max_train_steps 400 --resolution 64
    --num_validation_images 0 --lora_rank 2"""


@pytest.fixture(scope="module")
def words(base_folder) -> list:
    """A run that takes longer than a test waits for a signal's effect."""
    data = ["--pretrained_model_name", base_folder, "--data_dir", ROOT / "demo" / "held_out"]
    return ["megaman_lora.py", *data, *FLAGS.split()]


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_the_first_signal_saves_and_says_how_to_resume(forked, words, tmp_path, name, code):
    process = forked.start([*words, "--save_steps", "3"], tmp_path)
    wait_for(lambda: find_all(tmp_path / "out"), process)
    process.send_signal(getattr(signal, name))
    said, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in errors
    step = int(re.findall(r"stopped after step (\d+)", said)[0])
    latest = find_all(tmp_path / "out")[-1]
    assert step_of(latest) == step < 400
    assert all(
        torch.isfinite(tensor).all()
        for tensor in load_file(latest / "adapter_model.safetensors").values()
    )
    assert not list((tmp_path / "out").glob("*.aside"))
    assert not (tmp_path / "out" / "lora_weights").exists()

    (command,) = re.findall(r"to resume: python megaman_lora.py (.+)", said)
    again = ["megaman_lora.py", *shlex.split(command), "--max_train_steps", str(step + 1)]
    done = forked.run(again, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint-{step}, step {step}" in done.stdout


def test_a_second_signal_leaves_at_once_without_half_a_file(forked, words, tmp_path):
    """The first comes while the images of the start are generated, so the second finds the run
    still busy."""
    more = ["--num_validation_images", "40", "--save_steps", "1000"]
    process = forked.start([*words, *more], tmp_path)
    wait_for(lambda: (tmp_path / "out" / "training_config.json").exists(), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.aside"))


def test_handlers_are_restored_and_sampling_can_be_interrupted():
    former = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.raise_if_received()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError):
            stop.raise_if_received()
        assert stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is former
