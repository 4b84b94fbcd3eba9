"""Pixel art is recognized, enlarged by whole factors and padded; transparency has a background and
is a mask of the loss."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from megaman.config.train import parse_train_config
from megaman.data.crops import Crop, Rendering, make_boxes, render_crops
from megaman.data.dataset import MegaManDataset
from megaman.data.encoding import _key
from megaman.data.file_index import FileIndex
from megaman.data.images import flatten
from megaman.data.pixel_art import _pixels, cell_side, is_pixel_art
from megaman.doctor.checks import examine

PALETTE = [(40, 60, 160), (230, 190, 150), (20, 20, 30), (200, 40, 40), (250, 240, 120)]


def draw_sprite(seed: int, width: int, height: int) -> Image.Image:
    """A symmetric figure of a few colors with a dark outline on a transparent background."""
    rng = random.Random(seed)
    image = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, width - 1, height - 1), fill=PALETTE[seed % 2], outline=PALETTE[2])
    for _ in range(max(4, width * height // 12)):
        x, y = rng.randrange(1, max(2, width // 2)), rng.randrange(1, height - 1)
        color = rng.choice(PALETTE)
        for place in (x, width - 1 - x):
            if image.getchannel("A").getpixel((place, y)):
                image.putpixel((place, y), color)
    return image


def draw_tiles(seed: int) -> Image.Image:
    """A scene of a few textured tiles of 16 pixels, some with a sprite on them."""
    rng = random.Random(seed)
    tiles = []
    for color in rng.sample(PALETTE, 3):
        tile = Image.new("RGB", (16, 16), color)
        for _ in range(40):
            shade = rng.choice((0.6, 0.8, 1.2))
            place = rng.randrange(16), rng.randrange(16)
            tile.putpixel(place, tuple(min(255, round(shade * value)) for value in color))
        tiles.append(tile)
    scene = Image.new("RGB", (16 * rng.randint(5, 9), 16 * rng.randint(5, 9)))
    for left in range(0, scene.width, 16):
        for top in range(0, scene.height, 16):
            scene.paste(rng.choice(tiles), (left, top))
            if rng.random() < 0.2:
                sprite = draw_sprite(rng.randrange(99), 14, 14)
                scene.paste(sprite, (left, top), sprite)
    return scene


def draw_smooth(seed: int) -> Image.Image:
    """Anti-aliased shapes, as drawings are."""
    rng = random.Random(seed)
    image = Image.new("RGB", (480, 480), rng.choice(PALETTE))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, radius = rng.randrange(480), rng.randrange(480), rng.randrange(40, 160)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=rng.choice(PALETTE), outline=(0, 0, 0), width=12)
    return image.resize((120, 120), Image.Resampling.BOX)


def draw_photo(seed: int) -> Image.Image:
    """Shading, texture and noise, as photographs have them."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(128, 60, (96, 96, 3)) for _ in range(2)]
    images = [Image.fromarray(layer.clip(0, 255).astype(np.uint8)) for layer in layers]
    soft = (
        images[0].filter(ImageFilter.GaussianBlur(6)).point([4 * i - 384 for i in range(256)] * 3)
    )
    return Image.blend(soft, images[1].filter(ImageFilter.GaussianBlur(1)), 0.3)


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    size = image.width * factor, image.height * factor
    return image.resize(size, Image.Resampling.NEAREST)


def as_jpeg(image: Image.Image, quality: int = 90) -> Image.Image:
    buffer = io.BytesIO()
    flatten(image).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def to_image(pixel_values: torch.Tensor) -> Image.Image:
    pixels = ((pixel_values[:3] + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def colors_of(image: Image.Image) -> set:
    return {color for _, color in image.getcolors(image.width * image.height) or []}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory) -> Path:
    """42 transparent sprites of 8 to 48 pixels, some of them not square."""
    folder = tmp_path_factory.mktemp("sprites")
    for number in range(42):
        width = 8 + number % 41
        height = max(8, width - number % 3 * 4)
        draw_sprite(number, width, height).save(folder / f"{number:02d}.png")
    return folder


def test_pixel_art_is_told_from_drawings_and_photographs():
    for seed in range(12):
        sprite = draw_sprite(seed, 12 + 2 * seed, 16 + 2 * seed)
        assert is_pixel_art(sprite) and is_pixel_art(enlarge(sprite, 2 + seed % 3))
        assert is_pixel_art(as_jpeg(enlarge(sprite, 3)))
        assert not is_pixel_art(draw_smooth(seed)) and not is_pixel_art(draw_photo(seed))


@pytest.mark.parametrize("quality", [75, 85, 95])
def test_scenes_of_tiles_are_pixel_art_as_jpeg(quality):
    for seed in range(8):
        scene = as_jpeg(draw_tiles(seed), quality)
        assert is_pixel_art(scene) and is_pixel_art(as_jpeg(enlarge(scene, 2), quality))


@pytest.mark.parametrize("side", [32, 48, 64])
def test_photographs_in_few_colors_and_small_drawings_are_no_pixel_art(side):
    for seed in range(8):
        photo = draw_photo(seed)
        dim = photo.convert("L").point([80 + value // 5 for value in range(256)])
        assert not is_pixel_art(photo.quantize(48).convert("RGB"))
        assert not is_pixel_art(dim.resize((side, side), Image.Resampling.BOX).convert("RGB"))
        assert not is_pixel_art(draw_smooth(seed).resize((side, side), Image.Resampling.BOX))


def test_opaque_colors_keep_their_differences():
    """Colors times opacity exceed 16 bits, which once made white -2, next to black's 0."""
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (255, 129, 128, 255))
    image.putpixel((2, 0), (255, 129, 128, 128))
    seen = _pixels(image)[0].tolist()
    assert seen == [[0, 0, 0, 255], [255, 129, 128, 255], [128, 64, 64, 128]]


def test_an_image_of_one_color_is_no_pixel_art():
    for image in (Image.new("RGB", (20, 20), "red"), Image.new("RGBA", (20, 20))):
        assert not is_pixel_art(image) and cell_side(image) == 1


@settings(max_examples=30)
@given(st.integers(0, 10), st.integers(8, 20), st.integers(8, 20), st.integers(1, 6))
def test_the_cells_of_enlarged_pixel_art_are_found(seed, width, height, factor):
    sprite = draw_sprite(seed, width, height)
    assert cell_side(enlarge(sprite, factor)) == factor * cell_side(sprite)


@pytest.mark.parametrize("resolution", [64, 256])
def test_the_model_sees_the_colors_of_the_sprites_only(sprites, resolution):
    dataset = MegaManDataset(sprites, None, resolution, False, rendering=Rendering("auto"))
    dataset.check()
    assert len(dataset) == len(dataset.pixel_art()) == 42 and not dataset.skipped
    for index, example in enumerate(dataset.examples):
        crops = dataset.get_crops(index, num_crops=4, flip=False, seed=0)
        assert len(crops) == 1, "the whole sprite is seen, so there is nothing to choose"
        (pixel_values,) = dataset.load_crops(index, crops)
        assert pixel_values.shape == (3, resolution, resolution)
        own = colors_of(flatten(Image.open(example.image)))
        assert colors_of(to_image(pixel_values)) <= own | {(255, 255, 255)}


def test_lanczos_is_as_before_and_leaves_out_the_smallest(sprites):
    dataset = MegaManDataset(sprites, None, 64, True)
    dataset.check()
    assert len(dataset) < 42 and "only" in next(iter(dataset.skipped.values()))
    assert dataset.pixel_art() == []
    crop = dataset.get_crops(0, 1, False, 0)[0]
    assert crop.cell == 0
    image = flatten(Image.open(dataset.examples[0].image))
    expected = image.resize((64, 64), Image.Resampling.LANCZOS, box=crop.box)
    assert to_image(dataset.load_crops(0, [crop])[0]).tobytes() == expected.tobytes()


def test_enlarged_pixel_art_fills_the_image_as_well_as_the_original(tmp_path):
    """96 pixels are 24 cells: 5 times 96 would leave 32 pixels, 21 times 24 leaves 8."""
    sprite = draw_sprite(3, 24, 24)
    sprite.save(tmp_path / "a.png")
    enlarge(sprite, 4).save(tmp_path / "b.png")
    dataset = MegaManDataset(tmp_path, None, 512, rendering=Rendering("auto"))
    dataset.check()
    first, second = (dataset.load_crops(i, dataset.get_crops(i, 1, False, 0))[0] for i in (0, 1))
    assert torch.equal(first, second)


@given(*[st.integers(1, 700)] * 2, *[st.sampled_from([64, 128, 512])] * 2, st.integers(1, 5))
def test_boxes_lie_within_the_image_and_have_whole_cells(width, height, target, other, cell):
    width, height = width * cell, height * cell
    boxes, found = make_boxes(width, height, 4, random.Random(0), (target, other), cell)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if found:
            assert all(place % cell == 0 for place in (left, top, right, bottom))
            assert (right - left) // cell <= target and (bottom - top) // cell <= other


def test_padding_is_the_background_or_the_color_of_the_edges():
    image = Image.new("RGB", (10, 6), (1, 2, 3))
    image.putpixel((4, 3), (200, 0, 0))
    crop = Crop((0, 0, 10, 6), (64, 64), False, cell=1)
    (opaque,) = render_crops(image, [crop], Rendering("auto", "#00ff00"))
    assert ((opaque[:, 0, 0] + 1) * 127.5).round().tolist() == [1, 2, 3]
    image.putalpha(Image.new("L", (10, 6), 0))
    (clear,) = render_crops(image, [crop], Rendering("auto", "#00ff00"))
    assert ((clear[:, 0, 0] + 1) * 127.5).round().tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("word", "color"), [("white", "#ffffff"), ("Navy", "#000080"), ("#3af", "#33aaff")]
)
def test_backgrounds_have_names_or_digits(word, color):
    assert parse_train_config(["--background", word]).data.background == color


@pytest.mark.parametrize("word", ["bleu", "", "#12345", "rgb(1,2,3)", "#ff000080"])
def test_other_backgrounds_are_wrong_usage(word, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_config([f"--background={word}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--background" in error
    assert word != "bleu" or "did you mean blue" in error


def test_opacity_is_the_fourth_channel():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    rendering = Rendering(background="#0000ff", alpha_mask=True)
    whole = (0, 0, 32, 32)
    seen = render_crops(image, [Crop(whole, (16, 16), m) for m in (False, True)], rendering)
    assert seen[0].shape == (4, 16, 16)
    assert seen[0][3, :, :8].max() == 0 and seen[0][3, :, 8:].min() == 1
    assert torch.equal(seen[1], seen[0].flip(-1))
    assert seen[0][:3, 0, 0].tolist() == [-1, -1, 1], "the background shows through"
    padded = render_crops(image.convert("RGB"), [Crop(whole, (40, 40), False, 1)], rendering)[0]
    assert padded[3].sum() == 32 * 32, "padding is transparent"


def test_latents_depend_on_how_the_image_is_rendered():
    plain = Crop((0, 0, 8, 8), (64, 64), False)
    crops = [plain, plain._replace(cell=1), plain._replace(cell=2)]
    renderings = [Rendering("auto"), Rendering("auto", "#000000"), Rendering(alpha_mask=True)]
    keys = {_key(b"1", crop, rendering) for crop in crops for rendering in renderings}
    assert len(keys) == 9
    assert _key(b"1", plain, Rendering("nearest")) == _key(b"1", plain, Rendering("lanczos"))


def test_what_was_found_is_remembered(sprites, tmp_path, monkeypatch):
    def load() -> MegaManDataset:
        dataset = MegaManDataset(sprites, None, 64, rendering=Rendering("auto"))
        dataset.check(FileIndex(tmp_path))
        return dataset

    first = load()
    first.hash_files(FileIndex(tmp_path))
    decode: Callable[..., None] = lambda *_: pytest.fail("decoded again")  # noqa: E731
    monkeypatch.setattr("megaman.data.image_info.open_transparent", decode)
    assert load().pixel_art() == first.pixel_art()


def test_the_doctor_knows_pixel_art(sprites):
    def kinds(rendering: Rendering) -> dict[str, bool]:
        dataset = MegaManDataset(sprites, None, 512, rendering=rendering)
        dataset.check()
        return {finding.kind: finding.is_wrong for finding in examine(dataset, 512).findings}

    found = kinds(Rendering("auto"))
    assert found["pixel_art"] is False
    assert not {"tiny", "small", "long", "unreadable"} & found.keys()
    assert kinds(Rendering("lanczos"))["tiny"] is True
