"""What is generated if the command line does not say: what the LoRA's files note, what suits the
base, and at last the flags' own defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaman.config.bases import suited_to
from megaman.data.caption_prompts import make_prompts_from_counts
from megaman.lora import peft_config
from megaman.lora.notes import LoraNotes, read_notes
from megaman.models.configs import settings_name

NUM_PROMPTS = 10  # as many as the built-in ones


@dataclass(frozen=True)
class GenerationDefaults:
    """prompts are about what the first LoRA that knows its captions was trained on, none if no LoRA
    does; settings are values by flag."""

    prompts: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def find_defaults(loras: Sequence[Path], base_model: str | None) -> GenerationDefaults:
    """The defaults for these LoRAs on a base, None for that of the LoRAs.

    What a LoRA notes of its base does not hold for another one. Raises UserError if there is no
    LoRA.
    """
    noted = [read_notes(path) for path in loras]
    prompts = next(filter(None, map(_prompts_of, noted)), [])
    if base_model is not None:
        return GenerationDefaults(prompts, suited_to(settings_name(base_model)))
    for path, notes in zip(loras, noted, strict=True):
        base = peft_config.base_of(path)
        settings = notes.settings or (base and suited_to(settings_name(base)))
        if settings:
            return GenerationDefaults(prompts, settings)
    return GenerationDefaults(prompts)


def _prompts_of(notes: LoraNotes) -> Sequence[str]:
    counts = notes.tag_counts
    return notes.prompts or make_prompts_from_counts(counts, notes.trigger, NUM_PROMPTS)
