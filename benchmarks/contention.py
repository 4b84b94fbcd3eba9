"""Steps per second alone and next to busy processes, with and without the thread policy.

    python benchmarks/contention.py --work_dir ../contention
    python benchmarks/contention.py --work_dir ../contention --settings OMP_WAIT_POLICY=PASSIVE

A busy process is `while True: pass`. Every run is a process of its own, and the settings take turns
within a round, so that a change in the machine's speed affects all of them. Speeds are relative to
that without the policy and without busy processes in the same round. `policy` is the choice of
megaman/threads.py, `none` the behavior of torch and OpenMP; more settings are environment
variables, which win over the policy.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from processes import DRAW, TRAIN, TRAINING_BAR, machine, run, significant, stamped
from step_time import TARGETS, base_of, pictures_of

BUSY = "while True: pass"
GENERATING_BAR = "generating"  # the description of generate_megaman.py's bar
SPIN_COUNT = 300_000  # libgomp's own
STEPS = {"demo": 30, "sd15": 6}  # of a run; the first one is not counted
FEW_STEPS = {"demo": 6, "sd15": 4}  # without the policy next to busy processes


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run count processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def settings_of(words: list[str]) -> dict[str, dict[str, str]]:
    """Environment variables by setting; words are those of --settings: NAME=VALUE[,NAME=VALUE]."""
    import torch

    without = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "GOMP_SPINCOUNT": str(SPIN_COUNT)}
    found = {"none": without, "policy": {}}
    for word in words:
        variables = dict(pair.split("=", 1) for pair in word.split(","))
        found[word] = {"OMP_NUM_THREADS": without["OMP_NUM_THREADS"], **variables}
    return found


def train_words(case: str, steps: int, work_dir: Path) -> list[object]:
    shared = [
        "--output_dir",
        "out",
        "--overwrite_output",
        "--max_train_steps",
        steps,
        "--num_validation_images",
        0,
    ]
    if case == "demo":
        return ["--demo", *shared]
    base, images = base_of(case, work_dir), pictures_of(case, work_dir)
    return [
        "--pretrained_model_name",
        base,
        "--data_dir",
        images,
        "--cache_dir",
        "cache",
        "--resolution",
        256,
        "--center_crop",
        "--lora_rank",
        8,
        "--target_modules",
        *TARGETS,
        *shared,
    ]


def steps_a_second(case: str, environment: dict[str, str], steps: int, work_dir: Path) -> float:
    """The speed of a run after its first step; for generation, runs a second."""
    folder = work_dir / f"run-{case}"
    if case == "generate":
        shutil.rmtree(folder / "images", ignore_errors=True)
        words = [
            "--demo",
            "--lora_path",
            work_dir / "run-lora" / "out" / "lora_weights",
            "--output_dir",
            "images",
        ]
        result = run(stamped(GENERATING_BAR, DRAW, *words), folder, environment=environment)
        return 1 / sum(result["step_s"])  # batches differ in size, so steps are no measure
    words = train_words(case, steps, work_dir)
    result = run(stamped(TRAINING_BAR, TRAIN, *words), folder, environment=environment)
    return 1 / fmean(result["step_s"])


def measure(
    case: str, settings: dict[str, dict[str, str]], busy: list[int], rounds: int, work_dir: Path
) -> dict[str, list[float]]:
    """Steps per second by "setting, busy", for each round; slow settings are measured once."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for count in busy:
            for name, environment in settings.items():
                unpolicied = name == "none" and count > 0
                if unpolicied and number > 0:
                    continue
                steps = (FEW_STEPS if unpolicied else STEPS).get(case, 0)
                with busy_processes(count):
                    speed = steps_a_second(case, environment, steps, work_dir)
                speeds[f"{name}, {count}"].append(speed)
                print(
                    f"{case:9} round {number + 1}  {name}, next to {count}: {speed:.3f} steps/s",
                    flush=True,
                )
    return speeds


def shares(speeds: dict[str, list[float]]) -> dict[str, float | None]:
    """The median over the rounds of each speed relative to "none, 0" in the same round."""
    alone = speeds["none, 0"]
    return {
        name: significant(median(value / alone[i] for i, value in enumerate(values)))
        for name, values in speeds.items()
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument(
        "--case",
        nargs="+",
        choices=["demo", "sd15", "generate"],
        default=["demo", "sd15", "generate"],
    )
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME=VALUE[,NAME=VALUE]")
    options = parser.parse_args(argv)
    work_dir = options.work_dir.resolve()
    settings = settings_of(options.settings)
    if "generate" in options.case:
        run(
            [sys.executable, str(TRAIN), *map(str, train_words("demo", 60, work_dir))],
            work_dir / "run-lora",
        )
    results = {}
    for case in options.case:
        speeds = measure(case, settings, options.busy, options.rounds, work_dir)
        results[case] = {
            "steps_a_second": {
                name: significant(median(values)) for name, values in speeds.items()
            },
            "share": shares(speeds),
        }
        print(f"\n| {case} | steps/s | share of none, 0 |\n| --- | --- | --- |")
        for name, share in results[case]["share"].items():
            print(f"| {name} | {results[case]['steps_a_second'][name]} | {share} |")
    print(json.dumps({"results": results, "rounds": options.rounds, **machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
