"""How many CPU threads torch uses, and how they wait for each other.

OpenMP reads its environment once, when torch loads it, so `apply` must run before the first import
of torch. Only the two scripts call it: importing this package never changes the process.

The rule depends on the base's width and on the CPUs that the process may use, never on the current
load: sums that are split among a different number of threads differ in their last bits, and equal
commands must give equal bits. docs/lab-notes.md has the measurements behind the numbers.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Channels of the UNet's first block below which training gains little from threads.
NARROW = 128
COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# How often a thread of GNU's OpenMP, which torch uses on Linux, spins at a barrier before it
# sleeps. With the default, 300,000, it uses up the time slice of the thread that it waits for.
SPIN_COUNT = 1_000
# The same in milliseconds for the OpenMP of Intel and LLVM on Windows and macOS, whose default is
# 200. Not measured.
BLOCK_TIME = 1

# The count for a new run, from the CPUs that the process may use; None leaves it to torch.
ThreadRule = Callable[[int], int | None]

MAX_THREADS = 1024  # that a checkpoint may ask for

_applied: dict[str, str] = {}  # environment variables that this process has set


@dataclass(frozen=True)
class ThreadPolicy:
    """The environment variables that a run sets, and a remark for the user, "" if there is none.

    count is None if the user's setting applies, or torch's own choice.
    """

    count: int | None
    environment: dict[str, str]
    remark: str = ""


def threads_for_training(width: int, usable: int) -> int | None:
    """The thread count of a new training run; None leaves it to torch.

    width is the number of channels of the UNet's first block, 0 if unknown; usable is the number
    of CPUs, see `usable_cpus`.
    """
    return 1 if 0 < width < NARROW else _threads_for_wide(usable)


def threads_for_generation(width: int, usable: int) -> int | None:
    """The thread count of a new generation; None leaves it to torch. For width see above.

    A narrow UNet generates one batch a CPU, each with one thread (`generation_workers`), which is
    faster than one batch with all threads, and does not wait for threads that the system holds up.
    """
    return 1 if 0 < width < NARROW else _threads_for_wide(usable)


def generation_workers(
    width: int,
    policy: ThreadPolicy,
    processes: int = 1,
    environment: Mapping[str, str] = os.environ,
) -> int | None:
    """How many small batches a generation runs in parallel on a CPU; None if it runs large ones,
    one by one.

    processes is the number of this run's processes on this machine. One thread means small batches
    whoever chose it, since the launcher of several processes does and they are to give the same
    bits as one process; but a user who chose one thread for one process gets one busy CPU.
    """
    has_one_thread = policy.count == 1 or environment.get("OMP_NUM_THREADS", "").strip() == "1"
    if not (0 < width < NARROW and has_one_thread):
        return None
    is_user_choice = policy.count is None and processes == 1
    return 1 if is_user_choice else max(1, usable_cpus() // processes)


def _threads_for_wide(usable: int) -> int | None:
    # torch counts the cores in the affinity mask, but does not know a container's quota.
    return usable if usable < _affinity() else None


def choose_threads(
    rule: int | None,
    usable: int,
    environment: Mapping[str, str],
    saved: int | None = None,
    platform: str = sys.platform,
) -> ThreadPolicy:
    """The policy of a run on this machine.

    Args:
        rule: the count for a new run, from one of the two functions above.
        usable: CPUs that this process may use, see `usable_cpus`.
        environment: the user's environment variables, which win over any rule.
        saved: the count in the checkpoint or image that is resumed or repeated, 0 if it has none;
            None for a new run.
    """
    variables = {} if any(name in environment for name in WAIT_VARIABLES) else _waiting(platform)
    for name in COUNT_VARIABLES:
        if name in environment:
            return ThreadPolicy(None, variables, _overridden(name, environment[name], saved))
    count = rule if saved is None else saved or None
    if count is None:
        return ThreadPolicy(None, variables)
    remark = ""
    if saved and saved > usable:
        remark = f"{saved} threads as before, on {usable} CPUs: slower, but the same bits"
    return ThreadPolicy(count, variables | {"OMP_NUM_THREADS": str(count)}, remark)


def _waiting(platform: str) -> dict[str, str]:
    if platform == "linux":
        return {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
    return {"KMP_BLOCKTIME": str(BLOCK_TIME)}


def _overridden(name: str, value: str, saved: int | None) -> str:
    if not saved or value.strip() == str(saved):
        return ""
    return f"{name} is {value}, and it was {saved} threads before: the last bits may differ"


def configure_threads(rule: ThreadRule, saved: int | None = None) -> ThreadPolicy:
    """Choose the policy of this run on this machine and apply it, before torch is imported.

    Args:
        rule: see `threads_for_training` (with its width bound) and `threads_for_generation`.
        saved: see `choose_threads`.
    """
    usable = usable_cpus()
    policy = choose_threads(rule(usable), usable, user_environment(), saved)
    apply(policy)
    return policy


def apply(policy: ThreadPolicy) -> None:
    """Set the policy for this process, which must not have imported torch yet, and its children."""
    os.environ.update(policy.environment)
    _applied.update(policy.environment)


def user_environment() -> dict[str, str]:
    """The environment without the variables that `apply` has set in this process."""
    return {name: value for name, value in os.environ.items() if _applied.get(name) != value}


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """CPUs that this process may use, at least 1: by its affinity and its container's quota,
    rounded up.

    The paths are those of Linux's cgroups(7), versions 1 and 2.
    """
    return min([_affinity(), *(max(1, math.ceil(quota)) for quota in _quotas(cgroups, membership))])


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """The CPU quota of each of the process's cgroups and of each of their parents."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        relative = PurePosixPath(path.lstrip("/"))
        for group in (relative, *relative.parents):
            if not controllers:
                yield from _quota(cgroups / group, "cpu.max")
            elif "cpu" in controllers.split(","):
                yield from _quota(
                    cgroups / controllers / group, "cpu.cfs_quota_us", "cpu.cfs_period_us"
                )


def _quota(group: Path, *names: str) -> Iterator[float]:
    """quota / period of one cgroup; nothing if it has none ("max" in version 2, -1 in 1)."""
    try:
        words = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
        quota, period = map(int, words[:2])
    except (OSError, ValueError):
        return
    if quota > 0 and period > 0:
        yield quota / period
