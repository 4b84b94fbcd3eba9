"""The backgrounds behind the demo's pictures and behind the base's training art, under the names
captions use."""

from __future__ import annotations

import numpy as np

CELLS = 32  # scenes are drawn on a 32 x 32 grid, each cell 2 x 2 pixels of the 64-px picture

PLAIN = {
    "white": (250, 250, 250),
    "black": (18, 18, 22),
    "gray": (138, 140, 146),
    "red": (206, 44, 44),
    "orange": (240, 140, 36),
    "yellow": (246, 214, 60),
    "green": (62, 168, 76),
    "teal": (40, 170, 166),
    "blue": (56, 108, 222),
    "navy": (24, 34, 84),
    "purple": (126, 62, 178),
    "pink": (244, 150, 190),
    "brown": (122, 80, 48),
}
SCENES = ["starry night", "green hills", "city", "sunset", "snow", "brick wall"]
NAMES = [*PLAIN, *SCENES]


def draw_background(name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one background: uint8 [64, 64, 3]. Plain colors vary a little in shade, scenes in their
    layout."""
    if name in PLAIN:
        shade = np.clip(np.array(PLAIN[name]) + rng.integers(-6, 7, 3), 0, 255)
        return np.broadcast_to(shade.astype(np.uint8), (2 * CELLS, 2 * CELLS, 3)).copy()
    cells = _SCENE_PAINTERS[name](rng)
    return cells.repeat(2, axis=0).repeat(2, axis=1)


def _bands(colors: list[tuple[int, int, int]], edges: list[int]) -> np.ndarray:
    """Fill the grid with horizontal bands; edges[i] is the row at which band i + 1 begins."""
    cells = np.empty((CELLS, CELLS, 3), np.uint8)
    for color, start, stop in zip(colors, [0, *edges], [*edges, CELLS], strict=True):
        cells[start:stop] = color
    return cells


def _starry_night(rng: np.random.Generator) -> np.ndarray:
    cells = _bands([(14, 16, 44), (22, 24, 66), (34, 34, 88)], [12, 23])
    rows, columns = rng.integers(0, CELLS, (2, 22))
    cells[rows, columns] = (250, 244, 200)
    row, column = rng.integers(2, 9), rng.integers(2, 26)
    cells[row : row + 4, column : column + 4] = (246, 236, 170)
    return cells


def _green_hills(rng: np.random.Generator) -> np.ndarray:
    cells = _bands([(126, 200, 246), (160, 216, 250)], [11])
    across = np.arange(CELLS)
    for base, height, color in ((17, 4, (86, 178, 84)), (24, 3, (58, 148, 64))):
        skyline = base + np.round(
            height * np.sin(across / rng.uniform(3.4, 5.5) + rng.uniform(0, 6))
        ).astype(int)
        cells[np.arange(CELLS)[:, None] >= skyline[None, :]] = color
    row, column = rng.integers(2, 6), rng.integers(1, 24)
    cells[row : row + 2, column : column + 6] = (248, 252, 255)
    return cells


def _city(rng: np.random.Generator) -> np.ndarray:
    cells = _bands([(36, 30, 70), (70, 46, 104), (112, 66, 122)], [10, 19])
    column = 0
    while column < CELLS:
        width, top = int(rng.integers(4, 8)), int(rng.integers(7, 20))
        cells[top:, column : column + width] = (26, 26, 44)
        lit = rng.random((CELLS, CELLS)) < 0.35
        windows = np.zeros((CELLS, CELLS), bool)
        windows[top + 2 : CELLS : 3, column + 1 : min(column + width - 1, CELLS) : 2] = True
        cells[windows & lit] = (250, 214, 96)
        column += width
    return cells


def _sunset(rng: np.random.Generator) -> np.ndarray:
    cells = _bands([(92, 44, 120), (186, 62, 110), (240, 112, 76), (252, 172, 84)], [7, 13, 18])
    centre = rng.integers(7, 26)
    rows, columns = np.mgrid[:CELLS, :CELLS]
    cells[(rows - 19) ** 2 + (columns - centre) ** 2 < 26] = (255, 236, 140)
    cells[23:] = (78, 38, 84)
    cells[25::3, ::2] = (120, 56, 96)
    return cells


def _snow(rng: np.random.Generator) -> np.ndarray:
    cells = _bands([(150, 190, 226), (190, 216, 240)], [13])
    skyline = 24 + np.round(1.6 * np.sin(np.arange(CELLS) / 4.2 + rng.uniform(0, 6))).astype(int)
    cells[np.arange(CELLS)[:, None] >= skyline[None, :]] = (244, 248, 255)
    rows, columns = rng.integers(0, 24, 26), rng.integers(0, CELLS, 26)
    cells[rows, columns] = (255, 255, 255)
    return cells


def _brick_wall(rng: np.random.Generator) -> np.ndarray:
    cells = np.empty((CELLS, CELLS, 3), np.uint8)
    shift = int(rng.integers(0, 8))
    for course in range(CELLS // 4):
        for brick in range(-1, 5):
            left = brick * 8 + (course % 2) * 4 + shift - 4
            tone = int(rng.integers(-10, 11))
            columns = slice(max(left, 0), max(left + 8, 0))
            cells[course * 4 : course * 4 + 4, columns] = (
                158 + tone,
                78 + tone // 2,
                62 + tone // 2,
            )
            cells[course * 4 : course * 4 + 4, max(left + 7, 0) : max(left + 8, 0)] = (96, 50, 44)
        cells[course * 4 + 3] = (96, 50, 44)
    return cells


_SCENE_PAINTERS = {
    "starry night": _starry_night,
    "green hills": _green_hills,
    "city": _city,
    "sunset": _sunset,
    "snow": _snow,
    "brick wall": _brick_wall,
}
