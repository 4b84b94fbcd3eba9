"""LoRA files of other programs come in at the right strength; those of other models are refused by
their name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPTextModel

from megaman.errors import UserError
from megaman.lora import adapter
from megaman.lora import files as lora_files
from megaman.lora import formats as lora_formats
from megaman.lora.authors_names import authors_names
from megaman.models import identify
from megaman.models.configs import SD15
from megaman.models.typed import unet_config
from megaman.models.weights import build

TOLERANCE = 1e-5
UNET_LAYERS = [
    "attn2.to_k",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "conv1",
    "downsamplers.0.conv",
    "conv_in",
    "proj_in",
]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]


def authors_of(base_folder) -> dict[str, str]:
    """The authors' names of the demo base's layers."""
    unet = build(UNet2DConditionModel, UNet2DConditionModel.load_config(base_folder / "unet"))
    names = authors_names(name for name, _ in unet.named_modules())
    return {name: theirs for theirs, name in names.items()}


AUTHORS = authors_of(ROOT / "demo" / "base")


class Models:
    """A fresh UNet and text encoder, and what they say; merge() adds a LoRA by the formula, without
    any library."""

    def __init__(self, base_folder):
        self.unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)
        self.text_encoder = CLIPTextModel.from_pretrained(
            base_folder / "text_encoder", dtype=torch.float32
        ).eval()

    def __getitem__(self, part: str):
        return getattr(self, part)

    @torch.no_grad()
    def say(self) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.text_encoder(torch.arange(3, 13)[None])[0]
        config = unet_config(self.unet)
        size, channels = config.sample_size, config.in_channels
        latents = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
        width = config.cross_attention_dim
        plain = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))
        return self.unet(latents, torch.tensor([300]), encoder_hidden_states=plain).sample, states

    @torch.no_grad()
    def merge(self, made: Made, strength: float = 1.0) -> Models:
        """W + strength * alpha / rank * up @ down."""
        for (part, name), (down, up, alpha) in made.layers.items():
            weight = self[part].get_submodule(name).weight
            delta = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
            weight += strength * alpha / len(down) * delta
        return self


class Made:
    """A LoRA made here: {(part, layer): (down, up, alpha)}, of another rank and alpha for each kind
    of layer."""

    def __init__(self, base_folder, seed: int = 0, dtype=torch.float16, scaled: bool = True):
        models, generator = Models(base_folder), torch.Generator().manual_seed(seed)
        self.layers = {}
        for part, endings in (("unet", UNET_LAYERS), ("text_encoder", TEXT_LAYERS)):
            for name, layer in models[part].named_modules():
                kind = next(
                    (i for i, end in enumerate(endings) if name == end or name.endswith(f".{end}")),
                    None,
                )
                if kind is None:
                    continue
                weight, rank = layer.weight, (4, 8, 2)[kind % 3]
                down = (
                    torch.randn(rank, *weight.shape[1:], generator=generator)
                    / weight[0].numel() ** 0.5
                )
                up = (
                    torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2), generator=generator)
                    * 0.1
                )
                alpha = (1.0, 4.0, 2.0)[kind % 3] if scaled else float(rank)
                self.layers[part, name] = down.to(dtype), up.to(dtype), alpha

    def named(self, name_of) -> dict[str, torch.Tensor]:
        """The tensors under name_of(part, layer) with {side} for down or up, and {alpha} where the
        format has one."""
        tensors = {}
        for (part, layer), (down, up, alpha) in self.layers.items():
            stem, down_name, up_name = name_of(part, layer)
            tensors[f"{stem}{down_name}.weight"], tensors[f"{stem}{up_name}.weight"] = down, up
            if "lora_down" in down_name:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        return tensors


def in_kohyas_words(part: str, layer: str) -> tuple[str, str, str]:
    text = "" if layer.startswith("text_model.") else "text_model_"
    prefix = {"unet": "lora_unet_", "text_encoder": f"lora_te_{text}"}[part]
    return prefix + layer.replace(".", "_"), ".lora_down", ".lora_up"


def in_diffusers_words(part: str, layer: str) -> tuple[str, str, str]:
    text = "" if part == "unet" or layer.startswith("text_model.") else "text_model."
    return f"{part}.{text}{layer}", ".lora_A", ".lora_B"


def in_older_words(part: str, layer: str) -> tuple[str, str, str]:
    stem = in_diffusers_words(part, layer)[0]
    middle = ".lora" if part == "unet" else ".lora_linear_layer"
    return stem, f"{middle}.down", f"{middle}.up"


def in_oldest_words(part: str, layer: str) -> tuple[str, str, str]:
    """Attention processors of their own, as diffusers had them at first."""
    stem = in_diffusers_words(part, layer)[0]
    if "attn" not in layer or part != "unet":
        return in_older_words(part, layer)
    return re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1", stem), "_lora.down", "_lora.up"


def loaded(base_folder, *loras) -> Models:
    models = Models(base_folder)
    lora_files.load_loras(loras, models.unet, models.text_encoder)
    return models


def apart(one: Models, other: Models) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one.say(), other.say(), strict=True))


@pytest.fixture(scope="module")
def made(base_folder):
    made = Made(base_folder)
    assert {part for part, _ in made.layers} == {"unet", "text_encoder"}
    base, merged = Models(base_folder).say(), Models(base_folder).merge(made).say()
    for before, after in zip(base, merged, strict=True):
        assert (before - after).abs().max() > 0.05, (
            "both parts have to matter, or nothing is compared below"
        )
    return made


def test_a_kohya_file_made_elsewhere_has_the_right_strength(made, base_folder, tmp_path):
    """fp16, another rank and alpha for convolutions, keys for the text encoder."""
    tensors = made.named(in_kohyas_words)
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in tensors)
    assert any(tensor.ndim == 4 for tensor in tensors.values())
    save_file(
        tensors,
        tmp_path / "style.safetensors",
        {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    )
    assert (
        apart(
            loaded(base_folder, (tmp_path / "style.safetensors", 1.0)),
            Models(base_folder).merge(made),
        )
        <= TOLERANCE
    )


def test_alphas_may_be_whole_numbers_or_lists_of_one(made, base_folder, tmp_path):
    tensors = made.named(in_kohyas_words)
    for i, key in enumerate(key for key in tensors if key.endswith(".alpha")):
        tensors[key] = (
            torch.tensor([int(tensors[key])]) if i % 2 else torch.tensor(int(tensors[key]))
        )
    save_file(tensors, tmp_path / "style.safetensors")
    assert (
        apart(
            loaded(base_folder, (tmp_path / "style.safetensors", 1.0)),
            Models(base_folder).merge(made),
        )
        <= TOLERANCE
    )


@pytest.mark.parametrize("words", [in_diffusers_words, in_older_words, in_oldest_words])
def test_diffusers_files_of_every_age(base_folder, tmp_path, words):
    """They have no alpha: the scale is 1."""
    made = Made(base_folder, dtype=torch.float32, scaled=False)
    save_file(made.named(words), tmp_path / "pytorch_lora_weights.safetensors")
    assert apart(loaded(base_folder, (tmp_path, 1.0)), Models(base_folder).merge(made)) <= TOLERANCE


def in_comfyuis_words(part: str, layer: str) -> tuple[str, str, str]:
    """As ComfyUI's node LoraSave writes them: the UNet's layers as their authors named them."""
    if part == "unet":
        stem = f"diffusion_model.{AUTHORS[layer]}"
    else:
        stem = f"text_encoders.clip_l.transformer.text_model.{layer.removeprefix('text_model.')}"
    return stem, ".lora_down", ".lora_up"


def in_authors_words_flat(part: str, layer: str) -> tuple[str, str, str]:
    if part == "unet":
        return f"lora_unet_{AUTHORS[layer].replace('.', '_')}", ".lora_down", ".lora_up"
    return in_kohyas_words(part, layer)


def in_pefts_raw_words(part: str, layer: str) -> tuple[str, str, str]:
    """With PEFT's name of the adapter left in, as a plain state dict has it."""
    stem, down, up = in_diffusers_words(part, layer)
    return stem, f"{down}.default", f"{up}.default"


@pytest.mark.parametrize("words", [in_comfyuis_words, in_authors_words_flat])
def test_files_with_the_authors_names_of_layers(made, base_folder, tmp_path, words):
    header = {"ss_base_model_version": "sd_v1"}  # SDXL's layers have such names, too
    save_file(made.named(words), tmp_path / "style.safetensors", header)
    found = loaded(base_folder, (tmp_path / "style.safetensors", 1.0))
    assert apart(found, Models(base_folder).merge(made)) <= TOLERANCE


@pytest.mark.parametrize("attends_to_prompt", [True, False])
def test_names_that_sdxl_has_too_do_not_make_it_one(base_folder, tmp_path, attends_to_prompt):
    """The width of the prompt's embeddings, or attention where SDXL has none, says more."""
    made = Made(base_folder)
    if not attends_to_prompt:
        ends = ("0.attentions.0.transformer_blocks.0.attn1.to_out.0", "0.attentions.0.proj_in")
        only = [key for key in made.layers if key[1].endswith(ends) and "down" in key[1]]
        assert {AUTHORS[layer][:16] for _, layer in only} == {"input_blocks.1.1"}
        made.layers = {key: made.layers[key] for key in only}
    save_file(made.named(in_authors_words_flat), tmp_path / "style.safetensors")
    found = loaded(base_folder, (tmp_path / "style.safetensors", 1.0))
    assert apart(found, Models(base_folder).merge(made)) <= TOLERANCE


def test_keys_with_the_name_of_an_adapter(base_folder, tmp_path):
    made = Made(base_folder, dtype=torch.float32, scaled=False)
    save_file(made.named(in_pefts_raw_words), tmp_path / "style.safetensors")
    found = loaded(base_folder, (tmp_path / "style.safetensors", 1.0))
    assert apart(found, Models(base_folder).merge(made)) <= TOLERANCE


def test_the_authors_names_are_those_of_diffusers_own_conversion():
    """Every tensor of Stable Diffusion 1.5's UNet, by diffusers' conversion of a checkpoint."""
    config = json.loads((SD15 / "unet.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{k: v for k, v in config.items() if k[0] != "_"})
    names = authors_names(name for name, _ in unet.named_modules())
    ours = {name: theirs for theirs, name in names.items()}
    tensors = {}
    for key in unet.state_dict():
        layer, _, end = key.rpartition(".")
        tensors[f"model.diffusion_model.{ours[layer]}.{end}"] = key
    assert len(tensors) == 686
    converted = convert_ldm_unet_checkpoint(dict(tensors), config)
    assert {key: value for key, value in converted.items() if key != value} == {}
    assert len(converted) == 686


def pair(
    stem: str, width: int = 4, down: str = ".lora_down", up: str = ".lora_up"
) -> dict[str, torch.Tensor]:
    return {f"{stem}{down}.weight": torch.ones(2, width), f"{stem}{up}.weight": torch.ones(4, 2)}


EXTRAS = {
    "embeddings": (
        {
            "bundle_emb.volto.string_to_param.*": torch.ones(2, 64),
            "bundle_emb.volto.step": torch.tensor(5),
            "bundle_emb.other.clip_l": torch.full((1, 64), float("nan")),
        },
        "the bundled embeddings volto, other are ignored",
    ),
    "biases": (
        {
            "diffusion_model.out.2.diff_b": torch.ones(4),
            "lora_unet_conv_norm_out.w_norm": torch.ones(64),
            "lora_unet_conv_norm_out.diff": torch.ones(64),
        },
        "trained biases and norms (3 tensors) are ignored",
    ),
    "biases of zero": ({"diffusion_model.out.2.diff_b": torch.zeros(4)}, ""),
    "a projection that is not used": (pair("text_encoders.clip_l.transformer.text_projection"), ""),
    "the same in kohya's words": (pair("lora_te_text_projection"), ""),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_stands_next_to_a_plain_lora_is_named(made, base_folder, tmp_path, caplog, name):
    extras, line = EXTRAS[name]
    save_file({**extras, **made.named(in_kohyas_words)}, tmp_path / "style.safetensors")
    with caplog.at_level("INFO"):
        found = loaded(base_folder, (tmp_path / "style.safetensors", 1.0))
    assert apart(found, Models(base_folder).merge(made)) <= TOLERANCE
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(lines) == bool(line) and all(line in each for each in lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Already found")
def test_several_loras_each_at_its_strength(made, base_folder, tmp_path):
    other = Made(base_folder, seed=1)
    save_file(made.named(in_kohyas_words), tmp_path / "one.safetensors")
    save_file(other.named(in_kohyas_words), tmp_path / "other.safetensors")
    both = loaded(
        base_folder, (tmp_path / "one.safetensors", 0.7), (tmp_path / "other.safetensors", -0.4)
    )
    merged = Models(base_folder).merge(made, 0.7).merge(other, -0.4)
    assert apart(both, merged) <= TOLERANCE
    with adapter.lora_disabled(both.unet, both.text_encoder):
        assert apart(both, Models(base_folder)) == 0
    assert apart(both, merged) <= TOLERANCE
    assert apart(loaded(base_folder, (tmp_path / "one.safetensors", 0.0)), Models(base_folder)) == 0


def test_a_matrix_may_be_written_as_a_convolution_and_the_other_way(made, base_folder, tmp_path):
    tensors = made.named(in_kohyas_words)
    for key, tensor in tensors.items():
        if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and "proj_in" in key:
            tensors[key] = tensor.flatten(1)
        elif tensor.ndim == 2:
            tensors[key] = tensor[:, :, None, None].contiguous()
    save_file(tensors, tmp_path / "style.safetensors")
    assert (
        apart(
            loaded(base_folder, (tmp_path / "style.safetensors", 1.0)),
            Models(base_folder).merge(made),
        )
        <= TOLERANCE
    )


def test_a_folder_with_several_files_asks_which(made, base_folder, tmp_path):
    for name in ("one", "other"):
        save_file(made.named(in_kohyas_words), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"several LoRAs \(one.safetensors, other.safetensors\)"):
        loaded(base_folder, (tmp_path, 1.0))


READS = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
FOREIGN = {
    "SDXL by its header": (
        {"ss_base_model_version": "sdxl_base_v1-0"},
        pair("lora_unet_conv_in"),
        "SDXL",
    ),
    "SDXL by modelspec": (
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        pair("x"),
        "SDXL",
    ),
    "SDXL by its second text encoder": (
        {},
        pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "SDXL",
    ),
    "SDXL by its width": ({}, pair(f"lora_unet_{READS}", 2048), "SDXL"),
    "SDXL in diffusers' words": (
        {},
        pair(f"unet.{READS.replace('_to_k', '.to_k')}", 2048, ".lora_A", ".lora_B"),
        "SDXL",
    ),
    "SDXL in kohya's words": ({}, pair("lora_unet_input_blocks_4_1_proj_in"), "SDXL"),
    "SD 2 by its header": ({"ss_v2": "True"}, pair("lora_unet_conv_in"), "Stable Diffusion 2.x"),
    "SD 2 by modelspec": (
        {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
        pair("x"),
        "Stable Diffusion 2.x",
    ),
    "SD 2 by its width": ({}, pair(f"lora_unet_{READS}", 1024), "Stable Diffusion 2.x"),
    "Flux by its header": ({"ss_base_model_version": "flux1"}, pair("x"), "Flux"),
    "Flux in kohya's words": ({}, pair("lora_unet_double_blocks_0_img_attn_qkv"), "Flux"),
    "Flux in diffusers' words": (
        {},
        pair("transformer.single_transformer_blocks.0.attn.to_q", down=".lora_A", up=".lora_B"),
        "Flux",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_lora_of_another_model_is_refused_by_its_name(base_folder, tmp_path, name):
    metadata, tensors, kind = FOREIGN[name]
    save_file(tensors, tmp_path / "style.safetensors", metadata)
    with pytest.raises(
        UserError, match=f"style.safetensors is a LoRA for {re.escape(kind)}, not for Stable Diff"
    ):
        loaded(base_folder, (tmp_path / "style.safetensors", 1.0))


OTHER_ADAPTERS = {
    "LoHa": {"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)},
    "LoKr": {"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)},
    "LoHa,": {f"lora_unet_conv_in.hada_{end}": torch.ones(2, 2) for end in ("t1", "w1_a")},
    "LoKr,": {f"lora_unet_conv_in.lokr_{end}": torch.ones(2, 2) for end in ("t2", "w1")},
    "DoRA": {**pair("lora_unet_conv_in"), "lora_unet_conv_in.dora_scale": torch.ones(4, 1)},
    "an OFT": {"lora_unet_conv_in.oft_blocks": torch.ones(2, 2)},
    "BOFT": {"lora_unet_conv_in.boft_blocks": torch.ones(2, 2)},
    "an IA3": {"lora_unet_conv_in.ia3_l": torch.ones(2, 2)},
    "an IA3,": {
        "lora_unet_conv_in.on_input": torch.tensor(True),
        "lora_unet_conv_in.weight": torch.ones(64),
    },
    "holds int64, not floating-point": pair("lora_unet_conv_in")
    | {"lora_unet_conv_in.lora_up.weight": torch.ones(64, 2, dtype=torch.int64)},
    "GLoRA": {"lora_unet_conv_in.a1.weight": torch.ones(2, 2)},
    "textual inversion embedding": {"emb_params": torch.ones(2, 64)},
    "whole weight differences": {"diffusion_model.out.2.diff": torch.ones(4, 64, 3, 3)},
    "the whole layer": {**pair("lora_unet_conv_in"), "unet.conv_out.weight": torch.ones(4, 64)},
    "no LoRA": {"model.diffusion_model.out.2.weight": torch.ones(4)},
    "another base": pair("lora_unet_no_such_layer"),
    "not a valid alpha": {
        **pair("lora_unet_conv_in"),
        "lora_unet_conv_in.alpha": torch.tensor(-1.0),
    },
    "holds no tensor": {},
    "holds no tensor of a LoRA": {"bundle_emb.volto.string_to_param.*": torch.ones(2, 64)},
}


@pytest.mark.parametrize("name", OTHER_ADAPTERS)
def test_what_is_no_plain_lora_is_refused(base_folder, tmp_path, name):
    save_file(OTHER_ADAPTERS[name], tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=name):
        loaded(base_folder, (tmp_path / "style.safetensors", 1.0))


def test_a_lora_with_the_widths_of_another_base_is_refused(made, base_folder, tmp_path):
    tensors = made.named(in_kohyas_words)
    key = next(key for key in tensors if "attn2_to_k.lora_down" in key)
    tensors[key] = torch.ones(len(tensors[key]), 768)
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match="was made for another base"):
        loaded(base_folder, (tmp_path / "style.safetensors", 1.0))


fragments = st.sampled_from(
    [
        "lora_unet_",
        "lora_te_",
        "unet.",
        "text_encoder.",
        "",
        "conv_in",
        "conv_out",
        "_to_out",
        ".lora_down",
        ".lora_up",
        ".lora_A",
        "_lora.down",
        ".weight",
        ".alpha",
        "洛",
    ]
)
shapes = st.sampled_from(
    [(), (1,), (2, 4), (2, 4, 3, 3), (64, 2, 1, 1), (0,), (2, 0), (4, 2), (4, 2, 1)]
)


@pytest.fixture(scope="module")
def shape_of_unet(base_folder):
    return build(UNet2DConditionModel, UNet2DConditionModel.load_config(base_folder / "unet"))


@given(
    st.dictionaries(st.lists(fragments, min_size=1, max_size=4).map("".join), shapes, max_size=4),
    st.text(),
)
def test_any_file_is_sorted_out_or_refused_in_a_line(shape_of_unet, tmp_path_factory, shapes, said):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    metadata = {"lora_adapter_metadata": said, "ss_base_model_version": said}
    identify.foreign_base(metadata, tensors)
    told = lora_formats.config_from_header(metadata, "unet")
    assert told is None or isinstance(told, dict)
    try:
        found = lora_formats.to_peft(path, tensors, {"unet": shape_of_unet})
        for state, _ in found.values():
            lora_files._check_shapes(path, state, shape_of_unet)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000


def test_a_told_alpha_that_the_tensors_do_not_bear_out_is_refused(base_folder, tmp_path):
    made = Made(base_folder, dtype=torch.float32)
    told = {"unet.r": 4, "unet.lora_alpha": 1e9, "unet.target_modules": ["conv_in"]}
    save_file(
        made.named(in_diffusers_words),
        tmp_path / "s.safetensors",
        {"lora_adapter_metadata": json.dumps(told)},
    )
    with pytest.raises(UserError, match="lora_alpha is not valid for a LoRA with these tensors"):
        loaded(base_folder, (tmp_path / "s.safetensors", 1.0))
