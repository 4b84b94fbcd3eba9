"""Which training image is nearest, and whether it is suspiciously near."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageOps

from megaman.data.dataset import MegaManDataset
from megaman.data.similarity import (
    SIDE,
    TrainingImages,
    describe,
    distances,
    load,
    make_training_images,
)
from megaman.errors import UserError
from megaman.training.memorization import describe_images, load_clip

DEMO, HELD_OUT = ROOT / "demo" / "images", ROOT / "demo" / "held_out"


@pytest.fixture(scope="module")
def demo() -> TrainingImages:
    """The demo's training images, checked with its held-out ones."""
    dataset, held_out = MegaManDataset(DEMO, None, 64), MegaManDataset(HELD_OUT, None, 64)
    return describe_images(dataset, held_out, 1, 0)


def demo_image(demo, index=5) -> Image.Image:
    return Image.open(DEMO / demo.names[index]).convert("RGB")


def test_a_copy_is_found_however_it_was_changed(demo):
    image = demo_image(demo)
    shifted = Image.new("RGB", image.size, image.getpixel((0, 0)))
    shifted.paste(image, (4, 0))
    copies = [image, ImageOps.mirror(image), image.resize((200, 200)), shifted]
    for nearest in demo.nearest(copies):
        assert nearest.index == 5 and nearest.is_near


def test_images_that_were_not_trained_on_are_not_suspicious(demo):
    held_out = [Image.open(path) for path in sorted(HELD_OUT.glob("*.png"))]
    assert len(held_out) == 8
    assert not any(nearest.is_near for nearest in demo.nearest(held_out))


def test_the_limit_is_a_twentieth_of_the_sets_own_distances():
    """Of 41 gray images, the nearest other of each is 1, 2, … levels away on one side."""
    grays = np.cumsum(np.arange(21))
    descriptors = np.stack([np.full((SIDE, SIDE, 3), gray, np.uint8) for gray in grays])
    index = np.arange(21, dtype=np.int32)
    names = [str(number) for number in index]
    plain = make_training_images(names, descriptors, index, ())
    assert plain.limit == pytest.approx(1, abs=0.01)
    alike = make_training_images(names, descriptors, index, {(0, 1), (1, 2)})
    assert alike.limit == pytest.approx(3, abs=0.1), "near-duplicates do not count"
    held_out = np.full((1, SIDE, SIDE, 3), 210, np.uint8)
    assert make_training_images(names, descriptors, index, (), held_out).limit == 0


def test_crops_of_one_image_are_not_each_others_nearest():
    descriptors = np.stack([np.full((SIDE, SIDE, 3), gray, np.uint8) for gray in (10, 11, 90)])
    found = make_training_images(["a", "b"], descriptors, np.array([0, 0, 1], np.int32), ())
    assert found.limit == pytest.approx(79, abs=0.1)
    assert found.nearest([Image.new("RGB", (64, 64), (88, 88, 88))])[0].index == 1


def test_one_image_alone_says_nothing_about_nearness(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "one.png")
    alone = describe_images(MegaManDataset(tmp_path, None, 64), None, 4, 0)
    assert alone.limit is None
    (nearest,) = alone.nearest([Image.new("RGB", (64, 64), "red")])
    assert nearest.distance < 1 and not nearest.is_near


def test_what_is_stored_comes_back_and_is_small(demo, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(demo.as_bytes())
    again = load(path)
    assert (again.names, again.limit) == (demo.names, demo.limit)
    assert np.array_equal(again.descriptors, demo.descriptors)
    assert np.array_equal(again.image_of, demo.image_of)
    assert path.stat().st_size < 1000 * len(demo.names)


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ["x"] * 3},
        {"descriptors": np.zeros((75, SIDE, SIDE), np.uint8)},
        {"descriptors": np.zeros((75, SIDE, SIDE, 3), np.float32)},
        {"image_of": np.full(75, -1, np.int32)},
        {"image_of": np.zeros(2, np.int32)},
    ],
    ids=["names", "shape", "kind", "index", "count"],
)
def test_a_strangers_file_is_checked(demo, tmp_path, changes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(TrainingImages(**{**vars(demo), **changes}).as_bytes())
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_an_image_has_no_distance_from_itself(demo):
    some = demo.descriptors[:6]
    assert np.allclose(np.diag(distances(some, some)), 0, atol=0.1)
    assert np.array_equal(describe(demo_image(demo)), describe(demo_image(demo)))


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A small CLIP image model with random weights, as transformers saves it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_features_of_a_clip_model_take_the_place_of_pixels(clip_model, tmp_path):
    features = load_clip(str(clip_model))
    found = describe_images(MegaManDataset(HELD_OUT, None, 64), None, 1, 0, features)
    assert found.descriptors.shape == (8, 16) and found.descriptors.dtype == np.float16
    image = Image.open(HELD_OUT / found.names[3])
    path = tmp_path / "x.safetensors"
    path.write_bytes(found.as_bytes())
    for images in (found, load(path, features)):
        (nearest,) = images.nearest([image])
        assert nearest.index == 3 and nearest.distance < 1
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_a_folder_without_a_clip_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"--clip_model .* holds no CLIP model"):
        load_clip(str(tmp_path))
