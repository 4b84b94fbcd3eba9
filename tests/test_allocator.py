"""The allocator's thresholds, seen by the page faults of a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megaman import runtime

COUNT = """
import json, resource, sys
import torch
from megaman import runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
def churn():
    for _ in range(20):
        torch.ones(16 * 2**20)  # 64 MB
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""
glibc = pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these thresholds")


@glibc
def test_memory_that_is_freed_is_taken_again_without_a_fault(run_script, tmp_path):
    """64 MB are some hundred pages at least, however large the system's pages are."""
    unset = {"MALLOC_TRIM_THRESHOLD_": None, "MALLOC_MMAP_THRESHOLD_": None}
    faults = {
        how: json.loads(run_script(["-c", COUNT, how], tmp_path, unset).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < 100 < faults["leave"]


@glibc
def test_thresholds_from_outside_stay(run_script, tmp_path):
    own = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": None}
    assert json.loads(run_script(["-c", COUNT, "keep"], tmp_path, own).stdout) > 100


HUGE = """
import pathlib
import torch
from megaman import runtime
def huge():
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
runtime.keep_freed_memory()
torch.ones(16 * 2**20)  # 64 MB, which stay in the heap
before = huge()
kept = torch.arange(2**20)
runtime.use_huge_pages()
assert torch.equal(kept, torch.arange(2**20)), "what is in the heap stays as it is"
print(huge() - before)
"""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not ENABLED.is_file() or "[madvise]" not in ENABLED.read_text(), reason="needs Linux's madvise"
)
def test_the_heap_comes_into_huge_pages(run_script, tmp_path):
    unset = {"MALLOC_TRIM_THRESHOLD_": None, "MALLOC_MMAP_THRESHOLD_": None}
    assert int(run_script(["-c", HUGE], tmp_path, unset).stdout) > 32 * 2**10  # kB
    maps = (
        "55d0-55f2 rw-p 00000000 00:00 0    [heap]\n"
        "7f00-7f10 r--p 00000000 fe:00 12  /usr/lib/libc.so.6\n"
    )
    assert runtime._heap(maps) == [(0x55D0, 0x55F2)]
