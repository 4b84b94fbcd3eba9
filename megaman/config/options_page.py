"""Write docs/options.md, every flag of both scripts by section, from the fields of the configs, and
its translation.

    python -m megaman.config.options_page

The pages are never edited by hand. A flag's meaning is its help text; DETAILS adds what --help has
no room for. docs/zh-TW/options.json has the translations, each with the English text that it is
of: if that has changed, or if there is none, the page shows the English text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from megaman.config import samplers
from megaman.config.cli import groups_of
from megaman.config.generate import GenerateConfig
from megaman.config.settings import TrainConfig
from megaman.hub import PROJECT

PAGE = PROJECT / "docs" / "options.md"
CHINESE_PAGE = PROJECT / "docs" / "zh-TW" / "options.md"
TRANSLATIONS = CHINESE_PAGE.with_suffix(".json")
SCRIPTS = {"megaman_lora.py": TrainConfig, "generate_megaman.py": GenerateConfig}
DEFAULT_IN_WORDS = re.compile(r" \(default: (.+)\)$")  # at the end of a help text
HEAD = """\
<!-- Written by `python -m megaman.config.options_page`: do not edit, run it again. -->

# Options

Every flag of both scripts. `--help` shows those that most runs use, `--help_all` all of them, and
`--version` the version. A value follows after a space or `=`; the last of a repeated flag wins.
A mistyped flag or a value out of range ends the script before anything is loaded (exit code 2).

Sections of [`megaman_lora.py`](#megaman_lorapy): {train_sections}.
Sections of [`generate_megaman.py`](#generate_megamanpy): {generate_sections}.

† A resumed run must have the same value as the run that it continues.
"""
# Sentences for the page alone, by script and flag.
DETAILS = {
    "megaman_lora.py": {
        "base_precision": "`fp8` stores each weight in one byte (e4m3, with one scale per output "
        "channel), computes in `--mixed_precision` as before, and takes longer for each step. Not "
        "on Apple's GPUs, for which PyTorch has no float8. The LoRA is saved as ever and loads "
        "everywhere",
        "config": "Or of an earlier run: its `training_config.json`. Typed flags win. Keys are the "
        "flags' names without dashes, lists where a flag takes several words, `true` and `false` "
        "for switches; relative paths are relative to the working directory. From a "
        "`training_config.json` the flags that were typed count as typed, and its seed is used: "
        "with another `--output_dir` the run is repeated",
        "preset": "See [the three strategies](training.md#three-strategies)",
        "demo": "Other flags still win over its settings",
        "pretrained_model_name": "Stable Diffusion 1.x. The name `runwayml/stable-diffusion-v1-5` "
        "has left the hub; the same weights are taken from "
        "`stable-diffusion-v1-5/stable-diffusion-v1-5`",
        "class_data_dir": "See [regularization images](dataset.md#regularization-images)",
        "center_crop": "See [crops](dataset.md#crops)",
        "enable_bucket": "See [tall and wide images](dataset.md#tall-and-wide-images)",
        "auto_caption": "See [automatic captions](dataset.md#automatic-captions)",
        "lora_alpha": "See [rank and alpha](training.md#rank-and-alpha)",
        "train_text_encoder": "See [the text encoder](training.md#the-text-encoder)",
        "resume_from_checkpoint": "See [stop and resume](training.md#stop-and-resume)",
        "plan": "See [out of memory](troubleshooting.md#out-of-memory)",
        "system_info": "With the remedies, and without loading anything broken; the text for a bug "
        "report. See [installation](troubleshooting.md#installation)",
        "check_data": "See [check the data](dataset.md#check-the-data)",
        "dataset_repeats": "Multiplies the number of kohya's folders such as `10_volto`",
        "resolution": "With buckets, the number of pixels of its square is the most that an image "
        "has",
        "random_flip": "At random, at every visit",
        "upscale": "`nearest` enlarges by whole factors and pads; a run names the images that "
        "`auto` took for pixel art. Only images below `--resolution` are concerned; a run resumed "
        "from an earlier version's checkpoint needs `lanczos` if some of its images are pixel art",
        "background": "Also the padding around transparent pixel art",
        "alpha_mask": "As in kohya's scripts: what is transparent does not count, nor does padding "
        "around pixel art",
        "lora_rank": "How much the LoRA can hold, and how large its file is",
        "network_weights": "In any format that is read. The run begins with its effect, "
        "whatever `--lora_alpha`; a lower rank gets more rows, a higher one is refused. "
        "Its half for the text encoder is trained further with `--train_text_encoder` alone",
        "use_rslora": "[rsLoRA](https://arxiv.org/abs/2312.03732); choose a lower alpha with it",
        "lora_dropout": "Against memorizing; 0.1 is usual",
        "target_modules": "Matched by the end of their names; convolutions too, such as `conv1`",
        "max_train_steps": "`auto` ends when held-out images gain no more; see "
        "[learned or memorized](training.md#learned-or-memorized)",
        "validation_split": "See [learned or memorized](training.md#learned-or-memorized)",
        "early_stopping_patience": "`lora_weights/` then holds the best LoRA",
        "optimizer": "`pip install bitsandbytes==0.50.2` or `prodigyopt==1.1.2` first. Prodigy "
        "finds the learning rate; `--learning_rate` is a factor on it, 1 unless it is typed. All "
        "three take betas, epsilon and weight decay",
        "lr_warmup_steps": "The default shrinks to a tenth of a short run; `constant` has no "
        "warmup",
        "snr_gamma": "[Min-SNR](https://arxiv.org/abs/2303.09556)",
        "noise_offset": "For very dark or very bright images",
        "mixed_precision": "If the device cannot compute in it, another is used and reported. On a "
        "CPU `fp16` means bf16 if that is faster, else float32",
        "memory_format": "`auto` is `channels_last` on a CPU, and on NVIDIA GPUs in half "
        "precision",
        "enable_xformers_memory_efficient_attention": "Needs `pip install xformers`",
        "compile": "The first steps take minutes longer",
        "vram_limit": "On a CPU it only affects `--plan`",
        "dataloader_num_workers": "With `--no_cache`, threads that decode them during training",
        "overwrite_output": "Without it, a finished run is never replaced",
        "log_format": "Each object has `time`, `event` (`step`, `samples`, `checkpoint`, `done`, "
        "or `log` for other lines) and `message`; errors stay lines on standard error",
        "open": "`training_report.html` in `--output_dir`; it is written without this flag too",
        "validation_prompt": "The default is made of the captions unless these are about Mega "
        "Man. With weights and of any length, as for `generate_megaman.py`",
        "validation_prompts_file": "With seed, size, guidance and negative prompt per line",
        "clip_model": "With its config.json and safetensors; nothing is downloaded",
        "num_validation_images": "With `--validation_prompts_file` 1 of each prompt",
        "save_precision": "`fp16` halves the files",
    },
    "generate_megaman.py": {
        "compare": "Such as `--compare a.safetensors b.safetensors:0.5`, with the same prompts and "
        "seeds; one for another base is skipped with a line",
        "config": "As for `megaman_lora.py`",
        "lora_path": "Files of kohya's scripts, A1111, ComfyUI and diffusers too; see "
        "[other LoRAs](generation.md#loras-from-elsewhere-and-several-at-once)",
        "pixel_art": "As `NAME_pixel.png`. Each cell has its median color, and of the palette the "
        "nearest: an image of at most 256 colors, a `.hex` list or a `.gpl` file; else the colors "
        "of the images that the LoRA was trained on, if these were pixel art",
        "prompts_file": "A line may bring its own settings; see "
        "[prompts files](generation.md#prompts-files)",
        "clip_model": "If the LoRA was trained with the same one",
        "guidance_scale": "At 1 or less the negative prompt has no effect",
        "scheduler": "One of " + ", ".join(f"`{entry.name}`" for entry in samplers.SAMPLERS),
        "clip_skip": "1 is the last layer, which diffusers calls 0",
        "from_image": "Only `--output_dir`, `--open`, `--device`, `--base_model`, `--lora_path` "
        "and `--pixel_art` go with it",
    },
}  # fmt: skip


def options_page() -> str:
    """The text of docs/options.md."""
    return _page(HEAD, {})


def chinese_page() -> str:
    """The text of docs/zh-TW/options.md; its first line has the hash of the English page."""
    translations = json.loads(TRANSLATIONS.read_text(encoding="utf-8"))
    digest = hashlib.sha256(options_page().encode()).hexdigest()[:16]
    first_line = f"<!-- Translation of docs/options.md, sha256 {digest} -->\n"
    return first_line + _page("\n".join(translations["head"]) + "\n", translations)


def _page(head: str, translations: dict[str, Any]) -> str:
    """The page of all flags, in English where translations lacks a text."""
    sections = {script: _section_links(script, translations) for script in SCRIPTS}
    head = head.format(
        train_sections=sections["megaman_lora.py"],
        generate_sections=sections["generate_megaman.py"],
    )
    return head + "".join(_script(script, translations) for script in SCRIPTS)


def _section_links(script: str, translations: dict[str, Any]) -> str:
    """The sections' names; GitHub's anchors of equal headings are numbered, so only the training
    script's, which come first, are linked."""
    groups = groups_of(SCRIPTS[script]).values()
    names = [_translate(group.__doc__ or "", translations) for group in groups]
    if script == "megaman_lora.py":
        names = [f"[{name}](#{_anchor(name)})" for name in names]
    return _translate(", ", translations).join(names)


def _translate(text: str, translations: dict[str, Any]) -> str:
    """A text that is the same wherever it stands: a section's name, a default in words."""
    return translations.get("words", {}).get(text, text)


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _script(script: str, translations: dict[str, Any]) -> str:
    parts = [f"\n## `{script}`\n"]
    columns = [_translate(column, translations) for column in ("Flag", "Default", "Meaning")]
    for group in groups_of(SCRIPTS[script]).values():
        rows = "\n".join(_rows(group, script, translations))
        table = f"| {' | '.join(columns)} |\n| --- | --- | --- |\n{rows}\n"
        title = _translate(group.__doc__ or "", translations)
        parts.append(f"\n### {title}\n\n{table}")
    return "".join(parts)


def _rows(group: type, script: str, translations: dict[str, Any]) -> Iterator[str]:
    meanings = translations.get("meanings", {}).get(script, {})
    for config_field in fields(group):
        name, mark = config_field.name, " †" if config_field.metadata["flag"].resume else ""
        meaning = _meaning(config_field, DETAILS[script].get(name))
        if name in meanings and meanings[name]["en"] == meaning:
            meaning = meanings[name]["zh"]
        elif translations:
            meaning = re.sub(r"\]\((?=[\w-]+\.md)", "](../", meaning)  # leads to English pages
        default = _translate(_default(config_field), translations)
        cells = [f"`--{name}`{mark}", default, meaning]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(config_field: Field) -> str:
    """In backticks as it is typed, or in words if nothing typed would be the same."""
    if phrase := DEFAULT_IN_WORDS.search(config_field.metadata["flag"].help):
        return _with_code(phrase[1])
    if config_field.default is False:
        return "off"
    if config_field.default is None or config_field.default == "":
        return "none"
    return f"`{_typed(config_field.default)}`"


def _typed(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float) and 0 < value < 0.001:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(config_field: Field, detail: str | None) -> str:
    flag = config_field.metadata["flag"]
    unit = ", in GB" if flag.metavar == "GB" else ""
    sentences = [DEFAULT_IN_WORDS.sub("", flag.help) + unit]
    unnamed = [word for word in flag.choices or () if word not in flag.help]
    if unnamed:
        sentences.append("One of " + ", ".join(f"`{word}`" for word in flag.choices))
    if detail:
        sentences.append(detail)
    text = ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return _with_code(text)


def _with_code(text: str) -> str:
    """Flags in words are set as code."""
    return re.sub(r"(?<![`\w-])--\w+", r"`\g<0>`", text)


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8", newline="\n")
    CHINESE_PAGE.write_text(chinese_page(), encoding="utf-8", newline="\n")
