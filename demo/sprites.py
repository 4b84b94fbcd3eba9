"""Procedural pixel-art robots and monsters: many colours, shapes and poses, so that the base knows pixel edges.

None of them is the demo's hero (make_images.py): the base must never have seen the character the LoRA is to learn.
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

# Where hands and feet are, in cells from the shoulder and the hip of a robot that faces right: far arm, near arm,
# far leg, near leg, and how high the whole body is lifted.
POSES = {
    "standing": ((-3, 6), (3, 6), (-2, 7), (2, 7), 0),
    "running": ((5, 2), (-5, 3), (-5, 5), (5, 6), 1),
    "jumping": ((-5, -4), (5, -4), (-4, 4), (3, 5), 4),
    "shooting": ((-3, 5), (8, 0), (-4, 7), (4, 7), 0),
    "waving": ((-3, 6), (5, -6), (-2, 7), (2, 7), 0),
    "arms raised": ((-5, -6), (5, -6), (-2, 7), (2, 7), 0),
    "kneeling": ((-4, 4), (4, 4), (-5, 4), (3, 4), -3),
}
HEADS = ("square head", "round head", "wide head", "tall head")
TOPS = ("", "antenna", "two antennas", "horns")
EYES = ("", "one eye", "round eyes", "angry eyes")

ROWS, COLUMNS = np.mgrid[:CELLS, :CELLS]


def draw_sprite(rng: np.random.Generator, colour: str | None = None) -> tuple[np.ndarray, str]:
    """Draw one sprite: RGBA uint8 [64, 64, 4] and the caption without its background."""
    colour = colour or str(rng.choice(list(COLOURS)))
    kind = "robot" if rng.random() < 0.82 else "monster"
    cells, words = (_robot if kind == "robot" else _monster)(rng, np.array(COLOURS[colour]))
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

    def limb(start: tuple[float, float], reach: tuple[float, float], shade: float) -> tuple[float, float]:
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
            _paint(cells, _ellipse(min(hand[0] + 5.5, 29), hand[1] + 0.5, 1.6, 1.6), np.array((250, 230, 90)))
    else:
        _paint(cells, _ellipse(*hand, 1.6, 1.6), accent)

    width, height = {"square head": (9, 8), "round head": (10, 9), "wide head": (13, 7), "tall head": (7, 10)}[head]
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


def _eyes(cells: np.ndarray, rng: np.random.Generator, eyes: str, middle: float, row: float, width: int) -> None:
    glow = np.array([(250, 240, 120), (240, 250, 255), (255, 110, 90), (150, 255, 170)][rng.integers(4)])
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
            _paint(cells, _segment((15.5 + side * across * 0.5, row - down * 0.7), tip, 1.2), np.array((240, 226, 190)))
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
