"""The class map of a run: its tiles, their area on the ground, and the changes of class at their borders."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, overload

import numpy as np
import pyarrow as pa
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Geod, Proj, Transformer
from rasterio.windows import Window as FileWindow

from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.manifest import PART, Manifest, Row, read_rows
from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.geo.lonlat import LONLAT, geographic, lobes_of, to_lonlat, transformer, turn_of
from rayseg.geo.region import pixels_on_earth
from rayseg.io.remote import patient
from rayseg.io.sources import Source, from_json, gdal, open_file
from rayseg.store import StorePath, absolute, upath
from rayseg.vision.color import ClassTable

_GEOD = Geod(ellps="WGS84")
_KNOTS = 128  # along each side of a tile wider than a degree; between them the area of pixels is interpolated
_DEEP = 16  # px from the edge of the Earth at which areas can be interpolated
_SAME = 1e-4  # relative difference of areas along a row that does not count
_PLACE = ("crs", "grid_image", "xres", "yres", "x0", "y0", "divided")  # columns of a manifest that name a grid
POLE = 90 - 1e-6  # degrees: at the pole itself projections have no scale


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


class MappedTiles(Sequence[MappedTile]):
    """Tiles as a table, which become objects one by one: those of a planet do not fit into memory.

    Args:
        root: prefix of the run.
        rows: those of the manifest that have a map.
        records: JSON of each row's record.
    """

    def __init__(self, root: str, rows: Manifest, records: pa.ChunkedArray) -> None:
        self.root, self.rows, self.records = root, rows, records
        self._grids: dict[Grid, Grid] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> MappedTile: ...
    @overload
    def __getitem__(self, at: slice) -> list[MappedTile]: ...
    def __getitem__(self, at: int | slice) -> MappedTile | list[MappedTile]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        return self._tile(self.rows[at], self.records[range(len(self))[at]].as_py())

    def __iter__(self) -> Iterator[MappedTile]:
        for start in range(0, len(self), PART):
            records = self.records.slice(start, PART).to_pylist()
            yield from map(self._tile, self.rows[start : start + PART], records)

    def by_grid(self) -> dict[Grid, "MappedTiles"]:
        """The tiles of each grid, in the order of their first tiles."""
        names = [name for name in _PLACE if name in self.rows.table.column_names]
        columns = zip(*(self.rows.table[name].to_pylist() for name in names), strict=True)
        indices: dict[tuple[Any, ...], list[int]] = {}
        for index, place in enumerate(columns):
            indices.setdefault(place, []).append(index)
        parts = [pa.array(some) for some in indices.values()]
        found = [MappedTiles(self.root, Manifest(self.rows.table.take(at)), self.records.take(at)) for at in parts]
        return {some[0].tile.grid: some for some in found}

    def _tile(self, row: Row, record: str) -> MappedTile:
        tile = Tile.from_row(row)
        grid = self._grids.setdefault(tile.grid, tile.grid)  # one object for all tiles of a grid
        href = f"{self.root}/tiles/{tile.id}/classes.tif"
        return MappedTile(
            Tile(tile.id, grid, tile.window), Record(tile.id, **json.loads(record)), href, _sources(row["sources"])
        )


def by_grid(tiles: Sequence[MappedTile]) -> Mapping[Grid, Sequence[MappedTile]]:
    """The tiles of each grid, in the order of their first tiles."""
    if isinstance(tiles, MappedTiles):
        return tiles.by_grid()
    found: dict[Grid, list[MappedTile]] = {}
    for tile in tiles:
        found.setdefault(tile.tile.grid, []).append(tile)
    return found


@lru_cache(maxsize=1024)
def _sources(text: str) -> tuple[Source, ...]:
    return tuple(from_json(text))


def mapped_tiles(root: StorePath, step: str = "predict") -> MappedTiles:
    """The tiles of a run's step that have a class map, in the order of its manifest; every pipeline calls it `predict`.

    Their records have neither their files nor their item, which only publishing needs.

    Raises:
        DataError: the run has no such step.
    """
    parts, records = [], []
    for rows, found in recorded_rows(root, step):
        kept = [record if record and "counts" in record.facts else None for record in found]
        parts.append(rows.filter(pa.array([record is not None for record in kept], pa.bool_())))
        records.append(pa.array([_plain(record) for record in kept if record], pa.large_string()))
    table = Manifest(pa.concat_tables(parts)) if parts else _manifest(root, step)
    return MappedTiles(str(upath(root)), table, pa.chunked_array(records, pa.large_string()))


def _plain(record: Record) -> str:
    facts = {name: fact for name, fact in record.facts.items() if name != "item"}
    kept = {"status": record.status, "reason": record.reason, "attempt": record.attempt, "seconds": record.seconds}
    return json.dumps(kept | {"facts": facts})


def recorded_rows(root: StorePath, step: str = "predict") -> Iterator[tuple[pa.Table, list[Record | None]]]:
    """The rows of a run's step, a part of the manifest at a time, and the record of each that has one.

    Raises:
        DataError: the run has no such step.
    """
    rows = _manifest(root, step)
    # Parts of the manifest were written one after the other, so their records are in few files.
    parts = [rows.table.slice(start, PART) for start in range(0, len(rows), PART)]
    ledger = Ledger(str(upath(root) / "steps" / step / "ledger"))
    for part, records in zip(parts, ledger.records(part["id"].to_pylist() for part in parts), strict=True):
        yield part, [records.get(name) for name in part["id"].to_pylist()]


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


@patient
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


def top_scores(classes_HW: NDArray[np.uint8], scores_CHW: NDArray[np.uint8], table: ClassTable) -> NDArray[np.float64]:
    """Probability of the class that each pixel has, (height, width); meaningless where there is no class.

    Args:
        classes_HW: the map, 255 for nodata.
        scores_CHW: probability x 254: a band per class; or one, of class 1 of a binary map, else of the pixel's class.
        table: the classes.
    """
    probabilities_CHW = scores_CHW / 254
    if len(scores_CHW) == 1 and table.binary:
        return np.asarray(np.where(classes_HW == 1, probabilities_CHW[0], 1 - probabilities_CHW[0]), np.float64)
    if len(scores_CHW) == 1:
        return np.asarray(probabilities_CHW[0], np.float64)
    bands = np.zeros(NODATA + 1, np.int64)  # nodata has no band
    bands[list(table.values)] = np.arange(len(scores_CHW))
    return np.asarray(np.take_along_axis(probabilities_CHW, bands[classes_HW][None], 0)[0], np.float64)


def class_probability(
    value: int, classes_HW: NDArray[np.uint8], scores_CHW: NDArray[np.uint8], table: ClassTable
) -> NDArray[np.float64]:
    """Probability of a class at every pixel, (height, width); arguments as in `top_scores`.

    Where the map keeps the score of each pixel's own class alone, the other classes share the rest evenly.
    """
    if len(scores_CHW) == len(table.classes):
        return np.asarray(scores_CHW[table.values.index(value)] / 254, np.float64)
    top_HW = top_scores(classes_HW, scores_CHW, table)
    return np.asarray(np.where(classes_HW == value, top_HW, (1 - top_HW) / (len(table.classes) - 1)), np.float64)


@patient
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


def pixel_metres(source: Source) -> float | None:
    """Side of a pixel in the middle of an image on the ground; None without CRS."""
    if not source.crs:
        return None
    affine = Affine(*source.transform[:6])
    corners = [affine * (source.width / 2 + step, source.height / 2 + step) for step in (0, 1)]
    lons, lats = _to_lonlat(source.crs).transform(*zip(*corners, strict=True))
    _, _, diagonal = _GEOD.inv(lons[0], lats[0], lons[1], lats[1])
    return float(diagonal / math.sqrt(2))


def mean_metres(sources: Sequence[Source]) -> float | None:
    """Median of `pixel_metres` of some of the images; None if one has no CRS."""
    chosen = sources[:: max(1, len(sources) // 16)]
    sizes = [pixel_metres(source) for source in chosen]
    known = [size for size in sizes if size]
    return float(np.median(known)) if known and len(known) == len(sizes) else None


def pixel_area_m2(tile: Tile) -> float | None:
    """Mean ground area of the tile's pixels on WGS 84; None without CRS."""
    areas_HW = pixel_areas_m2(tile)
    return None if areas_HW is None else float(areas_HW.mean())


def pixel_areas_m2(tile: Tile) -> NDArray[np.float64] | None:
    """Ground area of every pixel (height, width) on WGS 84; None without CRS.

    Pixels of one tile differ in degrees, in Web Mercator and around the poles: shares of classes are shares of these
    areas. In degrees and on cylinders they are exact, elsewhere interpolated between places at which they are.
    """
    grid, (height, width) = tile.grid, (tile.window.height, tile.window.width)
    if grid.crs is None:
        return None
    affine = grid.transform(tile.window)
    turn = (0.0, 1.0) if geographic(grid.crs) else turn_of(grid.crs)
    if turn:  # rows follow parallels, and the scale that PROJ states for Web Mercator is that of a sphere
        lats = affine.f + affine.e * np.arange(height + 1)
        if not geographic(grid.crs):
            lats = _row_lats(grid.crs, affine.c + affine.a * width / 2, lats)
        areas_H = np.abs(np.diff(_area_to(np.clip(lats, -90, 90)))) * np.deg2rad(affine.a / turn[1])
        return np.broadcast_to(areas_H[:, None], (height, width))
    # 1. areas at the knots: those on the plane by the scale of the projection there
    corners = _to_lonlat(grid.crs).transform(
        affine.c + affine.a * width * np.array([0, 1, 0, 1]), affine.f + affine.e * height * np.array([0, 0, 1, 1])
    )
    deep_HW = pixels_on_earth(grid, tile.window, within=_DEEP)
    knots = 8 if np.isfinite(corners).all() and all(np.ptp(part) < 1 for part in corners) else _KNOTS
    knots *= 1 if deep_HW is None else 4
    rows, cols = (np.linspace(0.0, side, min(side, knots) + 1) for side in (height, width))
    xs, ys = np.meshgrid(affine.c + affine.a * cols, affine.f + affine.e * rows)
    areas_KL = _areas_at(xs, ys, affine, grid.crs)
    # 2. between them linearly
    down_HK, across_WL = (
        np.stack([np.interp(np.arange(side) + 0.5, at, one) for one in np.eye(len(at))], axis=1)
        for side, at in ((height, rows), (width, cols))
    )
    if deep_HW is None and np.ptp(areas_KL, axis=1).max() <= _SAME * areas_KL.max():
        return np.broadcast_to(down_HK @ areas_KL.mean(axis=1)[:, None], (height, width))
    areas_HW = np.asarray(down_HK @ areas_KL @ across_WL.T, np.float64)
    return areas_HW if deep_HW is None else np.where(deep_HW, areas_HW, _areas_at_edge(tile, ~deep_HW))


def _areas_at(xs_KL: NDArray[np.float64], ys_KL: NDArray[np.float64], affine: Affine, crs: str) -> NDArray[np.float64]:
    """Ground area in square metres of a pixel around each place; 0 beyond the edge of the Earth."""
    to_degrees = _to_lonlat(crs).transform
    if lobes_of(crs):  # the scale that PROJ states for most maps of the world is that of a sphere
        with np.errstate(invalid="ignore"):
            ends = [to_degrees(xs_KL + col * affine.a, ys_KL) for col in (-0.5, 0.5)]
            sides = [to_degrees(xs_KL, ys_KL + row * affine.e) for row in (-0.5, 0.5)]
            steps = [
                (np.deg2rad((east - west + 180) % 360 - 180), _area_to(north) - _area_to(south))
                for (west, south), (east, north) in (ends, sides)
            ]
            areas_KL = np.abs(steps[0][0] * steps[1][1] - steps[0][1] * steps[1][0])
        return np.where(np.isfinite(areas_KL), areas_KL, 0.0)
    lons, lats_KL = to_degrees(xs_KL, ys_KL)
    scale_KL = _projection(crs).get_factors(lons, np.clip(lats_KL, -POLE, POLE), errcheck=False).areal_scale
    # Coordinates may be in feet; the scale is that of metres.
    unit = CRS.from_user_input(crs).axis_info[0].unit_conversion_factor
    known_KL = np.isfinite(scale_KL) & (scale_KL > 0)
    return np.where(known_KL, abs(affine.a * affine.e) * unit**2 / np.where(known_KL, scale_KL, 1.0), 0.0)


def _areas_at_edge(tile: Tile, at_HW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Ground area in square metres of the part on the Earth of some pixels, from their outlines; 0 for all others.

    At the edge of a disk the scale of the projection grows without bound, so its values between pixels say little.
    """
    areas_HW = np.zeros(at_HW.shape)
    seen_HW = pixels_on_earth(tile.grid, tile.window)
    rows, cols = np.nonzero(at_HW if seen_HW is None else at_HW & seen_HW)
    affine = tile.grid.transform(tile.window)
    xs, ys = affine.c + affine.a * np.stack([cols, cols + 1]), affine.f + affine.e * np.stack([rows + 1, rows])
    outlines = shapely.box(xs[0], ys[0], xs[1], ys[1])
    lonlat = to_lonlat(outlines, str(tile.grid.crs))
    areas_HW[rows, cols] = shapely.area(
        shapely.transform(lonlat, lambda points: np.stack([np.deg2rad(points[:, 0]), _area_to(points[:, 1])], axis=1))
    )
    return areas_HW


def _row_lats(crs: str, x: float, ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """Latitudes in degrees of rows of a cylindrical projection; the pole beyond the edge of the Earth."""
    _, lats = _to_lonlat(crs).transform(np.full(len(ys), x), ys)
    _, equator = transformer(LONLAT, crs).transform(0.0, 0.0)
    return np.asarray(np.where(np.isfinite(lats), lats, np.copysign(90.0, ys - equator)), np.float64)


def _area_to(lats: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area in square metres of a radian of longitude from the equator to latitudes in degrees (Snyder 1987, 3-12)."""
    squared = _GEOD.es
    first, sines = np.sqrt(squared), np.sin(np.deg2rad(lats))
    curved = np.log((1 - first * sines) / (1 + first * sines)) / (2 * first)
    return np.asarray(_GEOD.a**2 / 2 * (1 - squared) * (sines / (1 - squared * sines**2) - curved), np.float64)


def class_areas(tile: Tile, classes_HW: NDArray[np.uint8]) -> dict[int, float] | None:
    """Ground area in square metres of every class of a tile's map without nodata; None without CRS."""
    areas_HW = pixel_areas_m2(tile)
    if areas_HW is None:
        return None
    values = (int(value) for value in np.unique(classes_HW) if value != NODATA)
    return {value: float(areas_HW[classes_HW == value].sum()) for value in values}


def width_m(grid: Grid, window: Window) -> float | None:
    """Length on the ground of the window's middle row; None without CRS, and where the row leaves the Earth."""
    if grid.crs is None:
        return None
    left, bottom, right, top = grid.bounds(window)
    xs = np.linspace(left, right, 9)
    lons, lats = _to_lonlat(grid.crs).transform(xs, np.full(9, (bottom + top) / 2))
    return float(_GEOD.line_length(lons, lats)) if np.isfinite([lons, lats]).all() else None


@lru_cache(maxsize=64)
def _projection(crs: str) -> Proj:
    return Proj(crs)


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
    grids: dict[Grid, int] = {}
    places = (
        (
            grids.setdefault(tile.tile.grid, len(grids)),
            window.row,
            window.col,
            window.row1,
            window.col1,
            facts["pairs"],
            facts["changes"],
        )
        for tile in tiles
        for window, facts in [(tile.tile.window, tile.record.facts)]
    )
    table_N7 = np.fromiter(chain.from_iterable(places), np.int64).reshape(-1, 7)
    borders = _borders(table_N7[:, :5])
    inside, changed = table_N7[:, 5:].sum(axis=0).tolist()
    chosen = borders[sorted({round(at) for at in np.linspace(0, len(borders) - 1, most)})] if len(borders) else borders
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda border: _across(_strips(*(tiles[at] for at in border))), chosen.tolist()))
    pairs, changes = sum(pair for pair, _ in counts), sum(change for _, change in counts)
    # 2. the rate inside tiles, which the ledger has
    if not pairs or not inside:
        return None
    rate = changed / inside
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


def _borders(places_N5: NDArray[np.int64]) -> NDArray[np.int64]:
    """(borders, 2) numbers of tiles that touch: each tile with its right, then with its lower neighbour.

    Args:
        places_N5: number of the grid, first row and column, row and column after the last ones.
    """
    # Neighbours by the corner that they would have, as one number: no search over all pairs.
    count = len(places_N5)
    rows, row_at = np.unique(places_N5[:, [1, 3]], return_inverse=True)
    cols, col_at = np.unique(places_N5[:, [2, 4]], return_inverse=True)
    (top_N, bottom_N), (left_N, right_N) = row_at.reshape(-1, 2).T, col_at.reshape(-1, 2).T
    keys_3N = (places_N5[:, 0] * len(rows) + [top_N, top_N, bottom_N]) * len(cols) + [left_N, right_N, left_N]
    order = np.argsort(keys_3N[0])
    at = np.minimum(np.searchsorted(keys_3N[0], keys_3N[1:], sorter=order), max(count - 1, 0))
    other_2N = order[at]
    found_2N = keys_3N[0][other_2N] == keys_3N[1:]
    one, side = np.nonzero(found_2N.T)
    return np.stack([one, other_2N[side, one]], axis=1)


def _strips(one: MappedTile, other: MappedTile) -> tuple[_Strip, _Strip]:
    """The last column (row) of a tile and the first of its right (lower) neighbour."""
    window, next_window = one.tile.window, other.tile.window
    if window.row == next_window.row:
        height = min(window.height, next_window.height)
        return (one.href, FileWindow(window.width - 1, 0, 1, height)), (other.href, FileWindow(0, 0, 1, height))
    width = min(window.width, next_window.width)
    return (one.href, FileWindow(0, window.height - 1, width, 1)), (other.href, FileWindow(0, 0, width, 1))


@patient
def _across(border: tuple[_Strip, _Strip]) -> tuple[int, int]:
    """(pairs with data, those of two classes) over a border."""
    strips = []
    for href, window in border:
        with gdal(href), open_file(href) as dataset:
            strips.append(dataset.read(1, window=window).ravel())
    here, there = strips
    valid = (here != NODATA) & (there != NODATA)
    return int(valid.sum()), int((valid & (here != there)).sum())
