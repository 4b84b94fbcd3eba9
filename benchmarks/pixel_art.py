"""How often the rule of --upscale auto is right on photographs, drawings and pixel art.

    python benchmarks/pixel_art.py --photos FOLDER --drawings FOLDER --sprites FOLDER

Takes a hundred images of each kind: crops of photographs, of 48 to 256 pixels, a half of them
scaled down; drawings scaled to 48 to 256 pixels, some of them saved as JPEG; and sprites, a quarter
of them enlarged two to four times with nearest neighbor and a quarter saved as JPEG, most of these
enlarged too. The last line is JSON with the images that the rule takes for the wrong kind.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megaman.data.images import BadImageError, flatten, open_transparent
from megaman.data.pixel_art import is_pixel_art

MIN_SIDE, MAX_SIDE = 48, 256  # pixels of photographs and drawings
RESAMPLING = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
FACTORS = (2, 3, 4)
Change = Callable[[Image.Image, random.Random], Image.Image]


def side(rng: random.Random, largest: int) -> int:
    """A side in pixels, small ones as likely as large ones."""
    limit = max(MIN_SIDE, min(MAX_SIDE, largest))
    return round(MIN_SIDE * (limit / MIN_SIDE) ** rng.random())


def photograph(image: Image.Image, rng: random.Random) -> Image.Image:
    """A crop of a photograph, a half of the time scaled down."""
    if rng.random() < 0.5:
        image = image.reduce(rng.choice((2, 3, 4)))
    width, height = side(rng, image.width), side(rng, image.height)
    left = rng.randint(0, max(0, image.width - width))
    top = rng.randint(0, max(0, image.height - height))
    return image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))


def drawing(image: Image.Image, rng: random.Random) -> Image.Image:
    """A drawing at another size, a fifth of the time as JPEG, a third of the time on white."""
    image = image.copy()
    longest = side(rng, max(image.size))
    image.thumbnail((longest, longest), rng.choice(RESAMPLING))
    if rng.random() < 0.2:
        return as_jpeg(image, rng)
    return flatten(image) if rng.random() < 0.33 else image


def sprite(image: Image.Image, rng: random.Random) -> Image.Image:
    """A sprite as it is, enlarged, or as JPEG."""
    kind = rng.choice(("as it is", "as it is", "enlarged", "jpeg"))
    if kind == "enlarged" or (kind == "jpeg" and rng.random() < 0.6):
        factor = rng.choice(FACTORS)
        size = image.width * factor, image.height * factor
        image = image.resize(size, Image.Resampling.NEAREST)
    return as_jpeg(image, rng) if kind == "jpeg" else image


def as_jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image after it was saved as JPEG, on white."""
    buffer = io.BytesIO()
    flatten(image).save(buffer, "JPEG", quality=rng.randint(75, 95))
    return Image.open(buffer).convert("RGB")


def examine(folder: Path, change: Change, expected: bool, args: argparse.Namespace) -> list[str]:
    """The images of a folder that the rule takes for the wrong kind, each with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    wrong = []
    for number in range(args.count):
        rng = random.Random(f"{args.seed} {folder.name} {number}")
        file = files[number % len(files)] if len(files) < args.count else rng.choice(files)
        try:
            image = change(open_transparent(file), rng)
        except BadImageError as error:
            raise SystemExit(f"{file}: {error}") from None
        if is_pixel_art(image) != expected:
            wrong.append(f"{file.name} {image.width}x{image.height}")
            if args.save_wrong:
                args.save_wrong.mkdir(parents=True, exist_ok=True)
                image.save(args.save_wrong / f"{folder.name}_{number}.png")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for kind in ("photos", "drawings", "sprites"):
        parser.add_argument(f"--{kind}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="images of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_wrong", type=Path, help="a folder for the images it is wrong about")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "photos": examine(args.photos, photograph, False, args),
        "drawings": examine(args.drawings, drawing, False, args),
        "sprites": examine(args.sprites, sprite, True, args),
    }
    result["count"] = args.count
    print(json.dumps(result))


if __name__ == "__main__":
    main()
