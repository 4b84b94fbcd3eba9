"""Stable Diffusion 1.5 in one file: the exact names and shapes, the same models as from a folder,
the rest refused."""

from __future__ import annotations

import json
import re
import shutil
import socket
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import FEW_TARGETS, ROOT
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.errors import UserError
from megaman.lora import peft_config
from megaman.models import single_file
from megaman.models.base import Base, find_base, load_base, vae_identity
from megaman.models.configs import resolve_name
from megaman.models.typed import decode_latents, encode_pixels, scheduler_config

# Published sizes, and smaller ones for tests that do not depend on the size.
FULL = {
    "channels": (320, 640, 1280, 1280),
    "vae_channels": (128, 256, 512, 512),
    "width": 768,
    "layers": 12,
}
SMALL = {"channels": (32, 64, 64, 64), "vae_channels": (32, 32, 64, 64), "width": 64, "layers": 2}

PUBLISHED_SCHEDULE = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
UNET, VAE, TEXT = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
)


def models(channels, vae_channels, width, layers) -> dict[str, Any]:
    """The three models by the arguments that the libraries' own converter gives for
    v1-inference.yaml."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=width, attention_head_dim=8, block_out_channels=channels
    )
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=vae_channels,
        down_block_types=cast(Any, ("DownEncoderBlock2D",) * 4),
        up_block_types=cast(Any, ("UpDecoderBlock2D",) * 4),
        layers_per_block=2,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=2,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}


# The names of the authors' code, from the modules in CompVis's ldm/modules/diffusionmodules:
# openaimodel.py, model.py.

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_WORDS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "resnets": "block",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_name(name: str) -> str:
    """Where a UNet's tensor stands in the original: three places of input_blocks and of
    output_blocks a level."""
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.?(\d?)\.(\w+)\.(\d)\.(.+)", name)
    assert match
    block, level, what, number, rest = match.groups()
    at = 3 * int(level or 0) + int(number)
    if what == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op.{kind}"
    if what == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.{1 if level == '0' else 2}.conv.{kind}"
    place = {
        "down_blocks": f"input_blocks.{at + 1}.{int(what == 'attentions')}",
        "up_blocks": f"output_blocks.{at}.{int(what == 'attentions')}",
        "mid_block": f"middle_block.{1 if what == 'attentions' else 2 * int(number)}",
    }[block]
    return (
        f"{place}.{RESNET[rest.rpartition('.')[0]]}.{kind}"
        if what == "resnets"
        else f"{place}.{rest}"
    )


def vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(
        r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", name
    )  # numbered from the image's side
    for word, original in VAE_WORDS.items():
        name = re.sub(
            rf"(?<![\w.]){re.escape(word)}\.|\.{re.escape(word)}\.", f".{original}.", name
        )
    return name


def original(
    parts: dict[str, dict[str, torch.Tensor]], text_model: str = "text_model."
) -> dict[str, torch.Tensor]:
    """The three models' tensors in the layout of the authors' code, with 1x1 convolutions for the
    VAE's attention."""
    tensors = {
        f"model.diffusion_model.{unet_name(name)}": tensor for name, tensor in parts["unet"].items()
    }
    for name, tensor in parts["vae"].items():
        as_convolution = "attentions" in name and tensor.ndim == 2
        tensors[f"first_stage_model.{vae_name(name)}"] = (
            tensor[:, :, None, None] if as_convolution else tensor
        )
    for name, tensor in parts["text_encoder"].items():
        tensors[f"cond_stage_model.transformer.{text_model}{name.removeprefix('text_model.')}"] = (
            tensor
        )
    positions = f"cond_stage_model.transformer.{text_model}embeddings.position_ids"
    return {
        **tensors,
        positions: torch.arange(77)[None],
        "betas": torch.zeros(1000),
        "logvar": torch.zeros(1000),
    }


def some_numbers(parts: dict[str, Any], dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """Different values for every tensor: pieces of one row, since 10^9 random numbers are slow and
    take 2 GB."""
    row = (
        torch.randn(
            40_000_000 if parts["unet"].config.cross_attention_dim == 768 else 4_000_000,
            generator=torch.Generator().manual_seed(0),
        )
        .mul_(0.03)
        .to(dtype)
    )
    filled, begin = {}, 0
    for part, model in parts.items():
        filled[part] = {}
        for name, tensor in model.state_dict().items():
            begin = (begin + 7919) % (len(row) - tensor.numel())
            filled[part][name] = row[begin : begin + tensor.numel()].reshape(tensor.shape)
    return filled


def write_folder(
    folder: Path, parts: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]
) -> Path:
    """The same base in diffusers' layout."""
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / part).mkdir(parents=True)
        save_file(tensors[part], folder / part / f"{file}.safetensors", {"format": "pt"})
        if part == "text_encoder":
            parts[part].config.save_pretrained(folder / part)
        else:
            parts[part].save_config(folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULE))
    single_file.tokenizer().save_pretrained(folder / "tokenizer")
    shutil.copy(ROOT / "demo" / "base" / "model_index.json", folder)
    return folder


@torch.no_grad()
def say(base: Base) -> list[torch.Tensor]:
    """What the three models make of the same input."""
    latents, pixels = (
        torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(channels))
        for channels in (4, 3)
    )
    ids = base.tokenizer("a robot", padding="max_length", return_tensors="pt").input_ids
    states = base.text_encoder(ids)[0]
    noise = base.unet(
        latents.to(base.unet.dtype), torch.tensor([300]), encoder_hidden_states=states
    ).sample
    moments = encode_pixels(base.vae, pixels).parameters
    said = [states, noise, moments, decode_latents(base.vae, latents)]
    assert all(answer.isfinite().all() and answer.std() > 0 for answer in said)
    return said


def configurations(base: Base) -> list[dict]:
    """The parts' configurations without notes on where they come from."""
    configs = [dict(part.config) for part in (base.unet, base.vae, base.noise_scheduler)] + [
        base.text_encoder.config.to_dict()
    ]
    foreign = {
        "_name_or_path",
        "_class_name",
        "_use_default_values",
        "_diffusers_version",
        "architectures",
        "dtype",
    }
    own = [
        {key: value for key, value in config.items() if key not in foreign} for config in configs
    ]
    return json.loads(json.dumps(own))


@pytest.fixture(scope="module")
def full_names() -> dict[str, torch.Tensor]:
    """The exact set of names, with shapes alone."""
    with torch.device("meta"):
        return original({part: model.state_dict() for part, model in models(**FULL).items()})


def test_the_rules_give_the_published_names(full_names):
    """Some that are easy to get wrong, and how many there are in v1-5-pruned-emaonly.safetensors of
    each part."""
    for key, shape in {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.middle_block.2.out_layers.3.bias": (1280,),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.mid.attn_1.proj_out.bias": (512,),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.norm_out.weight": (128,),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    }.items():
        assert full_names[key].shape == shape, key
    starts = ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."]
    assert [sum(key.startswith(start) for key in full_names) for start in starts] == [686, 248, 197]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, one tensor after the other, so that none is in memory twice."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().data)


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In a third of the time that 10^9 comparisons of halves take."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.slow(weight=10)
def test_a_whole_checkpoint_loads_as_its_folder_does(tmp_path):
    """In its full size, fp16: every tensor, and the configurations. What the models make of them is
    compared below, on smaller ones."""
    with torch.device("meta"):
        parts = models(**FULL)
    tensors = some_numbers(parts, torch.float16)
    file = tmp_path / "v1-5-pruned-emaonly.safetensors"
    try:
        write_tensors(file, original(tensors))  # 2 GB
        base = load_base(str(file), torch.float16)
        assert base.unet.dtype == base.text_encoder.dtype == torch.float16
        assert base.vae.dtype == torch.float32
        assert (base.native_size, base.vae_scale_factor) == (512, 8)
        for part, wanted in tensors.items():
            found = getattr(base, part).state_dict()
            assert found.keys() == wanted.keys()
            assert all(
                equal_bits(found[name], wanted[name].to(found[name].dtype)) for name in wanted
            )
        schedule = DDPMScheduler.from_config(PUBLISHED_SCHEDULE)
        published = SimpleNamespace(**parts, noise_scheduler=schedule)
        assert configurations(base) == configurations(cast(Base, published))
    finally:
        file.unlink(missing_ok=True)


# The rest on a smaller model: the same names and the same way, with sizes of its own in the place
# of sd15/.


@pytest.fixture
def small(tmp_path, monkeypatch) -> Small:
    monkeypatch.setattr(single_file, "SD15", tmp_path / "sd15")
    return Small(tmp_path)


@cache
def small_models() -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Modules without numbers, and numbers for them; nothing here changes either."""
    with torch.device("meta"):
        parts = models(**SMALL)
    tensors = some_numbers(parts, torch.float32)
    for numbers in tensors.values():  # each in memory of its own, as save_file wants it
        numbers.update({name: tensor.clone() for name, tensor in numbers.items()})
    return parts, tensors


class Small:
    """A small base in one file at small.file, which write() writes."""

    def __init__(self, folder: Path):
        self.parts, self.numbers = small_models()
        self.folder, self.file = folder, folder / "models" / "tiny-v1.safetensors"
        self.file.parent.mkdir()
        shutil.copytree(ROOT / "megaman" / "models" / "sd15", folder / "sd15")
        for part, model in self.parts.items():
            config = model.config.to_dict() if part == "text_encoder" else dict(model.config)
            (folder / "sd15" / f"{part}.json").write_text(json.dumps(config))

    def write(
        self, dtype=torch.float32, text_model="text_model.", more=None, metadata=None, without=()
    ) -> Path:
        tensors = {**original(self.numbers, text_model), **(more or {})}
        kept = {key: value for key, value in tensors.items() if key not in without}
        save_file({key: value.to(dtype) for key, value in kept.items()}, self.file, metadata)
        return self.file

    def differs(self, base: Base) -> float:
        """How far the base's tensors are from those written."""
        differences = []
        for part in self.parts:
            for name, value in getattr(base, part).state_dict().items():
                differences.append(float((value.float() - self.numbers[part][name]).abs().max()))
        return max(differences)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("text_model", ["text_model.", ""])
def test_every_number_format_and_both_names_of_the_text_encoder(small, dtype, text_model):
    base = load_base(str(small.write(dtype, text_model)), torch.float32)
    assert (
        small.differs(base)
        <= {torch.float32: 0, torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float8_e4m3fn: 0.01}[
            dtype
        ]
    )
    for part in (base.unet, base.vae, base.text_encoder):
        assert part.dtype == torch.float32 and not part.training
        assert not any(tensor.requires_grad or tensor.is_meta for tensor in part.parameters())
        assert not any(tensor.is_meta for tensor in part.buffers())
    say(base)


def test_the_vae_is_known_again_in_a_folder(small):
    file, folder = small.write(), write_folder(small.folder / "folder", small.parts, small.numbers)
    one, other = (load_base(str(path), torch.float32) for path in (file, folder))
    assert vae_identity(one.vae) == vae_identity(other.vae)
    assert one.vae_files() == [file]


def test_half_precision_spares_the_vae(small):
    base = load_base(str(small.write(torch.float16)), torch.bfloat16)
    assert (base.unet.dtype, base.text_encoder.dtype, base.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_the_vaes_attention_may_be_linear(small):
    linear = {
        key: value[:, :, 0, 0]
        for key, value in original(small.numbers).items()
        if ".mid.attn_1." in key and value.ndim == 4
    }
    assert len(linear) == 8
    assert small.differs(load_base(str(small.write(more=linear)), torch.float32)) == 0


def test_averaged_weights_beside_the_others_are_not_used(small):
    """The names that the authors' code gives them: no dots."""
    averaged = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): torch.full_like(value, 9)
        for key, value in original(small.numbers).items()
        if key.startswith(UNET)
    }
    more = {
        **averaged,
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
    }
    assert len(averaged) > 600
    assert small.differs(load_base(str(small.write(more=more)), torch.float32)) == 0


def test_the_file_may_go_once_it_is_loaded(small):
    base = load_base(str(small.write()), torch.float32)
    loaded = base.unet, base.vae, base.text_encoder
    with open(small.file, "rb+") as file:
        file.write(bytes(small.file.stat().st_size))
    assert small.differs(base) == 0 and loaded == (base.unet, base.vae, base.text_encoder)
    base.release("unet", "vae", "text_encoder")
    with pytest.raises(
        UserError, match=r"tiny-v1\.safetensors is gone or has changed since the start"
    ):
        small.differs(base)


def test_a_header_that_tells_of_velocities(small):
    for told, wanted in (
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({}, "epsilon"),
        (None, "epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ):
        small.write(metadata=told)
        scheduler = load_base(str(small.file), torch.float32).noise_scheduler
        assert scheduler_config(scheduler).prediction_type == wanted


def test_nothing_is_asked_of_the_network(small, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda _, where: asked.append(where))
    load_base(str(small.write()), torch.float32)
    assert asked == []


# Names.


def test_where_a_file_is_found(small, monkeypatch):
    small.write()
    monkeypatch.chdir(small.folder)
    assert resolve_name("models/tiny-v1.safetensors") == str(small.file.resolve())
    assert find_base("models/tiny-v1.safetensors", half=False).samefile(small.file)
    assert find_base(resolve_name("models/tiny-v1.safetensors"), half=False).samefile(small.file)


def test_a_link_keeps_its_name(small):
    """As the hub's cache has them: what they lead to is a hash without an ending."""
    hidden = small.write().rename(small.folder / "6ce0161689b3853acaa03779ec93eafe")
    small.file.symlink_to(hidden)
    assert resolve_name(str(small.file)) == str(small.file.parent.resolve() / small.file.name)
    assert load_base(resolve_name(str(small.file)), torch.float32).native_size == 512


@pytest.mark.parametrize(
    "name",
    ["models/none.safetensors", "/none/x.safetensors", "none.SAFETENSORS", "./a.safetensors"],
)
def test_a_file_that_is_not_there(name):
    with pytest.raises(
        UserError, match=f"There is no file {re.escape(name)}.*Name a folder.*--demo"
    ):
        load_base(name, torch.float32)


def test_a_lora_may_name_a_file_as_its_base(small, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()

    def base_named(name: str) -> str | None:
        (folder / peft_config.PEFT_CONFIG).write_text(json.dumps({"base_model_name_or_path": name}))
        return peft_config.base_of(folder)

    small.write()
    assert base_named(str(small.file)) == str(small.file)
    with pytest.raises(UserError, match="--base_model"):
        base_named(
            f"/{small.file}"
        )  # a second slash makes the name of another machine of it, on Windows
    small.file.rename(pickle := small.file.with_suffix(".ckpt"))
    for name in (
        str(small.file),
        str(pickle),
        "/dev/null",
        "//host/x.safetensors",
        "\\\\host\\x.safetensors",
    ):
        with pytest.raises(UserError, match="--base_model"):
            base_named(name)


def test_from_training_to_images_with_the_file_alone(small, train_here, monkeypatch):
    """Both scripts; generation finds the base by what the LoRA notes."""
    import generate_megaman

    small.write(torch.float16)
    flags = [
        "--pretrained_model_name",
        small.file,
        "--data_dir",
        ROOT / "demo" / "held_out",
        "--max_train_steps",
        1,
    ]
    flags += ["--resolution", 32, "--mixed_precision", "no", *FEW_TARGETS]
    train_here(small.folder, "out", *flags)
    lora = small.folder / "out" / "lora_weights"
    config = json.loads((lora / peft_config.PEFT_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(small.file.resolve())
    with safe_open(lora / "megaman_lora.safetensors", framework="pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "tiny-v1.safetensors"
    card = (lora / "README.md").read_text(encoding="utf-8")
    assert "# A LoRA for `tiny-v1.safetensors`" in card
    assert 'StableDiffusionPipeline.from_single_file("PATH/TO/tiny-v1.safetensors")' in card
    assert str(small.folder) not in card and "base_model:" not in card
    monkeypatch.chdir(small.folder)
    words = [
        "--lora_path",
        lora,
        "--prompts",
        "a robot",
        "--num_inference_steps",
        2,
        "--height",
        64,
        "--width",
        64,
    ]
    assert generate_megaman.main([*map(str, words), "--output_dir", "drawn"]) == 0
    [drawn] = (small.folder / "drawn").glob("megaman_*.png")
    with Image.open(drawn) as image:
        assert image.size == (64, 64)
        assert "Model: tiny-v1," in image.info["parameters"]


# What is refused.


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_base(str(path), torch.float32)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and len(line) < 500 + 2 * len(str(path))
    return line


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


READS = "transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "is Stable Diffusion 2.x, not Stable Diffusion 1.x": {
        f"{UNET}input_blocks.1.1.{READS}": zeros(320, 1024),
        "cond_stage_model.model.ln_final.bias": zeros(8),
    },
    "is Stable Diffusion 2.x, not": {f"{UNET}input_blocks.1.1.{READS}": zeros(320, 1024)},
    "is SDXL, not Stable Diffusion 1.x": {
        f"{UNET}input_blocks.4.1.{READS}": zeros(64, 64),
        "conditioner.embedders.1.model.logit_scale": zeros(1),
    },
    "is SDXL, not": {
        f"{UNET}input_blocks.4.1.{READS}": zeros(640, 2048),
        f"{VAE}quant_conv.bias": zeros(8),
    },
    "is Flux, not": {f"{UNET}double_blocks.0.img_attn.qkv.weight": zeros(6, 2)},
    "is Flux, not Stable Diffusion 1.x": {"double_blocks.0.img_attn.qkv.weight": zeros(6, 2)},
    "is Stable Diffusion 3, not": {f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": zeros(6, 2)},
    "is a ControlNet, not": {"control_model.input_blocks.0.0.weight": zeros(320, 4, 3, 3)},
    "is for inpainting or editing (9 input channels)": {
        f"{UNET}input_blocks.0.0.weight": zeros(320, 9, 3, 3)
    },
    "is for inpainting or editing (8 input channels)": {
        f"{UNET}input_blocks.0.0.weight": zeros(320, 8, 3, 3)
    },
    "is a LoRA, no base. Name it in --lora_path": {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": zeros(4, 320)
    },
    "is a LoRA for SDXL, no base": {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": zeros(8, 4)
    },
    "is a LoRA, no base": {
        "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": zeros(4, 320)
    },
    "is a VAE alone, no base": {
        "encoder.conv_in.weight": zeros(128, 3, 3, 3),
        "quant_conv.bias": zeros(8),
    },
    "is a VAE alone": {"first_stage_model.quant_conv.bias": zeros(8)},
    "is one part of a base in diffusers' layout. Name the folder": {
        "down_blocks.0.resnets.0.conv1.bias": zeros(320)
    },
    "is no Stable Diffusion 1.x: it holds 'emb_params'": {"emb_params": zeros(4, 768)},
    "is no Stable Diffusion 1.x: it is empty": {},
    "UNet2DConditionModel's conv_in.weight is 64x8x3x3 instead of 320x4x3x3": {
        f"{UNET}input_blocks.0.0.weight": zeros(64, 8, 3, 3)
    },
    "is no Stable Diffusion 1.x: UNet2DConditionModel's conv_in.weight is one number instead of": {
        f"{UNET}input_blocks.0.0.weight": torch.tensor(1.0)
    },
    "UNet2DConditionModel's conv_in.weight is 320x4x3x3 of whole numbers": {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3, dtype=torch.int8)
    },
    "is incomplete: UNet2DConditionModel lacks conv_in.weight": {
        f"{UNET}input_blocks.0.0.bias": zeros(320)
    },
}


@pytest.mark.parametrize("said", OTHERS)
def test_other_files_are_refused_by_their_name(tmp_path, said):
    save_file(OTHERS[said], tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")


def test_what_a_header_says_of_another_model(small):
    small.write(metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    assert "is SDXL, not Stable Diffusion 1.x" in refusal(small.file)


def test_a_part_of_the_embedded_base_is_no_base(base_folder):
    line = refusal(base_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "one part of a base in diffusers' layout. Name the folder with model_index.json" in line


@pytest.mark.parametrize(
    "key",
    [
        f"{UNET}input_blocks.7.1.transformer_blocks.0.norm2.bias",
        f"{UNET}out.2.bias",
        f"{UNET}middle_block.1.proj_in.weight",
        f"{UNET}output_blocks.2.1.conv.weight",
        f"{VAE}decoder.mid.attn_1.k.weight",
        f"{VAE}post_quant_conv.bias",
        f"{VAE}encoder.down.1.downsample.conv.bias",
        f"{TEXT}encoder.layers.1.mlp.fc2.weight",
        f"{TEXT}embeddings.position_embedding.weight",
    ],
)
def test_a_missing_tensor_and_one_of_another_shape(small, key):
    small.write(without=[key])
    assert "is incomplete: " in refusal(small.file)
    small.write(more={key: original(small.numbers)[key][:-1].clone()})
    assert re.search(
        r"is no Stable Diffusion 1\.x: \w+'s \S+ is \d+(x\d+)* instead of \d+(x\d+)*\. ",
        refusal(small.file),
    )


def test_a_convolution_in_the_place_of_a_layer(small):
    """Of which the conversion would take one of nine numbers."""
    key = f"{VAE}decoder.mid.attn_1.k.weight"
    small.write(more={key: original(small.numbers)[key].repeat(1, 1, 3, 3)})
    assert "to_k.weight is 64x64x3x3 instead of 64x64" in refusal(small.file)


@pytest.mark.parametrize("start", [UNET, VAE, TEXT])
def test_a_missing_part(small, start):
    """As in files that were pruned of their VAE or text encoder."""
    small.write(without=[key for key in original(small.numbers) if key.startswith(start)])
    said = {
        UNET: "is a VAE alone",
        VAE: "incomplete: it has no VAE",
        TEXT: "incomplete: it has no text encoder",
    }
    assert said[start] in refusal(small.file)


def test_names_without_end(tmp_path):
    """diffusers would compare each with each."""
    save_file(
        {f"{UNET}input_blocks.{i}.0.x": zeros(1) for i in range(5000)}, tmp_path / "x.safetensors"
    )
    assert "5000 tensors model.diffusion_model.*" in refusal(tmp_path / "x.safetensors")


def test_numbers_that_are_not_finite(small):
    key = f"{VAE}decoder.conv_in.weight"
    bad = original(small.numbers)[key].clone()
    bad.view(-1)[5] = float("nan")
    small.write(more={key: bad})
    base = load_base(str(small.file), torch.float32)
    with pytest.raises(
        UserError,
        match=f"{re.escape(str(small.file))}, vae: decoder.conv_in.weight holds numbers that",
    ):
        base.vae  # noqa: B018 - asked for


def test_pickles_and_files_cut_short(small):
    torch.save({"state_dict": {}}, small.file)
    assert "is a pickle, which can run code" in refusal(small.file)
    torch.save({"state_dict": {}}, small.file.with_suffix(".ckpt"))
    assert "is a pickle, which can run code. Convert it to safetensors" in refusal(
        small.file.with_suffix(".ckpt")
    )
    for size in (0, 7, 1000, 100_000):
        small.write()
        with open(small.file, "rb+") as file:
            file.truncate(size)
        assert "cannot be loaded" in refusal(small.file)
    (small.file.parent / "x.txt").write_text("no model")
    assert "neither a folder on this machine" in refusal(small.file.parent / "x.txt")


PIECES = [
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "text_model.",
    "model_ema.",
    "input_blocks.",
    "output_blocks.",
    "middle_block.",
    "0.",
    "1.",
    "11.",
    "99.",
    "op.",
    "conv.",
    "proj_attn.",
    "encoder.",
    "decoder.",
    "mid.attn_1.",
    "down.0.",
    "up.3.",
    "q.",
    "weight",
    "bias",
    "alpha",
    "lora_up.",
    "é",
    ".",
]
SHAPES = st.lists(st.integers(0, 3), max_size=5)


@pytest.mark.slow
@given(
    st.dictionaries(st.lists(st.sampled_from(PIECES), max_size=7).map("".join), SHAPES, max_size=6)
)
def test_any_names_and_shapes_end_in_one_line(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("odd") / "x.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    refusal(path)
    shutil.rmtree(path.parent)


# The tokenizer.


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return single_file.tokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("Hello  World!", [3306, 1002, 256]),
        ("", []),
        ("a diagram", [320, 22697]),
    ],
)
def test_words_have_the_published_numbers(clip, text, ids):
    assert clip(text).input_ids == [49406, *ids, 49407]


def test_the_tokenizer_is_set_as_the_models(clip):
    assert (len(clip), clip.vocab_size, clip.model_max_length) == (49408, 49408, 77)
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (49406, 49407, 49407)
    padded = clip("a cat", padding="max_length", truncation=True, max_length=77).input_ids
    assert padded == [49406, 320, 2368] + [49407] * 74
    assert len(clip("robot " * 100, truncation=True).input_ids) == 77


@given(st.text(max_size=40))
def test_no_text_is_unknown(clip, text):
    """Every byte has a word, so that what is visible can be read back."""
    ids = clip(text).input_ids
    assert ids[0] == 49406 and ids[-1] == 49407 and all(0 <= number < 49406 for number in ids[1:-1])


def test_vocabulary_and_merges_as_files_make_the_same_tokenizer(clip, tmp_path):
    """The two files that the published tokenizer consists of."""
    clip.save_pretrained(tmp_path / "whole")
    model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    other = CLIPTokenizer.from_pretrained(tmp_path)
    for text in (
        "Mega Man, blue robot (helmet:1.2)",
        "洛克人 藍色機器人",
        "🤖 naïve café's 1990",
        "<|endoftext|> x",
    ):
        assert clip(text).input_ids == other(text).input_ids
