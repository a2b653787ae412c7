"""Class rasters as polygons, tile by tile, joined so that the result does not depend on the tiling.

A part is one 4-connected component of one class inside one tile, in whole pixels of the grid. `join` unites the parts
that share a piece of a tile's border, takes out vertices on straight lines, and only then leaves the pixel grid: what
it makes of a component is decided by the component's pixels alone.
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import shapes
from skimage.measure import label

from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io.cog import read_bands
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.io.masks import table_of
from rayseg.io.rasters import read
from rayseg.io.sources import Source, footprint, grids_of, source_of_file
from rayseg.store import StorePath, put, upath
from rayseg.vision.color import ClassTable
from rayseg.vision.segments import groups

if TYPE_CHECKING:  # whoever cuts tiles into parts does without tables of geometries, which take long to import
    import geopandas

TOP = 254  # the score that stands for probability 1
LONLAT = "EPSG:4326"
EQUAL_AREA = "EPSG:6933"
"""Cylindrical equal-area on WGS 84: exact areas everywhere in one projection, so they do not depend on the region."""
_BLOCK = 2048
_COLUMNS = {"class": pa.uint8(), "geometry": pa.binary(), "pixels": pa.int64(), "score_sum": pa.int64()}
_COLUMNS |= dict.fromkeys(("first_row", "first_col", "col", "row", "col1", "row1"), pa.int64())
_COLUMNS |= {"edge": pa.bool_()}
_FIRST = ("class", "first_row", "first_col")


# -- parts ------------------------------------------------------------------------------------------------------------


def polygons_of(
    classes_HW: np.ndarray,
    scores_CHW: np.ndarray | None,
    grid: Grid,
    window: Window,
    *,
    skip: Sequence[int] | None = None,
) -> pa.Table:
    """The 4-connected components of each class in a tile.

    Args:
        classes_HW: uint8 class values over `window`, 255 = nodata.
        scores_CHW: uint8, 0..254 = probability x 254: one band, of class 1 against 0, or band k for class k; or None.
        grid: the grid, kept in the table's metadata.
        window: the tile.
        skip: classes that get no polygons; by default 0 where there is one band of scores or none, else none.

    Returns:
        One row per component: class; geometry (WKB, whole grid pixels, y downward); pixels; score_sum (of the
        component's own class, null without scores); first_row and first_col (its first pixel in reading order, which
        names it); col, row, col1, row1 (the tile); edge (whether it touches the tile's border).
    """
    if skip is None:
        skip = (0,) if scores_CHW is None or len(scores_CHW) == 1 else ()
    shown_HW = np.where(np.isin(classes_HW, skip), NODATA, classes_HW)
    labels_HW = label(shown_HW, background=NODATA, connectivity=1).astype(np.int32)
    labels, count = labels_HW.ravel(), int(labels_HW.max(initial=0))
    first = np.zeros(count + 1, np.int64)
    first[labels[::-1]] = np.arange(labels.size)[::-1]  # of equal indices the last one written stays
    first = first[1:]
    rows, cols = np.divmod(first, window.width)
    sums = None if scores_CHW is None else _score_sums(classes_HW, scores_CHW, labels)
    on_edge = np.unique(np.concatenate([labels_HW[[0, -1]].ravel(), labels_HW[:, [0, -1]].ravel()]))
    columns = {
        "class": classes_HW.ravel()[first],
        "geometry": shapely.to_wkb(_outlines(labels_HW, window)),
        "pixels": np.bincount(labels, minlength=count + 1)[1:],
        "score_sum": pa.nulls(count, pa.int64()) if sums is None else sums,
        "first_row": rows + window.row,
        "first_col": cols + window.col,
        **{name: np.full(count, getattr(window, name)) for name in ("col", "row", "col1", "row1")},
        "edge": np.isin(np.arange(1, count + 1), on_edge),
    }
    arrays = [pa.array(columns[name], kind) for name, kind in _COLUMNS.items()]
    return pa.Table.from_arrays(arrays, schema=_schema(grid))


def _outlines(labels_HW: np.ndarray, window: Window) -> NDArray[np.object_]:
    """The polygon of each label 1..n, in grid pixels."""
    points: list[tuple[float, float]] = []
    lengths, owners = [], []
    to_grid = Affine.translation(window.col, window.row)
    found = list(shapes(labels_HW, mask=labels_HW > 0, connectivity=4, transform=to_grid))
    for geometry, value in found:
        for ring in geometry["coordinates"]:
            points += ring
            lengths.append(len(ring))
            owners.append(int(value) - 1)
    order = np.argsort(np.array(owners, np.int64), kind="stable")
    ring = np.repeat(np.arange(len(lengths)), lengths)
    rings = np.asarray(shapely.linearrings(np.array(points, float).reshape(-1, 2), indices=ring))
    return np.asarray(shapely.polygons(rings[order], indices=np.array(owners, np.int64)[order]))


def write_parts(path: StorePath, parts: pa.Table) -> None:
    """Write parts as Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(parts, sink, compression="zstd")
    put(path, sink.getvalue().to_pybytes())


def read_parts(path: StorePath) -> pa.Table:
    """The parts that `write_parts` wrote.

    Raises:
        DataError: there are none at `path`.
    """
    try:
        return pq.read_table(io.BytesIO(upath(path).read_bytes()))
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} holds no parts of polygons ({error}): map the tile again.") from error


def _schema(grid: Grid) -> pa.Schema:
    return pa.schema(list(_COLUMNS.items()), metadata={"grid": json.dumps(asdict(grid))})


def _grid_of(parts: pa.Table) -> Grid:
    return Grid.from_row(json.loads(parts.schema.metadata[b"grid"]))


def _score_sums(classes_HW: np.ndarray, scores_CHW: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum of each component's scores of its own class."""
    if len(scores_CHW) == 1:
        scores_HW = np.where(classes_HW == 0, TOP - scores_CHW[0], scores_CHW[0])
    else:
        bands_1HW = np.minimum(classes_HW, len(scores_CHW) - 1)[None]
        scores_HW = np.take_along_axis(scores_CHW, bands_1HW.astype(np.intp), axis=0)[0]
    return np.bincount(labels, weights=scores_HW.ravel())[1:].astype(np.int64)


# -- join -------------------------------------------------------------------------------------------------------------


def join(parts: Iterable[pa.Table], table: ClassTable) -> "geopandas.GeoDataFrame":
    """Polygons of the parts of all tiles, joined over tile borders, in EPSG:4326 and cut at the antimeridian.

    Args:
        parts: of `polygons_of`; each pixel in one tile at most.
        table: the classes.

    Returns:
        Sorted by grid, class and first pixel: class, name, score_mean (0..1, mean probability of the class over the
        polygon's pixels, missing without scores), pixels, area_m2 (in the equal-area projection EPSG:6933) and
        geometry; image, where scenes have grids of their own. Of images without CRS: pixel coordinates (col, row),
        area_px instead, image, and no CRS.

    Raises:
        DataError: images with and without CRS are mixed, or a grid lies nowhere on Earth.
    """
    import pandas

    by_grid: dict[Grid, list[pa.Table]] = defaultdict(list)
    for one in parts:
        by_grid[_grid_of(one)].append(one)
    placed = {grid.crs is not None for grid in by_grid}
    if len(placed) > 1:
        raise DataError("Images with and without CRS cannot be joined into one table: map them in two runs.")
    order = sorted(by_grid, key=lambda grid: (grid.name, grid.origin))
    frames = [_frame(grid, *_components(pa.concat_tables(by_grid[grid])), table) for grid in order]
    if not frames:
        empty = Grid(LONLAT, (1.0, 1.0), (0.0, 0.0))
        return _frame(empty, *_components(_schema(empty).empty_table()), table)
    if len(frames) == 1:
        return frames[0]
    kept = [frame for frame in frames if len(frame)] or frames[:1]
    joined: geopandas.GeoDataFrame = pandas.concat(kept, ignore_index=True)
    return joined


def _components(parts: pa.Table) -> tuple[dict[str, np.ndarray], NDArray[np.object_]]:
    """Columns and polygons (pixels) of whole components, in order of class and first pixel."""
    columns = {name: parts[name].to_numpy() for name in _COLUMNS if name != "geometry"}
    polygons = shapely.from_wkb(parts["geometry"].to_numpy())
    owners = _owners(columns, polygons)
    order = np.lexsort([columns["first_col"], columns["first_row"], owners])
    starts = np.flatnonzero(np.diff(owners[order], prepend=-1))
    members = np.split(order, starts[1:]) if len(order) else []
    heads = order[starts]
    whole = polygons[heads]
    for position in np.flatnonzero(np.diff(starts, append=len(order)) > 1):
        whole[position] = shapely.union_all(polygons[members[position]])
    sums = {name: np.add.reduceat(columns[name][order], starts) if len(order) else columns[name] for name in _SUMS}
    found = {name: columns[name][heads] for name in _FIRST} | sums
    sorting = np.lexsort([found[name] for name in reversed(_FIRST)])
    return {name: values[sorting] for name, values in found.items()}, _canonical(whole[sorting])


_SUMS = ("pixels", "score_sum")


def _owners(columns: dict[str, np.ndarray], polygons: NDArray[np.object_]) -> np.ndarray:
    """The number of the component that each part belongs to."""
    at_edge = np.flatnonzero(columns["edge"])
    rings = shapely.get_exterior_ring(polygons[at_edge])
    points, ring = shapely.get_coordinates(rings, return_index=True)
    within = ring[:-1] == ring[1:]
    start, end = (side[within].astype(np.int64) for side in (points[:-1], points[1:]))
    part = at_edge[ring[:-1][within]]
    pairs = [np.empty((2, 0), np.int64)]
    for across, low, high in ((0, "col", "col1"), (1, "row", "row1")):
        straight = start[:, across] == end[:, across]
        line, along = start[straight, across], np.sort(np.stack([start, end])[:, straight, 1 - across], axis=0)
        owner = part[straight]
        after, before = line == columns[low][owner], line == columns[high][owner]
        keys = np.stack([line, columns["class"][owner].astype(np.int64)])
        pairs.append(_touching(keys, along, owner, before=before, after=after))
    return groups(len(polygons), np.concatenate(pairs, axis=1).T)


def _touching(
    keys: np.ndarray, along: np.ndarray, owner: np.ndarray, *, before: np.ndarray, after: np.ndarray
) -> np.ndarray:
    """(2, n) parts before and after a border line that share a piece of it.

    Args:
        keys: (2, segments) line and class; only segments of equal keys can meet.
        along: (2, segments) where a segment starts and ends on its line.
        owner: its part.
        before: whether it is the end of a tile; those of one line and class do not overlap.
        after: whether it is the start of one; nor do these.
    """
    if not before.any() or not after.any():
        return np.empty((2, 0), np.int64)
    _, group = np.unique(keys, axis=1, return_inverse=True)
    base = along.min()
    starts, ends = along - base + group.ravel() * (along.max() - base + 2)
    order = np.flatnonzero(after)[np.argsort(starts[after])]
    first = np.searchsorted(ends[order], starts[before], side="right")
    last = np.searchsorted(starts[order], ends[before], side="left")
    counts = np.maximum(last - first, 0)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(owner[before], counts), owner[order[np.repeat(first, counts) + offsets]]])


def _canonical(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """The polygons with vertices at corners only, each ring from its least vertex, holes in order."""
    rings, polygon = shapely.get_rings(polygons, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    if not len(points):
        return polygons
    opens = np.flatnonzero(np.diff(ring, prepend=-1))
    closes = np.append(opens[1:], len(ring)) - 1  # a ring's last point is its first again
    before = np.arange(len(points)) - 1
    before[opens] = closes - 1
    inside = np.ones(len(points), bool)
    inside[closes] = False
    arrives = points != points[before]  # which coordinate changes on the way to a point
    leaves = np.roll(arrives, -1, axis=0)
    corners = inside & (arrives != leaves).any(axis=1)
    made = shapely.linearrings(points[corners], indices=ring[corners])
    cleaned: NDArray[np.object_] = shapely.normalize(shapely.polygons(made, indices=polygon))
    return cleaned


# -- out --------------------------------------------------------------------------------------------------------------


def _frame(
    grid: Grid, columns: dict[str, np.ndarray], polygons: NDArray[np.object_], table: ClassTable
) -> "geopandas.GeoDataFrame":
    import geopandas

    names = dict(zip(table.values, table.names, strict=True))
    pixels = columns["pixels"].astype(np.int64)
    facts: dict[str, Any] = {
        "class": columns["class"],
        "name": [names.get(int(value), str(value)) for value in columns["class"]],
        "score_mean": columns["score_sum"] / np.maximum(pixels, 1) / TOP,
        "pixels": pixels,
    }
    if grid.crs is None:
        facts |= {"image": [grid.image or ""] * len(pixels), "area_px": pixels}
        return geopandas.GeoDataFrame(facts, geometry=polygons)
    affine = grid.transform(Window(0, 0, 1, 1))
    scale, shift = (affine.a, affine.e), (affine.c, affine.f)
    mapped = geopandas.GeoSeries(shapely.transform(polygons, lambda points: points * scale + shift), crs=grid.crs)
    lonlat = mapped.to_crs(LONLAT).to_numpy()
    if len(lonlat) and not np.isfinite(shapely.total_bounds(lonlat)).all():
        raise DataError(f"Polygons on the grid {grid.name} have no place on Earth: check the imagery's georeference.")
    cut = geopandas.GeoSeries(_cut(lonlat), crs=LONLAT)
    facts |= {"image": [grid.image] * len(pixels)} if grid.image else {}
    facts["area_m2"] = cut.to_crs(EQUAL_AREA).area.to_numpy()
    return geopandas.GeoDataFrame(facts, geometry=cut)


def _cut(lonlat: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons that cross the antimeridian cut there (RFC 7946, 3.1.9); the others as they are."""
    west, _, east, _ = shapely.bounds(lonlat).T if len(lonlat) else np.empty((4, 0))
    for position in np.flatnonzero(east - west > 180):
        unrolled = shapely.transform(lonlat[position], lambda points: points + (points[:, :1] < 0) * [360, 0])
        east_side = shapely.intersection(unrolled, shapely.box(0, -90, 180, 90))
        beyond = shapely.intersection(unrolled, shapely.box(180, -90, 360, 90))
        west_side = shapely.transform(beyond, lambda points: points - [360, 0])
        parts = [part for side in (east_side, west_side) for part in shapely.get_parts(side) if part.area > 0]
        lonlat[position] = shapely.MultiPolygon(parts)
    return lonlat


def write_geoparquet(frame: "geopandas.GeoDataFrame", path: StorePath) -> None:
    """Write GeoParquet 1.1 with the covering of bounding boxes."""
    sink = io.BytesIO()
    frame.to_parquet(sink, compression="zstd", write_covering_bbox=True, schema_version="1.1.0", index=False)
    put(path, sink.getvalue())


def write_geojson(frame: "geopandas.GeoDataFrame", path: StorePath) -> None:
    """Write GeoJSON; pixel coordinates (y downward) where there is no CRS."""
    put(path, frame.to_json(drop_id=True).encode())


def polygonize(raster: str, out: str) -> int:
    """Write the polygons of a class raster, or of all tiles of a run, as `.parquet` or `.geojson`.

    A raster of unnamed or of two classes has no polygons of class 0.

    Returns:
        How many polygons there are.

    Raises:
        ConfigError: `out` ends otherwise.
        DataError: `raster` is neither, or has no single band of uint8.
    """
    writers = {".parquet": write_geoparquet, ".geojson": write_geojson}
    suffix = upath(out).suffix.lower()
    if suffix not in writers:
        raise ConfigError(f"{out} ends in {suffix or 'nothing'}, expected .parquet or .geojson.")
    frame = _polygons_of_run(raster) if upath(raster).is_dir() else _polygons_of_raster(raster)
    writers[suffix](frame, out)
    return len(frame)


def _polygons_of_run(root: str) -> "geopandas.GeoDataFrame":
    tiles = mapped_tiles(root)
    table = table_of(tiles[0].href) if tiles else None
    return join((_parts_of(tile) for tile in tiles), table or ClassTable(((0, "0", (0, 0, 0)),)))


def _parts_of(mapped: MappedTile) -> pa.Table:
    """The parts that the run left of a tile, or else those of its class map."""
    path = upath(mapped.href).parent / "parts.parquet"
    if path.exists():
        return read_parts(path)
    return polygons_of(read_bands(mapped.href)[0], None, mapped.tile.grid, mapped.tile.window)


def _polygons_of_raster(path: str) -> "geopandas.GeoDataFrame":
    source = source_of_file(path, upath(path).stem)
    if len(source.bands) != 1 or source.dtype != "uint8":
        found = f"{len(source.bands)} bands of {source.dtype}"
        raise DataError(f"{path} is no class raster: one band of uint8 was expected, {found} found.")
    table = table_of(path)
    skip = (0,) if table is None or len(table.classes) == 2 else ()
    return join(_blocks(source, skip), table or ClassTable(((0, "0", (0, 0, 0)),)))


def _blocks(source: Source, skip: Sequence[int]) -> Iterator[pa.Table]:
    [(grid, _)] = grids_of([source])
    extent = footprint(source, grid)
    for row in range(extent.row, extent.row1, _BLOCK):
        for col in range(extent.col, extent.col1, _BLOCK):
            window = Window(col, row, _BLOCK, _BLOCK).intersect(extent)
            classes, valid = read([source], grid, window, bands=source.bands, categorical=True)
            yield polygons_of(np.where(valid, classes[0], NODATA), None, grid, window, skip=skip)
