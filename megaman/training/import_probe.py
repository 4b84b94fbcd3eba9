"""Import packages in a process of their own: a broken one may raise anything, or end Python."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from megaman.errors import summarize_error
from megaman.hub import PACKAGE

TIMEOUT = 180  # seconds; the first import after an installation is slow
RESULT = "megaman-import "  # begins a line that is ours


def try_imports(targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What happened to each import, in this order and in one process, as far as it survives.

    A target is a module, or module:attribute for libraries that import what is asked for. Its
    result has "error", "" if all is well, and facts on torch and xformers.
    """
    results: dict[str, dict[str, Any]] = {}
    waiting = list(targets)
    while waiting:
        results |= _run_process(waiting)
        waiting = [target for target in waiting if target not in results]
    return results


def _run_process(targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results of one process, at least one: if it dies, the import that it died of."""
    command = [sys.executable, "-m", "megaman.training.import_probe", *targets]
    try:
        done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, timeout=TIMEOUT)
        output, end = done.stdout, f"ends Python with exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"does not finish in {TIMEOUT} seconds"
    except OSError as error:
        output, end = b"", f"cannot be tried ({summarize_error(error)})"
    lines = output.decode("utf-8", "replace").splitlines()
    results: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.startswith(RESULT):
            results |= json.loads(line.removeprefix(RESULT))
    if len(results) < len(targets):
        culprit = next(target for target in targets if target not in results)
        results[culprit] = {"error": end}
    return results


def main(targets: Sequence[str]) -> None:
    """Import each target and write its result as a line; what libraries print goes nowhere."""
    own = os.dup(1)
    os.dup2(2, 1)
    for target in targets:
        result = {target: _import(target)}
        os.write(own, f"\n{RESULT}{json.dumps(result)}\n".encode())


def _import(target: str) -> dict[str, Any]:
    module, _, attribute = target.partition(":")
    try:
        imported = importlib.import_module(module)
        if attribute:
            getattr(imported, attribute)
        facts = FACTS[module]() if module in FACTS else {}
    except BaseException as error:
        return {"error": summarize_error(error)}
    return {"error": "", **facts}


def _torch_facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "mps": torch.backends.mps.is_available(),
        "cuda_error": "",
    }
    if torch.version.cuda or torch.version.hip:
        try:
            facts |= _gpu_facts()
        except Exception as error:
            facts["cuda_error"] = summarize_error(error)
    return facts


def _gpu_facts() -> dict[str, Any]:
    """The first GPU, which must also compute; raises if it cannot."""
    import torch

    free, total = torch.cuda.mem_get_info()
    float(torch.ones(2, device="cuda").sum())  # fails if torch has no code for this GPU
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return {"gpu": name, "capability": list(capability), "free": free, "total": total}


def _xformers_facts() -> dict[str, Any]:
    """Raises if its compiled part is of another torch: of that xformers itself only warns."""
    library = importlib.import_module("xformers._cpp_lib")
    problem = getattr(library, "_cpp_library_load_exception", None)
    if problem is not None:
        raise RuntimeError(" ".join(str(problem).split()))
    return {}


FACTS = {"torch": _torch_facts, "xformers": _xformers_facts}

if __name__ == "__main__":
    main(sys.argv[1:])
