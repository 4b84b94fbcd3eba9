"""Samplers: the name for --scheduler, A1111's title, and diffusers' class and settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """A sampler.

    scheduler is diffusers' class, and settings are for its from_config, in addition to the base's
    noise schedule. aliases are other names, such as kohya's.
    """

    name: str
    title: str
    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name of the sampler."""
        return (self.name, self.title, *self.aliases)


KARRAS = {"use_karras_sigmas": True}  # Karras et al. 2022, arXiv 2206.00364
SDE = {"algorithm_type": "sde-dpmsolver++"}
DPM_MULTI = "DPMSolverMultistepScheduler"
SAMPLERS = [
    Sampler(
        "dpm++_2m", "DPM++ 2M", DPM_MULTI, {}, ("dpmsolver++", "dpmsolvermultistep", "dpmpp_2m")
    ),
    Sampler("dpm++_2m_karras", "DPM++ 2M Karras", DPM_MULTI, KARRAS, ("dpmpp_2m_karras",)),
    Sampler("dpm++_2m_sde", "DPM++ 2M SDE", DPM_MULTI, SDE, ("dpmpp_2m_sde",)),
    Sampler(
        "dpm++_2m_sde_karras",
        "DPM++ 2M SDE Karras",
        DPM_MULTI,
        SDE | KARRAS,
        ("dpmpp_2m_sde_karras",),
    ),
    Sampler(
        "dpm++_2s",
        "DPM++ 2S",
        "DPMSolverSinglestepScheduler",
        {},
        ("dpmsingle", "dpmsolversinglestep"),
    ),
    Sampler("euler", "Euler", "EulerDiscreteScheduler", {}, ("eulerdiscrete",)),
    Sampler(
        "euler_a",
        "Euler a",
        "EulerAncestralDiscreteScheduler",
        {},
        ("euler_ancestral", "eulerancestraldiscrete"),
    ),
    Sampler("heun", "Heun", "HeunDiscreteScheduler", {}, ("heundiscrete",)),
    Sampler("dpm2", "DPM2", "KDPM2DiscreteScheduler", {}, ("dpm_2", "kdpm2discrete")),
    Sampler(
        "dpm2_a",
        "DPM2 a",
        "KDPM2AncestralDiscreteScheduler",
        {},
        ("dpm_2_a", "kdpm2ancestraldiscrete"),
    ),
    Sampler("ddim", "DDIM", "DDIMScheduler"),
    Sampler("ddpm", "DDPM", "DDPMScheduler"),
    Sampler("pndm", "PLMS", "PNDMScheduler", {"skip_prk_steps": True}, ("plms",)),
    Sampler("unipc", "UniPC", "UniPCMultistepScheduler", {}, ("unipcmultistep", "uni_pc")),
    Sampler("lcm", "LCM", "LCMScheduler"),
]
DEFAULT = SAMPLERS[0]


def find(word: str) -> Sampler | None:
    """The sampler of a name, which may be A1111's, kohya's (k_euler_a) or diffusers'; or None."""
    plain = re.sub(r"[\s-]+", "_", word.strip().lower()).removeprefix("k_")
    plain = plain.removesuffix("scheduler")
    for sampler in SAMPLERS:
        names = {re.sub(r"\s+", "_", name.lower()) for name in sampler.all_names}
        if plain in names:
            return sampler
    return None


def by_name(name: str) -> Sampler:
    """The sampler of a name that was checked with `find`; raises KeyError for another."""
    sampler = find(name)
    if sampler is None:
        raise KeyError(name)
    return sampler
