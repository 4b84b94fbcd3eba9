"""Samplers by name: one word each for --scheduler, the title that A1111 shows, the class of
diffusers behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """A sampler: scheduler and settings are diffusers' class and what its from_config is told
    beside the base's own noise schedule; others are further names that it goes by, such as
    kohya's."""

    name: str
    title: str
    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()


KARRAS = {"use_karras_sigmas": True}  # Karras et al. 2022, arXiv 2206.00364
SDE = {"algorithm_type": "sde-dpmsolver++"}
DPM_MULTI = "DPMSolverMultistepScheduler"
SAMPLERS = [
    Sampler("dpm++_2m", "DPM++ 2M", DPM_MULTI, {}, ("dpmsolver++", "dpmsolvermultistep", "dpmpp_2m")),
    Sampler("dpm++_2m_karras", "DPM++ 2M Karras", DPM_MULTI, KARRAS, ("dpmpp_2m_karras",)),
    Sampler("dpm++_2m_sde", "DPM++ 2M SDE", DPM_MULTI, SDE, ("dpmpp_2m_sde",)),
    Sampler("dpm++_2m_sde_karras", "DPM++ 2M SDE Karras", DPM_MULTI, SDE | KARRAS, ("dpmpp_2m_sde_karras",)),
    Sampler("dpm++_2s", "DPM++ 2S", "DPMSolverSinglestepScheduler", {}, ("dpmsingle", "dpmsolversinglestep")),
    Sampler("euler", "Euler", "EulerDiscreteScheduler", {}, ("eulerdiscrete",)),
    Sampler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler", {}, ("euler_ancestral", "eulerancestraldiscrete")),
    Sampler("heun", "Heun", "HeunDiscreteScheduler", {}, ("heundiscrete",)),
    Sampler("dpm2", "DPM2", "KDPM2DiscreteScheduler", {}, ("dpm_2", "kdpm2discrete")),
    Sampler("dpm2_a", "DPM2 a", "KDPM2AncestralDiscreteScheduler", {}, ("dpm_2_a", "kdpm2ancestraldiscrete")),
    Sampler("ddim", "DDIM", "DDIMScheduler"),
    Sampler("ddpm", "DDPM", "DDPMScheduler"),
    Sampler("pndm", "PLMS", "PNDMScheduler", {"skip_prk_steps": True}, ("plms",)),
    Sampler("unipc", "UniPC", "UniPCMultistepScheduler", {}, ("unipcmultistep", "uni_pc")),
    Sampler("lcm", "LCM", "LCMScheduler"),
]  # fmt: skip
DEFAULT = SAMPLERS[0]


def find(word: str) -> Sampler | None:
    """The sampler that a word means: ours, A1111's title, kohya's (k_euler_a) or diffusers' class;
    None for none."""
    plain = re.sub(r"^k_", "", re.sub(r"[\s-]+", "_", word.strip().lower())).removesuffix(
        "scheduler"
    )
    for sampler in SAMPLERS:
        if plain in (sampler.name, re.sub(r"\s+", "_", sampler.title.lower()), *sampler.others):
            return sampler
    return None
