"""The picture at the top of the README: learning at a glance. Two strips of images, made from
nothing but the demo.

    python demo/make_readme_picture.py --work_dir readme_work --output docs/demo.png

The first strip is one prompt and seed at the LoRA's strengths 0 (the base), 0.4, 0.7 and 1; the
second another prompt and seed after 0, 150, 300, 600 and 900 steps of training. Trains the demo in
--work_dir, unless that was done before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
SIDE, GAP, LINE = 160, 8, 20  # pixels
STRENGTHS = {"0": "base", "0.4": "strength 0.4", "0.7": "strength 0.7", "1": "strength 1"}
STEPS = [150, 300, 600, 900]


def run(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), "--demo", *map(str, arguments)], check=True)


def train(work_dir: Path) -> Path:
    """The demo's own training with a checkpoint every 150 steps."""
    output_dir = work_dir / "training"
    if not (output_dir / "lora_weights").is_dir():
        flags = ["--save_steps", 150, "--validation_steps", 150, "--num_validation_images", 2]
        flags += ["--overwrite_output"]
        run(
            "megaman_lora.py",
            "--output_dir",
            output_dir,
            "--logging_dir",
            work_dir / "logs",
            *flags,
        )
    return output_dir


def generate(output_dir: Path, prompt: str, seed: int, *flags: object) -> list[dict]:
    """The records of the images that generate_megaman.py makes, in its order; earlier images are
    used again."""
    if not (output_dir / "images.json").is_file():
        flags = ("--prompts", prompt, "--seed", seed, "--output_dir", output_dir, *flags)
        run("generate_megaman.py", *flags)
    return json.loads((output_dir / "images.json").read_text(encoding="utf-8"))["images"]


def strengths_strip(
    work_dir: Path, training: Path, prompt: str, seed: int
) -> list[tuple[Path, str]]:
    folder = work_dir / f"strengths-{seed}"
    flags = ["--lora_path", training / "lora_weights", "--lora_scales", ",".join(STRENGTHS)]
    records = generate(folder, prompt, seed, *flags)
    return [
        (folder / record["file"], label)
        for record, label in zip(records, STRENGTHS.values(), strict=True)
    ]


def steps_strip(work_dir: Path, training: Path, prompt: str, seed: int) -> list[tuple[Path, str]]:
    folder = work_dir / f"steps-{seed}"
    records = generate(folder, prompt, seed, "--checkpoints", training, "--lora_scales", "0,1")
    by_label = {}
    for record in records:
        if record["settings"].get("strength") in (None, "0"):
            by_label["step 0"] = folder / record["file"]
        for step in STEPS:
            if (
                f"checkpoint-{step}" in record["settings"].get("LoRA", "")
                and record["settings"]["strength"] == "1"
            ):
                by_label[f"step {step}"] = folder / record["file"]
    return [(by_label[label], label) for label in ("step 0", *(f"step {step}" for step in STEPS))]


def strip(images: list[tuple[Path, str]], title: str) -> Image.Image:
    """Images side by side with a label below each and the prompt above."""
    width = len(images) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, SIDE + 2 * LINE + 2 * GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((GAP, GAP), title, (90, 90, 90), font)
    for place, (path, label) in enumerate(images):
        left = GAP + place * (SIDE + GAP)
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(image, (left, GAP + LINE))
        pen.text((left, GAP + LINE + SIDE + 4), label, "black", font)
    return sheet


def stack(strips: list[Image.Image]) -> Image.Image:
    sheet = Image.new(
        "RGB", (max(each.width for each in strips), sum(each.height for each in strips)), "white"
    )
    top = 0
    for each in strips:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("readme_work"))
    add("--output", type=Path, default=ROOT / "docs" / "demo.png")
    hero = "volto, blue robot hero, pixel art, {} background"
    add("--strengths_prompt", default=hero.format("waving, front view, yellow"))
    add("--strengths_seed", type=int, default=42)
    add("--steps_prompt", default=hero.format("running, facing right, green hills"))
    add("--steps_seed", type=int, default=42)
    options = parser.parse_args()
    training = train(options.work_dir)
    first = strengths_strip(
        options.work_dir, training, options.strengths_prompt, options.strengths_seed
    )
    second = steps_strip(options.work_dir, training, options.steps_prompt, options.steps_seed)
    picture = stack([strip(first, options.strengths_prompt), strip(second, options.steps_prompt)])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(192).save(options.output, optimize=True)
    print(options.output)


if __name__ == "__main__":
    main()
