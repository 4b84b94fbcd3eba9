"""Prompts files: plain lines, lines of kohya's scripts, lines of A1111."""

from __future__ import annotations

import codecs
import difflib
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from megaman.config.values import GUIDANCE, SEED, STEPS, InvalidValueError, side, text
from megaman.errors import UserError
from megaman.hub import PROJECT
from megaman.models import prompt_weights

log = logging.getLogger(__name__)

BUILT_IN = PROJECT / "prompts.txt"
PROMPTS_FILE = "--prompts_file"
MAX_BYTES = 4_000_000  # tens of thousands of prompts


@dataclass(frozen=True)
class PromptSettings:
    """How the images of a prompt are sampled; height and width are in pixels."""

    negative_prompt: str
    width: int
    height: int
    seed: int
    guidance_scale: float
    num_inference_steps: int


@dataclass(frozen=True)
class Prompt:
    """A prompt with its own settings; None leaves a setting to the command line."""

    text: str
    negative_prompt: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None

    def settings(self, defaults: PromptSettings) -> PromptSettings:
        """The prompt's own settings, with the defaults for those that it leaves open."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        del own["text"]
        return replace(defaults, **own)


def _text(value: str) -> str:
    return " ".join(text(value).split())


def _seed(value: str) -> int | None:
    return None if value == "-1" else SEED(value)  # in A1111 and kohya's scripts: any seed


_NEGATIVE = ("negative_prompt", _text)
_WIDTH, _HEIGHT = ("width", side), ("height", side)
_GUIDANCE = ("guidance_scale", GUIDANCE)
_STEPS = ("num_inference_steps", STEPS)
# The field and the type of each option, under A1111's name and under kohya's.
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prompt": ("text", _text),
    "negative_prompt": _NEGATIVE,
    "n": _NEGATIVE,
    "width": _WIDTH,
    "w": _WIDTH,
    "height": _HEIGHT,
    "h": _HEIGHT,
    "seed": ("seed", _seed),
    "d": ("seed", _seed),
    "cfg_scale": _GUIDANCE,
    "l": _GUIDANCE,
    "steps": _STEPS,
    "s": _STEPS,
}
# Options that mean something to A1111 and to kohya's scripts only. A line is used without them.
IGNORED_OPTIONS = {
    "sd_model", "outpath_samples", "outpath_grids", "prompt_for_display", "styles", "subseed",
    "subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "sampler_index",
    "sampler_name", "batch_size", "n_iter", "restore_faces", "tiling", "do_not_save_samples",
    "do_not_save_grid", "ow", "oh", "nw", "nh", "ct", "cl", "t", "nl", "am", "c", "f", "g", "i",
    "ss", "cn", "glt", "glr", "gle", "gls", "glsn", "glus", "dsd1", "dst1", "dsd2", "dst2", "dsr",
}  # fmt: skip
_NAMES = "|".join(sorted({*OPTIONS, *IGNORED_OPTIONS}))
# Editors make one long dash of two hyphens, and some a hyphen that does not break.
CORRECTED_DASHES = re.compile(
    rf"(^|\s)(?:[\u2010-\u2015\u2212\ufe58\uff0d]{{1,2}}|-[\u2010-\u2015])"
    rf"({_NAMES})(?=\s|$)",
    re.IGNORECASE,
)
OPTION = re.compile(r"--(?=[A-Za-z])")  # dashes alone, as in "a robot -- blue", are text


def load_prompts(
    typed: Sequence[str] | None,
    file: str | None,
    negative_prompt: str | None = None,
) -> list[Prompt]:
    """These texts, or else the prompts of a file, or else the ten that come with the project.

    Logged are lines that are skipped, LoRA tags, which are ignored, and syntax that is not
    understood, also in the negative prompt of all.
    """
    if typed:
        prompts = [Prompt(text) for text in typed]
    else:
        prompts, warnings = read_prompts(BUILT_IN if file is None else Path(file))
        for warning in warnings:
            log.info(warning)
    log_syntax(prompts, negative_prompt)
    return prompts


def log_syntax(prompts: Sequence[Prompt], negative_prompt: str | None = None) -> None:
    """Log what is not understood in prompts and in the negative prompt of all: LoRA tags, which are
    ignored, and syntax of other programs."""
    tags = [tag for prompt in prompts for tag in prompt_weights.tags(prompt.text)]
    if tags:
        log.info(f"{', '.join(dict.fromkeys(tags))} in a prompt ignored: name LoRAs in --lora_path")
    log_unsupported([negative_prompt or "", *chain.from_iterable(map(_texts, prompts))])


def _texts(prompt: Prompt) -> tuple[str, str]:
    return prompt.text, prompt.negative_prompt or ""


def log_unsupported(texts: Iterable[str]) -> None:
    """Log a line for each kind of syntax that other programs understand in a prompt."""
    examples: dict[str, str] = {}
    for prompt in texts:
        examples = {**prompt_weights.unsupported(prompt), **examples}
    for kind, example in examples.items():
        log.info(f"{example[:100]} in a prompt: {kind} is not supported, it is read as words")


def read_prompts(path: Path, flag: str = PROMPTS_FILE) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, in order, and a warning for each line that is skipped or used in part.

    Blank lines and lines that begin with # are comments. A line is a plain prompt; or a prompt
    followed by kohya's options (a cat --n low quality --w 512 --h 768 --d 1 --l 7.5 --s 28); or
    A1111's options, quoted as in a shell (--prompt "a cat" --negative_prompt "low quality"
    --seed 1 --steps 20 --cfg_scale 7 --width 512 --height 768). A line with an unknown option or
    a bad value is skipped. Options that only those programs understand, such as --sampler_name,
    are ignored.

    The encoding is UTF-8, or UTF-16 with a byte order mark. No prompt contains a line break or a
    control character. Raises UserError if the file is missing, is not text, is too large or has
    no valid line.
    """
    prompts, warnings = [], []
    # Not splitlines, which would split at characters that word processors put into a line.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _read_text(path, flag)), start=1):
        line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line).split())
        if not line or line.startswith("#"):
            continue
        typed = line
        line = _with_hyphens(line)
        if line != typed:
            warnings.append(f"line {number}: its long dashes are read as --")
        try:
            prompt, ignored = _parse(line)
        except InvalidValueError as error:
            warnings.append(f"line {number}: {str(error)[:300]}; the line is skipped")
            continue
        prompts.append(prompt)
        if ignored:
            warnings.append(f"line {number}: {', '.join(ignored)} ignored: no use here")
    if not prompts:
        raise _no_prompts(f"{flag} {path}", warnings)
    return prompts, [f"{path} {warning}" for warning in warnings]


def _no_prompts(file: str, warnings: list[str]) -> UserError:
    if not warnings:
        remedy = "Write one prompt a line; lines that begin with # are comments"
        return UserError(f"{file} has no prompt", remedy)
    more = f" (and {len(warnings) - 1} more like it)" if len(warnings) > 1 else ""
    return UserError(f"{file} has no valid line: {warnings[0]}{more}")


def _with_hyphens(line: str) -> str:
    """The line with -- for the dashes that editors put in its place in front of an option.

    In A1111's kind of line the curly quotation marks become straight ones, too.
    """
    corrected = CORRECTED_DASHES.sub(r"\1--\2", line)
    if corrected != line and OPTION.match(corrected):
        corrected = re.sub("[\u201c-\u201f]", '"', corrected)
    return corrected


def _parse(line: str) -> tuple[Prompt, list[str]]:
    """A line's prompt, and those of its options that are ignored; raises InvalidValueError."""
    fields: dict[str, Any] = {}
    ignored = []
    options = _a1111_options(line) if OPTION.match(line) else _kohya_options(line)
    for name, value in options:
        if name in IGNORED_OPTIONS:
            ignored.append(f"--{name}")
            continue
        if name not in OPTIONS:
            raise InvalidValueError(_unknown(name))
        if value is None:
            raise InvalidValueError(f"--{name} has no value")
        field, parse = OPTIONS[name]
        try:
            fields[field] = parse(value)
        except InvalidValueError as error:
            raise InvalidValueError(f"--{name} {error}") from None
    if not fields.get("text"):
        raise InvalidValueError("it has no prompt")
    return Prompt(**fields), ignored


def _kohya_options(line: str) -> Iterator[tuple[str, str | None]]:
    """The prompt, then each option with its value, as kohya's gen_img.py splits a line: in any
    case, without quotes."""
    prompt, *parts = re.split(" " + OPTION.pattern, line)
    yield "prompt", prompt
    for part in parts:
        name, _, value = part.partition(" ")
        if name.lower() == "prompt":
            raise InvalidValueError("--prompt follows a text: begin the line with it")
        yield name.lower(), value or None


def _a1111_options(line: str) -> Iterator[tuple[str, str | None]]:
    """Each option with its value, as A1111's "Prompts from file or textbox" reads them: a value
    needs no quotes."""
    try:
        words = shlex.split(line)
    except ValueError:
        remedy = 'put the text in "...", with \\" for a quote in it'
        raise InvalidValueError(
            f"a quote is not closed, or a \\ is the last character: {remedy}"
        ) from None
    options: list[list[str]] = []
    for word in words:
        if OPTION.match(word):
            options.append([word[2:].lower()])
        else:
            options[-1].append(word)
    for name, *values in options:
        yield name, " ".join(values) if values else None


def _unknown(name: str) -> str:
    remedy = "remove it, or put a space after the dashes if they are text"
    if near := difflib.get_close_matches(name[:100], OPTIONS, n=1, cutoff=0.7):
        remedy = f"did you mean --{near[0]}"
    return f"--{name[:60]} is not an option of a prompt: {remedy}"


def _read_text(path: Path, flag: str) -> str:
    def refusal(reason: str, remedy: str) -> UserError:
        return UserError(f"{flag} {path} {reason}", remedy)

    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise refusal("is missing", "Name a text file with one prompt a line") from None
    except OSError as error:
        raise refusal(f"cannot be read ({error.strerror})", "Name a text file") from None
    if len(content) > MAX_BYTES:
        raise refusal(f"is larger than {MAX_BYTES:,} bytes", "Split it into several files")
    # Windows' editor calls UTF-16 "Unicode" and writes a byte order mark.
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        decoded = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise refusal("is not UTF-8 text", "Save it as UTF-8") from None
    if "\0" in decoded:
        raise refusal("is not text: it contains NUL characters", "Save it as UTF-8")
    return decoded
