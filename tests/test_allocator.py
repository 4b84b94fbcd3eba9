"""The allocator's thresholds, seen by the page faults of a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megaman import runtime

# One process for several, since loading torch takes longer than the rest: page faults with the
# thresholds that glibc began with and then with ours, and huge pages of the memory that is kept.
MEASURE = """
import json, pathlib, resource
import torch
from megaman import runtime

def churn():
    for _ in range(20):
        torch.ones(16 * 2**20)  # 64 MB

def faults():
    churn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    churn()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def huge():
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

found = {"leave": faults()}
runtime.keep_freed_memory()
found["keep"] = faults()
before = huge()
kept = torch.arange(2**20)
runtime.use_huge_pages()
assert torch.equal(kept, torch.arange(2**20)), "what is in the heap stays as it is"
found["huge"] = huge() - before
print(json.dumps(found))
"""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these thresholds")


NO_THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_": None, "MALLOC_MMAP_THRESHOLD_": None}


def measure(run_script, folder: Path, env: dict) -> dict[str, int]:
    """What MEASURE prints."""
    done = run_script(["-c", MEASURE], folder, env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(run_script, tmp_path_factory) -> dict[str, int]:
    """In an environment without thresholds."""
    return measure(run_script, tmp_path_factory.mktemp("measured"), NO_THRESHOLDS)


@glibc
def test_memory_that_is_freed_is_taken_again_without_a_fault(measured):
    """64 MB are some hundred pages at least, however large the system's pages are."""
    assert measured["keep"] < 100 < measured["leave"]


@glibc
def test_thresholds_from_outside_stay(run_script, tmp_path):
    own = {**NO_THRESHOLDS, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    assert measure(run_script, tmp_path, own)["keep"] > 100


@pytest.mark.skipif(
    not ENABLED.is_file() or "[madvise]" not in ENABLED.read_text(), reason="needs Linux's madvise"
)
def test_the_heap_comes_into_huge_pages(measured):
    assert measured["huge"] > 32 * 2**10  # kB
    maps = (
        "55d0-55f2 rw-p 00000000 00:00 0    [heap]\n"
        "7f00-7f10 r--p 00000000 fe:00 12  /usr/lib/libc.so.6\n"
    )
    assert runtime._heap(maps) == [(0x55D0, 0x55F2)]
