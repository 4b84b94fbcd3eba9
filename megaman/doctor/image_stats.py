"""What the dataset doctor measures of an image: its size, how sharp its edges are, a thumbnail and
a preview."""

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

from megaman.data.images import MIN_SPRITE_SIDE, BadImageError, image_size, open_image
from megaman.errors import UserError

THUMBNAIL_SIDE = 48  # pixels; thumbnails are compared to find duplicates
PREVIEW_SIDE = 144  # pixels of the longer side
PREVIEW_QUALITY = 70  # of the JPEG
WINDOW = 13  # pixels in which an edge's steepest step is compared with its height
# Share of the image's range of brightness: what changes by less within a window is shading, not an
# edge.
MIN_EDGE_SHARE = 0.3
MIN_EDGE_LEVELS = 16.0  # of 255
MIN_EDGES, MIN_EDGES_SHARE = 8, 0.002  # of all windows: fewer say nothing
IMAGES_PER_PROCESS = 64  # fewer are measured before another process would have started
MAX_PROCESSES = 8  # with more, the disk is the bottleneck
CHUNK_SIZE = 8  # images handed to a process at a time


class ImageStats(NamedTuple):
    """What was measured of an image, or in problem why it cannot be read.

    width and height are in pixels, upright; sharpness as in `sharpness`; thumbnail is the whole
    image squeezed into a square, uint8 [THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3]; preview is a JPEG.
    """

    problem: str | None
    width: int = 0
    height: int = 0
    sharpness: float | None = None
    thumbnail: np.ndarray | None = None
    preview: bytes = b""


def measure_images(
    images: list[Path], resolution: int, num_processes: int | None = None
) -> Iterator[ImageStats]:
    """Decode and measure every image, in order, in as many processes as there are cores; each
    process holds one image in memory.

    Raises UserError if a process was killed, as the system does when memory runs out.
    """
    if num_processes is None:
        num_processes = min(_usable_cores(), 1 + len(images) // IMAGES_PER_PROCESS)
    measure = partial(measure_image, resolution=resolution)
    if num_processes == 1:
        yield from map(measure, images)
        return
    # Spawned on every system: a fork would copy the locks of other threads.
    pool = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=_ignore_ctrl_c
    )
    try:
        yield from pool.map(measure, images, chunksize=CHUNK_SIZE)
    except BrokenProcessPool:
        raise UserError(
            "A process that read the images was killed", "Close other programs and try again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _usable_cores() -> int:
    """The cores that this process may use, MAX_PROCESSES at most."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    return min(os.cpu_count() or 1, MAX_PROCESSES)


def _ignore_ctrl_c() -> None:
    """The parent handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def measure_image(path: Path, resolution: int) -> ImageStats:
    """Measure an image as it would be trained on: with its shorter side reduced to the
    resolution."""
    try:
        width, height = image_size(path, MIN_SPRITE_SIDE)
        image = open_image(path, min_side=max(resolution, PREVIEW_SIDE))
    except BadImageError as error:
        return ImageStats(str(error))
    preview = _make_preview(image)
    scale = resolution / min(image.size)
    if scale < 1:
        image = _shrink(image, scale)
    enlarges = min(image.size) < THUMBNAIL_SIDE
    resample = Image.Resampling.BICUBIC if enlarges else Image.Resampling.BOX
    thumbnail = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), resample)
    gray = np.asarray(image.convert("L"))
    return ImageStats(None, width, height, sharpness(gray), np.asarray(thumbnail), preview)


def _make_preview(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    small = _shrink(image, min(1, PREVIEW_SIDE / max(image.size)))
    small.save(buffer, "JPEG", quality=PREVIEW_QUALITY)
    return buffer.getvalue()


def _shrink(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)


def sharpness(gray: np.ndarray) -> float | None:
    """How steep the sharpest tenth of the edges is in an image uint8 [H, W], from 0 to 1; None if
    it has no edges.

    If the brightness changes much within WINDOW pixels of a row or column, the steepest step there
    is divided by the whole change: 1 for a step from one pixel to the next, about 0.4 / s for one
    blurred by a Gaussian of s pixels. This is the inverse of the edge width of Marziliano et al.,
    "A no-reference perceptual blur metric" (2002). Flat areas, shading and noise are not edges, so
    flat drawings and dark images are judged by their outlines alone, and a sharp figure in front of
    a soft background counts as sharp. An image so soft that nothing changes within a window is
    measured at half and at a quarter of its size.
    """
    low, high = (int(value) for value in np.percentile(gray[::2, ::2], (2, 98)))
    min_change = max(MIN_EDGE_SHARE * (high - low), MIN_EDGE_LEVELS)
    for _ in range(3):
        if min(gray.shape) < WINDOW:
            return None
        edges = np.concatenate([_steepness(gray, min_change), _steepness(gray.T, min_change)])
        if len(edges) >= max(MIN_EDGES_SHARE * 2 * gray.size, MIN_EDGES):
            return float(np.percentile(edges, 90))
        gray = np.asarray(Image.fromarray(np.ascontiguousarray(gray)).reduce(2))
    return None


def _steepness(gray: np.ndarray, min_change: float) -> np.ndarray:
    """The steepest step divided by the whole change, of those windows along the columns in which
    the change is large enough."""
    gray = np.ascontiguousarray(gray)
    steps = np.maximum(gray[1:], gray[:-1]) - np.minimum(gray[1:], gray[:-1])  # uint8: no overflow
    change = _over_windows(gray, WINDOW, np.maximum) - _over_windows(gray, WINDOW, np.minimum)
    is_edge = change >= min_change
    steepest = _over_windows(steps, WINDOW - 1, np.maximum)
    return steepest[is_edge] / change[is_edge].astype(np.float32)


def _over_windows(values: np.ndarray, length: int, extremum: np.ufunc) -> np.ndarray:
    """The maximum or minimum of every length neighbors along the first axis, by windows of doubled
    length."""
    done, total = 1, len(values) - length + 1
    while 2 * done <= length:
        values = extremum(values[:-done], values[done:])
        done *= 2
    return extremum(values[:total], values[length - done : length - done + total])
