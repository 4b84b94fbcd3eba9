"""The allocator's thresholds, seen by the page faults of a process of its own."""

from __future__ import annotations

import json
import sys

import pytest

COUNT = """
import json, resource, sys
import torch
from megaman import allocator
if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
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
    faults = {how: json.loads(run_script(["-c", COUNT, how], tmp_path, unset).stdout) for how in ("keep", "leave")}
    assert faults["keep"] < 100 < faults["leave"]


@glibc
def test_thresholds_from_outside_stay(run_script, tmp_path):
    own = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": None}
    assert json.loads(run_script(["-c", COUNT, "keep"], tmp_path, own).stdout) > 100
