"""Where a run computes and how: device, number format and memory format, by a rule and with the reason in words."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch

from megaman.errors import UserError
from megaman.threads import ThreadPolicy

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by accelerate's words
# Channels of a UNet's first block from which on a CPU that computes in bf16 is faster in it: docs/performance.md.
WIDE = 128
UNUSED_CARD = "there is an NVIDIA card, but this torch cannot use it: install torch from PyTorch's CUDA index"


@dataclass(frozen=True)
class Placement:
    """Where and in which number format and memory format to compute, with the number format's reason in words."""

    device: torch.device
    dtype: torch.dtype
    mixed_precision: str  # accelerate's word: no, fp16 or bf16
    why: str
    channels_last: bool

    @property
    def memory_format(self) -> str:
        """contiguous or channels_last: the order in which activations and convolutions' weights lie in memory."""
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def layout(self) -> torch.memory_format:
        """The same as torch calls it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def choose_device(wanted: str | None = None) -> torch.device:
    """The wanted device, or the best there is; raises UserError where the wanted one is missing."""
    if wanted is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        wanted = "cpu"  # what accelerate launch --cpu sets
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted and not present[wanted]:
        raise UserError(f"--device {wanted}: this torch sees no such device", "Leave the flag out or take cpu")
    return torch.device(wanted or next(name for name, there in present.items() if there))


def place(mixed_precision: str, device: torch.device, width: int, memory_format: str = "auto") -> Placement:
    """Decide how to compute on the device: the same on each run on the same kind of machine, nothing is timed.

    Args:
        mixed_precision: accelerate's word for what is asked for; see precision.
        width: channels of the UNet's first block.
        memory_format: auto, or contiguous or channels_last as asked for; see prefers_channels_last.
    """
    matters = (device.type, mixed_precision) in {("cuda", "bf16"), ("cpu", "fp16")}
    word, why = precision(mixed_precision, device.type, matters and _computes_in_bf16(device), width)
    last = prefers_channels_last(device.type, word) if memory_format == "auto" else memory_format == "channels_last"
    return Placement(device, DTYPES[word], word, why, last)


def precision(asked: str, device: str, bf16: bool, width: int) -> tuple[str, str]:
    """accelerate's word for what to compute in on a kind of device, and the reason.

    What is asked for is taken where the device can compute in it. On a CPU fp16 stands for the half precision that
    pays: bf16, where the processor has instructions for it (bf16 says so) and the UNet is wide enough to gain by it.
    """
    if asked == "no":
        return "no", "float32 as asked for"
    if device == "cuda" and asked == "bf16" and not bf16:
        return "fp16", "this card has no bf16, so it uses fp16"
    if device == "mps":
        refused = {"fp16": "fp16 needs an NVIDIA card, so mps", "bf16": "bf16 is not used on mps, so it"}
        return "no", f"{refused[asked]} uses float32"
    if device == "cpu" and asked == "fp16" and not bf16:
        return "no", "fp16 needs an NVIDIA card and bf16 a processor with instructions for it, so cpu uses float32"
    if device == "cpu" and asked == "fp16" and width < WIDE:
        return "no", "fp16 needs an NVIDIA card and bf16 a wider UNet to be faster, so cpu uses float32"
    if device == "cpu" and asked == "fp16":
        return "bf16", "base in bf16, for which this processor has instructions, LoRA in float32"
    return asked, f"base in {asked}, LoRA in float32"


def prefers_channels_last(device: str, mixed_precision: str) -> bool:
    """Whether convolutions are at least as fast with the channels last: on a CPU, and on a card's tensor cores."""
    return device == "cpu" or (device == "cuda" and mixed_precision != "no")


def _computes_in_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this processor has instructions for bf16: AVX512-BF16 or AMX-BF16, or ARM's extension.

    oneDNN's own answer is also yes where it emulates them by AVX-512; the processor's flags know nothing of the
    variables that emulate a lesser one, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA. So all three are asked. False
    where this torch cannot tell.
    """
    try:
        has = torch.cpu.get_capabilities()
        on_x86 = has.get("avx512_bf16") or has.get("amx_bf16")
        on_x86 = on_x86 and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return bool((on_x86 or has.get("bf16")) and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def unused_nvidia_card() -> bool:
    """Whether this machine has NVIDIA's driver while the installed torch cannot use it."""
    return not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None


def set_threads(policy: ThreadPolicy) -> None:
    """Set the count in a torch that may have been loaded before the policy was applied, in a notebook for example."""
    if policy.count is not None:
        torch.set_num_threads(policy.count)


def device_lines(placement: Placement, *more: str) -> list[str]:
    """What to say of the device before a run: how it computes and why, what else is told, and a card that lies idle."""
    count = torch.get_num_threads()
    threads = "1 CPU thread" if count == 1 else f"{count} CPU threads"
    line = f"device     {placement.device}: {'; '.join([placement.why, placement.memory_format, *more, threads])}"
    return [line, *([f"           {UNUSED_CARD}"] if unused_nvidia_card() else [])]
