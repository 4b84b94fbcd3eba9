"""fp16 training with a loss scaler, as on a GPU, on a CPU: accelerate allows it there to nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from megaman import runtime
from megaman.training import run


def install(
    monkeypatch: pytest.MonkeyPatch, init_scale: float, growth_interval: int = 2000
) -> list[torch.amp.GradScaler]:
    """Let training compute in fp16 from here on; returns the list of the runs' loss scalers."""
    scalers: list[torch.amp.GradScaler] = []
    start_accelerator = run._start_accelerator

    def start_in_fp16(compute) -> Accelerator:
        accelerator = start_accelerator(replace(compute, mixed_precision="bf16"))
        accelerator.state._mixed_precision = "fp16"
        scalers.append(
            torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
        )
        accelerator.scaler = scalers[-1]
        return accelerator

    monkeypatch.setattr(runtime, "precision", lambda *_: ("fp16", "fp16 for a test"))
    monkeypatch.setattr(run, "_start_accelerator", start_in_fp16)
    return scalers
