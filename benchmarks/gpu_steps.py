"""The bare UNet step in every way that a GPU may prefer, each next to the memory that was planned.

    python benchmarks/gpu_steps.py BASE --resolution 512 [--cpu] [--case NAME ...]

Prints a JSON line a case as soon as it is measured. On a GPU the cases with a limit show how torch,
cuDNN and cuBLAS run out of memory, and whether the project recognizes it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bare
import torch

from megaman import cuda, runtime
from megaman.config.presets import DEFAULT_TARGETS
from megaman.config.settings import MemoryRequest
from megaman.errors import out_of_memory
from megaman.lora import adapter
from megaman.models.base import load_base
from megaman.models.configs import read_configs
from megaman.models.typed import move, unet_config
from megaman.training.memory_estimate import GB, MemoryEstimate
from megaman.training.memory_saving import checkpoint_gradients

RANK = 4
WARM_UP = 3  # steps


@dataclass(frozen=True)
class Case:
    """One way to compute a step; limit_gb holds torch to less memory than there is."""

    batch: int = 1
    memory_format: str = "channels_last"
    checkpointing: bool = False
    cudnn_benchmark: bool = False
    compiled: bool = False
    limit_gb: float | None = None


CASES = {
    "default": Case(),
    "contiguous": Case(memory_format="contiguous"),
    "cudnn.benchmark": Case(cudnn_benchmark=True),
    "checkpointing": Case(checkpointing=True),
    "batch 4": Case(batch=4),
    "batch 4 contiguous": Case(batch=4, memory_format="contiguous"),
    "compiled": Case(compiled=True),
    **{f"in {limit} GB": Case(limit_gb=limit) for limit in (2.7, 2.5, 2.3, 2.1, 1.95)},
}
CPU_CASES = ("default", "contiguous", "checkpointing")


@dataclass(frozen=True)
class Place:
    """Where and on what a step runs."""

    base: str
    device: torch.device
    dtype: torch.dtype
    resolution: int
    steps: int


def make_step(case: Case, place: Place) -> Callable[[], None]:
    """A function that computes one step, with everything that it needs in place."""
    device, dtype = place.device, place.dtype
    torch.backends.cudnn.benchmark = case.cudnn_benchmark
    memory_format = bare.MEMORY_FORMATS[case.memory_format]
    base = load_base(place.base, dtype, device, memory_format)
    unet = base.unet
    if case.compiled:
        unet.compile_repeated_blocks()
    trainable = adapter.inject(unet, RANK, RANK, DEFAULT_TARGETS)
    move(unet, device).train()
    if case.checkpointing:
        checkpoint_gradients([unet])
    optimizer = torch.optim.AdamW(trainable, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    side, config = place.resolution // base.vae_scale_factor, unet_config(unet)
    noisy = torch.randn(case.batch, config.in_channels, side, side).to(device)
    noise = torch.randn_like(noisy)
    prompt_embeds = torch.randn(case.batch, 77, config.cross_attention_dim).to(device, dtype)
    timesteps = torch.full((case.batch,), 500, device=device)
    predict = partial(unet, noisy.to(dtype), timesteps, encoder_hidden_states=prompt_embeds)
    return partial(bare.step, predict, noise, dtype, optimizer, trainable, scaler)


def measure(case: Case, place: Place) -> dict[str, Any]:
    """Milliseconds a step, milliseconds until all its kernels are launched, and memory in GB."""
    step = make_step(case, place)
    for _ in range(WARM_UP):
        step()
    wait(place.device)
    begin = time.perf_counter()
    for _ in range(place.steps):
        step()
    launched = time.perf_counter()
    wait(place.device)
    row: dict[str, Any] = {
        "step_ms": round(1000 * (time.perf_counter() - begin) / place.steps, 1),
        "launch_ms": round(1000 * (launched - begin) / place.steps, 1),
        "planned_gb": round(planned(case, place) / GB, 2),
    }
    if place.device.type == "cuda":
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / GB, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / GB, 2)
    return row


def planned(case: Case, place: Place) -> int:
    """Bytes that the memory plan expects."""
    request = MemoryRequest(place.resolution, RANK, tuple(DEFAULT_TARGETS))
    on_gpu = place.device.type != "cpu"
    estimate = MemoryEstimate(read_configs(place.base)[0], request, place.dtype, on_gpu)
    return estimate.training_peak(case.batch, case.checkpointing)


def run_out(case: Case, place: Place) -> dict[str, Any]:
    """What a step says in too little memory, and whether it is recognized."""
    assert case.limit_gb is not None
    step = make_step(case, place)
    cuda.limit_memory(case.limit_gb * GB, place.device)
    try:
        step()
        wait(place.device)
        row: dict[str, Any] = {"result": "fits"}
    except Exception as error:  # which one is the question
        row = {"result": f"{type(error).__name__}: {str(error)[:90]}"}
        row["recognized"] = out_of_memory(error)
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    return row


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--case", nargs="+", choices=CASES)
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else "cuda")
    dtype = torch.float32 if options.cpu else torch.float16
    place = Place(options.base, device, dtype, options.resolution, options.steps)
    for name in options.case or (CPU_CASES if options.cpu else CASES):
        case = CASES[name]
        runtime.release_memory()
        if not options.cpu:
            torch.cuda.reset_peak_memory_stats()
        row = measure(case, place) if case.limit_gb is None else run_out(case, place)
        print(json.dumps({"case": name, **row}), flush=True)


if __name__ == "__main__":
    main()
