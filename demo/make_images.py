"""Draw the demo's images: volto, an original pixel-art robot hero, and a few other robots.

Everything is drawn on a grid of 32 x 32 cells and saved nearest-upscaled to 256 x 256. The hero has
the poses of rig.py and a look of its own: a head like a screen, two large eyes, ear caps, and a
lightning bolt on top. Four flat colors.

    python make_images.py

writes images/ (what the LoRA is trained on) and held_out/ (the hero in combinations that images/
lacks), each image with its caption in a text file of the same name. The same files come out on
every run.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from backgrounds import draw_background
from PIL import Image
from rig import (
    FRONT_POSES,
    OUTLINE,
    SIDE_POSES,
    Canvas,
    Color,
    Point,
    Pose,
    Style,
    draw_robot,
    paint_eye,
    paint_mouth,
)
from sprites import draw_sprite

SCALE = 8  # pixels of the saved image to one cell
TRIGGER = "volto, {} robot hero"

AMBER: Color = (255, 178, 36)
SCREEN: Color = OUTLINE
WHITE: Color = (250, 252, 255)
# The armor in other colors than blue. A caption names the color, so that it stays the caption's to
# choose and does not become part of the character.
ARMOR: dict[str, Color] = {
    "blue": (44, 104, 232),
    "red": (214, 48, 50),
    "green": (54, 164, 74),
    "purple": (138, 74, 206),
    "white": (236, 240, 248),
}
PALETTE = [OUTLINE, ARMOR["blue"], AMBER, WHITE]

BOLT = [
    "...##.",
    "..##..",
    ".#####",
    "...##.",
    "..##..",
    ".##...",
]
LARGE_BOLT = [
    "....###",
    "...###.",
    "..###..",
    ".######",
    "....##.",
    "...##..",
    "..##...",
    ".##....",
]


def draw_hero(
    pose: str, view: str, armor: Color = ARMOR["blue"], expression: str = "calm", scale: int = 1
) -> Canvas:
    """The hero in a pose of rig.py or as a "portrait", seen from the "front", the "back" or the
    "side"."""
    canvas = Canvas(scale)
    if pose == "portrait":
        _draw_portrait(canvas, armor, expression)
        return canvas
    style = Style(
        body=armor,
        limbs=armor,
        gloves=AMBER,
        boots=AMBER,
        glow=WHITE,
        paint_head=lambda canvas, neck, view: _paint_head(canvas, neck, view, armor),
        paint_chest=_paint_chest,
        thickness=1.5,
        hand=2.3,
        shoulders=8,
        hips=7,
    )
    draw_robot(canvas, hero_pose(pose, view), view, style)
    return canvas


def hero_pose(pose: str, view: str) -> Pose:
    return (SIDE_POSES if view == "side" else FRONT_POSES)[pose]


def _paint_head(canvas: Canvas, neck: Point, view: str, armor: Color) -> None:
    """The head is 14 cells wide and 10 high; from the side the screen is in front and one ear cap
    in sight."""
    x, bottom = round(neck[0]), round(neck[1])
    top = bottom - 10
    canvas.paint(canvas.glyph(BOLT, x - (4 if view == "side" else 3), top - 5), AMBER)
    if view != "side":
        for ear in (-8, 8):
            canvas.paint(canvas.box(x + ear - 1, top + 3, x + ear + 1, top + 8), AMBER)
    canvas.paint(canvas.box(x - 7, top, x + 7, bottom, 2.5), armor)
    if view == "back":
        canvas.paint(canvas.box(x - 3, top + 4, x + 3, top + 7, 0.8), AMBER)
        return
    if view == "side":
        canvas.paint(canvas.box(x - 5, top + 3, x - 2, top + 8, 0.8), AMBER)
        canvas.fill(canvas.box(x - 1, top + 2, x + 7, top + 8, 1), SCREEN)
        eyes = (x + 1, x + 4)
    else:
        canvas.fill(canvas.box(x - 5, top + 2, x + 5, top + 8, 1), SCREEN)
        eyes = (x - 3, x + 1)
    for left in eyes:
        canvas.fill(canvas.box(left, top + 3, left + 2, top + 7), WHITE)


def _paint_chest(canvas: Canvas, middle: Point, view: str) -> None:
    x, y = round(middle[0]), round(middle[1])
    if view == "back":
        canvas.paint(canvas.box(x - 2, y - 2, x + 2, y + 2), AMBER)
    else:
        canvas.fill(canvas.box(x - 1, y - 1, x + 1, y + 2), AMBER)


def _draw_portrait(canvas: Canvas, armor: Color, expression: str) -> None:
    canvas.paint(canvas.box(12, 25, 20, 34), armor)
    canvas.paint(canvas.box(4, 28, 28, 40, 3), armor)
    canvas.paint(canvas.box(14, 29, 18, 40), AMBER)
    canvas.paint(canvas.glyph(LARGE_BOLT, 12, 1), AMBER)
    for ear in (4, 28):
        canvas.paint(canvas.box(ear - 2, 13, ear + 2, 22, 0.8), AMBER)
    canvas.paint(canvas.box(4, 8, 28, 26, 4), armor)
    canvas.fill(canvas.box(7, 11, 25, 24, 1.5), SCREEN)
    for side in (-1, 1):
        paint_eye(canvas, (16 + side * 4.5, 15), 2.6, side, expression, WHITE)
    paint_mouth(canvas, (16, 20.5), 2.2, expression, WHITE)


class HeroImage(NamedTuple):
    """An image of the hero: pose and view as its caption names them, the background, the armor's
    color."""

    words: str
    background: str
    color: str = "blue"

    @property
    def stem(self) -> str:
        words = self.words.replace("facing ", "")
        color = "" if self.color == "blue" else f"{self.color} "
        return f"volto {color}{words} {self.background}".replace(",", "").replace(" ", "_")

    @property
    def caption(self) -> str:
        return (
            f"{TRIGGER.format(self.color)}, pixel art, {self.words}, {self.background} background"
        )


IMAGES = [
    HeroImage("standing, front view", "white"),
    HeroImage("standing, front view", "brick wall"),
    HeroImage("standing, back view", "green hills"),
    HeroImage("standing, facing right", "yellow"),
    HeroImage("standing, facing left", "city"),
    HeroImage("running, facing right", "green hills"),
    HeroImage("running, facing right", "white"),
    HeroImage("running, facing left", "orange"),
    HeroImage("running, facing left", "snow"),
    HeroImage("jumping, facing right", "starry night"),
    HeroImage("jumping, facing left", "pink"),
    HeroImage("jumping, front view", "green"),
    HeroImage("kneeling, facing right", "brown"),
    HeroImage("kneeling, facing left", "snow"),
    HeroImage("kneeling, facing right", "red"),
    HeroImage("sitting, front view", "teal"),
    HeroImage("sitting, facing right", "sunset"),
    HeroImage("sitting, facing left", "white"),
    HeroImage("waving, front view", "teal"),
    HeroImage("waving, front view", "city"),
    HeroImage("waving, front view", "yellow"),
    HeroImage("arms raised, front view", "starry night"),
    HeroImage("arms raised, front view", "red"),
    HeroImage("arms raised, back view", "gray"),
    HeroImage("shooting, arm cannon, facing left", "black"),
    HeroImage("shooting, arm cannon, facing right", "sunset"),
    HeroImage("shooting, arm cannon, facing right", "gray"),
    HeroImage("aiming up, arm cannon, facing right", "purple"),
    HeroImage("aiming up, arm cannon, facing left", "green hills"),
    HeroImage("aiming up, arm cannon, facing right", "white"),
    HeroImage("flying, facing right", "city"),
    HeroImage("flying, facing left", "navy"),
    HeroImage("flying, facing right", "pink"),
    HeroImage("portrait, happy", "orange"),
    HeroImage("portrait, happy", "sunset"),
    HeroImage("portrait, happy", "white"),
    HeroImage("portrait, angry", "gray"),
    HeroImage("portrait, angry", "black"),
    HeroImage("portrait, angry", "brick wall"),
    HeroImage("portrait, surprised", "yellow"),
    HeroImage("portrait, surprised", "snow"),
    HeroImage("portrait, surprised", "purple"),
    HeroImage("portrait, calm", "navy"),
    HeroImage("portrait, calm", "pink"),
    HeroImage("portrait, calm", "green"),
    HeroImage("standing, front view", "gray", "red"),
    HeroImage("running, facing left", "starry night", "green"),
    HeroImage("shooting, arm cannon, facing right", "white", "purple"),
    HeroImage("portrait, happy", "teal", "white"),
]
HELD_OUT = [
    HeroImage("standing, front view", "purple"),
    HeroImage("running, facing right", "city"),
    HeroImage("jumping, facing left", "sunset"),
    HeroImage("shooting, arm cannon, facing right", "starry night"),
    HeroImage("waving, front view", "snow"),
    HeroImage("flying, facing left", "white"),
    HeroImage("kneeling, facing left", "yellow"),
    HeroImage("portrait, surprised", "green"),
]

# Robots like those that the base has seen, which tell the LoRA what is not the hero: color and
# background.
OTHER_ROBOTS = [
    ("red", "white"),
    ("green", "purple"),
    ("yellow", "green hills"),
    ("gray", "orange"),
    ("purple", "yellow"),
    ("pink", "city"),
    ("blue", "white"),
    ("brown", "snow"),
    ("blue", "green"),
    ("teal", "black"),
    ("orange", "navy"),
    ("white", "red"),
    ("blue", "sunset"),
    ("red", "starry night"),
    ("green", "gray"),
    ("black", "pink"),
]


def draw_image(image: HeroImage) -> np.ndarray:
    """The hero over its background: uint8 [32, 32, 3]."""
    pose, *rest = image.words.split(", ")
    view = "side" if "facing" in image.words else "back" if "back view" in rest else "front"
    canvas = draw_hero(pose, view, ARMOR[image.color], rest[0] if pose == "portrait" else "calm")
    figure = canvas.cells[:, ::-1] if "facing left" in rest else canvas.cells
    return over(figure, draw_background(image.background, seeded(image.stem)))


def draw_other_robot(
    rng: np.random.Generator, color: str, background: str
) -> tuple[np.ndarray, str]:
    """A robot that is not the hero, over its background, and its caption."""
    while True:
        sprite, caption = draw_sprite(rng, color)
        if f"{color} robot" in caption:  # draw_sprite draws monsters too
            break
    cells = over(sprite[::2, ::2], draw_background(background, rng))
    return cells, f"{caption}, {background} background"


def over(figure: np.ndarray, background: np.ndarray) -> np.ndarray:
    """RGBA cells [32, 32, 4] over a background [64, 64, 3]: uint8 [32, 32, 3]."""
    return np.where(figure[..., 3:] > 0, figure[..., :3], background[::2, ::2]).astype(np.uint8)


def seeded(name: str) -> np.random.Generator:
    """Random numbers that depend on nothing but the image's name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def save(folder: Path, stem: str, cells: np.ndarray, caption: str) -> None:
    """Write an image, nearest-upscaled, and its caption."""
    pixels = cells.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    Image.fromarray(pixels).save(folder / f"{stem}.png", optimize=True)
    (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo's images and their captions.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="where images/ and held_out/ go (default: next to this script)",
    )
    output_dir = parser.parse_args().output_dir
    for name, images in (("images", IMAGES), ("held_out", HELD_OUT)):
        folder = output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for image in images:
            save(folder, image.stem, draw_image(image), image.caption)
    for number, (color, background) in enumerate(OTHER_ROBOTS, start=1):
        stem = f"other_robot_{number:02d}"
        save(output_dir / "images", stem, *draw_other_robot(seeded(stem), color, background))


if __name__ == "__main__":
    main()
