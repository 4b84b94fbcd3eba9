"""A run is repeated from the training_config.json that it left."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import megaman_lora


@pytest.mark.slow
def test_a_run_is_repeated_bit_for_bit(train_here, pictures, tmp_path, monkeypatch):
    """With a random seed, and with defaults that depend on which flags were typed."""
    from accelerate.state import AcceleratorState, GradientState

    flags = ["--data_dir", pictures, "--max_train_steps", 12, "--lr_scheduler", "cosine"]
    tensors = train_here(tmp_path, "out", *flags, "--mixed_precision", "no")
    record = json.loads((tmp_path / "out" / "training_config.json").read_text(encoding="utf-8"))
    assert "lr_warmup_steps" not in record["explicit"] and record["warmup_steps"] == 1
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "out/training_config.json", "--output_dir", "again"]
    assert megaman_lora.main(argv) == 0
    again = load_file("again/lora_weights/adapter_model.safetensors")
    assert all(again[key].equal(tensor) for key, tensor in tensors.items())
    repeated = json.loads((tmp_path / "again" / "training_config.json").read_text(encoding="utf-8"))
    assert repeated["warmup_steps"] == 1
    assert set(repeated["explicit"]) == {*record["explicit"], "config"}
