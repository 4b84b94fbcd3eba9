"""Steps and seconds until megaman_lora.py has learned what diffusers' example has at its end.

    python benchmarks/learning.py --work_dir ../learning \\
        --peer ../peer --peer_python ../peer/.venv/bin/python

On the demo's base and images, for each seed, by turns:

- `peer`: train_text_to_image_lora.py, unchanged. The held-out loss of its LoRA is the target.
- `same`: megaman_lora.py with the peer's settings: in how many steps is it at the target?
- `demo`: megaman_lora.py --demo with its samples and checkpoints, evaluated every 30 steps: in
  which share of the peer's time is it there? Seconds count from the end of the first step.

The losses of `demo`'s checkpoints are computed again by held_out.py, which has to agree with the
curve of the run. docs/performance.md says how to set up the peer. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

from processes import BENCHMARKS, ROOT, TRAIN, TRAINING_BAR, machine, run, significant, stamped
from step_time import TARGETS, base_of, peer_command, pictures_of

BATCH_SIZE, RANK, LEARNING_RATE = 4, 16, 2e-3
EVAL_STEPS = {"same": 10, "demo": 30}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--peer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--steps", type=int, default=900, help="of peer and same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    options.work_dir = options.work_dir.resolve()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    rows = [compare(Runs(options, seed)) for seed in options.seeds]
    print(json.dumps({"machine": machine(), "steps": options.steps, "seeds": rows}))
    return 0


class Runs:
    """The three runs of one seed, each in a folder of its own."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.work_dir = options.work_dir / f"seed-{seed}"
        shutil.rmtree(self.work_dir, ignore_errors=True)
        self.base = base_of("demo", options.work_dir)
        self.pictures = pictures_of("demo", options.work_dir)

    @property
    def shared(self) -> list[str]:
        """The settings that peer and same have under the same names."""
        words = {
            "--resolution": 64,
            "--train_batch_size": BATCH_SIZE,
            "--max_train_steps": self.options.steps,
            "--learning_rate": LEARNING_RATE,
            "--lr_scheduler": "constant",
            "--lr_warmup_steps": 0,
            "--mixed_precision": "no",
        }
        return ["--center_crop", *flat(words)]

    def peer(self) -> tuple[float, float]:
        """Held-out loss at its end and seconds from the end of its first step."""
        folder = self.work_dir / "peer"
        words = {
            "--pretrained_model_name_or_path": self.base,
            "--train_data_dir": self.pictures,
            "--caption_column": "text",
            "--cache_dir": folder / "datasets",
            "--output_dir": "out",
            "--rank": RANK,
            "--seed": self.seed,
            "--checkpointing_steps": 10**8,
        }
        command = peer_command(self.options, [*self.shared, *flat(words)])
        seconds = sum(run(command, folder)["step_s"])
        return self.held_out_losses([folder / "out"])[0], seconds

    def same(self) -> list[tuple[int, float]]:
        """Steps and held-out losses with the peer's settings."""
        words = {
            "--pretrained_model_name": self.base,
            "--data_dir": self.pictures,
            "--validation_data_dir": ROOT / "demo" / "held_out",
            "--lora_rank": RANK,
            "--lora_alpha": RANK,
            "--save_steps": 10**8,
            "--num_validation_images": 0,
        }
        command = [*self.shared, *flat(words), "--target_modules", *TARGETS]
        return self.ours("same", command)[0]

    def demo(self) -> tuple[list[tuple[int, float]], list[float]]:
        """Steps and held-out losses of --demo, and the seconds after each step."""
        return self.ours("demo", ["--demo"])

    def ours(self, name: str, words: list[str]) -> tuple[list[tuple[int, float]], list[float]]:
        folder = self.work_dir / name
        more = ["--seed", self.seed, "--output_dir", "out", "--logging_dir", "logs"]
        more += ["--eval_steps", EVAL_STEPS[name], "--log_format", "json"]
        result = run(stamped(TRAINING_BAR, TRAIN, *words, *more), folder)
        curve = []
        for line in (folder / "output.txt").read_text(encoding="utf-8").splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            # An event has the latest evaluation, which may be an earlier step's.
            if event.get("event") == "step" and event["step"] % EVAL_STEPS[name] == 0:
                curve.append((event["step"], event["held_out_loss"]))
        return curve, list(accumulate(result["step_s"], initial=0.0))

    def held_out_losses(self, loras: list[Path]) -> list[float]:
        """By held_out.py, with the noise of seed 0, which a run's own evaluation has too."""
        words = ["--base_model", self.base, "--lora_path", *loras]
        command = [sys.executable, str(BENCHMARKS / "held_out.py"), *map(str, words)]
        run(command, self.work_dir / "held_out")
        output = (self.work_dir / "held_out" / "output.txt").read_text(encoding="utf-8")
        return [row["with"][0] for row in json.loads(output.splitlines()[-1])]


def flat(words: dict[str, object]) -> list[str]:
    return [str(word) for pair in words.items() for word in pair]


def compare(runs: Runs) -> dict[str, Any]:
    """Run all three and print how soon ours was at the peer's loss."""
    target, peer_seconds = runs.peer()
    same = runs.same()
    demo, elapsed = runs.demo()
    steps = first_at(target, same)
    demo_steps = first_at(target, demo)
    # The evaluation and whatever else follows the step is over when the next one ends.
    seconds = None if demo_steps is None else elapsed[min(demo_steps, len(elapsed) - 1)]
    saved = {step: runs.work_dir / "demo" / "out" / f"checkpoint-{step}" for step, _ in demo}
    saved = {step: folder for step, folder in saved.items() if folder.is_dir()}
    again = runs.held_out_losses(list(saved.values()))
    differences = [abs(dict(demo)[step] - loss) for step, loss in zip(saved, again, strict=True)]
    row = {
        "seed": runs.seed,
        "peer_loss": significant(target),
        "peer_seconds": significant(peer_seconds),
        "same_steps": steps,
        "same_loss": significant(same[-1][1]),
        "demo_steps": demo_steps,
        "demo_seconds": significant(seconds),
        "demo_loss": significant(demo[-1][1]),
        "share_of_peer_time": None if seconds is None else significant(seconds / peer_seconds),
        "checkpoints": list(saved),
        "largest_difference_to_held_out.py": max(differences),
    }
    print(row, flush=True)
    return row


def first_at(target: float, curve: list[tuple[int, float]]) -> int | None:
    """The first step whose loss is at the target or below."""
    return next((step for step, loss in curve if loss <= target), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
