"""The frozen VAE as an encoder of images, within the memory there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from megaman import cuda
from megaman.data.file_index import FileIndex
from megaman.errors import UserError
from megaman.files import stamp_of
from megaman.models.base import vae_identity
from megaman.models.typed import encode_pixels, vae_config
from megaman.models.vae_tiling import enable_vae_tiling, tile_side
from megaman.runtime import retry_on_oom

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from megaman.data.buckets import Size
    from megaman.models.base import Base

# Pixels in one batch of the VAE: more are not faster, but need more memory. A GPU wants larger
# batches than a CPU.
MAX_PIXELS_CUDA = 4 * 512 * 512
MAX_PIXELS_OTHERS = 512 * 512
MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class EncodingConfig:
    """Which crops of an image are encoded, and how.

    Args:
        num_crops: random crops per image, for cached latents.
        flip: whether every crop is also mirrored.
        seed: the crops depend on it.
        num_workers: processes or threads that decode images, next to the main one.
    """

    num_crops: int = 1
    flip: bool = False
    seed: int = 0
    num_workers: int = 0


class VaeEncoder:
    """Encodes images of one size in batches: smaller ones, and then in tiles, if memory is
    short."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        is_cuda = vae.device.type == "cuda"
        self._max_pixels = MAX_PIXELS_CUDA if is_cuda else MAX_PIXELS_OTHERS
        self._tiled, self._own_tile = False, vae.tile_sample_min_size
        self._scale_factor = 2 ** (len(vae_config(vae).block_out_channels) - 1)

    def batch_size(self, size: Size) -> int:
        """How many images of this size in pixels are encoded together."""
        return min(MAX_BATCH_SIZE, max(1, self._max_pixels // (size[0] * size[1])))

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents, float32 [B, 8, h, w] on the VAE's device, of images [B, 3, H, W].

        If the images have their opacity as a fourth channel, the latents have one more: its mean
        over the pixels of each latent.

        Raises UserError if even a single tile does not fit into memory.
        """
        return retry_on_oom(partial(self._encode, pixel_values), self._reduce_memory)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[2:]
        if self._tiled:
            tile = tile_side(self._own_tile, math.isqrt(height * width), self._scale_factor)
            enable_vae_tiling(self.vae, tile)
        parts = pixel_values[:, :3].split(self.batch_size((width, height)))
        parts = [cuda.upload(part, self.vae.device, self.vae.dtype) for part in parts]
        latents = torch.cat([encode_pixels(self.vae, part).parameters.float() for part in parts])
        if pixel_values.shape[1] == 3:
            return latents
        opacity = functional.interpolate(pixel_values[:, 3:], latents.shape[2:], mode="area")
        return torch.cat([latents, cuda.upload(opacity, latents.device)], dim=1)

    def _reduce_memory(self) -> None:
        if self._max_pixels > 1:
            self._max_pixels = 1
        elif not self._tiled:
            self._tiled = True
        else:
            raise UserError(
                "The VAE needs more memory than there is",
                "Lower --resolution, or close other programs",
            )


def identify_vae(base: Base, file_index: FileIndex) -> str:
    """The identity of the base's VAE: from the file index, or else computed, for which the VAE is
    loaded."""
    files = [(path, stamp_of(path)) for path in base.vae_files()]
    known = {file_index.get(path, stamp) for path, stamp in files}
    if len(known) == 1 and (identity := known.pop()):
        return identity
    identity = vae_identity(base.vae)
    file_index.update((path, stamp, identity) for path, stamp in files)
    return identity
