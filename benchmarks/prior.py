"""The demo's hero trained with and without class images: does "a red robot" stay red?

    python benchmarks/prior.py --work_dir prior_work

Trains on the demo's images of the hero alone, with the demo's settings: once as they are, and once
with the demo's other robots and the base's own images as class images (--class_data_dir). Each LoRA
and the base then generate 64 red robots without the trigger word, whose color base_quality.py's
rule names; the hero's held-out images show whether it was still learned. LoRAs that are in
--work_dir already are used again. Prints a table for people and a last JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import paths
import torch
from backgrounds import PLAIN
from base_quality import figure_color, generator
from held_out import measure

from megaman.errors import run_script
from megaman.lora import files as lora_files
from megaman.models.base import load_base

SAMPLES = 64
PROMPT = "a red robot, {} background"
GROUNDS = [name for name in PLAIN if name != "red"]  # which the rule could take for the figure
RUNS = {"without class pictures": [], "with class pictures": ["--class_data_dir", "{class}"]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", type=Path, default=paths.ROOT / "demo" / ".work" / "prior")
    parser.add_argument("--max_train_steps", type=int, default=900)
    parser.add_argument(
        "--blue_only", action="store_true", help="without the images of the hero in other colors"
    )
    options = parser.parse_args(argv)
    folders = part_pictures(options.work_dir, options.blue_only)
    loras = {}
    for name, flags in RUNS.items():
        flags = [flag.format(**{"class": folders[1]}) for flag in flags]
        loras[name] = train(options.work_dir, name, flags, folders[0], options.max_train_steps)
    results = {name: measured(lora) for name, lora in {"base": None, **loras}.items()}
    print("| | red | blue | other colors | loss on held-out images of the hero |")
    print("| --- | --- | --- | --- | --- |")
    for name, row in results.items():
        others = SAMPLES - row["red"] - row["blue"]
        print(f"| {name} | {row['red']} | {row['blue']} | {others} | {-row['gain']:.1%} |")
    print(json.dumps(results))
    return 0


def part_pictures(work_dir: Path, blue_only: bool) -> tuple[Path, Path]:
    """Copy the demo's images of the hero and the others into a folder each."""
    other_colors = ("green", "purple", "red", "white") if blue_only else ()
    recolored = tuple(f"volto_{color}_" for color in other_colors)
    folders = work_dir / "hero", work_dir / "class"
    for folder, is_hero in zip(folders, (True, False), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for source in (paths.ROOT / "demo" / "images").iterdir():
            wanted = source.suffix in (".png", ".txt") and not source.name.startswith(recolored)
            if wanted and source.name.startswith("volto") == is_hero:
                shutil.copy(source, folder)
    return folders


def train(work_dir: Path, name: str, flags: list[str], pictures: Path, steps: int) -> Path:
    """lora_weights/ of a run with the demo's settings."""
    output = work_dir / name.replace(" ", "_")
    if not (output / "lora_weights").is_dir():
        words = [
            "--demo",
            "--data_dir",
            pictures,
            "--output_dir",
            output,
            "--logging_dir",
            work_dir / "logs",
            "--num_validation_images",
            0,
            "--max_train_steps",
            steps,
            "--save_steps",
            steps,
            "--overwrite_output",
            *flags,
        ]
        subprocess.run(
            [sys.executable, paths.ROOT / "megaman_lora.py", *map(str, words)], check=True
        )
    return output / "lora_weights"


def measured(lora: Path | None) -> dict[str, float]:
    """How many of 64 red robots without the trigger word are red, how many blue, and the hero's
    gain."""
    base = load_base("demo/base", torch.float32)
    if lora:
        lora_files.load_lora(lora, base.unet)
    prompts = [PROMPT.format(GROUNDS[i % len(GROUNDS)]) for i in range(SAMPLES)]
    drawn = [figure_color(image) for image in generator(base)(prompts, range(SAMPLES))]
    gains = measure(lora, paths.ROOT / "demo" / "held_out")["gain"] if lora else [0.0]
    return {"red": drawn.count("red"), "blue": drawn.count("blue"), "gain": sum(gains) / len(gains)}


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
