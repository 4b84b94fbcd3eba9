"""What may be opened at all: no pickles, which can run code, and no safetensors file whose header
lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megaman.errors import UserError
from megaman.files import read_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
MAGIC = (
    b"PK\x03\x04",
    *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)),
)  # torch's zip, and pickle itself
# bytes; Stable Diffusion's own are below 200,000, and all of it becomes Python objects
LONGEST_HEADER = 25_000_000
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
ANOTHER_COPY = "Take another copy of it"
# A model's configuration may name code and weights elsewhere, which the libraries would fetch or
# import.
FOREIGN = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")
PLAIN = (None, False, "", "eager", "sdpa")  # what they may say


def refuse_pickle(name: str | Path, remedy: str) -> None:
    """Raise UserError where a file is named like a pickle, or is one whatever its name says."""
    path = Path(os.path.expanduser(name))
    if path.name.lower().endswith(PICKLES) or (path.is_file() and _begins_like_a_pickle(path)):
        raise UserError(f"{name} is a pickle, which can run code", remedy)


def conversion(path: Path) -> str:
    """How to turn a pickle of tensors into safetensors."""
    target = path.with_suffix(".safetensors").name
    return (
        'Convert it in its folder: python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{path.name}', weights_only=True), '{target}')\""
    )


def _begins_like_a_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    # A header of 640 bytes begins like a pickle too; what follows tells them apart.
    return head.startswith(MAGIC) and (
        head[8:9] != b"{" or int.from_bytes(head[:8], "little") > LONGEST_HEADER
    )


def check_safetensors(path: Path) -> None:
    """Read a safetensors file's header before any library does; raises UserError where it is not
    sound."""
    read_header(path)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, by tensor, and where its numbers begin, in bytes; raises
    UserError where it is not sound.

    Sound is a header as long as it says, of known number formats, in which every tensor has the
    bytes that its shape asks for and all of them together fill the file.
    """
    if not path.is_file():
        for pickle in (path.with_suffix(suffix) for suffix in PICKLES):
            if pickle.is_file():
                refuse_pickle(pickle, conversion(pickle))
        raise UserError(f"{path} is missing", "The folder is not complete; name another one")
    if _begins_like_a_pickle(path):
        raise UserError(
            f"{path} is a pickle whatever its name says, and can run code",
            "Take one in safetensors",
        )
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"it ends within its header, at {size} bytes")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_number)
        _check_header(header, size - 8 - length)
        return header, 8 + length
    except RecursionError:
        raise UserError(
            f"{path} cannot be loaded (its header is nested too deep)", ANOTHER_COPY
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be loaded ({str(error)[:200]})", ANOTHER_COPY) from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header names something twice")
    return table


def _no_number(word: str) -> None:
    raise ValueError(f"its header holds {word}")


def _check_header(header: Any, data_size: int) -> None:
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata are not texts")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if end != data_size:
        raise ValueError(f"it has {data_size} bytes of numbers, and its header tells of {end}")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; raises ValueError where that is not what its shape asks
    for."""
    short = name[:80]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short!r} has no dtype, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{short!r} is of an unknown number format")
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{short!r} has an impossible shape or place")
    wanted = DTYPE_BYTES[dtype]
    for side in shape:
        wanted *= side
    begin, stop = offsets
    if stop - begin != wanted:
        raise ValueError(f"{short!r} has not the bytes that its shape asks for")
    return begin, stop


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in value
    )


def check_model_folder(folder: Path) -> None:
    """Check a model's folder before a library opens it: every safetensors file, and what its JSON
    files lead to.

    Raises UserError for a damaged file, a list of shards that leads elsewhere, and a configuration
    that would fetch or import something.
    """
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
    for path in sorted(folder.glob("*.index*.json")):
        content = read_json(path)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        names = list(shards.values()) if isinstance(shards, dict) else [None]
        there = {path.name for path in folder.glob("*.safetensors")}
        if not all(isinstance(name, str) and name in there for name in names):
            raise UserError(
                f"{path} names something else than the .safetensors files beside it", ANOTHER_COPY
            )
    config = read_json(folder / "config.json")
    found = [key for key in FOREIGN if isinstance(config, dict) and config.get(key) not in PLAIN]
    found += ["adapter_config.json"] if (folder / "adapter_config.json").exists() else []
    if found:
        raise UserError(
            f"{folder} asks for code or weights from elsewhere ({found[0]})",
            "Take a plain copy of it",
        )
