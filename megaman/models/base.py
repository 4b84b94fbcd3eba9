"""The base model: a folder, a file, the hub or the embedded demo; safetensors only."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CLIPTextModel

from megaman import cuda, hub
from megaman.errors import UserError, out_of_memory, summarize_error
from megaman.hub import PROJECT
from megaman.models import diffusers_folder, single_file
from megaman.models.configs import BASE_REMEDY, WEIGHTS, is_single_file, resolve_name
from megaman.models.typed import VaeConfig, move, scheduler_config
from megaman.models.weights import CPU, BaseParts, LazyModel
from megaman.safe_loading import refuse_pickle

for library in (diffusers.utils.logging, transformers.utils.logging):
    # The variables above come too late if the library was imported before.
    library.set_verbosity_error()
    library.disable_progress_bar()  # loading takes a second; downloads keep their bars

# Raised by the libraries for a configuration with impossible values.
CONFIGURATION_ERRORS = (
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)
CONVERSION = (
    "Convert it to safetensors in diffusers' layout first, with --to_safetensors of its "
    "scripts/convert_original_stable_diffusion_to_diffusers.py"
)


def vae_scale_factor(vae: AutoencoderKL | LazyModel) -> int:
    """Pixels per latent, along a side."""
    config = cast(VaeConfig, vae.config)
    return 2 ** (len(config.block_out_channels) - 1)


def vae_identity(vae: AutoencoderKL) -> str:
    """A SHA-256 of a VAE's configuration and tensors, whatever file they came from."""
    config = {key: value for key, value in cast(Any, vae.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


class Base:
    """A Stable Diffusion base, each of whose three models is loaded when it is first used.

    name is what a LoRA's files should note. unet, text_encoder and vae raise UserError if the files
    have changed by then or hold numbers that are not finite.
    """

    def __init__(
        self,
        name: str,
        parts: BaseParts,
        device: torch.device,
        memory_format: torch.memory_format,
    ):
        self.name, self.device, self.memory_format = name, device, memory_format
        self.tokenizer, self.noise_scheduler = parts.tokenizer, parts.noise_scheduler
        self._lazy = {"unet": parts.unet, "text_encoder": parts.text_encoder, "vae": parts.vae}
        self._loaded: dict[str, torch.nn.Module] = {}

    @property
    def unet(self) -> UNet2DConditionModel:
        return cast(UNet2DConditionModel, self._get("unet"))

    @property
    def text_encoder(self) -> CLIPTextModel:
        return cast(CLIPTextModel, self._get("text_encoder"))

    @property
    def vae(self) -> AutoencoderKL:
        return cast(AutoencoderKL, self._get("vae"))

    def load_unet(self, device: torch.device) -> UNet2DConditionModel:
        """The UNet, on another device than the base's if it was not loaded yet."""
        return cast(UNet2DConditionModel, self._get("unet", device))

    def _get(self, part: str, device: torch.device | None = None) -> torch.nn.Module:
        if part not in self._loaded:
            with _reporting_errors(self.name):
                model = self._lazy[part].load(device or self.device)
            # A LoRA that is added later stays contiguous, as AdamW's moments from a checkpoint are.
            self._loaded[part] = move(model, memory_format=self.memory_format)
        return self._loaded[part]

    @property
    def unet_layers(self) -> list[str]:
        """The names of the UNet's layers, without reading its weights."""
        return self._lazy["unet"].layers()

    def release(self, *parts: str) -> None:
        """Drop models with all changes made to them; the next use loads them again.

        A GPU gets their memory back: what torch keeps of it would be in the way of larger tensors.
        """
        for part in parts:
            self._loaded.pop(part, None)
        if self.device.type == "cuda":
            cuda.empty_cache()

    def files(self) -> list[Path]:
        """The files with the weights of all three models."""
        return list(chain.from_iterable(part.stamps for part in self._lazy.values()))

    def vae_files(self) -> list[Path]:
        """The files that the VAE depends on: it is the same as long as none of them changes."""
        return list(self._lazy["vae"].stamps)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return vae_scale_factor(self._lazy["vae"])

    @property
    def scaling_factor(self) -> float:
        """The factor on the VAE's latents for the UNet."""
        return self._lazy["vae"].config.scaling_factor

    @property
    def native_size(self) -> int:
        """Side in pixels of the images that the base was trained on."""
        return self._lazy["unet"].config.sample_size * self.vae_scale_factor


def find_base(name: str, half: bool) -> Path:
    """The folder or file of a base, downloaded if it is a name on the hub.

    half prefers the fp16 files, which halves the download. Raises UserError if there is no such
    base, and for a pickle.
    """
    for path in (Path(os.path.expanduser(name)), PROJECT / name):
        if path.is_dir():
            return path
        if path.is_file() and is_single_file(path):
            refuse_pickle(path, CONVERSION)
            return path
    refuse_pickle(name, CONVERSION)
    if is_single_file(name):
        raise UserError(f"There is no file {name}", BASE_REMEDY)
    return _download(resolve_name(name), half)


def _download(name: str, half: bool) -> Path:
    common = ["model_index.json", "scheduler/*.json", "tokenizer/*", "*/config.json"]
    full = [*common, *(f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items())]
    fp16 = [*common, *(f"{part}/{stem}.fp16.safetensors" for part, stem in WEIGHTS.items())]

    def is_complete(folder: Path) -> bool:
        return all(list((folder / part).glob("*.safetensors")) for part in WEIGHTS)

    choices = (fp16, full) if half else (full, fp16)
    return hub.download("base", name, choices, is_complete, BASE_REMEDY)


def load_base(
    name: str,
    dtype: torch.dtype,
    device: torch.device = CPU,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Base:
    """Open a base; of its weights only names and shapes are read.

    Its models are later loaded onto the device: UNet and text encoder in dtype, the VAE in float32,
    since fp16 turns some images black. Raises UserError if the base is missing, incomplete,
    damaged, a pickle or not Stable Diffusion 1.x.
    """
    path = find_base(name, half=dtype != torch.float32)
    with _reporting_errors(name):
        if path.is_file():
            parts = single_file.find_parts(path, dtype)
        else:
            parts = diffusers_folder.find_parts(name, path, dtype)
    _check_kind(name, parts)
    return Base(name, parts, device, memory_format)


@contextlib.contextmanager
def _reporting_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise for a damaged base into a UserError."""
    try:
        yield
    except (SafetensorError, OSError, *CONFIGURATION_ERRORS) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"The base {name} cannot be loaded ({summarize_error(error)})", BASE_REMEDY
        ) from None


def _check_kind(name: str, parts: BaseParts) -> None:
    unet, text_encoder = parts.unet.config, parts.text_encoder.config
    if unet.in_channels != parts.vae.config.latent_channels:
        raise UserError(
            f"The base {name} is for inpainting or editing ({unet.in_channels} input channels)",
            BASE_REMEDY,
        )
    if unet.cross_attention_dim == 1024:
        raise UserError(f"The base {name} is a Stable Diffusion 2.x, not 1.x", BASE_REMEDY)
    if unet.cross_attention_dim != text_encoder.hidden_size:
        raise UserError(f"The base {name}: its UNet and its text encoder do not match", BASE_REMEDY)
    kind = scheduler_config(parts.noise_scheduler).prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"The base {name} predicts {kind}, not the noise or its velocity", BASE_REMEDY
        )
