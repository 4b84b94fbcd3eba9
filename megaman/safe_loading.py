"""Checks before any library opens a model's file: no pickles, which can run code, and no
safetensors file with a false header."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from megaman.errors import UserError
from megaman.files import read_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
# The first bytes of torch's zip, and of pickle's protocols 2 to 5.
MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Bytes; Stable Diffusion's own are below 200,000, and all of it becomes Python objects.
MAX_HEADER = 25_000_000
MAX_DIMENSIONS = 8
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
ANOTHER_COPY = "Take another copy of it"
# Keys of a model's config.json that can make the libraries fetch or import something, and the
# values that are harmless.
UNSAFE_KEYS = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")
SAFE_VALUES = (None, False, "", "eager", "sdpa")


def refuse_pickle(name: str | Path, remedy: str) -> None:
    """Raise UserError if a file is named like a pickle or begins like one."""
    path = Path(os.path.expanduser(name))
    if path.name.lower().endswith(PICKLES) or (path.is_file() and _begins_like_a_pickle(path)):
        raise UserError(f"{name} is a pickle, which can run code", remedy)


def conversion(path: Path) -> str:
    """The remedy for a pickle of tensors: a command that converts it to safetensors."""
    target = path.with_suffix(".safetensors").name
    return (
        'Convert it in its folder: python -c "import torch; '
        "from safetensors.torch import save_file; "
        f"save_file(torch.load('{path.name}', weights_only=True), '{target}')\""
    )


def _begins_like_a_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    # The length of some safetensors headers has the same first bytes: 640 is b"\x80\x02".
    has_header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER
    return head.startswith(MAGIC) and not has_header


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's header before a library reads it; raises UserError as read_header
    does."""
    read_header(path)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file by tensor, and the offset of its data in bytes.

    Raises UserError unless the header has the length that it states, only known dtypes, and tensors
    that have as many bytes as their shapes need and together fill the file without gaps.
    """
    if not path.is_file():
        _refuse_missing(path)
    if _begins_like_a_pickle(path):
        raise UserError(
            f"{path} is a pickle whatever its name says, and can run code",
            "Take one in safetensors",
        )
    try:
        content, file_size = _read_header_bytes(path)
        text = content.decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        data_start = 8 + len(content)
        _check_header(header, file_size - data_start)
        return header, data_start
    except RecursionError:
        raise UserError(
            f"{path} cannot be loaded (its header is nested too deeply)", ANOTHER_COPY
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be loaded ({str(error)[:200]})", ANOTHER_COPY) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header by key; raises UserError as read_header does."""
    read_header(path)
    content, _ = _read_header_bytes(path)
    return json.loads(content).get("__metadata__", {})


def _refuse_missing(path: Path) -> NoReturn:
    """Raise UserError for a missing file; for a pickle in its place, with the conversion."""
    for pickle in (path.with_suffix(suffix) for suffix in PICKLES):
        if pickle.is_file():
            refuse_pickle(pickle, conversion(pickle))
    raise UserError(f"{path} is missing", "The folder is incomplete; name another one")


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"it ends within its header, at {size} bytes")
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        return file.read(length), size


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header has a key twice")
    return table


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"its header holds {word}")


def _check_header(header: Any, data_size: int) -> None:
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata is not text")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if end != data_size:
        raise ValueError(f"it has {data_size} bytes of data, and its header describes {end}")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; raises ValueError if its shape needs more or fewer."""
    short = name[:80]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short!r} has no dtype, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{short!r} has an unknown dtype")
    if (
        not _are_sizes(shape)
        or len(shape) > MAX_DIMENSIONS
        or not _are_sizes(offsets)
        or len(offsets) != 2
    ):
        raise ValueError(f"{short!r} has an impossible shape or offsets")
    begin, stop = offsets
    if stop - begin != DTYPE_BYTES[dtype] * math.prod(shape):
        raise ValueError(f"{short!r} does not have the bytes that its shape needs")
    return begin, stop


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in value
    )


def check_model_folder(folder: Path) -> None:
    """Check a model's folder before a library opens it.

    Raises UserError for a damaged safetensors file, a list of shards that leads elsewhere, and a
    configuration that could fetch or import something.
    """
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
    for path in sorted(folder.glob("*.index*.json")):
        _check_shards(path)
    config = read_json(folder / "config.json")
    unsafe = [key for key in UNSAFE_KEYS if _is_unsafe(config, key)]
    if (folder / "adapter_config.json").exists():
        unsafe.append("adapter_config.json")
    if unsafe:
        raise UserError(
            f"{folder} asks for code or weights from elsewhere ({unsafe[0]})",
            "Take a plain copy of it",
        )


def _is_unsafe(config: Any, key: str) -> bool:
    return isinstance(config, dict) and config.get(key) not in SAFE_VALUES


def _check_shards(path: Path) -> None:
    """Raise UserError unless a list of shards names only safetensors files in its own folder."""
    content = read_json(path)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else [None]
    present = {file.name for file in path.parent.glob("*.safetensors")}
    if not all(isinstance(name, str) and name in present for name in names):
        raise UserError(
            f"{path} names other files than the .safetensors files next to it", ANOTHER_COPY
        )
