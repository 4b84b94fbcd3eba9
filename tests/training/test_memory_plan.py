"""The memory that a run will need: estimates, measures, refusals, and --plan as a process."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from conftest import FEW_TARGETS, ROOT, learned_alike

from megaman import runtime
from megaman.config.presets import DEFAULT_TARGETS, DEMO_TRAINING
from megaman.config.settings import MemoryRequest
from megaman.errors import UserError
from megaman.hub import DEFAULT_BASE
from megaman.models.configs import read_configs
from megaman.models.vae_tiling import enable_vae_tiling
from megaman.training.compute import MicroBatching
from megaman.training.fake_models import FakeModels, tensor_bytes
from megaman.training.memory_estimate import GB, RESIDENT, MemoryEstimate
from megaman.training.memory_plan import plan_memory

DEMO_BASE = str(ROOT / "demo" / "base")


def request(resolution: int, **more) -> MemoryRequest:
    targets = {"target_modules": tuple(DEFAULT_TARGETS), **more}
    return MemoryRequest(resolution=resolution, lora_rank=8, **targets)


def estimate(base: str, resolution: int, dtype=torch.float32, on_gpu=True, **more):
    configs, _ = read_configs(base)
    return MemoryEstimate(configs, request(resolution, **more), dtype, on_gpu)


@pytest.fixture(scope="module")
def sd15() -> MemoryEstimate:
    """Stable Diffusion 1.5 in fp16 at 512 px on a GPU."""
    return estimate(DEFAULT_BASE, 512, torch.float16)


@pytest.fixture(scope="module")
def small(base_folder) -> MemoryEstimate:
    """A small base in float32 at 128 px on a GPU: large enough that activations outweigh others."""
    return estimate(str(base_folder), 128, num_validation_images=1)


@pytest.fixture(scope="module")
def larger(base_folder) -> MemoryEstimate:
    return estimate(str(base_folder), 192)


@pytest.mark.slow
def test_stable_diffusion_fits_where_it_is_known_to_fit(sd15):
    assert 1.6 * GB < sd15.weights < 1.7 * GB, "860 million numbers of two bytes, and the LoRA"
    assert 2.5 * GB < sd15.training_peak(1, False) <= 3.0 * GB
    assert 1.7 * GB < sd15.training_peak(1, True) <= 2.0 * GB
    assert 4.0 * GB < sd15.training_peak(1, False, 768) <= 4.6 * GB
    assert sd15.validation_peak(True) < sd15.validation_peak(False) <= 3.0 * GB


@pytest.mark.slow
def test_checkpointing_keeps_a_quarter_of_the_activations(sd15):
    assert sd15.activations(1, True) < sd15.activations(1, False) / 3
    assert sd15.activations(4, False) == pytest.approx(4 * sd15.activations(1, False), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_proportion_is_what_a_trace_gives(small, larger, checkpointing):
    assert small.activations(1, checkpointing, 192) == pytest.approx(
        larger.activations(1, checkpointing), rel=0.1
    )


@pytest.mark.parametrize(("on_gpu", "copies"), [(True, 1), (False, 2)])
def test_the_average_and_the_best_lora_count(monkeypatch, base_folder, on_gpu, copies):
    """The best is kept on the CPU."""
    monkeypatch.setattr(MemoryEstimate, "activations", lambda *_: 0)
    none = {"num_validation_images": 0, "on_gpu": on_gpu}
    without = estimate(str(base_folder), 64, **none)
    both = estimate(str(base_folder), 64, **none, keeps_best=True, keeps_average=True)
    assert both.training_peak(1, False) - without.training_peak(1, False) == copies * both.gradients


def test_on_a_cpu_activations_take_more_and_nothing_else_does(small, base_folder):
    cpu = estimate(str(base_folder), 128, on_gpu=False, num_validation_images=1)
    assert cpu.activations(2, False) == pytest.approx(
        RESIDENT * small.activations(2, False), rel=1e-6
    )
    assert (cpu.weights, cpu.gradients, cpu.moments) == (
        small.weights,
        small.gradients,
        small.moments,
    )


@pytest.mark.slow
def test_a_vae_that_encodes_at_every_step_stays(small, base_folder):
    fresh = estimate(str(base_folder), 128, num_validation_images=1, encodes_images=True)
    assert fresh.weights - small.weights == tensor_bytes(small.vae) == small.reloaded_vae
    assert fresh.reloaded_vae == 0 and fresh.validation_peak(False) == small.validation_peak(False)
    assert fresh.training_peak(1, True) >= small.training_peak(1, True) + tensor_bytes(small.vae)


@pytest.mark.slow
def test_a_text_encoder_in_training_and_wider_targets_cost_more(small, base_folder):
    both = estimate(str(base_folder), 128, trains_text_encoder=True)
    wide = estimate(str(base_folder), 128, target_modules=tuple(DEMO_TRAINING["target_modules"]))
    for more in (both, wide):
        assert more.gradients > small.gradients
        assert more.training_peak(1, False) > small.training_peak(1, False)
    assert both.weights - small.weights > tensor_bytes(small.text_encoder), "and its LoRA"


def test_each_measure_is_taken_where_it_is_needed_and_in_its_order(sd15):
    """From a GPU with memory for everything down to one on which nothing fits."""
    found = []
    for tenths in range(100, 0, -1):
        limit = tenths / 10 * GB
        try:
            chosen = plan_memory(sd15, MicroBatching(4, 2), False, limit)
        except UserError:
            break
        split = chosen.micro_batching
        assert split.size * split.accumulation_steps == 8, "the effective batch stays"
        needed = max(
            sd15.training_peak(split.size, chosen.gradient_checkpointing),
            sd15.validation_peak(chosen.vae_tile > 0),
        )
        assert needed <= limit * runtime.USABLE or (
            chosen.gradient_checkpointing and chosen.vae_tile and split.size == 1
        )
        found.append((chosen.gradient_checkpointing, chosen.vae_tile, split.size))
    steps = list(dict.fromkeys(found))
    assert steps == [(False, 0, 4), (True, 0, 4), (True, 256, 2), (True, 256, 1)]
    assert (
        "VAE tiling for sample images, gradient checkpointing, 8 micro-batches of 1"
        in chosen.lines[1]
    )


def test_what_fits_is_left_alone_and_said(small):
    limit = int(small.training_peak(1, False) / runtime.USABLE * 2)
    chosen = plan_memory(small, MicroBatching(1, 1), False, limit)
    assert (chosen.gradient_checkpointing, chosen.vae_tile, chosen.micro_batching.size) == (
        False,
        0,
        1,
    )
    (line,) = chosen.lines
    assert line.startswith("memory     needs about ")
    assert all(
        part in line
        for part in ("weights", "activations", "gradients and optimizer", "VAE decoding")
    )


def test_a_refusal_names_what_would_fit(sd15):
    with pytest.raises(UserError) as refused:
        plan_memory(sd15, MicroBatching(1, 1), False, int(1.9 * GB))
    size = int(str(refused.value).partition("--resolution ")[2].split()[0])
    assert size < 512
    assert sd15.training_peak(1, True, size) <= 1.9 * GB < sd15.training_peak(1, True)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"the weights alone take 1\.6"):
        plan_memory(sd15, MicroBatching(1, 1), False, GB)


def test_the_vae_decodes_in_the_tiles_that_were_planned(small):
    """Its real peak in tiles, without contents, is within the estimate."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(read_configs(DEMO_BASE)[0]["vae"])
        vae.requires_grad_(False)
    enable_vae_tiling(vae, small.vae_tile)
    fake = FakeModels(vae)
    measured = fake.peak(lambda: vae.decode(torch.empty(1, vae.config.latent_channels, 32, 32)))
    assert measured == pytest.approx(small.decoding(True) - small.reloaded_vae, rel=0.25)
    assert measured < small.decoding(False) - small.reloaded_vae


def test_nothing_is_computed():
    """A peak of many terabytes, from models without contents."""
    fake = FakeModels()
    assert fake.peak(lambda: torch.empty(2**40) + torch.empty(2**40)) == 3 * 4 * 2**40
    assert fake.peak(lambda: [torch.empty(2**40).sum() for _ in range(9)]) == 4 * 2**40 + 9 * 4, (
        "one after another"
    )


def test_plan_is_a_process_that_reads_no_weights_and_asks_no_hub(forked, base_folder, tmp_path):
    for config in base_folder.rglob("*.json"):
        target = tmp_path / "base" / config.relative_to(base_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config, target)
    flags = [
        "--plan",
        "--pretrained_model_name",
        tmp_path / "base",
        "--resolution",
        64,
        "--vram_limit",
        0.1,
    ]
    flags += FEW_TARGETS
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = forked.run(["megaman_lora.py", *flags], tmp_path, hub=hub)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:1].isdigit()] == [
        "1",
        "2",
        "4",
    ]
    assert "fits" in done.stdout
    assert "VAE decoding" in done.stdout and "Calculated, not measured" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "empty"}, (
        "no folder for images or results"
    )
    assert not list((tmp_path / "empty").rglob("*.json"))


def test_a_name_on_the_hub_is_planned_from_what_is_here():
    configs, remark = read_configs(DEFAULT_BASE)
    assert (configs["unet"]["block_out_channels"], remark) == ([320, 640, 1280, 1280], "")
    guessed, remark = read_configs("somebody/some-model-that-is-not-here")
    assert guessed == configs
    assert "planned as Stable Diffusion 1.5" in remark


@pytest.mark.parametrize(
    "name", ["./nothing", "models/missing.safetensors", "/nowhere/base", "weights.ckpt"]
)
def test_a_base_that_is_not_there_is_not_planned(name, tmp_path, monkeypatch):
    """Estimates for Stable Diffusion 1.5 would hide that the path is mistyped."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=name):
        read_configs(name)


def test_a_folder_without_configurations_ends_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_configs(str(tmp_path))


def test_a_run_with_a_limit_says_what_it_needs_and_learns_the_same(
    train_here, embedded_base, tmp_path, capsys
):
    flags = [
        "--pretrained_model_name",
        embedded_base,
        "--data_dir",
        ROOT / "demo" / "held_out",
        "--learning_rate",
        1e-3,
        "--max_train_steps",
        2,
    ]
    flags += ["--train_batch_size", 4, "--adam_epsilon", 1e-2, "--resolution", 32, *FEW_TARGETS]
    whole = train_here(tmp_path, "whole", *flags)
    assert "memory " not in capsys.readouterr().out
    short = train_here(tmp_path, "short", *flags, "--vram_limit", 0.06)
    said = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("memory ", "           so that"))
    ]
    assert said[0].startswith("memory     needs about 0.")
    assert "gradient checkpointing" in said[1]
    assert learned_alike(whole, short)
    config = json.loads((tmp_path / "short" / "training_config.json").read_text(encoding="utf-8"))
    assert config["settings"]["train_batch_size"] == 4
    with pytest.raises(UserError, match=r"there are 0\.02 GB"):
        train_here(tmp_path, "none", *flags, "--vram_limit", 0.02)
