"""What a file is by its own bytes, and that it is nothing else besides; no decoder is involved."""

import re
import struct
from typing import Literal

from rayseg.io.untrusted import TooLarge
from rayseg.serve.problems import Refused

Kind = Literal["png", "jpeg", "tiff"]
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"II+\x00", "tiff"),
    (b"MM\x00+", "tiff"),
)
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive",
    b"%PDF-": "a PDF",
    b"GIF8": "a GIF",
    b"RIFF": "a WebP",
    b"BM": "a BMP",
    b"\x1f\x8b": "gzip",
    b"<VRTDataset": "a VRT",
    b"<svg": "an SVG",
    b"<?xml": "XML",
    b"<": "markup",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"SQLite": "a database",
}
_MARKUP = re.compile(rb"<(?:svg|html|script|\?php|!doctype|vrtdataset)[\s/>]", re.IGNORECASE)
_MARKUP_WITHIN, _PDF_WITHIN = 1445, 1024  # bytes: as far as browsers look for what a file is, and as readers look
_ZIP_END = re.compile(rb"PK\x05\x06(?=.{8}(.{4}).{6})", re.DOTALL)  # the bytes of its directory
_ZIP_END_WITHIN = 22 + 65_535
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_AFTER = re.compile(rb"\x00*\xff\xd8(?=\xff)")
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WANTED = "send a PNG, a JPEG or a GeoTIFF"


def kind_of(data: bytes, *, max_pixels: int) -> Kind:
    """Which of the three kinds of image `data` is.

    Raises:
        Refused: 415 if it is none of them or something else besides, 422 if it is cut off.
        TooLarge: its header names more than `max_pixels` pixels (a TIFF's is for GDAL to read).
    """
    kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)
    if kind is None:
        raise Refused(415, f"the upload is {_named(data)}; {_WANTED}")
    _expect_nothing_else(data)
    if kind == "png":
        _walk_png(data, max_pixels)
    if kind == "jpeg":
        _walk_jpeg(data, max_pixels)
    return kind


def _named(data: bytes) -> str:
    start = data[:256].lstrip()
    if not data:
        return "empty"
    return next((name for magic, name in _OTHERS.items() if start.startswith(magic)), "of no kind that is known here")


def _expect_nothing_else(data: bytes) -> None:
    """Refuse a file that a browser, an unpacker or a PDF reader would open as well."""
    if _holds_zip(data):
        raise Refused(415, f"the upload is an image and a ZIP archive at once; {_WANTED} alone")
    if data.find(b"%PDF-", 0, _PDF_WITHIN + 4) >= 0:
        raise Refused(415, f"the upload is an image and a PDF at once; {_WANTED} alone")
    if _MARKUP.search(data, 0, _MARKUP_WITHIN):
        raise Refused(415, f"the upload is an image and markup at once; {_WANTED} alone")


def _holds_zip(data: bytes) -> bool:
    """Whether an end record lies where readers look for one, of an archive that is empty or has a directory before it.

    The record's four letters alone are in the noise of one image in 65,000.
    """
    ends = [*_ZIP_END.finditer(data, max(0, len(data) - _ZIP_END_WITHIN))]
    directory = data.find(b"PK\x01\x02") if ends else -1
    return any(not any(end[1]) or 0 <= directory < end.start() for end in ends)


def _walk_png(data: bytes, max_pixels: int) -> None:
    """From chunk to chunk to the end, which has to be that of the file."""
    at, first = 8, True
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if first:
            if name != b"IHDR" or size != 13:
                raise Refused(422, "the PNG does not begin with its header; save the image anew")
            width, height = struct.unpack(">II", data[at + 8 : at + 16])
            _expect_few(width, height, max_pixels)
            first = False
        at += 12 + size
        if name == b"IEND":
            _expect_end(data, at, "PNG")
            return
    raise Refused(422, "the PNG is cut off; send all of it")


def _walk_jpeg(data: bytes, max_pixels: int) -> None:
    """Image by image: further JPEGs behind the first are what cameras append as previews."""
    end = _end_of_jpeg(data, 2, max_pixels)
    while found := _JPEG_AFTER.match(data, end):
        end = _end_of_jpeg(data, found.end(), max_pixels)
    _expect_end(data, end, "JPEG")


def _end_of_jpeg(data: bytes, at: int, max_pixels: int) -> int:
    """Where the image ends whose first marker is at `at`, from marker to marker."""
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise Refused(422, "the JPEG is damaged; save the image anew")
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:
            at += 1
            continue
        if marker in _SIZES and at + 9 <= len(data):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            _expect_few(width, height, max_pixels)
        at += 2 + size
        if marker == 0xDA:
            at = _after_scan(data, at)
            if data[at : at + 2] == b"\xff\xd9":
                break
    end = data.find(b"\xff\xd9", at)
    if end < 0:
        raise Refused(422, "the JPEG is cut off; send all of it")
    return end + 2


def _after_scan(data: bytes, at: int) -> int:
    found = _AFTER_SCAN.search(data, at)
    return found.start() if found else len(data)


def _expect_end(data: bytes, at: int, name: str) -> None:
    if at > len(data):
        raise Refused(422, f"the {name} is cut off; send all of it")
    if data[at:].strip(b"\x00"):
        raise Refused(415, f"the {name} ends {len(data) - at} bytes before the upload does; {_WANTED} alone")


def _expect_few(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} px, {max_pixels:,} px are allowed; send a part of it, or start the "
            "server with a higher --max-pixels"
        )
