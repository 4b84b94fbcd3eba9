"""A skeleton for pixel-art robots on a grid of 32 x 32 cells: canvas, poses, body, facial
expressions.

sprites.py gives it many looks for the base, make_images.py one more for the demo's hero. Colors are
flat and shapes are large, so that a small UNet can learn them and a pose can be recognized by its
silhouette alone.

Coordinates are in cells from the top left corner. Every pose is drawn from the front, from the back
or facing right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

CELLS = 32
OUTLINE = (22, 20, 40)
SHADOW = (52, 50, 70)

Color = tuple[int, int, int]
Point = tuple[float, float]
Limb = tuple[Point, Point]  # elbow and hand, or knee and sole


class Canvas:
    """RGBA cells to paint on; with scale 2 the same picture has 64 x 64 cells."""

    def __init__(self, scale: int = 1) -> None:
        self.scale = scale
        side = CELLS * scale
        self.cells = np.zeros((side, side, 4), np.uint8)
        self.y, self.x = (np.mgrid[:side, :side] + 0.5) / scale

    def fill(self, mask: np.ndarray, color: Color) -> None:
        self.cells[mask] = (*color, 255)

    def paint(self, mask: np.ndarray, color: Color) -> None:
        """Fill a part and put a dark line around it."""
        frame = np.pad(mask, 1)
        around = frame[:-2, 1:-1] | frame[2:, 1:-1] | frame[1:-1, :-2] | frame[1:-1, 2:]
        self.fill(around, OUTLINE)
        self.fill(mask, color)

    def ellipse(self, center: Point, across: float, down: float) -> np.ndarray:
        return ((self.x - center[0]) / across) ** 2 + ((self.y - center[1]) / down) ** 2 <= 1

    def box(
        self, left: float, top: float, right: float, bottom: float, corner: float = 0
    ) -> np.ndarray:
        """A rectangle with rounded corners."""
        from_x = np.maximum(np.abs(self.x - (left + right) / 2) - (right - left) / 2 + corner, 0)
        from_y = np.maximum(np.abs(self.y - (top + bottom) / 2) - (bottom - top) / 2 + corner, 0)
        return from_x**2 + from_y**2 <= max(corner, 1e-3) ** 2

    def stroke(self, start: Point, end: Point, radius: float) -> np.ndarray:
        """A thick line with round ends."""
        along_x, along_y = end[0] - start[0], end[1] - start[1]
        length = max(along_x**2 + along_y**2, 1e-6)
        share = ((self.x - start[0]) * along_x + (self.y - start[1]) * along_y) / length
        share = np.clip(share, 0, 1)
        return (
            np.hypot(self.x - start[0] - share * along_x, self.y - start[1] - share * along_y)
            <= radius
        )

    def polygon(self, points: list[Point]) -> np.ndarray:
        inside = np.zeros(self.x.shape, bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 == y1:
                continue
            crosses = (self.y < y0) != (self.y < y1)
            inside ^= crosses & (self.x < x0 + (self.y - y0) * (x1 - x0) / (y1 - y0))
        return inside

    def glyph(self, rows: list[str], left: int, top: int) -> np.ndarray:
        """A shape drawn by hand, "#" for a cell that belongs to it; may reach over the edge."""
        mask = np.zeros((CELLS, CELLS), bool)
        for row, text in enumerate(rows, start=top):
            for column, letter in enumerate(text, start=left):
                if letter == "#" and 0 <= row < CELLS and 0 <= column < CELLS:
                    mask[row, column] = True
        return mask.repeat(self.scale, axis=0).repeat(self.scale, axis=1)


@dataclass(frozen=True)
class Pose:
    """Where the joints are. From the front, far is the viewer's left and near the viewer's
    right."""

    far_arm: Limb
    near_arm: Limb
    far_leg: Limb
    near_leg: Limb
    neck: Point = (16, 16)
    hip: Point = (16, 24)
    cannon: str = ""  # "forward" or "up": the near arm ends in one
    airborne: bool = False  # a shadow on the ground below
    flying: bool = False  # a flame behind

    def jittered(self, rng: np.random.Generator, joint: float, whole: float) -> Pose:
        """The same pose by another hand: joints moved by up to `joint` cells, all of it by up to
        `whole` sideways."""
        shift = float(rng.uniform(-whole, whole))

        def moved(point: Point, most: float) -> Point:
            across, down = rng.uniform(-most, most, 2)
            return (point[0] + shift + float(across), point[1] + float(down))

        limbs = {
            name: (moved(getattr(self, name)[0], joint), moved(getattr(self, name)[1], joint))
            for name in ("far_arm", "near_arm", "far_leg", "near_leg")
        }
        return replace(
            self, neck=moved(self.neck, joint / 2), hip=moved(self.hip, joint / 2), **limbs
        )


FRONT_POSES = {
    "standing": Pose(
        ((9.5, 20), (8.5, 24)),
        ((22.5, 20), (23.5, 24)),
        ((13.5, 27), (13, 30.5)),
        ((18.5, 27), (19, 30.5)),
    ),
    "waving": Pose(
        ((9.5, 20), (8.5, 24)),
        ((25, 18), (27, 11)),
        ((13.5, 27), (13, 30.5)),
        ((18.5, 27), (19, 30.5)),
    ),
    "arms raised": Pose(
        ((7, 18), (5, 11)), ((25, 18), (27, 11)), ((13.5, 27), (13, 30.5)), ((18.5, 27), (19, 30.5))
    ),
    "jumping": Pose(
        ((8, 17.5), (4, 18.5)),
        ((24, 17.5), (28, 18.5)),
        ((10.5, 22.5), (9, 26.5)),
        ((21.5, 22.5), (23, 26.5)),
        neck=(16, 15),
        hip=(16, 21),
        airborne=True,
    ),
    "sitting": Pose(
        ((9.5, 25), (9.5, 27)),
        ((22.5, 25), (22.5, 27)),
        ((11.5, 28.5), (11, 30.5)),
        ((20.5, 28.5), (21, 30.5)),
        neck=(16, 21),
        hip=(16, 28),
    ),
}
SIDE_POSES = {
    "standing": Pose(
        ((18, 20.5), (19, 23.5)),
        ((14, 20.5), (13.5, 24)),
        ((17.5, 27), (20, 30.5)),
        ((14.5, 27), (13, 30.5)),
    ),
    "running": Pose(
        ((21, 19.5), (25.5, 17.5)),
        ((12, 19.5), (8, 20)),
        ((12.5, 26.5), (6, 28.5)),
        ((20, 25), (25, 29.5)),
        neck=(17.5, 15.5),
        hip=(15.5, 22.5),
    ),
    "jumping": Pose(
        ((21.5, 15), (25.5, 10.5)),
        ((10, 16), (6, 13)),
        ((11.5, 22.5), (7.5, 26)),
        ((20.5, 20), (20.5, 25)),
        neck=(16, 15),
        hip=(15, 20.5),
        airborne=True,
    ),
    "kneeling": Pose(
        ((18.5, 24), (20.5, 25)),
        ((15, 24), (19.5, 25)),
        ((20.5, 25.5), (21, 30.5)),
        ((14, 29), (7.5, 30)),
        neck=(15, 19),
        hip=(14, 26.5),
    ),
    "sitting": Pose(
        ((13.5, 26), (18, 26.5)),
        ((9, 24), (7.5, 28.5)),
        ((17, 28), (25, 30)),
        ((17, 29), (23, 30.5)),
        neck=(13, 21),
        hip=(12.5, 28.5),
    ),
    "shooting": Pose(
        ((13, 20.5), (13.5, 22.5)),
        ((16, 19.5), (22.5, 19.5)),
        ((16, 26.5), (19.5, 30.5)),
        ((10, 26.5), (7, 30.5)),
        neck=(11.5, 16),
        hip=(12.5, 24),
        cannon="forward",
    ),
    "aiming up": Pose(
        ((13.5, 21), (16, 22.5)),
        ((20.5, 18.5), (24.5, 10.5)),
        ((16.5, 27), (18, 30.5)),
        ((11, 27), (10, 30.5)),
        neck=(13, 16),
        hip=(13.5, 24),
        cannon="up",
    ),
    "flying": Pose(
        ((20, 19.5), (22, 21.5)),
        ((22, 20.5), (28, 20.5)),
        ((10, 20), (6.5, 18.5)),
        ((10, 22.5), (6.5, 24)),
        neck=(20, 17.5),
        hip=(13.5, 20.5),
        airborne=True,
        flying=True,
    ),
}
POSES = list(dict.fromkeys([*FRONT_POSES, *SIDE_POSES]))
BACK_POSES = (
    "standing",
    "waving",
    "arms raised",
    "jumping",
)  # seen from behind as from the front, without a face
EXPRESSIONS = ("calm", "happy", "angry", "surprised")


@dataclass(frozen=True)
class Style:
    """What a robot looks like, but for its head, which paint_head(canvas, neck, view) paints."""

    body: Color
    limbs: Color
    gloves: Color
    boots: Color
    glow: Color  # shots and flames
    paint_head: Callable[[Canvas, Point, str], None]
    paint_chest: Callable[[Canvas, Point, str], None] | None = None
    thickness: float = 1.5  # radius of arms and legs
    hand: float = 2.1
    shoulders: float = 8.0
    hips: float = 7.0


def draw_robot(canvas: Canvas, pose: Pose, view: str, style: Style) -> None:
    """Draw a robot back to front; view is "front", "back" or "side" (facing right)."""
    if pose.airborne:
        x = pose.hip[0]
        canvas.fill(canvas.box(x - 5, 29.4, x + 5, 31.4, 1), SHADOW)
    if pose.flying:
        _paint_flame(canvas, pose, style)
    _paint_arm(canvas, pose.far_arm, _shoulder(pose, style, view, -1), style)
    if view != "side":
        _paint_arm(canvas, pose.near_arm, _shoulder(pose, style, view, 1), style)
    _paint_leg(canvas, pose, pose.far_leg, _hip_joint(pose, view, -1), style, view)
    _paint_leg(canvas, pose, pose.near_leg, _hip_joint(pose, view, 1), style, view)
    _paint_torso(canvas, pose, style, 0.8 if view == "side" else 1.0)
    if style.paint_chest and view != "side":
        middle = ((pose.neck[0] + pose.hip[0]) / 2, (pose.neck[1] + pose.hip[1]) / 2)
        style.paint_chest(canvas, middle, view)
    style.paint_head(canvas, pose.neck, view)
    if view == "side":
        start = _shoulder(pose, style, view, 1)
        if pose.cannon:
            _paint_cannon(canvas, pose, start, style)
        else:
            _paint_arm(canvas, pose.near_arm, start, style)


def _shoulder(pose: Pose, style: Style, view: str, side: int) -> Point:
    across = 0.5 * side if view == "side" else side * (style.shoulders / 2 - 0.5)
    return (pose.neck[0] - across if view == "side" else pose.neck[0] + across, pose.neck[1] + 2.5)


def _hip_joint(pose: Pose, view: str, side: int) -> Point:
    return (pose.hip[0] + side * (-1 if view == "side" else 2), pose.hip[1] - 0.5)


def _paint_arm(canvas: Canvas, limb: Limb, shoulder: Point, style: Style) -> None:
    elbow, hand = limb
    arm = canvas.stroke(shoulder, elbow, style.thickness) | canvas.stroke(
        elbow, hand, style.thickness
    )
    canvas.paint(arm, style.limbs)
    canvas.paint(canvas.ellipse(hand, style.hand, style.hand), style.gloves)


def _paint_leg(
    canvas: Canvas, pose: Pose, limb: Limb, joint: Point, style: Style, view: str
) -> None:
    knee, sole = limb
    ankle = (sole[0], sole[1] - 1.5)
    leg = canvas.stroke(joint, knee, style.thickness) | canvas.stroke(knee, ankle, style.thickness)
    canvas.paint(leg, style.limbs)
    if pose.airborne and not (view == "side" and sole[0] > pose.hip[0]):
        boot = canvas.ellipse(ankle, 2.5, 2.2)
    else:
        ahead = 1.0 if view == "side" else 0.0
        boot = canvas.box(
            sole[0] - 2.5 + ahead / 2, sole[1] - 3, sole[0] + 2.5 + ahead, sole[1], 0.9
        )
    canvas.paint(boot, style.boots)


def _paint_torso(canvas: Canvas, pose: Pose, style: Style, broad: float) -> None:
    """A quadrilateral from the shoulders to the hips, square to the spine."""
    spine = np.subtract(pose.hip, pose.neck)
    normal = np.array((-spine[1], spine[0])) / max(float(np.hypot(*spine)), 1e-6)
    corners = [
        np.add(end, side * broad * width / 2 * normal)
        for end, side, width in (
            (pose.neck, -1, style.shoulders),
            (pose.neck, 1, style.shoulders),
            (pose.hip, 1, style.hips),
            (pose.hip, -1, style.hips),
        )
    ]
    canvas.paint(canvas.polygon([(float(x), float(y)) for x, y in corners]), style.body)


def _paint_cannon(canvas: Canvas, pose: Pose, shoulder: Point, style: Style) -> None:
    (elbow, hand), up = pose.near_arm, pose.cannon == "up"
    arm = canvas.stroke(shoulder, elbow, style.thickness) | canvas.stroke(
        elbow, hand, style.thickness
    )
    canvas.paint(arm, style.limbs)
    along, across = (2.5, 3.5) if up else (3.5, 2.5)
    canvas.paint(
        canvas.box(hand[0] - along, hand[1] - across, hand[0] + along, hand[1] + across, 1),
        style.gloves,
    )
    shot = (hand[0], hand[1] - 6.5) if up else (hand[0] + 6, hand[1])
    canvas.paint(canvas.ellipse(shot, 1.7, 1.7), style.glow)


def _paint_flame(canvas: Canvas, pose: Pose, style: Style) -> None:
    for _, sole in (pose.far_leg, pose.near_leg):
        x, y = sole[0], sole[1] - 1.5
        canvas.paint(canvas.polygon([(x, y - 1.8), (x, y + 1.8), (x - 5.5, y)]), style.glow)


def paint_eye(
    canvas: Canvas, center: Point, radius: float, side: int, mood: str, color: Color
) -> None:
    """An eye that shows the mood; side is -1 for the viewer's left eye and 1 for the right."""
    x, y = center
    if mood == "happy":  # an arc, open below
        outer = canvas.ellipse((x, y + radius * 0.5), radius * 1.15, radius * 1.3)
        inner = canvas.ellipse((x, y + radius * 0.8), radius * 0.6, radius * 0.9)
        eye = outer & ~inner & (canvas.y < y + radius * 0.6)
    elif mood == "angry":  # a disc under a slanting brow
        brow = y - radius * 0.2 - side * 0.7 * (canvas.x - x)
        eye = canvas.ellipse(center, radius * 1.15, radius * 1.15) & (canvas.y > brow)
    elif mood == "surprised":  # a ring
        eye = canvas.box(
            x - radius * 1.15, y - radius * 1.3, x + radius * 1.15, y + radius * 1.3, radius * 0.6
        )
        eye &= ~canvas.box(x - radius * 0.45, y - radius * 0.6, x + radius * 0.45, y + radius * 0.6)
    else:
        eye = canvas.box(x - radius * 0.6, y - radius, x + radius * 0.6, y + radius, radius * 0.3)
    canvas.fill(eye, color)


def paint_mouth(canvas: Canvas, center: Point, radius: float, mood: str, color: Color) -> None:
    x, y = center
    if mood == "happy":
        mouth = canvas.ellipse((x, y - radius * 0.4), radius * 1.3, radius * 1.1) & (
            canvas.y > y - radius * 0.4
        )
    elif mood == "angry":
        mouth = canvas.box(x - radius, y - 0.5, x + radius, y + 0.5)
        for side in (-1, 1):
            corner = x + side * (radius + 0.5)
            mouth |= canvas.box(corner - 0.6, y + 0.5, corner + 0.6, y + 1.5)
    elif mood == "surprised":
        mouth = canvas.box(
            x - radius * 0.7, y - radius * 0.7, x + radius * 0.7, y + radius * 0.7, 0.8
        )
    else:
        mouth = canvas.box(x - radius * 0.8, y - 0.5, x + radius * 0.8, y + 0.5)
    canvas.fill(mouth, color)
