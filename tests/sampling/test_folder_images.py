"""What a folder holds already: numbers that are taken, images without a page, the images of a
stopped run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image
from test_records import JOB, RECORD

from megaman.errors import UserError
from megaman.sampling import folder_images, png, records


@pytest.fixture
def put(tmp_path):
    """put(name, record) saves a small image under that name."""

    def save(name, record=RECORD):
        records.save(tmp_path / name, Image.new("RGB", (8, 8)), record)

    return save


def test_numbers_go_on_after_the_highest(tmp_path, put):
    assert folder_images.first_free(tmp_path) == 0
    put("megaman_004_00.png")
    put("megaman_1207_01_base.png")
    (tmp_path / "megaman_9999.png").write_bytes(b"")
    assert folder_images.first_free(tmp_path) == 1208


def test_images_that_no_page_names_come_onto_it(tmp_path, put):
    put("megaman_000_00.png")
    put("megaman_000_01.png")
    put("megaman_000_01_base.png", replace(RECORD, loras=[]))
    put("megaman_001_00_base.png", replace(RECORD, loras=[]))  # its image was not drawn yet
    Image.new("RGB", (8, 8)).save(tmp_path / "megaman_007_00.png")  # somebody else's
    named = records.gallery_image("megaman_000_00.png", RECORD)
    images = folder_images.add_unlisted(tmp_path, [named])
    assert images[0] is named
    assert [(image.file, image.base_file) for image in images[1:]] == [
        ("megaman_000_01.png", "megaman_000_01_base.png")
    ]


def test_the_stopped_run_is_found_by_its_images(tmp_path, put):
    """By most of them, and the later of two equal runs; another run's images say nothing."""
    wanted = [(i, replace(RECORD, prompt=str(i))) for i in range(5)]
    assert folder_images.first_of_stopped(tmp_path, wanted) is None
    put("megaman_000_00.png", replace(RECORD, prompt="something else"))
    assert folder_images.first_of_stopped(tmp_path, wanted) is None
    for first, count in ((10, 3), (20, 3), (30, 1)):
        for i in range(count):
            put(
                f"megaman_{first + i:03d}_00.png",
                replace(RECORD, prompt=str(i), device="elsewhere"),
            )
    assert folder_images.first_of_stopped(tmp_path, wanted) == 20


def test_an_image_is_there_or_another_has_its_name(tmp_path, put):
    path = tmp_path / "megaman_000_00.png"
    assert not folder_images.is_complete(path, RECORD)
    put(path.name)
    assert folder_images.is_complete(path, RECORD)
    with pytest.raises(UserError, match=r"--resume.*megaman_000_00"):
        folder_images.is_complete(path, replace(RECORD, seed=JOB.seed + 1))
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UserError, match="not an image that this command generates"):
        folder_images.is_complete(path, RECORD)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not an image that this command generates"):
        folder_images.is_complete(path, RECORD)


DAMAGE = {
    "empty": lambda content: b"",
    "its signature alone": lambda content: content[:8],
    "cut in the record": lambda content: content[:200],
    "cut in the pixels": lambda content: content[:-20],
    "without its end": lambda content: content[:-12],
    "a zero for the last byte": lambda content: content[:-1] + b"\0",
    "a tail of zeros": lambda content: content[:-40] + bytes(40),
    "a changed pixel": lambda content: content[:-20] + b"?" + content[-19:],
    "no image": lambda content: b"<html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_image_is_not_complete(tmp_path, put, damage):
    path = tmp_path / "megaman_000_00.png"
    put(path.name)
    assert png.is_whole(path)
    path.write_bytes(damage(path.read_bytes()))
    assert not png.is_whole(path)
    assert not folder_images.is_complete(path, RECORD)
    assert folder_images.add_unlisted(tmp_path, []) == []


def test_a_damaged_image_is_kept_under_a_free_name(tmp_path):
    for content in (b"first", b"second", b"third"):
        path = tmp_path / "megaman_000_00.png"
        path.write_bytes(content)
        kept = folder_images.keep_damaged(path)
        assert not path.exists() and kept.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 3
    assert folder_images.first_free(tmp_path) == 0


def test_the_page_lists_what_is_there(tmp_path, put):
    """Neither deleted images nor the base's image of a pair that was deleted, nor a path that
    leads elsewhere."""
    images = []
    for number in range(4):
        name = f"megaman_00{number}_00"
        put(f"{name}.png")
        put(f"{name}_base.png", replace(RECORD, loras=[]))
        base_file = f"{name}_base.png" if number else None  # the first was listed without it
        images.append(records.gallery_image(f"{name}.png", RECORD, base_file))
    (tmp_path / "megaman_001_00.png").unlink()
    (tmp_path / "megaman_002_00_base.png").unlink()
    images.append(replace(images[0], file=f"/{tmp_path}/megaman_000_00.png"))
    images.append(replace(images[0], file="a" * 9999))
    images.append(replace(images[0], file="\0"))
    present = folder_images.images_on_disk(tmp_path, images)
    assert [(image.file, image.base_file) for image in present] == [
        ("megaman_000_00.png", "megaman_000_00_base.png"),
        ("megaman_002_00.png", None),
        ("megaman_003_00.png", "megaman_003_00_base.png"),
    ]


@pytest.mark.parametrize("content", [None, b"", b"RIFF"], ids=["deleted", "empty", "cut"])
def test_a_thumbnail_is_restored(tmp_path, content):
    path = tmp_path / "megaman_000_00.png"
    records.save(path, Image.new("RGB", (512, 384), "red"), RECORD)
    thumbnail = tmp_path / "thumbnails" / "megaman_000_00.png.webp"
    before = thumbnail.read_bytes()
    thumbnail.unlink()
    if content is not None:
        thumbnail.write_bytes(content)
    records.restore_thumbnail(path, replace(RECORD, width=512, height=384))
    assert thumbnail.read_bytes() == before
