"""The device of a run: which one, in which dtype and memory format, by a rule and with a reason.

Also memory: what is free, how it is kept, and what to do when it runs out. And the versions that a
result depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from megaman import cuda
from megaman.errors import UserError, out_of_memory, summarize_error
from megaman.threads import ThreadPolicy

# By accelerate's names for --mixed_precision.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Channels of a UNet's first block from which on bf16 is faster on CPUs that have it, see
# docs/performance.md.
MIN_WIDTH_FOR_BF16 = 128
UNUSED_GPU = (
    "there is an NVIDIA GPU, but this torch cannot use it: install torch from PyTorch's CUDA index"
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt(3)
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of Linux's madvise(2); the second since Linux 6.1
HUGE_PAGE = 2**21  # bytes
KEPT_BYTES = 2**30  # no tensor of a training step on a CPU is larger

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
PACKAGES = ["torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow"]

Result = TypeVar("Result")

log = logging.getLogger(__name__)

PIXELS_PER_BATCH = 512 * 512  # larger batches do not generate faster
USABLE = 0.85  # share of the free memory; workspaces and fragmentation take the rest


@dataclass(frozen=True)
class ComputeSettings:
    """Where to compute, in which dtype and why, and in which memory format, contiguous or
    channels_last."""

    device: torch.device
    dtype: torch.dtype
    mixed_precision: str  # accelerate's name of the dtype: no, fp16 or bf16
    dtype_reason: str
    memory_format: str

    @property
    def torch_memory_format(self) -> torch.memory_format:
        """torch's constant for memory_format."""
        return MEMORY_FORMATS[self.memory_format]


def choose_device(requested: str | None = None) -> torch.device:
    """The requested device, or the best one; raises UserError if the requested one is missing."""
    only_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if requested is None and only_cpu:  # as accelerate launch --cpu sets it
        requested = "cpu"
    is_present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested and not is_present[requested]:
        raise UserError(
            f"--device {requested}: this torch sees no such device", "Omit the flag or take cpu"
        )
    return torch.device(requested or next(name for name in is_present if is_present[name]))


def choose_compute(
    mixed_precision: str, device: torch.device, width: int, memory_format: str = "auto"
) -> ComputeSettings:
    """Decide how to compute on the device: the same for every run on the same kind of machine,
    nothing is timed.

    Args:
        mixed_precision: the requested precision; see `precision`.
        width: channels of the UNet's first block.
        memory_format: contiguous, channels_last, or auto; see `prefers_channels_last`.
    """
    depends_on_bf16 = (device.type, mixed_precision) in {("cuda", "bf16"), ("cpu", "fp16")}
    has_bf16 = depends_on_bf16 and _computes_in_bf16(device)
    chosen, reason = precision(mixed_precision, device.type, has_bf16, width)
    if memory_format == "auto":
        last = prefers_channels_last(device.type, chosen)
        memory_format = "channels_last" if last else "contiguous"
    return ComputeSettings(device, DTYPES[chosen], chosen, reason, memory_format)


def precision(requested: str, device: str, has_bf16: bool, width: int) -> tuple[str, str]:
    """accelerate's name of the precision on a kind of device, and the reason in words.

    The requested precision is used if the device has it. On a CPU fp16 stands for the half
    precision that is faster there: bf16, if the processor has instructions for it (has_bf16) and
    the UNet's first block has enough channels (width).
    """
    if requested == "no":
        return "no", "float32 as requested"
    if device == "cuda" and requested == "bf16" and not has_bf16:
        return "fp16", "this GPU has no bf16, so it uses fp16"
    if device == "mps":
        reasons = {"fp16": "fp16 needs an NVIDIA GPU", "bf16": "bf16 is not used on mps"}
        return "no", f"{reasons[requested]}, so mps uses float32"
    if device == "cpu" and requested == "fp16":
        return _cpu_precision(has_bf16, width)
    return requested, f"base in {requested}, LoRA in float32"


def _cpu_precision(has_bf16: bool, width: int) -> tuple[str, str]:
    if not has_bf16:
        needs = "a processor with instructions for it"
    elif width < MIN_WIDTH_FOR_BF16:
        needs = "a wider UNet to be faster"
    else:
        return "bf16", "base in bf16, for which this processor has instructions, LoRA in float32"
    return "no", f"fp16 needs an NVIDIA GPU and bf16 {needs}, so cpu uses float32"


def prefers_channels_last(device: str, mixed_precision: str) -> bool:
    """Whether convolutions are not slower with channels last: on CPUs and on GPUs' tensor cores."""
    return device == "cpu" or (device == "cuda" and mixed_precision != "no")


def _computes_in_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this processor has instructions for bf16: AVX512-BF16, AMX-BF16 or ARM's extension.

    oneDNN also says yes if it emulates them with AVX-512, and the processor's flags ignore
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, which limit the instructions that are used. So all
    three are checked. False if this torch has no answer.
    """
    try:
        has = torch.cpu.get_capabilities()
        on_x86 = has.get("avx512_bf16") or has.get("amx_bf16")
        on_x86 = on_x86 and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return bool((on_x86 or has.get("bf16")) and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def has_unused_nvidia_gpu() -> bool:
    """Whether this machine has NVIDIA's driver, but the installed torch cannot use it."""
    return not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None


def finer_precisions(compute: ComputeSettings) -> list[str]:
    """--mixed_precision's values with a larger range or more digits that the device has, the
    nearest first."""
    if compute.mixed_precision == "no":
        return []
    is_coarse = compute.mixed_precision == "fp16" and _computes_in_bf16(compute.device)
    return ["bf16", "no"] if is_coarse else ["no"]


def set_threads(policy: ThreadPolicy) -> None:
    """Set the thread count of a torch that was loaded before the policy, as in a notebook."""
    if policy.count is not None:
        torch.set_num_threads(policy.count)


def device_lines(compute: ComputeSettings, *more: str) -> list[str]:
    """The lines about the device before a run: how it computes, more facts, and an NVIDIA GPU that
    is unused."""
    count = torch.get_num_threads()
    threads = "1 CPU thread" if count == 1 else f"{count} CPU threads"
    facts = [compute.dtype_reason, compute.memory_format, *more, threads]
    lines = [f"device     {compute.device}: {'; '.join(facts)}"]
    if has_unused_nvidia_gpu():
        lines.append(f"           {UNUSED_GPU}")
    return lines


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system, in one arena.

    The system clears every page before it hands it out again, and a training step frees and
    allocates nearly all of its memory: with Stable Diffusion 1.5 in bf16 at 256 px that was a fifth
    of the step on two cores. Both thresholds are needed; one alone makes it slower. The backward
    pass runs in its own thread, which would not reuse what the forward pass had freed in another
    arena. Nothing happens without glibc, or if the user has set a threshold.
    """
    thresholds = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    if sys.platform != "linux" or thresholds & os.environ.keys():
        return
    options = {M_TRIM_THRESHOLD: KEPT_BYTES, M_MMAP_THRESHOLD: KEPT_BYTES, M_ARENA_MAX: 1}
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)


def use_huge_pages() -> None:
    """Make Linux back the memory that `keep_freed_memory` keeps with pages of 2 MB, not 4 KB.

    A step touches all of it, and larger pages need fewer address translations: with the embedded
    base, a step on one thread takes 7 % less time. Call it after the first step, when the heap has
    its final size. Nothing happens outside Linux or if the administrator forbids it
    (/sys/kernel/mm/transparent_hugepage/enabled: never).
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        for heap_start, heap_end in _heap(maps):
            start = math.ceil(heap_start / HUGE_PAGE) * HUGE_PAGE
            end = heap_end // HUGE_PAGE * HUGE_PAGE
            if start < end and madvise(start, end - start, MADV_HUGEPAGE) == 0:
                # At once, not gradually; without effect where the kernel does not know it.
                madvise(start, end - start, MADV_COLLAPSE)


def _heap(maps: str) -> list[tuple[int, int]]:
    """Start and end address of each part of the heap, from /proc/self/maps."""
    ranges = [line.split()[0].split("-") for line in maps.splitlines() if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


@cache
def package_versions() -> dict[str, str]:
    """The installed version of each of PACKAGES."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def retry_on_oom(compute: Callable[[], Result], reduce: Callable[[], None]) -> Result:
    """The result of compute, called again after reduce whenever memory runs out.

    reduce lowers what compute needs and raises UserError when it cannot.
    """
    while True:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if "memory" not in f"{type(error).__name__} {error}".lower():
                log.info("taken for too little memory: %s", summarize_error(error))
        # Outside the handler: the error is gone, and with it the tensors of its frames.
        release_memory()
        reduce()


def release_memory() -> None:
    """Free unreferenced memory, and the cache of torch's allocator on CUDA."""
    gc.collect()
    cuda.empty_cache()


def default_batch_size(height: int, width: int) -> int:
    """The number of images of this size, in pixels, that are generated at once by default."""
    return max(1, PIXELS_PER_BATCH // (height * width))


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def used_memory(device: torch.device) -> int:
    """The bytes that this process has used at most on its GPU, or has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def parameter_bytes(model: torch.nn.Module) -> int:
    """The size of a model's parameters in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
