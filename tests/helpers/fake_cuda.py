"""An NVIDIA GPU that is not there, for a torch without CUDA.

What torch.cuda does in Python stays torch's own, so that a call with wrong arguments fails as it
does on a GPU; only the C++ functions underneath are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

GB = 2**30


@dataclass
class FakeGpu:
    """A GPU with index 0: bytes of memory, the major compute capability, and what was asked of it.

    fractions has the calls of set_per_process_memory_fraction, (fraction, index).
    """

    free: int = 8 * GB
    total: int = 10 * GB
    major: int = 8  # 8 is the first with bf16
    fractions: list[tuple[float, int]] = field(default_factory=list)
    cache_emptied: int = 0

    def memory_info(self, index: int) -> tuple[int, int]:
        assert index == 0
        return self.free, self.total

    def set_fraction(self, fraction: float, index: int) -> None:
        assert index == 0
        self.fractions.append((fraction, index))

    def empty_cache(self) -> None:
        self.cache_emptied += 1

    def properties(self, index: int) -> SimpleNamespace:
        assert index == 0
        return SimpleNamespace(name="Fake GPU", major=self.major, minor=0, total_memory=self.total)


def install(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> FakeGpu:
    """Let torch find this GPU until the test ends; tensors cannot be on it."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    functions = {
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setMemoryFraction": gpu.set_fraction,
        "_cuda_emptyCache": gpu.empty_cache,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    state = {
        "_initialized": True,
        "_cached_device_count": 1,
        "_cudart": SimpleNamespace(cudaMemGetInfo=gpu.memory_info),
        "_get_device_properties": gpu.properties,
        "default_generators": (torch.Generator(),),
    }
    for name, value in state.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    return gpu
