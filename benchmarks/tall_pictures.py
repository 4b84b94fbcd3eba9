"""What square crops cut off and buckets keep: a character taller than wide, trained both ways and
drawn side by side.

    python benchmarks/tall_pictures.py tall_pictures

Makes tall versions of the demo's pictures, trains the demo's settings on them with and without
--enable_bucket, and puts one picture, tall_pictures/side_by_side.png, together: a training picture
as each run sees it, then what each draws, tall and square. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megaman.errors import UserError, run_script

TALL, SQUARE = (48, 80), (64, 64)  # pixels; 3 : 5 is one of the demo's buckets
PROMPT = "volto, blue robot hero, pixel art, standing, front view, white background"
SEEDS = 4


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder for pictures, runs and the result")
    parser.add_argument("--max_train_steps", type=int, default=900)
    options = parser.parse_args(argv)
    if options.folder.exists():
        raise UserError(f"{options.folder} exists already", "Name a new folder")
    data = options.folder / "data"
    make_tall(ROOT / "demo" / "images", data)
    rows = []
    for name, flags in [("squares", []), ("buckets", ["--enable_bucket"])]:
        out, logs = options.folder / name, options.folder / "logs"
        script(
            "megaman_lora.py",
            "--demo",
            "--data_dir",
            data,
            "--output_dir",
            out,
            "--logging_dir",
            logs,
            "--num_validation_images",
            0,
            "--max_train_steps",
            options.max_train_steps,
            *flags,
        )
        tall, square = (
            draw(out / "lora_weights", size, options.folder / f"{name}_{size[0]}x{size[1]}")
            for size in (TALL, SQUARE)
        )
        rows.append(
            [
                as_seen(next(data.glob("*standing_front*.png")), TALL if flags else SQUARE),
                *tall,
                *square,
            ]
        )
    paste(rows).quantize(128).save(options.folder / "side_by_side.png", optimize=True)
    print(options.folder / "side_by_side.png")
    return 0


def make_tall(source: Path, target: Path) -> None:
    """The hero's whole figures, stretched to 3 : 5: the head at the top, the feet at the bottom."""
    target.mkdir(parents=True)
    for picture in sorted(source.glob("volto_*.png")):
        if "portrait" not in picture.stem:
            image = Image.open(picture).convert("RGB")
            image.resize((240, 400), Image.Resampling.NEAREST).save(target / picture.name)
            shutil.copy(picture.with_suffix(".txt"), target)


def as_seen(picture: Path, size: tuple[int, int]) -> Image.Image:
    """A training picture as it comes out of the crop."""
    from megaman.data.images import crop_and_resize, crop_boxes, open_image

    image = open_image(picture)
    return crop_and_resize(image, crop_boxes(*image.size, count=1, rng=None, shape=size)[0], size)


def draw(lora: Path, size: tuple[int, int], folder: Path) -> list[Image.Image]:
    script(
        "generate_megaman.py",
        "--demo",
        "--lora_path",
        lora,
        "--output_dir",
        folder,
        "--prompts",
        PROMPT,
        "--num_images_per_prompt",
        SEEDS,
        "--width",
        size[0],
        "--height",
        size[1],
    )
    return [
        Image.open(folder / f"megaman_000_{seed:02d}.png").convert("RGB") for seed in range(SEEDS)
    ]


def script(*words: object) -> None:
    subprocess.run([sys.executable, ROOT / words[0], *map(str, words[1:])], check=True)


def paste(rows: list[list[Image.Image]], scale: int = 2, gap: int = 6) -> Image.Image:
    """The rows under one another, each picture enlarged without smoothing."""
    widths = [max(row[column].width for row in rows) * scale for column in range(len(rows[0]))]
    height = max(image.height for row in rows for image in row) * scale
    sheet = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), (height + gap) * len(rows) + gap), "gray"
    )
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            large = image.resize(
                (image.width * scale, image.height * scale), Image.Resampling.NEAREST
            )
            left = sum(widths[:column]) + gap * (column + 1)
            sheet.paste(large, (left, gap + line * (height + gap) + (height - large.height) // 2))
    return sheet


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
