"""The images in a folder: by their names, or by what their content begins with."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from megaman.data.png_chunks import SIGNATURE

# Files named so are images, also if they are empty or damaged; any other file whose content begins
# like one is read too.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi"),
    *(".png", ".apng", ".bmp", ".dib", ".webp"),
}
# Reported, so that nobody expects them to be used, but not read.
OTHER_SUFFIXES = {
    *(".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga"),
    *(".ico", ".ppm", ".pgm", ".pbm", ".pnm", ".svg", ".pcx", ".dds", ".xcf", ".hdr"),
}
# Copies of images under these names are reported: a backup would be trained on twice.
BACKUP_SUFFIXES = {".bak", ".old", ".orig", ".tmp", ".part", ".download", ".crdownload"}
# Files of training sets that are no images; they are not opened if an image has their stem.
TEXT_SUFFIXES = {".txt", ".caption"}
JPEG_SIGNATURE = b"\xff\xd8\xff"
OUR_SIGNATURES = (b"\x89PNG", JPEG_SIGNATURE, b"RIFF", b"BM")
OTHER_SIGNATURES = {
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"ftyp": "HEIC or AVIF",
    b"8BPS": "Photoshop",
    b"\xff\x0a": "JPEG XL",
    b"JXL ": "JPEG XL",
    b"jP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"gimp": "GIMP",
    b"IIU\0": "raw photo",
    b"IIRO": "raw photo",
}
# What stands behind ftyp; videos have other brands.
BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis", b"crx "}
BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}  # bytes of the header behind the file header
JUNCTION = 0xA0000003  # Windows' IO_REPARSE_TAG_MOUNT_POINT


def find_images(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """All images in the folder and its subfolders in natural order (2 before 10), without hidden
    ones.

    The second value has whatever else a user might expect among them, with the reason why it is
    skipped: images in other formats, linked folders (which could lead in a circle), folders that
    cannot be read.
    """
    images: list[Path] = []
    skipped: dict[Path, str] = {}

    def skip_folder(error: OSError) -> None:
        skipped[Path(error.filename)] = f"cannot be read ({error.strerror})"

    for parent, folders, names in os.walk(folder, onerror=skip_folder):
        place = Path(parent)
        visible = [name for name in folders if not name.startswith(".")]  # not .git, .thumbnails
        linked = [name for name in visible if _is_linked(place / name)]
        folders[:] = [name for name in visible if name not in linked]  # os.walk visits these next
        for name in linked:
            skipped[place / name] = "a link to a folder, which is not followed"
        _sort_files(place, names, images, skipped)

    prefix_length = len(folder.as_posix()) if folder.parts else 0

    def order(path: Path) -> str:
        return natural_key(path.as_posix()[prefix_length:])

    return sorted(images, key=order), {path: skipped[path] for path in sorted(skipped, key=order)}


def _sort_files(
    folder: Path, names: list[str], images: list[Path], skipped: dict[Path, str]
) -> None:
    """Add the files with these names to the images or to what is skipped; others are ignored."""
    visible = [os.path.splitext(name) for name in names if not name.startswith(".")]
    stems = {stem for stem, suffix in visible if suffix.lower() in SUFFIXES}
    for stem, ending in visible:
        path, suffix = folder / (stem + ending), ending.lower()
        if suffix in SUFFIXES:
            images.append(path)
        elif suffix in TEXT_SUFFIXES and stem in stems:
            continue
        elif suffix in OTHER_SUFFIXES and not _has_our_content(path):
            skipped[path] = f"{suffix} is not read: save it as PNG or JPG"
        elif suffix in BACKUP_SUFFIXES or ending.endswith("~"):
            if _has_our_content(path):
                skipped[path] = "an image, but a backup by its name: rename it if you need it"
        elif _has_our_content(path):
            images.append(path)
        elif kind := other_kind(_first_bytes(path)):
            skipped[path] = f"{kind} by its content, which is not read: save it as PNG or JPG"


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a regular file; none if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""  # reading a pipe could block forever
        with open(path, "rb", buffering=0) as file:
            return file.read(32)
    except OSError:
        return b""


def _has_our_content(path: Path) -> bool:
    """Whether a file begins like one of FORMATS."""
    start = _first_bytes(path)
    if start.startswith(b"BM"):  # many texts begin so
        return int.from_bytes(start[14:18], "little") in BMP_HEADERS and not any(start[6:10])
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    return start.startswith((SIGNATURE, JPEG_SIGNATURE))


def other_kind(start: bytes) -> str | None:
    """What kind of image a file is that is not read, by its first bytes."""
    if start[4:8] == b"ftyp" and start[8:12] not in BRANDS:
        return None
    keys = (start[:4], start[4:8], start[:2])
    return next((OTHER_SIGNATURES[key] for key in keys if key in OTHER_SIGNATURES), None)


def _is_linked(folder: Path) -> bool:
    """Whether it is a symbolic link or a Windows junction, which os.walk follows before Python
    3.12."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == JUNCTION


def natural_key(text: str) -> str:
    """A sort key that compares runs of digits as numbers and ignores case otherwise.

    It is one string, because a list of pieces would need four times the memory, which matters with
    100,000 names.
    """
    pieces = []
    for piece in re.findall(r"\d+|\D+", text):
        number = str(int(piece)) if piece.isdecimal() else ""
        pieces.append(f"\0{len(number):05d}{number}" if number else f"{piece.casefold()}\1")
    return f"{''.join(pieces)}\U0010ffff{text}"
