"""The base model: a folder, a file, the hub or the embedded demo; safetensors only."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notes about parts that are not used here
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from megaman import hub
from megaman.errors import UserError, out_of_memory, summarize_error
from megaman.hub import PROJECT
from megaman.models import diffusers_folder, single_file
from megaman.models.configs import WAYS_ON, WEIGHTS, is_single_file, resolve_name
from megaman.models.weights import CPU, LazyModel
from megaman.safe_loading import refuse_pickle

for library in (diffusers.utils.logging, transformers.utils.logging):
    # the variables above come too late where another module was imported first
    library.set_verbosity_error()
    library.disable_progress_bar()  # loading takes a second; downloads keep their bars

# What the libraries raise over a configuration that says something impossible.
ODD_CONFIGURATION = (
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
    """Pixels a side of one latent cell."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_identity(vae: AutoencoderKL) -> str:
    """A SHA-256 of what a VAE computes with: its configuration and its tensors, in whatever file
    they stood."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


class Base:
    """A Stable Diffusion, taken apart. Each of its three models is loaded onto the device when it
    is first asked for.

    The noise schedule is in scheduler.config; name is what a LoRA should note. unet, text_encoder
    and vae raise UserError where the files are gone or others by then, or hold numbers that are not
    finite.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        tokenizer: CLIPTokenizer,
        scheduler: DDPMScheduler,
        memory_format: torch.memory_format,
        **parts: LazyModel,
    ):
        self.name, self.device, self.tokenizer, self.scheduler = name, device, tokenizer, scheduler
        self.memory_format, self.parts = memory_format, parts
        self._loaded: dict[str, torch.nn.Module] = {}

    @property
    def unet(self) -> UNet2DConditionModel:
        return self._get("unet")

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self._get("text_encoder")

    @property
    def vae(self) -> AutoencoderKL:
        return self._get("vae")

    def _get(self, part: str) -> torch.nn.Module:
        if part not in self._loaded:
            with _refusing(self.name):
                # A LoRA that is added later stays contiguous, as AdamW's moments are when they come
                # from a file.
                self._loaded[part] = (
                    self.parts[part].load(self.device).to(memory_format=self.memory_format)
                )
        return self._loaded[part]

    @property
    def unet_layers(self) -> list[str]:
        """The names of the UNet's layers; its weights are not read for that."""
        return self.parts["unet"].layers()

    def release(self, *parts: str) -> None:
        """Let models go, with all that was changed in them; whoever asks for one again gets it from
        its files."""
        for part in parts:
            self._loaded.pop(part, None)

    def vae_files(self) -> list[Path]:
        """The files that the VAE hangs on: as long as none of them changes, it is the same one."""
        return list(self.parts["vae"].files)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent cell."""
        return vae_scale_factor(self.parts["vae"])

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by for the UNet."""
        return self.parts["vae"].config.scaling_factor

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.parts["unet"].config.sample_size * self.vae_scale_factor


def find_base(name: str, half: bool) -> Path:
    """The folder or the file of a base, downloaded where it is a name on the hub.

    With half the fp16 files are preferred, which halves the download. Raises UserError with the
    ways on.
    """
    for path in (Path(os.path.expanduser(name)), PROJECT / name):
        if path.is_dir():
            return path
        if path.is_file() and is_single_file(path):
            refuse_pickle(path, CONVERSION)
            return path
    refuse_pickle(name, CONVERSION)
    if is_single_file(name):
        raise UserError(f"There is no file {name}", WAYS_ON)
    return _download(resolve_name(name), half)


def _download(name: str, half: bool) -> Path:
    common = ["model_index.json", "scheduler/*.json", "tokenizer/*", "*/config.json"]
    full = [*common, *(f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items())]
    lean = [*common, *(f"{part}/{stem}.fp16.safetensors" for part, stem in WEIGHTS.items())]

    def is_complete(folder: Path) -> bool:
        return all(list((folder / part).glob("*.safetensors")) for part in WEIGHTS)

    return hub.download("base", name, (lean, full) if half else (full, lean), is_complete, WAYS_ON)


def load_base(
    name: str,
    dtype: torch.dtype,
    device: torch.device = CPU,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Base:
    """Open a base, whose models come onto the device and into the layout when they are asked for:
    UNet and text encoder in dtype, the VAE in float32 (fp16 turns some pictures black).

    Raises UserError where it is missing, incomplete, damaged, a pickle or no Stable Diffusion 1.x.
    Of the weights only names and shapes are looked at.
    """
    path = find_base(name, half=dtype != torch.float32)
    with _refusing(name):
        parts = (
            single_file.find_parts(path, dtype)
            if path.is_file()
            else diffusers_folder.find_parts(name, path, dtype)
        )
    base = Base(name, device, memory_format=memory_format, **parts)
    _check_kind(base)
    return base


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what the libraries raise over a base into a line."""
    try:
        yield
    except (SafetensorError, OSError, *ODD_CONFIGURATION) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"The base {name} cannot be loaded ({summarize_error(error)})", WAYS_ON
        ) from None


def _check_kind(base: Base) -> None:
    unet, text = base.parts["unet"].config, base.parts["text_encoder"].config
    if unet.in_channels != base.parts["vae"].config.latent_channels:
        raise UserError(
            f"The base {base.name} is for inpainting or editing ({unet.in_channels} input channels)",
            WAYS_ON,
        )
    if unet.cross_attention_dim == 1024:
        raise UserError(f"The base {base.name} is a Stable Diffusion 2.x, not 1.x", WAYS_ON)
    if unet.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"The base {base.name}: its UNet and its text encoder do not belong together", WAYS_ON
        )
    if (kind := base.scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        raise UserError(
            f"The base {base.name} predicts {kind}, not the noise or its velocity", WAYS_ON
        )
