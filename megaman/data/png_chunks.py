"""PNG files reduced to what their pixels need: no other chunk can keep these from being read.

A PNG is a signature and a list of chunks (W3C, "Portable Network Graphics", third edition, 2025).
Editors and workflow tools write megabytes of text, color profiles and times next to the pixels;
Pillow refuses the whole image if one of these is damaged or too large.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"IEND"
PIXELS = b"IDAT"
MAX_METADATA = 2**20  # bytes of a chunk that may hold the orientation, also once inflated
# The length of tRNS by color type, for gray and RGB; a palette has up to 256 entries.
TRANSPARENCY_LENGTHS = {0: 2, 2: 6}
PALETTE = 3
# Text chunks in which older programs wrote EXIF, and in which others wrote XMP.
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


class _Chunk(NamedTuple):
    kind: bytes
    start: int  # of the content, in bytes from the start of the file
    length: int


def essential_png(file: BinaryIO, with_pixels: bool, with_metadata: bool = True) -> io.BytesIO:
    """A PNG with the same pixels and nothing else but transparency and what may hold the
    orientation, which comes first wherever it was.

    Without with_pixels, the content ends where the pixels begin, and none are read; without
    with_metadata, the orientation is dropped too. What is damaged in the chunks that are kept stays
    as it is, except for the checksums.
    """
    chunks = list(_chunks(file))
    result = io.BytesIO()
    result.write(SIGNATURE)
    color_type = -1
    for chunk in chunks:
        if chunk.kind == b"IHDR":
            color_type = int.from_bytes(_read(file, chunk)[9:10])
        if chunk.kind in (b"IHDR", b"PLTE") or _is_transparency(chunk, color_type):
            _write(result, chunk.kind, _read(file, chunk))
    for chunk in chunks:
        if with_metadata and _may_hold_orientation(file, chunk):
            _write(result, chunk.kind, _read(file, chunk))
    if not with_pixels:
        if any(chunk.kind == PIXELS for chunk in chunks):
            _write(result, PIXELS, b"")
    else:
        for chunk in chunks:
            if chunk.kind == PIXELS:
                _write(result, PIXELS, _read(file, chunk))
        _write(result, END, b"")
    result.seek(0)
    return result


def _chunks(file: BinaryIO) -> Iterator[_Chunk]:
    """The chunks up to the end, or up to something that is none; the last may be cut off."""
    position = len(SIGNATURE)
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return
        length, kind = struct.unpack(">I4s", header)
        if not kind.isalpha() or kind == END:
            return
        yield _Chunk(kind, position + 8, length)
        position += 12 + length


def _read(file: BinaryIO, chunk: _Chunk) -> bytes:
    file.seek(chunk.start)
    return file.read(chunk.length)


def _write(file: BinaryIO, kind: bytes, content: bytes) -> None:
    file.write(struct.pack(">I", len(content)) + kind + content)
    file.write(struct.pack(">I", zlib.crc32(kind + content)))


def _is_transparency(chunk: _Chunk, color_type: int) -> bool:
    """Whether it is a tRNS chunk that fits the color type."""
    if chunk.kind != b"tRNS":
        return False
    if color_type == PALETTE:
        return 0 < chunk.length <= 256
    return chunk.length == TRANSPARENCY_LENGTHS.get(color_type)


def _may_hold_orientation(file: BinaryIO, chunk: _Chunk) -> bool:
    """Whether it is EXIF, or text of a reasonable size with EXIF or XMP in it."""
    if chunk.length > MAX_METADATA:
        return False
    if chunk.kind == b"eXIf":
        return True
    if chunk.kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return False
    content = _read(file, chunk)
    if not content.startswith(ORIENTATION_TEXTS):
        return False
    text = content.partition(b"\0")[2]
    if chunk.kind == b"zTXt":
        return _inflates_within_limit(text[1:])
    return chunk.kind == b"tEXt" or text[:1] == b"\0"  # no program compresses XMP


def _inflates_within_limit(content: bytes) -> bool:
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(content, MAX_METADATA)
    except zlib.error:
        return False
    return not inflater.unconsumed_tail
