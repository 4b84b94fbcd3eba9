"""README.md of lora_weights/: what the LoRA is, how it was trained, how to load it. It is published
with the folder.

The front matter is YAML as the Hugging Face hub reads it; JSON strings are valid YAML.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaman.data.captions import CaptionAugmentation, tidy, trigger_words
from megaman.errors import plural
from megaman.hub import HUB_NAME
from megaman.sampling.png import read_prompt
from megaman.training.samples import CARD

MAX_SAMPLES = 4
# Licenses of the most common bases, by the hub's name for them.
OPENRAIL = (
    "creativeml-openrail-m",
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
)
CC_BY = ("cc-by-4.0", "https://creativecommons.org/licenses/by/4.0/")
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL,
    "runwayml/stable-diffusion-v1-5": OPENRAIL,
    "CompVis/stable-diffusion-v1-4": OPENRAIL,
    "CompVis/stable-diffusion-v1-3": OPENRAIL,
    "CompVis/stable-diffusion-v1-2": OPENRAIL,
    "CompVis/stable-diffusion-v1-1": OPENRAIL,
    "demo/base": CC_BY,
}
UNKNOWN_LICENSE = ("other", "")
DIFFUSERS = """diffusers, from this folder:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.{load})
pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
```"""
PEFT = """PEFT:

```python
from diffusers import UNet2DConditionModel
from peft import PeftModel

unet = UNet2DConditionModel.{load}{subfolder})
unet = PeftModel.from_pretrained(unet, ".")
```"""
PEFT_TEXT_ENCODER = """and the text encoder's part:

```python
from peft import PeftModel
from transformers import CLIPTextModel

text_encoder = CLIPTextModel.from_pretrained({source}, subfolder="text_encoder")
text_encoder = PeftModel.from_pretrained(text_encoder, "text_encoder")
```"""
PROGRAMS = (
    "A1111: copy `megaman_lora.safetensors` to `models/Lora` and write `<lora:megaman_lora:1>` in "
    "the prompt.",
    "ComfyUI: copy `megaman_lora.safetensors` to `models/loras` and choose it in the Load LoRA "
    "node.",
    "Mega Man LoRA: `python generate_megaman.py --lora_path THIS_FOLDER`.",
)
SETTINGS = (
    "lora_rank",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "learning_rate",
    "train_text_encoder",
    "text_encoder_lr",
    "lr_scheduler",
    "train_batch_size",
    "gradient_accumulation_steps",
    "resolution",
    "enable_bucket",
    "bucket_no_upscale",
    "center_crop",
    "random_flip",
    *CaptionAugmentation._fields,
    "snr_gamma",
    "noise_offset",
    "max_grad_norm",
)


@dataclass(frozen=True)
class _Base:
    """A base as the card names it; link is Markdown, license the hub's name and an address."""

    name: str
    link: str
    is_on_hub: bool
    is_single_file: bool
    license: tuple[str, str]


def write_card(
    config: Mapping[str, Any], captions: Sequence[str], num_written: int, samples: Path
) -> dict[str, bytes]:
    """The card and its images as the content of files by name.

    Args:
        config: the content of training_config.json.
        captions: those of the images that were trained on.
        num_written: how many of them somebody wrote; the others were made from names.
        samples: the folder of the last sample images, which may be missing. Its folder card/ has
            the samples for the model card, if they are others.
    """
    files, prompts = {}, {}
    for number, image in enumerate(_choose_samples(samples)):
        name = f"sample_{number:02d}.png"
        with contextlib.suppress(OSError):  # an image that is gone must not cost the LoRA
            files[name] = image.read_bytes()
            prompts[name] = tidy(read_prompt(image) or config["settings"]["validation_prompt"])
    base = _describe_base(config["base"])
    sections = [
        _front_matter(config, captions, base, prompts),
        *_introduction(config, captions, base, prompts),
        *_loading(config["settings"], base),
        _training(config),
        _data(config, len(captions), num_written),
        _license(base),
    ]
    card = "\n\n".join(sections) + "\n"
    return {"README.md": card.encode("utf-8", "backslashreplace"), **files}


def _choose_samples(folder: Path) -> list[Path]:
    """At most MAX_SAMPLES images, of as many prompts as there are."""
    images = sorted((folder / CARD).glob("*.png")) or sorted(folder.glob("*.png"))
    first_of = {read_prompt(image): image for image in reversed(images)}
    distinct = sorted(first_of.values())
    others = [image for image in images if image not in distinct]
    return sorted([*distinct, *others][:MAX_SAMPLES])


def _describe_base(base: str) -> _Base:
    is_single_file = base.lower().endswith(".safetensors")
    is_demo = base == "demo/base"
    is_on_hub = bool(
        HUB_NAME.fullmatch(base) and not base.startswith("demo/") and not is_single_file
    )
    # The whole path of a folder is private.
    name = base if is_on_hub or is_demo else tidy(Path(base).name) or "base"
    link = f"[{name}](https://huggingface.co/{name})" if is_on_hub else code(name)
    if is_demo:
        link = "the small one in the folder `demo/base` of the project Mega Man LoRA"
    license_ = LICENSES.get(base, UNKNOWN_LICENSE)
    return _Base(name, link, is_on_hub, is_single_file, license_)


def _trigger(settings: Mapping[str, Any], captions: Sequence[str]) -> str:
    return tidy(settings["trigger_word"] or trigger_words(captions))


def _front_matter(
    config: Mapping[str, Any],
    captions: Sequence[str],
    base: _Base,
    samples: Mapping[str, str],
) -> str:
    """samples are the prompts of the sample images by file."""
    settings = config["settings"]
    fields: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": base.license[0],
        "tags": ["lora", "stable-diffusion", "text-to-image", "diffusers", "peft"],
    }
    if base.is_on_hub:
        fields["base_model"] = base.name
    if trigger := _trigger(settings, captions):
        fields["instance_prompt"] = trigger
    if samples:
        fields["widget"] = [
            {"text": prompt, "output": {"url": file}} for file, prompt in samples.items()
        ]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(
    config: Mapping[str, Any],
    captions: Sequence[str],
    base: _Base,
    samples: Mapping[str, str],
) -> Iterator[str]:
    settings = config["settings"]
    yield f"# A LoRA for {code(base.name)}"
    images = plural(len(captions), "image")
    yield f"A LoRA for Stable Diffusion 1.x, trained on {images}. Its base is {base.link}."
    if settings["train_text_encoder"]:
        yield "It changes the UNet and the text encoder."
    if trigger := _trigger(settings, captions):
        yield f"Use {code(trigger)} in the prompt: most of the captions begin with it."
    if samples:
        images = [f"![Sample {number}]({file})" for number, file in enumerate(samples, start=1)]
        prompts = [f"{number}. {code(text)}" for number, text in enumerate(samples.values(), 1)]
        yield "## Samples"
        yield "\n".join(images)
        yield "\n".join(["Their prompts:", "", *prompts])
        yield "Generated after the last step, at strength 1; each image carries its settings."


def _loading(settings: Mapping[str, Any], base: _Base) -> Iterator[str]:
    name = base.name if base.is_on_hub else f"PATH/TO/{base.name}"
    source = json.dumps(name, ensure_ascii=False)
    load = f"from_pretrained({source}"
    if base.is_single_file:
        load = f"from_single_file({source}"
    yield "## How to load it"
    yield "This folder holds the same LoRA in three layouts, each with its strength."
    if not base.is_on_hub:
        yield "The base is not on the hub: write where it is in place of `PATH/TO`."
    yield DIFFUSERS.format(load=load)
    yield PEFT.format(load=load, subfolder="" if base.is_single_file else ', subfolder="unet"')
    if settings["train_text_encoder"] and not base.is_single_file:
        yield PEFT_TEXT_ENCODER.format(source=source)
    yield from PROGRAMS


def _training(config: Mapping[str, Any]) -> str:
    settings = config["settings"]
    rows = {name: settings[name] for name in SETTINGS if _is_set(settings.get(name))}
    rows |= {"steps": config["total_steps"], "warm-up steps": config["warmup_steps"]}
    if config["buckets"]:
        counts = config["buckets"]["pictures"].items()
        rows["buckets, images an epoch"] = ", ".join(f"{size}: {count}" for size, count in counts)
    rows |= {"precision": config["dtype"], "seed": settings["seed"]}
    table = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    versions = ", ".join(f"{package} {version}" for package, version in config["versions"].items())
    lines = ["## How it was trained", "", "| Setting | Value |", "| --- | --- |", *table]
    return "\n".join([*lines, "", f"With {versions}."])


def _is_set(value: Any) -> bool:
    return value not in (None, False, 0)


def _cell(value: Any) -> str:
    return code(value).replace("|", "\\|")


def _data(config: Mapping[str, Any], num_images: int, num_written: int) -> str:
    made = num_images - num_written
    text = (
        f"{plural(num_images, 'image')}; {plural(num_written, 'caption')} "
        f"{'was' if num_written == 1 else 'were'} written, {made} made from names of files or "
        "folders."
    )
    if config["class_pictures"]:
        text += (
            f" In addition {plural(config['class_pictures'], 'regularization image')}, whose loss "
            f"has the weight {config['settings']['prior_loss_weight']:g}."
        )
    return (
        f"## Data\n\n{text} This card does not say where the images come from and who owns them: "
        "whoever publishes the LoRA should."
    )


def _license(base: _Base) -> str:
    name, address = base.license
    terms = "Look up the license of the base: its terms also apply to what is made with it."
    if address:
        terms = (
            f"The base is under [{name}]({address}), whose terms also apply to what is made with "
            "it."
        )
    return f"## Base and license\n\nThe base is {base.link}. {terms}"


def code(value: Any) -> str:
    """A value as Markdown code on one line, with a fence that nothing in it can close."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{edge}{text}{edge}{ticks}" if text else ""
