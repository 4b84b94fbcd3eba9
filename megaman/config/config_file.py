"""--config FILE: flags from TOML, from JSON, or from the training_config.json that a run left."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

from megaman.config.cli import Flag, flags_of, unknown_flag
from megaman.config.foreign_flags import remedy_of
from megaman.config.values import InvalidValueError, quote

MAX_BYTES = 1_000_000  # no list of flags is longer
# What a run was asked to do with its folder is no part of what it trained.
NOT_REPEATED = {"config", "resume_from_checkpoint", "overwrite_output"}
KINDS = {bool: "true or false", str: "a text", int: "a number", float: "a number"}


class ConfigFileError(Exception):
    """What is wrong with a file of flags, or with one of its entries."""


@dataclass(frozen=True)
class FileFlags:
    """The flags of a file.

    values has them by name. explicit names those that count as typed; it is None for a
    training_config.json from before these were noted, whose values are those of all flags. errors
    has a line for each entry that cannot be used.
    """

    values: Mapping[str, Any]
    explicit: frozenset[str] | None
    errors: Sequence[str] = ()


def read_config_file(
    path: Path, config_type: type, other_script: str, other_config_type: type
) -> FileFlags:
    """The flags in a file, parsed as on the command line. Raises nothing: what is wrong with the
    file, or with an entry, is in errors."""
    try:
        content = _read(path)
        is_record = isinstance(content.get("settings"), dict)
        if is_record and "lora_rank" not in flags_of(config_type):
            raise ConfigFileError(
                "it describes a training run: it belongs to megaman_lora.py, here --lora_path "
                "names the LoRA that came of it"
            )
        entries, explicit = _recorded_entries(content) if is_record else (content, set(content))
    except ConfigFileError as error:
        return FileFlags({}, frozenset(), [f"--config {path}: {error}"])
    values: dict[str, Any] = {}
    errors = []
    flags, others = flags_of(config_type), flags_of(other_config_type)
    for name, value in entries.items():
        try:
            if name not in flags:
                raise ConfigFileError(_unknown(name, value, flags, other_script, others))
            if value is not None:  # JSON's null: not given
                values[name] = _parse(flags[name], value)
        except (ConfigFileError, InvalidValueError) as error:
            errors.append(f"--config {path}: {quote(name)[1:-1]}: {error}")
    typed = None if explicit is None else frozenset(explicit & values.keys())
    return FileFlags(values, typed, errors)


def merge(
    file_values: Mapping[str, Any],
    typed: Mapping[str, Any],
    exclusive: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """The file's flags and the typed ones, which win: also over what excludes them."""
    values = dict(file_values)
    for one, other in exclusive:
        if one in typed and other not in typed:
            values.pop(other, None)
        elif other in typed and one not in typed:
            values.pop(one, None)
    return {**values, **typed}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigFileError(f"cannot be read ({reason})") from None
    if len(data) > MAX_BYTES:
        raise ConfigFileError("is larger than 1 MB: no file of flags is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigFileError("is not UTF-8: save it in that encoding") from None
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "//", "/*"))
    try:
        return _read_json(text) if is_json else tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError(f"is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigFileError("is nested too deeply for a file of flags") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigFileError(str(error)) from None


def _read_json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        is_comment = line.strip().startswith(("//", "#", "/*", "*")) or _has_comment_at(error)
        if is_comment:
            remedy = "JSON has no comments: remove it, or write the file as TOML"
            raise ConfigFileError(f"line {error.lineno}: {remedy}") from None
        raise ConfigFileError(f"line {error.lineno} is not valid JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise ConfigFileError('holds no flags: write {"lora_rank": 8, ...}')
    return content


def _has_comment_at(error: json.JSONDecodeError) -> bool:
    """Whether a comment begins where JSON could not be read on."""
    return error.doc[error.pos :].lstrip().startswith(("//", "#", "/*"))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigFileError(f"{quote(repeated)} is there more than once: keep one")
    return content


def _recorded_entries(content: Mapping[str, Any]) -> tuple[dict[str, Any], set[str] | None]:
    """The settings to repeat out of a training_config.json, and the names of those that were typed.

    The seed is repeated even if it was random.
    """
    settings, explicit = content["settings"], content.get("explicit")
    if explicit is None:
        return {key: value for key, value in settings.items() if key not in NOT_REPEATED}, None
    if not isinstance(explicit, list) or not all(isinstance(name, str) for name in explicit):
        raise ConfigFileError("explicit is no list of flags")
    names = [name for name in explicit if name not in NOT_REPEATED]
    if missing := [name for name in names if name not in settings]:
        raise ConfigFileError(f"settings lacks {', '.join(map(quote, missing))}")
    values = {name: settings[name] for name in names}
    return {"seed": settings.get("seed"), **values}, set(names)


def _unknown(
    name: str,
    value: Any,
    flags: Mapping[str, Field],
    other_script: str,
    others: Mapping[str, Field],
) -> str:
    if name in others:
        return f"is a flag of {other_script}: remove it"
    if isinstance(value, dict) and remedy_of(name, flags) is None:
        return "is a table: move its flags to the top of the file, without the table's name"
    return unknown_flag(name, flags)


def _parse(config_field: Field, value: Any) -> Any:
    """The value of a flag from that in the file; raises InvalidValueError or ConfigFileError."""
    flag: Flag = config_field.metadata["flag"]
    if config_field.name == "config":
        raise ConfigFileError("a file of flags names no other, nor itself: remove it")
    if flag.type is None:
        if not isinstance(value, bool):
            raise ConfigFileError(f"is true or false, not {_kind(value)}")
        return value
    if flag.nargs:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ConfigFileError("the list is empty")
        return [flag.type(_word(item)) for item in values]
    takes_words = "tuple" in str(config_field.type)  # numbers between commas, on the command line
    if takes_words and isinstance(value, list):
        return flag.type(",".join(map(_word, value)))
    return flag.type(_word(value))


def _word(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigFileError(f"takes one value, not {_kind(value)}")
    return str(value)


def _kind(value: Any) -> str:
    """What a value of the file is, in words."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    return KINDS.get(type(value), "a date or a time")
