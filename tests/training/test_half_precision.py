"""fp16 with its loss scaler, which no CPU uses by itself (see half_on_cpu.py)."""

from __future__ import annotations

import json
from pathlib import Path

import half_on_cpu
import torch
from conftest import FEW_TARGETS, ROOT
from safetensors.torch import load_file

from megaman.training.optimizer_state import TENSORS

FLAGS = ["--data_dir", ROOT / "demo" / "held_out", "--learning_rate", 1e-3, "--resolution", 32]
FLAGS += ["--max_train_steps", 8, "--save_steps", 4, *FEW_TARGETS]


def saved_scaler(checkpoint: Path) -> dict:
    state = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
    return state["scaler"]


def steps_taken(checkpoint: Path) -> float:
    """AdamW's own count."""
    tensors = load_file(checkpoint / TENSORS)
    (count,) = {float(value) for key, value in tensors.items() if key.endswith(":step")}
    return count


def test_the_loss_scale_falls_and_grows_and_is_resumed(train_here, tmp_path, monkeypatch, capsys):
    """It starts far too high and may grow after two good steps."""
    scalers = half_on_cpu.install(monkeypatch, init_scale=2.0**23, growth_interval=2)
    whole = train_here(tmp_path, "out", *FLAGS)
    printed = capsys.readouterr().out
    output = tmp_path / "out"
    half_way, end = saved_scaler(output / "checkpoint-4"), saved_scaler(output / "checkpoint-8")

    assert half_way["scale"] < 2**23, "it fell"
    lines = [line for line in printed.splitlines() if "skipped" in line]
    assert lines[0].startswith("step 1") and "which is usual" in lines[0]
    assert "not finite" not in printed
    skipped = int(lines[-1].split()[-4])
    assert 0 < steps_taken(output / "checkpoint-8") == 8 - skipped, "and the rest are taken"
    assert end["scale"] > 2.0**23 / 2**skipped, "it grew in between"
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}

    (output / "lora_weights").rename(tmp_path / "before")
    resumed = train_here(tmp_path, "out", *FLAGS, "--resume_from_checkpoint", "checkpoint-4")
    assert scalers[1].state_dict() == end == saved_scaler(output / "checkpoint-8")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
