"""README.md of lora_weights/: what the LoRA is, how it was made, how to load it; the folder is
published with it.

The head is YAML as the Hugging Face hub reads it; JSON's strings are YAML's too.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaman.data.captions import CaptionAugmentation, tidy, trigger_words
from megaman.hub import HUB_NAME

MOST_SAMPLES = 4
# Licences of the bases that are taken most, by the hub's word for them. Others are named without
# one.
OPENRAIL = (
    "creativeml-openrail-m",
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
)
CC_BY = ("cc-by-4.0", "https://creativecommons.org/licenses/by/4.0/")
LICENCES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL,
    "runwayml/stable-diffusion-v1-5": OPENRAIL,
    "CompVis/stable-diffusion-v1-4": OPENRAIL,
    "CompVis/stable-diffusion-v1-3": OPENRAIL,
    "CompVis/stable-diffusion-v1-2": OPENRAIL,
    "CompVis/stable-diffusion-v1-1": OPENRAIL,
    "demo/base": CC_BY,
}
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


def write_card(
    config: Mapping[str, Any], captions: Sequence[str], found: int, samples: Path
) -> dict[str, bytes]:
    """The card and its images as files to put into the folder: {name: content}.

    config is the content of training_config.json, captions those trained on, found how many of them
    stood beside their picture, samples the folder with the last sample images (it need not exist).
    """
    files = {}
    for picture in sorted(samples.glob("*.png"))[:MOST_SAMPLES]:
        with contextlib.suppress(OSError):  # an image that is gone must not cost the LoRA
            files[f"sample_{picture.name}"] = picture.read_bytes()
    return {
        "README.md": _card(config, captions, found, list(files)).encode(
            "utf-8", "backslashreplace"
        ),
        **files,
    }


def _card(
    config: Mapping[str, Any], captions: Sequence[str], found: int, samples: list[str]
) -> str:
    settings, base = config["settings"], config["base"]
    one_file = base.lower().endswith(".safetensors")
    on_hub = HUB_NAME.fullmatch(base) and not base.startswith("demo/") and not one_file
    name = (
        base if on_hub or base == "demo/base" else tidy(Path(base).name) or "base"
    )  # a folder's whole path is nobody's business
    shown = f"[{name}](https://huggingface.co/{name})" if on_hub else code(name)
    if base == "demo/base":
        shown = "the small base that comes with the project (`demo/base`)"
    licence, address = LICENCES.get(base, ("other", ""))
    trigger, prompt = (
        tidy(settings["trigger_word"] or trigger_words(captions)),
        tidy(settings["validation_prompt"]),
    )
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": licence,
        "tags": ["lora", "stable-diffusion", "text-to-image", "diffusers", "peft"],
    }
    if on_hub:
        head["base_model"] = base
    if trigger:
        head["instance_prompt"] = trigger
    if samples:
        head["widget"] = [{"text": prompt, "output": {"url": file}} for file in samples]
    yaml = "\n".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()
    )
    images = "\n".join(
        f"![Sample {number}]({file})" for number, file in enumerate(samples, start=1)
    )
    rows = [
        (flag, settings[flag]) for flag in SETTINGS if settings.get(flag) not in (None, False, 0)
    ]
    rows += [("steps", config["total_steps"]), ("warm-up steps", config["warmup_steps"])]
    if config["buckets"]:
        rows.append(
            (
                "buckets, pictures an epoch",
                ", ".join(
                    f"{size}: {count}" for size, count in config["buckets"]["pictures"].items()
                ),
            )
        )
    rows += [("precision", config["dtype"]), ("seed", settings["seed"])]
    table = "\n".join(
        "| {} | {} |".format(flag, code(value).replace("|", "\\|")) for flag, value in rows
    )
    versions = ", ".join(f"{package} {version}" for package, version in config["versions"].items())
    source, text_too = json.dumps(name, ensure_ascii=False), settings["train_text_encoder"]
    subfolder = "" if one_file else ', subfolder="unet"'
    loaded = f"from_{'single_file' if one_file else 'pretrained'}({source}"
    terms = (
        f"The base is under [{licence}]({address}), whose terms hold for what is made with it too."
        if address
        else "Look up the licence of the base: its terms hold for what is made with it too."
    )
    regular = (
        f" Beside them {config['class_pictures']} regularisation pictures, whose loss counts "
        f"{settings['prior_loss_weight']:g} times."
        if config["class_pictures"]
        else ""
    )
    parts = [
        f"---\n{yaml}\n---",
        f"# A LoRA for {code(name)}",
        f"A LoRA for Stable Diffusion 1.x, trained on {len(captions)} pictures with the base {shown}."
        + (" It changes the UNet and the text encoder." if text_too else ""),
        f"Use {code(trigger)} in the prompt: most of the captions begin with it."
        if trigger
        else "",
        f"## Samples\n\n{images}\n\nPrompt: {code(prompt)}, strength 1, 25 steps, guidance 7.5, seeds from "
        f"{settings['seed']} on, drawn after the last step."
        if samples
        else "",
        "## How to load it\n\nThis folder holds the same LoRA in three layouts, with its strength in each.",
        f"diffusers, from this folder:\n\n```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f"pipe = StableDiffusionPipeline.{loaded})\n"
        f'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")\n```',
        f"PEFT:\n\n```python\nfrom diffusers import UNet2DConditionModel\nfrom peft import PeftModel\n\n"
        f"unet = UNet2DConditionModel.{loaded}{subfolder})\n"
        f'unet = PeftModel.from_pretrained(unet, ".")\n```',
        f"and its part for the text encoder:\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import CLIPTextModel\n\n"
        f'text_encoder = CLIPTextModel.from_pretrained({source}, subfolder="text_encoder")\n'
        f'text_encoder = PeftModel.from_pretrained(text_encoder, "text_encoder")\n```'
        if text_too and not one_file
        else "",
        "A1111: copy `megaman_lora.safetensors` to `models/Lora` and write `<lora:megaman_lora:1>` in the prompt.",
        "ComfyUI: copy `megaman_lora.safetensors` to `models/loras` and choose it in the Load LoRA node.",
        "Mega Man LoRA: `python generate_megaman.py --lora_path THIS_FOLDER`.",
        f"## How it was trained\n\n| Setting | Value |\n| --- | --- |\n{table}\n\nWith {versions}.",
        f"## Data\n\n{len(captions)} pictures; {found} captions were written, {len(captions) - found} made from names "
        f"of files or folders.{regular} Nothing is said here of where the pictures come from and who owns them: "
        "whoever publishes this should.",
        f"## Base and licence\n\nBase: {shown}. {terms}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def code(value: Any) -> str:
    """A value as Markdown shows it unchanged, on one line."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{edge}{text}{edge}{ticks}" if text else ""
