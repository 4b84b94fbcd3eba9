"""The picture at the README's top, from the gallery that the README's own command leaves: base
left, LoRA right.

python demo/make_readme_picture.py --gallery generated_demo --output docs/demo.png
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, CAPTION = 160, 6, 20  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gallery", type=Path, default=Path("generated_demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"))
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[0, 4, 5, 6, 8, 9],
        help="numbers of the pairs shown",
    )
    options = parser.parse_args()
    records = json.loads((options.gallery / "images.json").read_text(encoding="utf-8"))["images"]
    chosen = [records[number] for number in options.prompts]
    across = 3
    cell_width, cell_height = 2 * SIDE + 3 * GAP, SIDE + 2 * CAPTION + GAP
    down = -(-len(chosen) // across)
    sheet = Image.new("RGB", (across * cell_width + GAP, down * cell_height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, record in enumerate(chosen):
        left, top = GAP + (place % across) * cell_width, GAP + (place // across) * cell_height
        for column, (file, label) in enumerate(
            [(record["base_file"], "base"), (record["file"], "with the LoRA")]
        ):
            image = Image.open(options.gallery / file).resize(
                (SIDE, SIDE), Image.Resampling.NEAREST
            )
            x = left + column * (SIDE + GAP)
            pen.text((x, top), label, "black", font)
            sheet.paste(image, (x, top + CAPTION))
        words = record["prompt"].replace("blue robot hero, ", "").replace("pixel art, ", "")
        pen.text(
            (left, top + CAPTION + SIDE + 3),
            textwrap.shorten(words, 54, placeholder=" …"),
            (90, 90, 90),
            font,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
