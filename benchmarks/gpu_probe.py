"""Run one of the scripts unchanged, and print as a last JSON line how it used the GPU.

    python benchmarks/gpu_probe.py [--limit_gb 2.3] [--waits_fail] megaman_lora.py --demo ...

Unlike stamped.py it never waits for the GPU itself, so its times are those of a real run, which
waits at its log only.

- `code`: the exit code
- `step_ms`: mean over the last 30 steps; `slowest_ms`: the slowest of these
- `allocated_gb`, `reserved_gb`: torch's peaks; only with a GPU
- `error`: the last line of what the script raised, if it did

--limit_gb is more memory than torch may take: what is above raises as on a smaller GPU.
--waits_fail turns whatever waits for the GPU within steps 12 to 19 into an error; the log, which
does wait, is written after steps 10 and 20.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from stamped import after_updates, cuda

GB = 2**30
COUNTED = 30  # steps: a multiple of those between two logs


class Steps:
    """The end of each step by its bar."""

    def __init__(self, waits_fail: bool) -> None:
        self.times: list[float] = []
        self._waits_fail = waits_fail
        after_updates("training", self._note)

    def _note(self, _: Any) -> None:
        self.times.append(time.perf_counter())
        gpu = cuda()
        if gpu and self._waits_fail and len(self.times) in (11, 19):
            gpu.set_sync_debug_mode("error" if len(self.times) == 11 else "default")

    def figures(self) -> dict[str, Any]:
        durations = [1000 * (after - before) for before, after in pairwise(self.times)][-COUNTED:]
        figures: dict[str, Any] = {}
        if durations:
            figures["step_ms"] = round(sum(durations) / len(durations), 1)
            figures["slowest_ms"] = round(max(durations), 1)
        if gpu := cuda():
            figures["allocated_gb"] = round(gpu.max_memory_allocated() / GB, 2)
            figures["reserved_gb"] = round(gpu.max_memory_reserved() / GB, 2)
        return figures


def limit_memory(limit_gb: float) -> None:
    """Hold torch to so many GB of GPU 0."""
    import torch

    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * GB / total), 0)


def run_script(script: Path, words: list[str]) -> dict[str, Any]:
    """Run it as __main__; returns its exit code and what it raised."""
    sys.argv = [str(script), *words]
    sys.path[0] = str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return {"code": end.code or 0}
    except BaseException as error:
        return {"code": 1, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"code": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit_gb", type=float)
    parser.add_argument("--waits_fail", action="store_true")
    parser.add_argument("script", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.limit_gb:
        limit_memory(options.limit_gb)
    steps = Steps(options.waits_fail)
    result = run_script(options.script.resolve(), options.words)
    print("\n" + json.dumps(result | steps.figures()), flush=True)


if __name__ == "__main__":
    main()
