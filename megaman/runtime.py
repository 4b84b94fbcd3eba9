"""Where a run computes and how: device, number format and memory format, by a rule and with the
reason in words.

Also the memory there is, how to go on when it runs out, and the versions that a result depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from megaman.errors import UserError, out_of_memory
from megaman.threads import ThreadPolicy

DTYPES = {
    "no": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # by accelerate's words
# Channels of a UNet's first block from which on a CPU that computes in bf16 is faster in it:
# docs/performance.md.
WIDE = 128
UNUSED_CARD = (
    "there is an NVIDIA card, but this torch cannot use it: install torch from PyTorch's CUDA index"
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

PIXELS_PER_BATCH = 512 * 512  # larger batches do not generate faster
USABLE = 0.85  # share of the free memory; workspaces and fragmentation take the rest


@dataclass(frozen=True)
class ComputeSettings:
    """Where to compute, in which precision (with the reason in words), and in which memory format:
    contiguous or channels_last."""

    device: torch.device
    dtype: torch.dtype
    mixed_precision: str  # accelerate's name of the dtype: no, fp16 or bf16
    dtype_reason: str
    memory_format: str

    @property
    def torch_memory_format(self) -> torch.memory_format:
        """torch's constant for memory_format."""
        return MEMORY_FORMATS[self.memory_format]


def choose_device(wanted: str | None = None) -> torch.device:
    """The wanted device, or the best there is; raises UserError where the wanted one is missing."""
    if wanted is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        wanted = "cpu"  # what accelerate launch --cpu sets
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted and not present[wanted]:
        raise UserError(
            f"--device {wanted}: this torch sees no such device", "Leave the flag out or take cpu"
        )
    return torch.device(wanted or next(name for name, there in present.items() if there))


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


def precision(asked: str, device: str, bf16: bool, width: int) -> tuple[str, str]:
    """accelerate's word for what to compute in on a kind of device, and the reason.

    What is asked for is taken where the device can compute in it. On a CPU fp16 stands for the half
    precision that pays: bf16, where the processor has instructions for it (bf16 says so) and the
    UNet is wide enough to gain by it.
    """
    if asked == "no":
        return "no", "float32 as asked for"
    if device == "cuda" and asked == "bf16" and not bf16:
        return "fp16", "this card has no bf16, so it uses fp16"
    if device == "mps":
        refused = {
            "fp16": "fp16 needs an NVIDIA card, so mps",
            "bf16": "bf16 is not used on mps, so it",
        }
        return "no", f"{refused[asked]} uses float32"
    if device == "cpu" and asked == "fp16" and not bf16:
        return (
            "no",
            "fp16 needs an NVIDIA card and bf16 a processor with instructions for it, so cpu uses float32",
        )
    if device == "cpu" and asked == "fp16" and width < WIDE:
        return (
            "no",
            "fp16 needs an NVIDIA card and bf16 a wider UNet to be faster, so cpu uses float32",
        )
    if device == "cpu" and asked == "fp16":
        return "bf16", "base in bf16, for which this processor has instructions, LoRA in float32"
    return asked, f"base in {asked}, LoRA in float32"


def prefers_channels_last(device: str, mixed_precision: str) -> bool:
    """Whether convolutions are at least as fast with the channels last: on a CPU, and on a card's
    tensor cores."""
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


def unused_nvidia_card() -> bool:
    """Whether this machine has NVIDIA's driver, but the installed torch cannot use it."""
    return not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None


def set_threads(policy: ThreadPolicy) -> None:
    """Set the thread count of a torch that was loaded before the policy, as in a notebook."""
    if policy.count is not None:
        torch.set_num_threads(policy.count)


def device_lines(compute: ComputeSettings, *more: str) -> list[str]:
    """What to say of the device before a run: how it computes and why, what else is told, and a
    card that lies idle."""
    count = torch.get_num_threads()
    threads = "1 CPU thread" if count == 1 else f"{count} CPU threads"
    facts = [compute.dtype_reason, compute.memory_format, *more, threads]
    line = f"device     {compute.device}: {'; '.join(facts)}"
    return [line, *([f"           {UNUSED_CARD}"] if unused_nvidia_card() else [])]


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
        # Outside the handler: the error is gone, and with it the tensors of its frames.
        release_memory()
        reduce()


def release_memory() -> None:
    """Free unreferenced memory, and the cache of torch's allocator on CUDA."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def parameter_bytes(model: torch.nn.Module) -> int:
    """The size of a model's parameters in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
