"""Both scripts on a model of Stable Diffusion 1.5's exact shape with random weights: do they run, how long, how much?

    python benchmarks/sd15_shape.py --work_dir /tmp/sd15

Two training steps and one image at 256 px by default. Prints each process's seconds and peak resident memory, and a
last JSON line for programs. The weights are random, so the image shows noise; the tokenizer is the embedded base's,
since CLIP's own vocabulary comes with the real model only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_base(folder: Path) -> None:
    """A base folder in SD 1.5's configuration, float32 safetensors as the published ones are."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).save_pretrained(folder / "unet", max_shard_size="20GB")
    AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).save_pretrained(folder / "vae")
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    shutil.copytree(ROOT / "demo" / "base" / "tokenizer", folder / "tokenizer")
    shutil.copy(ROOT / "demo" / "base" / "model_index.json", folder)


def timed(command: list[str], cwd: Path) -> dict[str, float]:
    """Run a command to its end: seconds, and the peak resident memory of that process in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(usage.ru_maxrss / 1024**2, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder; about 4 GB are written to it")
    parser.add_argument("--resolution", default="256")
    parser.add_argument("--steps", default="2")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True)
    base = options.work_dir / "base"
    make_base(base)
    train = [sys.executable, str(ROOT / "megaman_lora.py"), "--pretrained_model_name", str(base)]
    train += ["--data_dir", str(ROOT / "demo" / "images"), "--max_train_steps", options.steps, "--seed", "0"]
    train += ["--resolution", options.resolution, "--num_validation_images", "0"]
    draw = [sys.executable, str(ROOT / "generate_megaman.py"), "--prompts", "mega man", "--num_inference_steps", "10"]
    draw += ["--height", options.resolution, "--width", options.resolution]
    results = {"train": timed(train, options.work_dir), "generate": timed(draw, options.work_dir)}
    for name, result in results.items():
        print(f"{name:9} {result['seconds']:7.1f} s   peak {result['peak_gb']:.2f} GB")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
