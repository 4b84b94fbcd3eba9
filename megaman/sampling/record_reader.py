"""Reads the record in an image, which may come from a stranger."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from PIL import Image

from megaman import schema
from megaman.config import samplers
from megaman.errors import UserError
from megaman.files import is_network
from megaman.sampling.pixel_grid import MAX_COLORS
from megaman.sampling.records import KEY, Record
from megaman.threads import MAX_THREADS

MAX_ITEMS = 4096  # images of a batch, LoRAs, packages in versions: what a record may have
MAX_PROMPT = 100_000  # characters


def find_record(path: Path) -> Record | None:
    """The record in an image, or None if there is none or it is damaged."""
    try:
        return read_record(path)
    except UserError:
        return None


def read_record(path: Path) -> Record:
    """The record in an image, which may come from a stranger; raises UserError if it has none."""
    name = f"--from_image {path}"
    remedy = "Name an image that generate_megaman.py made"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise UserError(f"{name} is missing", remedy) from None
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{name} is not a PNG that can be read", remedy) from None
    if text is None:
        raise UserError(f"{name} has no record of this project", remedy)
    defaults = {item.name: item.default for item in fields(Record) if item.default is not MISSING}
    try:
        content = defaults | json.loads(text)
        values = {field.name: content[field.name] for field in fields(Record)}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{name}: its record is damaged", remedy) from None
    wrong = schema.first_invalid(values, CHECKS)
    if wrong is None and values["place"] >= len(values["batch"]):
        wrong = "place"
    if wrong:
        raise UserError(f"{name}: {wrong} in its record has an impossible value", remedy)
    return Record(**values)


def _is_side(value: Any) -> bool:
    return schema.whole(8, 8192)(value) and value % 8 == 0


def _is_path(value: Any) -> bool:
    return _is_text(value) and bool(value) and not is_network(value)


def _is_sampler(value: Any) -> bool:
    return _is_text(value) and samplers.find(value) is not None


def _is_color(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{6}", value) is not None


def _is_palette(value: Any) -> bool:
    return value is None or schema.list_of(_is_color, most=MAX_COLORS)(value)


_is_text = schema.text(MAX_PROMPT)
_is_seed = schema.whole(0, 2**64 - 1)
_is_strength = schema.number(-10, 10)
_is_lora = schema.row(_is_path, _is_strength, _is_text)
_is_batch_item = schema.row(_is_text, _is_text, _is_seed)
# The limits are those of the command line. A network path is refused: opening it would log in
# elsewhere. Whether base and LoRAs still exist shows when they are loaded: they may have moved.
CHECKS = {
    "prompt": _is_text,
    "negative_prompt": _is_text,
    "seed": _is_seed,
    "width": _is_side,
    "height": _is_side,
    "steps": schema.whole(1, 999),
    "guidance_scale": schema.number(0, 100),
    "scheduler": _is_sampler,
    "clip_skip": schema.whole(1, 64),
    "base": _is_path,
    "loras": schema.list_of(_is_lora, most=MAX_ITEMS),
    "lora_scale": _is_strength,
    "batch": schema.list_of(_is_batch_item, least=1, most=MAX_ITEMS),
    "place": schema.whole(0, MAX_ITEMS),
    "device": _is_text,
    "dtype": schema.one_of("float32", "float16", "bfloat16"),
    "fused": schema.instance(bool),
    "vae_tiling": schema.instance(bool),
    "versions": schema.mapping(_is_text),
    "memory_format": schema.one_of("contiguous", "channels_last"),
    "threads": schema.whole(0, MAX_THREADS),
    "vae_tile": schema.whole(0, 8192),
    "pixel_art": schema.whole(0, 8192),
    "palette": _is_palette,
}
