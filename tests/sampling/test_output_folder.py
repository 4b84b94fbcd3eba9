"""What a folder holds already: numbers that are taken, images without a page, the images of a
stopped run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image
from test_records import JOB, RECORD

from megaman.errors import UserError
from megaman.sampling import output_folder, records


@pytest.fixture
def put(tmp_path):
    """put(name, record) saves a small image under that name."""

    def save(name, record=RECORD):
        records.save(tmp_path / name, Image.new("RGB", (8, 8)), record)

    return save


def test_numbers_go_on_after_the_highest(tmp_path, put):
    assert output_folder.first_free(tmp_path) == 0
    put("megaman_004_00.png")
    put("megaman_1207_01_base.png")
    (tmp_path / "megaman_9999.png").write_bytes(b"")
    assert output_folder.first_free(tmp_path) == 1208


def test_images_that_no_page_names_come_onto_it(tmp_path, put):
    put("megaman_000_00.png")
    put("megaman_000_01.png")
    put("megaman_000_01_base.png", replace(RECORD, loras=[]))
    put("megaman_001_00_base.png", replace(RECORD, loras=[]))  # its image was not drawn yet
    Image.new("RGB", (8, 8)).save(tmp_path / "megaman_007_00.png")  # somebody else's
    named = records.gallery_image("megaman_000_00.png", RECORD)
    images = output_folder.add_unlisted(tmp_path, [named])
    assert images[0] is named
    assert [(image.file, image.base_file) for image in images[1:]] == [
        ("megaman_000_01.png", "megaman_000_01_base.png")
    ]


def test_the_stopped_run_is_found_by_its_images(tmp_path, put):
    """By most of them, and the later of two equal runs; another run's images say nothing."""
    wanted = [(i, replace(RECORD, prompt=str(i))) for i in range(5)]
    assert output_folder.first_of_stopped(tmp_path, wanted) is None
    put("megaman_000_00.png", replace(RECORD, prompt="something else"))
    assert output_folder.first_of_stopped(tmp_path, wanted) is None
    for first, count in ((10, 3), (20, 3), (30, 1)):
        for i in range(count):
            put(
                f"megaman_{first + i:03d}_00.png",
                replace(RECORD, prompt=str(i), device="elsewhere"),
            )
    assert output_folder.first_of_stopped(tmp_path, wanted) == 20


def test_an_image_is_there_or_another_has_its_name(tmp_path, put):
    path = tmp_path / "megaman_000_00.png"
    assert not output_folder.is_complete(path, RECORD)
    put(path.name)
    assert output_folder.is_complete(path, RECORD)
    with pytest.raises(UserError, match=r"--resume.*megaman_000_00"):
        output_folder.is_complete(path, replace(RECORD, seed=JOB.seed + 1))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not an image that this command generates"):
        output_folder.is_complete(path, RECORD)
