"""--pixel_art: grids and palettes, and images that are snapped to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from test_records import RECORD

from megaman.config.generate import parse_generate_config
from megaman.data.palette import colors_of, shared_palette
from megaman.errors import UserError
from megaman.lora.notes import PALETTE
from megaman.sampling import folder_images, record_reader, records
from megaman.sampling.pixel_grid import PixelGrid, lora_palette, read_palette
from megaman.sampling.plan import GenerationPlan
from megaman.sampling.snap import snap

COLORS = ["161428", "ffb224", "fafcff", "2c68e8"]
GPL = "GIMP Palette\nName: Hero\nColumns: 0\n#\n 22  20  40\tdark\n255 178  36 accent\n300 0 0 no\n"


def draw_cells(factor: int) -> Image.Image:
    """Twelve by eight cells of COLORS, enlarged."""
    rng = np.random.default_rng(0)
    values = np.array([list(bytes.fromhex(color)) for color in COLORS], dtype=np.uint8)
    small = Image.fromarray(values[rng.integers(0, len(COLORS), (8, 12))])
    return small.resize((12 * factor, 8 * factor), Image.Resampling.NEAREST)


def test_a_blotchy_image_becomes_the_clean_one():
    clean = draw_cells(8)
    noise = np.random.default_rng(1).normal(0, 14, (64, 96, 3))
    blotchy = Image.fromarray((np.asarray(clean) + noise).clip(0, 255).astype(np.uint8))
    assert snap(blotchy, 8, COLORS).tobytes() == clean.tobytes()
    plain = snap(blotchy, 8, ())
    assert plain.size == clean.size and plain.tobytes() != clean.tobytes()


@settings(max_examples=40)
@given(st.integers(8, 70), st.integers(8, 70), st.integers(2, 70))
def test_cells_are_squares_of_one_color_of_the_palette(width, height, cells):
    cells = min(cells, width, height)
    image = Image.effect_noise((width, height), 90).convert("RGB")
    snapped = snap(image, cells, COLORS)
    factor = min(width, height) // cells
    assert min(snapped.size) == cells * factor and all(side % factor == 0 for side in snapped.size)
    assert set(colors_of(snapped)) <= set(COLORS)


@pytest.mark.parametrize(
    ("name", "content", "colors"),
    [
        ("a.hex", "161428\n#FFB224\n\n161428\n", COLORS[:2]),
        ("a.txt", "161428\r\nffb224\r\n", COLORS[:2]),
        ("a.gpl", GPL, COLORS[:2]),
    ],
)
def test_palettes_are_read(tmp_path, name, content, colors):
    (tmp_path / name).write_text(content)
    assert read_palette(tmp_path / name) == colors


def test_the_palette_of_an_image_is_its_colors(tmp_path):
    draw_cells(1).save(tmp_path / "a.png")
    assert sorted(read_palette(tmp_path / "a.png")) == sorted(COLORS)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.hex", b"ff0000\n", "1 color"),
        ("a.hex", b"\xff\xfe", "cannot be read"),
        ("a.gpl", b"GIMP Palette\n", "no color"),
        ("a.png", b"no image", "not an image"),
        ("a.hex", b"".join(b"%06x\n" % i for i in range(300)), "300 colors"),
        ("a.hex", b"a" * 2_000_000, "no list of colors"),
    ],
)
def test_bad_palettes_are_refused_by_name(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"--pixel_art.*{name}.*{reason}"):
        read_palette(tmp_path / name)


@given(st.sampled_from(["a.hex", "a.gpl", "a.png"]), st.binary(max_size=200))
def test_any_palette_is_read_or_refused(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        assert 2 <= len(read_palette(path)) <= 256
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("value", ["0", "1", "-8", "9000", "x", "8.5", "", ",a.hex"])
def test_bad_numbers_of_cells_are_wrong_usage(value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_generate_config([f"--pixel_art={value}"])
    assert stop.value.code == 2 and "--pixel_art" in capsys.readouterr().err


@pytest.fixture
def lora(tmp_path) -> Path:
    """A LoRA in one file whose header has a palette."""
    path = tmp_path / "a.safetensors"
    save_file({"x": np.zeros(1)}, path, metadata={PALETTE: ",".join(COLORS)})
    return path


def plan_of(lora: Path, *words: str) -> GenerationPlan:
    config = parse_generate_config(["--base_model", "a/b", "--prompts", "a robot", *words])
    return GenerationPlan.from_config(config, [(lora, 1.0)])


def test_the_palette_is_the_loras_or_the_files(tmp_path, lora):
    assert plan_of(lora).pixel_grid is None
    assert plan_of(lora, "--pixel_art=32").pixel_grid == PixelGrid(32, tuple(COLORS))
    (tmp_path / "b.hex").write_text("000000\nffffff\n")
    grid = plan_of(lora, f"--pixel_art=32,{tmp_path / 'b.hex'}").pixel_grid
    assert grid == PixelGrid(32, ("000000", "ffffff"))
    save_file({"x": np.zeros(1)}, tmp_path / "c.safetensors", metadata={PALETTE: "red,12"})
    assert lora_palette([tmp_path / "c.safetensors"]) == []


def test_more_cells_than_pixels_are_refused(lora):
    plan = plan_of(lora, "--pixel_art=65")
    assert plan.make_jobs(512)
    with pytest.raises(UserError, match="--pixel_art 65 is more than the 64 pixels"):
        plan.make_jobs(64)


def test_the_training_images_share_a_palette(tmp_path):
    for number in range(3):
        draw_cells(number + 1).save(tmp_path / f"{number}.png")
    noise = Image.effect_noise((40, 40), 90).convert("RGB")
    paths = sorted(tmp_path.iterdir())
    assert sorted(shared_palette(paths, "#ffffff")) == sorted(COLORS)
    for number in range(4):
        noise.save(tmp_path / f"noise{number}.png")
    assert shared_palette(sorted(tmp_path.iterdir()), "#ffffff") == []
    assert shared_palette([tmp_path / "gone.png"], "#ffffff") == []


def test_pixel_art_lies_next_to_its_image_and_is_listed(tmp_path):
    record = replace(RECORD, pixel_art=8, palette=COLORS)
    records.save(tmp_path / "megaman_000_00.png", draw_cells(8), record)
    records.save(tmp_path / "megaman_000_00_pixel.png", draw_cells(8), record)
    (image,) = folder_images.add_unlisted(tmp_path, [])
    assert image.pixel_file == "megaman_000_00_pixel.png"
    assert image.settings["pixel art"] == "8 cells, 4 colors"
    assert record_reader.read_record(tmp_path / image.pixel_file) == record
    (tmp_path / image.pixel_file).unlink()
    assert folder_images.images_on_disk(tmp_path, [image])[0].pixel_file is None


def test_earlier_records_have_no_pixel_art(tmp_path):
    records.save(tmp_path / "a.png", draw_cells(1), RECORD)
    assert record_reader.read_record(tmp_path / "a.png").pixel_art == 0
    bad = replace(RECORD, palette=["../../x"])
    records.save(tmp_path / "b.png", draw_cells(1), bad)
    with pytest.raises(UserError, match="palette in its record has an impossible value"):
        record_reader.read_record(tmp_path / "b.png")
