"""How much a LoRA lowers the loss on images it was not trained on: has it learned anything?

    python benchmarks/held_out.py --lora_path megaman_demo_output/lora_weights
    python benchmarks/held_out.py --make_shuffled shuffled_images   # the control

The control is a LoRA trained on the demo's images with shuffled captions. Prints a table for people
and a last JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import paths

from megaman.errors import UserError, run_script

SEEDS = (0, 1, 2)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lora_path", type=Path, nargs="+", default=[])
    parser.add_argument("--base_model", metavar="FOLDER", help="of LoRAs that do not name theirs")
    parser.add_argument("--held_out", type=Path, default=paths.ROOT / "demo" / "held_out")
    parser.add_argument(
        "--make_shuffled", type=Path, metavar="FOLDER", help="write the control's images here"
    )
    options = parser.parse_args(argv)
    if options.make_shuffled:
        shuffle_captions(paths.ROOT / "demo" / "images", options.make_shuffled)
    rows = [measure(path, options.held_out, options.base_model) for path in options.lora_path]
    for row in rows:
        print(f"{row['lora']}")
        for seed, before, after, share in zip(
            SEEDS, row["without"], row["with"], row["gain"], strict=True
        ):
            change = f"{before:.4f} without, {after:.4f} with the LoRA"
            print(f"  seed {seed}: loss {change}: {share:.1%} lower")
    if rows:
        print(json.dumps(rows))
    return 0


def shuffle_captions(source: Path, target: Path) -> None:
    """Copy images such that none has its own caption."""
    if target.exists():
        raise UserError(f"--make_shuffled {target} already exists", "Name a new folder")
    pictures = sorted(source.glob("*.png"))
    order = list(range(len(pictures)))
    random.Random(0).shuffle(order)
    target.mkdir(parents=True)
    for place, index in enumerate(order):
        other = pictures[order[(place + 1) % len(order)]]
        shutil.copy(pictures[index], target)
        shutil.copy(other.with_suffix(".txt"), target / f"{pictures[index].stem}.txt")


def measure(lora_path: Path, held_out: Path, base_name: str | None = None) -> dict:
    import torch

    from megaman.data.dataset import MegaManDataset
    from megaman.data.encoding import encode_dataset
    from megaman.data.file_index import FileIndex
    from megaman.data.latent_cache import LatentCache
    from megaman.data.vae_encoder import EncodingConfig
    from megaman.lora import files as lora_files
    from megaman.lora import peft_config
    from megaman.models import text_encoding
    from megaman.models.base import load_base
    from megaman.training.held_out import gain, held_out_loss

    base_name = base_name or peft_config.base_of(lora_path)
    if base_name is None:
        raise UserError(f"--lora_path {lora_path} names no base", "Name it with --base_model")
    base = load_base(base_name, torch.float32)
    dataset = MegaManDataset(held_out, None, base.native_size)
    moments = encode_dataset(
        lambda: base.vae,
        dataset,
        EncodingConfig(),
        FileIndex(None),
        LatentCache(None),
    )
    means = (
        torch.cat([moments[index] for index in range(len(dataset))]).chunk(2, dim=1)[0]
        * base.scaling_factor
    )
    states = text_encoding.encode_captions(base.text_encoder, base.tokenizer, dataset.captions)
    texts = torch.stack([states[caption] for caption in dataset.captions])
    without = [held_out_loss(base.unet, base.noise_scheduler, means, texts, seed) for seed in SEEDS]
    lora_files.load_lora(lora_path, base.unet)
    after = [held_out_loss(base.unet, base.noise_scheduler, means, texts, seed) for seed in SEEDS]
    return {"lora": str(lora_path), "without": without, "with": after, "gain": gain(without, after)}


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
