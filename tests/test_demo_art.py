"""The demo's art: poses with silhouettes of their own, enough images of each, and a base maker
that may stop."""

from __future__ import annotations

import colorsys
import sys
from collections import Counter
from typing import cast

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "demo"))

import base_quality
import make_images
from rig import EXPRESSIONS, FRONT_POSES, POSES, SIDE_POSES
from sprites import COLORS, draw_sprite


def silhouette(pose: str, view: str) -> np.ndarray:
    return make_images.draw_hero(pose, view).cells[..., 3] > 0


@pytest.mark.parametrize(("view", "poses"), [("front", FRONT_POSES), ("side", SIDE_POSES)])
def test_every_pose_has_a_silhouette_of_its_own(view, poses):
    masks = {pose: silhouette(pose, view) for pose in poses}
    for first in masks:
        for second in masks:
            if first < second:
                differing = (masks[first] ^ masks[second]).sum()
                assert differing > 0.1 * masks[first].sum(), (first, second)


def test_at_least_three_images_show_each_pose_and_expression():
    words = Counter(word for image in make_images.IMAGES for word in image.words.split(", "))
    assert all(words[name] >= 3 for name in (*POSES, *EXPRESSIONS))


def test_the_hero_has_four_flat_colors():
    colors = {
        tuple(cell[:3])
        for pose in FRONT_POSES
        for cell in make_images.draw_hero(pose, "front").cells.reshape(-1, 4)
        if cell[3]
    }
    assert colors - {(52, 50, 70)} == set(make_images.PALETTE)  # besides the shadow on the ground


def test_captions_of_sprites_name_pose_or_expression_and_view():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sprite, caption = draw_sprite(rng)
        words = caption.split(", ")
        assert sprite.shape == (64, 64, 4)
        assert words[1].split()[0] in COLORS
        if "monster" in caption:
            continue
        if "portrait" in words:
            assert set(words) & set(EXPRESSIONS)
        else:
            assert set(words) & set(POSES)
            assert set(words) & {"front view", "back view", "facing right", "facing left"}


def test_a_larger_canvas_shows_the_same_pose():
    small = make_images.draw_hero("running", "side").cells[..., 3] > 0
    large = make_images.draw_hero("running", "side", scale=2).cells[..., 3] > 0
    shrunk = large.reshape(32, 2, 32, 2).mean(axis=(1, 3)) >= 0.5
    assert (shrunk ^ small).sum() < 0.25 * small.sum()


def test_a_share_of_a_batch_are_portraits():
    import make_base
    import torch

    count = make_base.HELD_OUT + 1000
    captions = ["pixel art, red robot, running"] * count
    for row in (3, 7, count - 1):  # the last is held out
        captions[row] = "pixel art, red robot, portrait, happy, white background"
    latents = np.arange(count, dtype=np.float16).reshape(-1, 1)
    folder = ROOT / "demo/base/tokenizer"
    files = sorted(folder.iterdir())
    tokenizer = make_base.make_tokenizer(folder, [])
    assert sorted(folder.iterdir()) == files, "a finished tokenizer is not learned again"
    data = make_base.LatentData.from_captions(latents, captions, tokenizer, torch.device("cpu"))
    rows = [int(row) for row in data.batch(np.random.default_rng(0))[0]]
    portraits = [row for row in rows if row in (3, 7)]
    assert int(make_base.BATCH_SIZE * make_base.PORTRAIT_SHARE) <= len(portraits) < len(rows)
    assert portraits, "of 1,002 images two are portraits: none would come by chance"
    assert max(rows) < 1000, "nothing that is held out"


@pytest.mark.slow
def test_a_resumed_training_of_the_base_takes_the_same_steps(monkeypatch):
    import make_base
    import torch

    monkeypatch.setattr(make_base, "BATCH_SIZE", 4)
    rng = np.random.default_rng(0)
    count = make_base.HELD_OUT + 32
    latents = torch.from_numpy(rng.normal(size=(count, 8, 16, 16)).astype(np.float16))
    ids = torch.from_numpy(rng.integers(0, 90, (count, make_base.POSITIONS)))
    data = make_base.LatentData(latents, ids, ids[0], portraits=np.arange(4))

    def trainer() -> make_base.DenoiserTrainer:
        torch.manual_seed(0)
        return make_base.DenoiserTrainer(
            make_base.new_unet(), make_base.new_text_encoder(100), data, 0, 1
        )

    through = trainer()
    losses = [float(through.train_step(1e-4)) for _ in range(3)]
    first, second = trainer(), trainer()
    assert float(first.train_step(1e-4)) == losses[0]
    second.restore(first.state())
    assert [float(second.train_step(1e-4)) for _ in range(2)] == losses[1:]
    assert all(torch.equal(a, b) for a, b in zip(second.average, through.average, strict=True))


def test_words_that_no_caption_has_are_read_like_commas():
    import make_base
    import torch

    text_encoder = make_base.new_text_encoder(100)
    embeddings = cast(torch.nn.Embedding, text_encoder.get_input_embeddings()).weight
    first = embeddings.detach().clone()
    ids, comma, unknown = torch.tensor([[97, 5, 7, 98]]), 5, 40
    make_base.settle_unknown_words(text_encoder, ids, comma, seed=0)
    assert torch.equal(embeddings[ids], first[ids])
    distance = (embeddings - embeddings[comma]).norm(dim=1)
    assert 0.1 < distance[unknown] < 0.4, "near the comma, but not the same"
    settled = embeddings.detach().clone()
    make_base.settle_unknown_words(text_encoder, ids, comma, seed=0)
    assert torch.equal(embeddings, settled)


def test_the_embedded_base_reads_the_demos_trigger_word_like_a_comma():
    import torch
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/base/tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(ROOT / "demo/base/text_encoder")
    layer = cast(torch.nn.Embedding, text_encoder.get_input_embeddings())
    embeddings = layer.weight.detach().float()
    comma, volto, hero, robot = embeddings[tokenizer(", volto hero robot").input_ids[1:5]]

    def likeness(word):
        return float(word @ comma / word.norm() / comma.norm())

    assert min(likeness(volto), likeness(hero)) > 0.8 > likeness(robot)


# Median hues in degrees of the art's robots, as RoboHash draws them, and of the teal backgrounds.
HUES = {"teal": 177, "blue": 198, "purple": 301, "pink": 331, "green": 129}


@pytest.mark.parametrize("color", HUES)
@pytest.mark.parametrize("shift", [-9, 0, 9])
def test_the_judge_names_the_arts_colors_by_their_own_hues(color, shift):
    rgb = colorsys.hsv_to_rgb((HUES[color] + shift) / 360, 0.75, 0.7)
    pixel = np.array([[round(255 * value) for value in rgb]])
    assert base_quality.color_names(pixel) == [color]
