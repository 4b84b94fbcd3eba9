"""The mathematics of a step, compared with numbers computed by hand and with diffusers' own."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from megaman.models.typed import get_velocity
from megaman.training import loss as diffusion


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=cast(Any, prediction_type),
    )


def moments(mean: float, logvar: float, shape=(4, 4, 64, 64)) -> torch.Tensor:
    return torch.cat([torch.full(shape, mean), torch.full(shape, logvar)], dim=1)


def test_latents_have_the_mean_and_variance_of_the_moments():
    latents = diffusion.sample_posterior(moments(3.0, math.log(4.0)), 0.18215, seeded())
    assert latents.shape == (4, 4, 64, 64) and latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(3 * 0.18215, abs=0.01)
    assert latents.std().item() == pytest.approx(2 * 0.18215, rel=0.02)


def test_latents_are_those_of_diffusers_own_distribution():
    some = torch.randn(2, 8, 16, 16, generator=seeded(1))
    expected = DiagonalGaussianDistribution(some).sample(seeded(2)) * 0.18215
    assert torch.equal(diffusion.sample_posterior(some, 0.18215, seeded(2)), expected)
    assert not torch.equal(diffusion.sample_posterior(some, 0.18215, seeded(3)), expected)


def test_latents_of_a_certain_vae_are_its_mean_and_wild_ones_stay_finite():
    assert torch.allclose(
        diffusion.sample_posterior(moments(2.0, -1000.0), 0.5, seeded()),
        torch.tensor(1.0),
        atol=1e-4,
    )
    assert diffusion.sample_posterior(moments(2.0, 1000.0), 0.5, seeded()).isfinite().all()
    assert (
        diffusion.sample_posterior(moments(2.0, 0.0).half(), 0.5, seeded()).dtype == torch.float32
    )


def test_noise_is_normal():
    noise = diffusion.sample_noise(torch.Size((8, 4, 64, 64)), 0.0, seeded())
    assert noise.mean().item() == pytest.approx(
        0, abs=0.01
    ) and noise.std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(noise, torch.randn(8, 4, 64, 64, generator=seeded()))


def test_an_offset_is_constant_over_each_channel_and_as_strong_as_asked():
    shape = torch.Size((500, 4, 4, 4))
    plain, offset = (diffusion.sample_noise(shape, strength, seeded()) for strength in (0.0, 0.1))
    added = (offset - plain).flatten(2)
    assert (added.amax(dim=2) - added.amin(dim=2)).max() < 1e-5, "one number per channel and image"
    assert added[..., 0].std().item() == pytest.approx(0.1, rel=0.1)
    assert added[..., 0].mean().item() == pytest.approx(0, abs=0.01)
    assert (added[0, :, 0].unique().numel(), added[:, 0, 0].unique().numel()) == (4, 500)


def test_timesteps_are_uniform_over_all_of_them():
    timesteps = diffusion.sample_timesteps(20_000, 1000, seeded())
    assert timesteps.shape == (20_000,) and timesteps.dtype == torch.int64
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    assert torch.histc(timesteps.float(), 10).min() > 1800
    assert torch.equal(diffusion.sample_timesteps(5, 1000, seeded()), timesteps[:5])


def test_the_target_is_the_noise():
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    assert torch.equal(
        diffusion.target(scheduler(), latents, noise, torch.tensor([0, 500, 999])), noise
    )


def test_the_target_of_a_velocity_model():
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    timesteps = torch.tensor([0, 500, 999])
    velocity = scheduler("v_prediction")
    found = diffusion.target(velocity, latents, noise, timesteps)
    assert torch.equal(found, get_velocity(velocity, latents, noise, timesteps))
    signal = velocity.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    assert torch.allclose(found, signal.sqrt() * noise - (1 - signal).sqrt() * latents, atol=1e-6)


def test_signal_to_noise():
    ratio = diffusion.snr(torch.tensor([0.9, 0.5, 0.2]), torch.tensor([2, 0, 1, 1]))
    assert torch.allclose(ratio, torch.tensor([0.25, 9.0, 1.0, 1.0]))
    base, timesteps = scheduler(), torch.tensor([0, 1, 250, 999])
    assert torch.allclose(
        diffusion.snr(base.alphas_cumprod, timesteps), compute_snr(base, timesteps), rtol=1e-4
    )


def test_min_snr_weights_by_hand():
    ratio = torch.tensor([0.5, 1.0, 5.0, 20.0])
    assert torch.allclose(
        diffusion.min_snr_weights(ratio, 5.0, "epsilon"), torch.tensor([1, 1, 1, 0.25])
    )
    velocity = torch.tensor([0.5 / 1.5, 1 / 2, 5 / 6, 5 / 21])
    assert torch.allclose(diffusion.min_snr_weights(ratio, 5.0, "v_prediction"), velocity)
    assert torch.allclose(
        diffusion.min_snr_weights(ratio, 1.0, "epsilon"), torch.tensor([1, 1, 0.2, 0.05])
    )


def test_loss_is_the_mean_squared_error():
    one, other = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    loss = diffusion.loss(one, other)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(torch.nn.functional.mse_loss(one, other).item(), rel=1e-6)
    assert diffusion.loss(one, one) == 0
    assert diffusion.loss(torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2)) == 4


def test_weights_count_image_by_image():
    expected = torch.zeros(2, 1, 2, 2)
    predicted = torch.stack(
        [torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 2.0)]
    )  # errors 1 and 4
    assert diffusion.loss(predicted, expected) == 2.5
    assert diffusion.loss(predicted, expected, torch.tensor([1.0, 1.0])) == 2.5
    assert diffusion.loss(predicted, expected, torch.tensor([1.0, 0.25])) == 1.0
    assert diffusion.loss(predicted, expected, torch.tensor([0.0, 1.0])) == 2.0


def test_loss_is_computed_in_float32():
    large = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square is beyond float16
    loss = diffusion.loss(large, torch.zeros_like(large))
    assert loss.dtype == torch.float32 and loss == 90_000


def test_gradients_reach_the_prediction():
    predicted = torch.full((2, 1, 1, 1), 3.0, requires_grad=True)
    diffusion.loss(predicted, torch.ones(2, 1, 1, 1), torch.tensor([1.0, 0.5])).backward()
    assert predicted.grad is not None
    assert predicted.grad.flatten().tolist() == [2.0, 1.0]  # 2 · (3 − 1) · weight / 2 images
