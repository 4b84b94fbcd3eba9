"""What the sample images of a run show: typed prompts, those of a file, or prompts made of the
captions. Decided before anything is loaded; needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.config.bases import suited_to
from megaman.config.presets import DEFAULT_PROMPT
from megaman.data.caption_prompts import make_prompts
from megaman.data.palette import shared_palette
from megaman.lora.notes import to_header
from megaman.models.configs import settings_name
from megaman.sampling.defaults import NUM_PROMPTS
from megaman.sampling.prompts import BUILT_IN, Prompt, log_syntax, read_prompts

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.data.dataset import MegaManDataset
    from megaman.training.datasets import Datasets

PROMPTS_FILE = "--validation_prompts_file"
CARD = "card"  # within a step's folder of samples: those of the model card
NUM_CARD_SAMPLES = 4
# Prompts that a LoRA should leave alone, in words that the embedded base knows too (drift.py).
UNRELATED = ("an orange cat, blue background", "a person, city background")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplePlan:
    """The prompts of the sample images, num_images of each; those of the model card, one image of
    each, if they are others than the last sample images; and what makes the notes of the LoRA's
    files on generating with it (lora.notes), once and when they are needed: every image may have to
    be decoded for its colors."""

    prompts: Sequence[Prompt]
    num_images: int
    card_prompts: Sequence[Prompt]
    notes: Callable[[], Mapping[str, str]]

    @property
    def texts(self) -> list[str]:
        """All texts that the text encoder has to encode, and the empty one."""
        prompts = [*self.prompts, *self.card_prompts]
        texts = chain.from_iterable((prompt.text, prompt.negative_prompt) for prompt in prompts)
        unrelated = UNRELATED if self.prompts else ()
        return list(dict.fromkeys([*(text for text in texts if text), "", *unrelated]))


def plan_samples(config: TrainConfig, datasets: Datasets) -> SamplePlan:
    """Choose the prompts, and log what of them is not understood.

    The default follows the captions, unless they name Mega Man or there are none. Raises UserError
    if the file of prompts cannot be used.
    """
    captions, trigger = datasets.images.captions, config.captions.trigger_word
    found = make_prompts(captions, trigger, NUM_PROMPTS)
    suited = suited_to(settings_name(config.base.pretrained_model_name))
    notes = cache(partial(_make_notes, found, suited, datasets.images, config.data.background))
    count = config.validation.num_validation_images
    if count == 0:
        return SamplePlan((), 0, (), notes)
    file = config.validation.validation_prompts_file
    if file is not None:
        prompts, warnings = read_prompts(Path(file), PROMPTS_FILE)
        for warning in warnings:
            log.info(warning)
    else:
        text = config.validation.validation_prompt
        is_chosen = "validation_prompt" in config.explicit or text != DEFAULT_PROMPT
        prompts = [Prompt(text if is_chosen or not found else found[0])]
    log_syntax(prompts)
    is_typed = file is not None or "validation_prompt" in config.explicit
    card_prompts = [] if is_typed else _card_prompts(found)
    return SamplePlan(prompts, count, card_prompts, notes)


def _make_notes(
    prompts: Sequence[str], suited: Mapping[str, Any], images: MegaManDataset, background: str
) -> dict[str, str]:
    paths = [example.image for example in images.examples]
    return to_header(prompts, suited, shared_palette(paths, background))


def _card_prompts(found: Sequence[str]) -> list[Prompt]:
    """Different prompts about the character, for the model card."""
    texts = found or [prompt.text for prompt in read_prompts(BUILT_IN)[0]]
    return [Prompt(text) for text in texts[:NUM_CARD_SAMPLES]]
