"""How training fits into the available memory: what is chosen before step 1, or refused with what
would fit; the table of --plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megaman import cuda, runtime
from megaman.config.run_settings import ComputeConfig
from megaman.config.settings import MemoryRequest
from megaman.errors import UserError, summarize_error
from megaman.models.configs import read_configs, resolve_name
from megaman.runtime import DTYPES, choose_compute, choose_device
from megaman.training.compute import INDENT, MicroBatching, TrainingCompute
from megaman.training.memory_estimate import GB, MemoryEstimate, gigabytes

BATCH_SIZES = (1, 2, 4)  # of the table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """What a run does to fit into memory, and lines to print about it; vae_tile is the side in
    pixels of the VAE's tiles for sample images, 0 for none."""

    gradient_checkpointing: bool
    micro_batching: MicroBatching
    vae_tile: int = 0
    lines: tuple[str, ...] = ()


def fit_to_memory(
    compute: TrainingCompute,
    request: MemoryRequest,
    base_name: str,
    limit: float,
    cache_dir: Path | None = None,
) -> MemoryPlan:
    """Plan a run that fits into limit bytes (see plan_memory) and log what it needs.

    Nothing is estimated for an infinite limit, since that takes seconds. A failed estimate is
    logged and does not stop the run. Raises UserError if the run does not fit.
    """
    unchanged = MemoryPlan(compute.gradient_checkpointing, compute.micro_batching)
    if limit == math.inf:
        return unchanged
    try:
        configs, remark = read_configs(base_name)
        on_gpu = compute.device.type != "cpu"
        estimate = MemoryEstimate(configs, request, compute.dtype, on_gpu, cache_dir)
        estimate.training_peak(compute.micro_batching.size, compute.gradient_checkpointing)
        estimate.validation_peak(False)
    except Exception as error:  # whatever it is, loading the base gives the better message
        log.info("memory     cannot be estimated (%s)", summarize_error(error))
        return unchanged
    plan = plan_memory(estimate, compute.micro_batching, compute.gradient_checkpointing, limit)
    for line in plan.lines:
        log.info(line)
    if remark:
        log.info(INDENT + remark)
    return plan


def plan_memory(
    estimate: MemoryEstimate,
    batching: MicroBatching,
    checkpointing: bool,
    limit: float,
) -> MemoryPlan:
    """Fit a run into limit bytes without changing what it computes.

    VAE tiling for sample images comes first, then gradient checkpointing, then smaller
    micro-batches. Sample images that still do not fit do not stop the run: Validation skips them.
    Raises UserError if training on one image at a time does not fit, with what would.
    """
    usable = limit * runtime.USABLE
    original, measures = batching, []
    tiled = estimate.validation_peak(False) > max(usable, estimate.validation_peak(True))
    if tiled:
        measures.append("VAE tiling for sample images")
    if not checkpointing and estimate.training_peak(batching.size, False) > usable:
        checkpointing = True
        measures.append("gradient checkpointing")
    batching = _shrink(estimate, batching, checkpointing, usable)
    if batching != original:
        measures.append(
            f"{batching.accumulation_steps} micro-batches of {batching.size} a step, with the same "
            "effective batch size"
        )
    needed = estimate.training_peak(batching.size, checkpointing)
    if needed > limit:
        raise _refusal(estimate, needed, limit)
    peak = max(needed, estimate.validation_peak(tiled))
    parts = estimate.summary(batching.size, checkpointing, tiled)
    lines = [f"memory     needs about {gigabytes(peak)} GB of {gigabytes(limit)} GB ({parts})"]
    if measures:
        lines.append(f"{INDENT}so that it fits: {', '.join(measures)}")
    if estimate.validation_peak(tiled) > limit:
        lines.append(f"{INDENT}sample images will probably not fit and are skipped then")
    vae_tile = estimate.vae_tile if tiled else 0
    return MemoryPlan(checkpointing, batching, vae_tile, tuple(lines))


def _shrink(
    estimate: MemoryEstimate, batching: MicroBatching, checkpointing: bool, usable: float
) -> MicroBatching:
    """The largest micro-batches that fit, or those of one image."""
    while estimate.training_peak(batching.size, checkpointing) > usable:
        smaller = batching.smaller()
        if smaller is None:
            break
        batching = smaller
    return batching


def _refusal(estimate: MemoryEstimate, needed: int, limit: float) -> UserError:
    """The error for a run of which not even one image fits: names a resolution that would."""
    message = (
        f"Training on one image of {estimate.resolution} px at a time needs about "
        f"{needed / GB:.2f} GB even with gradient checkpointing, and there are {limit / GB:.2f} GB"
    )
    step = 64 if estimate.resolution > 64 else estimate.vae_scale_factor
    if smaller := _largest_fitting(
        range(estimate.resolution // step * step, 0, -step),
        lambda side: estimate.training_peak(1, True, side),
        limit,
    ):
        return UserError(message, f"--resolution {smaller} would fit")
    remedy = "Close other programs"
    if estimate.dtype == torch.float32:
        remedy = "--mixed_precision fp16 takes half of that; or close other programs"
    return UserError(f"{message}; the weights alone take {gigabytes(estimate.weights)}", remedy)


def _largest_fitting(
    candidates: Iterable[int], needed: Callable[[int], int], limit: float
) -> int | None:
    """The first candidate that fits with memory to spare, or else the first that just fits."""
    sizes = {candidate: needed(candidate) for candidate in candidates}
    for bound in (limit * runtime.USABLE, limit):
        for candidate, size in sizes.items():
            if size <= bound:
                return candidate
    return None


def memory_limit(device: torch.device, vram_limit: float | None) -> float:
    """Bytes that a run may use on the device: what is free on a GPU, or vram_limit GB if that is
    less.

    Infinite without vram_limit on a CPU and on mps, which share their memory with everything else.
    On a CPU the limit only serves the plan.
    """
    requested = math.inf if vram_limit is None else int(vram_limit * GB)
    if device.type != "cuda":
        return requested
    return min(requested, runtime.free_memory(device))


def hold_to_limit(device: torch.device, vram_limit: float | None) -> float:
    """memory_limit, to which torch itself is held on CUDA with vram_limit, on Windows always."""
    limit = memory_limit(device, vram_limit)
    if device.type == "cuda" and vram_limit is not None:
        cuda.limit_memory(limit, device)
    else:
        cuda.avoid_shared_memory(limit, device)
    return limit


def memory_table(
    config: ComputeConfig, request: MemoryRequest, base_name: str, cache_dir: Path | None = None
) -> list[str]:
    """What runs on this base would need on a GPU, as the lines of --plan."""
    configs, remark = read_configs(base_name)
    precision = config.mixed_precision
    estimate = MemoryEstimate(configs, request, DTYPES[precision], True, cache_dir)
    device = choose_device()
    limit = memory_limit(device, config.vram_limit)
    lines = [f"base       {resolve_name(base_name)}"]
    if remark:
        lines.append(INDENT + remark)
    lines.append(
        f"plan       {request.resolution} px, {precision.replace('no', 'float32')}"
        f"{', the UNet in fp8' if request.in_float8 else ''}, rank {request.lora_rank}: "
        f"{estimate.summary(1, False, False)} GB"
    )
    if limit < math.inf:
        lines.append(f"limit      {gigabytes(limit)} GB")
    lines += ["", f"{'images at once':18}{'plain':>16}{'--gradient_checkpointing':>28}"]
    for size in BATCH_SIZES:
        plain = _cell(estimate.training_peak(size, False), limit)
        checkpointing = _cell(estimate.training_peak(size, True), limit)
        lines.append(f"{size:<18}{plain:>16}{checkpointing:>28}")
    if request.num_validation_images:
        plain = _cell(estimate.validation_peak(False), limit)
        tiled = _cell(estimate.validation_peak(True), limit)
        lines += ["", f"sample images  {plain}, with VAE tiling {tiled}"]
    lines += ["", "Calculated, not measured. A GB is 2**30 bytes."]
    lines.append("Tensors are counted; CUDA needs a few hundred MB on top.")
    if device.type != "cuda":
        reason = choose_compute(precision, device, estimate.width).dtype_reason
        lines.append(f"For an NVIDIA GPU. On this machine: {reason}.")
    return lines


def _cell(size: int, limit: float) -> str:
    """A number of the table, and whether it is within the limit if there is one."""
    if limit == math.inf:
        return f"{gigabytes(size)} GB"
    if size <= limit * runtime.USABLE:
        return f"{gigabytes(size)} GB fits"
    return f"{gigabytes(size)} GB {'tight' if size <= limit else 'no'}"
