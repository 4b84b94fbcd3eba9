"""A folder of everything that can be wrong with images and captions, and as many good ones.

    python tests/helpers/rotten.py FOLDER

makes it by hand, to look at it or to train on it with --data_dir FOLDER.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ODD_BYTES = b"\x83\x8d\xff.png"  # Shift-JIS on a Linux disk: no Unicode
SEES_ALL = hasattr(os, "geteuid") and os.geteuid() == 0  # root can read what nobody may


@dataclass
class Corpus:
    """The folder and what a run should make of it.

    Args:
        good: images to train on.
        bad: what should be skipped, with a pattern of the reason.
        captions: of good images; None if they should be made from the name.
        warnings: caption files with a pattern of the warning about each.
    """

    folder: Path
    good: list[Path] = field(default_factory=list)
    bad: dict[Path, str] = field(default_factory=dict)
    captions: dict[Path, str | None] = field(default_factory=dict)
    warnings: dict[Path, str] = field(default_factory=dict)


def picture(seed: int = 0, size: tuple[int, int] = (48, 48), mode: str = "RGB") -> Image.Image:
    """A few colored blocks, other ones for each seed."""
    small = Image.frombytes("RGB", (4, 4), random.Random(seed).randbytes(48))
    return small.resize(size, Image.Resampling.NEAREST).convert(mode)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write; color as in the standard, rows with their
    filter bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    parts = [header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def noise(seed: int) -> Image.Image:
    return Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(64 * 64 * 3))


def good_contents() -> dict[str, bytes]:
    """Odd images that can be used."""
    clear = picture(1, mode="P")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    frames = [picture(seed) for seed in (2, 3, 4)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 80}
    inflated = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 * 2**20)))
    small_rows = (b"\0" + bytes(32)) * 32
    deep_rows = b"".join(b"\0" + random.Random(row).randbytes(6 * 32) for row in range(32))
    names = [
        "with spaces in it",
        "Umlaute äöüß",
        "emoji 🤖👩‍🚀",
        "روبوت أزرق",
        "洛克人",
        "-rf",
        "%s %d {}",
        "ends in dots...",
    ]
    return {
        "palette_transparent.png": encoded(clear, "PNG", transparency=0),
        "cmyk.jpg": encoded(picture(5, mode="CMYK"), "JPEG"),
        "progressive.jpeg": encoded(picture(6), "JPEG", progressive=True),
        "sixteen_bit_gray.png": encoded(Image.new("I;16", (40, 40), 40_000), "PNG"),
        "sixteen_bit_color.png": png(32, 32, 16, 2, deep_rows),
        "bomb_of_text.png": png(32, 32, 8, 0, small_rows, inflated),
        "gray_alpha.png": encoded(picture(7, mode="LA"), "PNG"),
        "one_bit.bmp": encoded(picture(8, mode="1"), "BMP"),
        "exif_rotated.jpg": encoded(picture(9, (64, 48)), "JPEG", exif=sideways),
        "animated.webp": encoded(frames[0], "WEBP", lossless=True, **animated),
        "animated.png": encoded(frames[0], "PNG", **animated),
        "a_jpeg.png": encoded(picture(10), "JPEG"),
        "a_gif.png": encoded(picture(4), "GIF", save_all=True, append_images=[picture(1)]),
        "CAPITALS.PNG": encoded(picture(11), "PNG"),
        "tall.png": encoded(picture(12, (40, 400)), "PNG"),
        **{
            f"{name}.png": encoded(picture(seed), "PNG")
            for seed, name in enumerate(names, start=20)
        },
    }


def bad_contents() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used: content, and a pattern of the reason."""
    garbled = bytearray(encoded(noise(1), "PNG"))
    garbled[600:620] = bytes(20)
    frames = {"save_all": True, "append_images": [picture(1)]}
    pixels = encoded(picture(2), "PNG")
    rows = (b"\0" + bytes(15_000 // 8)) * 15_000
    return {
        "zero_bytes.png": (b"", "empty"),
        "text.png": (b"this is no picture", "not an image"),
        "page.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
        "zeros.bmp": (bytes(500), "not an image"),
        "cut_in_the_header.png": (pixels[:20], "damaged"),
        "cut.png": (encoded(noise(2), "PNG")[:4000], "damaged"),
        "cut.jpg": (encoded(noise(3), "JPEG")[:900], "damaged"),
        "cut.webp": (encoded(noise(4), "WEBP", lossless=True)[:2000], "damaged"),
        "cut.bmp": (encoded(noise(5), "BMP")[:3000], "damaged"),
        "garbled.png": (bytes(garbled), "damaged"),
        "animated.gif": (encoded(picture(3), "GIF", **frames), r"\.gif is not read"),
        "scan.tif": (encoded(picture(5), "TIFF"), r"\.tif is not read"),
        "a_tiff.jpg": (encoded(picture(5), "TIFF"), "TIFF by its content"),
        "phone.HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), r"\.heic is not read"),
        "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC or AVIF by its content"),
        "one_pixel.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "only 1x1 pixels"),
        "strip.png": (
            encoded(Image.new("RGB", (30_000, 10)), "PNG"),
            "30000x10 pixels, one side more",
        ),
        "elongated.png": (
            encoded(Image.new("RGB", (2000, 100)), "PNG"),
            "one side more than 10 times the other",
        ),
        "bomb.png": (png(15_000, 15_000, 1, 0, rows), "too many pixels"),
        "kaputt äöü.png": (b"", "empty"),
        "broken 🤖👩‍🚀.png": (b"", "empty"),
        "مكسور.png": (b"", "empty"),
        "壞掉.png": (b"", "empty"),
    }


def caption_contents() -> dict[str, tuple[bytes, str | None, str | None]]:
    """Captions: content, the text to train on (None: made from the name), a pattern of the
    warning."""
    words = " ".join(f"word{number}" for number in range(10_000))
    guessed, made = (
        "is not UTF-8 and was read as {}: save it as UTF-8",
        "caption was made from the image's name",
    )
    return {
        "utf8": ("méga man, 洛克人".encode(), "méga man, 洛克人", None),
        "utf8_bom": ("méga man, 洛克人".encode("utf-8-sig"), "méga man, 洛克人", None),
        "utf16_little": (
            b"\xff\xfe" + "méga man, 洛克人".encode("utf-16-le"),
            "méga man, 洛克人",
            None,
        ),
        "utf16_big": (
            b"\xfe\xff" + "méga man, 洛克人".encode("utf-16-be"),
            "méga man, 洛克人",
            None,
        ),
        "utf16_bare": (
            "méga man, blue".encode("utf-16-le"),
            "méga man, blue",
            guessed.format("UTF-16"),
        ),
        "latin_1": (
            "größer, café".encode("latin-1"),
            "größer, café",
            guessed.format("Windows-1252"),
        ),
        "cp1252": (
            "“blue” – don’t".encode("cp1252"),
            "“blue” – don’t",
            guessed.format("Windows-1252"),
        ),
        "shift_jis": (
            "ロックマン、青い".encode("shift_jis"),
            "ロックマン、青い",
            guessed.format("Shift-JIS"),
        ),
        "big5": ("洛克人, 藍色機器人".encode("big5"), "洛克人, 藍色機器人", guessed.format("Big5")),
        "crlf": (b"mega man,\r\n blue robot\r\n", "mega man, blue robot", None),
        "empty": (b"", None, f"holds no text: the {made}"),
        "blank": (b" \r\n\t\n", None, f"holds no text: the {made}"),
        "controls": (bytes(range(1, 32)) + b"\x7f", None, f"holds no text: the {made}"),
        "some_controls": (b"mega\x00 man\x1b[31m\x07, blue", "mega man[31m, blue", None),
        "joined": ("emoji 👩‍🚀, می‌خواهم".encode(), "emoji 👩‍🚀, می‌خواهم", None),
        "long": (words.encode(), words, None),
        "too_long": (b"word " * 300_000, None, f"1,500,000 bytes are too many.*{made}"),
    }


def make(folder: Path) -> Corpus:
    """Fill the folder, except for what the file system cannot hold."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(folder)

    def put(name: str | bytes, content: bytes) -> Path:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    for name, content in good_contents().items():
        with contextlib.suppress(OSError, UnicodeError):
            corpus.good.append(put(name, content))
    for name, (content, reason) in bad_contents().items():
        with contextlib.suppress(OSError, UnicodeError):
            corpus.bad[put(name, content)] = reason
    for name, (content, text, warning) in caption_contents().items():
        path = put(f"caption_{name}.png", encoded(picture(len(name)), "PNG"))
        corpus.good.append(path)
        corpus.captions[path] = text
        put(f"caption_{name}.txt", content)
        if warning:
            corpus.warnings[path.with_suffix(".txt")] = warning
    with contextlib.suppress(OSError, UnicodeError):
        corpus.bad[put(ODD_BYTES, b"")] = "empty"
        corpus.good.append(put(b"good " + ODD_BYTES, encoded(picture(40), "PNG")))
        corpus.bad[put("line\nbreak \x1b[31m.png", b"")] = "empty"  # not on Windows
    with contextlib.suppress(OSError, NotImplementedError):
        add_links(corpus)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
        corpus.bad[folder / "pipe.png"] = "not a file"
    if hasattr(os, "geteuid") and not SEES_ALL:
        for name in ("forbidden.png", "forbidden_folder/inside.png"):
            path = put(name, encoded(picture(41), "PNG"))
            forbidden = path if path.parent == folder else path.parent
            forbidden.chmod(0)
            corpus.bad[forbidden] = "Permission denied"
    put("sub/deep.png", encoded(picture(42), "PNG"))
    corpus.good.append(folder / "sub" / "deep.png")
    while len(corpus.good) < len(corpus.bad):
        number = len(corpus.good)
        corpus.good.append(put(f"plain_{number}.png", encoded(picture(100 + number), "PNG")))
    put(".hidden.png", b"")
    put(".thumbnails/a.png", b"")
    put("readme.md", b"no picture")
    return corpus


def add_links(corpus: Corpus) -> None:
    folder = corpus.folder
    (folder / "sub").mkdir()
    good = folder / "linked.png"
    good.symlink_to("cmyk.jpg")
    corpus.good.append(good)
    for name, target in [
        ("dangling", "nowhere"),
        ("itself", "itself"),
        ("one", "other"),
        ("other", "one"),
    ]:
        (folder / f"{name}.png").symlink_to(f"{target}.png")
        corpus.bad[folder / f"{name}.png"] = "No such file|symbolic links"
    for name, target in [("circle", "."), ("sub/up", ".."), ("linked", "sub")]:
        (folder / name).symlink_to(target, target_is_directory=True)
        corpus.bad[folder / name] = "a link to a folder"
    for name, target in [("caption_gone", "nowhere"), ("caption_itself", "caption_itself")]:
        path = folder / f"{name}.png"
        path.write_bytes(encoded(picture(len(name)), "PNG"))
        path.with_suffix(".txt").symlink_to(f"{target}.txt")
        corpus.good.append(path)
        corpus.captions[path] = None
        corpus.warnings[path.with_suffix(".txt")] = (
            "cannot be read .*caption was made from the image's name"
        )


if __name__ == "__main__":
    made = make(Path(sys.argv[1]))
    print(f"{len(made.good)} good and {len(made.bad)} bad in {made.folder}")
