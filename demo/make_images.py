"""Draw the demo's pictures: volto, an original pixel-art robot hero, and a few other robots beside
it.

Everything is drawn on a grid of 32 x 32 cells and saved nearest-upscaled to 256 x 256. The hero is
a small rig: parts drawn by hand as text, one letter for one colour, laid over one another pose by
pose, each with a dark line around it.

    python make_images.py

writes images/ (what the LoRA is trained on) and held_out/ (the hero in combinations that images/
lacks), each picture with its caption in a text file beside it. The same files come out at every
run.
"""

from __future__ import annotations

import argparse
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from backgrounds import CELLS, draw_background
from PIL import Image
from sprites import draw_sprite

SCALE = 8  # pixels of the saved picture to one cell
TRIGGER = "volto, {} robot hero"
EMPTY = "."

PALETTE = {
    "k": (20, 18, 40),  # outline
    "B": (104, 156, 255), "b": (44, 92, 218), "d": (26, 52, 146),  # armour: lit, plain, in shade
    "y": (255, 220, 110), "o": (248, 158, 36), "r": (190, 92, 24),  # amber panels
    "S": (255, 122, 78), "s": (228, 58, 44), "x": (150, 26, 44),  # scarf
    "G": (196, 206, 224), "g": (126, 136, 164), "h": (74, 80, 112),  # steel
    "w": (232, 255, 255), "c": (64, 232, 248), "e": (16, 128, 168),  # cyan glow
    "n": (14, 38, 64), "m": (30, 66, 98),  # dark glass and its reflection
    "f": (255, 244, 150),  # muzzle flash
}  # fmt: skip
# The armour in other colours than blue: lit, plain, in shade. A caption names the colour, so that
# it stays a word's to say and does not become part of the character.
ARMOUR = {
    "blue": tuple(PALETTE[letter] for letter in "Bbd"),
    "red": ((255, 132, 112), (212, 48, 52), (132, 22, 44)),
    "green": ((138, 226, 122), (50, 160, 72), (22, 92, 56)),
    "purple": ((200, 146, 255), (134, 72, 206), (76, 36, 132)),
    "white": ((252, 252, 255), (208, 214, 226), (140, 148, 170)),
}
# Limbs on the far side of the body are a shade darker.
FAR_SHADES = dict(zip("BbyoGg", "bdorgh", strict=True))

# The parts. A row of text is a row of cells, "." is empty.

HEAD_FRONT = """
b...............b
Bb.............bd
Bob..BBBBBbb..bod
BoobBBBbbbbbbboor
.obBBBbbbbbbbbdo.
.ooBbbbbbbbbbdoo.
oyonnnnnnnnnnnoor
oyoncccccccccnorr
.oonwwcccccccnor.
..dnnnnnnnnnnnd..
...dGGggggghhd...
....hGghkhghh....
"""
TORSO_FRONT = """
BBBbbbbbd
BBbbbbbbd
BbbooobBd
bbocwcrbd
.boccerd.
..hrrrd..
.bbhghbd.
"""
SCARF_FRONT = """
sSSsssssx
.xssssxx.
"""
LEG_FRONT_RIGHT = """
..Ggh.
..ggh.
.Bbbbd
.Byobd
.Boord
.bbbdd
BBbbbd
yooorr
"""
LEG_FRONT_LEFT = """
.Ggh..
.ggh..
Bbbbd.
Byobd.
Boord.
bbbdd.
Bbbbbd
yooorr
"""
CANNON_DOWN = """
.BBb.
BBbbd
yooor
.Ggh.
BBbbd
Bbbbd
bbbdd
yooor
.cwe.
"""
CANNON_RAISED = """
cwc...
yoor..
BBbd..
Bbbbd.
bbbbd.
.bdGg.
..gBBb
...Bbb
...yoo
"""
ARM_DOWN = """
.BBb.
Bbbbd
yooor
.Ggh.
BBbbd
Bbbdd
.GGgh
.gghh
"""
ARM_WAVING = """
...G.G.g
...GGGgh
....GggG
....Bbbd
...Bbbdd
.Ggbbd..
BBbgh...
Bbbd....
yoor....
"""
ARM_RAISED = """
...GGg
...Ggh
...ghh
..BBbd
..Bbbd
.Ggbd.
BBbh..
Bbbd..
yoor..
"""

HEAD_SIDE = """
BB..................
bBBb.....BBBBbb.....
.obBBb.BBBBBBbbbb...
..oobBbBBBBbbbbbbb..
...ooobBBbbbbbbbbbb.
BB..roobbbbbbbbbbbb.
bBBb.obbooonnnnnnnn.
.oobbobboyyonccccwcn
..roooobooooncccccen
....robbdrrdnnnnnnn.
......dbbddGGGGGggg.
......ddddGggggghhh.
.........hhgghkhkh..
"""
HEAD_LOOKING_UP = """
.........BBBBbbb....
.......BBBBBbbbbbb..
......BBBBbbbbbbbbb.
BB...bBBbbbbbbbbbnn.
bBBbbbbbbbbbbbbnnccn
.obbBobbbbbbbnnccwwn
..ooooobboonnccccccn
BB..robboyyonccccen.
bBBb.obbooooncceenn.
.oobboobdrrdnnnnGGg.
..rooodbbddGGGGgggh.
....rddddddgggghhh..
.......dddhhgkhkh...
"""
TORSO_SIDE = """
.BBbbbb.
BBbbbbbb
Bbbbbyoo
bbbboewc
bbbdbrce
.ddhdrr.
..hggh..
.bbbood.
"""
SCARF_SIDE = """
SSsssssx
xsssssx.
"""
SCARF_HANGING = """
.ss
sSs
ss.
sSx
ss.
x..
"""
SCARF_STREAMING = """
.....sSSss
.sSSSSsss.
sSssxxs...
xx........
"""
SCARF_WAVY = """
sS........
xsSSs.sSss
..xssSSss.
....xxs...
"""
LEG_SIDE = """
.Ggg..
.ggh..
Bbbbd.
Bbyod.
bboor.
bbbdd.
BBbbbbb
yyooorr
"""
LEG_REACHING = """
Ggg.......
ggggBb....
.hgyobb.yo
...oobbbyo
....dbbbbo
.....dbbor
......dor.
"""
LEG_PUSHING = """
.......ggG
......gggg
y..Bbbggh.
oybbyoobh.
oobbboob..
robbbdd...
rr.dd.....
"""
LEG_TUCKED = """
Gggg....
ggggBBb.
..hgyobb
....oobb
...Bbbbd
..Bbbbd.
..bbbbbb
..yyooor
"""
LEG_TRAILING = """
.....ggg
....ggg.
..Bbbgh.
.Bbyob..
Bbboo...
bbbbd...
yobd....
oor.....
.r......
"""
LEG_KNEE_UP = """
ggggBBb..
.ggByobd.
...boord.
...bbbdd.
...BBbbbb
...yooorr
"""
LEG_KNEE_DOWN = """
.....Ggg.
.....gggh
y.BBbbyob
oyBbbboob
oobbbbddd
rodddddd.
"""
CANNON_FORWARD = """
.BBb.........
BBbbdBBBByo..
ByooGbbbbyoc.
.rrgghbbbowwc
..hhhdbbbooc.
.....ddddrr..
"""
CANNON_BENT = """
BBb.......
Bbbb......
yoor......
.ggh.BBo..
.hggBbbyoc
..hhbbbyow
....dddorc
......d.r.
"""
CANNON_BACK = """
.......BBb.
......BBbbd
.yBBbbGyoor
coBbbbgghr.
wobbbddh...
cordd......
.r.........
"""
CANNON_UP = """
.............cwc.
............yyoor
............BBbbd
............Bbbbd
............Bbbbd
............Bbbbd
.BBb........bbbdd
BBbbd........bbd.
yooor........Ggh.
.Ggg........GGgh.
.gggGBBBbyooGggh.
..hhhbbbbdorhhh..
"""
ARM_FORWARD = """
BBb....
Bbbb...
yooo...
.ggggBbb
..ggBbbb
....bbdg
.....ddg
"""
ARM_BACK = """
...BBb
..Bbbb
..yooo
.Ggg..
BBbh..
bbbg..
dgGg..
.hgh..
"""
ARM_FIST_UP = """
........GGg
........Ggh
.......BBhh
BBb....Bbbd
Bbbb...Bbbd
yooogggggd.
.gghggggh..
"""

PORTRAIT_HEAD = """
Bb........................bd
BBb......................bbd
BBbb....BBBBBBbbbbbb....bbbd
BBobb.BBBBBBBbbbbbbbbb.bbobd
BByobnBBBBBBBbbbbbbbbdnboobd
bByoonBBBBBBbbbbbbbbbdnooobd
.byoonBBBBBbbbbbbbbbddnoood.
.byoonBBBbbbbbbbbbbbddnooor.
.yooonnnnnnnnnnnnnnnnnnooor.
oyyoonnnnnnnnnnnnnnnnmnooorr
oyyoonnnnnnnnnnnnnnnmmnooorr
oyyoonnnnnnnnnnnnnnmmnnooorr
oyyoonnnnnnnnnnnnnmmnnnooorr
oyyoonnnnnnnnnnnnnnnnnnooorr
.oooonnnnnnnnnnnnnnnnnnoorr.
..oondddddddddddddddddnorr..
...rnddddddddddddddddddnr...
....BGGGGGGgggggggggghhd....
....bGGGgggggggggggghhhd....
.....dGggkggkggkggkghhd.....
......dggkggkhhkhhkhhd......
.......dhhhhhhhhhhhhd.......
"""
PORTRAIT_SCARF = """
.SSSSsssssssssx.
sSSSssssssssssxx
xsssSSsssssxxxxx
.xxxxsssssxxxx..
"""
PORTRAIT_SHOULDERS = """
..BBBBBB................BBbbbb..
.BBBbbbbb..............BBbbbbbd.
BBBbbbbbbd............BBbbbbbbdd
BBbbbbbbbd............bbbbbbbddd
ooyyyooooo............oyyoooorrr
"""
PORTRAIT_CHEST = """
BBBbbbbbbbbbbbbd
BBBbbbooooobbbdd
BBbbboewwceobbdd
BBbbboewccerbddd
"""
EXPRESSIONS = {
    "calm": """
................
.eeeeeeeeeeeeee.
ewwwwccccccccccc
ewwccccccccccccc
ecccccccccccccce
.eeeeeeeeeeeeee.
""",
    "happy": """
................
..ccc......ccc..
.cwwcc....cwwcc.
ccceccc..ccceccc
cc...cc..cc...cc
ce...ec..ce...ec
""",
    "angry": """
.cc..........cc.
.wccc......cccc.
.cwcccc..ccwccc.
.eccccc..ccccce.
..eccce..eccce..
................
""",
    "surprised": """
..cccc....cccc..
.cwwccc..cwwccc.
.cwwccc..cwwccc.
.cccccc..cccccc.
.cccccc..cccccc.
..ecce....ecce..
""",
}

SHOT = """
..fwwc.
cfwwwwc
.cwwwwc
..fwwc.
"""
SHOT_UP = """
.cc.
cwwc
wwww
wwww
fwwf
.fc.
c.f.
"""
FLASH = """
...f..
f..f.f
.fwwf.
wwwwff
.fwwf.
f..f.f
...f..
"""
FLASH_UP = """
..f..
.fwf.
f.w.f
"""


class Layer(NamedTuple):
    """One part put at a cell of the picture."""

    part: str
    column: int
    row: int
    far: bool = False
    outlined: bool = True

    def moved(self, columns: int, rows: int) -> Layer:
        return self._replace(column=self.column + columns, row=self.row + rows)


def front_pose(right_arm: Layer, left_arm: Layer) -> list[Layer]:
    """The hero seen from the front; only the arms differ from pose to pose."""
    return [
        Layer(LEG_FRONT_RIGHT, 8, 21),
        Layer(LEG_FRONT_LEFT, 18, 21),
        right_arm,
        left_arm,
        Layer(TORSO_FRONT, 12, 15),
        Layer(SCARF_FRONT, 12, 15),
        Layer(HEAD_FRONT, 8, 2),
    ]


def side_pose(
    behind: list[Layer],
    near_leg: Layer,
    scarf_tail: Layer,
    near_arm: Layer,
    head: Layer | None = None,
    move: tuple[int, int] = (0, 0),
    effects: list[Layer] | None = None,
) -> list[Layer]:
    """The hero seen from the side, facing right, back to front; move shifts all of it but the
    effects."""
    figure = [
        *(layer._replace(far=True) for layer in behind),
        near_leg,
        scarf_tail,
        Layer(TORSO_SIDE, 12, 15),
        head or Layer(HEAD_SIDE, 6, 2),
        Layer(SCARF_SIDE, 12, 15),
        near_arm,
    ]
    return [layer.moved(*move) for layer in figure] + [
        layer._replace(outlined=False) for layer in effects or []
    ]


def portrait(expression: str) -> list[Layer]:
    """Head and shoulders; the light behind the visor shows the mood."""
    return [
        Layer(PORTRAIT_CHEST, 8, 28),
        Layer(PORTRAIT_SHOULDERS, 0, 27),
        Layer(PORTRAIT_SCARF, 8, 24),
        Layer(PORTRAIT_HEAD, 2, 2),
        Layer(EXPRESSIONS[expression], 8, 11, outlined=False),
    ]


HANGING = Layer(SCARF_HANGING, 9, 17)
STREAMING = Layer(SCARF_STREAMING, 3, 15)
WAVY = Layer(SCARF_WAVY, 3, 14)
braced = partial(side_pose, [Layer(LEG_SIDE, 17, 21)], Layer(LEG_SIDE, 8, 21), HANGING)
kneeling = partial(side_pose, [Layer(LEG_KNEE_UP, 17, 21)], Layer(LEG_KNEE_DOWN, 7, 21), HANGING)
shooting = partial(braced, Layer(CANNON_FORWARD, 13, 17), move=(-5, 0))
aiming_up = partial(braced, Layer(CANNON_UP, 12, 11), Layer(HEAD_LOOKING_UP, 5, 2), move=(-4, 0))

POSES = {
    "standing": front_pose(Layer(CANNON_DOWN, 6, 16), Layer(ARM_DOWN, 22, 16)),
    "waving": front_pose(Layer(CANNON_DOWN, 6, 16), Layer(ARM_WAVING, 22, 10)),
    "arms raised": front_pose(Layer(CANNON_RAISED, 5, 9), Layer(ARM_RAISED, 22, 9)),
    "standing, from the side": side_pose(
        [Layer(LEG_SIDE, 15, 21)],
        Layer(LEG_SIDE, 10, 21),
        HANGING,
        Layer(CANNON_DOWN, 12, 17),
    ),
    "running, first step": side_pose(
        [Layer(ARM_FORWARD, 17, 17), Layer(LEG_PUSHING, 4, 22)],
        Layer(LEG_REACHING, 15, 22),
        STREAMING,
        Layer(CANNON_BACK, 6, 17),
        Layer(HEAD_SIDE, 8, 2),
    ),
    "running, second step": side_pose(
        [Layer(ARM_BACK, 7, 17), Layer(LEG_REACHING, 16, 22)],
        Layer(LEG_PUSHING, 5, 22),
        WAVY,
        Layer(CANNON_BENT, 13, 17),
        Layer(HEAD_SIDE, 8, 2),
    ),
    "jumping": side_pose(
        [Layer(ARM_FIST_UP, 18, 12), Layer(LEG_TRAILING, 6, 22)],
        Layer(LEG_TUCKED, 15, 20),
        WAVY,
        Layer(CANNON_BACK, 6, 17),
        move=(-1, -1),
    ),
    "shooting": shooting(effects=[Layer(FLASH, 20, 17)]),
    "shooting, shot": shooting(effects=[Layer(SHOT, 24, 18)]),
    "aiming up": aiming_up(),
    "aiming up, shot": aiming_up(effects=[Layer(SHOT_UP, 21, 3)]),
    "kneeling": kneeling(Layer(CANNON_DOWN, 12, 17), move=(0, 3)),
    "kneeling, cannon": kneeling(Layer(CANNON_FORWARD, 13, 17), move=(-3, 3)),
    **{f"portrait, {expression}": portrait(expression) for expression in EXPRESSIONS},
}


def read_part(text: str) -> np.ndarray:
    """Turn a part's text into an array of letters."""
    rows = text.split()
    width = max(map(len, rows))
    return np.array([list(row.ljust(width, EMPTY)) for row in rows])


def paste(cells: np.ndarray, layer: Layer) -> None:
    """Put a part on a grid of letters, with its outline; what lies outside the grid is cut off."""
    part = np.pad(read_part(layer.part), 1, constant_values=EMPTY)
    filled = part != EMPTY
    if layer.far:
        part = np.vectorize(lambda letter: FAR_SHADES.get(letter, letter))(part)
    if layer.outlined:
        edge = filled.copy()
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            edge |= np.roll(filled, step, axis)  # the padding is empty, so nothing wraps around
        part[edge & ~filled] = "k"
        filled = edge
    for row, column in np.argwhere(filled):
        at = layer.row + row - 1, layer.column + column - 1
        if 0 <= at[0] < CELLS and 0 <= at[1] < CELLS:
            cells[at] = part[row, column]


def draw_hero(
    pose: str, facing_left: bool, background: np.ndarray, colour: str = "blue"
) -> np.ndarray:
    """Draw the hero over a background of 32 x 32 cells, its armour in one of ARMOUR's colours."""
    letters = np.full((CELLS, CELLS), EMPTY)
    for layer in POSES[pose]:
        paste(letters, layer)
    if facing_left:
        letters = letters[:, ::-1]
    cells = background.copy()
    for letter, shade in (PALETTE | dict(zip("Bbd", ARMOUR[colour], strict=True))).items():
        cells[letters == letter] = shade
    return cells


class Picture(NamedTuple):
    """A picture of the hero: one of POSES, how the caption describes it, the background, and the
    armour's colour."""

    pose: str
    words: str
    background: str
    colour: str = "blue"

    @property
    def stem(self) -> str:
        words = self.words.replace("facing ", "")
        colour = "" if self.colour == "blue" else f"{self.colour} "
        return f"volto {colour}{words} {self.background}".replace(",", "").replace(" ", "_")

    @property
    def caption(self) -> str:
        return (
            f"{TRIGGER.format(self.colour)}, pixel art, {self.words}, {self.background} background"
        )


IMAGES = [
    Picture("standing", "standing, front view", "white"),
    Picture("standing", "standing, front view", "brick wall"),
    Picture("standing, from the side", "standing, facing right", "yellow"),
    Picture("standing, from the side", "standing, facing left", "city"),
    Picture("running, first step", "running, facing right", "green hills"),
    Picture("running, second step", "running, facing left", "orange"),
    Picture("running, second step", "running, facing right", "white"),
    Picture("running, first step", "running, facing left", "snow"),
    Picture("jumping", "jumping, facing right", "starry night"),
    Picture("jumping", "jumping, facing left", "pink"),
    Picture("jumping", "jumping, facing right", "green"),
    Picture("shooting, shot", "shooting, arm cannon, facing left", "black"),
    Picture("shooting", "shooting, arm cannon, facing right", "sunset"),
    Picture("shooting, shot", "shooting, arm cannon, facing right", "gray"),
    Picture("aiming up", "aiming up, arm cannon, facing right", "purple"),
    Picture("aiming up, shot", "aiming up, arm cannon, facing left", "green hills"),
    Picture("kneeling, cannon", "kneeling, arm cannon, facing right", "brown"),
    Picture("kneeling", "kneeling, facing left", "snow"),
    Picture("waving", "waving, front view", "teal"),
    Picture("waving", "waving, front view", "city"),
    Picture("arms raised", "arms raised, front view", "starry night"),
    Picture("arms raised", "arms raised, front view", "red"),
    Picture("portrait, happy", "portrait, happy", "orange"),
    Picture("portrait, happy", "portrait, happy", "sunset"),
    Picture("portrait, angry", "portrait, angry", "gray"),
    Picture("portrait, angry", "portrait, angry", "black"),
    Picture("portrait, surprised", "portrait, surprised", "yellow"),
    Picture("portrait, calm", "portrait, calm", "navy"),
    Picture("standing", "standing, front view", "gray", "red"),
    Picture("running, first step", "running, facing left", "starry night", "green"),
    Picture("shooting", "shooting, arm cannon, facing right", "white", "purple"),
    Picture("portrait, happy", "portrait, happy", "teal", "white"),
]
HELD_OUT = [
    Picture("standing", "standing, front view", "purple"),
    Picture("running, first step", "running, facing right", "city"),
    Picture("jumping", "jumping, facing left", "sunset"),
    Picture("shooting, shot", "shooting, arm cannon, facing right", "starry night"),
    Picture("waving", "waving, front view", "snow"),
    Picture("portrait, surprised", "portrait, surprised", "green"),
]

# Robots like those the base has seen, for telling the LoRA what is not the hero: colour and
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


def draw_other_robot(
    rng: np.random.Generator, colour: str, background: str
) -> tuple[np.ndarray, str]:
    """Draw a robot that is not the hero, over its background, on the grid; also its caption."""
    while True:
        sprite, caption = draw_sprite(rng, colour)
        if f"{colour} robot" in caption:  # draw_sprite makes monsters too
            break
    cells = draw_background(background, rng)[::2, ::2]
    sprite = sprite[::2, ::2]
    shown = sprite[..., 3] > 0
    cells[shown] = sprite[shown][:, :3]
    return cells, f"{caption}, {background} background"


def seeded(name: str) -> np.random.Generator:
    """Random numbers that depend on nothing but the picture's name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def save(folder: Path, stem: str, cells: np.ndarray, caption: str) -> None:
    """Write a picture, nearest-upscaled, and its caption."""
    pixels = cells.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    Image.fromarray(pixels).save(folder / f"{stem}.png", optimize=True)
    (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo's pictures and their captions.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="where images/ and held_out/ go (default: beside this script)",
    )
    output_dir = parser.parse_args().output_dir
    for name, pictures in (("images", IMAGES), ("held_out", HELD_OUT)):
        folder = output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            background = draw_background(picture.background, seeded(picture.stem))[::2, ::2]
            cells = draw_hero(
                picture.pose, "facing left" in picture.words, background, picture.colour
            )
            save(folder, picture.stem, cells, picture.caption)
    for number, (colour, background) in enumerate(OTHER_ROBOTS, start=1):
        stem = f"other_robot_{number:02d}"
        save(output_dir / "images", stem, *draw_other_robot(seeded(stem), colour, background))


if __name__ == "__main__":
    main()
