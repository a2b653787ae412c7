"""A finished map as web-map tiles of 256 px, by rio-tiler: its classes, and the imagery it was made of.

Maps with a CRS are cut on the web's Mercator grid; an image without one on a pyramid of its own (zoom 0 is all of it).
"""

import warnings
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import mercantile
import numpy as np
from rasterio.warp import transform_bounds
from rio_tiler.errors import NoOverviewWarning, RioTilerError
from rio_tiler.io import ImageReader, Reader
from rio_tiler.models import ImageData

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io.maps import MappedTile
from rayseg.io.pictures import bands_shown
from rayseg.io.sources import Source, crs_of, gdal

if TYPE_CHECKING:
    from collections.abc import Iterator

warnings.filterwarnings("ignore", category=NoOverviewWarning)  # once, for filters belong to the process
SIDE = 256
Bounds = tuple[float, float, float, float]


def lonlat_bounds(grid: Grid, window: Window) -> Bounds:
    """(west, south, east, north) of a window of a grid with a CRS."""
    left, bottom, right, top = grid.bounds(window)
    west, south, east, north = transform_bounds(crs_of(str(grid.crs)), "EPSG:4326", left, bottom, right, top)
    return west, south, east, north


def bounds_of_tile(z: int, x: int, y: int) -> Bounds:
    """(west, south, east, north) of a tile of the web's grid."""
    found = mercantile.bounds(x, y, z)
    return found.west, found.south, found.east, found.north


def local_side(width: int, height: int, z: int) -> float:
    """Image pixels along a tile of the pyramid of an image without CRS."""
    return max(width, height) / float(2**z)


def classes_tile(tiles: Sequence[MappedTile], z: int, x: int, y: int, *, image: Window | None = None) -> np.ndarray:
    """Class values (256, 256) uint8 of a web tile, 255 where nothing is mapped.

    Args:
        tiles: those that may lie in it.
        z: zoom.
        x: column.
        y: row.
        image: the whole of an image without CRS whose pyramid is meant.
    """
    found_HW = np.full((SIDE, SIDE), NODATA, np.uint8)
    for tile in tiles:
        part = _read(tile.href, (1,), z, x, y, place=(tile.tile.window, image) if image else None, nodata=NODATA)
        if part is not None:
            found_HW = np.where(found_HW == NODATA, part.array.filled(NODATA)[0], found_HW)
    return found_HW


def imagery_tile(
    sources: Sequence[Source], z: int, x: int, y: int, *, image: Window | None = None, hosts: Sequence[str] = ()
) -> np.ndarray:
    """The imagery (256, 256, 4) uint8 of a web tile, see-through where there is none; first valid wins.

    Args:
        sources: those that may lie in it, in order.
        z: zoom.
        x: column.
        y: row.
        image: the whole of an image without CRS whose pyramid is meant.
        hosts: from which files may be read over http(s); others are left out.
    """
    found_HWC = np.zeros((SIDE, SIDE, 4), np.uint8)
    for source in sources:
        places = bands_shown(source)
        if any(not _allowed(href, hosts) for href, _ in places) or found_HWC[..., 3].all():
            continue
        place = (image, image) if image else None
        bands = [_read(href, (band,), z, x, y, place=place, nodata=source.nodata) for href, band in places]
        layers = [band for band in bands if band is not None]
        if len(layers) < 3:
            continue
        seen_HW = ~np.any([np.ma.getmaskarray(layer.array)[0] for layer in layers], axis=0)
        limits = [(0.0, 255.0) if source.dtype == "uint8" else _limits(href, band) for href, band in places]
        rgb = [_byte(layer.array.data[0], *limit) for layer, limit in zip(layers, limits, strict=True)]
        fresh_HW = seen_HW & (found_HWC[..., 3] == 0)
        found_HWC[fresh_HW] = np.stack([*rgb, np.full((SIDE, SIDE), 255, np.uint8)], axis=-1)[fresh_HW]
    return found_HWC


def _allowed(href: str, hosts: Sequence[str]) -> bool:
    url = urlsplit(href)
    return url.scheme in {"", "file", "s3"} or (url.scheme in {"http", "https"} and url.hostname in hosts)


def _byte(values_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled_HW = (values_HW.astype(np.float64) - low) / max(high - low, 1e-12)
    return np.asarray(np.rint(np.clip(np.nan_to_num(scaled_HW), 0, 1) * 255), np.uint8)


@contextmanager
def _open(href: str, *, local: bool, nodata: float | None) -> "Iterator[Reader]":
    options: Any = {} if nodata is None else {"nodata": nodata}
    with gdal(href), (ImageReader if local else Reader)(href, options=options) as reader:
        yield reader


def _read(
    href: str,
    bands: tuple[int, ...],
    z: int,
    x: int,
    y: int,
    *,
    place: tuple[Window, Window] | None,
    nodata: float | None,
) -> ImageData | None:
    """A file's part of a tile; None where it has none, or cannot be read: the ledger says so, the map goes on."""
    with suppress(RioTilerError, DataError), _open(href, local=place is not None, nodata=nodata) as reader:
        if place is None:
            found: ImageData = reader.tile(x, y, z, indexes=bands, tilesize=SIDE)
            return found
        return _part(reader, bands, z, x, y, *place)
    return None


def _part(
    reader: Reader, bands: tuple[int, ...], z: int, x: int, y: int, own: Window, image: Window
) -> ImageData | None:
    """What a file that covers the window `own` of an image without CRS has of a tile of the image's pyramid."""
    side = local_side(image.width, image.height, z)
    left, top = max(x * side, own.col), max(y * side, own.row)
    right, bottom = min((x + 1) * side, own.col1), min((y + 1) * side, own.row1)
    col0, row0, col1, row1 = (
        round((edge - start * side) / side * SIDE) for edge, start in ((left, x), (top, y), (right, x), (bottom, y))
    )
    if col1 <= col0 or row1 <= row0:
        return None
    box = (left - own.col, bottom - own.row, right - own.col, top - own.row)
    part = reader.part(box, indexes=bands, width=col1 - col0, height=row1 - row0, max_size=None)
    whole: Any = np.ma.masked_all((len(bands), SIDE, SIDE), part.array.dtype)  # type: ignore[no-untyped-call]
    whole[:, row0:row1, col0:col1] = part.array
    return ImageData(whole)


@lru_cache(maxsize=256)
def _limits(href: str, band: int) -> tuple[float, float]:
    """The 2nd and 98th percentile of a band, from afar."""
    with suppress(RioTilerError, DataError), gdal(href), Reader(href) as reader:
        values = reader.preview(indexes=(band,), max_size=256).array.compressed()
        if len(values):
            low, high = np.nanpercentile(values, [2, 98])
            return float(low), float(high)
    return 0.0, 1.0
