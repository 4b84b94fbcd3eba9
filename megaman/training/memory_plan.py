"""How training fits into the memory at hand: what is chosen before step 1, or refused in a line;
--plan's table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL

from megaman import runtime
from megaman.errors import UserError, summarize_error
from megaman.models.configs import read_configs, resolve_name
from megaman.runtime import DTYPES, Placement, choose_device, place
from megaman.training import compute
from megaman.training.memory_estimate import GB, Plan, gigabytes

BATCHES = (1, 2, 4)  # of the table


@dataclass
class Fit:
    """What a run does so that it fits: the side of the VAE's tiles while it draws, 0 for none;
    gradient checkpointing; and what to say of it."""

    checkpointing: bool
    tile: int = 0
    lines: Sequence[str] = ()

    def tile_vae(self, vae: AutoencoderKL) -> None:
        """Have the VAE work in tiles where that was chosen. After encoding: the pictures' latents
        stay as they are."""
        if self.tile:
            vae.enable_tiling()
            vae.tile_latent_min_size = (
                self.tile * vae.tile_latent_min_size // vae.tile_sample_min_size
            )
            vae.tile_sample_min_size = self.tile


def fit(
    plan: Plan, split: compute.Split, checkpointing: bool, limit: float, can_shrink: bool
) -> Fit:
    """Make a run fit into limit bytes without changing what it computes.

    VAE tiling for sample images first, then gradient checkpointing, then smaller micro-batches of
    which more are accumulated (split is changed; only with can_shrink). Sample images that do not
    fit all the same are no reason against the run: Validation leaves them out. Raises UserError
    where training does not fit, with what would.
    """
    usable, before, done = limit * runtime.USABLE, split.size, []
    if tiled := plan.drawing(False) > max(usable, plan.drawing(True)):
        done.append("VAE tiling for sample images")
    if not checkpointing and plan.training(split.size, False) > usable:
        checkpointing = True
        done.append("gradient checkpointing")
    while can_shrink and plan.training(split.size, checkpointing) > usable and split.shrink():
        pass
    if split.size < before:
        done.append(
            f"{split.count} micro-batches of {split.size} a step, with the same effective batch"
        )
    needed = plan.training(split.size, checkpointing)
    if needed > limit:
        raise _refusal(plan, split.size, needed, limit)
    lines = [
        f"memory     needs about {gigabytes(max(needed, plan.drawing(tiled)))} GB of {gigabytes(limit)} GB "
        f"({plan.in_words(split.size, checkpointing, tiled)})"
    ]
    if done:
        lines.append(f"           so that it fits: {', '.join(done)}")
    if plan.drawing(tiled) > limit:
        lines.append("           sample images will probably not fit; they are left out then")
    return Fit(checkpointing, plan.tile * tiled, lines)


def _refusal(plan: Plan, batch: int, needed: int, limit: float) -> UserError:
    pictures = "one picture" if batch == 1 else f"{batch} pictures"
    message = (
        f"Training on {pictures} of {plan.size} px at a time needs about {needed / GB:.2f} GB "
        f"even with gradient checkpointing, and there are {limit / GB:.2f} GB"
    )
    bounds = (limit * runtime.USABLE, limit)  # with something to spare, or else just so
    fewer = [
        count
        for bound in bounds
        for count in range(batch - 1, 0, -1)
        if plan.training(count, True) <= bound
    ]
    if fewer:
        return UserError(message, f"--train_batch_size {fewer[0]} would fit")
    step = 64 if plan.size > 64 else plan.factor
    sizes = range(plan.size // step * step, 0, -step)
    smaller = [size for bound in bounds for size in sizes if plan.training(1, True, size) <= bound]
    if smaller:
        return UserError(
            message,
            f"--resolution {smaller[0]} would fit{' with --train_batch_size 1' * (batch > 1)}",
        )
    half = (
        "--mixed_precision fp16 takes half of that; or close"
        if plan.dtype == torch.float32
        else "Close"
    )
    return UserError(
        f"{message}; the weights alone take {gigabytes(plan.weights)}", f"{half} other programs"
    )


def memory_limit(device: torch.device, vram_limit: float | None) -> float:
    """Bytes that a run may take on the device: what is free on a card, or vram_limit GB where that
    is less; infinite where nobody asks, on a CPU and on mps, which share the memory with everything
    else.

    On CUDA torch is held to vram_limit, too; the CUDA context comes on top. On a CPU the limit
    serves the plan alone.
    """
    asked = math.inf if vram_limit is None else int(vram_limit * GB)
    if device.type != "cuda":
        return asked
    free, total = torch.cuda.mem_get_info(device)
    if vram_limit is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked / total), device)
    return min(asked, free)


def settle(
    placement: Placement,
    limit: float,
    split: compute.Split,
    checkpointing: bool,
    can_shrink: bool,
    say: Callable[[str], None],
    *,
    name: str,
    **shape: Any,
) -> Fit:
    """Plan a run on the base of this name, make it fit into limit bytes (see fit), and say so;
    shape is Plan's.

    Nothing is planned where limit is infinite, since a plan takes seconds. A plan that cannot be
    made is said and is no reason against the run; one that does not fit is: raises UserError.
    """
    if limit == math.inf:
        return Fit(checkpointing)
    try:
        configs, remark = read_configs(name)
        plan = Plan(configs, placement.dtype, placement.device.type != "cpu", **shape)
        plan.training(split.size, checkpointing), plan.drawing(False)
    except Exception as error:  # whatever it is, loading the base tells it better
        say(f"memory     cannot be told beforehand ({summarize_error(error)})")
        return Fit(checkpointing)
    found = fit(plan, split, checkpointing, limit, can_shrink)
    for line in [*found.lines, *([f"           {remark}"] if remark else [])]:
        say(line)
    return found


def table(mixed_precision: str, vram_limit: float | None, *, name: str, **shape: Any) -> list[str]:
    """What runs on the base of this name would need on a card, as lines; shape is Plan's."""
    configs, remark = read_configs(name)
    plan = Plan(configs, DTYPES[mixed_precision], True, **shape)
    device = choose_device()
    limit = memory_limit(device, vram_limit)

    def cell(size: int) -> str:
        answers = {"fits": size <= limit * runtime.USABLE, "tight": size <= limit, "no": True}
        answer = (
            "" if limit == math.inf else next(answer for answer, true in answers.items() if true)
        )
        return f"{gigabytes(size)} GB {answer}".rstrip()

    lines = [f"base       {resolve_name(name)}", *([f"           {remark}"] if remark else [])]
    lines += [
        f"plan       {plan.size} px, {mixed_precision.replace('no', 'float32')}, rank {shape['rank']}: "
        f"{plan.in_words(1, False, False)} GB"
    ]
    if limit < math.inf:
        lines.append(f"limit      {gigabytes(limit)} GB")
    lines += ["", f"{'pictures at once':18}{'plain':>16}{'--gradient_checkpointing':>28}"]
    for batch in BATCHES:
        lines.append(
            f"{batch:<18}{cell(plan.training(batch, False)):>16}{cell(plan.training(batch, True)):>28}"
        )
    if plan.images:
        lines += [
            "",
            f"sample images  {cell(plan.drawing(False))}, with VAE tiling {cell(plan.drawing(True))}",
        ]
    lines += [
        "",
        "GB are 2**30 bytes. Tensors are counted; CUDA's context and workspaces come on top.",
    ]
    if device.type != "cuda":
        lines.append(
            f"For an NVIDIA card. On this machine: {place(mixed_precision, device, plan.width).why}."
        )
    return lines
