"""Decode images from untrusted sources within limits of format, size and memory; meant for a disposable process.

`gdal_environment` returns the environment in which GDAL has three drivers, no sidecar files and no network. GDAL reads
it at first use, so the decoding runs in a child process (see `rayseg.serve.uploads`).
"""

import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Literal

import numpy as np
import rasterio

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io.orientation import png_exif
from rayseg.io.output_grids import expect_mappable, footprint, grids_of
from rayseg.io.rasters import read
from rayseg.io.sources import Source, gdal, open_file, source_of_file
from rayseg.io.units import Unit, converted

Kind = Literal["png", "jpeg", "tiff"]
DRIVERS: dict[Kind, str] = {"png": "PNG", "jpeg": "JPEG", "tiff": "GTiff"}
_RESTRICTED = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "CPL_VSIL_CURL_USE_HEAD": "NO",
    "GDAL_HTTP_PROXY": "127.0.0.1:9",
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_DRIVER_PATH": "disable",
    "PROJ_NETWORK": "OFF",
    "GDAL_NUM_THREADS": "1",
}
_XMP = b"iTXtXML:com.adobe.xmp\0\0\0\0\0"  # neither packed nor in a language, as XMP requires and GDAL reads it
_MIN_BLOCK_LIMIT = 1 << 22  # px; small images can be stored in blocks larger than themselves


class ImageTooLarge(DataError):
    """An image with more pixels or bytes than allowed."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A decoded image.

    Attributes:
        source: the file's metadata; its href is meaningless.
        grid: the file's own grid, or the UTM zone to which it is warped.
        window: its window of the grid.
        image_CHW: the requested bands in the file's dtype, 0 where not valid; None if the file lacks one of them.
        valid_HW: bool.
    """

    source: Source
    grid: Grid
    window: Window
    image_CHW: np.ndarray | None
    valid_HW: np.ndarray | None


def gdal_environment() -> dict[str, str]:
    """Environment variables that restrict GDAL to PNG, JPEG and GeoTIFF, without sidecar files and network."""
    with rasterio.Env() as env:
        others = sorted(set(env.drivers()) - {*DRIVERS.values(), "MEM", "Memory"})
    return _RESTRICTED | {"GDAL_SKIP": ",".join(others), "OGR_SKIP": ",".join(others)}


def read_image(
    path: str,
    kind: Kind,
    *,
    bands: Sequence[str],
    max_pixels: int,
    units: Mapping[str, Unit] | None = None,
    numbers: Sequence[int] = (),
) -> Pixels:
    """Decode an image.

    Args:
        path: local file, alone in its folder.
        kind: one of `DRIVERS`; no other driver opens the file.
        bands: names of the requested bands, in that order; empty for all but alpha.
        max_pixels: maximum pixels of one band.
        units: band -> (scale, offset) to which its values are converted, as `units.converted` does.
        numbers: of the bands of the file that are `bands`, from 1; empty for bands by name.

    Raises:
        ImageTooLarge: more pixels, or more bytes than eight bands of `max_pixels` four-byte values.
        DataError: the file cannot be decoded, refers to other files, or has a georeference outside the Earth.
    """
    with gdal(path), open_file(path, (DRIVERS[kind],)) as dataset:
        # 1. metadata can name files with overviews or subdatasets, which GDAL would open
        if any(dataset.tags(ns=domain) for domain in ("OVERVIEWS", "SUBDATASETS", "PROXY_OVERVIEW_REQUEST")):
            raise DataError("the image refers to other files or holds several images; save it as one plain image")
        if len(dataset.files) > 1:
            raise DataError("the image needs sidecar files, which uploads cannot have; save it as one plain image")
        # 2. sizes by the header, before any pixel is decoded
        _check_pixels(dataset.width, dataset.height, max_pixels)
        itemsize = max(np.dtype(name).itemsize for name in dataset.dtypes)
        if dataset.width * dataset.height * (len(bands) or dataset.count) * itemsize > 32 * max_pixels:
            raise ImageTooLarge(
                f"the image has {dataset.count} bands of {dataset.dtypes[0]} in {dataset.width} x {dataset.height} px, "
                f"more than {32 * max_pixels:,} bytes; send a part of it"
            )
        # GDAL decodes whole blocks, so one huge block would exceed the memory.
        if max(rows * cols for rows, cols in dataset.block_shapes) > max(max_pixels, _MIN_BLOCK_LIMIT):
            raise ImageTooLarge(
                f"the image is stored in blocks of more than {max(max_pixels, _MIN_BLOCK_LIMIT):,} px; save it with "
                "smaller blocks"
            )
        if dataset.colorinterp[0].name == "palette":
            raise DataError("the image has a palette, as class masks have; convert it to RGB")
    # 3. the grid, which a warp can make larger than the file
    source = source_of_file(path, "upload")
    if numbers:
        source = _named(source, bands, numbers)
    source = converted(source, units or {})
    if source.crs:
        expect_mappable(source, tile=2048)  # as `predict`, which refuses a place that is not on Earth
    [(grid, _)] = grids_of([source])
    window = footprint(source, grid)
    _check_pixels(window.width, window.height, max_pixels)
    # 4. pixels
    names = list(bands) or [name for name in source.bands if name != "alpha"]
    if not set(names) <= set(source.bands):
        return Pixels(source, grid, window, None, None)
    image_CHW, valid_HW = read([source], grid, window, bands=names)
    return Pixels(source, grid, window, image_CHW, valid_HW)


def without_text(png: bytearray) -> bytes:
    """A PNG without its text chunks, which GDAL would inflate on opening: 64 MB of zTXt take minutes of CPU time.

    What may hold the photo's orientation stays: XMP, which is not packed, and EXIF, moved from a text to its own chunk.
    """
    # The first eight bytes are the signature (PNG specification, section 5.2).
    chunks, at, exif = [bytes(png[:8])], 8, b""
    with suppress(ValueError, zlib.error):  # a damaged text holds no orientation
        exif = png_exif(BytesIO(png))
    while at + 8 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")  # length, name, data, checksum
        # EXIF stands before the first pixels, where readers look for it.
        kind = bytes(png[at + 4 : at + 8])
        if kind == b"IDAT" and exif:
            content = b"eXIf" + exif
            chunks.append(len(exif).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big"))
            exif = b""
        if kind not in {b"tEXt", b"zTXt", b"iTXt", b"eXIf"} or png.startswith(_XMP, at + 4):
            chunks.append(bytes(png[at:end]))
        at = end
    return b"".join(chunks)


def _named(source: Source, bands: Sequence[str], numbers: Sequence[int]) -> Source:
    """The source with the names `bands` for its bands `numbers`, which are counted from 1.

    Raises:
        DataError: it has no such band, or the numbers are too few, too many or not different.
    """
    found = f"bands are {list(numbers)}"
    if len(numbers) != len(bands) or len(set(numbers)) < len(numbers):
        raise DataError(f"{found}, expected {len(bands)} different numbers, for {', '.join(bands)}; correct them")
    if max(numbers) > len(source.bands):
        raise DataError(f"{found}, the image has {len(source.bands)}; send numbers from 1 to {len(source.bands)}")
    chosen = dict(zip(numbers, bands, strict=True))
    names = [
        chosen.get(number, name if name not in bands else f"own {name}") for number, name in enumerate(source.bands, 1)
    ]
    [(href, _)] = source.assets
    return replace(source, assets=((href, tuple(names)),))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} px, {max_pixels:,} px are allowed; send a part of it, or start the "
            "server with a higher --max-pixels"
        )
