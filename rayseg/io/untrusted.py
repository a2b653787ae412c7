"""Images from strangers: what may be opened, how large it may be, and its pixels; for a process that may die of them.

`closed` makes the environment in which GDAL knows three drivers, no sidecar files and no network; it has to be there
before GDAL is first used, so the reading happens in a child process (see `rayseg.serve.uploads`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from rasterio.io import DatasetReader

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io.rasters import read
from rayseg.io.sources import Source, footprint, gdal, grids_of, source_of_file

DRIVERS = {"png": "PNG", "jpeg": "JPEG", "tiff": "GTiff"}
_CLOSED = {
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
_LEAST_BLOCK = 1 << 22  # px; small images lie in large blocks, too


class TooLarge(DataError):
    """An image of more pixels than are allowed."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image as it is worked on.

    Attributes:
        source: what the file says of itself; its href means nothing.
        grid: the file's own grid, or the UTM zone it was brought to.
        window: its place there.
        image_CHW: the bands asked for in the file's dtype, 0 where not valid; None where it lacks one of them.
        valid_HW: bool.
    """

    source: Source
    grid: Grid
    window: Window
    image_CHW: np.ndarray | None
    valid_HW: np.ndarray | None


def closed() -> dict[str, str]:
    """Environment variables under which GDAL opens PNG, JPEG and GeoTIFF alone, and nothing beside or outside them."""
    with rasterio.Env() as env:
        others = sorted(set(env.drivers()) - {*DRIVERS.values(), "MEM", "Memory"})
    return _CLOSED | {"GDAL_SKIP": ",".join(others), "OGR_SKIP": ",".join(others)}


def read_image(path: str, kind: str, *, bands: Sequence[str], max_pixels: int) -> Pixels:
    """The pixels of an image.

    Args:
        path: local file, alone in its folder.
        kind: one of `DRIVERS`; the file is opened as nothing else.
        bands: names of those wanted, in that order; empty for all but alpha.
        max_pixels: most pixels of one band.

    Raises:
        TooLarge: it has more pixels, or would need more memory than four bytes in each of eight bands of so many.
        DataError: it cannot be read, or what it says leads out of it.
    """
    with gdal(path), rasterio.open(path, driver=DRIVERS[kind]) as dataset:
        _expect_inside(dataset)
        _expect_small(dataset, len(bands), max_pixels)
        if dataset.colorinterp[0].name == "palette":
            raise DataError("the image has a palette, as masks have; convert it to RGB")
    source = source_of_file(path, "upload")
    [(grid, _)] = grids_of([source])
    window = footprint(source, grid)
    _expect_few(window.width, window.height, max_pixels)
    wanted = list(bands) or [name for name in source.bands if name != "alpha"]
    if not set(wanted) <= set(source.bands):
        return Pixels(source, grid, window, None, None)
    image_CHW, valid_HW = read([source], grid, window, bands=wanted)
    return Pixels(source, grid, window, image_CHW, valid_HW)


def _expect_inside(dataset: DatasetReader) -> None:
    """Refuse a file that names others: metadata can hold the path of overviews, which GDAL would open."""
    if any(dataset.tags(ns=domain) for domain in ("OVERVIEWS", "SUBDATASETS", "PROXY_OVERVIEW_REQUEST")):
        raise DataError("the image points to other files or holds several; save it as one plain image")
    if len(dataset.files) > 1:
        raise DataError("the image needs files beside it; save it as one plain image")


def _expect_small(dataset: DatasetReader, bands: int, max_pixels: int) -> None:
    _expect_few(dataset.width, dataset.height, max_pixels)
    size = max(np.dtype(name).itemsize for name in dataset.dtypes)
    if dataset.width * dataset.height * (bands or dataset.count) * size > 32 * max_pixels:
        raise TooLarge(
            f"the image has {dataset.count} bands of {dataset.dtypes[0]} in {dataset.width} x {dataset.height} px, "
            f"more than {32 * max_pixels:,} bytes; send a part of it"
        )
    if max(rows * cols for rows, cols in dataset.block_shapes) > max(max_pixels, _LEAST_BLOCK):
        raise TooLarge("the image is stored in blocks that are larger than it may be; save it with smaller ones")


def _expect_few(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} px on its grid, {max_pixels:,} px are allowed; send a part of it, or "
            "start the server with a higher --max-pixels"
        )
