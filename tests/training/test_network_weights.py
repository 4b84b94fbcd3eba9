"""--network_weights: a run begins with the effect of a LoRA; --save_every_n_epochs on the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import FEW_TARGETS
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from megaman.config.learning_settings import LoraConfig
from megaman.errors import UserError
from megaman.lora import adapter, saving
from megaman.lora import files as lora_files
from megaman.training.network_weights import FirstWeights

TARGETS = ("to_q", "to_v", "conv1")


def make_unet(base_folder: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", use_safetensors=True)
    return unet.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def first(base_folder, tmp_path_factory) -> Path:
    """A LoRA of rank 2 and alpha 6 whose B is not zero, in all layouts."""
    unet = make_unet(base_folder)
    torch.manual_seed(0)
    adapter.inject(unet, 2, 6, TARGETS)
    with torch.no_grad():
        for name, parameter in adapter.parameters(unet).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("first") / "lora_weights"
    saving.save_lora(folder, {"unet": unet}, "base", {})
    return folder


def deltas(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """What the LoRA adds to the weight of each layer."""
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def begun(base_folder: Path, path: Path, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The deltas with which a run of this config begins."""
    unet = make_unet(base_folder)
    weights = FirstWeights.read(config, {"unet": unet})
    adapter.inject(
        unet, config.lora_rank, config.lora_alpha, config.target_modules, config.use_rslora
    )
    weights.apply({"unet": unet})
    return deltas(unet)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", "megaman_lora.safetensors"])
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 6.0, False), (4, 32.0, True)])
def test_it_begins_with_the_loras_effect(base_folder, first, file, rank, alpha, rslora):
    unet = make_unet(base_folder)
    lora_files.load_lora(first, unet)
    expected = deltas(unet)
    config = LoraConfig(
        lora_rank=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=(*TARGETS, "to_k"),
        network_weights=str(first / file),
    )
    found = begun(base_folder, first, config)
    assert len(expected) == len([name for name in found if not name.endswith("to_k")])
    for name, delta in found.items():
        wanted = expected.get(name, torch.zeros_like(delta))
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-6)


def refusal(base_folder: Path, path: Path, **settings) -> str:
    values = {"lora_rank": 4, "target_modules": TARGETS, **settings}
    config = LoraConfig(network_weights=str(path), **values)
    with pytest.raises(UserError) as refused:
        FirstWeights.read(config, {"unet": make_unet(base_folder)})
    return str(refused.value)


def test_what_would_lose_part_of_it_is_refused(base_folder, first):
    assert "has rank 2, above --lora_rank 1. Add --lora_rank 2" in refusal(
        base_folder, first, lora_rank=1
    )
    line = refusal(base_folder, first, target_modules=("to_q",))
    assert "not among --target_modules. Add to_v, conv1 to these" in line


def test_a_lora_for_another_base_is_refused(base_folder, tmp_path):
    for key in ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", "lora_te2_x"):
        tensors = {
            f"{key}.lora_down.weight": torch.ones(2, 640),
            f"{key}.lora_up.weight": torch.ones(640, 2),
        }
        save_file(tensors, tmp_path / "xl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
        line = refusal(base_folder, tmp_path / "xl.safetensors")
        assert "SDXL" in line and line.endswith("Name a LoRA for this base in --network_weights")
    assert "--network_weights: There is no LoRA at" in refusal(base_folder, tmp_path / "none")


def test_a_text_encoders_half_is_skipped_with_a_line(base_folder, first, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors = load_file(first / "megaman_lora.safetensors")
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors[f"{layer}.lora_down.weight"] = torch.ones(2, 8)
    tensors[f"{layer}.lora_up.weight"] = torch.ones(8, 2)
    save_file(tensors, tmp_path / "both.safetensors")
    config = LoraConfig(
        lora_rank=2, target_modules=TARGETS, network_weights=str(tmp_path / "both.safetensors")
    )
    weights = FirstWeights.read(config, {"unet": make_unet(base_folder)})
    assert list(weights.loras) == ["unet"]
    assert "its LoRA for the text encoder is skipped; --train_text_encoder" in caplog.text


@pytest.mark.slow
def test_a_run_begins_from_another_and_saves_by_epochs(train_here, pictures, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--data_dir", pictures, *FEW_TARGETS, "--train_batch_size", 2]
    one = train_here(tmp_path, "one", *flags, "--max_train_steps", 1)
    epochs = ["--num_train_epochs", 2, "--save_every_n_epochs", 1, "--validation_epochs", 1]
    begin = ["--network_weights", tmp_path / "one" / "lora_weights", "--learning_rate", 1e-12]
    two = train_here(tmp_path, "two", *flags, *epochs, *begin)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-9)
    assert {path.name for path in (tmp_path / "two").glob("checkpoint-*")} == {
        "checkpoint-2", "checkpoint-4"
    }  # fmt: skip
    record = json.loads((tmp_path / "two" / "training_config.json").read_text(encoding="utf-8"))
    assert record["total_steps"] == 4
    assert "a checkpoint every 2 steps" in caplog.text
