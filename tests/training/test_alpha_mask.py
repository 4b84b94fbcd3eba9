"""--alpha_mask: what is transparent has no loss, with and without the latent cache."""

from __future__ import annotations

import pytest
import torch
from conftest import FEW_TARGETS, learned_alike
from PIL import Image

from megaman.training import loss as diffusion


def test_masked_latents_do_not_count():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, 4:] = 1
    expected = (one - other)[..., 4:].pow(2).mean() / 2  # as in kohya's scripts: over all latents
    assert torch.allclose(diffusion.loss(one, other, mask=mask), expected)
    everything = diffusion.loss(one, other, mask=torch.ones(2, 1, 8, 8))
    assert torch.equal(everything, diffusion.loss(one, other))


def test_the_mask_comes_with_the_latents():
    posteriors = torch.randn(2, 8, 4, 4)
    assert diffusion.split_mask(posteriors) == (posteriors, None)
    split, mask = diffusion.split_mask(torch.cat([posteriors, torch.ones(2, 1, 4, 4)], dim=1))
    assert torch.equal(split, posteriors) and mask is not None and mask.shape == (2, 1, 4, 4)


@pytest.fixture
def train(train_here, tmp_path):
    """Train two steps on images of which the left half is transparent: train(name, *flags)."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, color in enumerate([(255, 0, 0, 255), (0, 90, 255, 255)]):
        image = Image.new("RGBA", (64 + 32 * number, 96), color)
        image.paste((9, 9, 9, 0), (0, 0, 40, 96))
        image.save(folder / f"{number}.png")

    def run(name: str, *flags) -> dict:
        words = ["--data_dir", folder, "--max_train_steps", 2, "--learning_rate", 1e-3]
        return train_here(tmp_path, name, *words, *FEW_TARGETS, *flags)

    return run


def test_training_with_a_mask(train, capsys):
    """Cached or not, with buckets too; a resumed run needs the same."""

    def same(one: dict, other: dict) -> bool:
        return all(torch.equal(one[key], other[key]) for key in one)

    plain, masked = train("plain"), train("masked", "--alpha_mask")
    assert not same(plain, masked)
    assert same(masked, train("again", "--alpha_mask")), "the latents were cached with their masks"
    square = ["--center_crop", "--alpha_mask", "--adam_epsilon", 1]  # rounding makes no steps
    assert learned_alike(train("cached", *square), train("online", *square, "--no_cache"))
    train("buckets", "--alpha_mask", "--enable_bucket", "--background", "navy")
