"""A run's map as web-map tiles of 256 px, read with rio-tiler: its classes and its imagery.

Maps with a CRS follow the Web Mercator grid; an image without one has its own pyramid (zoom 0 is the whole image).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from threading import Event
from typing import Any
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
from rayseg.io.pictures import bands_shown, nodata_of
from rayseg.io.rasters import is_number
from rayseg.io.sources import Source, crs_of, gdal, open_file

warnings.filterwarnings("ignore", category=NoOverviewWarning)  # once: filters belong to the process
SIDE = 256
MAX_READ = 1 << 24
"""Pixels of one band that a web tile reads from one file at most: about 0.3 s of decoding."""
Bounds = tuple[float, float, float, float]
Place = tuple[int, int, int]
"""(z, x, y) of a web tile."""


def lonlat_bounds(grid: Grid, window: Window) -> Bounds:
    """(west, south, east, north) of a window of a grid with a CRS."""
    left, bottom, right, top = grid.bounds(window)
    west, south, east, north = transform_bounds(crs_of(str(grid.crs)), "EPSG:4326", left, bottom, right, top)
    return west, south, east, north


def bounds_of_tile(z: int, x: int, y: int) -> Bounds:
    """(west, south, east, north) of a web tile."""
    bounds = mercantile.bounds(x, y, z)
    return bounds.west, bounds.south, bounds.east, bounds.north


def mercator(bounds_N4: np.ndarray) -> np.ndarray:
    """(west, south, east, north) in degrees as Web Mercator coordinates on a unit sphere (EPSG:3857 / 6,378,137 m)."""
    # The projection is infinite at the poles.
    lats_N2 = np.radians(np.clip(bounds_N4[:, [1, 3]], -89.9, 89.9))
    return np.concatenate([np.radians(bounds_N4[:, [0, 2]]), np.arcsinh(np.tan(lats_N2))], axis=1)[:, [0, 2, 1, 3]]


def classes_tile(
    tiles: Sequence[MappedTile], place: Place, *, image: Window | None = None, stop: Event | None = None
) -> np.ndarray:
    """Class values (256, 256) uint8 of a web tile, 255 where nothing is mapped.

    Args:
        tiles: those that can intersect it.
        place: of the web tile.
        image: for an image without CRS, the whole of it.
        stop: once set, no further file is opened.
    """
    classes_HW = np.full((SIDE, SIDE), NODATA, np.uint8)
    for tile in tiles:
        if stop and stop.is_set():
            break
        windows = (tile.tile.window, image) if image else None
        part = _read(tile.href, 1, place, windows=windows, nodata=NODATA)
        if part is not None:
            classes_HW = np.where(classes_HW == NODATA, part.array.filled(NODATA)[0], classes_HW)
    return classes_HW


def coarse_classes_tile(values_N: np.ndarray, boxes_N4: np.ndarray, extent: Bounds) -> np.ndarray:
    """Class values (256, 256) uint8 of a web tile, each box filled with one value; opens no file.

    Args:
        values_N: class value of each box, uint8.
        boxes_N4: (left, bottom, right, top) of each box.
        extent: of the web tile, in the same coordinates.
    """
    classes_HW = np.full((SIDE, SIDE), NODATA, np.uint8)
    left, bottom, right, top = extent
    cols_N2 = np.clip((boxes_N4[:, [0, 2]] - left) / (right - left), 0, 1) * SIDE
    rows_N2 = np.clip((top - boxes_N4[:, [3, 1]]) / (top - bottom), 0, 1) * SIDE
    # Neighbours share rounded edges, so that no gap shows; a box below a pixel still gets one.
    edges_N4 = np.rint(np.concatenate([rows_N2, cols_N2], axis=1)).astype(int)
    edges_N4[:, [0, 2]] = np.minimum(edges_N4[:, [0, 2]], SIDE - 1)
    edges_N4[:, [1, 3]] = np.maximum(edges_N4[:, [1, 3]], edges_N4[:, [0, 2]] + 1)
    for value, (row0, row1, col0, col1) in zip(values_N, edges_N4, strict=True):
        classes_HW[row0:row1, col0:col1] = value
    return classes_HW


def imagery_tile(
    sources: Sequence[Source],
    place: Place,
    *,
    image: Window | None = None,
    hosts: Sequence[str] = (),
    stop: Event | None = None,
) -> np.ndarray:
    """The imagery (256, 256, 4) uint8 of a web tile, transparent where there is none; first valid wins.

    Args:
        sources: those that can intersect it, in order.
        place: of the web tile.
        image: for an image without CRS, the whole of it.
        hosts: allowed for http(s); files on other hosts are skipped.
        stop: once set, no further file is opened.
    """
    image_HW4 = np.zeros((SIDE, SIDE, 4), np.uint8)
    for source in sources:
        bands = bands_shown(source)
        if stop and stop.is_set():
            break
        # A full tile needs no further file.
        if any(not allowed(href, hosts) for href, _ in bands) or image_HW4[..., 3].all():
            continue
        windows = (image, image) if image else None
        nodatas = [nodata_of(source, *band) for band in bands]
        parts = [_read(*band, place, windows=windows, nodata=value) for band, value in zip(bands, nodatas, strict=True)]
        layers = [part for part in parts if part is not None]
        if len(layers) < 3:
            continue
        # 1. where all three bands have data
        valid_HW = ~np.any([np.ma.getmaskarray(layer.array)[0] for layer in layers], axis=0)
        valid_HW &= np.all([is_number(layer.array.data[0]) for layer in layers], axis=0)
        # 2. their values as bytes, by the same limits in every web tile
        limits = [(0.0, 255.0) if source.dtype == "uint8" else _limits(href, band) for href, band in bands]
        rgb = []
        for layer, (low, high) in zip(layers, limits, strict=True):
            scaled_HW = (layer.array.data[0].astype(np.float64) - low) / max(high - low, 1e-12)
            rgb.append(np.rint(np.clip(np.nan_to_num(scaled_HW), 0, 1) * 255).astype(np.uint8))
        # 3. into what is still open
        new_HW = valid_HW & (image_HW4[..., 3] == 0)
        image_HW4[new_HW] = np.stack([*rgb, np.full((SIDE, SIDE), 255, np.uint8)], axis=-1)[new_HW]
    return image_HW4


def allowed(href: str, hosts: Sequence[str]) -> bool:
    """Whether the server may read an href of a run: local files, S3, and http(s) on `hosts`."""
    url = urlsplit(href)
    return url.scheme in {"", "file", "s3"} or (url.scheme in {"http", "https"} and url.hostname in hosts)


@contextmanager
def _open(href: str, *, local: bool, nodata: float | None) -> Iterator[Reader]:
    options: Any = {} if nodata is None else {"nodata": nodata}
    with gdal(href), ExitStack() as opened:
        # Without CRS rio-tiler reads pixels; `Reader` needs a place on Earth.
        if local:
            reader: Any = ImageReader(href, opened.enter_context(open_file(href)), options=options)
        else:
            reader = Reader(href, options=options)
        yield opened.enter_context(reader)


def _read(
    href: str, band: int, place: Place, *, windows: tuple[Window, Window] | None, nodata: float | None
) -> ImageData | None:
    """A file's part of a web tile; None without overlap, or if it cannot be read, so that one file never hides others.

    Args:
        href: of the file.
        band: its number.
        place: of the web tile.
        windows: for an image without CRS, the window of it that the file covers, and the whole.
        nodata: of the band.
    """
    z, x, y = place
    with suppress(RioTilerError, DataError), _open(href, local=windows is not None, nodata=nodata) as reader:
        if windows is None:
            if _too_coarse(reader, z):
                return None
            part: ImageData = reader.tile(x, y, z, indexes=(band,), tilesize=SIDE)
            return part
        # 1. the web tile in pixels of the image, cut by what the file covers
        own, image = windows
        side = max(image.width, image.height) / float(2**z)
        left, top = max(x * side, own.col), max(y * side, own.row)
        right, bottom = min((x + 1) * side, own.col1), min((y + 1) * side, own.row1)
        # 2. where that lies in the web tile
        col0, row0, col1, row1 = (
            round((edge - start * side) / side * SIDE) for edge, start in ((left, x), (top, y), (right, x), (bottom, y))
        )
        if col1 <= col0 or row1 <= row0:
            return None
        box = (left - own.col, bottom - own.row, right - own.col, top - own.row)
        part = reader.part(box, indexes=(band,), width=col1 - col0, height=row1 - row0, max_size=None)
        whole: Any = np.ma.masked_all((1, SIDE, SIDE), part.array.dtype)  # type: ignore[no-untyped-call]
        whole[:, row0:row1, col0:col1] = part.array
        return ImageData(whole)
    return None


def _too_coarse(reader: Reader, z: int) -> bool:
    """Whether a web tile at zoom z would decimate more than `MAX_READ` pixels of a file without suitable overviews."""
    dataset: Any = reader.dataset
    smallest = max(dataset.overviews(1), default=1)  # decimation of the smallest overview
    if dataset.width * dataset.height / smallest**2 <= MAX_READ:
        return False
    # At zoom `maxzoom` a pixel of the web tile is one of the file; each zoom below doubles the decimation.
    decimation = 2.0 ** (reader.maxzoom - z)
    return bool((SIDE * decimation / smallest) ** 2 > MAX_READ)


@lru_cache(maxsize=256)
def _limits(href: str, band: int) -> tuple[float, float]:
    """The 2nd and 98th percentile of a band, from an overview of 256 px."""
    with suppress(RioTilerError, DataError), gdal(href), Reader(href) as reader:
        # The same percentiles for all web tiles of a file, so that no seams show.
        values = reader.preview(indexes=(band,), max_size=256).array.compressed()
        values = values[is_number(values)]
        if len(values):
            low, high = np.percentile(values, [2, 98])
            return float(low), float(high)
    return 0.0, 1.0
