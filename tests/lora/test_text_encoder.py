"""--train_text_encoder: the same LoRA in PEFT, diffusers, kohya's file and here; trained, stopped,
short of memory."""

from __future__ import annotations

import json
import shutil
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FEW_TARGETS, ROOT, SAMPLING_STEPS
from diffusers import StableDiffusionPipeline
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_lora_files import ALPHA, RANK, TARGETS, TOLERANCE, fresh_unet, output
from transformers import CLIPTextConfig, CLIPTextModel

from megaman.errors import UserError
from megaman.lora import adapter, saving
from megaman.lora import files as lora_files


def fresh_text_encoder(base_folder) -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(base_folder / "text_encoder", dtype=torch.float32).eval()


@torch.no_grad()
def states(text_encoder) -> torch.Tensor:
    return text_encoder(torch.arange(3, 33).reshape(2, 15))[0]


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "rsLoRA"])
def trained(base_folder, tmp_path_factory, request):
    """UNet and text encoder whose LoRAs moved away from zero, what they say, and the folder written
    from them."""
    models = {"unet": fresh_unet(base_folder), "text_encoder": fresh_text_encoder(base_folder)}
    before = states(models["text_encoder"])
    torch.manual_seed(0)
    for part, targets in (("unet", TARGETS), ("text_encoder", adapter.TEXT_ENCODER_TARGETS)):
        adapter.inject(models[part], RANK, ALPHA, targets, use_rslora=request.param, dropout=0.25)
        models[part].eval()
    assert torch.equal(states(models["text_encoder"]), before), (
        "B is zero, so an untrained LoRA changes nothing"
    )
    with torch.no_grad():
        for model in models.values():
            for name, parameter in adapter.parameters(model).items():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("lora") / "lora_weights"
    saving.save_lora(folder, models, "some/base", {})
    after = states(models["text_encoder"])
    assert (after - before).abs().max() > 0.05, (
        "the LoRA has to matter, or the comparisons below prove nothing"
    )
    return models, output(models["unet"]), after, folder


def assert_same(trained, unet, text_encoder) -> None:
    assert float((output(unet) - trained[1]).abs().max()) <= TOLERANCE
    assert float((states(text_encoder) - trained[2]).abs().max()) <= TOLERANCE


def test_every_linear_layer_of_clip_has_one(trained):
    text_encoder = trained[0]["text_encoder"]
    linear = [module for module in text_encoder.modules() if type(module) is torch.nn.Linear]
    layers = text_encoder.config.num_hidden_layers
    assert len(adapter.parameters(text_encoder)) == 2 * 6 * layers
    assert len(linear) == 3 * 6 * layers, "each layer, its A and its B"


def test_peft_reads_both_folders(trained, base_folder):
    unet = PeftModel.from_pretrained(fresh_unet(base_folder), trained[3])
    text_encoder = PeftModel.from_pretrained(
        fresh_text_encoder(base_folder), trained[3] / "text_encoder"
    )
    assert_same(trained, unet, text_encoder)


@pytest.mark.parametrize(
    "name", ["lora_weights", "megaman_lora.safetensors", "pytorch_lora_weights.safetensors"]
)
def test_diffusers_reads_folder_and_files(trained, base_folder, tmp_path, name):
    path = trained[3] if name == "lora_weights" else tmp_path / name
    if path != trained[3]:
        shutil.copy(trained[3] / name, path)
    pipe = StableDiffusionPipeline.from_pretrained(base_folder, dtype=torch.float32)
    pipe.load_lora_weights(path)
    assert_same(trained, pipe.unet, pipe.text_encoder)


@pytest.mark.parametrize(
    "name", ["lora_weights", "megaman_lora.safetensors", "pytorch_lora_weights.safetensors"]
)
def test_we_read_folder_and_files(trained, base_folder, name):
    path = trained[3] if name == "lora_weights" else trained[3] / name
    unet, text_encoder = fresh_unet(base_folder), fresh_text_encoder(base_folder)
    lora_files.load_loras([(path, 1.0)], unet, text_encoder)
    assert_same(trained, unet, text_encoder)
    with adapter.lora_disabled(text_encoder):
        assert torch.equal(states(text_encoder), states(fresh_text_encoder(base_folder)))


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_peft_folder_around_both_models(trained, base_folder, tmp_path, prefix):
    """PEFT puts unet. and text_encoder. in front if its module holds both models."""
    folder, tensors = tmp_path / "lora", {}
    for part, place in (("unet", trained[3]), ("text_encoder", trained[3] / "text_encoder")):
        for key, tensor in load_file(place / "adapter_model.safetensors").items():
            tensors[f"{prefix}{part}.{key.removeprefix('base_model.model.')}"] = tensor
    config = json.loads((trained[3] / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"unet.conv_in": 2 * ALPHA}
    tensors[f"{prefix}unet.conv_in.lora_B.weight"] /= 2
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    unet, text_encoder = fresh_unet(base_folder), fresh_text_encoder(base_folder)
    lora_files.load_lora(folder, unet, text_encoder)
    assert_same(trained, unet, text_encoder)
    _, has_other = lora_files.read_lora(folder, {"unet": fresh_unet(base_folder)})
    assert has_other, "the text encoder's, which would be dropped"


def test_an_independent_merge_of_the_kohya_file_gives_the_trained_models(trained, base_folder):
    """W + alpha / rank * up @ down by the names that ComfyUI and A1111 match, with no library."""
    unet, text_encoder = fresh_unet(base_folder), fresh_text_encoder(base_folder)
    tensors = load_file(trained[3] / "megaman_lora.safetensors")
    layers = {"lora_unet_" + name.replace(".", "_"): layer for name, layer in unet.named_modules()}
    blocks: list[Any] = list(text_encoder.encoder.layers)
    for number, block in enumerate(blocks):
        for theirs, layer in {
            "self_attn_q_proj": block.self_attn.q_proj,
            "self_attn_k_proj": block.self_attn.k_proj,
            "self_attn_v_proj": block.self_attn.v_proj,
            "self_attn_out_proj": block.self_attn.out_proj,
            "mlp_fc1": block.mlp.fc1,
            "mlp_fc2": block.mlp.fc2,
        }.items():
            layers[f"lora_te_text_model_encoder_layers_{number}_{theirs}"] = layer
    stems = {key.split(".")[0] for key in tensors}
    assert (
        sum(stem.startswith("lora_te_") for stem in stems)
        == 6 * text_encoder.config.num_hidden_layers
    )
    with torch.no_grad():
        for stem in stems:
            down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
            scale = tensors[f"{stem}.alpha"].item() / down.shape[0]
            layers[stem].weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(
                layers[stem].weight.shape
            )
    assert_same(trained, unet, text_encoder)


def test_the_diffusers_header_tells_both_configurations_and_no_path(trained, base_folder):
    with safe_open(trained[3] / "pytorch_lora_weights.safetensors", "pt") as file:
        text, keys = file.metadata()["lora_adapter_metadata"], list(file.keys())
    told = json.loads(text)
    assert (told["text_encoder.r"], told["text_encoder.lora_alpha"]) == (RANK, ALPHA)
    assert (
        told["text_encoder.use_rslora"]
        == told["unet.use_rslora"]
        == adapter.get_lora_config(trained[0]["unet"]).use_rslora
    )
    assert told["text_encoder.lora_dropout"] == 0
    assert any(
        key.startswith("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A")
        for key in keys
    )
    assert str(base_folder) not in text
    content = json.loads(
        (trained[3] / "text_encoder" / "adapter_config.json").read_text(encoding="utf-8")
    )
    assert content["base_model_name_or_path"] == "some/base"


def test_comfyui_knows_every_name_of_a_text_encoder_lora():
    """On the exact configuration of Stable Diffusion 1.5's text encoder, CLIP ViT-L/14, without
    weights.

    ComfyUI's rule (comfy/lora.py, model_lora_keys_clip):
    lora_te_text_model_encoder_layers_{0..31}_{layer}, for the layers below; those that the model
    has.
    """
    layers = [
        "mlp_fc1",
        "mlp_fc2",
        "self_attn_k_proj",
        "self_attn_q_proj",
        "self_attn_v_proj",
        "self_attn_out_proj",
    ]
    known = {
        f"lora_te_text_model_encoder_layers_{number}_{layer}"
        for number, layer in product(range(12), layers)
    }
    with torch.device("meta"):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        adapter.inject(text_encoder, RANK, ALPHA, adapter.TEXT_ENCODER_TARGETS)
        state = get_peft_model_state_dict(text_encoder, save_embedding_layers=False)
        tensors = saving.to_kohya(
            {"text_encoder": {name: torch.empty_like(tensor) for name, tensor in state.items()}},
            {"text_encoder": text_encoder},
        )
    assert {key.partition(".")[0] for key in tensors} == known
    assert len(tensors) == 3 * 72


def test_a_text_encoder_part_that_is_damaged_is_named(trained, base_folder, tmp_path):
    shutil.copytree(trained[3], tmp_path / "lora")
    (tmp_path / "lora" / "text_encoder" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"text_encoder holds no adapter_config\.json"):
        lora_files.load_loras(
            [(tmp_path / "lora", 1.0)], fresh_unet(base_folder), fresh_text_encoder(base_folder)
        )


# Training. A few steps are enough to see what moves.

DATA = ["--data_dir", ROOT / "demo" / "held_out", "--learning_rate", 1e-3, *FEW_TARGETS]
TEXT = ["--train_text_encoder", "--text_encoder_lr", 5e-4]


def text_state(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_encoder" / "adapter_model.safetensors")


def assert_close(one, other, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    apart = {key: float((one[key] - other[key]).abs().max()) for key in one}
    assert max(apart.values()) <= tolerance, max(apart, key=lambda key: apart[key])


def test_a_run_trains_both_and_says_so(train_here, tmp_path, capsys):
    train_here(
        tmp_path,
        "out",
        *DATA,
        *TEXT,
        "--max_train_steps",
        4,
        "--lr_scheduler",
        "linear",
        "--lr_warmup_steps",
        2,
        "--num_validation_images",
        1,
        "--validation_steps",
        2,
    )
    said = capsys.readouterr().out
    assert "linear learning rate up to 0.001 and 0.0005 (text encoder), 2 warm-up" in said
    assert "12 of them in the text encoder" in said
    weights = tmp_path / "out" / "lora_weights"
    moved = [tensor for key, tensor in text_state(weights).items() if "lora_B" in key]
    assert len(moved) == 12 and all(tensor.abs().max() > 0 for tensor in moved)
    (run,) = (tmp_path / "logs-out").iterdir()
    curves = EventAccumulator(str(run)).Reload()
    for tag, peak in (("learning_rate", 1e-3), ("text_encoder_learning_rate", 5e-4)):
        rates = [event.value for event in curves.Scalars(f"train/{tag}")]
        assert rates == pytest.approx([0, peak / 2, peak, peak / 2])
    with safe_open(weights / "megaman_lora.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_unet_lr"], header["ss_text_encoder_lr"]) == ("0.001", "0.0005")
    card = (weights / "README.md").read_text(encoding="utf-8")
    assert (
        "the UNet and the text encoder" in card
        and 'PeftModel.from_pretrained(text_encoder, "text_encoder")' in card
    )
    assert {path.name for path in (tmp_path / "out").glob("samples-*")} == {
        "samples-0",
        "samples-2",
        "samples-4",
    }


def test_the_samples_are_drawn_with_the_text_encoder_in_hand(train_here, base_folder, tmp_path):
    """A checkpoint generates elsewhere what the run generated, up to rounding."""
    from PIL import Image, ImageChops

    from megaman.models.base import load_base
    from megaman.models.text_encoding import encode_captions
    from megaman.sampling import denoise

    train_here(
        tmp_path,
        "out",
        *DATA,
        "--train_text_encoder",
        "--text_encoder_lr",
        2e-2,
        "--max_train_steps",
        4,
        "--num_validation_images",
        1,
        "--validation_prompt",
        "volto, robot",
        "--lora_dropout",
        0.2,
    )

    def drawn(with_text: bool):
        base = load_base(str(base_folder), torch.float32)
        lora_files.load_loras(
            [(tmp_path / "out" / "checkpoint-4", 1.0)], base.unet, base.text_encoder
        )
        adapter.set_scales([base.text_encoder], {0: float(with_text)})
        said = encode_captions(base.text_encoder, base.tokenizer, ["volto, robot", ""])
        text, empty = (said[words][None] for words in ("volto, robot", ""))
        settings = denoise.SamplingSettings(64, 64, SAMPLING_STEPS, guidance_scale=7.5)
        embeds = denoise.PromptEmbeds(text, empty)
        return denoise.generate_images(base, embeds, [0], settings)[0]

    theirs = Image.open(tmp_path / "out" / "samples-4" / "00.png").convert("RGB")
    extremes = [
        np.asarray(ImageChops.difference(theirs, drawn(with_text))).max()
        for with_text in (True, False)
    ]
    assert extremes[0] <= 2 and extremes[1] > 10


@pytest.fixture(scope="module")
def plain(train_here, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The text encoder's LoRA of a run without further flags."""
    folder = tmp_path_factory.mktemp("plain")
    train_here(folder, "out", *DATA, *TEXT, "--max_train_steps", 2)
    return text_state(folder / "out" / "lora_weights")


@pytest.mark.parametrize(
    "flags",
    [
        ["--text_encoder_lr", 1e-4],
        ["--lora_dropout", 0.5],
        ["--use_rslora"],
        ["--mixed_precision", "bf16"],
        ["--lora_rank", 2],
    ],
    ids=str,
)
def test_a_flag_changes_the_text_encoder_too(train_here, plain, tmp_path, flags):
    train_here(tmp_path, "other", *DATA, *TEXT, "--max_train_steps", 2, *flags)
    other = text_state(tmp_path / "other" / "lora_weights")
    assert any(
        plain[key].shape != other[key].shape or not torch.equal(plain[key], other[key])
        for key in plain
    )
    assert all(torch.isfinite(tensor).all() for tensor in other.values())


def test_clipping_is_over_all_of_it(train_here, tmp_path):
    """With a norm far below Adam's epsilon the steps vanish in the text encoder as well."""
    train_here(tmp_path, "out", *DATA, *TEXT, "--max_train_steps", 2, "--max_grad_norm", 1e-12)
    state = text_state(tmp_path / "out" / "lora_weights")
    assert max(float(tensor.abs().max()) for key, tensor in state.items() if "lora_B" in key) < 1e-6


def test_gradient_checkpointing_and_the_split_change_nothing_but_rounding(train_here, tmp_path):
    smooth = [*DATA, *TEXT, "--max_train_steps", 2, "--adam_epsilon", 1e-2]
    train_here(tmp_path, "whole", *smooth, "--train_batch_size", 4)
    train_here(
        tmp_path,
        "split",
        *smooth,
        "--train_batch_size",
        2,
        "--gradient_accumulation_steps",
        2,
        "--gradient_checkpointing",
    )
    whole, split = (text_state(tmp_path / name / "lora_weights") for name in ("whole", "split"))
    assert max(float(tensor.abs().max()) for key, tensor in whole.items() if "lora_B" in key) > 0
    assert_close(whole, split, 1e-7)


def test_gradient_checkpointing_reaches_the_text_encoder(train_here, tmp_path, monkeypatch):
    calls = []
    forward = CLIPTextModel.forward

    def counting(self, *args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(self.is_activation_checkpointing and self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", counting)
    train_here(tmp_path, "out", *DATA, *TEXT, "--max_train_steps", 1, "--gradient_checkpointing")
    assert calls == [True]


def test_resumed_equals_undisturbed(train_here, tmp_path):
    flags = [
        *DATA,
        *TEXT,
        "--lora_dropout",
        0.3,
        "--gradient_accumulation_steps",
        2,
        "--save_steps",
        2,
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        1,
        "--max_train_steps",
        3,
    ]
    train_here(tmp_path, "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "lora_weights")
    shutil.rmtree(tmp_path / "halves" / "checkpoint-3")
    train_here(tmp_path, "halves", *flags, "--resume_from_checkpoint", "latest")
    whole, halves = (tmp_path / name / "checkpoint-3" for name in ("whole", "halves"))
    assert_close(text_state(whole), text_state(halves))
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert_close(load_file(whole / file), load_file(halves / file))
    moments = load_file(whole / "optimizer.safetensors")
    assert any(
        key.startswith("text_encoder.encoder.layers.0.") and key.endswith(":exp_avg_sq")
        for key in moments
    )


@pytest.mark.parametrize("before", [True, False])
def test_a_resume_with_or_without_it_is_refused_by_name(train_here, tmp_path, before):
    train_here(
        tmp_path,
        "out",
        *DATA,
        *(["--train_text_encoder"] if before else []),
        "--max_train_steps",
        1,
    )
    again = [*DATA, *([] if before else ["--train_text_encoder"]), "--max_train_steps", 2]
    state = tmp_path / "out" / "checkpoint-1" / "training_state.json"
    if not before:  # as a checkpoint says it that was written before there was the flag
        content = json.loads(state.read_text(encoding="utf-8"))
        del content["settings"]["train_text_encoder"]
        state.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=f"train_text_encoder was {before} and is now {not before}"):
        train_here(tmp_path, "out", *again, "--resume_from_checkpoint", "latest")


def test_too_little_memory_keeps_the_effective_batch(train_here, tmp_path, monkeypatch, capsys):
    flags = [*DATA, *TEXT, "--max_train_steps", 2, "--train_batch_size", 4]
    train_here(tmp_path, "whole", *flags)
    real, calls = CLIPTextModel.forward, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory (on purpose)")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", failing)
    train_here(tmp_path, "short", *flags)
    said = capsys.readouterr().out
    assert "gradient checkpointing is on" in said and "2 micro-batches of 2" in said
    whole, short = (text_state(tmp_path / name / "lora_weights") for name in ("whole", "short"))
    assert_close(whole, short, 1e-4)
