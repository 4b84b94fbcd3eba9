"""Does "a red robot" stay red beside a blue hero? The demo's hero learnt with and without class pictures.

    python benchmarks/prior.py --work_dir prior_work

Trains on the demo's pictures of the hero alone, with the demo's settings: once as they are, and once with the demo's
other robots and what the base draws itself as class pictures (--class_data_dir). Each LoRA and the base then draw
64 red robots without the trigger word, whose colour base_quality.py's rule tells; the hero's held-out pictures show
whether it was learnt all the same. Trained LoRAs that are in --work_dir are used again. Prints a table for people and a
last JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import torch
from backgrounds import PLAIN
from base_quality import drawer, figure_colour
from held_out import measure

from megaman import lora_files
from megaman.base import load_base
from megaman.errors import run_script

SAMPLES = 64
COLOURS = ["red", "green", "yellow"]
RUNS = {"without class pictures": [], "with class pictures": ["--class_data_dir", "{class}"]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo" / ".work" / "prior")
    parser.add_argument("--max_train_steps", type=int, default=900)
    options = parser.parse_args(argv)
    folders = part_pictures(options.work_dir)
    results = {"base": {**colours(None), "held-out loss": 0.0}}
    for name, flags in RUNS.items():
        lora = train(options.work_dir, name, [flag.format(**{"class": folders[1]}) for flag in flags], folders[0],
                     options.max_train_steps)  # fmt: skip
        gain = sum(measure(lora, ROOT / "demo" / "held_out")["gain"]) / 3
        results[name] = {**colours(lora), "held-out loss": -gain}
    columns = [f"{colour} robot drawn {colour}" for colour in COLOURS] + ["red robot drawn blue", "held-out loss"]
    print("| |", " | ".join(columns), "|")
    print("| --- |", " | ".join(["---"] * len(columns)), "|")
    for name, row in results.items():
        print(f"| {name} |", " | ".join(f"{row[column]:.1%}" for column in columns), "|")
    print(json.dumps(results))
    return 0


def part_pictures(work_dir: Path) -> tuple[Path, Path]:
    """The demo's pictures of the hero, and its others, in a folder each."""
    folders = work_dir / "hero", work_dir / "class"
    for folder, is_hero in zip(folders, (True, False), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for source in (ROOT / "demo" / "images").iterdir():
            if source.suffix in (".png", ".txt") and source.name.startswith("volto") == is_hero:
                shutil.copy(source, folder)
    return folders


def train(work_dir: Path, name: str, flags: list[str], pictures: Path, steps: int) -> Path:
    """lora_weights/ of a run with the demo's settings."""
    output = work_dir / name.replace(" ", "_")
    if not (output / "lora_weights").is_dir():
        words = ["--demo", "--data_dir", pictures, "--output_dir", output, "--logging_dir", work_dir / "logs",
                 "--num_validation_images", 0, "--max_train_steps", steps, "--save_steps", steps,
                 "--overwrite_output", *flags]  # fmt: skip
        subprocess.run([sys.executable, ROOT / "megaman_lora.py", *map(str, words)], check=True)
    return output / "lora_weights"


def colours(lora: Path | None) -> dict[str, float]:
    """Of 64 robots of each colour, without the trigger word, the share that has it, and the share that is blue."""
    base = load_base("demo/base", torch.float32)
    if lora:
        lora_files.load_lora(lora, base.unet)
    shares = {}
    for colour in COLOURS:
        prompts = [f"a {colour} robot, {PLAIN_NAMES[i % len(PLAIN_NAMES)]} background" for i in range(SAMPLES)]
        drawn = [figure_colour(picture) for picture in drawer(base)(prompts, range(SAMPLES))]
        shares[f"{colour} robot drawn {colour}"] = drawn.count(colour) / SAMPLES
        shares[f"{colour} robot drawn blue"] = drawn.count("blue") / SAMPLES
    return shares


# Backgrounds that the rule cannot take for the figure.
PLAIN_NAMES = [name for name in PLAIN if name not in COLOURS]


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
