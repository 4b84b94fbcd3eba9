"""Ten prompts: in batches with the LoRA fused, and one by one in diffusers' pipeline.

    python benchmarks/sampling.py --lora_path megaman_demo_output/lora_weights --rounds 5

The same base, LoRA, prompts, seeds, sampler, steps and guidance scale on both sides, alternating in
one process, without loading. Prints the seconds of each round, the medians and their ratio; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import paths
import torch
from diffusers import StableDiffusionPipeline

from megaman import runtime
from megaman.config import samplers
from megaman.lora.peft_config import base_of
from megaman.lora.stack import LoraStack
from megaman.models.base import load_base
from megaman.models.configs import unet_width
from megaman.runtime import choose_compute, choose_device
from megaman.sampling import denoise
from megaman.sampling.generator import ImageGenerator, Sampling
from megaman.sampling.jobs import make_jobs, make_variants
from megaman.sampling.limits import SamplingLimits
from megaman.sampling.prompts import Prompt, PromptSettings, read_prompts

NEGATIVE = "blurry, low quality"


def ours(base_name: str, lora_path: Path, prompts: list[Prompt], steps: int, side: int | None):
    """A function that generates all prompts as generate_megaman.py does, text encoding included."""
    compute = choose_compute("fp16", choose_device(), unet_width(base_name))
    base = load_base(base_name, compute.dtype, memory_format=compute.torch_memory_format)
    loras = LoraStack(base, [(lora_path, 1.0)], fuse=True, rescale=True)
    side = side or min(512, base.native_size)
    limits = SamplingLimits(runtime.default_batch_size(side, side) * side**2, largest=side**2)
    generator = ImageGenerator(base, loras, compute, limits, Sampling(samplers.DEFAULT, 1))
    (variant,) = make_variants([(lora_path, 1.0)], [1.0], one_by_one=False)
    defaults = PromptSettings(NEGATIVE, side, side, 0, 7.5, steps)
    batches = generator.make_batches(make_jobs(prompts, defaults, 1), None)

    def generate() -> None:
        generator.set_variant(replace(variant))  # forgets the prompt embeddings
        generator.generate(batches, lambda part: None)

    return generate, side


def pipeline(base_name: str, lora_path: Path, prompts: list[Prompt], steps: int, side: int):
    """A function that calls diffusers' pipeline for each prompt, with the LoRA as an adapter."""
    compute = choose_compute("fp16", choose_device(), unet_width(base_name))
    folder = base_name if Path(base_name).is_dir() else paths.ROOT / base_name
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=compute.dtype).to(compute.device)
    pipe.scheduler = denoise.make_sampler(pipe.scheduler)
    pipe.load_lora_weights(str(lora_path), weight_name="pytorch_lora_weights.safetensors")
    pipe.set_progress_bar_config(disable=True)

    def generate() -> None:
        for prompt in prompts:
            pipe(
                prompt.text,
                negative_prompt=NEGATIVE,
                generator=torch.Generator().manual_seed(0),
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=7.5,
            )

    return generate


def seconds(generate: Callable[[], None]) -> float:
    began = time.perf_counter()
    generate()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lora_path", type=Path, default=Path("megaman_demo_output/lora_weights"))
    parser.add_argument("--prompts_file", type=Path, default=paths.ROOT / "prompts.txt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, help="pixels (default: the base's own size)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prompts, base_name = read_prompts(options.prompts_file)[0], base_of(options.lora_path)
    if base_name is None:
        parser.error(f"--lora_path {options.lora_path} names no base")
    generate, side = ours(base_name, options.lora_path, prompts, options.steps, options.side)
    sides = {
        "ours": generate,
        "pipeline": pipeline(base_name, options.lora_path, prompts, options.steps, side),
    }
    for each in sides.values():  # the first call of everything is slower
        each()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name, each in sides.items():
            times[name].append(seconds(each))
        print(
            f"round {number + 1}   "
            + "   ".join(f"{name} {times[name][-1]:.2f} s" for name in sides)
        )
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    ratio = round(medians["ours"] / medians["pipeline"], 3)
    print(
        f"{len(prompts)} prompts of {side} px, {options.steps} steps: {medians['ours']} s against "
        f"{medians['pipeline']} s, {ratio} of it"
    )
    print(
        json.dumps(
            {
                "prompts": len(prompts),
                "side": side,
                "steps": options.steps,
                **medians,
                "ratio": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
