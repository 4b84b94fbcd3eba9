"""Generation in two processes, as torchrun and `accelerate launch` start them: the images and the
gallery of one process, and an end of both when one ends."""

from __future__ import annotations

import signal
import socket
import time
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import save_visible_lora

import megaman_lora
from megaman import processes
from megaman.errors import UserError
from megaman.pages.gallery_images import read_images
from megaman.processes import launcher, one_report
from megaman.sampling.jobs import LoraVariant, PendingBatch, make_jobs, share_out
from megaman.sampling.limits import SamplingLimits, tightest
from megaman.sampling.prompts import Prompt, PromptSettings


@pytest.fixture(scope="module")
def lora_path(base_folder, tmp_path_factory):
    """A LoRA with a visible effect."""
    folder = tmp_path_factory.mktemp("lora") / "lora_weights"
    return save_visible_lora(folder, base_folder, 2, 8, ["to_v"])


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # in each process, as torchrun sets it


@pytest.fixture
def ranks(forked, tmp_path):
    """ranks(count, *flags): so many processes of one run, as torchrun starts them."""

    def start(count, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        runs = []
        for rank in map(str, range(count)):
            env = shared | ONE_THREAD | {"RANK": rank, "LOCAL_RANK": rank}
            runs.append(forked.start(["generate_megaman.py", *flags], tmp_path, env=env))
        return runs

    return start


def flags(lora_path, output, *more):
    words = ["--lora_path", lora_path, "--output_dir", output, "--num_inference_steps", 1]
    return [*words, "--guidance_scale", 1, "--prompts", "a blue robot", "a red cat", *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_two_processes_make_the_images_and_the_gallery_of_one(lora_path, forked, ranks, tmp_path):
    """Also when two resume what one began; the second is quiet, and nothing is left over."""
    more = ["--num_images_per_prompt", 2, "--lora_scales", "0,1"]
    words = ["generate_megaman.py", *flags(lora_path, "one", *more)]
    one = forked.run(words, tmp_path, env=ONE_THREAD)
    assert one.returncode == 0, one.stderr
    runs = ranks(2, *flags(lora_path, "two", *more))
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[1] == ("", "") and "2 processes" in outputs[0][0]
    whole = contents(tmp_path / "one")
    assert len(whole) == 9 and contents(tmp_path / "two") == whole
    assert read_images(tmp_path / "two") == read_images(tmp_path / "one")
    assert not list((tmp_path / "two").glob(".*"))

    (tmp_path / "two" / "megaman_000_01_0.png").unlink()
    runs = ranks(2, *flags(lora_path, "two", *more), "--resume")
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert "7 of 8 are there" in outputs[0][0]
    assert contents(tmp_path / "two") == whole
    assert read_images(tmp_path / "two") == read_images(tmp_path / "one")


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_with_a_line(lora_path, ranks, tmp_path, victim):
    more = ["--num_images_per_prompt", 100, "--batch_size", 2]
    runs = ranks(2, *flags(lora_path, "out", *more))
    while len(list((tmp_path / "out").glob("*.png"))) < 2:
        assert all(run.poll() is None for run in runs), [run.communicate() for run in runs]
        time.sleep(0.02)
    runs[victim].kill()
    other = runs[1 - victim]
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: Process {victim} has died, so the others end. "
        "Finished images are kept: add --resume to the command"
    ]
    assert not list((tmp_path / "out").glob(f"*.{other.pid}.aside"))


def test_ctrl_c_ends_all_with_one_line(lora_path, ranks, tmp_path):
    runs = ranks(2, *flags(lora_path, "out", "--num_images_per_prompt", 100, "--batch_size", 2))
    while not list((tmp_path / "out").glob("*.png")):
        assert all(run.poll() is None for run in runs), [run.communicate() for run in runs]
        time.sleep(0.02)
    for run in runs:
        run.send_signal(signal.SIGINT)
    (said, _), (quiet, quiet_errors) = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [130, 130]
    assert "torchrun --nproc_per_node 2 generate_megaman.py" in said
    assert said.rstrip().endswith("--resume")
    assert (quiet, quiet_errors) == ("", "")


def test_one_image_for_three_processes(lora_path, ranks, tmp_path):
    runs = ranks(3, *flags(lora_path, "out")[:-1], "--height", 64)
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert [image.file for image in read_images(tmp_path / "out")] == ["megaman_000_00.png"]


@pytest.mark.parametrize(
    ("error", "is_lost", "rank", "first", "expected"),
    [
        (KeyboardInterrupt(), False, 0, "stopped 1", KeyboardInterrupt()),
        (KeyboardInterrupt(), False, 1, "stopped 1", SystemExit(130)),
        (KeyboardInterrupt(), False, 1, "failed 0", SystemExit(1)),
        (ValueError("mine"), False, 1, "failed 1", ValueError("mine")),
        (RuntimeError("reset"), True, 1, "lost 1", UserError("Process 0 has died", "Resume")),
        (RuntimeError("reset"), True, 1, "lost 2", SystemExit(1)),
        (RuntimeError("reset"), True, 1, None, UserError("Process 0 has died", "Resume")),
    ],
)
def test_the_first_process_that_ends_says_why(error, is_lost, rank, first, expected):
    """first is what the store has, None if the process with the store is gone."""

    def compare_set(key: str, expected_value: str, value: str) -> bytes:
        if first is None:
            raise RuntimeError("Broken pipe")
        return first.encode()

    group = SimpleNamespace(
        rank=rank, is_main=rank == 0, store=SimpleNamespace(compare_set=compare_set)
    )
    neighbor = SimpleNamespace(
        is_lost=is_lost, obituary="Process 0 has died", join=lambda seconds: None
    )
    reason = processes._reason(error, cast(Any, group), cast(Any, neighbor), "Resume")
    assert (type(reason), str(reason)) == (type(expected), str(expected))


def test_a_mistake_is_reported_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("megaman.processes.SAYING", 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError), one_report():
        raise UserError("--height is odd", exit_code=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as raised, one_report():
        raise UserError("--height is odd", exit_code=2)
    assert raised.value.code == 2


def test_of_a_mistake_in_training_one_process_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("megaman.processes.SAYING", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "lora_weights").mkdir()
    for words, code in ((["--lora_rank", "0"], 2), (["--output_dir", str(tmp_path)], 1)):
        with pytest.raises(SystemExit) as raised:
            megaman_lora.main(words)
        assert raised.value.code == code
    assert capsys.readouterr() == ("", "")


def test_the_words_before_a_script_that_is_resumed():
    assert launcher({}) == ["python"]
    assert launcher({"WORLD_SIZE": "2"}) == ["torchrun", "--nproc_per_node", "2"]
    two_machines = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert launcher(two_machines) == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4"]


def test_batches_are_shared_out_by_their_work():
    settings = PromptSettings(
        negative_prompt="", width=64, height=64, seed=0, guidance_scale=1, num_inference_steps=1
    )
    variant = LoraVariant((), 1.0)
    jobs = make_jobs([Prompt("a")], settings, 9)
    small = [PendingBatch(variant, [job], [job]) for job in jobs]
    for count in range(1, 12):
        shares = share_out(small, count)
        assert len(shares) == count and list(chain(*shares)) == small
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and all(sizes[:9]), "the last ones are empty"
    large = PendingBatch(variant, jobs, jobs)
    assert share_out([large, *small], 2) == [[large], small]
    assert share_out([], 2) == [[], []]


def test_the_process_with_the_least_memory_decides():
    assert tightest(
        [SamplingLimits(400, 100), SamplingLimits(200, 100, tiling=True)]
    ) == SamplingLimits(200, 100, tiling=True)
