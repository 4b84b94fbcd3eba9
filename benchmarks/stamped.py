"""Run a Python program unchanged, and print as a last JSON line when its steps ended and how much
memory it took.

    python benchmarks/stamped.py training megaman_lora.py --demo --max_train_steps 20

The first word is the description of a tqdm bar that the program updates once per step; nothing else
of it is touched. Any Python with tqdm will do, so that the peer's own virtual environment can run
the peer.

- `first`: the end of the first step, by time.perf_counter, whose clock is the whole system's
- `step_s`, `step_cpu_s`: seconds, and seconds of CPU over all threads, from the end of each step to
  that of the next
- `rss_mb`, `peak_mb`: resident memory at the end of the last step, and its peak since the process
  began
- `cuda_peak_mb`, `device`: peak of the memory that torch had allocated on the GPU; only with a GPU
- `threads`: torch's, in one operation

On a GPU every step is waited for before the clock is read. MB are 2**20 bytes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm.std import tqdm


def cuda() -> Any:
    """torch.cuda if the program has used it, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def resident() -> tuple[float, float]:
    """Resident memory of this process in MB, now and at its peak."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["VmRSS"].split()[0]) / 1024, int(fields["VmHWM"].split()[0]) / 1024
    except OSError:  # not Linux
        import psutil

        info = psutil.Process().memory_info()
        if os.name == "nt":
            return info.rss / 2**20, info.peak_wset / 2**20
        import resource

        return info.rss / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def now() -> float:
    """time.perf_counter, once the GPU has finished its work."""
    if gpu := cuda():
        gpu.synchronize()
    return time.perf_counter()


def after_updates(bar: str, then: Callable[[tqdm], None]) -> None:
    """Have tqdm call then with the bar after every update of the one with this description."""
    update = tqdm.update

    def updating(self: Any, n: float | None = 1) -> bool | None:
        result = update(self, n)
        # A disabled bar, as without a terminal, has no description; only that of steps is updated.
        description = bar if self.disable else self.desc or ""
        if description.rstrip(": ") == bar:
            then(self)
        return result

    tqdm.update = updating  # pyright: ignore[reportAttributeAccessIssue]


class Stopwatch:
    """Wall and CPU time at every update of a bar, and the resident memory in MB at its last one."""

    def __init__(self, bar: str) -> None:
        self.times: list[tuple[float, float]] = []
        self.rss_mb: float | None = None
        after_updates(bar, self._stamp)

    def _stamp(self, updated: tqdm) -> None:
        self.times.append((now(), time.process_time()))
        if updated.total and len(self.times) >= updated.total:  # a disabled bar counts nothing
            self.rss_mb = resident()[0]

    def figures(self) -> dict[str, Any]:
        """What the program prints."""
        # Linux updates the two on their own, a little late.
        peak = max(resident()[1], self.rss_mb or 0)
        steps = list(pairwise(self.times))
        figures: dict[str, Any] = {
            "first": self.times[0][0] if self.times else None,
            "rss_mb": self.rss_mb,
            "peak_mb": peak,
            "step_s": [after[0] - before[0] for before, after in steps],
            "step_cpu_s": [after[1] - before[1] for before, after in steps],
        }
        if torch := sys.modules.get("torch"):
            figures["threads"] = torch.get_num_threads()
        if gpu := cuda():
            figures["cuda_peak_mb"] = gpu.max_memory_allocated() / 2**20
            figures["device"] = gpu.get_device_name()
        return figures


def main() -> None:
    bar, program = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.argv = [str(program), *sys.argv[3:]]
    sys.path[0] = str(program.parent)
    stopwatch = Stopwatch(bar)
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        print("\n" + json.dumps(stopwatch.figures()), flush=True)


if __name__ == "__main__":
    main()
