"""The UNet's training step alone: what a whole loop is compared with. A side of step_time.py, which
runs it.

Forward, loss, backward, clipping, fused AdamW. Latents, noise, timesteps and text states are made
before the first step; no VAE and no text encoder is loaded, nothing is logged or saved. Targets,
rank and rate are step_time.py's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaman import runtime
from megaman.files import read_json
from megaman.lora import adapter
from megaman.models.base import load_base
from megaman.training import loss as diffusion

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
    """Forward, loss, backward, clipping, the optimizer's step; predict calls the UNet, whose base
    is of that dtype."""
    with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
        noise_pred = predict().sample
    scaler.scale(diffusion.loss(noise_pred, noise)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], required=True)
    parser.add_argument("--memory_format", choices=["contiguous", "channels_last"], required=True)
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[
        options.memory_format
    ]

    runtime.keep_freed_memory()  # as ours does
    torch.manual_seed(0)
    unet = load_base(str(options.base), dtype).unet
    trainable = adapter.inject(unet, options.rank, options.rank, options.targets)
    unet.to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    cells = options.resolution // 2 ** (
        len(read_json(options.base / "vae" / "config.json")["block_out_channels"]) - 1
    )
    positions = read_json(options.base / "text_encoder" / "config.json").get(
        "max_position_embeddings", 77
    )
    shape = (options.batch, unet.config.in_channels, cells, cells)
    inputs = [
        (
            torch.randn(shape).to(device, dtype, memory_format=layout),
            torch.randn(shape).to(device, memory_format=layout),
            torch.randint(0, 1000, (options.batch,), device=device),
            torch.randn(options.batch, positions, unet.config.cross_attention_dim).to(
                device, dtype
            ),
        )
        for _ in range(options.steps)
    ]

    bar = tqdm(total=options.steps, desc="training", unit="step")
    for noisy, noise, timesteps, states in inputs:
        predict = partial(unet, noisy, timesteps, encoder_hidden_states=states)
        step(predict, noise, dtype, optimizer, trainable, scaler)
        bar.update()
    bar.close()


if __name__ == "__main__":
    main()
