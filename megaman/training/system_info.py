"""--system_info: versions, device, memory, folders and what is wrong with them, on one screen; the
text for a bug report. Nothing here raises, and broken packages are imported elsewhere."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import plural, summarize_error
from megaman.threads import COUNT_VARIABLES, usable_cpus
from megaman.training.installation import (
    OPTIONAL,
    Installation,
    Problem,
    find_problems,
    inspect_installation,
    release,
)
from megaman.version import VERSION

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig

LABEL = 11  # characters of a label, as in the lines before a run
WIDTH = 100
GB = 2**30
LOW_DISK = 5 * GB  # Stable Diffusion 1.5 and its outputs
UNKNOWN = "unknown"


def system_info(config: TrainConfig) -> list[str]:
    """The report as lines, without the name of the user's home folder."""
    installation = inspect_installation()
    folders, problems = _folders(config), find_problems(installation)
    lines = [
        f"Mega Man LoRA {VERSION}",
        *_labeled("system", _attempt(_system)),
        *_labeled("python", _attempt(_python)),
        *_labeled("packages", _packages(installation)),
        *_labeled("processor", _attempt(lambda: _processor(installation))),
        *_labeled("memory", _attempt(_memory)),
        *_labeled("device", _device(installation)),
        *_labeled("attention", _attention(installation)),
    ]
    for flag, folder in folders.items():
        text, problem = inspect_folder(flag, folder)
        lines += _labeled("folder", text)
        problems += [problem] if problem else []
    for problem in problems:
        lines += _labeled("problem", problem.what)
        lines += _labeled("", f"remedy: {problem.remedy}")
    if not problems:
        lines += _labeled("problems", "none found")
    return [_without_home(line) for line in lines]


def inspect_folder(flag: str, folder: Path | None) -> tuple[str, Problem | None]:
    """A line on a folder that a run writes, named by its flag or variable, and what is wrong."""
    if folder is None:
        text = f"{flag}: there is no home folder, so nothing is kept"
        return text, Problem(text, f"name a folder with {flag}")
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        text = f"{flag} {folder}: cannot be written ({summarize_error(error)})"
        return text, Problem(text, f"name another folder with {flag}, or take its ownership")
    text = f"{flag} {folder}: can be written, {free / GB:.1f} GB free"
    if free < LOW_DISK:
        remedy = f"free some space, or name a folder on another disk with {flag}"
        return text, Problem(f"only {free / GB:.1f} GB free in {folder}", remedy)
    return text, None


def _folders(config: TrainConfig) -> dict[str, Path | None]:
    output = config.output
    return {
        "--cache_dir": config.cache.path(),
        "HF_HOME": _hub_home(),
        "--output_dir": Path(output.output_dir).absolute(),
        "--logging_dir": Path(output.logging_dir).absolute(),
    }


def _hub_home() -> Path | None:
    """The folder of the hub's client, by its own rule."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    expanded = os.path.expanduser(os.path.expandvars(home))
    return None if expanded.startswith("~") else Path(expanded)


def _labeled(label: str, text: str) -> list[str]:
    """A text under a label, wrapped to the width of the screen; commands and paths stay whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label.ljust(LABEL),
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _attempt(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except Exception as error:  # a report on a broken system must not break with it
        return f"{UNKNOWN} ({summarize_error(error)})"


def _system() -> str:
    name = platform.platform(terse=True)
    with suppress(OSError, KeyError):
        name = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    return f"{name}, {platform.machine()}; text in {sys.getfilesystemencoding()}"


def _python() -> str:
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    if os.environ.get("CONDA_DEFAULT_ENV"):
        kind = f"conda environment {os.environ['CONDA_DEFAULT_ENV']}"
    return f"{platform.python_version()}, {kind}: {sys.executable}"


def _packages(installation: Installation) -> str:
    words = []
    for package in installation.packages:
        if package.name in OPTIONAL and not package.installed:
            continue
        is_newer = package.required and release(package.installed) > release(package.required)
        remark = f" (tested: {package.required})" if is_newer else ""
        words.append(f"{package.name} {package.installed or 'missing'}{remark}")
    return ", ".join(words)


def _processor(installation: Installation) -> str:
    threads = installation.torch.get("threads")
    words = [_processor_name(), f"{plural(usable_cpus(), 'CPU')} for this process"]
    if threads:
        words.append(f"torch uses {plural(threads, 'thread')} by default")
    words += [f"{name}={os.environ[name]}" for name in COUNT_VARIABLES if name in os.environ]
    return "; ".join(words)


def _processor_name() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^model name\s*: (.+)$", text, flags=re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine() or UNKNOWN


def _memory() -> str:
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    free, total = memory.available / GB, memory.total / GB
    return f"{free:.1f} of {total:.1f} GB free; {swap.total / GB:.1f} GB swap"


def _device(installation: Installation) -> str:
    torch, gpus = installation.torch, installation.gpus
    driver = f"; driver: {' | '.join(gpus.lines)}" if gpus.lines else ""
    if not torch:
        return f"{UNKNOWN}, torch cannot be imported{driver}"
    if "gpu" in torch:
        capability = ".".join(map(str, torch["capability"]))
        memory = f"{torch['free'] / GB:.1f} of {torch['total'] / GB:.1f} GB free"
        platform_name = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}"
        return f"cuda: {torch['gpu']}, {memory}, capability {capability}; {platform_name}{driver}"
    return f"{'mps' if torch['mps'] else 'cpu'}{driver}"


def _attention(installation: Installation) -> str:
    version, error = installation.version("xformers"), installation.error("xformers")
    if not version:
        return "torch's own (sdpa); xformers is not installed"
    return f"torch's own (sdpa); xformers {version} {'does not work' if error else 'works'}"


def _without_home(line: str) -> str:
    home = os.path.expanduser("~")
    return line.replace(home, "~") if len(home) > 1 else line
