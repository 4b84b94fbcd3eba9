"""MegaManDataset: counted without a decoder, read as tensors, cropped as asked."""

from __future__ import annotations

import contextlib
import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer

from megaman.data.buckets import make_buckets
from megaman.data.captions import COMMON_ENDING
from megaman.data.dataset import MegaManDataset
from megaman.data.images import BadImageError, to_tensor
from megaman.errors import UserError

THE_CONTRACTS = (
    "from megaman_lora import MegaManDataset; "
    "ds = MegaManDataset('./megaman_images', None); print(len(ds))"
)
LIST_HEAVY_MODULES = (
    "import json, sys; "
    "print(json.dumps([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules]))"
)


def ramp(width: int, height: int) -> Image.Image:
    """Every column has its own red, every row its own green: a crop shows where it was cut."""
    image = Image.new("RGB", (width, height))
    for x, y in product(range(width), range(height)):
        red, green = x * 255 // max(1, width - 1), y * 255 // max(1, height - 1)
        image.putpixel((x, y), (red, green, 0))
    return image


def all_crops(
    dataset: MegaManDataset, index: int, num_crops: int, flip: bool, seed: int
) -> list[torch.Tensor]:
    return dataset.load_crops(index, dataset.get_crops(index, num_crops, flip, seed))


@pytest.fixture
def ramps(tmp_path):
    """A wide picture, a tall one and a square one, 32 pixels high, wide, and both."""
    folder = tmp_path / "ramps"
    folder.mkdir()
    for name, size in [("1_wide", (96, 32)), ("2_tall", (32, 96)), ("3_square", (32, 32))]:
        ramp(*size).save(folder / f"{name}.png")
    return folder


def test_counted_without_decoding_and_without_torch(run_script, pictures):
    """The contract's command, with a picture among the others that no decoder could read."""
    (pictures / "broken.png").write_bytes(b"no picture at all")
    pictures.rename(pictures.parent / "megaman_images")
    done = run_script(["-c", THE_CONTRACTS], pictures.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
    done = run_script(["-c", f"{THE_CONTRACTS}; {LIST_HEAVY_MODULES}"], pictures.parent)
    assert done.stdout.splitlines() == ["5", json.dumps([])]


def test_items_can_be_read_through_the_script_too(run_script, pictures):
    pictures.rename(pictures.parent / "megaman_images")
    code = (
        f"{THE_CONTRACTS}; item = ds[0]; print(tuple(item['pixel_values'].shape), item['caption'])"
    )
    done = run_script(["-c", code], pictures.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4\n(3, 512, 512) mega man, blue robot, white background\n"


def test_an_item_without_a_tokenizer(pictures):
    dataset = MegaManDataset(pictures, None, size=32)
    assert len(dataset) == 4
    item = dataset[2]
    assert set(item) == {"pixel_values", "caption"}
    assert item["caption"] == dataset.captions[2] == "mega man, green robot, white background"
    pixels = item["pixel_values"]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.min() >= -1 and pixels.max() == 1, "white is 1"


def test_an_item_with_a_tokenizer(pictures, base_folder):
    tokenizer = CLIPTokenizer.from_pretrained(base_folder / "tokenizer")
    (pictures / "megaman_02.txt").write_text("mega man, " * 200)
    dataset = MegaManDataset(pictures, tokenizer, size=32)
    item, long = dataset[0], dataset[1]
    assert set(item) == {"pixel_values", "input_ids"}
    length = tokenizer.model_max_length
    for ids in (item["input_ids"], long["input_ids"]):
        assert ids.dtype == torch.int64 and ids.shape == (length,), "padded and cut to one length"
    wanted = tokenizer(dataset.captions[0]).input_ids
    assert item["input_ids"][: len(wanted)].tolist() == wanted
    assert (
        item["input_ids"][0] == tokenizer.bos_token_id
        and long["input_ids"][-1] == tokenizer.eos_token_id
    )


def test_the_defaults_are_512_pixels_from_the_middle(ramps):
    dataset = MegaManDataset(str(ramps), None)
    first, second = dataset[0]["pixel_values"], dataset[0]["pixel_values"]
    assert first.shape == (3, 512, 512)
    assert torch.equal(first, second)


def test_colors_keep_their_places_and_values(tmp_path):
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    image.putpixel((3, 0), (0, 255, 0))
    pixels = to_tensor(image)
    assert pixels.shape == (3, 2, 4), "channels, rows, columns"
    assert torch.allclose(pixels[:, 1, 0], torch.tensor([1.0, -1.0, -0.6]))
    assert torch.allclose(pixels[:, 0, 3], torch.tensor([-1.0, 1.0, -1.0]))


@given(st.integers(0, 255))
def test_every_value_comes_back_from_minus_one_to_one(value):
    pixels = to_tensor(Image.new("RGB", (1, 1), (value, value, value)))
    assert -1 <= pixels.min() and pixels.max() <= 1
    assert ((pixels + 1) * 127.5).round().unique().tolist() == [value]


def test_the_middle_of_a_picture_is_its_middle(ramps):
    dataset = MegaManDataset(ramps, None, size=32, center_crop=True)
    for index, channel in ((0, 0), (1, 1)):
        middle = dataset[index]["pixel_values"][channel]
        assert (
            abs(middle.mean()) < 0.02 and -0.36 < middle.min() < -0.3 and 0.3 < middle.max() < 0.36
        )


def test_random_crops_differ_and_stay_inside(ramps):
    dataset = MegaManDataset(ramps, None, size=32, center_crop=False)
    wide = torch.stack([dataset[0]["pixel_values"] for _ in range(20)])
    starts = wide[:, 0, 0, 0]
    assert len(starts.unique()) > 3, "20 draws out of 65 places are not all the same few"
    spans = wide[:, 0].amax(dim=(1, 2)) - wide[:, 0].amin(dim=(1, 2))
    assert torch.allclose(spans, torch.tensor(2 * 31 / 95), atol=0.02), (
        "32 columns of the 96, none of them stretched"
    )
    square = [dataset[2]["pixel_values"] for _ in range(3)]
    assert torch.equal(square[0], square[1]) and torch.equal(square[1], square[2])


@pytest.mark.parametrize(
    ("center_crop", "crops", "flip", "counts"),
    [
        (True, 4, False, [1, 1, 1]),
        (True, 4, True, [2, 2, 2]),
        (False, 4, False, [4, 4, 1]),
        (False, 4, True, [8, 8, 2]),
        (False, 1, False, [1, 1, 1]),
    ],
)
def test_variants_are_crops_times_mirror_images(ramps, center_crop, crops, flip, counts):
    dataset = MegaManDataset(ramps, None, size=32, center_crop=center_crop)
    for index, count in enumerate(counts):
        variants = all_crops(dataset, index, crops, flip, seed=3)
        assert len(variants) == count
        assert all(
            variant.shape == (3, 32, 32) and variant.dtype == torch.float32 for variant in variants
        )
        upright = variants[: count // 2] if flip else variants
        assert len({variant.numpy().tobytes() for variant in upright}) == len(upright), (
            "no crop twice"
        )
        if flip:
            assert all(
                torch.equal(a.flip(-1), b)
                for a, b in zip(upright, variants[count // 2 :], strict=True)
            )


def test_variants_belong_to_the_seed_and_the_picture_wherever_the_folder_lies(ramps, tmp_path):
    def crops(folder, index=0, seed=1):
        dataset = MegaManDataset(folder, None, 32, center_crop=False)
        return torch.stack(all_crops(dataset, index, 4, False, seed))

    first = crops(ramps)
    assert torch.equal(first, crops(ramps))
    assert not torch.equal(first, crops(ramps, seed=2))
    ramp(96, 32).save(ramps / "0_another.png")
    assert torch.equal(first, crops(ramps, index=1)), "a new picture before it changes nothing"
    assert not torch.equal(first, crops(ramps, index=0)), "each picture has its own"
    moved = ramps.rename(tmp_path / "elsewhere")
    assert torch.equal(first, crops(moved, index=1))


def test_a_picture_whose_caption_names_a_side_is_not_mirrored(ramps):
    (ramps / "1_wide.txt").write_text("robot, cannon on the Left arm")
    dataset = MegaManDataset(ramps, None, size=32)
    variants = [all_crops(dataset, index, 1, True, seed=0) for index in range(3)]
    assert [len(each) for each in variants] == [1, 2, 2]
    assert torch.equal(variants[0][0], all_crops(dataset, 0, 1, False, seed=0)[0]), (
        "it stays as it was"
    )


@pytest.mark.parametrize("center_crop", [True, False])
def test_in_buckets_a_picture_keeps_its_shape(ramps, center_crop):
    """Each is trained on at its bucket's size, whole if the shapes are the same, without being
    stretched."""
    dataset = MegaManDataset(ramps, None, size=64, center_crop=center_crop)
    dataset.set_buckets(make_buckets(64, 64, None, None, None, True))
    shapes = [
        (3, 40, 96),
        (3, 96, 40),
        (3, 64, 64),
    ]  # 3 : 1, and what is nearest among the multiples of 8
    for index, shape in enumerate(shapes):
        variants = all_crops(dataset, index, 4, False, seed=0)
        assert {tuple(variant.shape) for variant in variants} == {shape}
        assert dataset[index]["pixel_values"].shape == shape
        assert (len(variants) == 1) == (center_crop or index == 2)
    tall = all_crops(dataset, 1, 1, False, seed=0)[0]
    assert tall[1, 0].max() < -0.7 or not center_crop, "the top of the picture is there"
    spans = [float(tall[channel].max() - tall[channel].min()) for channel in (0, 1)]
    assert spans[0] == pytest.approx(2, abs=0.05) and spans[1] == pytest.approx(
        2 * 96 / 40 / 3, abs=0.1
    )


def test_captions_are_found_or_made(pictures):
    (pictures / "megaman_02.txt").unlink()
    (pictures / "megaman_04.txt").write_text("")
    dataset = MegaManDataset(pictures, None)
    assert dataset.num_written_captions == 2
    assert dataset.captions == [
        "mega man, blue robot, white background",
        f"mega man, {COMMON_ENDING}",
        "mega man, green robot, white background",
        f"mega man, {COMMON_ENDING}",
    ]


def test_check_drops_what_cannot_be_trained_on(pictures):
    """One damaged picture, one too small, one gone; captions and pictures stay together."""
    (pictures / "megaman_01.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(pictures / "megaman_03.png")
    (pictures / "megaman_03.txt").unlink()
    dataset = MegaManDataset(pictures, None, size=32)
    assert (len(dataset), dataset.num_written_captions) == (4, 3)
    dataset.check()
    assert {path.name: reason for path, reason in dataset.skipped.items()} == {
        "megaman_01.png": "empty, 0 bytes",
        "megaman_03.png": "only 8x8 pixels",
    }
    assert [example.image.name for example in dataset.examples] == [
        "megaman_02.png",
        "megaman_04.png",
    ]
    assert dataset.captions == [
        f"mega man, {color} robot, white background" for color in ("red", "orange")
    ]
    assert (len(dataset), dataset.num_written_captions) == (2, 2)
    assert dataset[1]["caption"] == dataset.captions[1]
    dataset.check()
    assert len(dataset.skipped) == 2


def test_check_reads_headers_alone(pictures):
    """A picture cut short has a good header: it is skipped later, when it is read."""
    path = pictures / "megaman_01.png"
    path.write_bytes(path.read_bytes()[:-40])
    dataset = MegaManDataset(pictures, None)
    dataset.check()
    assert dataset.skipped == {}
    with pytest.raises(BadImageError):
        dataset[0]


def test_a_damaged_picture_is_named_as_such(pictures):
    (pictures / "megaman_01.png").write_bytes(b"no picture")
    dataset = MegaManDataset(pictures, None)
    with pytest.raises(BadImageError):
        dataset[0]
    with pytest.raises(BadImageError):
        all_crops(dataset, 0, 4, False, 0)


def test_it_can_be_iterated_to_its_end(pictures):
    dataset = MegaManDataset(pictures, None, size=16)
    captions = []
    for item in dataset:
        captions.append(item["caption"])
    assert captions == dataset.captions


def test_no_folder_and_no_picture(tmp_path):
    with pytest.raises(UserError, match=r"none is not a folder.*--data_dir"):
        MegaManDataset(tmp_path / "none", None)
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match="is not a folder"):
        MegaManDataset(tmp_path / "file.txt", None)
    assert len(MegaManDataset(tmp_path, None)) == 0


def test_a_name_that_is_not_unicode(tmp_path):
    """As an archive made in Japan leaves it on Linux."""
    try:
        ramp(96, 32).save(os.fsencode(tmp_path) + b"/\x83\x8d\x83b\x83N.png", format="PNG")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    dataset = MegaManDataset(tmp_path, None, size=32, center_crop=False)
    dataset.check()
    assert len(dataset) == 1 and dataset.skipped == {}
    assert len(all_crops(dataset, 0, 4, False, seed=0)) == 4
    dataset.captions[0].encode("utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_names_that_the_terminal_cannot_show(run_script, tmp_path, encoding):
    """As on Windows, which prints into a file in the old code page."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "洛克人.png").write_bytes(b"damaged")
    with contextlib.suppress(OSError):  # not on every file system
        (Path(os.fsdecode(os.fsencode(pictures) + b"/\x83\x8d.png"))).write_bytes(b"damaged")
    done = run_script(
        ["megaman_lora.py", "--data_dir", pictures], tmp_path, {"PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 1
    assert done.stdout.count("skipped: ") == len(list(pictures.iterdir()))
    assert (tmp_path / "megaman_lora_output" / "dataset_problems.json").exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --data_dir")
