"""The demo's images at several guidance scales: poses, expressions, the hero, and the distance to
its palette.

    python benchmarks/guidance.py --lora_path megaman_demo_output/lora_weights

Generates the same prompts with the same seeds at each guidance scale; the judges are those of
base_quality.py. Prints a table for people and a last JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import base_quality as quality
import paths
import torch
from art import compose_images, fetch

from megaman.errors import run_script
from megaman.lora import files as lora_files
from megaman.models.base import load_base

COLUMNS = {
    "hero: named pose, mean of 10": "poses",
    "hero: named expression, mean of 4": "expressions",
    "hero in the pose asked for": "hero in the pose",
    "palette distance of those": "palette distance",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base_model", default="demo/base")
    parser.add_argument("--lora_path", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=paths.ROOT / "demo" / ".work")
    parser.add_argument(
        "--guidance_scale", type=float, nargs="+", default=[1.5, 2.5, 3.5, 5.0, 7.5]
    )
    parser.add_argument(
        "--samples", type=int, default=16, help="images for each pose and each expression"
    )
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    base = load_base(options.base_model, torch.float32)
    fetch(options.work_dir / "art")
    images, _, _ = compose_images(options.work_dir / "art", 4000, seed=999)
    judges = quality.load_judges(base, images, options.work_dir)
    lora_files.load_lora(options.lora_path, base.unet)
    results = {}
    print(f"| guidance | {' | '.join(COLUMNS.values())} |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for scale in options.guidance_scale:
        generate = quality.generator(base, scale)
        row = quality.hero_in_pose(generate, judges, options.samples)
        row |= judges.expressions.shares("hero", generate, quality.HERO_PROMPT, options.samples)
        results[scale] = row
        shown = [f"{row[key]:.1f}" if "distance" in key else f"{row[key]:.1%}" for key in COLUMNS]
        print(f"| {scale:g} | {' | '.join(shown)} |", flush=True)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
