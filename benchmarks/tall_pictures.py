"""What square crops cut off and buckets keep: a character taller than wide, trained both ways and
generated side by side.

    python benchmarks/tall_pictures.py tall_pictures

Makes tall versions of the demo's images, trains the demo's settings on them with and without
--enable_bucket, and combines the results in tall_pictures/side_by_side.png: a training image as
each run sees it, then what each generates, tall and square. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megaman.errors import UserError, run_script

TALL, SQUARE = (48, 80), (64, 64)  # pixels; 3 : 5 is one of the demo's buckets
PROMPT = "volto, blue robot hero, pixel art, standing, front view, white background"
SEEDS = 4


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder for images, runs and the result")
    parser.add_argument("--max_train_steps", type=int, default=900)
    options = parser.parse_args(argv)
    if options.folder.exists():
        raise UserError(f"{options.folder} exists already", "Name a new folder")
    make_tall(ROOT / "demo" / "images", options.folder / "data")
    rows = [
        make_row(options.folder, "squares", SQUARE, options.max_train_steps),
        make_row(options.folder, "buckets", TALL, options.max_train_steps, "--enable_bucket"),
    ]
    result = options.folder / "side_by_side.png"
    paste(rows).quantize(128).save(result, optimize=True)
    print(result)
    return 0


def make_row(
    folder: Path, name: str, size: tuple[int, int], steps: int, *flags: str
) -> list[Image.Image]:
    """Train with these flags; returns a training image at the size that the run sees, then the
    images that the LoRA generates."""
    data, out = folder / "data", folder / name
    train(data, out, folder / "logs", steps, *flags)
    row = [as_seen(next(data.glob("*standing_front*.png")), size)]
    for width, height in (TALL, SQUARE):
        target = folder / f"{name}_{width}x{height}"
        row += generate(out / "lora_weights", (width, height), target)
    return row


def train(data: Path, out: Path, logs: Path, steps: int, *flags: str) -> None:
    words = ["--data_dir", data, "--output_dir", out, "--logging_dir", logs]
    words += ["--num_validation_images", 0, "--max_train_steps", steps, *flags]
    run_python("megaman_lora.py", "--demo", *words)


def make_tall(source: Path, target: Path) -> None:
    """The hero's whole figures, stretched to 3 : 5: the head at the top, the feet at the bottom."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("volto_*.png")):
        if "portrait" not in path.stem:
            image = Image.open(path).convert("RGB")
            image.resize((240, 400), Image.Resampling.NEAREST).save(target / path.name)
            shutil.copy(path.with_suffix(".txt"), target)


def as_seen(path: Path, size: tuple[int, int]) -> Image.Image:
    """A training image as it is cropped and resized."""
    from megaman.data.images import crop_and_resize, crop_boxes, open_image

    image = open_image(path)
    box = crop_boxes(*image.size, count=1, rng=None, shape=size)[0]
    return crop_and_resize(image, box, size)


def generate(lora: Path, size: tuple[int, int], folder: Path) -> list[Image.Image]:
    words = ["--lora_path", lora, "--output_dir", folder, "--prompts", PROMPT]
    words += ["--num_images_per_prompt", SEEDS, "--width", size[0], "--height", size[1]]
    run_python("generate_megaman.py", "--demo", *words)
    files = [folder / f"megaman_000_{seed:02d}.png" for seed in range(SEEDS)]
    return [Image.open(file).convert("RGB") for file in files]


def run_python(script: str, *words: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], check=True)


def paste(rows: list[list[Image.Image]], scale: int = 2, gap: int = 6) -> Image.Image:
    """The rows below one another, each image enlarged without smoothing."""
    columns = list(zip(*rows, strict=True))
    widths = [max(image.width for image in column) * scale for column in columns]
    height = max(image.height for image in chain.from_iterable(rows)) * scale
    size = sum(widths) + gap * (len(widths) + 1), (height + gap) * len(rows) + gap
    sheet = Image.new("RGB", size, "gray")
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            large_size = image.width * scale, image.height * scale
            large = image.resize(large_size, Image.Resampling.NEAREST)
            left = sum(widths[:column]) + gap * (column + 1)
            top = gap + line * (height + gap) + (height - large.height) // 2
            sheet.paste(large, (left, top))
    return sheet


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
