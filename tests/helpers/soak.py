"""Kill a training run with SIGKILL at random moments, resume it each time, and compare the result
with an uninterrupted run.

    python tests/helpers/soak.py --kills 50        # by hand; the suite runs a short form

Every checkpoint found on the way must load, and the LoRA, the optimizer, the curves and the sample
images of the end must be the same bit for bit. Half of the kills are timed to hit a save: as soon
as an unfinished folder shows.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

os.environ["ACCELERATE_USE_CPU"] = "true"

from forking import LIBRARIES
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megaman_lora
from megaman.errors import run_script
from megaman.lora.files import PEFT_WEIGHTS
from megaman.training import validation
from megaman.training.checkpoint import read_train_state
from megaman.training.optimizer_state import TENSORS
from megaman.training.output import find_all
from megaman.training.run_metadata import TIMES

for library in LIBRARIES:  # here, once; with no work done yet that a fork could not take along
    importlib.import_module(library)
gc.freeze()

# What differs by the time of a run: a checkpoint's state has the elapsed time and the curve's
# folder, and the page that shows the run names its thumbnails by time.
STATE, SHOWN = "training_state.json", "training_report/"


SOURCE = ["--demo"]  # what to train on


def arguments(output: Path, steps: int, save_steps: int) -> list[str]:
    flags = f"""--max_train_steps {steps} --save_steps {save_steps}
        --validation_steps {3 * save_steps} --num_validation_images 1 --train_batch_size 1
        --lora_rank 2 --lora_dropout 0.1 --target_modules to_q to_v --checkpoints_total_limit 3
        --resume_from_checkpoint latest"""
    folders = [
        "--output_dir",
        str(output),
        "--logging_dir",
        str(output.with_name(f"{output.name}-logs")),
    ]
    return [*SOURCE, *flags.split(), *folders]


class Run:
    """A training run in a process of its own, forked after the libraries were imported: seconds
    less for each kill."""

    def __init__(self, words: list[str]):
        self.ended: int | None = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(self.errors.fileno(), 2)
                code = run_script(megaman_lora.main, words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.ended is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            self.ended = os.waitstatus_to_exitcode(status) if process else None
        return self.ended

    def end(self) -> None:
        """Wait for it; whatever went wrong in it is shown."""
        while self.poll() is None:
            time.sleep(0.01)
        self.errors.seek(0)
        assert self.ended == 0, self.errors.read().decode(errors="replace")


def kill_somewhere(words: list[str], output: Path, rng: random.Random, longest: float) -> str:
    """Start the run and kill it: at a random moment, or while a save is under way. Returns what
    happened."""
    process = Run(words)
    deadline = time.monotonic() + rng.uniform(0.2, longest)
    in_a_save, seen = rng.random() < 0.5, "at a random moment"
    skip = rng.randint(0, 3)  # saves that are let through
    while process.poll() is None:
        unfinished = {path.name for path in output.glob("*.aside")} if output.is_dir() else set()
        if in_a_save and unfinished:
            if skip == 0:
                time.sleep(rng.uniform(0, 0.02))
                seen = "while saving"
                break
            skip -= 1
            while process.poll() is None and unfinished & {
                path.name for path in output.glob("*.aside")
            }:
                time.sleep(0.001)
        if time.monotonic() > deadline + (longest if in_a_save else 0):
            break
        time.sleep(0.001)
    if process.poll() is not None:
        process.end()
        return "finished first"
    os.kill(process.process, signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.001)
    return seen


def check_checkpoints(output: Path) -> int:
    """Every checkpoint that stands there loads; returns their number."""
    found = find_all(output)
    for folder in found:
        read_train_state(folder)
        load_file(folder / PEFT_WEIGHTS)
        load_file(folder / TENSORS)
    unfinished = [
        path
        for path in output.glob("checkpoint-*")
        if path not in found and not path.name.endswith(".aside")
    ]
    assert not unfinished, f"half a checkpoint under a whole one's name: {unfinished}"
    return len(found)


def curves(output: Path, steps: int) -> dict[str, Any]:
    logs = output.with_name(f"{output.name}-logs")
    (folder,) = [path for path in logs.iterdir() if ends_at(path, steps)]
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in log.Scalars(tag)]
        for tag in log.Tags()["scalars"]
    }
    images = {
        tag: {event.step: event.encoded_image_string for event in log.Images(tag)}
        for tag in log.Tags()["images"]
    }
    return {**scalars, **images}


def ends_at(folder: Path, step: int) -> bool:
    """Whether a folder's curves end at this step; a run that is killed before its first checkpoint
    starts again with another folder."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = log.Tags()["scalars"]
    return bool(tags) and log.Scalars(tags[0])[-1].step == step


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata, but for the times in it, and tensors of a safetensors file; its library writes the
    metadata in a new order each time."""
    with safe_open(path, "pt") as file:
        metadata = {
            key: value for key, value in (file.metadata() or {}).items() if key not in TIMES
        }
        return metadata, {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def files_in(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(SHOWN)}


def compare(whole: Path, killed: Path, steps: int) -> None:
    names, others = files_in(whole), files_in(killed)
    assert names == others, f"only one of the two runs left {sorted(names ^ others)}"
    for name in sorted(names - {"training_config.json"}):
        if name.endswith(".safetensors"):
            assert content(whole / name) == content(killed / name), f"{name} differs"
        elif not name.endswith(STATE):
            assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs"
    first, second = curves(whole, steps), curves(killed, steps)
    assert first.keys() == second.keys()
    for tag in first:
        assert first[tag] == second[tag], f"TensorBoard's {tag} differs"


def soak(
    folder: Path, kills: int, steps: int, save_steps: int, seed: int, say=print
) -> dict[str, int]:
    """Returns how often each kind of kill happened, and how many checkpoints were looked at."""
    rng = random.Random(seed)
    whole = folder / "whole"
    began = time.monotonic()
    Run(arguments(whole, steps, save_steps)).end()
    longest = time.monotonic() - began
    counts: dict[str, int] = {"checkpoints looked at": 0, "runs brought to their end": 0}
    killed = number = 0
    while killed < kills:
        output = folder / f"killed-{number}"
        words = arguments(output, steps, save_steps)
        while killed < kills:
            outcome = kill_somewhere(words, output, rng, longest)
            counts[outcome] = counts.get(outcome, 0) + 1
            counts["checkpoints looked at"] += check_checkpoints(output) if output.is_dir() else 0
            if outcome == "finished first":
                break
            killed += 1
            say(f"kill {killed}: {outcome}")
        Run(words).end()
        compare(whole, output, steps)
        counts["runs brought to their end"] += 1
        say(f"run {number} ended as the undisturbed one")
        number += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save_steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampling_steps", type=int, default=25, help="of each sample image")
    parser.add_argument("--source", nargs=argparse.REMAINDER, help="flags in place of --demo")
    options = parser.parse_args()
    SOURCE[:] = options.source or SOURCE
    validation.NUM_INFERENCE_STEPS = options.sampling_steps
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), options.kills, options.steps, options.save_steps, options.seed))


if __name__ == "__main__":
    main()
