"""A run's map as web-map tiles of 256 px, read with rio-tiler: its classes and its imagery.

Maps with a CRS follow the Web Mercator grid; an image without one has its own pyramid (zoom 0 is the whole image).
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import mercantile
import numpy as np
from rasterio.warp import transform_bounds
from rasterio.windows import Window as RasterWindow
from rio_tiler.errors import NoOverviewWarning, RioTilerError
from rio_tiler.io import ImageReader, Reader
from rio_tiler.models import ImageData

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.geo.lonlat import LONLAT, transformer, turn_of
from rayseg.io.maps import MappedTile
from rayseg.io.pictures import bands_shown, nodata_of
from rayseg.io.rasters import is_number
from rayseg.io.sources import Source, crs_of, gdal, open_file
from rayseg.store import is_local

warnings.filterwarnings("ignore", category=NoOverviewWarning)  # once: filters belong to the process
SIDE = 256
_BLOCK = 512  # px, as in the files
_BLOCKS = 512  # in memory: 128 MiB at most
_MOSAIC = 1 << 26  # px of a mosaic at most
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
    tiles: Sequence[MappedTile],
    place: Place,
    *,
    image: Window | None = None,
    stop: Event | None = None,
    version: str = "",
) -> np.ndarray:
    """Class values (256, 256) uint8 of a web tile, those at its pixels' centres; 255 where nothing is mapped.

    Args:
        tiles: those that can intersect it.
        place: of the web tile.
        image: for an image without CRS, the whole of it.
        stop: once set, no further file is opened.
        version: of the run; blocks of its files are kept in memory under it.
    """
    classes_HW = np.full((SIDE, SIDE), NODATA, np.uint8)
    positions = {grid: _positions(grid, place, image) for grid in dict.fromkeys(tile.tile.grid for tile in tiles)}
    for tile in tiles:
        if stop and stop.is_set():
            break
        window = tile.tile.window
        rows_HW, cols_HW, step = positions[tile.tile.grid]
        rows_HW, cols_HW = rows_HW - window.row, _columns(cols_HW, tile.tile.grid, window)
        # Pixels that an earlier tile has filled stay: the first tile wins.
        open_HW = (classes_HW == NODATA) & (rows_HW >= 0) & (rows_HW < window.height)
        open_HW &= (cols_HW >= 0) & (cols_HW < window.width)
        if open_HW.any():
            rows_N, cols_N = (rows_HW[open_HW] // step).astype(int), (cols_HW[open_HW] // step).astype(int)
            with suppress(DataError):  # one damaged file never hides others
                classes_HW[open_HW] = _values(tile.href, version, step, rows_N, cols_N)
    return classes_HW


def _positions(grid: Grid, place: Place, image: Window | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows, columns) of a grid, each (256, 256), at the centres of a web tile's pixels, and their step.

    The step is the power of two below the number of pixels of the grid in one of the web tile. Between 17 x 17 places
    that are projected the rest is interpolated: the curvature of a projection over 16 px is far below a pixel.
    """
    z, x, y = place
    if image:
        scale = max(image.width, image.height) / 2**z / SIDE
        at = (np.arange(SIDE) + 0.5) * scale
        rows_HW, cols_HW = np.meshgrid(y * SIDE * scale + at, x * SIDE * scale + at, indexing="ij")
    else:
        # 1. control points: https://wiki.openstreetmap.org/wiki/Slippy_map_tilenames
        at = np.linspace(0, 1, 17)
        lons, lats = np.meshgrid(
            (x + at) / 2**z * 360 - 180, np.degrees(np.arctan(np.sinh(np.pi - (y + at) / 2**z * 2 * np.pi)))
        )
        points = np.array(transformer(LONLAT, str(grid.crs)).transform(lons, lats))
        points[~np.isfinite(points)] = np.nan  # outside the projection
        (x0, y0), (rx, ry) = grid.origin, grid.resolution
        # 2. bilinear between them
        whole, part = np.divmod((np.arange(SIDE) + 0.5) / SIDE * 16, 1)
        low = whole.astype(int)
        down = points[:, low] * (1 - part)[:, None] + points[:, low + 1] * part[:, None]
        x_HW, y_HW = down[:, :, low] * (1 - part) + down[:, :, low + 1] * part
        rows_HW, cols_HW = (y0 - y_HW) / ry, (x_HW - x0) / rx
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN
        size = np.nanmedian(np.hypot(np.diff(rows_HW, axis=1), np.diff(cols_HW, axis=1)))
    return rows_HW, cols_HW, int(2 ** max(0, np.floor(np.log2(size)))) if size > 0 else 1


def _columns(cols: np.ndarray, grid: Grid, window: Window) -> np.ndarray:
    """Columns of a grid counted from a window's first, on the window's turn around the Earth."""
    counted = cols - window.col
    turn = turn_of(grid.crs) if grid.crs else None
    return counted % (360 * turn[1] / grid.resolution[0]) if turn else counted


def _values(href: str, version: str, step: int, rows_N: np.ndarray, cols_N: np.ndarray) -> np.ndarray:
    """Values of a class map at rows and columns that are counted in steps."""
    values_N = np.empty(len(rows_N), np.uint8)
    blocks_N = (rows_N // _BLOCK << 32) + cols_N // _BLOCK
    for block in np.unique(blocks_N):
        at = blocks_N == block
        row, col = int(block) >> 32, int(block) & 0xFFFFFFFF
        block_HW = _block(href, version, step, row, col)
        values_N[at] = block_HW[rows_N[at] - row * _BLOCK, cols_N[at] - col * _BLOCK]
    return values_N


@lru_cache(maxsize=_BLOCKS)
def _block(href: str, _version: str, step: int, row: int, col: int) -> np.ndarray:
    """A block of a class map, every `step` pixels of it; neighbouring web tiles share it."""
    side = _BLOCK * step
    with gdal(href), open_file(href) as dataset:
        height, width = min(side, dataset.height - row * side), min(side, dataset.width - col * side)
        window = ((row * side, row * side + height), (col * side, col * side + width))
        shape = (-(-height // step), -(-width // step))
        block_HW: np.ndarray = dataset.read(1, window=window, out_shape=shape)
    return block_HW


@dataclass(frozen=True, eq=False)
class Mosaic:
    """The class maps of a run in one array per grid, every `step` pixels of them.

    Attributes:
        step: pixels of the map along each side of one of the mosaic.
        parts: grid -> (window of the grid, values).
    """

    step: int
    parts: dict[Grid, tuple[Window, np.ndarray]]

    @classmethod
    def of(cls, tiles: Sequence[MappedTile]) -> "Mosaic":
        """Read every tile once, from its overviews: about 3 ms each.

        Raises:
            DataError: a tile cannot be read.
        """
        windows: dict[Grid, Window] = {}
        for tile in tiles:
            own = tile.tile.window
            windows[tile.tile.grid] = windows.get(tile.tile.grid, own).union(own)
        pixels = sum(window.width * window.height for window in windows.values())
        step = 1 << max(0, math.ceil(math.log2(pixels / _MOSAIC) / 2))
        shapes = {grid: (-(-window.height // step), -(-window.width // step)) for grid, window in windows.items()}
        mosaic = cls(step, {grid: (windows[grid], np.full(shapes[grid], NODATA, np.uint8)) for grid in windows})
        # Distant files are waited for; local ones take the time of a processor, of which clients need some.
        local = all(is_local(tile.href) for tile in tiles[:1])
        with ThreadPoolExecutor(1 if local else 8) as threads:
            list(threads.map(mosaic._add, tiles))
        return mosaic

    def _add(self, tile: MappedTile) -> None:
        whole, values_HW = self.parts[tile.tile.grid]
        own = tile.tile.window
        top, left = (own.row - whole.row) // self.step, (own.col - whole.col) // self.step
        bottom, right = -(-(own.row1 - whole.row) // self.step), -(-(own.col1 - whole.col) // self.step)
        with gdal(tile.href), open_file(tile.href) as dataset:
            part_HW = dataset.read(1, out_shape=(bottom - top, right - left))
            open_HW = values_HW[top:bottom, left:right]  # a view; tiles that are cut can share a pixel
            np.copyto(open_HW, part_HW, where=open_HW == NODATA)

    def tile(self, place: Place, *, images: Sequence[Grid] = (), image: Window | None = None) -> np.ndarray:
        """Class values (256, 256) of a web tile; of an image without CRS, with its grids and the whole of it."""
        classes_HW = np.full((SIDE, SIDE), NODATA, np.uint8)
        for grid in images if image else [grid for grid in self.parts if grid.crs]:
            whole, values_HW = self.parts[grid]
            rows_HW, cols_HW, _ = _positions(grid, place, image)
            rows_HW, cols_HW = rows_HW - whole.row, _columns(cols_HW, grid, whole)
            open_HW = (classes_HW == NODATA) & (rows_HW >= 0) & (rows_HW < whole.height)
            open_HW &= (cols_HW >= 0) & (cols_HW < whole.width)
            rows_N, cols_N = (rows_HW[open_HW] // self.step).astype(int), (cols_HW[open_HW] // self.step).astype(int)
            classes_HW[open_HW] = values_HW[rows_N, cols_N]
        return classes_HW

    def suffices(self, place: Place, grid: Grid, image: Window | None) -> bool:
        """Whether a web tile over a grid needs no finer pixels."""
        return self.step == 1 or _positions(grid, place, image)[2] >= self.step


def scores_tile(
    tiles: Sequence[MappedTile], place: Place, *, image: Window | None = None, stop: Event | None = None
) -> np.ndarray:
    """Scores (256, 256) uint8 of a web tile, of several bands the highest; 255 where nothing is mapped.

    Args:
        tiles: those that can intersect it.
        place: of the web tile.
        image: for an image without CRS, the whole of it.
        stop: once set, no further file is opened.
    """
    scores_HW = np.full((SIDE, SIDE), NODATA, np.uint8)
    for tile in tiles:
        if stop and stop.is_set():
            break
        href = scores_of(tile)
        bands = list(range(1, _bands_in(href) + 1))
        windows = (tile.tile.window, image) if image else None
        part = _read(href, bands, place, windows=windows, nodata=NODATA) if bands else None
        if part is not None:
            highest_HW = np.ma.max(part.array, axis=0).filled(NODATA)
            scores_HW = np.where(scores_HW == NODATA, highest_HW, scores_HW)
    return scores_HW


def scores_of(tile: MappedTile) -> str:
    """The raster with the scores of a tile."""
    return tile.href.replace("classes.tif", "scores.tif")


def has_scores(tile: MappedTile) -> bool:
    """Whether the run kept the scores of a tile."""
    return _bands_in(scores_of(tile)) > 0


def _bands_in(href: str) -> int:
    """Bands of a file; 0 if there is none: a run may leave scores out."""
    with suppress(DataError):
        return _band_count(href)
    return 0


@lru_cache(maxsize=4096)  # of files that could be read: a store that is busy now answers later
def _band_count(href: str) -> int:
    with gdal(href), open_file(href) as dataset:
        return int(dataset.count)


def values_at(tile: MappedTile, x: float, y: float) -> tuple[int, dict[str, int]] | None:
    """(class, band -> score) of the pixel of a tile at a place; None outside of it, and where it has no class.

    Args:
        tile: of the map.
        x: longitude; of an image without CRS the column.
        y: latitude; of an image without CRS the row.

    Raises:
        DataError: its classes cannot be read. Scores may be missing.
    """
    grid, window = tile.tile.grid, tile.tile.window
    if grid.crs:
        col, row = ~grid.transform(window) * transformer(LONLAT, grid.crs).transform(x, y)
        col = float(_columns(np.array(col + window.col), grid, window))
    else:
        col, row = x - window.col, y - window.row
    if not (0 <= col < window.width and 0 <= row < window.height):
        return None
    # One pixel of each file: a click needs no web tile.
    pixel = RasterWindow(int(col), int(row), 1, 1)
    values = {}
    for href in (tile.href, scores_of(tile)):
        # A map may have no scores, but always has classes.
        with suppress(*([] if href == tile.href else [DataError])), gdal(href), open_file(href) as dataset:
            names = [name or str(at) for at, name in enumerate(dataset.descriptions, 1)]
            values[href] = dict(zip(names, dataset.read(window=pixel)[:, 0, 0].tolist(), strict=True))
    found = next(iter(values.get(tile.href, {}).values()), NODATA)
    scores = {name: score for name, score in values.get(scores_of(tile), {}).items() if score != NODATA}
    return None if found == NODATA else (found, scores)


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
        layers = _layers(source, bands, place, windows)
        if layers is None:
            continue
        # 1. where all three bands have data
        valid_HW = ~np.any([np.ma.getmaskarray(layer) for layer in layers], axis=0)
        valid_HW &= np.all([is_number(layer.data) for layer in layers], axis=0)
        # 2. their values as bytes, by the same limits in every web tile
        limits = [(0.0, 255.0) if source.dtype == "uint8" else _limits(href, band) for href, band in bands]
        rgb = []
        for layer, (low, high) in zip(layers, limits, strict=True):
            scaled_HW = (layer.data.astype(np.float64) - low) / max(high - low, 1e-12)
            rgb.append(np.rint(np.clip(np.nan_to_num(scaled_HW), 0, 1) * 255).astype(np.uint8))
        # 3. into what is still open
        new_HW = valid_HW & (image_HW4[..., 3] == 0)
        image_HW4[new_HW] = np.stack([*rgb, np.full((SIDE, SIDE), 255, np.uint8)], axis=-1)[new_HW]
    return image_HW4


def _layers(
    source: Source, bands: Sequence[tuple[str, int]], place: Place, windows: tuple[Window, Window] | None
) -> list[np.ma.MaskedArray[Any, Any]] | None:
    """The three bands (256, 256) of a source that are shown; None if it has no part of the web tile."""
    nodatas = [nodata_of(source, *band) for band in bands]
    hrefs = {href for href, _ in bands}
    if len(hrefs) == 1 and len(set(map(repr, nodatas))) == 1:  # repr, because NaN differs from itself
        # One read for all three: opening and warping cost more than the pixels.
        part = _read(hrefs.pop(), [band for _, band in bands], place, windows=windows, nodata=nodatas[0])
        return None if part is None else list(part.array)
    parts = [
        _read(href, [band], place, windows=windows, nodata=value)
        for (href, band), value in zip(bands, nodatas, strict=True)
    ]
    return None if any(part is None for part in parts) else [part.array[0] for part in parts if part]


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
    href: str, bands: Sequence[int], place: Place, *, windows: tuple[Window, Window] | None, nodata: float | None
) -> ImageData | None:
    """A file's part of a web tile; None without overlap, or if it cannot be read, so that one file never hides others.

    Args:
        href: of the file.
        bands: their numbers.
        place: of the web tile.
        windows: for an image without CRS, the window of it that the file covers, and the whole.
        nodata: of the bands.
    """
    z, x, y = place
    with suppress(RioTilerError, DataError), _open(href, local=windows is not None, nodata=nodata) as reader:
        if windows is None:
            if _too_coarse(reader, z):
                return None
            part: ImageData = reader.tile(x, y, z, indexes=bands, tilesize=SIDE)
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
        part = reader.part(box, indexes=bands, width=col1 - col0, height=row1 - row0, max_size=None)
        whole: Any = np.ma.masked_all((len(bands), SIDE, SIDE), part.array.dtype)  # type: ignore[no-untyped-call]
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
