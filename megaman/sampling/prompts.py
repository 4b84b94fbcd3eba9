"""A prompts file as a list of prompts: plain lines, lines of kohya's scripts, lines of A1111."""

from __future__ import annotations

import codecs
import difflib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaman.config.values import GUIDANCE, SEED, STEPS, InvalidValueError, side, text
from megaman.errors import UserError
from megaman.hub import PROJECT

BUILT_IN = PROJECT / "prompts.txt"
LARGEST = 4_000_000  # bytes: tens of thousands of prompts, more than anybody draws at once


@dataclass(frozen=True)
class Prompt:
    """What to draw; None leaves a setting to the command line."""

    text: str
    negative: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None


def _text(value: str) -> str:
    return " ".join(text(value).split())


def _seed(value: str) -> int | None:
    return None if value == "-1" else SEED(value)  # A1111's and kohya's word for any seed


# An option's field and type, under A1111's name and under kohya's.
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prompt": ("text", _text),
    **dict.fromkeys(("negative_prompt", "n"), ("negative", _text)),
    **dict.fromkeys(("width", "w"), ("width", side)),
    **dict.fromkeys(("height", "h"), ("height", side)),
    **dict.fromkeys(("seed", "d"), ("seed", _seed)),
    **dict.fromkeys(("cfg_scale", "l"), ("guidance", GUIDANCE)),
    **dict.fromkeys(("steps", "s"), ("steps", STEPS)),
}
# Options that those programs know and that mean nothing for one prompt here: the line is worth
# drawing without them.
WITHOUT_MEANING = {
    *(
        "sd_model",
        "outpath_samples",
        "outpath_grids",
        "prompt_for_display",
        "styles",
        "subseed",
        "subseed_strength",
    ),
    *(
        "seed_resize_from_h",
        "seed_resize_from_w",
        "sampler_index",
        "sampler_name",
        "batch_size",
        "n_iter",
    ),
    *("restore_faces", "tiling", "do_not_save_samples", "do_not_save_grid"),
    *(
        "ow",
        "oh",
        "nw",
        "nh",
        "ct",
        "cl",
        "t",
        "nl",
        "am",
        "c",
        "f",
        "g",
        "i",
        "ss",
        "cn",
        "glt",
        "glr",
        "gle",
        "gls",
    ),
    *("glsn", "glus", "dsd1", "dst1", "dsd2", "dst2", "dsr"),
}
OPTION = re.compile(r"--(?=[A-Za-z])")  # dashes alone, as in "a robot -- blue", are text


def read_prompts(path: Path) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, in order, and a line for each of its lines that is bad or used in
    part.

    Blank lines and lines that begin with # are skipped. A line is a plain prompt; or one with
    kohya's options behind it (a cat --n low quality --w 512 --h 768 --d 1 --l 7.5 --s 28); or
    A1111's, which begins with an option and is quoted as in a shell (--prompt "a cat"
    --negative_prompt "low quality" --seed 1 --steps 20 --cfg_scale 7 --width 512 --height 768). A
    line with an unknown option or a bad value is left out. Options that only those programs can
    follow, such as --sampler_name, are left out of a line that is used.

    UTF-8, or UTF-16 where its mark says so. No prompt holds a line break or a control character.
    Raises UserError where the file is missing, is no text, is too large or holds no good line.
    """
    prompts, remarks = [], []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line).split())
        if not line or line.startswith("#"):
            continue
        try:
            prompt, unused = _parse(line)
        except InvalidValueError as mistake:
            remarks.append(f"line {number}: {str(mistake)[:300]}; the line is left out")
        else:
            prompts.append(prompt)
            if unused:
                remarks.append(
                    f"line {number}: {', '.join(unused)}: of no use here; the rest of the line is used"
                )
    if remarks and not prompts:
        more = f" (and {len(remarks) - 1} more like it)" if len(remarks) > 1 else ""
        raise UserError(f"--prompts_file {path} holds no good line: {remarks[0]}{more}")
    if not prompts:
        raise UserError(
            f"--prompts_file {path} holds no prompt",
            "Write one prompt a line; lines with # are comments",
        )
    return prompts, [f"{path} {remark}" for remark in remarks]


def _parse(line: str) -> tuple[Prompt, list[str]]:
    """A line's prompt, and those of its options that mean nothing here."""
    fields: dict[str, Any] = {}
    unused = []
    for name, value in _a1111_options(line) if OPTION.match(line) else _kohya_options(line):
        if name in WITHOUT_MEANING:
            unused.append(f"--{name}")
            continue
        if name not in OPTIONS:
            raise InvalidValueError(_unknown(name))
        if value is None:
            raise InvalidValueError(f"--{name} has no value")
        field, kind = OPTIONS[name]
        try:
            fields[field] = kind(value)
        except InvalidValueError as mistake:
            raise InvalidValueError(f"--{name} {mistake}") from None
    if not fields.get("text"):
        raise InvalidValueError("there is no prompt in it")
    return Prompt(**fields), unused


def _kohya_options(line: str) -> Iterator[tuple[str, str | None]]:
    """The text, then each option with its value, as kohya's gen_img.py cuts a line: in any case,
    with no quotes."""
    prompt, *parts = re.split(" " + OPTION.pattern, line)
    yield "prompt", prompt
    for part in parts:
        name, _, value = part.partition(" ")
        if name.lower() == "prompt":
            raise InvalidValueError("--prompt stands behind a text: begin the line with it")
        yield name.lower(), value or None


def _a1111_options(line: str) -> Iterator[tuple[str, str | None]]:
    """Each option with its value, as A1111's "Prompts from file or textbox" reads them: a text
    needs no quotes."""
    try:
        words = shlex.split(line)
    except ValueError:
        remedy = 'put the text in "...", with \\" for a quote in it'
        raise InvalidValueError(
            f"a quote is not closed, or a \\ stands at the end: {remedy}"
        ) from None
    parts: list[list[str]] = []
    for word in words:
        if OPTION.match(word):
            parts.append([word[2:].lower()])
        else:
            parts[-1].append(word)
    for name, *values in parts:
        yield name, " ".join(values) if values else None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name[:100], OPTIONS, n=1, cutoff=0.7)
    remedy = (
        f"did you mean --{near[0]}"
        if near
        else "take it out, or put a space behind the dashes if they are text"
    )
    return f"--{name[:60]} is no option of a prompt: {remedy}"


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(
            f"--prompts_file {path} is missing", "Name a text file with one prompt a line"
        ) from None
    except OSError as error:
        raise UserError(
            f"--prompts_file {path} cannot be read ({error.strerror})", "Name a text file"
        ) from None
    if len(content) > LARGEST:
        raise UserError(
            f"--prompts_file {path} is larger than {LARGEST:,} bytes", "Draw its prompts in parts"
        )
    wide = content.startswith(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    )  # what Windows' editor calls Unicode
    try:
        decoded = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--prompts_file {path} is not UTF-8 text", "Save it as UTF-8") from None
    if "\0" in decoded:
        raise UserError(
            f"--prompts_file {path} is no text: it holds NUL characters", "Save it as UTF-8"
        )
    return decoded
