"""How drawing fits into the memory at hand: how many images at once, the VAE in tiles, the models one after another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from megaman.errors import UserError

PIXELS_AT_ONCE = 512 * 512  # images drawn together come to this many pixels at most: more are not drawn faster
USABLE = 0.85  # share of the free memory: the rest goes to workspaces and fragments
# Peak bytes of one pass, in bytes of the widest layer's activations. Measured on Stable Diffusion 1.5's shape in
# float32 on a CPU: the UNet 37 with two rows of 512 px, the VAE's decoder 7.6 at 512 px.
UNET_PASS, VAE_PASS = 40, 8


@dataclass
class Room:
    """How images are drawn: so many pixels at once, the VAE in tiles, the models taking turns on the device.

    largest are the pixels of the largest image there is to draw.
    """

    pixels: int
    largest: int
    tiling: bool = False
    turns: bool = False

    def at_once(self, height: int, width: int) -> int:
        """How many images of a size are drawn together."""
        return max(1, self.pixels // (height * width))

    def tighten(self) -> None:
        """The next measure against too little memory; raises UserError where there is none left."""
        if self.pixels > self.largest:
            self.pixels = max(1, self.pixels // self.largest // 2) * self.largest
        elif not self.tiling:
            self.tiling = True
        elif not self.turns:
            self.turns = True
        else:
            raise UserError("Even one image at a time needs more memory than there is", "Lower --height and --width")

    def __str__(self) -> str:
        measures = ["the VAE in tiles"] * self.tiling + ["the models one after another on the device"] * self.turns
        return ", ".join([f"{max(1, self.pixels // self.largest)} at once", *measures])


def images_at_once(height: int, width: int) -> int:
    """How many images of this size are drawn in one batch where nothing else is asked for."""
    return max(1, PIXELS_AT_ONCE // (height * width))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def size_of(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def pass_sizes(unet: torch.nn.Module, vae: torch.nn.Module, pixels: int, factor: int) -> tuple[int, int, int]:
    """Bytes that drawing takes beyond the weights: an image's two rows through the UNet, an image of so many pixels out
    of the VAE, and one tile out of it. factor is the VAE's pixels a side of one latent cell."""
    drawing = 2 * pixels // factor**2 * unet.config.block_out_channels[0] * unet.dtype.itemsize * UNET_PASS
    pixel = vae.config.block_out_channels[0] * vae.dtype.itemsize * VAE_PASS
    return drawing, pixels * pixel, vae.tile_sample_min_size**2 * pixel


def make_room(
    free: int,
    weights: tuple[int, int, int],
    passes: tuple[int, int, int],
    largest: int,
    batch: int,
    can_wait: bool,
) -> Room:
    """The least that has to be given up so that drawing fits into free bytes, before any weight is on the device.

    weights are the bytes of UNet, VAE and text encoder; passes those of an image in the UNet, out of the VAE, and out
    of the VAE in tiles; largest the pixels of the largest image, batch how many of it are wished for at once; can_wait
    says whether a model that waits leaves the device, as it cannot where there is no other. Where nothing fits, the
    smallest room is given all the same: free memory is an estimate, too.
    """
    unet, vae, text = weights
    drawing, decoding, tile = passes

    def fits(room: Room) -> bool:
        draw = room.pixels // largest * drawing
        decode = min(decoding, tile) if room.tiling else decoding
        together = unet + vae + text + max(draw, decode)
        return (max(unet + draw, vae + decode, text) if room.turns else together) <= free * USABLE

    rooms = [
        Room(at_once * largest, largest, tiling, turns)
        for turns in ([False, True] if can_wait else [False])
        for tiling in (False, True)
        for at_once in dict.fromkeys(math.ceil(batch / 2**power) for power in range(batch.bit_length() + 1))
    ]
    return next(filter(fits, rooms), rooms[-1])
