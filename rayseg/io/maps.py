"""The class map of a run: its tiles, their area on the ground, and the changes of class at their borders."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import Geod, Transformer
from rasterio.windows import Window as FileWindow

from rayseg.engine.ledger import Ledger, Record, with_fact
from rayseg.engine.manifest import Manifest, read_rows
from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.geo.lonlat import up_to_poles
from rayseg.io.sources import Source, from_json, gdal, open_file
from rayseg.store import StorePath, absolute, upath

_GEOD = Geod(ellps="WGS84")
_STRIPS = 64  # of a tile wider than a degree; between their middles the area of pixels is interpolated


@dataclass(frozen=True)
class MappedTile:
    """A tile of a run that has a class map.

    Attributes:
        tile: where it is.
        record: its record in the ledger.
        href: of its classes.tif.
        sources: the imagery used, first valid wins.
    """

    tile: Tile
    record: Record
    href: str
    sources: tuple[Source, ...]

    @property
    def counts(self) -> dict[int, int]:
        """Pixels of every class in it."""
        return {int(value): int(count) for value, count in self.record.facts["counts"].items()}

    @property
    def areas(self) -> dict[int, float] | None:
        """Ground area of every class in it in square metres; None without CRS.

        Earlier runs stored pixels only: there a pixel counts with the mean area of the tile's pixels.
        """
        if "areas" in self.record.facts:
            return {int(value): float(area) for value, area in self.record.facts["areas"].items()}
        pixel_m2 = pixel_area_m2(self.tile)
        return None if pixel_m2 is None else {value: count * pixel_m2 for value, count in self.counts.items()}

    def source(self, name: str, bands: Sequence[str]) -> Source:
        """A raster of the tile (`classes`, `scores`, `sieved`) as a source on the tile's grid, with names of bands."""
        return source_on(self.tile, str(upath(self.href).parent / f"{name}.tif"), bands)


def source_on(tile: Tile, href: str, bands: Sequence[str]) -> Source:
    """A raster that covers a tile as a source on the tile's grid."""
    grid, window = tile.grid, tile.window
    # On an image's own grid a file's place is that of a transform with rows to the south: see `part_of_image`.
    transform = tuple(grid.transform(window))[:6] if grid.crs else (1, 0, window.col, 0, -1, -window.row)
    assets = ((href, tuple(bands)),)
    return Source(
        grid.image or tile.id, assets, grid.crs, transform, window.height, window.width, "uint8", nodata=NODATA
    )


def mapped_tiles(root: StorePath, step: str = "predict") -> list[MappedTile]:
    """The tiles of a run's step that have a class map, in the order of its manifest; every pipeline calls it `predict`.

    Raises:
        DataError: the run has no such step.
    """
    rows, records = _manifest(root, step), Ledger(str(upath(root) / "steps" / step / "ledger")).read()
    tiles = upath(root) / "tiles"
    return [
        MappedTile(Tile.from_row(row), record, str(tiles / row["id"] / "classes.tif"), tuple(from_json(row["sources"])))
        for row, record in with_fact(rows, records, "counts")
    ]


def planned_tiles(root: StorePath, step: str = "predict") -> list[tuple[Tile, tuple[Source, ...]]]:
    """Every tile of a run's step and its imagery, whatever its status.

    Raises:
        DataError: the run has no such step.
    """
    return [(Tile.from_row(row), tuple(from_json(row["sources"]))) for row in _manifest(root, step)]


def _manifest(root: StorePath, step: str) -> Manifest:
    path = upath(root) / "steps" / step / "manifest.parquet"
    if not path.exists():
        raise DataError(f"{root} has no tiles of a step {step!r}: {path.name} is missing; run that step first")
    return read_rows(path, root=absolute(str(root)).rstrip("/"))


def read_tile(tile: MappedTile, name: str) -> NDArray[np.uint8]:
    """A raster of a tile, (bands, height, width) uint8.

    Args:
        tile: the tile.
        name: classes or scores.

    Raises:
        DataError: the file cannot be read.
    """
    href = str(upath(tile.href).parent / f"{name}.tif")
    with gdal(href), open_file(href) as dataset:
        return np.asarray(dataset.read(), np.uint8)


def bands_of(tile: MappedTile, name: str) -> tuple[str, ...]:
    """Names of the bands of a raster of a tile: classes, scores or sieved."""
    href = str(upath(tile.href).parent / f"{name}.tif")
    with gdal(href), open_file(href) as dataset:
        return tuple(text or f"band{index}" for index, text in enumerate(dataset.descriptions, 1))


def pixel_lonlat(tile: Tile, row: int, col: int) -> tuple[float, float] | None:
    """(longitude, latitude) of a pixel's centre, counted inside the tile; None without CRS."""
    if tile.grid.crs is None:
        return None
    x, y = tile.grid.transform(tile.window) @ (col + 0.5, row + 0.5)
    lon, lat = _to_lonlat(tile.grid.crs).transform(x, y)
    return float(lon), float(lat)


def pixel_area_m2(tile: Tile) -> float | None:
    """Mean ground area of the tile's pixels on WGS 84; None without CRS."""
    areas_H = row_areas_m2(tile)
    return None if areas_H is None else float(areas_H.mean())


def row_areas_m2(tile: Tile) -> NDArray[np.float64] | None:
    """Ground area of the pixels of each row (height,), geodesic on WGS 84; None without CRS.

    In degrees and in Web Mercator rows of one tile differ: shares of classes are shares of these areas.
    """
    if tile.grid.crs is None:
        return None
    affine, height, width = tile.grid.transform(tile.window), tile.window.height, tile.window.width
    corners = _to_lonlat(tile.grid.crs).transform(
        affine.c + affine.a * width * np.array([0, 1, 0, 1]), affine.f + affine.e * height * np.array([0, 0, 1, 1])
    )
    strips_at_most, points = (4, 9) if all(np.ptp(part) < 1 for part in corners) else (_STRIPS, 33)
    edges = np.linspace(0.0, height, min(height, strips_at_most) + 1)
    # 1. outlines of the strips in halves: one round the globe would enclose a pole
    steps = np.linspace(0.0, 0.5, points)
    across = np.concatenate([[*steps, *steps[::-1]], [*(0.5 + steps), *(1.0 - steps)]]) * width
    down = np.stack([edges[:-1], edges[1:]], axis=1).repeat(len(steps), axis=1)
    cols, rows = np.broadcast_arrays(across, np.concatenate([down, down], axis=1))
    xs, ys = affine.c + affine.a * cols, affine.f + affine.e * rows
    lons, lats = (part.reshape(-1, 2, 2 * len(steps)) for part in _to_lonlat(tile.grid.crs).transform(xs, ys))
    # 2. their areas, 0 off the Earth's disk
    halves = [
        [_GEOD.polygon_area_perimeter(*outline)[0] for outline in zip(*strip, strict=True)]
        for strip in zip(lons, up_to_poles(lats), strict=True)
    ]
    strips = np.nan_to_num(np.abs(halves)).sum(axis=1) / (np.diff(edges) * width)
    # 3. rows by interpolation, with the same sum
    areas_H = np.interp(np.arange(height) + 0.5, (edges[:-1] + edges[1:]) / 2, strips)
    total = float(np.dot(strips, np.diff(edges)))
    return np.asarray(areas_H * (total / (areas_H.sum() or 1.0)), np.float64)


def class_areas(tile: Tile, classes_HW: NDArray[np.uint8]) -> dict[int, float] | None:
    """Ground area in square metres of every class of a tile's map without nodata; None without CRS."""
    areas_H = row_areas_m2(tile)
    if areas_H is None:
        return None
    values = (int(value) for value in np.unique(classes_HW) if value != NODATA)
    return {value: float((classes_HW == value).sum(axis=1) @ areas_H) for value in values}


def width_m(grid: Grid, window: Window) -> float | None:
    """Length on the ground of the window's middle row; None without CRS."""
    if grid.crs is None:
        return None
    left, bottom, right, top = grid.bounds(window)
    xs = np.linspace(left, right, 9)
    lons, lats = _to_lonlat(grid.crs).transform(xs, np.full(9, (bottom + top) / 2))
    return float(_GEOD.line_length(lons, lats))


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True)


# -- seams -------------------------------------------------------------------------------------------------------------


def seam_score(tiles: Sequence[MappedTile], *, most: int = 200) -> dict[str, Any] | None:
    """How often the class changes from a tile to the next, against how often inside tiles; 1 means no seams.

    Args:
        tiles: of one run.
        most: borders that are read, spread evenly over all borders.

    Returns:
        borders (read), pairs and changes across them, the rates `across` and `inside` (changes per pair of
        neighbouring pixels that both have data), and their `ratio` (None where nothing changes inside); None if no
        two tiles touch with data.
    """
    # 1. some of the borders, as all would be a request per tile
    borders = _borders(tiles)
    chosen = (
        [borders[at] for at in sorted({round(p) for p in np.linspace(0, len(borders) - 1, most)})] if borders else []
    )
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(_across, chosen))
    pairs, changes = sum(pair for pair, _ in counts), sum(change for _, change in counts)
    # 2. the rate inside tiles, which the ledger has
    inside = sum(tile.record.facts["pairs"] for tile in tiles)
    if not pairs or not inside:
        return None
    rate = sum(tile.record.facts["changes"] for tile in tiles) / inside
    across = changes / pairs
    ratio = across / rate if rate else None
    return {
        "borders": len(chosen),
        "pairs": pairs,
        "changes": changes,
        "across": across,
        "inside": rate,
        "ratio": ratio,
    }


_Strip = tuple[str, FileWindow]


def _borders(tiles: Iterable[MappedTile]) -> list[tuple[_Strip, _Strip]]:
    """The last column (row) of every tile and the first of its right (lower) neighbour."""
    # Neighbours by the corner that they would have: no search over all pairs.
    corners = {(t.tile.grid, t.tile.window.row, t.tile.window.col): t for t in tiles}
    borders = []
    for (grid, row, col), mapped in corners.items():
        window = mapped.tile.window
        if right := corners.get((grid, row, window.col1)):
            height = min(window.height, right.tile.window.height)
            last = FileWindow(window.width - 1, 0, 1, height)
            borders.append(((mapped.href, last), (right.href, FileWindow(0, 0, 1, height))))
        if below := corners.get((grid, window.row1, col)):
            width = min(window.width, below.tile.window.width)
            last = FileWindow(0, window.height - 1, width, 1)
            borders.append(((mapped.href, last), (below.href, FileWindow(0, 0, width, 1))))
    return borders


def _across(border: tuple[_Strip, _Strip]) -> tuple[int, int]:
    """(pairs with data, those of two classes) over a border."""
    strips = []
    for href, window in border:
        with gdal(href), open_file(href) as dataset:
            strips.append(dataset.read(1, window=window).ravel())
    here, there = strips
    valid = (here != NODATA) & (there != NODATA)
    return int(valid.sum()), int((valid & (here != there)).sum())
