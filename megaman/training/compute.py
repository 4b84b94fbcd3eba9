"""How a run computes its steps: by a rule, or as the checkpoint says that it resumes from.
Checkpoints note it.

And what to do when memory was not enough: make room step by step, and keep the mathematics of the
run as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import is_xformers_available

from megaman import schema
from megaman.errors import UserError, summarize_error
from megaman.runtime import DTYPES, Placement, place
from megaman.threads import MAX_THREADS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

XFORMERS = "enable_xformers_memory_efficient_attention"  # diffusers' flag
# The flags that decide each choice. The VAE's tiles follow from the memory alone.
FLAGS = {
    "dtype": ("mixed_precision",),
    "memory_format": ("memory_format",),
    "attention": (XFORMERS,),
    "compile": ("compile",),
    "gradient_checkpointing": ("gradient_checkpointing",),
    "vae_tile": (),
    "split": ("train_batch_size", "gradient_accumulation_steps"),
}
ASKED = [flag for flags in FLAGS.values() for flag in flags]
WORDS = {str(dtype).removeprefix("torch."): word for word, dtype in DTYPES.items()}


@dataclass
class Split:
    """How the pictures of one optimizer step are computed: count micro-batches of size pictures a
    process."""

    size: int
    count: int

    def shrink(self) -> bool:
        """Halve the micro-batch (or take its largest part) and accumulate the more; False where it
        is one picture."""
        if self.size == 1:
            return False
        smaller = next(part for part in range(self.size // 2, 0, -1) if self.size % part == 0)
        self.size, self.count = smaller, self.count * (self.size // smaller)
        return True


def checkpoint_gradients(models: Sequence[UNet2DConditionModel | CLIPTextModel]) -> None:
    """Have the models in training compute their activations anew in the backward pass instead of
    keeping them (Chen et al. 2016, arXiv 1604.06174); diffusers and transformers call it
    differently."""
    for model in models:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.enable_gradient_checkpointing()


def keep_activations(model: UNet2DConditionModel | CLIPTextModel) -> None:
    """The opposite of checkpoint_gradients, for one model."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.disable_gradient_checkpointing()


def make_room(
    models: Sequence[UNet2DConditionModel | CLIPTextModel], split: Split, size: int
) -> str:
    """Take the next measure against too little memory in training and return it in words.

    First gradient checkpointing, then smaller micro-batches of which more are accumulated: neither
    changes what a step computes. Raises UserError where both are used up; models are those in
    training, the UNet first; size is the pictures' side in pixels.
    """
    if not models[0].is_gradient_checkpointing:
        checkpoint_gradients(models)
        return "gradient checkpointing is on from here"
    if split.shrink():
        return f"from here {split.count} micro-batches of {split.size} make a step, with the same effective batch"
    smaller = max(size * 3 // 4 // 8 * 8, 8)
    raise UserError(
        f"Even one picture of {size} px at a time with gradient checkpointing is too much for this memory",
        f"--resolution {smaller} needs about {smaller**2 / size**2:.0%} of it; or close other programs",
    )


@dataclass
class Choices:
    """What shapes the computation of a step and not its mathematics.

    device is the kind (cuda, mps, cpu), dtype the frozen base's, attention sdpa or xformers,
    vae_tile the side in pixels of the VAE's tiles while it draws (0: none), split how a step's
    pictures are computed, asked the values of the flags behind all that, threads the number of CPU
    threads of torch (see threads.py).
    """

    device: str
    dtype: str
    memory_format: str
    attention: str
    compile: bool
    gradient_checkpointing: bool
    vae_tile: int
    split: Split
    asked: dict[str, Any]
    threads: int

    def apply(self, unet: UNet2DConditionModel) -> None:
        """Have the UNet compute as chosen, but for gradient checkpointing; raises UserError where
        xformers cannot."""
        if self.attention == "xformers":
            try:
                unet.enable_xformers_memory_efficient_attention()
            except (
                Exception
            ) as error:  # its kernels are of another build, or this card is none of theirs
                remedy = f"Leave --{XFORMERS} out: torch's own attention is as frugal"
                raise UserError(
                    f"xformers cannot be used here ({summarize_error(error)})", remedy
                ) from None
        # in place: the parameters keep their names, and blocks of one kind share what is compiled
        if self.compile:
            unet.compile_repeated_blocks()

    def record(self, unet: UNet2DConditionModel) -> dict[str, Any]:
        """The choices as JSON, as they are by now: where memory ran out, checkpointing and split
        have changed."""
        return asdict(self) | {"gradient_checkpointing": unet.is_gradient_checkpointing}


def choose(
    asked: Mapping[str, Any], given: Collection[str], device: torch.device, width: int, saved: Any
) -> tuple[Choices, Placement, list[str]]:
    """The choices of a run, where it computes, and what to say of them.

    What a checkpoint noted on the same kind of device is taken over, unless a flag given says
    something else than then.

    Args:
        asked: the values of the flags in ASKED.
        given: the names of the flags on the command line.
        width: channels of the UNet's first block.
        saved: what the checkpoint noted, if anything.

    Raises UserError where xformers is asked for on a card and not installed.
    """
    earlier, remarks = _earlier(saved, device.type)
    rule = _by_rule(asked, device, width)
    stays = [
        name
        for name, flags in FLAGS.items()
        if earlier
        and all(flag not in given or asked[flag] == earlier.asked.get(flag) for flag in flags)
        and _still_possible(name, earlier, rule)
    ]
    told = {flag: earlier.asked.get(flag) for name in stays for flag in FLAGS[name]}
    chosen = replace(
        rule, asked=rule.asked | told, **{name: getattr(earlier, name) for name in stays}
    )

    word = asked["mixed_precision"] if chosen.dtype == rule.dtype else WORDS[chosen.dtype]
    placement = place(word, device, width, chosen.memory_format)
    chosen.dtype = str(placement.dtype).removeprefix(
        "torch."
    )  # this card may not have the other one's
    if chosen.dtype != rule.dtype:
        placement = replace(placement, why=f"{chosen.dtype} as in the checkpoint")
    if different := [name for name in FLAGS if getattr(chosen, name) != getattr(rule, name)]:
        pairs = [
            f"{name} {_in_words(chosen, name)} instead of {_in_words(rule, name)}"
            for name in different
        ]
        remarks.append(f"           as in the checkpoint: {', '.join(pairs)}")
    if asked[XFORMERS] and device.type != "cuda":
        remarks.append(
            "           xformers needs an NVIDIA card: torch's own attention (sdpa) is used"
        )
    if asked["compile"] and device.type != "cuda":
        remarks.append(
            f"           --compile is for NVIDIA cards: on {device.type} it would cost more than it saves"
        )
    return chosen, placement, remarks


def _by_rule(asked: Mapping[str, Any], device: torch.device, width: int) -> Choices:
    """What a new run would choose."""
    placement, card = (
        place(asked["mixed_precision"], device, width, asked["memory_format"]),
        device.type == "cuda",
    )
    if asked[XFORMERS] and card and not is_xformers_available():
        raise UserError(
            f"--{XFORMERS}: xformers is not installed",
            "pip install xformers, or leave the flag out",
        )
    return Choices(
        device.type,
        str(placement.dtype).removeprefix("torch."),
        placement.memory_format,
        "xformers" if asked[XFORMERS] and card else "sdpa",
        asked["compile"] and card,
        asked["gradient_checkpointing"],
        0,
        Split(asked["train_batch_size"], asked["gradient_accumulation_steps"]),
        {**asked},
        torch.get_num_threads(),
    )


def _still_possible(name: str, earlier: Choices, rule: Choices) -> bool:
    if name == "attention":
        return earlier.attention == "sdpa" or (rule.device == "cuda" and is_xformers_available())
    if name == "compile":
        return not earlier.compile or rule.device == "cuda"
    return (
        name != "split"
        or earlier.split.size * earlier.split.count == rule.split.size * rule.split.count
    )


def _earlier(saved: Any, device: str) -> tuple[Choices | None, list[str]]:
    """What a checkpoint noted, None where it is nothing for this device, and what to say of
    that."""
    if saved is None:  # a new run, or a checkpoint from before there were choices
        return None, []
    if isinstance(saved, dict):
        saved = {"threads": torch.get_num_threads(), **saved}  # earlier checkpoints do not say
    if not _is_choices(saved):
        return None, [
            "           what the checkpoint says of how it computed is damaged: chosen anew"
        ]
    if saved["device"] != device:
        return None, [
            f"           the checkpoint was computed on {saved['device']}: chosen anew for {device}"
        ]
    return Choices(
        **{field.name: saved[field.name] for field in fields(Choices)}
        | {"split": Split(**saved["split"])}
    ), []


def _in_words(choices: Choices, name: str) -> str:
    value = getattr(choices, name)
    if isinstance(value, Split):
        return f"{value.size} x {value.count}"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


_is_on_or_off = schema.one_of(True, False)
_is_part = schema.whole(1, 2**28)
_is_choices = schema.record(
    {
        "device": schema.one_of("cuda", "mps", "cpu"),
        "dtype": schema.one_of(*WORDS),
        "memory_format": schema.one_of("contiguous", "channels_last"),
        "attention": schema.one_of("sdpa", "xformers"),
        "compile": _is_on_or_off,
        "gradient_checkpointing": _is_on_or_off,
        "vae_tile": schema.whole(0, 8192),
        "split": schema.record({"size": _is_part, "count": _is_part}, exact=True),
        "asked": schema.mapping(schema.instance(bool, int, str, type(None))),
        "threads": schema.whole(1, MAX_THREADS),
    }
)
