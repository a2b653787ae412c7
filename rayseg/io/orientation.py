"""Photos as they are seen: pixels turned by the EXIF orientation, as annotation tools and browsers show them."""

import struct
from io import BytesIO
from typing import Any, BinaryIO

from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT

from rayseg.store import is_local, upath

_TAG = 0x0112
_PLANE = CRS.from_epsg(3857)  # GDAL warps with a CRS only; the same on both sides changes no coordinate


class Upright(WarpedVRT):  # type: ignore[misc]
    """An image without georeference as it is seen: an exact permutation of the file's pixels, read block by block."""

    crs = None
    transform = Affine.identity()

    def tags(self, *words: Any, **named: Any) -> dict[str, str]:  # noqa: ANN401 - rasterio's signature
        """Tags of the file."""
        found: dict[str, str] = self.src_dataset.tags(*words, **named)
        return found

    def close(self) -> None:
        """Close the file too."""
        super().close()
        self.src_dataset.close()


def upright(file: DatasetReader, href: str) -> DatasetReader:
    """The open file as it is seen; itself if it needs no turn or has a georeference, which belongs to stored pixels."""
    if file.crs or file.gcps[0] or file.transform != Affine.identity():
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
    """1 to 8; GDAL reads it of JPEG only. Of PNG and TIFF it is read from local files, else it is 1."""
    if file.driver == "JPEG":
        text = file.tags().get("EXIF_Orientation", "1").strip()
        return int(text) if text.isdigit() else 1
    if file.driver not in {"PNG", "GTiff"} or not is_local(href):
        return 1
    with upath(href).open("rb") as opened:
        content = BytesIO(_png_exif(opened)) if file.driver == "PNG" else opened
        try:
            return _tag_of(content)
        except struct.error:  # a directory that ends early has no orientation
            return 1


def _tag_of(content: BinaryIO) -> int:
    """The orientation in the first directory of a TIFF or BigTIFF structure, which EXIF is too; 1 without it."""
    head = content.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    magic = struct.unpack(f"{order}H", head[2:4])[0] if order else 0
    if magic not in {42, 43}:
        return 1
    at, count, size, value = ("4xI", "H", 12, 8) if magic == 42 else ("8xQ", "Q", 20, 12)
    content.seek(struct.unpack_from(order + at, head)[0])
    entries = struct.unpack(order + count, content.read(struct.calcsize(order + count)))[0]
    for _ in range(min(entries, 4096)):
        entry = content.read(size)
        if struct.unpack_from(order + "H", entry)[0] == _TAG:
            return int(struct.unpack_from(order + "H", entry, value)[0])
    return 1


def _png_exif(opened: BinaryIO) -> bytes:
    """Content of a PNG's chunk eXIf before its pixels; empty if it has none."""
    opened.seek(8)  # the signature
    while (head := opened.read(8)) and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return opened.read(length)
        opened.seek(length + 4, 1)
    return b""
