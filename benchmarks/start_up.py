"""Seconds until --help, the first training step, the end of a short run, and the first image.

    python benchmarks/start_up.py --work_dir /tmp/start_up --rounds 5

Both scripts on the demo. `cold` starts with an empty latent cache, `warm` with that of the cold
run; the files are in the system's cache in both. The time of the first step is that of its end,
including the sample images that the demo generates before it. Prints every round and the medians;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path

from processes import DRAW, LESSER, TRAIN, TRAINING_BAR, machine, median_of, run, stamped

GOALS = {"help_s": 1.0, "warm_first_step_s": 12.0}  # seconds, on two cores


def train(work_dir: Path, steps: int, cpu: str) -> dict[str, float]:
    """Seconds from the start of a demo run to the end of its first step and of the run."""
    words = [
        "--demo",
        "--max_train_steps",
        steps,
        "--cache_dir",
        "cache",
        "--output_dir",
        "out",
        "--overwrite_output",
    ]
    result = run(stamped(TRAINING_BAR, TRAIN, *words), work_dir, cpu)
    return {"first_step_s": result["first"] - result["began"], "end_s": result["seconds"]}


def draw(work_dir: Path, cpu: str) -> dict[str, float]:
    """Seconds from the start to the first image in the folder and to the end, for the demo's
    prompts."""
    out = work_dir / "images"
    shutil.rmtree(out, ignore_errors=True)
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if next(out.glob("*.png"), None):
                seen.append(time.perf_counter())
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        words = ["--demo", "--lora_path", "out/lora_weights", "--output_dir", out]
        result = run([sys.executable, str(DRAW), *map(str, words)], work_dir, cpu)
    finally:
        over.set()
        watcher.join()
    return {
        "first_image_s": (seen[0] if seen else time.perf_counter()) - result["began"],
        "end_s": result["seconds"],
    }


def one_round(work_dir: Path, steps: int, cpu: str) -> dict[str, float]:
    """Everything once."""
    times = {
        "help_s": run([sys.executable, str(TRAIN), "--help"], work_dir, cpu)["seconds"],
        "draw_help_s": run([sys.executable, str(DRAW), "--help"], work_dir, cpu)["seconds"],
    }
    shutil.rmtree(work_dir / "cache", ignore_errors=True)
    for state in ("cold", "warm"):
        times |= {f"{state}_{name}": value for name, value in train(work_dir, steps, cpu).items()}
    return times | {f"draw_{name}": value for name, value in draw(work_dir, cpu).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="the runs go here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of the short run")
    parser.add_argument(
        "--cpu",
        choices=LESSER,
        default="native",
        help="pretend to be a lesser processor",
    )
    options = parser.parse_args()
    work_dir = options.work_dir.resolve()
    # Not counted: first imports compile bytecode, and first reads come from the disk.
    one_round(work_dir, 1, options.cpu)
    rounds = []
    for number in range(options.rounds):
        rounds.append(one_round(work_dir, options.steps, options.cpu))
        words = "  ".join(
            f"{name.removesuffix('_s')} {value:.2f}" for name, value in rounds[-1].items()
        )
        print(f"round {number + 1}  {words}", flush=True)
    medians = {name: median_of(rounds, name) for name in rounds[0]}
    for name, value in medians.items():
        goal = f"   (at most {GOALS[name]:g} on two cores)" if name in GOALS else ""
        print(f"{name.removesuffix('_s').replace('_', ' '):16} {value:7.2f} s{goal}")
    print(
        json.dumps(
            {
                "benchmark": "start_up",
                "rounds": options.rounds,
                "steps": options.steps,
                **medians,
                "machine": machine(options.cpu),
            }
        )
    )


if __name__ == "__main__":
    main()
