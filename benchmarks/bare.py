"""The UNet's training step alone, with which step_time.py compares the whole loop.

Forward, loss, backward, clipping, fused AdamW. Latents, noise, timesteps and prompt_embeds are made
before the first step; no VAE and no text encoder is loaded, nothing is logged or saved. Target
modules, rank and learning rate are step_time.py's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import paths  # noqa: F401  # the package's modules become importable
import torch
from tqdm import tqdm

from megaman import runtime
from megaman.files import read_json
from megaman.lora import adapter
from megaman.models.base import load_base
from megaman.models.typed import move, unet_config
from megaman.training import loss as diffusion

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput


def step(
    predict: Callable[[], UNet2DConditionOutput],
    noise: torch.Tensor,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
    trainable: Sequence[torch.nn.Parameter],
    scaler: torch.amp.GradScaler,
) -> None:
    """Forward, loss, backward, clipping, optimizer step; predict calls the UNet of this dtype."""
    with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
        noise_pred = predict().sample
    scaler.scale(diffusion.loss(noise_pred, noise)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], required=True)
    parser.add_argument("--memory_format", choices=MEMORY_FORMATS, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    device, dtype = options.device, getattr(torch, options.dtype)
    memory_format = MEMORY_FORMATS[options.memory_format]

    runtime.keep_freed_memory()  # as megaman_lora.py does
    torch.manual_seed(0)
    unet = load_base(str(options.base), dtype).unet
    trainable = adapter.inject(unet, options.rank, options.rank, options.targets)
    move(unet, device, memory_format=memory_format).train()
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    vae = read_json(options.base / "vae" / "config.json")
    latent_size = options.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    text_encoder = read_json(options.base / "text_encoder" / "config.json")
    positions = text_encoder.get("max_position_embeddings", 77)
    config = unet_config(unet)
    shape = (options.batch, config.in_channels, latent_size, latent_size)
    inputs = [
        (
            torch.randn(shape).to(device, dtype, memory_format=memory_format),
            torch.randn(shape).to(device, memory_format=memory_format),
            torch.randint(0, 1000, (options.batch,), device=device),
            torch.randn(options.batch, positions, config.cross_attention_dim).to(device, dtype),
        )
        for _ in range(options.steps)
    ]

    bar = tqdm(total=options.steps, desc="training", unit="step")
    for noisy, noise, timesteps, prompt_embeds in inputs:
        predict = partial(unet, noisy, timesteps, encoder_hidden_states=prompt_embeds)
        step(predict, noise, dtype, optimizer, trainable, scaler)
        bar.update()
    bar.close()


if __name__ == "__main__":
    main()
