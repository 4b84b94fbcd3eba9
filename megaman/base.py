"""The base model: a folder, a file, the hub or the embedded demo; safetensors only."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notes about parts that are not used here
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from megaman import hub, single_file
from megaman.errors import UserError, brief
from megaman.files import read_json
from megaman.safety import check_part, refuse_pickle

for library in (diffusers.utils.logging, transformers.utils.logging):
    library.set_verbosity_error()  # the variables above come too late where another module was imported first
    library.disable_progress_bar()  # loading takes a second; downloads keep their bars

# Removed from the hub by its owner in 2024; the same weights stand under the second name.
ALIASES = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PROJECT = Path(__file__).resolve().parent.parent
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# What the libraries raise over a configuration that says something impossible.
ODD_CONFIGURATION = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
                     StrictDataclassError)  # fmt: skip
CONVERSION = (
    "Convert it to safetensors in diffusers' layout first, with --to_safetensors of its "
    "scripts/convert_original_stable_diffusion_to_diffusers.py"
)
WAYS_ON = "Name a local folder in diffusers' layout or a .safetensors file, or try the embedded base with --demo"


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels a side of one latent cell."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@dataclass
class Base:
    """A Stable Diffusion, taken apart. The noise schedule is in scheduler.config; name is what a LoRA should note."""

    name: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler

    @property
    def vae_factor(self) -> int:
        """Pixels a side of one latent cell."""
        return vae_factor(self.vae)

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.unet.config.sample_size * self.vae_factor


def actual_name(name: str) -> str:
    """The name to find and to note the base under, from wherever it is read again: the hub's present one, the place
    within this project, or a whole path."""
    path = Path(os.path.expanduser(name))
    if not path.is_dir() and not path.is_file():
        return ALIASES.get(name, name)
    path = (
        path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    )  # the hub's cache links to bare hashes
    return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else str(path)


def moved(name: str) -> str | None:
    """What to say of a base that is taken from another name than the one asked for; None where it is not."""
    return f"{name} has left the hub; the same weights are at {actual_name(name)}" if name in ALIASES else None


def find_base(name: str, half: bool) -> Path:
    """The folder or the file of a base, downloaded where it is a name on the hub.

    With half the fp16 files are preferred, which halves the download. Raises UserError with the ways on.
    """
    for path in (Path(os.path.expanduser(name)), PROJECT / name):
        if path.is_dir():
            return path
        if path.is_file() and single_file.named(path):
            refuse_pickle(path, CONVERSION)
            return path
    refuse_pickle(name, CONVERSION)
    if single_file.named(name):
        raise UserError(f"There is no file {name}", WAYS_ON)
    return _download(actual_name(name), half)


def _download(name: str, half: bool) -> Path:
    common = ["model_index.json", "scheduler/*.json", "tokenizer/*", "*/config.json"]
    full = [*common, *(f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items())]
    lean = [*common, *(f"{part}/{stem}.fp16.safetensors" for part, stem in WEIGHTS.items())]

    def is_complete(folder: Path) -> bool:
        return all(list((folder / part).glob("*.safetensors")) for part in WEIGHTS)

    return hub.download("base", name, (lean, full) if half else (full, lean), is_complete, WAYS_ON)


def load_base(name: str, dtype: torch.dtype) -> Base:
    """Load a base on the CPU: UNet and text encoder in dtype, the VAE in float32 (fp16 turns some pictures black).

    Raises UserError where it is missing, incomplete, damaged, a pickle or no Stable Diffusion 1.x.
    """
    path = find_base(name, half=dtype != torch.float32)
    try:
        parts = single_file.load_parts(path, dtype) if path.is_file() else _load_folder(name, path, dtype)
    except (SafetensorError, OSError, *ODD_CONFIGURATION) as error:
        raise UserError(f"The base {name} cannot be loaded ({brief(error)})", WAYS_ON) from None
    base = Base(name, **parts)
    _check_kind(base)
    for part in WEIGHTS:
        model = getattr(base, part).requires_grad_(False).eval()
        if (key := _not_finite(model)) is not None:
            raise UserError(f"{path}, {part}: {key} holds numbers that are not finite", "Take another copy of the base")
    return base


def _load_folder(name: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a folder in diffusers' layout."""
    _check_layout(name, folder)
    variants = {part: _variant(name, folder / part, stem) for part, stem in WEIGHTS.items()}
    for part in WEIGHTS:
        check_part(folder / part)
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": _load(CLIPTextModel, folder, "text_encoder", variants, dtype),
        "vae": _load(AutoencoderKL, folder, "vae", variants, torch.float32),
        "unet": _load(UNet2DConditionModel, folder, "unet", variants, dtype),
        "scheduler": DDPMScheduler.from_pretrained(folder / "scheduler"),
    }


def _not_finite(model: torch.nn.Module) -> str | None:
    """A parameter with NaN or infinite numbers in it; both show in its extremes, which takes no memory to ask."""
    parameters = ((key, parameter) for key, parameter in model.named_parameters() if parameter.numel())
    return next((key for key, value in parameters if not torch.stack(value.aminmax()).isfinite().all()), None)


def _check_layout(name: str, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{name} holds no model_index.json, so it is no base in diffusers' layout", WAYS_ON)
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != "StableDiffusionPipeline":
        raise UserError(f"The base {name} is a {kind}, not a Stable Diffusion 1.x", WAYS_ON)
    for part in ("tokenizer", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in WEIGHTS)):
        if not (folder / part).exists():  # the libraries would look for it on the hub, or take another model's
            raise UserError(f"The base {name} is not complete: {part} is missing", WAYS_ON)


def _variant(name: str, folder: Path, stem: str) -> str | None:
    if (folder / f"{stem}.safetensors").is_file() or (folder / f"{stem}.safetensors.index.json").is_file():
        return None
    if (folder / f"{stem}.fp16.safetensors").is_file():
        return "fp16"
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{name}: {folder.name}/ holds only .bin files, pickles, which can run code",
            "Take a copy of the base with .safetensors files",
        )
    raise UserError(f"{name}: {folder.name}/{stem}.safetensors is missing", WAYS_ON)


def _load(kind, folder: Path, part: str, variants: dict[str, str | None], dtype: torch.dtype):
    model, report = kind.from_pretrained(
        folder / part, variant=variants[part], use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:  # the libraries would go on with random numbers in their place
        raise ValueError(f"{part} lacks {min(report['missing_keys'])}")
    return model


def _check_kind(base: Base) -> None:
    unet, text = base.unet.config, base.text_encoder.config
    if unet.in_channels != base.vae.config.latent_channels:
        raise UserError(
            f"The base {base.name} is for inpainting or editing ({unet.in_channels} input channels)", WAYS_ON
        )
    if unet.cross_attention_dim == 1024:
        raise UserError(f"The base {base.name} is a Stable Diffusion 2.x, not 1.x", WAYS_ON)
    if unet.cross_attention_dim != text.hidden_size:
        raise UserError(f"The base {base.name}: its UNet and its text encoder do not belong together", WAYS_ON)
    if (kind := base.scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        raise UserError(f"The base {base.name} predicts {kind}, not the noise or its velocity", WAYS_ON)
