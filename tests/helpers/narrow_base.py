"""The embedded base with a narrow UNet of two levels and random weights: a run on it is a run of
Stable Diffusion in half the time, for all tests that do not ask what the embedded UNet has learned.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent.parent
EMBEDDED = ROOT / "demo" / "base"
SHAPE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def make_narrow_base(folder: Path) -> Path:
    """Write the base into a folder; the weights are the same each time. Returns the folder."""
    import torch
    from diffusers import UNet2DConditionModel

    for part in ("scheduler", "text_encoder", "tokenizer", "vae"):
        shutil.copytree(EMBEDDED / part, folder / part)
    shutil.copy(EMBEDDED / "model_index.json", folder)
    config = json.loads((EMBEDDED / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = cast(Any, UNet2DConditionModel).from_config({**config, **SHAPE})
    unet.half().save_pretrained(folder / "unet")  # as the embedded one is stored
    return folder
