"""A LoRA written by us is the trained one to whoever reads it: PEFT, diffusers (folder and kohya
file), ourselves."""

from __future__ import annotations

import json
import re
import shutil
from typing import cast

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaman.errors import UserError
from megaman.lora import adapter, peft_config, saving
from megaman.lora import files as lora_files

CONVOLUTIONS = [
    "conv1",
    "conv2",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
LINEAR = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
    "proj_in",
    "proj_out",
]
TARGETS = [*LINEAR, *CONVOLUTIONS]
RANK, ALPHA = 4, 16
TOLERANCE = 1e-5


def fresh_unet(base_folder) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)


@torch.no_grad()
def output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    states = torch.randn(2, 7, width, generator=generator)
    return unet(latents, torch.tensor([10, 700]), encoder_hidden_states=states).sample


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "rsLoRA"])
def trained(base_folder, tmp_path_factory, request):
    """A UNet whose LoRA moved away from zero, its output, the base's own output, and the folder
    written from it."""
    unet = fresh_unet(base_folder)
    before = output(unet)
    torch.manual_seed(0)
    adapter.inject(unet, RANK, ALPHA, TARGETS, use_rslora=request.param, dropout=0.25)
    unet.eval()
    assert torch.equal(output(unet), before), "B is zero, so an untrained LoRA changes nothing"
    with torch.no_grad():
        for name, parameter in adapter.parameters(unet).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("lora") / "lora_weights"
    saving.save_lora(folder, {"unet": unet}, "some/base", {"ss_steps": "12"})
    after = output(unet)
    assert (after - before).abs().max() > 0.05, (
        "the LoRA has to matter, or the comparisons below prove nothing"
    )
    return unet, after, before, folder


def kohya_alpha(unet) -> float:
    """What kohya divides by the rank: rsLoRA's alpha / sqrt(rank) has to come out of that too."""
    return ALPHA * (RANK**0.5 if adapter.get_lora_config(unet).use_rslora else 1)


def difference(unet, wanted: torch.Tensor) -> float:
    return float((output(unet) - wanted).abs().max())


def pipeline(base_folder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base_folder, dtype=torch.float32)


def test_the_folder_holds_the_three_layouts(trained):
    assert {path.name for path in trained[3].iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "megaman_lora.safetensors",
    }


def test_peft_reads_it(trained, base_folder):
    unet = PeftModel.from_pretrained(fresh_unet(base_folder), trained[3])
    assert difference(unet, trained[1]) <= TOLERANCE


def test_diffusers_reads_the_folder(trained, base_folder):
    pipe = pipeline(base_folder)
    pipe.load_lora_weights(trained[3])
    assert difference(pipe.unet, trained[1]) <= TOLERANCE


def test_diffusers_reads_the_kohya_file(trained, base_folder, tmp_path):
    alone = tmp_path / "megaman_lora.safetensors"
    shutil.copy(trained[3] / "megaman_lora.safetensors", alone)
    pipe = pipeline(base_folder)
    pipe.load_lora_weights(alone)
    assert difference(pipe.unet, trained[1]) <= TOLERANCE


def test_an_independent_merge_of_the_kohya_file_gives_the_trained_model(trained, base_folder):
    """W + alpha / rank * up @ down, module by module, as kohya, A1111 and ComfyUI compute it."""
    unet = fresh_unet(base_folder)
    tensors = load_file(trained[3] / "megaman_lora.safetensors")
    layers = {
        "lora_unet_" + name.replace(".", "_"): layer
        for name, layer in unet.named_modules()
        if hasattr(layer, "weight")
    }
    stems = {key.split(".")[0] for key in tensors}
    assert stems <= set(layers)
    with torch.no_grad():
        for stem in stems:
            down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
            scale = tensors[f"{stem}.alpha"].item() / down.shape[0]
            layers[stem].weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(
                layers[stem].weight.shape
            )
    assert difference(unet, trained[1]) <= TOLERANCE


def test_we_read_it(trained, base_folder):
    unet = fresh_unet(base_folder)
    config = lora_files.load_lora(trained[3], unet)
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    assert difference(unet, trained[1]) == 0
    unet.disable_adapters()
    assert difference(unet, trained[2]) == 0
    assert peft_config.base_of(trained[3]) == "some/base"


@pytest.mark.parametrize("name", ["megaman_lora.safetensors", "pytorch_lora_weights.safetensors"])
@pytest.mark.parametrize("alone_in_a_folder", [False, True])
def test_we_read_each_layout_alone(trained, base_folder, tmp_path, name, alone_in_a_folder):
    shutil.copy(trained[3] / name, tmp_path / name)
    unet = fresh_unet(base_folder)
    lora_files.load_lora(tmp_path if alone_in_a_folder else tmp_path / name, unet)
    assert difference(unet, trained[1]) <= TOLERANCE
    assert peft_config.base_of(tmp_path) is None


def test_alpha_stands_in_every_layout(trained):
    folder = trained[3]
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == ALPHA
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.lora_alpha"], told["unet.use_rslora"]) == (
        ALPHA,
        adapter.get_lora_config(trained[0]).use_rslora,
    )
    kohya = load_file(folder / "megaman_lora.safetensors")
    alphas = [tensor for key, tensor in kohya.items() if key.endswith(".alpha")]
    assert len(alphas) == len(kohya) / 3
    assert all(tensor.shape == () and tensor.item() == kohya_alpha(trained[0]) for tensor in alphas)


def test_the_kohya_header_says_what_a1111_needs(trained):
    with safe_open(trained[3] / "megaman_lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["ss_v2"] == "False"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == (
        str(RANK),
        f"{kohya_alpha(trained[0]):g}",
    )
    assert header["ss_steps"] == "12"


def test_saving_again_replaces_the_folder_whole(trained, tmp_path):
    folder = tmp_path / "lora_weights"
    saving.save_lora(folder, {"unet": trained[0]}, "one", {})
    (folder / "stray").write_text("from before")
    saving.save_lora(folder, {"unet": trained[0]}, "some/other", {})
    assert peft_config.base_of(folder) == "some/other"
    assert not (folder / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["lora_weights"]


def test_a_lora_of_another_base_is_refused(trained, base_folder, tmp_path):
    config = {**fresh_unet(base_folder).config, "cross_attention_dim": 64}
    wide = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config))
    before = dict(wide.named_modules()).keys()
    with pytest.raises(UserError, match="another base"):
        lora_files.load_lora(trained[3], wide)
    assert dict(wide.named_modules()).keys() == before


PEFT_EXTRAS = {
    "is a DoRA": ("conv_in.lora_magnitude_vector", (64,)),
    "is a DoRA, not": ("conv_in.lora_magnitude_vector.weight", (64,)),
    "embedding layer": ("conv_in.lora_embedding_A", (4, 64)),
    "whole layer 'conv_in.weight'": ("conv_in.weight", (64, 4, 3, 3)),
    "no PEFT folder": ("conv_in.lora_up.weight", (64, 4)),
    "is no plain LoRA": ("conv_in.lora_E", (64, 1)),
}


@pytest.mark.parametrize("said", PEFT_EXTRAS)
def test_a_peft_folder_that_is_no_plain_lora_says_what_it_is(trained, base_folder, tmp_path, said):
    key, shape = PEFT_EXTRAS[said]
    folder = tmp_path / "lora"
    shutil.copytree(trained[3], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{key}"] = torch.ones(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=re.escape(said)):
        lora_files.load_lora(folder, fresh_unet(base_folder))


def test_a_peft_folder_with_biases_is_read_without_them(trained, base_folder, tmp_path, caplog):
    folder = tmp_path / "lora"
    shutil.copytree(trained[3], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.conv_in.bias"] = torch.ones(64)
    tensors["base_model.model.conv_in.lora_B.bias"] = torch.ones(64)
    save_file(tensors, folder / "adapter_model.safetensors")
    unet = fresh_unet(base_folder)
    with caplog.at_level("INFO"):
        lora_files.load_lora(folder, unet)
    assert difference(unet, trained[1]) <= TOLERANCE
    assert "biases and norms (2 tensors) are ignored" in caplog.text


def test_pefts_file_stands_for_its_folder(trained, base_folder):
    unet = fresh_unet(base_folder)
    lora_files.load_lora(trained[3] / "adapter_model.safetensors", unet)
    assert difference(unet, trained[1]) <= TOLERANCE


@pytest.mark.parametrize("broken", ["missing", "no config", "no weights", "cut weights"])
def test_what_is_no_lora_ends_in_a_line(trained, base_folder, tmp_path, broken):
    folder = tmp_path / "lora"
    if broken != "missing":
        shutil.copytree(trained[3], folder)
    if broken == "no config":
        for name in (
            "adapter_config.json",
            "pytorch_lora_weights.safetensors",
            "megaman_lora.safetensors",
        ):
            (folder / name).unlink()
    if broken == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    if broken == "cut weights":
        content = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=re.escape(str(folder))):
        lora_files.load_lora(folder, fresh_unet(base_folder))


def test_half_precision_files_are_close(trained, base_folder, tmp_path):
    path = tmp_path / "half.safetensors"
    tensors = load_file(trained[3] / "megaman_lora.safetensors")
    save_file({key: tensor.half() for key, tensor in tensors.items()}, path)
    pipe = pipeline(base_folder)
    pipe.load_lora_weights(path)
    assert difference(pipe.unet, trained[1]) < 5e-3


def test_parameters_are_float32_in_a_half_precision_base(base_folder):
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float16)
    trainable = adapter.inject(unet, 2, 2, ["to_q"])
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.float16
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapter.parameters(unet)} == {
        "to_q"
    }


@pytest.mark.parametrize("target", ["to_x", "norm1", "q"])
def test_a_target_that_cannot_be_is_named(base_folder, target):
    with pytest.raises(UserError, match="--target_modules"):
        adapter.inject(fresh_unet(base_folder), 2, 2, ["to_q", target])


# Stable Diffusion 1.5's UNet as in its config.json; the rest are the class's defaults.
SD_15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}


def comfyui_names() -> dict[str, str]:
    """The LoRA names that ComfyUI knows for Stable Diffusion 1.5's UNet, with the layer that each
    is applied to.

    Its rule (comfy/lora.py, comfy/utils.py): a name is lora_unet_ and diffusers' path with
    underscores. The layer's own path counts the blocks of the original network through: in the
    first half a convolution comes before three levels of two blocks and a downsampling, and the
    last level has none; the second half has three blocks a level, of which the third holds the
    upsampling behind the rest. A block is a residual part and, on all levels but the lowest, a
    transformer.
    """
    residual = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    inner = [f"attn1.{part}" for part in parts] + [f"attn2.{part}" for part in parts]
    transformer = ["proj_in", "proj_out"]
    transformer += [
        f"transformer_blocks.0.{part}" for part in (*inner, "ff.net.0.proj", "ff.net.2")
    ]
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }

    def block(ours: str, number: int, theirs: str, attention: bool, first: int = 0) -> None:
        names.update(
            {f"{ours}.resnets.{number}.{a}": f"{theirs}.{first}.{b}" for a, b in residual.items()}
        )
        if attention:
            names.update(
                {
                    f"{ours}.attentions.{number}.{part}": f"{theirs}.{first + 1}.{part}"
                    for part in transformer
                }
            )

    for level in range(4):
        for number in range(2):
            block(
                f"down_blocks.{level}",
                number,
                f"input_blocks.{1 + 3 * level + number}",
                attention=level < 3,
            )
        if level < 3:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * level}.0.op"
        for number in range(3):
            block(
                f"up_blocks.{level}",
                number,
                f"output_blocks.{3 * level + number}",
                attention=level > 0,
            )
        if level < 3:
            names[f"up_blocks.{level}.upsamplers.0.conv"] = (
                f"output_blocks.{2 + 3 * level}.{1 + (level > 0)}.conv"
            )
    block("mid_block", 0, "middle_block", attention=True)
    block("mid_block", 1, "middle_block", attention=False, first=2)
    return {"lora_unet_" + ours.replace(".", "_"): theirs for ours, theirs in names.items()}


def test_comfyui_knows_every_name_of_a_stable_diffusion_15_lora():
    """On the exact configuration, without weights: every layer that can carry a LoRA gets one."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_15)
        everything = [*TARGETS, "linear_1", "linear_2"]
        adapter.inject(unet, RANK, ALPHA, everything)
        tensors = saving.to_kohya(
            {
                "unet": {
                    name: torch.empty_like(tensor)
                    for name, tensor in get_peft_model_state_dict(unet).items()
                }
            },
            {"unet": unet},
        )
    carriers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    known = comfyui_names()
    stems = {key.partition(".")[0] for key in tensors}
    assert (
        len(stems) == len(carriers) == 4 + 16 * 12 + 22 * 3 + 14 + 6
    )  # the ends, transformers, residual parts
    assert {key.partition(".")[2] for key in tensors} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    assert stems <= set(known)
    assert all(
        name.endswith("conv_shortcut") for name in set(known) - stems
    )  # not every residual part has one
    assert len({known[stem] for stem in stems}) == len(stems), "no two LoRAs for one layer"


def test_the_short_hash_is_that_of_the_kohya_file_and_tells_every_part(base_folder, tmp_path):
    """A1111's digits of a whole LoRA; a checkpoint's change with each of its files."""
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)
    adapter.inject(unet, 2, 2, ["to_v"])
    saving.save_lora(tmp_path / "lora", {"unet": unet}, "base", {})
    kohya_file = tmp_path / "lora" / "megaman_lora.safetensors"
    with safe_open(kohya_file, "pt") as file:
        known = file.metadata()["sshs_model_hash"][:12]
    assert lora_files.short_hash(tmp_path / "lora") == lora_files.short_hash(kohya_file) == known
    kohya_file.unlink()
    alone = lora_files.short_hash(tmp_path / "lora")
    part = tmp_path / "lora" / "text_encoder"
    part.mkdir()
    saving.write_tensors(part / "adapter_model.safetensors", {"x": torch.ones(3)})
    assert len({known, alone, lora_files.short_hash(tmp_path / "lora")}) == 3
