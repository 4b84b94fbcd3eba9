"""What a base's configurations say, read without its weights and without importing torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megaman.errors import UserError
from megaman.files import read_json
from megaman.hub import ALIASES, DEFAULT_BASE, PROJECT, is_base

# The models of a Stable Diffusion, and the stems of their weights' files.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
WAYS_ON = "Name a local folder in diffusers' layout or a .safetensors file, or try the embedded base with --demo"
SUFFIX = ".safetensors"  # of a base in a single file
SD15 = (
    Path(__file__).resolve().parent / "sd15"
)  # Stable Diffusion 1.5's configurations and vocabulary


def resolve_name(name: str) -> str:
    """The name to find and to note the base under, from wherever it is read again: the hub's
    present one, the place within this project, or a whole path."""
    path = Path(os.path.expanduser(name))
    if not path.is_dir() and not path.is_file():
        return ALIASES.get(name, name)
    path = (
        path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    )  # the hub's cache links to bare hashes
    return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else str(path)


def alias_notice(name: str) -> str | None:
    """What to say of a base that is taken from another name than the one asked for; None where it
    is not."""
    return (
        f"{name} has left the hub; the same weights are at {resolve_name(name)}"
        if name in ALIASES
        else None
    )


def is_single_file(path: str | Path) -> bool:
    """Whether a path is named like a base in a single file; it need not be there."""
    return str(path).lower().endswith(SUFFIX)


def read_configs(name: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The configurations of a base's UNet, VAE and text encoder, by part, and a remark where they
    are guessed.

    name is a folder, a single file or a name on the hub. Of the hub only what was downloaded before
    is read; Stable Diffusion 1.5's configuration stands in for the rest, as for single files, which
    have none. No weights are read. Raises UserError for a folder that lacks a part's config.json,
    and for a name that can be none of them.
    """
    places = (Path(os.path.expanduser(name)), PROJECT / name)
    for folder in filter(Path.is_dir, places):
        return {part: read_json(folder / part / "config.json") for part in WEIGHTS}, ""
    one_file = any(map(Path.is_file, places))
    if not is_base(name) or (is_single_file(name) and not one_file):
        raise UserError(
            f"The base {name} is nothing on this machine nor a name on the hub", WAYS_ON
        )
    sd15 = {part: read_json(SD15 / f"{part}.json") for part in WEIGHTS}
    if one_file or resolve_name(name) == resolve_name(DEFAULT_BASE):
        return sd15, ""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = [try_to_load_from_cache(name, f"{part}/config.json") for part in WEIGHTS]
    except ValueError:  # no name on the hub; loading says so
        cached = [None]
    if all(isinstance(path, str) for path in cached):
        return {part: read_json(Path(path)) for part, path in zip(WEIGHTS, cached, strict=True)}, ""
    return sd15, f"{name} is not on this machine: planned as Stable Diffusion 1.5"


def unet_width(name: str) -> int:
    """Channels of the first block of a base's UNet, by read_configs; 0 where they cannot be
    told."""
    try:
        return int(read_configs(name)[0]["unet"]["block_out_channels"][0])
    except (
        UserError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
    ):  # loading the base tells it better
        return 0
