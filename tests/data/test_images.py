"""Pictures as people have them: every suffix and mode, lying on their side, hidden, damaged."""

from __future__ import annotations

import io
import os
import random
import zlib
from itertools import product
from pathlib import Path

import pytest
import rotten
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile

from megaman.data.dataset import MegaManDataset
from megaman.data.image_files import find_images, natural_key
from megaman.data.images import (
    MIN_SIDE,
    BadImageError,
    crop_and_resize,
    crop_boxes,
    image_size,
    open_image,
    to_tensor,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def near(color, wanted, tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(color, wanted, strict=True))


def find(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)[0]]


def others(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): reason
        for path, reason in find_images(folder)[1].items()
    }


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_every_suffix_in_any_case_and_nothing_else(tmp_path):
    wanted = ["a.jpg", "b.JPEG", "c.png", "d.PNG", "e.Bmp", "f.webp", "g.WebP", "h.JPG"]
    touch(
        tmp_path, *wanted, "a.txt", "b.gif", "c.psd", "png", "jpg.", "notes.png.txt", "images.json"
    )
    assert find(tmp_path) == wanted


def test_other_formats_are_named_and_not_read(tmp_path):
    touch(
        tmp_path,
        "a.png",
        "b10.GIF",
        "b2.tif",
        "sub/c.heic",
        "sub/f.ico",
        "sub/g.PPM",
        "d.psd",
        "e.txt",
        ".f.gif",
        ".sub/g.gif",
    )
    assert find(tmp_path) == ["a.png"]
    assert list(others(tmp_path).items()) == [
        ("b2.tif", ".tif is not read: save it as PNG or JPG"),
        ("b10.GIF", ".gif is not read: save it as PNG or JPG"),
        ("sub/c.heic", ".heic is not read: save it as PNG or JPG"),
        ("sub/f.ico", ".ico is not read: save it as PNG or JPG"),
        ("sub/g.PPM", ".ppm is not read: save it as PNG or JPG"),
    ]


def test_linked_folders_are_named_and_not_followed(tmp_path):
    """Wherever they lead: no image comes twice, and none is skipped silently."""
    touch(tmp_path, "a.png", "sub/b.png")
    for name, target in [("circle", "."), ("sub/up", ".."), ("linked", "sub"), (".hidden", "sub")]:
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "linked.png").symlink_to("a.png")
    assert find(tmp_path) == ["a.png", "linked.png", "sub/b.png"]
    assert others(tmp_path) == dict.fromkeys(
        ["linked", "circle", "sub/up"], "a link to a folder, which is not followed"
    )
    assert find(tmp_path / "linked") == ["b.png"], "one that is named itself is"


def test_subfolders_are_searched_and_hidden_things_are_not(tmp_path):
    touch(
        tmp_path,
        "a.png",
        "sub/b.png",
        "sub/deep/c.png",
        ".hidden.png",
        "._a.png",
        ".git/d.png",
        "sub/.cache/e.png",
    )
    assert find(tmp_path) == ["a.png", "sub/b.png", "sub/deep/c.png"]


def test_a_hidden_folder_stays_hidden_if_no_picture_is_next_to_it(tmp_path):
    touch(tmp_path, ".thumbnails/a.png", "sub/.thumbnails/b.png", "sub/other/c.png")
    assert find(tmp_path) == ["sub/other/c.png"]


def test_a_folder_that_is_itself_hidden_may_be_named(tmp_path):
    touch(tmp_path / ".mine", "a.png")
    assert find(tmp_path / ".mine") == ["a.png"]


def test_a_folder_named_like_a_picture_is_none(tmp_path):
    touch(tmp_path, "folder.png/inside.png")
    assert find(tmp_path) == ["folder.png/inside.png"]


def test_no_picture_at_all(tmp_path):
    assert find_images(tmp_path) == ([], {})
    assert find_images(tmp_path / "none")[0] == []


def test_natural_order(tmp_path):
    wanted = [
        "1.png",
        "2.png",
        "02.png",
        "10.png",
        "mega2.png",
        "Mega10.png",
        "mega10b.png",
        "sub/1.png",
        "洛克人.png",
    ]
    touch(tmp_path, *random.Random(1).sample(wanted, len(wanted)))
    assert sorted(wanted, key=natural_key) == sorted(find(tmp_path), key=natural_key)
    order = find(tmp_path)
    assert (
        order[0] == "1.png"
        and {order[1], order[2]} == {"2.png", "02.png"}
        and order[3:] == wanted[3:]
    )


@given(st.lists(st.text(max_size=20) | st.text("aA0123456789_./٣二²", max_size=20), max_size=6))
def test_natural_key_orders_any_names_without_a_tie(names):
    keys = [natural_key(name) for name in names]  # never raises
    for one, key in zip(names, keys, strict=True):
        for other, other_key in zip(names, keys, strict=True):
            assert (key < other_key) + (other_key < key) + (key == other_key) == 1
            assert (key == other_key) == (one == other)


@given(st.text("ab ", max_size=4), st.integers(0, 10**12), st.integers(0, 10**12))
def test_numbers_are_compared_as_numbers(stem, one, other):
    assert (natural_key(f"{stem}{one}.png") < natural_key(f"{stem}{other}.png")) == (one < other)


def quarters(width: int = 40, height: int = 24) -> Image.Image:
    """Red, green over blue, white: every orientation looks different."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for color, x, y in [(RED, 0, 0), (GREEN, 1, 0), (BLUE, 0, 1), (WHITE, 1, 1)]:
        draw.rectangle(
            (x * width // 2, y * height // 2, (x + 1) * width // 2 - 1, (y + 1) * height // 2 - 1),
            color,
        )
    return image


# How a camera stored the upright picture: orientation → what undoes it (EXIF 2.3, tag 0x0112).
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright(tmp_path, orientation, suffix):
    upright, way = quarters(), STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    (upright.transpose(way) if way is not None else upright).save(path, quality=95, exif=exif)
    assert image_size(path) == upright.size == (40, 24)
    image = open_image(path)
    assert image.size == upright.size
    for point in [(5, 5), (35, 5), (5, 18), (35, 18)]:
        assert near(image.getpixel(point), upright.getpixel(point), 25), f"{orientation}: {point}"


def saved(tmp_path: Path, image: Image.Image, suffix: str = "png", **settings) -> Image.Image:
    path = tmp_path / f"a.{suffix}"
    image.save(path, **settings)
    assert image_size(path) == image.size
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == image.size
    return opened


def test_transparency_is_flattened_on_white(tmp_path):
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 10, 20))
    clear.paste((0, 0, 255, 128), (10, 0, 15, 20))
    for suffix in ("png", "webp"):
        image = saved(tmp_path, clear, suffix, **({"lossless": True} if suffix == "webp" else {}))
        assert near(image.getpixel((2, 2)), BLUE)
        assert near(image.getpixel((12, 2)), (127, 127, 255)), "half clear"
        assert near(image.getpixel((18, 2)), WHITE), "not the black that lies under it"


def test_a_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([*BLACK, *RED, *BLUE])
    image.paste(0, (0, 0, 10, 20))
    opened = saved(tmp_path, image, transparency=0)
    assert near(opened.getpixel((2, 2)), WHITE) and near(opened.getpixel((15, 2)), RED)
    opened = saved(tmp_path, image)
    assert near(opened.getpixel((2, 2)), BLACK) and near(opened.getpixel((15, 2)), RED)


def test_a_transparent_color_in_rgb_and_gray(tmp_path):
    image = Image.new("RGB", (20, 20), RED)
    image.paste(BLUE, (0, 0, 10, 20))
    opened = saved(tmp_path, image, transparency=BLUE)
    assert near(opened.getpixel((2, 2)), WHITE) and near(opened.getpixel((15, 2)), RED)
    gray = Image.new("L", (20, 20), 100)
    gray.paste(7, (0, 0, 10, 20))
    opened = saved(tmp_path, gray, transparency=7)
    assert near(opened.getpixel((2, 2)), WHITE) and near(opened.getpixel((15, 2)), (100,) * 3)


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "color"),
    [
        ("L", 100, "png", (100, 100, 100)),
        ("L", 100, "bmp", (100, 100, 100)),
        ("L", 100, "jpg", (100, 100, 100)),
        ("LA", (100, 255), "png", (100, 100, 100)),
        ("LA", (100, 0), "png", WHITE),
        ("1", 1, "png", WHITE),
        ("1", 0, "bmp", BLACK),
        ("I;16", 0, "png", BLACK),
        ("I;16", 128 * 257, "png", (128, 128, 128)),
        ("I;16", 65535, "png", WHITE),
        ("CMYK", (0, 255, 255, 0), "jpg", RED),
        ("RGB", RED, "bmp", RED),
        ("RGB", RED, "webp", RED),
        ("RGB", RED, "jpg", RED),
        ("P", 0, "bmp", BLACK),
    ],
)
def test_whatever_the_mode_it_becomes_rgb(tmp_path, mode, value, suffix, color):
    assert near(
        saved(tmp_path, Image.new(mode, (20, 20), value), suffix).getpixel((10, 10)), color, 5
    )


NOISE = Image.frombytes("RGB", (64, 48), random.Random(0).randbytes(64 * 48 * 3))


def encoded(kind: str, image: Image.Image = NOISE, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def with_a_short_chunk() -> bytes:
    """A PNG whose header says that the pixels end halfway: what follows is no chunk."""
    content = bytearray(encoded("PNG"))
    at = content.index(b"IDAT")
    content[at - 4 : at] = (4000).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty"),
        ("cut.jpg", encoded("JPEG")[:4], "damaged"),
        ("a_tiff.jpg", encoded("TIFF"), "TIFF by its content"),
        ("a_heic.jpg", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC or AVIF by its content"),
        ("text.png", b"this is no picture", "not an image"),
        ("page.jpg", b"<html><body>404 Not Found</body></html>", "not an image"),
        ("zeros.bmp", bytes(500), "not an image"),
        ("cut.png", encoded("PNG")[:5000], "damaged"),
        ("chunk.png", with_a_short_chunk(), "damaged"),
        ("cut.jpg", encoded("JPEG")[:700], "damaged"),
        ("cut.webp", encoded("WEBP", lossless=True)[:-20], "damaged"),
        ("cut.bmp", encoded("BMP")[:2000], "damaged"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=reason):
        open_image(path)


def test_the_first_frame_of_a_gif_under_another_name_is_used(tmp_path):
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    path = tmp_path / "a.png"
    path.write_bytes(encoded("GIF", frames[0], save_all=True, append_images=frames[1:]))
    (tmp_path / "b.gif").write_bytes(path.read_bytes())
    assert image_size(path) == (64, 48)
    assert open_image(path).getcolors() == [(64 * 48, (255, 0, 0))]
    assert find(tmp_path) == ["a.png"]


def test_a_picture_that_is_gone(tmp_path):
    for function in (open_image, image_size):
        with pytest.raises(BadImageError, match="cannot be read"):
            function(tmp_path / "gone.png")


def test_a_bomb_is_refused_by_its_header(tmp_path):
    content = bytearray(encoded("BMP"))
    content[18:26] = (30_000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(content)
    for function in (open_image, image_size):
        with pytest.raises(BadImageError, match="too many pixels"):
            function(tmp_path / "bomb.bmp")


def test_the_size_is_read_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda _: pytest.fail("a whole picture was decoded")
    )
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(encoded(kind))
        assert image_size(path) == (64, 48)


def test_the_size_of_a_cut_picture_is_its_headers_word(tmp_path):
    """The damage shows when the picture is decoded."""
    for kind in ("PNG", "JPEG", "BMP"):
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(encoded(kind)[:-60])
        assert image_size(path) == (64, 48)
        with pytest.raises(BadImageError):
            open_image(path)


def with_exif(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a robot"
    return encoded(kind, quarters(), exif=exif)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    st.sampled_from(
        [encoded(kind, quarters()) for kind in ("PNG", "JPEG", "BMP", "WEBP")]
        + [with_exif(kind) for kind in ("PNG", "JPEG", "WEBP")]
    ),
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=6),
    st.none() | st.integers(0, 3000),
)
def test_any_damage_is_a_bad_image_and_nothing_else(tmp_path_factory, content, changes, length):
    content = bytearray(content)
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content[:length])
    for function in (image_size, open_image):
        try:
            result = function(path)
        except BadImageError as error:
            assert str(error)
        else:
            if isinstance(result, Image.Image):
                assert result.mode == "RGB"
            else:
                assert min(result) >= MIN_SIDE


@pytest.mark.parametrize("orientation_type", [2, 4, 7])
def test_an_orientation_that_is_no_number_is_no_crash(tmp_path, orientation_type):
    """A few bytes wrong in a camera's EXIF block, as found by trying many."""
    content = with_exif("JPEG")
    tag = content.index(b"\x01\x12\x00\x03")
    path = tmp_path / "a.jpg"
    path.write_bytes(content[: tag + 3] + bytes([orientation_type]) + content[tag + 4 :])
    for function in (image_size, open_image):
        try:
            function(path)
        except BadImageError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("size", "fine"), [((16, 16), True), ((15, 400), False), ((400, 15), False), ((1, 1), False)]
)
def test_tiny_pictures(tmp_path, size, fine):
    path = tmp_path / "a.png"
    Image.new("RGB", size).save(path)
    if fine:
        assert image_size(path) == size
    else:
        with pytest.raises(BadImageError, match=f"only {size[0]}x{size[1]} pixels"):
            image_size(path)


@pytest.mark.parametrize(
    ("size", "fine"), [((20, 200), True), ((200, 20), True), ((20, 201), False), ((999, 99), False)]
)
def test_elongated_pictures(tmp_path, size, fine):
    path = tmp_path / "a.png"
    Image.new("RGB", size).save(path)
    if fine:
        assert image_size(path) == size
    else:
        with pytest.raises(BadImageError, match=f"^{size[0]}x{size[1]} pixels.*10 times"):
            image_size(path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animated_picture_the_first_frame_is_taken(tmp_path, kind):
    first, *others = [Image.new("RGB", (20, 20), color) for color in (RED, BLUE, GREEN)]
    path = tmp_path / f"a.{kind.lower()}"
    first.save(path, kind, save_all=True, append_images=others, lossless=True)
    assert getattr(Image.open(path), "n_frames", 1) == 3
    assert open_image(path).getcolors() == [(400, RED)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for function in (open_image, image_size):
        with pytest.raises(BadImageError, match="not a file"):
            function(tmp_path / "a.png")


SIDE = st.integers(1, 5000)


@given(SIDE, SIDE, st.integers(1, 20), st.none() | st.integers())
def test_crops_are_the_largest_squares_within_the_picture(width, height, count, seed):
    boxes = crop_boxes(width, height, count, None if seed is None else random.Random(seed))
    side = min(width, height)
    assert 1 <= len(boxes) <= count and len(set(boxes)) == len(boxes)
    for left, top, right, bottom in boxes:
        assert 0 <= left and 0 <= top and right <= width and bottom <= height
        assert right - left == bottom - top == side
    if seed is None:
        left, top, right, bottom = boxes[0]
        assert (
            len(boxes) == 1
            and abs(left - (width - right)) <= 1
            and abs(top - (height - bottom)) <= 1
        )
    else:
        assert boxes == crop_boxes(width, height, count, random.Random(seed))
    if width == height:
        assert boxes == [(0, 0, width, height)]


@given(
    SIDE, SIDE, st.integers(1, 4), st.none() | st.integers(), st.integers(1, 64), st.integers(1, 64)
)
def test_crops_of_any_shape_are_as_large_as_the_picture_allows(
    width, height, count, seed, across, down
):
    boxes = crop_boxes(
        width, height, count, None if seed is None else random.Random(seed), (across, down)
    )
    assert 1 <= len(boxes) <= count and len(set(boxes)) == len(boxes)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left == width or bottom - top == height
        off = abs((right - left) * down - (bottom - top) * across)
        assert off <= max(across, down) or 1 in (right - left, bottom - top), (
            "off the shape by less than a pixel"
        )


def test_random_crops_reach_both_ends_and_differ():
    boxes = []
    for seed in range(200):
        boxes += crop_boxes(20, 16, 4, random.Random(seed))
    assert {left for left, *_ in boxes} == {0, 1, 2, 3, 4}
    assert len(crop_boxes(1000, 16, 4, random.Random(0))) == 4


@given(st.integers(16, 90), st.integers(16, 90), st.sampled_from([8, 16, 32, 64]))
def test_fit_brings_any_crop_to_the_size(width, height, size):
    image = quarters(width, height)
    for box in crop_boxes(width, height, 2, random.Random(0)):
        assert crop_and_resize(image, box, (size, size)).size == (size, size)


def test_fit_cuts_out_the_box_and_no_more():
    image = Image.new("RGB", (60, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    for size in (5, 8, 20):
        assert crop_and_resize(image, (20, 0, 40, 20), (size, size)).getcolors() == [
            (size * size, BLUE)
        ]
    inner = crop_and_resize(image, (20, 0, 40, 20), (80, 80)).crop(
        (12, 12, 68, 68)
    )  # enlarged, its edges know their neighbors
    assert inner.getcolors() == [(56 * 56, BLUE)]


def test_fit_at_the_same_size_changes_no_pixel():
    image = quarters(32, 32)
    assert crop_and_resize(image, (0, 0, 32, 32), (32, 32)).tobytes() == image.tobytes()


def test_shrinking_averages():
    board = Image.new("L", (32, 32))
    for x, y in product(range(32), range(32)):
        board.putpixel((x, y), 255 * ((x + y) % 2))
    assert near(
        crop_and_resize(board.convert("RGB"), (0, 0, 32, 32), (16, 16)).getpixel((7, 7)),
        (128, 128, 128),
        1,
    )


def with_chunks(content: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with more chunks before or behind its pixels."""
    place = content.index(b"IEND") - 4 if behind else content.index(b"IDAT") - 4
    return content[:place] + b"".join(chunks) + content[place:]


def wrong_checksum(kind: bytes, content: bytes) -> bytes:
    return rotten.chunk(kind, content)[:-1] + b"!"


PNG_CONTENT = encoded("PNG", quarters())
WORKFLOW = zlib.compress(b"1234567890," * 150_000)
ANCILLARY = {
    "compressed text": with_chunks(PNG_CONTENT, rotten.chunk(b"zTXt", b"workflow\0\0" + WORKFLOW)),
    "international text": with_chunks(
        PNG_CONTENT, rotten.chunk(b"iTXt", b"workflow\0\1\0\0\0" + WORKFLOW)
    ),
    "plain text": with_chunks(PNG_CONTENT, rotten.chunk(b"tEXt", b"prompt\0" + b"x" * 70_000_000)),
    "much text": with_chunks(
        PNG_CONTENT, *[rotten.chunk(b"tEXt", b"prompt\0" + b"x" * 900_000)] * 80
    ),
    "no text": with_chunks(PNG_CONTENT, rotten.chunk(b"zTXt", b"workflow\0\0no zlib")),
    "text behind": with_chunks(
        PNG_CONTENT, rotten.chunk(b"zTXt", b"workflow\0\0" + WORKFLOW), behind=True
    ),
    "checksum": with_chunks(PNG_CONTENT, wrong_checksum(b"tEXt", b"a\0b")),
    "profile": with_chunks(PNG_CONTENT, rotten.chunk(b"iCCP", b"ICC\0\0" + WORKFLOW)),
    "short profile": with_chunks(PNG_CONTENT, rotten.chunk(b"iCCP", b"")),
    "short size": with_chunks(PNG_CONTENT, rotten.chunk(b"pHYs", b"\0")),
    "short gamma": with_chunks(PNG_CONTENT, rotten.chunk(b"gAMA", b"\0")),
    "short color": with_chunks(
        PNG_CONTENT, rotten.chunk(b"cHRM", b"\0"), rotten.chunk(b"sRGB", b"")
    ),
    "short transparency": with_chunks(PNG_CONTENT, rotten.chunk(b"tRNS", b"\0")),
    "animation": with_chunks(PNG_CONTENT, rotten.chunk(b"acTL", b"\0"), rotten.chunk(b"fcTL", b"")),
    "exif": with_chunks(PNG_CONTENT, rotten.chunk(b"eXIf", b"no exif")),
    "exif checksum": with_chunks(PNG_CONTENT, wrong_checksum(b"eXIf", b"MM\0*\0\0\0\x08\0\0")),
    "old exif": with_chunks(
        PNG_CONTENT, rotten.chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\nzz")
    ),
    "large xmp": with_chunks(
        PNG_CONTENT, rotten.chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + WORKFLOW)
    ),
    "no end": PNG_CONTENT[:-12],
    "half an end": PNG_CONTENT[:-6],
    "something behind": with_chunks(PNG_CONTENT, b"\0" * 50, behind=True),
}


@pytest.mark.parametrize("name", ANCILLARY)
def test_the_pixels_of_a_png_are_read_whatever_is_next_to_them(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(ANCILLARY[name])
    assert image_size(path) == (40, 24)
    assert open_image(path).tobytes() == quarters().tobytes()


def test_the_exif_of_a_jpeg_or_webp_cannot_keep_its_pixels_from_being_read(tmp_path):
    for kind in ("JPEG", "WEBP"):
        for exif in (b"Exif\0\0no exif", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"):
            path = tmp_path / f"a.{kind.lower()}"
            path.write_bytes(encoded(kind, quarters(), exif=exif))
            assert image_size(path) == open_image(path).size == (40, 24)


def turned_png(*, behind: bool, kind: str = "eXIf") -> bytes:
    """The quarters lying on their side, with the orientation before or behind the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = rotten.chunk(b"eXIf", content)
    if kind == "zTXt":
        text = f"\nexif\n{len(content) + 6:8}\n{(b'Exif' + bytes(2) + content).hex()}\n".encode()
        chunk = rotten.chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    if kind == "iTXt":
        text = b'<x:xmpmeta><a tiff:Orientation="6"/></x:xmpmeta>'
        chunk = rotten.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)
    lying = quarters().transpose(Image.Transpose.ROTATE_90)
    return with_chunks(encoded("PNG", lying), chunk, behind=behind)


@pytest.mark.parametrize("kind", ["eXIf", "zTXt", "iTXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_the_orientation_of_a_png_counts_wherever_it_stands(tmp_path, kind, behind):
    path = tmp_path / "a.png"
    path.write_bytes(turned_png(behind=behind, kind=kind))
    assert image_size(path) == (40, 24)
    assert open_image(path).tobytes() == quarters().tobytes()
    dataset = MegaManDataset(tmp_path, None, 16, center_crop=False)
    crops = dataset.get_crops(0, 8, False, seed=0)
    assert len(crops) > 1
    opened = dataset.load_crops(0, crops)
    for crop, pixels in zip(crops, opened, strict=True):
        expected = to_tensor(crop_and_resize(quarters(), crop.box, crop.size))
        assert torch.equal(pixels, expected), "the random crop, not the middle one"


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG that claims to have this size."""
    content = bytearray(encoded("JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path, monkeypatch):
    """As a phone's of 108 million pixels, with a smaller limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    lying = Image.Exif()
    lying[0x0112] = 6
    large = quarters(480, 320)
    path = tmp_path / "a.jpg"
    for progressive in (False, True):
        turned = large.transpose(Image.Transpose.ROTATE_90)
        path.write_bytes(encoded("JPEG", turned, quality=95, exif=lying, progressive=progressive))
        assert image_size(path) == (480, 320)
        image = open_image(path)
        assert image.size == (240, 160), "a half is below the limit"
        assert open_image(path, min_side=300).size == (240, 160)
        assert open_image(path, min_side=50).size == (120, 80), "a quarter would do"
        assert open_image(path, side_if_large=64).size == (120, 80), "the training size is enough"
        assert open_image(path, side_if_large=300).size == (240, 160)
        for point, color in [((20, 20), RED), ((220, 20), GREEN), ((20, 140), BLUE)]:
            assert near(image.getpixel(point), color, 30)
    small = tmp_path / "small.jpg"
    small.write_bytes(encoded("JPEG", quarters(300, 300)))
    assert open_image(small, side_if_large=64).size == (300, 300), "it may be decoded whole"
    small.unlink()
    dataset = MegaManDataset(tmp_path, None, 64, center_crop=False)
    crops = dataset.get_crops(0, 6, True, seed=0)
    assert len(crops) == 12
    for crop, pixels in zip(crops, dataset.load_crops(0, crops), strict=True):
        expected = to_tensor(crop_and_resize(large, crop.box, crop.size))
        expected = expected.flip(-1) if crop.mirrored else expected
        assert (pixels - expected).abs().mean() < 0.05, "the same part of the image"
    assert dataset[0]["pixel_values"].shape == (3, 64, 64)


def test_too_large_images_are_refused_with_the_limit_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("PNG", "BMP", "WEBP"):
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(encoded(kind))
        for function in (image_size, open_image):
            with pytest.raises(BadImageError, match=r"1,000 pixels.*make it smaller.*JPG"):
                function(path)
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_header(8000, 8000))
    for function in (image_size, open_image):
        with pytest.raises(BadImageError, match=r"8000x8000, too many pixels.*4,000"):
            function(path)


@pytest.mark.parametrize(("value", "gray"), [(200, 0), (255, 0), (257, 1), (771, 3), (65535, 255)])
def test_a_dark_16_bit_gray_is_not_taken_for_8_bits(tmp_path, value, gray):
    opened = saved(tmp_path, Image.new("I;16", (20, 20), value))
    assert opened.getcolors() == [(400, (gray,) * 3)]


def test_a_transparent_color_in_16_bit_gray(tmp_path):
    row = (300).to_bytes(2, "little") * 10 + (100 * 257).to_bytes(2, "little") * 10
    image = Image.frombytes("I;16", (20, 20), row * 20)
    opened = saved(tmp_path, image, transparency=300)
    assert near(opened.getpixel((2, 2)), WHITE) and near(opened.getpixel((15, 2)), (100,) * 3)


@pytest.mark.parametrize(
    "name",
    [
        "b.jpe",
        "b.jfif",
        "b.JIF",
        "b.jfi",
        "b.apng",
        "b.dib",
        "b",
        "b.image",
        "b.gif",
        "b.v2",
        "b.txt",
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_what_begins_like_an_image_is_read_whatever_its_name(tmp_path, name, kind):
    (tmp_path / name).write_bytes(encoded(kind))
    assert (find(tmp_path), others(tmp_path)) == ([name], {})
    assert open_image(tmp_path / name).size == (64, 48)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (encoded("GIF"), "GIF"),
        (encoded("TIFF"), "TIFF"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC or AVIF"),
        (b"\0\0\0\x1cftypavif" + bytes(99), "HEIC or AVIF"),
        (b"8BPS\0\x01" + bytes(99), "Photoshop"),
        (b"\xff\x0a" + bytes(99), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n" + bytes(99), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n" + bytes(99), "JPEG 2000"),
    ],
)
def test_what_begins_like_another_image_is_named_whatever_its_name(tmp_path, content, kind):
    for name in ("a", "a.image", "a.jpg_large"):
        (tmp_path / name).write_bytes(content)
    reason = f"{kind} by its content, which is not read: save it as PNG or JPG"
    assert (find(tmp_path), others(tmp_path)) == (
        [],
        dict.fromkeys(["a", "a.image", "a.jpg_large"], reason),
    )


def test_a_backup_of_an_image_is_named_and_not_trained_on_twice(tmp_path):
    for name in ("a.png", "a.png.bak", "a.png~", "b.jpg.part"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    assert find(tmp_path) == ["a.png"]
    assert others(tmp_path).keys() == {"a.png.bak", "a.png~", "b.jpg.part"}
    assert all("rename it" in reason for reason in others(tmp_path).values())


def test_what_is_no_image_is_passed_over(tmp_path):
    for name, content in {
        "bm.md": b"BM is how this text begins, and it continues",
        "sound.wav": b"RIFF\0\0\0\0WAVE",
        "film.mp4": b"\0\0\0\x18ftypisom" + bytes(99),
        "a.json": b"{}",
        "empty": b"",
        ".hidden": encoded("PNG"),
    }.items():
        (tmp_path / name).write_bytes(content)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    assert (find(tmp_path), others(tmp_path)) == ([], {})
