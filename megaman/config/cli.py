"""The parser of both scripts, made from config dataclasses; it reports all the mistakes of a
command line together.

A config is a frozen dataclass of groups, and each group a frozen dataclass whose fields are flags:

    lora_rank: int = flag(4, "rank of the LoRA's matrices", number(int, 1, 1024), common=True,
    resume=True)
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from itertools import chain
from typing import Any, NoReturn, TypeVar, get_type_hints

from megaman.config import samplers
from megaman.errors import WRONG_USAGE
from megaman.files import refused_by_windows, split_strength

WINDOWS = os.name == "nt"
STRONGEST = (
    10  # a LoRA at many times its trained strength draws noise; this leaves room to see that
)
Mistake = (
    argparse.ArgumentTypeError
)  # what the types below raise, for modules that know no argparse
Config = TypeVar("Config")
METAVARS = {"int": "N", "float": "X", "str": "TEXT"}  # by the type of the field


@dataclass(frozen=True)
class Flag:
    """What the parser has to know of a field; without a type the flag takes no value and turns
    something on."""

    help: str
    type: Callable[[str], Any] | None
    choices: Sequence[str] | None
    nargs: str | None
    metavar: str | None
    common: bool  # whether --help shows it
    resume: bool  # whether a resumed run has to share its value


def flag(
    default: Any,
    help: str,
    type: Callable[[str], Any] | None = None,
    *,
    choices: Sequence[str] | None = None,
    nargs: str | None = None,
    metavar: str | None = None,
    common: bool = False,
    resume: bool = False,
) -> Any:
    """Make a field of a config group; the flag has the field's name."""
    if choices:
        type = choice(*choices)
    return field(
        default=_frozen(default),
        metadata={"flag": Flag(help, type, choices, nargs, metavar, common, resume)},
    )


def groups_of(config_type: type) -> dict[str, type]:
    """The groups of a config by their names."""
    return {name: kind for name, kind in get_type_hints(config_type).items() if is_dataclass(kind)}


def flags_of(config_type: type) -> dict[str, Field]:
    """The fields of all groups by their names, which are the flags' names."""
    all_fields = [fields(group) for group in groups_of(config_type).values()]
    return {config_field.name: config_field for config_field in chain.from_iterable(all_fields)}


def fill(config_type: type[Config], values: Mapping[str, Any], explicit: Iterable[str]) -> Config:
    """Make a config from the value of every flag and the names of the flags that were typed."""
    groups = {}
    for name, group in groups_of(config_type).items():
        flags = [config_field.name for config_field in fields(group)]
        groups[name] = group(**{flag: _frozen(values[flag]) for flag in flags})
    return config_type(**groups, explicit=frozenset(explicit))


def settings_of(config: Any) -> dict[str, Any]:
    """The value of every flag, as JSON would hold it."""
    settings: dict[str, Any] = {}
    for name in groups_of(type(config)):
        group = getattr(config, name)
        settings |= {flag.name: _as_json(getattr(group, flag.name)) for flag in fields(group)}
    return settings


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that collects mistakes, with the nearest flag proposed for a mistyped one.

    Its flags are the fields of a config's groups, under headings that are the groups' docstrings;
    order names all of them where it is another than that of the fields.
    """

    def __init__(
        self,
        config_type: type,
        prog: str,
        description: str,
        examples: Sequence[str],
        order: Sequence[str] = (),
    ):
        more = "\n  ".join(["--help_all shows every flag.\n\nexamples:", *examples])
        super().__init__(
            prog=prog,
            usage="python %(prog)s [--FLAG [VALUE ...]] ...",
            description=description,
            epilog=more,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--help_all", action=_HelpAll, help="show every flag and exit")
        self._config_type = config_type
        sections = {}
        for group in groups_of(config_type).values():
            section = self.add_argument_group(group.__doc__)
            sections |= {config_field.name: section for config_field in fields(group)}
        flags = flags_of(config_type)
        for name in order or flags:
            _add(sections[name], flags[name])

    def defaults(self) -> dict[str, Any]:
        """The plain default of every flag."""
        return {
            name: config_field.default for name, config_field in flags_of(self._config_type).items()
        }

    def format_help(self) -> str:
        """The flags that most runs use, by group."""
        flags = flags_of(self._config_type)
        return self._format(lambda name: name not in flags or flags[name].metadata["flag"].common)

    def format_help_all(self) -> str:
        """Every flag, by group."""
        return self._format(lambda name: True)

    def _format(self, is_shown: Callable[[str], bool]) -> str:
        places = {name: place for place, name in enumerate(flags_of(self._config_type), start=1)}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            actions = [action for action in group._group_actions if is_shown(action.dest)]
            formatter.add_arguments(sorted(actions, key=lambda action: places.get(action.dest, 0)))
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The values that were given, under their flags' names, and a line for each mistake.

        argparse stops at the first mistake, so every flag is parsed alone, with the words that
        belong to it. The last of a repeated flag wins, as with argparse.
        """
        given: dict[str, Any] = {}
        mistakes: list[str] = []
        for flag, *words in self._parts(argv):
            action = self._option_string_actions.get(flag.split("=")[0])
            if action is None:
                mistakes.append(
                    self._unknown(flag) if flag else f"{_short(' '.join(words))} belongs to no flag"
                )
                continue
            if (
                flag.partition("=")[2] == "--"
            ):  # argparse drops the dashes and would hand on an empty list
                mistakes.append(f"{flag}: '--' is no value")
                continue
            try:
                values, stray = self.parse_known_args([flag, *words])
            except argparse.ArgumentError as error:
                mistakes.append(f"{error.argument_name}: {error.message}")
                continue
            flag = action.option_strings[-1]
            if stray:
                remedy = (
                    "it takes none"
                    if action.nargs == 0
                    else "put quotes around a value with spaces"
                )
                mistakes.append(
                    f"{flag}: {_short(' '.join(stray))} is one value too many: {remedy}"
                )
            given[action.dest] = getattr(values, action.dest)
        return given, mistakes

    def _parts(self, argv: Sequence[str]) -> list[list[str]]:
        """The command line cut before each flag; words that no flag stands before come behind an
        empty one."""
        parts: list[list[str]] = []
        for word in argv:
            if word.split("=")[0] in self._option_string_actions or re.match(
                r"--\S*$|-[a-zA-Z]\S*$", word
            ):
                parts.append([word])
            elif parts:
                parts[-1].append(word)
            else:
                parts.append(["", word])
        return parts

    def _unknown(self, word: str) -> str:
        flag = word.split("=")[0]
        name, names = (
            flag.strip("-"),
            [known[2:] for known in self._option_string_actions if known.startswith("--")],
        )
        near = [known for known in names if len(name) > 2 and known.startswith(name)]
        near += difflib.get_close_matches(name[:100], names, n=1, cutoff=0.7)
        return f"{flag[:100]} is not a flag" + (f", did you mean --{near[0]}" if near else "")

    def refuse(self, mistakes: Iterable[str]) -> NoReturn:
        """Write each mistake as a line and end with the exit code for wrong usage."""
        lines = [f"error: {' '.join(mistake.split())[:400]}" for mistake in dict.fromkeys(mistakes)]
        print("\n".join(lines) + f". See {self.prog} --help", file=sys.stderr)
        raise SystemExit(WRONG_USAGE)


def _add(section: argparse._ArgumentGroup, config_field: Field) -> None:
    """Give the section the flag of a field."""
    flag: Flag = config_field.metadata["flag"]
    option = f"--{config_field.name}"
    if flag.type is None:
        section.add_argument(option, action="store_true", help=flag.help)
        return
    metavar = flag.metavar or (
        None if flag.choices else METAVARS[str(config_field.type).partition(" ")[0]]
    )
    default = (
        None if config_field.default == "" else _as_json(config_field.default)
    )  # help has no empty default to show
    section.add_argument(
        option,
        type=flag.type,
        default=default,
        choices=flag.choices,
        nargs=flag.nargs,
        metavar=metavar,
        help=flag.help,
    )


class _HelpAll(argparse.Action):
    """Prints every flag and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(
            option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help
        )

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        parser._print_message(parser.format_help_all(), sys.stdout)
        parser.exit()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds defaults, but not if there is none to tell."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=29)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:  # 0 is worth telling
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


def _short(text: str) -> str:
    """A word of the command line as an error quotes it."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def number(
    kind: Callable[[str], Any], low: float, high: float, exclusive: bool = False
) -> Callable[[str], Any]:
    """Make a type: an int or float from low (itself excluded where exclusive) to high, never
    NaN."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{_short(text)} is not {wanted}") from None
        if not (low < value if exclusive else low <= value) or not value <= high:
            limits = f"{'above' if exclusive else 'at least'} {low}, at most {high}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is out of range: it must be {limits}")
        return value

    return parse


def choice(*words: str) -> Callable[[str], str]:
    """Make a type: one of some words; the nearest is proposed for a mistyped one."""

    def parse(text: str) -> str:
        if text in words:
            return text
        near = difflib.get_close_matches(text[:100].lower(), words, n=1)
        proposal = f", did you mean {near[0]}" if near else ""
        raise argparse.ArgumentTypeError(f"{_short(text)} is none of {', '.join(words)}{proposal}")

    return parse


def sampler(value: str) -> str:
    """The word for a sampler, whichever of its names is given."""
    if found := samplers.find(value):
        return found.name
    names = [
        name for known in samplers.SAMPLERS for name in (known.name, known.title, *known.others)
    ]
    near = difflib.get_close_matches(value[:100].lower(), names, n=1)
    proposal = f", did you mean {near[0]}" if near else ""
    known = ", ".join(each.name for each in samplers.SAMPLERS)
    raise argparse.ArgumentTypeError(f"{_short(value)} is none of {known}{proposal}")


def text(value: str) -> str:
    """A prompt; bytes that are no text arrive from the command line as lone surrogates, which no
    file can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            "the text is not valid UTF-8: save or type it anew"
        ) from None
    return value


def name(value: str) -> str:
    """A name that has to say something: an empty path would mean the folder one is in."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(
            "the name is empty" if not value.strip() else "no name can hold a NUL"
        )
    return text(value)


def lora(value: str) -> str:
    """NAME or NAME:STRENGTH; it stays one word, so that defaults and the command line show the
    same."""
    path, strength = split_strength(value)
    if abs(strength) > STRONGEST:
        raise argparse.ArgumentTypeError(
            f"a strength of {strength:g} is out of range: -{STRONGEST} to {STRONGEST}"
        )
    name(path)
    return text(value)


def folder(value: str) -> str:
    """A folder that is made where it is missing, with no name that Windows refuses if that is where
    we are."""
    if WINDOWS and (part := refused_by_windows(name(value))):
        raise argparse.ArgumentTypeError(
            f"Windows takes no folder of the name {_short(part)}: choose another"
        )
    return name(value)


def extension(value: str) -> str:
    """How caption files' names end, with the dot or without."""
    pictures = r"(.*\.)?(jpe?g|png|bmp|webp|gif|tiff?|avif|hei[cf])"
    if not re.fullmatch(r"\.?\w[\w.-]{0,30}", value, re.ASCII) or re.fullmatch(
        pictures, value.lower()
    ):
        raise argparse.ArgumentTypeError(f"{_short(value)} is no extension such as .txt")
    return f".{value.removeprefix('.')}"


def strengths(value: str) -> list[float]:
    """How strongly to apply a LoRA, one number or several with commas between them, in the order
    given."""
    return list(dict.fromkeys(number(float, -10, 10)(part) for part in value.split(",")))


def side(value: str) -> int:
    """Pixels of a side: whole cells of the latents."""
    pixels = number(int, 8, 8192)(value)
    if pixels % 8:
        near = max(8, round(pixels / 8) * 8)
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 8: take {near}")
    return pixels


# What one image may be drawn with, on the command line and in a prompts file alike.
SEED = number(int, 0, 2**63 - 1)
STEPS = number(int, 1, 999)
GUIDANCE = number(float, 0, 100)


def resume_command(argv: list[str]) -> list[str]:
    """The command line that goes on where this one was stopped."""
    words = [
        word
        for word in argv
        if word != "--overwrite_output" and not word.startswith("--resume_from_checkpoint=")
    ]
    if "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        del words[place : place + 2]
    return [*words, "--resume_from_checkpoint", "latest"]
