"""A base's name and configurations, read without its weights and without importing torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megaman.errors import UserError
from megaman.files import read_json
from megaman.hub import ALIASES, DEFAULT_BASE, EMBEDDED_BASE, PROJECT, is_base

# The models of a Stable Diffusion, and the stems of their weight files.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
BASE_REMEDY = (
    "Name a folder in diffusers' layout or a .safetensors file (--pretrained_model_name in "
    "training, --base_model in generation), or try the embedded base with --demo"
)
SUFFIX = ".safetensors"  # of a base in a single file
# Stable Diffusion 1.5's configurations and vocabulary.
SD15 = Path(__file__).resolve().parent / "sd15"


def resolve_name(name: str) -> str:
    """The name by which a base can be found from anywhere, to be stored in files.

    It is the hub's current name, a path relative to this project, or an absolute path.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        path = path.resolve()
    elif path.is_file():
        path = path.parent.resolve() / path.name  # the hub's cache links to files without a suffix
    else:
        return ALIASES.get(name, name)
    return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else str(path)


def settings_name(name: str) -> str:
    """The name under which config.bases has what suits a base: resolve_name, but demo/base for a
    copy of the embedded base in any folder, which has the same UNet and VAE."""
    resolved = resolve_name(name)
    if resolved == EMBEDDED_BASE or not os.path.isdir(resolved):
        return resolved
    try:
        (own, _), (embedded, _) = read_configs(resolved), read_configs(EMBEDDED_BASE)
        is_copy = all(_values(own[part]) == _values(embedded[part]) for part in ("unet", "vae"))
    except (UserError, OSError):  # loading the base reports it better
        return resolved
    return EMBEDDED_BASE if is_copy else resolved


def _values(config: Any) -> dict[str, Any] | None:
    """A configuration without the notes of the library that wrote it; None if it is none."""
    if not isinstance(config, dict):
        return None
    return {key: value for key, value in config.items() if not key.startswith("_")}


def alias_notice(name: str) -> str | None:
    """A line about a base that moved to another name on the hub; None for other names."""
    if name not in ALIASES:
        return None
    return f"{name} has left the hub; the same weights are at {resolve_name(name)}"


def is_single_file(path: str | Path) -> bool:
    """Whether a path, which need not exist, has the suffix of a base in a single file."""
    return str(path).lower().endswith(SUFFIX)


def read_configs(name: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The configurations of a base's UNet, VAE and text encoder by part, and a remark or "".

    name is a folder, a single file or a name on the hub. Stable Diffusion 1.5's configurations
    stand in for those of single files, which have none, and of a base on the hub that has not been
    downloaded, as the remark says. No weights are read. Raises UserError for a folder without a
    part's config.json, and for a name that can be none of these.
    """
    paths = (Path(os.path.expanduser(name)), PROJECT / name)
    for folder in filter(Path.is_dir, paths):
        return {part: read_json(folder / part / "config.json") for part in WEIGHTS}, ""
    exists = any(path.is_file() for path in paths)
    if not is_base(name) or (is_single_file(name) and not exists):
        raise UserError(
            f"The base {name} is neither on this machine nor a name on the hub", BASE_REMEDY
        )
    sd15 = {part: read_json(SD15 / f"{part}.json") for part in WEIGHTS}
    if exists or resolve_name(name) == resolve_name(DEFAULT_BASE):
        return sd15, ""
    cached = _cached_configs(name)
    if cached:
        return {part: read_json(path) for part, path in cached.items()}, ""
    return sd15, f"{name} is not on this machine: planned as Stable Diffusion 1.5"


def _cached_configs(name: str) -> dict[str, Path]:
    """The config.json of each part in the hub's cache; empty unless all are there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = {part: try_to_load_from_cache(name, f"{part}/config.json") for part in WEIGHTS}
    except ValueError:  # not a name on the hub; loading the base reports it
        return {}
    paths = {part: Path(path) for part, path in cached.items() if isinstance(path, str)}
    return paths if len(paths) == len(WEIGHTS) else {}


def unet_width(name: str) -> int:
    """Channels of the first block of a base's UNet, by read_configs; 0 if they are unknown."""
    unknown = (UserError, OSError, LookupError, TypeError, ValueError, OverflowError)
    try:
        return int(read_configs(name)[0]["unet"]["block_out_channels"][0])
    except unknown:  # loading the base reports it better
        return 0
