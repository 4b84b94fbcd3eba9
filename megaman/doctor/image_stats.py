"""How a picture looks, for the dataset doctor: its size, how sharp its edges are, a small copy of
it."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megaman.data.images import BadImageError, image_size, open_image
from megaman.errors import UserError

SMALL = 48  # side of the copy by which pictures are compared
PREVIEW = 144  # longest side of the one to look at, in pixels
WINDOW = 13  # pixels in which an edge's steepest step is set against its height
# of the picture's range of brightness: what changes by less within a window is shading, not an edge
STRONG = 0.3
ENOUGH_EDGES = 0.002  # of all windows: fewer say nothing
FEW = 64  # so many pictures are looked at before other processes would have started


class Appearance(NamedTuple):
    """What was seen of a picture, or in problem why it cannot be read.

    width and height in pixels, upright; sharpness as of sharpness(); small is uint8 [SMALL, SMALL,
    3], the whole picture squeezed into a square; preview a JPEG.
    """

    problem: str | None
    width: int = 0
    height: int = 0
    sharpness: float | None = None
    small: np.ndarray | None = None
    preview: bytes = b""


def appearances(
    pictures: list[Path], resolution: int, processes: int | None = None
) -> Iterator[Appearance]:
    """Decode every picture, in order, in as many processes as there are cores; one picture a
    process is in memory.

    Raises UserError where a process was killed, as the system does when memory runs out.
    """
    processes = processes or min(cores(), 1 + len(pictures) // FEW)
    look = partial(appearance, resolution=resolution)
    if processes == 1:
        yield from map(look, pictures)
        return
    # Fresh processes on every system: a fork would copy the locks of whatever threads there are.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_leave_ctrl_c_to_the_parent
    )
    try:
        yield from pool.map(look, pictures, chunksize=8)
    except BrokenProcessPool:
        raise UserError(
            "A process that looked at the pictures was killed", "Close other programs, try again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The cores that this process may use, eight at most: beyond that the disk is what is waited
    for."""
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(usable, 8)


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def appearance(picture: Path, resolution: int) -> Appearance:
    """Look at one picture as it would be trained on: with its shorter side brought down to the
    resolution."""
    try:
        width, height = image_size(picture)
        image = open_image(picture, min_side=max(resolution, PREVIEW))
    except BadImageError as error:
        return Appearance(str(error))
    preview = _jpeg(image)
    scale = resolution / min(image.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    small = image.resize(
        (SMALL, SMALL),
        Image.Resampling.BOX if min(image.size) >= SMALL else Image.Resampling.BICUBIC,
    )
    return Appearance(
        None, width, height, sharpness(np.asarray(image.convert("L"))), np.asarray(small), preview
    )


def _jpeg(image: Image.Image) -> bytes:
    scale, packed = min(1, PREVIEW / max(image.size)), io.BytesIO()
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image.resize(size, Image.Resampling.BOX, reducing_gap=2.0).save(packed, "JPEG", quality=70)
    return packed.getvalue()


def sharpness(gray: np.ndarray) -> float | None:
    """How steep the sharpest tenth of the edges is in a uint8 [H, W] picture, from 0 to 1; None
    where it has no edges.

    Where the brightness changes much within WINDOW pixels of a row or column, the steepest step
    there is divided by the whole change: 1 for a step from one pixel to the next, about 0.4 / s for
    one blurred by a Gaussian of s pixels. This is the edge width of Marziliano et al., "A
    no-reference perceptual blur metric" (2002), turned over. Flat areas, shading and noise are no
    edges, so that flat drawings and dark pictures are judged by their outlines alone, and a sharp
    figure before a soft background counts as sharp. What is so soft that nothing changes within a
    window is looked at in half and in a quarter of the size.
    """
    low, high = (int(value) for value in np.percentile(gray[::2, ::2], (2, 98)))
    least = max(STRONG * (high - low), 16.0)
    for _ in range(3):
        if min(gray.shape) < WINDOW:
            return None
        edges = np.concatenate([_steepness(gray, least), _steepness(gray.T, least)])
        if len(edges) >= max(ENOUGH_EDGES * 2 * gray.size, 8):
            return float(np.percentile(edges, 90))
        gray = np.asarray(Image.fromarray(np.ascontiguousarray(gray)).reduce(2))
    return None


def _steepness(gray: np.ndarray, least: float) -> np.ndarray:
    """The steepest step over the whole change, of those windows along the columns in which that is
    enough."""
    gray = np.ascontiguousarray(gray)
    steps = np.maximum(gray[1:], gray[:-1]) - np.minimum(gray[1:], gray[:-1])  # uint8: no overflow
    change = _over_windows(gray, WINDOW, np.maximum) - _over_windows(gray, WINDOW, np.minimum)
    strong = change >= least
    return _over_windows(steps, WINDOW - 1, np.maximum)[strong] / change[strong].astype(np.float32)


def _over_windows(values: np.ndarray, length: int, largest: np.ufunc) -> np.ndarray:
    """The maximum or minimum of every so many neighbours along the first axis, by windows of
    doubled length."""
    done, total = 1, len(values) - length + 1
    while 2 * done <= length:
        values = largest(values[:-done], values[done:])
        done *= 2
    return largest(values[:total], values[length - done : length - done + total])
