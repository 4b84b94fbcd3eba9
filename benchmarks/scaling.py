"""What training costs by images, processes, resolution and rank, on Stable Diffusion 1.5's shape.

    python benchmarks/scaling.py

Prints tables in Markdown: bytes that data-parallel training exchanges in an update, operations of a
step, planned memory, disk. The exchange of the embedded base is measured: two processes make an
update and count what they hand to each other. Everything else is computed from models without
contents, in minutes and on any machine; no GPU is used. The last line is JSON for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import paths
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaman.config.presets import DEFAULT_TARGETS
from megaman.config.settings import MemoryRequest
from megaman.data.latent_cache import LatentCache
from megaman.hub import DEFAULT_BASE
from megaman.lora import adapter
from megaman.models.configs import read_configs
from megaman.models.typed import predict_noise
from megaman.models.weights import build
from megaman.training import loss as diffusion
from megaman.training.fake_models import FakeModels
from megaman.training.memory_estimate import MemoryEstimate
from megaman.training.run import Run

RANKS, RESOLUTIONS, BATCHES = (4, 16, 64), (256, 512, 768), (1, 4)
GBITS = (1, 10, 100)  # a second
ATTENTION = [name for name in DEFAULT_TARGETS if name.startswith("to_")]
TARGETS = {
    "attention": ATTENTION,
    "default": DEFAULT_TARGETS,
    "and convolutions": [*DEFAULT_TARGETS, "conv1", "conv2"],
}
FLOAT32 = 4  # bytes


def unet_on_meta(configs: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet without contents, frozen."""
    return build(UNet2DConditionModel, configs["unet"]).requires_grad_(False).train()


def numbers(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


def noise_pred(unet: torch.nn.Module, config: dict[str, Any], side: int) -> torch.Tensor:
    """The UNet's output [1, 4, side, side] for any inputs, on the UNet's device."""
    device = next(unet.parameters()).device
    noisy = torch.zeros(1, config["in_channels"], side, side, device=device)
    prompt_embeds = torch.zeros(1, 77, config["cross_attention_dim"], device=device)
    return predict_noise(unet, noisy, torch.zeros(1, device=device), prompt_embeds)  # type: ignore[arg-type]


def count_exchange(rank: int, port: int, results: Path) -> None:
    """An update of the embedded base with a LoRA, and one of all of it, in one of two processes;
    the first writes down the numbers that are trained and the bytes that are exchanged."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    configs, _ = read_configs(str(paths.ROOT / "demo" / "base"))
    found = []
    for trains_all in (False, True):
        unet = unet_on_meta(configs).to_empty(device="cpu")
        for parameter in unet.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        if trains_all:
            unet.requires_grad_(True)
        else:
            adapter.inject(unet, RANKS[0], RANKS[0], DEFAULT_TARGETS)
        exchanged: list[int] = []

        def add_up(tensor: torch.Tensor, exchanged: list[int] = exchanged) -> None:
            exchanged.append(tensor.nbytes)
            distributed.all_reduce(tensor)

        noise_pred(unet, configs["unet"], 16).square().mean().backward()
        run = SimpleNamespace(world_size=2, processes=SimpleNamespace(add_up=add_up))
        trained = [each for each in unet.parameters() if each.requires_grad]
        Run.exchange_gradients(cast(Run, run), trained)
        found.append((numbers(unet), sum(exchanged)))
    if rank == 0:
        results.write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


def measure_exchange() -> list[tuple[int, int]]:
    """Numbers trained, and bytes of gradients that an update of the embedded base exchanges: with a
    LoRA and without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "fork" if sys.platform == "linux" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        torch.multiprocessing.start_processes(
            count_exchange, (port, results), nprocs=2, start_method=method
        )
        return json.loads(results.read_text(encoding="utf-8"))


def exchange_rows(configs: dict[str, Any]) -> list[dict[str, Any]]:
    """What is trained, how many numbers, and the bytes that an update exchanges."""
    rows = []
    for name, (trained, size) in zip(
        ("default, rank 4", "the full UNet"), measure_exchange(), strict=True
    ):
        row = {"base": "embedded", "trained": name, "numbers": trained}
        rows.append({**row, "bytes": size, "is": "measured"})
    shape = {"base": "SD 1.5", "is": "computed"}
    for name, targets in TARGETS.items():
        unet = unet_on_meta(configs)
        adapter.inject(unet, 1, 1, targets)
        of_rank_1 = numbers(unet)
        for rank in RANKS:
            trained = rank * of_rank_1
            row = {**shape, "trained": f"{name}, rank {rank}", "numbers": trained}
            rows.append({**row, "bytes": trained * FLOAT32})
    trained = numbers(unet_on_meta(configs).requires_grad_(True))
    row = {**shape, "trained": "the full UNet", "numbers": trained}
    return [*rows, {**row, "bytes": trained * FLOAT32}]


def count_operations(configs: dict[str, Any], resolution: int) -> dict[str, float]:
    """Floating-point operations for an image, in 10**12: a training step at rank 4, a UNet call,
    and the VAE's encoding."""
    unet = unet_on_meta(configs)
    adapter.inject(unet, RANKS[0], RANKS[0], DEFAULT_TARGETS)
    vae = build(AutoencoderKL, configs["vae"]).requires_grad_(False)
    fake_models, counts = FakeModels(unet, vae), {}

    def count() -> None:
        with FlopCounterMode(display=False) as counter:
            prediction = noise_pred(unet, configs["unet"], resolution // 8)
            counts["UNet call"] = counter.get_total_flops()
            diffusion.loss(prediction, torch.empty_like(prediction)).backward()
        counts["step"] = counter.get_total_flops()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.encode(torch.empty(1, 3, resolution, resolution))  # type: ignore[arg-type]
        counts["encoding"] = counter.get_total_flops()

    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        fake_models.peak(count)
    return {name: round(value / 1e12, 2) for name, value in counts.items()}


def plan_memory(configs: dict[str, Any]) -> dict[int, dict[str, float]]:
    """The planned peak of a step at rank 16 on a GPU in fp16, in GB (2**30 bytes), by resolution.

    512 px are traced; the activations of the others are in proportion to their pixels.
    """
    request = MemoryRequest(512, 16, tuple(DEFAULT_TARGETS))
    estimate = MemoryEstimate(configs, request, torch.float16, on_gpu=True)
    plans: dict[int, dict[str, float]] = {side: {} for side in RESOLUTIONS}
    for side, batch, checkpointing in product(RESOLUTIONS, BATCHES, (False, True)):
        name = f"batch {batch}{', checkpointing' if checkpointing else ''}"
        peak = estimate.training_peak(batch, checkpointing, side)
        plans[side][name] = round(peak / 2**30, 2)
    return plans


def cached_bytes(resolution: int, crops: int = 64) -> float:
    """Bytes on the disk for a crop in the cache of encoded images, measured with so many crops."""
    with tempfile.TemporaryDirectory() as folder:
        side = resolution // 8
        cache = LatentCache(Path(folder))
        for start in range(0, crops, 8):
            keys = [f"{start + number:064d}" for number in range(8)]
            cache.add({key: torch.zeros(8, side, side) for key in keys})
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) / crops


def table(heads: list[str], rows: list[list[object]]) -> None:
    """Print a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), end="\n\n", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    configs, _ = read_configs(DEFAULT_BASE)
    exchange = exchange_rows(configs)
    rates = [f"at {rate} Gbit/s, computed" for rate in GBITS]
    heads = ["Base", "Trained", "Numbers", "MB an update", *rates]
    rows = []
    for row in exchange:
        # A ring of many processes sends and receives twice the gradients; of two, once.
        times = [f"{2 * row['bytes'] * 8 / (rate * 1e9) * 1000:,.1f} ms" for rate in GBITS]
        size = f"{row['bytes'] / 2**20:,.2f}, {row['is']}"
        rows.append([row["base"], row["trained"], f"{row['numbers']:,}", size, *times])
    table(heads, rows)
    operations = {side: count_operations(configs, side) for side in RESOLUTIONS}
    names = list(operations[RESOLUTIONS[0]])
    table(
        ["Pixels", *(f"{name}, TFLOP" for name in names)],
        [[side, *operations[side].values()] for side in RESOLUTIONS],
    )
    memory = plan_memory(configs)
    names = list(memory[512])
    rows = [[side, *memory[side].values()] for side in RESOLUTIONS]
    table(["Pixels", *(f"{name}, GB" for name in names)], rows)
    disk = {side: cached_bytes(side) for side in RESOLUTIONS}
    formula = {side: 8 * (side // 8) ** 2 * FLOAT32 for side in RESOLUTIONS}
    table(
        ["Pixels", "bytes a crop, computed", "bytes a crop, measured"],
        [[side, f"{formula[side]:,}", f"{disk[side]:,.0f}"] for side in RESOLUTIONS],
    )
    print(json.dumps({"exchange": exchange, "tflop": operations, "memory_gb": memory}))


if __name__ == "__main__":
    main()
