"""Run a Python program as it is, and print as a last JSON line when its steps ended and what memory
it took.

    python benchmarks/stamped.py training megaman_lora.py --demo --max_train_steps 20

The first word is the description of a tqdm bar that the program updates once a step; nothing else
of it is touched. Any Python with tqdm will do, so that the peer's own virtual environment can run
the peer.

- `first`: the end of the first step, by time.perf_counter, whose clock is the whole system's
- `step_s`, `step_cpu_s`: seconds, and seconds of CPU over all threads, from the end of each step to
that of the next
- `rss_mb`, `peak_mb`: resident memory at the end of the last step, and at most since the process
began
- `cuda_peak_mb`, `device`: memory that torch had allocated on the card at most; only with a card
- `threads`: torch's, in one operation

On a card every step is waited for before the clock is read. MB are 2**20 bytes.
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

from tqdm.std import tqdm


def cuda():
    """torch.cuda where the program has used it, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def resident() -> tuple[float, float]:
    """Resident memory of this process in MB, now and at most."""
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
    """time.perf_counter, once a card has done what it was given."""
    if card := cuda():
        card.synchronize()
    return time.perf_counter()


def after_updates(bar: str, then: Callable[[tqdm], None]) -> None:
    """Have tqdm call this with the bar after every update of the one of that description."""
    update = tqdm.update

    def updating(self, n=1):
        result = update(self, n)
        if (getattr(self, "desc", None) or "").rstrip(": ") == bar:
            then(self)
        return result

    tqdm.update = updating


def stamp_updates(bar: str) -> tuple[list[tuple[float, float]], dict[str, float | None]]:
    """Have tqdm note wall and CPU time at every update of that bar in the list, and the memory at
    its last one."""
    stamps, at_end = [], {"rss_mb": None}

    def stamp(updated: tqdm) -> None:
        stamps.append((now(), time.process_time()))
        if updated.total and updated.n >= updated.total:
            at_end["rss_mb"] = resident()[0]

    after_updates(bar, stamp)
    return stamps, at_end


def main() -> None:
    bar, program = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.argv = [str(program), *sys.argv[3:]]
    sys.path[0] = str(program.parent)
    stamps, at_end = stamp_updates(bar)
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        peak = max(
            resident()[1], at_end["rss_mb"] or 0
        )  # Linux counts either on its own, a little late
        result = {
            "first": stamps[0][0] if stamps else None,
            **at_end,
            "peak_mb": peak,
            "step_s": [after[0] - before[0] for before, after in pairwise(stamps)],
            "step_cpu_s": [after[1] - before[1] for before, after in pairwise(stamps)],
        }
        if torch := sys.modules.get("torch"):
            result["threads"] = torch.get_num_threads()
        if card := cuda():
            result |= {
                "cuda_peak_mb": card.max_memory_allocated() / 2**20,
                "device": card.get_device_name(),
            }
        print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
