"""What NVIDIA GPUs need: a limit to the memory that torch takes, and uploads that nothing waits
for."""

from __future__ import annotations

import os

import torch

PINNED_FOR = ("cuda",)  # types of the devices that copy from pinned memory on their own


def limit_memory(limit: float, device: torch.device) -> None:
    """Have torch raise OutOfMemoryError rather than hold more than limit bytes of this GPU.

    The CUDA context comes on top.
    """
    total = torch.cuda.mem_get_info(device)[1]
    # Unlike mem_get_info, it refuses a device without an index.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)


def avoid_shared_memory(free: float, device: torch.device) -> None:
    """On Windows, have torch raise OutOfMemoryError when the free bytes of this GPU are used up.

    Since NVIDIA's driver 536.40 there is no error otherwise: what does not fit goes to the CPU's
    memory, and everything takes many times as long.
    """
    if device.type == "cuda" and os.name == "nt":
        limit_memory(free, device)


def empty_cache() -> None:
    """Return the memory that torch's allocator holds but does not use, if there is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def upload(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor on the device: to a GPU from pinned memory, or the CPU would wait until the GPU
    has finished everything before."""
    if device.type in PINNED_FOR and tensor.device.type == "cpu":
        return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
