"""Procedural pixel-art robots and monsters for the base: many colors and looks, ten poses, four
expressions.

All of them share the skeleton of rig.py with the demo's hero and none has the hero's head
(make_images.py): the base must never have seen the character that the LoRA is to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rig import (
    BACK_POSES,
    EXPRESSIONS,
    FRONT_POSES,
    OUTLINE,
    POSES,
    SIDE_POSES,
    Canvas,
    Color,
    Point,
    Style,
    draw_robot,
    paint_eye,
    paint_mouth,
)

COLORS: dict[str, Color] = {
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
GLASS: Color = (26, 34, 64)
PLATE: Color = (222, 226, 236)
GLOWS: list[Color] = [
    (252, 236, 110),
    (244, 250, 255),
    (255, 112, 88),
    (130, 250, 160),
    (96, 226, 250),
]

# Width, height and how round the corners are, of a head on a whole figure.
HELMETS = {
    "round helmet": (12, 11, 5.5),
    "flat helmet": (13, 8, 0.8),
    "tall helmet": (10, 12, 2.0),
    "wide helmet": (16, 9, 4.5),
    "square helmet": (11, 10, 0.8),
    "pointed helmet": (12, 11, 0.0),
}
CRESTS = ("", "", "antenna", "horns", "crest", "ear discs", "knob")
FACES = ("visor", "slit visor", "two eyes", "one eye", "face plate")
PORTRAIT_FACES = ("visor", "two eyes", "face plate")
VIEWS = {"front": "front view", "side": "facing right", "back": "back view"}
MONSTER_EYES = ("one eye", "two eyes", "three eyes")


def draw_sprite(
    rng: np.random.Generator, color: str | None = None, scale: int = 1
) -> tuple[np.ndarray, str]:
    """Draw one sprite: RGBA uint8 [64 * scale, 64 * scale, 4], and the caption without its
    background."""
    color = color or str(rng.choice(list(COLORS)))
    draw = (_figure, _portrait, _monster)[int(rng.choice(3, p=[0.68, 0.2, 0.12]))]
    kind = "monster" if draw is _monster else "robot"
    canvas = Canvas(scale)
    words = draw(canvas, rng, color)
    cells = canvas.cells
    if rng.random() < 0.5:
        cells = cells[:, ::-1]
        words = [word.replace("right", "left") for word in words]
    caption = ", ".join(["pixel art", f"{color} {kind}", *words])
    return np.ascontiguousarray(cells.repeat(2, axis=0).repeat(2, axis=1)), caption


def _figure(canvas: Canvas, rng: np.random.Generator, color: str) -> list[str]:
    """A whole robot in one of the poses."""
    pose = str(rng.choice(POSES))
    views = [
        view for view, poses in (("front", FRONT_POSES), ("side", SIDE_POSES)) if pose in poses
    ]
    view = str(rng.choice(views))
    rig = (FRONT_POSES if view == "front" else SIDE_POSES)[pose]
    if view == "front" and pose in BACK_POSES and rng.random() < 0.2:
        view = "back"
    head = Head.random(rng, color, FACES)
    second = head.second
    style = Style(
        body=_shade(rng, color),
        limbs=COLORS[second] if rng.random() < 0.3 else COLORS[color],
        gloves=COLORS[second],
        boots=COLORS[second],
        glow=head.glow,
        paint_head=lambda canvas, neck, view: head.paint(canvas, neck, view),
        paint_chest=_random_chest(rng, head),
        thickness=float(rng.uniform(1.2, 1.8)),
        hand=float(rng.uniform(1.8, 2.4)),
        shoulders=float(rng.uniform(7, 9.5)),
        hips=float(rng.uniform(5.5, 8.5)),
    )
    draw_robot(canvas, rig.jittered(rng, joint=0.5, whole=1.5), view, style)
    parts = [word for word in (head.helmet, head.crest) if word and rng.random() < 0.7]
    parts += [head.face] if view != "back" and rng.random() < 0.7 else []
    parts += [f"{second} boots"] if rng.random() < 0.35 else []
    return [pose, *(["arm cannon"] if rig.cannon else []), *parts, VIEWS[view]]


def _portrait(canvas: Canvas, rng: np.random.Generator, color: str) -> list[str]:
    """Head and shoulders, large, with an expression."""
    head = Head.random(rng, color, PORTRAIT_FACES)
    mood = str(rng.choice(EXPRESSIONS))
    canvas.paint(canvas.box(11, 24, 21, 34), head.color)
    canvas.paint(canvas.box(4, 28, 28, 36, 3), head.color)
    if rng.random() < 0.5:
        canvas.paint(canvas.box(12, 29, 20, 36, 1), COLORS[head.second])
    across, down = rng.uniform(-1, 1), rng.uniform(-0.7, 0.7)
    head.paint(canvas, (16 + across, 27 + down), "front", size=1.75, mood=mood)
    parts = [word for word in (head.helmet, head.crest, head.face) if word and rng.random() < 0.6]
    return ["portrait", mood, *parts]


@dataclass(frozen=True)
class Head:
    """A helmet, what it wears, and the face in it."""

    helmet: str
    crest: str
    face: str
    color: Color
    second: str  # a color's name
    glow: Color

    @classmethod
    def random(cls, rng: np.random.Generator, color: str, faces: tuple[str, ...]) -> Head:
        others = [name for name in COLORS if name not in (color, "black")]
        return cls(
            helmet=str(rng.choice(list(HELMETS))),
            crest=str(rng.choice(CRESTS)),
            face=str(rng.choice(faces)),
            color=_shade(rng, color),
            second=str(rng.choice(others)),
            glow=GLOWS[int(rng.integers(len(GLOWS)))],
        )

    def paint(
        self, canvas: Canvas, neck: Point, view: str, size: float = 1.0, mood: str = ""
    ) -> None:
        width, height, corner = (value * size for value in HELMETS[self.helmet])
        x, bottom = neck[0] + (0.5 if view == "side" else 0), neck[1] + 0.5
        top = bottom - height
        self._paint_crest(canvas, (x, top), width, size, view)
        if self.helmet == "pointed helmet":
            shoulder = top + height * 0.45
            skull = canvas.polygon(
                [
                    (x - width / 2, bottom),
                    (x - width / 2, shoulder),
                    (x - 1.2, top),
                    (x + 1.2, top),
                    (x + width / 2, shoulder),
                    (x + width / 2, bottom),
                ]
            )
        else:
            skull = canvas.box(x - width / 2, top, x + width / 2, bottom, corner)
        canvas.paint(skull, self.color)
        if self.crest == "ear discs":
            second, middle = COLORS[self.second], bottom - height / 2
            for ear in (-0.3,) if view == "side" else (-0.5, 0.5):
                canvas.paint(
                    canvas.ellipse((x + ear * width, middle), 1.6 * size, 2.2 * size), second
                )
        if view != "back":
            look = x + (width * 0.2 if view == "side" else 0)
            self._paint_face(canvas, (look, bottom - height * 0.45), width, size, mood)

    def _paint_crest(
        self, canvas: Canvas, top: Point, width: float, size: float, view: str
    ) -> None:
        x, y = top
        second = COLORS[self.second]
        if self.crest == "antenna":
            canvas.paint(canvas.stroke((x, y), (x, y - 2.5 * size), 0.5), second)
            canvas.paint(canvas.ellipse((x, y - 2.5 * size), 1.4 * size, 1.4 * size), second)
        elif self.crest == "horns":
            for side in (-1, 1):
                root = x + side * width * 0.3
                tip = (root + side * 2.2 * size, y - 3 * size)
                horn = [(root - 1.4 * size, y + 2), (root + 1.4 * size, y + 2), tip]
                canvas.paint(canvas.polygon(horn), second)
        elif self.crest == "crest":
            half = (4 if view == "side" else 1.2) * size
            canvas.paint(canvas.ellipse((x - half * 0.2, y), half, 3 * size), second)
        elif self.crest == "knob":
            canvas.paint(canvas.box(x - 2 * size, y - 1.6 * size, x + 2 * size, y + 2, 0.8), second)

    def _paint_face(
        self, canvas: Canvas, look: Point, width: float, size: float, mood: str
    ) -> None:
        if mood:
            self._paint_large_face(canvas, look, width, size, mood)
            return
        x, y = look
        half = width * 0.36
        if self.face == "one eye":
            canvas.paint(canvas.ellipse(look, 2.8, 2.8), GLASS)
            canvas.fill(canvas.ellipse(look, 1.5, 1.5), self.glow)
        elif self.face == "slit visor":
            canvas.paint(canvas.box(x - half, y - 0.5, x + half, y + 0.5), self.glow)
        elif self.face == "visor":
            canvas.paint(canvas.box(x - half, y - 1.5, x + half, y + 1.5, 0.5), GLASS)
            canvas.fill(canvas.box(x - half + 1, y - 0.5, x + half - 1, y + 0.5), self.glow)
        else:
            field, ink = self._field_and_ink()
            canvas.paint(canvas.box(x - half, y - 2.6, x + half, y + 2.6, 1), field)
            for side in (-1, 1):
                paint_eye(canvas, (x + side * half * 0.5, y), 1.4, side, "calm", ink)

    def _paint_large_face(
        self, canvas: Canvas, look: Point, width: float, size: float, mood: str
    ) -> None:
        x, y = look
        half = width * (0.46 if self.face == "visor" else 0.38)
        field, ink = self._field_and_ink()
        panel = canvas.box(x - half, y - 2.6 * size, x + half, y + 3.8 * size, size)
        canvas.paint(panel, field)
        radius = min(1.5 * size, half * 0.36)
        for side in (-1, 1):
            paint_eye(canvas, (x + side * half * 0.5, y - 0.3 * size), radius, side, mood, ink)
        paint_mouth(canvas, (x, y + 2.7 * size), 0.85 * radius, mood, ink)

    def _field_and_ink(self) -> tuple[Color, Color]:
        return (PLATE, OUTLINE) if self.face == "face plate" else (GLASS, self.glow)


def _random_chest(
    rng: np.random.Generator, head: Head
) -> Callable[[Canvas, Point, str], None] | None:
    """A lamp, a plate, a backpack seen from behind, or nothing."""
    kind, second = rng.integers(3), COLORS[head.second]

    def paint(canvas: Canvas, middle: Point, view: str) -> None:
        x, y = middle[0] + (1 if view == "side" else 0), middle[1] + 0.5
        if view == "back":
            canvas.paint(canvas.box(x - 2.5, y - 2.5, x + 2.5, y + 2, 0.8), second)
        elif kind == 0:
            canvas.paint(canvas.ellipse((x, y), 1.6, 1.6), head.glow)
        elif kind == 1:
            canvas.fill(canvas.box(x - 2, y - 1, x + 2, y + 2), second)

    return paint


def _shade(rng: np.random.Generator, color: str) -> Color:
    """The named color, a little lighter or darker."""
    shade = np.clip(np.array(COLORS[color]) * rng.uniform(0.9, 1.08), 0, 255).astype(int)
    return (int(shade[0]), int(shade[1]), int(shade[2]))


def _monster(canvas: Canvas, rng: np.random.Generator, color: str) -> list[str]:
    """A blob: a ghost, or a slime with flat feet."""
    across, down = rng.uniform(8, 12), rng.uniform(7, 11)
    x, y = 16 + rng.uniform(-1, 1), 29 - down
    words = []
    body = canvas.ellipse((x, y), across, down)
    if rng.random() < 0.5:
        body |= canvas.box(x - across, y, x + across, y + down)
        words.append("flat")
    if rng.random() < 0.4:
        for side in (-1, 1):
            root = x + side * across * 0.5
            horn = [
                (root - 2, y - down * 0.6),
                (root + 2, y - down * 0.6),
                (root + side * 3, y - down - 3),
            ]
            canvas.paint(canvas.polygon(horn), (244, 232, 200))
        words.append("horns")
    canvas.paint(body, _shade(rng, color))
    eyes = str(rng.choice(MONSTER_EYES))
    row, white = y - down * 0.2, (250, 250, 250)
    places = {"one eye": (0,), "two eyes": (-0.38, 0.38), "three eyes": (-0.5, 0, 0.5)}[eyes]
    for place in places:
        center, radius = (x + place * across, row), 3.4 if eyes == "one eye" else 2.2
        canvas.paint(canvas.ellipse(center, radius, radius), white)
        canvas.fill(
            canvas.ellipse((center[0] + 0.5, center[1] + 0.5), radius * 0.5, radius * 0.5), OUTLINE
        )
    if rng.random() < 0.6:
        canvas.fill(
            canvas.box(x - across * 0.5, y + down * 0.3, x + across * 0.5, y + down * 0.3 + 2.5),
            OUTLINE,
        )
        for tooth in (-0.3, 0.0, 0.3):
            center = x + tooth * across
            canvas.fill(
                canvas.box(center - 0.7, y + down * 0.3, center + 0.7, y + down * 0.3 + 1.3), white
            )
        words.append("teeth")
    return [*words, eyes]
