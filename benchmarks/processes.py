"""Shared by the measurements: programs as processes of their own, medians, the machine.

Only the standard library is imported here: on Linux a process counts the memory of its parent as
its own peak, so the parent has to be small.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
TRAIN, DRAW = ROOT / "megaman_lora.py", ROOT / "generate_megaman.py"
TRAINING_BAR = "training"  # the description of megaman_lora.py's bar, which is updated once a step
LOGS_EVERY = 10  # steps, in megaman_lora.py; the mean of as many in a row includes one log
# Variables that make torch and oneDNN ignore AVX512 and bf16.
LESSER = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "native": {}}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # as Linux calls them


def stamped(bar: str, program: Path, *words: object, python: str = sys.executable) -> list[str]:
    """The command that runs a program under stamped.py, which records a progress bar's updates."""
    return [python, str(BENCHMARKS / "stamped.py"), bar, str(program), *map(str, words)]


def run(
    command: Sequence[str],
    cwd: Path,
    cpu: str = "native",
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a command offline and return its last JSON line with "seconds" and "began".

    began is the start by time.perf_counter, whose clock is shared by all processes. cpu is a key of
    LESSER; environment has more variables. stdout goes to cwd/output.txt, stderr to cwd/log.txt. If
    the command fails, the end of them is shown and this program exits.
    """
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
        **LESSER[cpu],
        **(environment or {}),
    }
    cwd.mkdir(parents=True, exist_ok=True)
    log = cwd / "log.txt"
    with log.open("wb") as messages:
        began = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=messages)
        seconds = time.perf_counter() - began
    output = done.stdout.decode("utf-8", "replace")
    (cwd / "output.txt").write_text(output, encoding="utf-8")
    if done.returncode:
        words = log.read_text(encoding="utf-8", errors="replace")
        sys.exit(f"{output}{words[-3000:]}\nfailed with {done.returncode}: {' '.join(command)}")
    return {**(last_json(output) or {}), "seconds": seconds, "began": began}


def last_json(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and mean, to four significant digits."""
    quartiles = [values[0]] * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": significant(quartiles[1]),
        "quartile_1": significant(quartiles[0]),
        "quartile_3": significant(quartiles[2]),
        "mean": significant(statistics.fmean(values)),
    }


@overload
def significant(value: float) -> float: ...


@overload
def significant(value: None) -> None: ...


def significant(value: float | None) -> float | None:
    """The value to four significant digits, None for none."""
    return None if value is None else float(f"{value:.4g}")


def median_of(results: Sequence[dict[str, Any]], name: str) -> float | None:
    """The median of one value over several runs; None if no run has it."""
    values = [result[name] for result in results if result.get(name) is not None]
    return significant(statistics.median(values)) if values else None


def machine(cpu: str = "native") -> dict[str, Any]:
    """What a result depends on: processor, instructions, cores, threads, torch."""
    name, flags = platform.processor() or platform.machine(), set()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = {
            key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
        }
        name, flags = pairs.get("model name", name), set(pairs.get("flags", "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": name,
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "as": cpu,
        "cores": cores,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
