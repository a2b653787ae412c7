"""Photos as they are seen: pixels turned by the EXIF orientation, as annotation tools and browsers show them."""

import re
import struct
import zlib
from contextlib import closing, suppress
from io import SEEK_END, BytesIO
from typing import Any, BinaryIO

from affine import Affine
from aiohttp import ClientError
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT

from rayseg.io import remote
from rayseg.io.tables import content
from rayseg.store import STORE_ERRORS, is_local, public, upath

_TAG = 0x0112
_XMP = re.compile(r'tiff:Orientation(?:="|>)([0-9])')
_PROFILE = b"Raw profile type exif\x00"  # a PNG's text, lines with a name, a length and hexadecimal digits
_BLOCK = 1 << 16  # bytes of a remote file that are requested at once
_FAULTS: tuple[type[Exception], ...] = (*STORE_ERRORS, ClientError)
_LONGEST = 1 << 22  # bytes of such a text; the orientation is near its beginning
_PLANE = CRS.from_epsg(3857)  # GDAL warps with a CRS only; the same on both sides changes no coordinate


class Upright(WarpedVRT):  # type: ignore[misc]
    """An image without georeference, turned upright: an exact permutation of the file's pixels, read block by block."""

    crs = None
    transform = Affine.identity()

    def tags(self, *words: Any, **named: Any) -> dict[str, str]:  # noqa: ANN401 - rasterio's signature
        """Tags of the file."""
        tags: dict[str, str] = self.src_dataset.tags(*words, **named)
        return tags

    def close(self) -> None:
        """Close the file too."""
        super().close()
        self.src_dataset.close()


def upright(file: DatasetReader, href: str) -> DatasetReader:
    """The open file, turned upright; the file itself if it needs no turn or has a CRS, which counts stored pixels.

    A world file alone places nothing on Earth, so such a photo is turned.
    """
    if file.crs or file.gcps[0]:
        return file
    width, height = file.width, file.height
    # stored (col, row) -> seen (col, row), in pixel edges; EXIF 2.32, tag 0x0112
    turns = {
        2: (-1, 0, width, 0, 1, 0),
        3: (-1, 0, width, 0, -1, height),
        4: (1, 0, 0, 0, -1, height),
        5: (0, 1, 0, 1, 0, 0),
        6: (0, -1, height, 1, 0, 0),
        7: (0, -1, height, -1, 0, width),
        8: (0, 1, 0, -1, 0, width),
    }
    orientation = _orientation(file, href)
    if orientation not in turns:
        return file
    width, height = (height, width) if orientation > 4 else (width, height)
    up = Affine(1, 0, 0, 0, -1, height)
    place = {"src_crs": _PLANE, "src_transform": up @ Affine(*turns[orientation]), "crs": _PLANE, "transform": up}
    exact = {"resampling": Resampling.nearest, "tolerance": 1e-9}
    return Upright(file, width=width, height=height, **place, **exact)


def _orientation(file: DatasetReader, href: str) -> int:
    """1 to 8 of EXIF, else of XMP, as Pillow finds it; GDAL reads EXIF of JPEG only."""
    if file.driver not in {"JPEG", "PNG", "GTiff"}:
        return 1
    tag: int | None = None
    if file.driver == "JPEG":
        text = file.tags().get("EXIF_Orientation", "").strip()
        tag = int(text) if text.isdigit() else None
    else:
        whole = file.driver == "PNG"
        with closing(_stored(href, whole=whole)) as opened, suppress(struct.error, zlib.error, ValueError):
            # The errors are those of damaged metadata, such as a directory that ends early.
            tag = _tag_of(BytesIO(png_exif(opened)) if whole else opened)
    if tag is None and (xmp := _XMP.search("".join(file.tags(ns="xml:XMP").values()))):
        tag = int(xmp[1])
    return tag or 1


def _stored(href: str, *, whole: bool) -> BinaryIO:
    """The bytes of a file; of a remote one by its parts, or whole, also where its server sends no parts.

    Raises:
        DataError: a remote file cannot be read.
    """
    if is_local(href):
        local: BinaryIO = upath(href).open("rb")
        return local
    target = upath(remote.signed(href))
    try:
        if whole:
            return BytesIO(content(target))
        parts: BinaryIO = target.fs.open(target.path, "rb", block_size=_BLOCK)
        # The last byte shows whether the server sends parts, before anything depends on it.
        parts.seek(-1, SEEK_END)
        parts.read(1)
        parts.seek(0)
    except ValueError:  # fsspec's word for a server that sends no parts
        return BytesIO(content(target))
    except _FAULTS as error:
        raise remote.failure(href, public(f"{href} cannot be read: {error}")) from error
    else:
        return parts


def _tag_of(content: BinaryIO) -> int | None:
    """The orientation in the first directory of a TIFF or BigTIFF structure, which EXIF is too; None without it."""
    head = content.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    magic = struct.unpack(f"{order}H", head[2:4])[0] if order else 0
    if magic not in {42, 43}:
        return None
    # Struct formats and sizes of the header and the entries: 42 is TIFF, 43 BigTIFF.
    at, count, size, value = ("4xI", "H", 12, 8) if magic == 42 else ("8xQ", "Q", 20, 12)
    content.seek(struct.unpack_from(order + at, head)[0])
    entries = struct.unpack(order + count, content.read(struct.calcsize(order + count)))[0]
    for _ in range(min(entries, 4096)):
        entry = content.read(size)
        if struct.unpack_from(order + "H", entry)[0] == _TAG:
            return int(struct.unpack_from(order + "H", entry, value)[0])
    return None


def png_exif(opened: BinaryIO) -> bytes:
    """EXIF of a PNG: its chunk eXIf, before or after the pixels, else a text as ImageMagick writes it, else nothing.

    Raises:
        ValueError, zlib.error: the text is damaged.
    """
    text, packed = b"", False
    at = 8  # after the signature
    while len(head := opened.read(8) if opened.seek(at) else b"") == 8 and head[4:] != b"IEND":
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        at += length + 12
        if kind == b"eXIf":
            return opened.read(length).removeprefix(b"Exif\x00\x00")
        if kind in {b"tEXt", b"zTXt"} and opened.read(len(_PROFILE)) == _PROFILE:
            text, packed = opened.read(min(length - len(_PROFILE), _LONGEST)), kind == b"zTXt"
    # Only one text is inflated: an upload may have thousands.
    text = zlib.decompressobj().decompress(text[1:], _LONGEST) if packed else text
    digits = b"".join(text.split(b"\n")[3:])
    return bytes.fromhex(digits.decode("ascii")).removeprefix(b"Exif\x00\x00")
