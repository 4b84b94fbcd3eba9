"""The memory estimate against a training step of Stable Diffusion 1.5 with random weights.

    python benchmarks/memory.py
    python benchmarks/memory.py --resolution 512 --mixed_precision fp16        # on an NVIDIA GPU

Two steps of one image, with and without gradient checkpointing, each in a process of its own.
Measured is the increase of resident memory from before the model is made to the peak, or on CUDA
the peak of the allocated memory. Prints a table and a last JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import paths  # noqa: F401  # the package's modules become importable

RANK = 8


def measure(size: int, mixed_precision: str, checkpointing: bool) -> dict[str, float]:
    """The peak of two training steps in this process and its estimate, in GB (2**30 bytes)."""
    import psutil
    import torch
    from diffusers import UNet2DConditionModel

    from megaman import runtime
    from megaman.config.presets import DEFAULT_TARGETS
    from megaman.config.settings import MemoryRequest
    from megaman.hub import DEFAULT_BASE
    from megaman.lora import adapter
    from megaman.models.configs import read_configs, unet_width
    from megaman.models.typed import move, predict_noise
    from megaman.models.weights import build
    from megaman.runtime import choose_compute, choose_device
    from megaman.training import loss as diffusion
    from megaman.training.memory_estimate import MemoryEstimate
    from megaman.training.memory_saving import checkpoint_gradients

    torch.manual_seed(0)
    configs, _ = read_configs(DEFAULT_BASE)
    compute = choose_compute(mixed_precision, choose_device(), unet_width(DEFAULT_BASE))
    device, dtype = compute.device, compute.dtype
    request = MemoryRequest(size, RANK, tuple(DEFAULT_TARGETS))
    estimate = MemoryEstimate(configs, request, dtype, on_gpu=device.type != "cpu")
    planned = estimate.training_peak(1, checkpointing)
    runtime.keep_freed_memory()
    before = psutil.Process().memory_info().rss

    unet = move(build(UNet2DConditionModel, configs["unet"]), dtype)
    unet.to_empty(device=device).requires_grad_(False).train()
    for parameter in unet.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    trainable = adapter.inject(unet, RANK, RANK, DEFAULT_TARGETS)
    if checkpointing:
        checkpoint_gradients([unet])
    optimizer = torch.optim.AdamW(trainable, fused=True)
    latent_size = size // 8
    for _ in range(2):
        noisy = torch.randn(1, 4, latent_size, latent_size, device=device)
        prompt_embeds = torch.randn(1, 77, 768, device=device)
        timesteps = torch.tensor([500], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            noise_pred = predict_noise(unet, noisy.to(dtype), timesteps, prompt_embeds.to(dtype))
        diffusion.loss(noise_pred, torch.randn_like(noisy)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # Unix

        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "planned_gb": planned / 2**30,
        "measured_gb": measured / 2**30,
        "ratio": planned / measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument(
        "--case", choices=["plain", "checkpointing"], help="measure only this one, in this process"
    )
    options = parser.parse_args()
    if options.case:
        print(
            json.dumps(
                measure(
                    options.resolution, options.mixed_precision, options.case == "checkpointing"
                )
            )
        )
        return
    results = {}
    shared = ["--resolution", str(options.resolution)]
    shared += ["--mixed_precision", options.mixed_precision]
    for case in ("plain", "checkpointing"):
        command = [sys.executable, __file__, "--case", case, *shared]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8")
        figures = json.loads(done.stdout.splitlines()[-1])
        results[case] = {name: round(value, 3) for name, value in figures.items()}
        planned, measured, ratio = results[case].values()
        print(
            f"{case:14} planned {planned:.2f} GB   measured {measured:.2f} GB   ratio {ratio:.2f}",
            flush=True,
        )
    settings = {"resolution": options.resolution, "mixed_precision": options.mixed_precision}
    print(json.dumps({**settings, **results}))


if __name__ == "__main__":
    main()
