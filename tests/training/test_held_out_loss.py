"""The held-out loss uses the same noise for the same seed, and tells a better model from a worse
one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler

from megaman.training.held_out import gain, held_out_losses


class Guesser(torch.nn.Module):
    """Stands in for a UNet: predicts a share of the noise, which it computes from the clean
    latents."""

    def __init__(self, scheduler: DDPMScheduler, latents: torch.Tensor, share: float):
        super().__init__()
        self.scheduler, self.latents, self.share = scheduler, latents, share
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, noisy, timesteps, encoder_hidden_states):
        signal = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - signal.sqrt() * self.latents) / (1 - signal).sqrt()
        return SimpleNamespace(sample=self.share * noise)


def mean_loss(unet, scheduler, latents, states, seed) -> float:
    losses = held_out_losses(unet, scheduler, latents, states, seed, batch_size=len(latents))
    assert losses.shape == (8, len(latents))
    return float(losses.mean())


@pytest.fixture(scope="module")
def setting():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(6, 4, 8, 8, generator=generator)
    return DDPMScheduler(), latents, torch.zeros(6, 3, 8)


def test_a_perfect_model_loses_nothing_and_a_blind_one_the_noise(setting):
    scheduler, latents, states = setting
    loss = [
        mean_loss(Guesser(scheduler, latents, share), scheduler, latents, states, 0)
        for share in (1, 0.5, 0)
    ]
    assert loss[0] == pytest.approx(0, abs=1e-4)
    assert loss[2] == pytest.approx(1, abs=0.05)
    assert loss[1] == pytest.approx(loss[2] / 4, rel=1e-3)


def test_the_seed_fixes_the_questions(setting):
    scheduler, latents, states = setting
    blind = Guesser(scheduler, latents, 0.3)
    losses = [mean_loss(blind, scheduler, latents, states, seed) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_gain_is_a_share():
    assert gain([0.2, 0.1], [0.1, 0.1]) == [0.5, 0.0]


def test_shuffled_captions_never_belong_to_their_own_image(run_script, tmp_path):
    done = run_script(
        [ROOT / "benchmarks" / "held_out.py", "--make_shuffled", "shuffled"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    source = {path.stem: path.read_text() for path in (ROOT / "demo" / "images").glob("*.txt")}
    shuffled = {path.stem: path.read_text() for path in (tmp_path / "shuffled").glob("*.txt")}
    assert sorted(source.values()) == sorted(shuffled.values())
    assert source.keys() == shuffled.keys()
    assert all(source[stem] != shuffled[stem] for stem in source)


@pytest.mark.slow
def test_the_benchmark_on_an_untrained_lora_gains_nothing(
    base_folder, tmp_path, monkeypatch, capsys
):
    from diffusers import UNet2DConditionModel

    from megaman.lora import adapter, saving

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import held_out

    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)
    adapter.inject(unet, 2, 2, ["to_q"])
    saving.save_lora(tmp_path / "lora", {"unet": unet}, str(base_folder), {})
    assert held_out.main(["--lora_path", str(tmp_path / "lora")]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["gain"] == [0, 0, 0]
    assert all(0 < loss < 2 for loss in row["without"])
