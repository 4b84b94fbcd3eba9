"""Procedural pixel-art robots and monsters: many colours, shapes and poses, so that the base knows
pixel edges.

Three kinds: boxy robots of simple parts, mechs (larger heads, thick shaded limbs, visors, panels,
portraits), monsters.

None of them is the demo's hero (make_images.py): the base must never have seen the character the
LoRA is to learn.
"""

from __future__ import annotations

import numpy as np

CELLS = 32

COLOURS = {
    "red": (212, 48, 44),
    "orange": (240, 136, 32),
    "yellow": (246, 208, 48),
    "green": (66, 170, 72),
    "teal": (38, 168, 160),
    "blue": (58, 112, 226),
    "purple": (134, 72, 190),
    "pink": (242, 132, 178),
    "brown": (132, 86, 52),
    "gray": (146, 150, 158),
    "white": (236, 238, 242),
    "black": (58, 58, 68),
}
OUTLINE = np.array((22, 20, 34))

# Where hands and feet are, in cells from the shoulder and the hip of a robot that faces right: far
# arm, near arm, far leg, near leg, and how high the whole body is lifted.
POSES = {
    "standing": ((-3, 6), (3, 6), (-2, 7), (2, 7), 0),
    "running": ((5, 2), (-5, 3), (-5, 5), (5, 6), 1),
    "jumping": ((-5, -4), (5, -4), (-4, 4), (3, 5), 4),
    "shooting": ((-3, 5), (8, 0), (-4, 7), (4, 7), 0),
    "waving": ((-3, 6), (5, -6), (-2, 7), (2, 7), 0),
    "arms raised": ((-5, -6), (5, -6), (-2, 7), (2, 7), 0),
    "kneeling": ((-4, 4), (4, 4), (-5, 4), (3, 4), -3),
}
MECH_POSES = {**POSES, "aiming up": ((-3, 5), (5, -7), (-3, 6), (3, 6), 0)}
SIDEWAYS = ("running", "jumping", "shooting", "aiming up", "kneeling")
HELMETS = ("round helmet", "flat helmet", "tall helmet", "wide helmet", "pointed helmet")
CRESTS = ("", "", "antenna", "horns", "crest", "ear discs", "knob")
FACES = ("visor", "two eyes", "one eye", "slit visor", "face plate")
MOODS = ("calm", "happy", "angry", "surprised")
HEADS = ("square head", "round head", "wide head", "tall head")
TOPS = ("", "antenna", "two antennas", "horns")
EYES = ("", "one eye", "round eyes", "angry eyes")

ROWS, COLUMNS = np.mgrid[:CELLS, :CELLS]


def draw_sprite(rng: np.random.Generator, colour: str | None = None) -> tuple[np.ndarray, str]:
    """Draw one sprite: RGBA uint8 [64, 64, 4] and the caption without its background."""
    colour = colour or str(rng.choice(list(COLOURS)))
    painters = [_robot, _mech, _portrait, _monster]
    painter = painters[rng.choice(4, p=[0.25, 0.47, 0.13, 0.15])]
    kind = "monster" if painter is _monster else "robot"
    cells, words = painter(rng, np.array(COLOURS[colour]))
    if rng.random() < 0.5:
        cells = cells[:, ::-1]
        words = [word.replace("right", "left") for word in words]
    caption = ", ".join(["pixel art", f"{colour} {kind}", *words])
    return cells.repeat(2, axis=0).repeat(2, axis=1), caption


def _paint(cells: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    """Fill a part, lit from the top left, with a dark line around it."""
    frame = np.pad(mask, 1)
    above, below, left, right = frame[:-2, 1:-1], frame[2:, 1:-1], frame[1:-1, :-2], frame[1:-1, 2:]
    cells[mask | above | below | left | right] = (*OUTLINE, 255)
    lit, dark = mask & ~(above & left), mask & ~(below & right)
    for part, gain in ((mask, 1.0), (dark, 0.72), (lit, 1.18)):
        cells[part] = (*np.clip(colour * gain, 0, 255).astype(np.uint8), 255)


def _segment(start: tuple[float, float], end: tuple[float, float], radius: float) -> np.ndarray:
    """Mask of a thick line between two points given as (column, row)."""
    along = np.subtract(end, start)
    offset = np.stack([COLUMNS - start[0], ROWS - start[1]], -1)
    share = np.clip(offset @ along / max(along @ along, 1e-6), 0, 1)
    return np.linalg.norm(offset - share[..., None] * along, axis=-1) <= radius


def _box(left: float, top: float, width: float, height: float) -> np.ndarray:
    return (COLUMNS >= left) & (COLUMNS < left + width) & (ROWS >= top) & (ROWS < top + height)


def _ellipse(column: float, row: float, across: float, down: float) -> np.ndarray:
    return ((COLUMNS - column) / across) ** 2 + ((ROWS - row) / down) ** 2 <= 1


def _robot(rng: np.random.Generator, colour: np.ndarray) -> tuple[np.ndarray, list[str]]:
    cells = np.zeros((CELLS, CELLS, 4), np.uint8)
    accent = np.array(COLOURS[str(rng.choice(list(COLOURS)))]) * 0.6 + colour * 0.4
    pose = str(rng.choice(list(POSES)))
    far_arm, near_arm, far_leg, near_leg, lift = POSES[pose]
    head, top, eyes = (str(rng.choice(options)) for options in (HEADS, TOPS, EYES))
    middle, hip = 15.5, 23 - lift
    body_height, body_width = int(rng.integers(5, 8)), int(rng.integers(6, 11))
    shoulder = hip - body_height + 1
    thickness = rng.uniform(1.0, 1.8)

    def limb(
        start: tuple[float, float], reach: tuple[float, float], shade: float
    ) -> tuple[float, float]:
        end = (start[0] + reach[0], start[1] + reach[1])
        _paint(cells, _segment(start, end, thickness), colour * shade)
        return end

    half = body_width / 2
    limb((middle - half, shoulder + 1), far_arm, 0.8)
    foot = limb((middle - half / 2, hip), far_leg, 0.8)
    _paint(cells, _box(foot[0] - 1.5, foot[1], 4, 2), accent * 0.8)
    foot = limb((middle + half / 2, hip), near_leg, 0.95)
    _paint(cells, _box(foot[0] - 1.5, foot[1], 4, 2), accent)
    _paint(cells, _box(middle - half + 0.5, shoulder, body_width, body_height), colour)
    _paint(cells, _ellipse(middle, shoulder + body_height / 2, 1.6, 1.6), accent)
    hand = limb((middle + half, shoulder + 1), near_arm, 1.0)
    words = [pose]
    if pose == "shooting":
        _paint(cells, _box(hand[0] - 3, hand[1] - 1.5, 5, 4), accent)
        words.append("arm cannon")
        if rng.random() < 0.6:
            _paint(
                cells,
                _ellipse(min(hand[0] + 5.5, 29), hand[1] + 0.5, 1.6, 1.6),
                np.array((250, 230, 90)),
            )
    else:
        _paint(cells, _ellipse(*hand, 1.6, 1.6), accent)

    width, height = {
        "square head": (9, 8),
        "round head": (10, 9),
        "wide head": (13, 7),
        "tall head": (7, 10),
    }[head]
    bottom = shoulder - 1
    centre = bottom - height / 2
    if top in ("antenna", "two antennas"):
        for column in (middle,) if top == "antenna" else (middle - 3, middle + 3):
            _paint(
                cells,
                _segment((column, bottom - height - 2), (column, bottom - height), 0.5),
                np.array((120, 120, 130)),
            )
            _paint(cells, _ellipse(column, bottom - height - 3, 1.1, 1.1), accent)
    elif top == "horns":
        for side in (-1, 1):
            base = (middle + side * (width / 2 - 1), bottom - height)
            _paint(cells, _segment(base, (base[0] + side * 2, base[1] - 2.5), 0.9), accent)
    if head == "round head":
        _paint(cells, _ellipse(middle, centre, width / 2, height / 2), colour)
    else:
        _paint(cells, _box(middle + 0.5 - width / 2, bottom - height, width, height), colour)
    _eyes(cells, rng, eyes, middle + 1, centre, width)
    words += [word for word in (head, top, eyes) if word and rng.random() < 0.8]
    return cells, [*words, "facing right"] if pose in ("running", "shooting") else words


def _eyes(
    cells: np.ndarray, rng: np.random.Generator, eyes: str, middle: float, row: float, width: int
) -> None:
    glow = np.array(
        [(250, 240, 120), (240, 250, 255), (255, 110, 90), (150, 255, 170)][rng.integers(4)]
    )
    gap = max(width / 4, 2)
    if eyes == "one eye":
        _paint(cells, _ellipse(middle, row, 2.1, 2.1), glow)
        cells[_box(middle, row, 1, 1)] = (*OUTLINE, 255)
        return
    for side in (-1, 1):
        column = middle - 0.5 + side * gap
        if eyes == "round eyes":
            _paint(cells, _ellipse(column, row, 1.5, 1.5), glow)
        else:
            cells[_box(column - 0.5, row - 1, 2, 3)] = (*OUTLINE, 255)
            cells[_box(column - 0.5, row - (0 if eyes == "angry eyes" else 1), 1, 2)] = (*glow, 255)
    if rng.random() < 0.5:
        cells[_box(middle - gap, row + 2.5, 2 * gap, 1)] = (*OUTLINE, 255)


def _mech(rng: np.random.Generator, colour: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """A robot with a large head and thick limbs, in two colours and steel, from the front or from
    the side."""
    cells = np.zeros((CELLS, CELLS, 4), np.uint8)
    pose = str(rng.choice(list(MECH_POSES)))
    sideways = pose in SIDEWAYS or rng.random() < 0.3
    far_arm, near_arm, far_leg, near_leg, lift = MECH_POSES[pose]
    second, steel = _second(rng), np.array((150, 156, 176)) * rng.uniform(0.6, 1.2)
    limb_colour = steel if rng.random() < 0.4 else colour
    middle, hip = 15.5 - (1.5 if pose in ("shooting", "running") else 0), 23.5 - lift
    width, height = int(rng.integers(7, 11)), int(rng.integers(5, 7))
    half, shoulder = width / 2, hip - height
    thick = rng.uniform(1.3, 2.0)

    def limb(
        start: tuple[float, float], reach: tuple[float, float], shade: float, end_colour: np.ndarray
    ) -> tuple:
        joint = (start[0] + reach[0] * 0.55, start[1] + reach[1] * 0.55)
        end = (start[0] + reach[0], start[1] + reach[1])
        _round_paint(cells, _segment(start, joint, thick * 0.8), limb_colour * shade)
        _round_paint(cells, _segment(joint, end, thick), end_colour * shade)
        return end

    def boot(foot: tuple[float, float], shade: float) -> None:
        left = foot[0] - (1.5 if sideways else 2)
        _round_paint(cells, _box(left, min(foot[1], 29.5), 5, 2), second * shade)

    words = [pose]
    if rng.random() < 0.15:
        cape = _ellipse(middle - 2, hip - 1, half + 2.5, height + 1) & (ROWS > shoulder)
        _round_paint(cells, cape, _second(rng))
        words.append("cape")
    limb((middle - half, shoulder + 1.5), far_arm, 0.75, colour)
    boot(limb((middle - half / 2, hip), (far_leg[0], far_leg[1] - 1.5), 0.75, colour), 0.75)
    boot(limb((middle + half / 2, hip), (near_leg[0], near_leg[1] - 1.5), 1.0, colour), 1.0)
    _round_paint(cells, _box(middle - half + 0.5, shoulder, width, height), colour)
    _chest(cells, rng, middle + (1 if sideways else 0), shoulder + height / 2, second)
    if rng.random() < 0.5:
        _round_paint(cells, _box(middle - half + 0.5, hip - 1, width, 1.5), steel)
    head_words = _head(
        cells,
        rng,
        middle + (0.5 if sideways else 0),
        shoulder + 0.5,
        rng.uniform(1, 1.3),
        colour,
        second,
        steel,
        sideways,
    )
    hand = limb((middle + half, shoulder + 1.5), near_arm, 1.0, colour)
    if rng.random() < 0.5:
        _round_paint(cells, _ellipse(middle + half, shoulder + 1.5, 2, 2), second)
    if pose in ("shooting", "aiming up"):
        across, down = (3.2, 2) if pose == "shooting" else (2, 3.2)
        _round_paint(cells, _box(hand[0] - across, hand[1] - down, 2 * across, 2 * down), second)
        words.append("arm cannon")
        if rng.random() < 0.5:
            spot = (
                (min(hand[0] + 6, 29), hand[1])
                if pose == "shooting"
                else (hand[0], max(hand[1] - 6, 2))
            )
            _round_paint(cells, _ellipse(spot[0], spot[1], 1.6, 1.6), _glow(rng))
    elif rng.random() < 0.6:
        _round_paint(
            cells, _ellipse(hand[0], hand[1], 1.9, 1.9), second if rng.random() < 0.5 else steel
        )
    view = "facing right" if sideways else "front view"
    return cells, [*words, *(word for word in head_words if rng.random() < 0.7), view]


def _portrait(rng: np.random.Generator, colour: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Head and shoulders, large, with a mood in the eyes."""
    cells = np.zeros((CELLS, CELLS, 4), np.uint8)
    second, steel = _second(rng), np.array((150, 156, 176)) * rng.uniform(0.6, 1.2)
    _round_paint(cells, _box(10, 25, 12, 8), colour * 0.9)
    for side in (-1, 1):
        _round_paint(cells, _ellipse(15.5 + side * 11, 31, 6, 4), colour)
    if rng.random() < 0.6:
        _chest(cells, rng, 15.5, 30, second)
    mood = str(rng.choice(MOODS))
    words = _head(cells, rng, 15.5, 26, 1.75, colour, second, steel, False, mood)
    return cells, ["portrait", mood, *(word for word in words if rng.random() < 0.7)]


def _head(
    cells: np.ndarray,
    rng: np.random.Generator,
    middle: float,
    bottom: float,
    scale: float,
    colour: np.ndarray,
    second: np.ndarray,
    steel: np.ndarray,
    sideways: bool,
    mood: str | None = None,
) -> list[str]:
    """Draw a helmet with what it wears and the face in it; returns the words for them."""
    helmet, crest, face = (str(rng.choice(options)) for options in (HELMETS, CRESTS, FACES))
    width, height = {
        "round helmet": (12, 9),
        "flat helmet": (12, 8),
        "tall helmet": (10, 11),
        "wide helmet": (15, 8),
        "pointed helmet": (11, 9),
    }[helmet]
    half, height = width * scale / 2, height * scale
    top, centre = bottom - height, bottom - height / 2
    if crest == "antenna":
        _paint(cells, _segment((middle, top - 2.5 * scale), (middle, top), 0.5), steel)
        _round_paint(cells, _ellipse(middle, top - 2.5 * scale, 1.2, 1.2), second)
    elif crest == "horns":
        for side in (-1, 1):
            base = (middle + side * half * 0.7, top + 1)
            _round_paint(
                cells, _segment(base, (base[0] + side * 2, base[1] - 3 * scale), 0.9), second
            )
    elif crest == "crest":
        _round_paint(
            cells,
            _ellipse(middle - (1 if sideways else 0), top + 1, 1.2 + 2 * sideways, 2.5 * scale),
            second,
        )
    elif crest == "knob":
        _round_paint(cells, _box(middle - 1.5, top - 1.5, 4, 3), second)
    skull = {
        "round helmet": _ellipse(middle, centre, half, height / 2),
        "pointed helmet": (ROWS > top)
        & (ROWS < bottom)
        & (np.abs(COLUMNS - middle) < half * np.clip((ROWS - top) / (height * 0.5), 0.1, 1)),
    }.get(helmet, _box(middle - half + 0.5, top + 0.5, 2 * half, height - 0.5))
    _round_paint(cells, skull, colour)
    if crest == "ear discs":
        for side in (0,) if sideways else (-1, 1):
            _round_paint(
                cells,
                _ellipse(
                    middle + side * half - (2 if sideways else 0), centre, 1.7 * scale, 2 * scale
                ),
                second,
            )
    look = middle + (half * 0.35 if sideways else 0)
    glow = _glow(rng)
    if face in ("face plate", "two eyes") and rng.random() < 0.7:
        plate = _box(look - half * 0.62, centre - 0.5, half * 1.25, height * 0.42)
        _round_paint(cells, plate, steel if face == "face plate" else np.array((238, 200, 160)))
    if rng.random() < 0.4:
        for row in (bottom - 1.5 * scale, bottom - 1.5 * scale + 2)[: 1 if scale < 1.5 else 2]:
            cells[_box(look - half * 0.4, row, half * 0.8, 1) & (COLUMNS % 2 == 0) & skull] = (
                *OUTLINE,
                255,
            )
    _face(cells, face, mood, look, centre, half, scale, glow)
    return [helmet, *([crest] if crest else []), face]


def _face(
    cells: np.ndarray,
    face: str,
    mood: str | None,
    look: float,
    row: float,
    half: float,
    scale: float,
    glow: np.ndarray,
) -> None:
    if face in ("visor", "slit visor"):
        tall = (3 if face == "visor" else 1.5) * scale
        _paint(
            cells,
            _box(look - half * 0.75, row - tall / 2, half * 1.5, tall),
            np.array((24, 36, 60)),
        )
    if face == "one eye":
        _paint(cells, _ellipse(look, row, 1.6 * scale, 1.6 * scale), np.array((24, 36, 60)))
        cells[_ellipse(look, row, 0.9 * scale, 0.9 * scale)] = (*glow, 255)
        return
    if mood in (None, "calm") and "visor" in face:
        cells[_box(look - half * 0.6, row - 0.5, half * 1.2, max(scale, 1))] = (*glow, 255)
        return
    for side in (-1, 1):
        centre = look + side * half * 0.36
        reach = 1.1 * scale
        if mood == "happy":
            eye = _ellipse(centre, row + 0.5, reach + 0.4, reach + 0.4) & (ROWS < row + 0.5)
        elif mood == "angry":
            eye = _box(centre - reach, row - reach, 2 * reach, 2 * reach) & (
                (COLUMNS - centre) * side < (ROWS - row) + 1.5
            )
        elif mood == "surprised":
            eye = _ellipse(centre, row, reach + 0.3, reach + 0.6)
        else:
            eye = _box(centre - reach / 2, row - reach * 0.8, max(reach, 1.01), reach * 1.6)
        if "visor" not in face:
            _paint(cells, eye, np.array((30, 30, 46)))
        cells[eye] = (*glow, 255)


def _chest(
    cells: np.ndarray, rng: np.random.Generator, middle: float, row: float, second: np.ndarray
) -> None:
    """A lamp, a plate, a stripe or nothing."""
    style = rng.integers(4)
    if style == 0:
        _round_paint(cells, _ellipse(middle, row - 0.5, 1.7, 1.7), _glow(rng))
    elif style == 1:
        _round_paint(cells, _box(middle - 1.5, row - 2, 4, 3), second)
    elif style == 2:
        mask = _box(middle - 3, row - 2.5, 7, 4) & (
            np.abs(COLUMNS - middle) < 3.5 - (ROWS - row + 2.5)
        )
        cells[mask] = (*np.clip(second, 0, 255).astype(np.uint8), 255)


def _second(rng: np.random.Generator) -> np.ndarray:
    return np.array(COLOURS[str(rng.choice(list(COLOURS)))]) * rng.uniform(0.8, 1.1)


def _glow(rng: np.random.Generator) -> np.ndarray:
    glows = [
        (250, 240, 120),
        (235, 250, 255),
        (255, 100, 80),
        (130, 255, 160),
        (90, 225, 250),
        (255, 150, 230),
    ]
    return np.array(glows[rng.integers(len(glows))])


def _round_paint(cells: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    """Fill a part as if it were round: three shades from the top left to the bottom right, and a
    dark line around."""
    if not mask.any():
        return
    frame = np.pad(mask, 1)
    cells[mask | frame[:-2, 1:-1] | frame[2:, 1:-1] | frame[1:-1, :-2] | frame[1:-1, 2:]] = (
        *OUTLINE,
        255,
    )
    rows, columns = ROWS[mask], COLUMNS[mask]
    across, down = max(np.ptp(columns) / 2, 0.5), max(np.ptp(rows) / 2, 0.5)
    place = ((COLUMNS - columns.mean()) / across + (ROWS - rows.mean()) / down) / 2
    for part, gain in ((mask, 1.0), (mask & (place < -0.35), 1.28), (mask & (place > 0.45), 0.68)):
        cells[part] = (
            *np.clip(colour * gain + (18 if gain > 1 else 0), 0, 255).astype(np.uint8),
            255,
        )


def _monster(rng: np.random.Generator, colour: np.ndarray) -> tuple[np.ndarray, list[str]]:
    cells = np.zeros((CELLS, CELLS, 4), np.uint8)
    across, down = rng.uniform(7, 12), rng.uniform(6, 11)
    row = 28 - down
    body = _ellipse(15.5, row, across, down)
    words = []
    if rng.random() < 0.5:  # flat feet: a slime rather than a ghost
        body |= _box(15.5 - across, row, 2 * across + 1, down)
        words.append("flat")
    if rng.random() < 0.4:
        for side in (-1, 1):
            tip = (15.5 + side * across * 0.8, row - down - 1)
            _paint(
                cells,
                _segment((15.5 + side * across * 0.5, row - down * 0.7), tip, 1.2),
                np.array((240, 226, 190)),
            )
        words.append("horns")
    _paint(cells, body, colour)
    eyes = str(rng.choice(EYES))
    _eyes(cells, rng, eyes, 15.5, row - down * 0.2, int(across))
    if rng.random() < 0.6:
        cells[_box(12, row + down * 0.35, 8, 2)] = (*OUTLINE, 255)
        cells[_box(13, row + down * 0.35, 2, 1)] = (250, 250, 250, 255)
        cells[_box(17, row + down * 0.35, 2, 1)] = (250, 250, 250, 255)
        words.append("teeth")
    return cells, [*words, *([eyes] if eyes else [])]
