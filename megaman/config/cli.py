"""The parser of both scripts, built from config dataclasses.

A config is a frozen dataclass of groups, and each group a frozen dataclass whose fields are flags:

    lora_rank: int = flag(4, "rank of the LoRA's matrices", number(int, 1, 1024), resume=True)

All errors of a command line are reported together.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import wraps
from itertools import chain
from typing import Any, NoReturn, TypedDict, TypeVar, Unpack, cast, get_type_hints

from megaman.config.foreign_flags import remedy_of
from megaman.config.values import InvalidValueError, choice, quote
from megaman.errors import WRONG_USAGE
from megaman.version import VERSION

Config = TypeVar("Config")
METAVARS = {"int": "N", "float": "X", "str": "TEXT"}  # by the type of the field


class FlagOptions(TypedDict, total=False):
    """The optional properties of a flag."""

    choices: Sequence[str]
    nargs: str
    metavar: str
    common: bool  # shown by --help
    resume: bool  # a resumed run must have the same value


@dataclass(frozen=True)
class Flag:
    """The properties of a flag; without a type it takes no value and is a switch."""

    help: str
    type: Callable[[str], Any] | None
    choices: Sequence[str] | None = None
    nargs: str | None = None
    metavar: str | None = None
    common: bool = False
    resume: bool = False


def flag(
    default: Any,
    help: str,
    type: Callable[[str], Any] | None = None,
    **options: Unpack[FlagOptions],
) -> Any:
    """A field of a config group; the flag has the field's name."""
    if "choices" in options:
        type = choice(*options["choices"])
    return field(default=frozen(default), metadata={"flag": Flag(help, type, **options)})


def groups_of(config_type: type) -> dict[str, type]:
    """The groups of a config by name."""
    hints = get_type_hints(config_type)
    return {name: cast(type, kind) for name, kind in hints.items() if is_dataclass(kind)}


def flags_of(config_type: type) -> dict[str, Field]:
    """The fields of all groups by name, which are the flags' names."""
    all_fields = [fields(group) for group in groups_of(config_type).values()]
    return {config_field.name: config_field for config_field in chain.from_iterable(all_fields)}


def fill(config_type: type[Config], values: Mapping[str, Any], explicit: Iterable[str]) -> Config:
    """A config from the value of every flag and the names of the flags that were typed."""
    groups: dict[str, Any] = {}
    for name, group in groups_of(config_type).items():
        flags = [config_field.name for config_field in fields(group)]
        groups[name] = group(**{flag: frozen(values[flag]) for flag in flags})
    return cast(Any, config_type)(**groups, explicit=frozenset(explicit))


def settings_of(config: Any) -> dict[str, Any]:
    """The value of every flag, as JSON holds it."""
    settings: dict[str, Any] = {}
    for name in groups_of(type(config)):
        group = getattr(config, name)
        settings |= {flag.name: _as_json(getattr(group, flag.name)) for flag in fields(group)}
    return settings


def frozen(value: Any) -> Any:
    """A value as a config holds it."""
    return tuple(value) if isinstance(value, list) else value


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that collects errors and suggests the nearest flag for a mistyped one.

    Its flags are the fields of a config's groups, whose docstrings are the headings. order may name
    all flags in another order than that of the fields.
    """

    def __init__(
        self,
        config_type: type,
        prog: str,
        description: str,
        examples: Sequence[str],
        order: Sequence[str] = (),
    ):
        epilog = "\n  ".join(["--help_all shows every flag.\n\nexamples:", *examples])
        super().__init__(
            prog=prog,
            usage="python %(prog)s [--FLAG [VALUE ...]] ...",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--help_all", action=_HelpAll, help="show every flag and exit")
        version = f"Mega Man LoRA {VERSION}"
        self.add_argument(
            "--version", action="version", version=version, help="show the version and exit"
        )
        self._config_type = config_type
        sections: dict[str, argparse._ArgumentGroup] = {}
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
        positions = {name: place for place, name in enumerate(flags_of(self._config_type), start=1)}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [action for action in group._group_actions if is_shown(action.dest)]
            actions.sort(key=lambda action: positions.get(action.dest, 0))
            formatter.start_section(group.title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The values of the flags that were typed, by name, and a line for each error.

        argparse stops at the first error, so every flag is parsed alone, with the words that belong
        to it. The last of a repeated flag wins, as with argparse.
        """
        values: dict[str, Any] = {}
        errors: list[str] = []
        for flag, *words in self._split(argv):
            action = self._option_string_actions.get(flag.split("=")[0])
            if action is None:
                errors.append(self._unknown(flag, words))
            elif flag.partition("=")[2] == "--":  # argparse drops the dashes: an empty list
                errors.append(f"{flag}: '--' is no value")
            else:
                errors += self._read_flag(action, [flag, *words], values)
        return values, errors

    def _read_flag(
        self, action: argparse.Action, words: list[str], values: dict[str, Any]
    ) -> list[str]:
        """Put the value of one flag into values, and return what is wrong with it."""
        # Else argparse would parse the defaults of all other flags as well.
        others = argparse.Namespace(**dict.fromkeys(flags_of(self._config_type)))
        try:
            parsed, stray = self.parse_known_args(words, others)
        except argparse.ArgumentError as error:
            return [f"{error.argument_name}: {error.message}"]
        values[action.dest] = getattr(parsed, action.dest)
        if not stray:
            return []
        quotes = "put quotes around a value with spaces"
        remedy = "it takes none" if action.nargs == 0 else quotes
        flag = action.option_strings[-1]
        return [f"{flag}: {quote(' '.join(stray))} is one value too many: {remedy}"]

    def _split(self, argv: Sequence[str]) -> list[list[str]]:
        """The command line split before each flag; words before the first follow an empty one."""
        parts: list[list[str]] = []
        for word in argv:
            is_known = word.split("=")[0] in self._option_string_actions
            if is_known or re.match(r"--\S*$|-[a-zA-Z]\S*$", word):
                parts.append([word])
            elif parts:
                parts[-1].append(word)
            else:
                parts.append(["", word])
        return parts

    def _unknown(self, word: str, values: Sequence[str]) -> str:
        if not word:
            return f"{quote(' '.join(values))} belongs to no flag"
        flag = word.split("=")[0]
        names = [known[2:] for known in self._option_string_actions if known.startswith("--")]
        return f"{flag[:100]} {unknown_flag(flag.strip('-'), names, prefix='--')}"

    def refuse(self, errors: Iterable[str]) -> NoReturn:
        """Print each error as a line and exit with the code for wrong usage."""
        lines = [f"error: {' '.join(error.split())[:400]}" for error in dict.fromkeys(errors)]
        print("\n".join(lines) + f". See {self.prog} --help", file=sys.stderr)
        raise SystemExit(WRONG_USAGE)


def unknown_flag(name: str, flags: Collection[str], prefix: str = "") -> str:
    """What is wrong with a name that is none of the flags, and what to write instead if known."""
    if remedy := remedy_of(name, flags):
        return f"is another program's flag: {remedy}"
    return f"is not a flag{nearest(name, flags, prefix)}"


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """ ", did you mean NAME" for the name next to a mistyped one, or nothing if none is near."""
    names = list(names)
    near = [known for known in names if len(name) > 2 and known.startswith(name)]
    near += difflib.get_close_matches(name[:100], names, n=1, cutoff=0.7)
    return f", did you mean {prefix}{near[0]}" if near else ""


def _add(section: argparse._ArgumentGroup, config_field: Field) -> None:
    """Add the flag of a field to a section."""
    flag: Flag = config_field.metadata["flag"]
    option = f"--{config_field.name}"
    if flag.type is None:
        section.add_argument(option, action="store_true", help=flag.help)
        return
    metavar = flag.metavar
    if metavar is None and not flag.choices:
        metavar = METAVARS[str(config_field.type).partition(" ")[0]]
    # An empty default is not shown.
    default = None if config_field.default == "" else _as_json(config_field.default)
    section.add_argument(
        option,
        type=_argparse_type(flag.type),
        default=default,
        choices=flag.choices,
        nargs=flag.nargs,
        metavar=metavar,
        help=flag.help,
    )


def _argparse_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The parser of a value for argparse, which passes on the text of its own error alone."""

    @wraps(parse)
    def parse_word(word: str) -> Any:
        try:
            return parse(word)
        except InvalidValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_word


class _HelpAll(argparse.Action):
    """Prints every flag and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(
            option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help
        )

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        parser._print_message(parser.format_help_all(), sys.stdout)
        raise SystemExit(0)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the defaults, except None and False."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=29)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


def resume_command(argv: list[str]) -> list[str]:
    """The arguments that resume the run of argv."""
    words = [
        word
        for word in argv
        if word != "--overwrite_output" and not word.startswith("--resume_from_checkpoint=")
    ]
    if "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        del words[place : place + 2]
    return [*words, "--resume_from_checkpoint", "latest"]
