"""The VAE in tiles: one rule for encoding, for sample images and for generation."""

from __future__ import annotations

from diffusers import AutoencoderKL


def tile_side(own: int, side: int, scale_factor: int) -> int:
    """Side in pixels of the tiles for images of this side: the VAE's own, or half of the image's.

    The VAE's own tile, 512 pixels for Stable Diffusion 1.5, saves nothing for images of that size.
    A tile has at least two latents a side, since diffusers lets a quarter of it overlap.
    """
    return max(min(own, side // 2) // scale_factor, 2) * scale_factor


def enable_vae_tiling(vae: AutoencoderKL, tile: int) -> None:
    """Have the VAE work in tiles of this side in pixels; 0 changes nothing."""
    if tile:
        vae.enable_tiling()
        vae.tile_latent_min_size = tile * vae.tile_latent_min_size // vae.tile_sample_min_size
        vae.tile_sample_min_size = tile
