"""How generation fits into memory: fewer images at once, the VAE in tiles, models offloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from megaman import cuda, runtime
from megaman.errors import UserError
from megaman.models.typed import unet_config, vae_config
from megaman.models.vae_tiling import tile_side
from megaman.runtime import USABLE

if TYPE_CHECKING:
    import torch

    from megaman.models.base import Base
    from megaman.sampling.jobs import Job

# Peak bytes of one pass, as a multiple of the bytes of the widest layer's activations. Measured
# with Stable Diffusion 1.5's shape in float32 on a CPU: 37 for the UNet with two rows of 512 px,
# 7.6 for the VAE's decoder at 512 px.
UNET_PASS, VAE_PASS = 40, 8


@dataclass
class SamplingLimits:
    """What generation does to fit into memory: pixels at once, VAE tiling, model offload.

    largest is the number of pixels of the largest image of the run.
    """

    pixels: int
    largest: int
    tiling: bool = False
    offload: bool = False

    def batch_size(self, height: int, width: int) -> int:
        """How many images of a size fit at once, at least one."""
        return max(1, self.pixels // (height * width))

    def reduce(self) -> None:
        """Take the next measure after running out of memory; raises UserError after the last."""
        if self.pixels > self.largest:
            images = max(1, self.pixels // self.largest // 2)
            self.pixels = images * self.largest
        elif not self.tiling:
            self.tiling = True
        elif not self.offload:
            self.offload = True
        else:
            raise UserError(
                "Even one image at a time needs more memory than there is",
                "Lower --height and --width",
            )

    def summary(self, largest_batch: int) -> str:
        """The limits in the words of the device line, for a run with batches up to this size."""
        measures = [f"{min(largest_batch, max(1, self.pixels // self.largest))} at once"]
        if self.tiling:
            measures.append("the VAE in tiles")
        if self.offload:
            measures.append("one model at a time on the device")
        return ", ".join(measures)


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that generation takes: weights of the models, and peaks of their passes.

    unet_pass is for one image with its negative row, decode for one image, decode_tile for one
    tile.
    """

    unet: int
    vae: int
    text_encoder: int
    unet_pass: int
    decode: int
    decode_tile: int

    def peak(self, images: int, tiling: bool, offload: bool) -> int:
        """Bytes on the device with so many images at once."""
        sampling = images * self.unet_pass
        decode = min(self.decode, self.decode_tile) if tiling else self.decode
        if offload:
            return max(self.unet + sampling, self.vae + decode, self.text_encoder)
        return self.unet + self.vae + self.text_encoder + max(sampling, decode)


def unet_pass_bytes(base: Base, pixels: int) -> int:
    """The peak of the UNet's pass for one image of so many pixels with its negative row."""
    latent_cells = pixels // base.vae_scale_factor**2
    width, itemsize = unet_config(base.unet).block_out_channels[0], base.unet.dtype.itemsize
    return 2 * latent_cells * width * itemsize * UNET_PASS


def measure_needs(base: Base, pixels: int) -> MemoryNeeds:
    """The needs of images of so many pixels."""
    unet, vae = base.unet, base.vae
    tile = tile_side(vae.tile_sample_min_size, math.isqrt(pixels), base.vae_scale_factor)
    vae_bytes = vae_config(vae).block_out_channels[0] * vae.dtype.itemsize * VAE_PASS
    return MemoryNeeds(
        unet=runtime.parameter_bytes(unet),
        vae=runtime.parameter_bytes(vae),
        text_encoder=runtime.parameter_bytes(base.text_encoder),
        unet_pass=unet_pass_bytes(base, pixels),
        decode=pixels * vae_bytes,
        decode_tile=tile**2 * vae_bytes,
    )


def plan_limits(
    free: int, needs: MemoryNeeds, largest: int, batch_size: int, can_offload: bool
) -> SamplingLimits:
    """The mildest limits that fit into the free bytes.

    Fewer images come first, then tiling, then offload. If nothing fits, the tightest limits are
    returned: free memory is an estimate, too.

    Args:
        largest: pixels of the largest image.
        batch_size: how many images of that size should run at once.
        can_offload: whether the device's memory is not the CPU's own.
    """
    halvings = range(batch_size.bit_length() + 1)
    sizes = list(dict.fromkeys(math.ceil(batch_size / 2**halving) for halving in halvings))
    offloads = [False, True] if can_offload else [False]
    limits = SamplingLimits(largest, largest)
    for offload, tiling, images in product(offloads, [False, True], sizes):
        limits = SamplingLimits(images * largest, largest, tiling, offload)
        if needs.peak(images, tiling, offload) <= free * USABLE:
            break
    return limits


def tightest(limits: Sequence[SamplingLimits]) -> SamplingLimits:
    """Limits that keep to all of these, of runs of the same images."""
    return SamplingLimits(
        pixels=min(each.pixels for each in limits),
        largest=limits[0].largest,
        tiling=any(each.tiling for each in limits),
        offload=any(each.offload for each in limits),
    )


def limits_for(
    base: Base,
    jobs: Sequence[Job],
    batch_size: int | None,
    device: torch.device,
    shared_by: int = 1,
) -> SamplingLimits:
    """The limits for these jobs on the device's free memory; batch_size None leaves it to us.

    shared_by is the number of processes that share that memory. On Windows torch is held to it.
    """
    free = runtime.free_memory(device) // shared_by
    cuda.avoid_shared_memory(free, device)
    largest = max(jobs, key=lambda job: job.width * job.height)
    pixels = largest.width * largest.height
    return plan_limits(
        free=free,
        needs=measure_needs(base, pixels),
        largest=pixels,
        batch_size=batch_size or runtime.default_batch_size(largest.height, largest.width),
        can_offload=device.type == "cuda",
    )
