"""Polygons of class rasters, made tile by tile and joined so that the result does not depend on the tiling.

A part is one 4-connected component of one class inside one tile, in whole pixels of the grid; simplified outlines have
vertices at corners of pixels, too. `join_parts` unites the parts that share a piece of a tile's border, takes out
vertices on straight lines, and only then leaves the pixel grid: the parts alone decide what it makes of a component.
"""

import io
import json
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import shapes
from skimage.measure import label

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.geo.lonlat import LONLAT, to_lonlat
from rayseg.io import seams
from rayseg.io.sources import placing
from rayseg.io.tables import Spool, content
from rayseg.io.written_files import WrittenFile, write_file
from rayseg.store import StorePath, put
from rayseg.vision.color import ClassTable
from rayseg.vision.segments import groups

if TYPE_CHECKING:  # cutting tiles into parts needs no tables of geometries, which take long to import
    import geopandas

TOP = 254  # the score that stands for probability 1
EQUAL_AREA = "EPSG:6933"
"""Cylindrical equal-area on WGS 84: exact areas everywhere in one projection, so they do not depend on the region."""
_COLUMNS = {"class": pa.uint8(), "geometry": pa.binary(), "pixels": pa.int64(), "score_sum": pa.int64()}
_COLUMNS |= dict.fromkeys(("first_row", "first_col", "col", "row", "col1", "row1"), pa.int64())
_COLUMNS |= {"edge": pa.bool_()}
_NO_TURNS: seams.Begins = {}
_CORNER = ("row", "col")
_AT_FIRST = ("first_row", "first_col")
_FIRST = ("class", *_AT_FIRST)
_PARTS = 1 << 16  # that are polygons in memory at a time
_ROWS = 1 << 17  # of a row group
_SEGMENT = np.dtype(
    [("line", "i8"), ("class", "u1"), ("start", "i8"), ("end", "i8"), ("part", "i8"), ("after", "?"), ("row1", "i8")]
)
"""A piece of a tile's border: line (2 x column, or 2 x row + 1), start, end, and whether the tile lies after it."""


# -- parts ------------------------------------------------------------------------------------------------------------


def polygons_of(
    classes_HW: np.ndarray,
    scores_CHW: np.ndarray | None,
    grid: Grid,
    window: Window,
    *,
    values: Sequence[int] | None = None,
    skip: Sequence[int] | None = None,
    kept_HW: NDArray[np.bool_] | None = None,
    simplify: float = 0.0,
) -> pa.Table:
    """The 4-connected components of each class in a tile.

    Args:
        classes_HW: uint8 class values over `window`, 255 = nodata.
        scores_CHW: uint8, 0..254 = probability x 254: one band, of class 1 against 0, or a band per class; or None.
        grid: the grid, kept in the table's metadata.
        window: the tile.
        values: classes of the bands of scores; by default 0, 1, ...
        skip: classes without polygons; by default 0 if there is at most one band of scores, else none.
        kept_HW: pixels that count; others only complete the outlines at a seam. By default all.
        simplify: tolerance in px: a corner goes if its triangle is smaller than its square (Visvalingam and Whyatt
            1993). Neighbours keep common outlines; outlines along the tile's border stay as they are.

    Returns:
        One row per component: class; geometry (WKB, whole grid pixels, y downward); pixels; score_sum (of the
        component's own class, null without scores); first_row and first_col (its first pixel in reading order, which
        names it); col, row, col1, row1 (the tile); edge (whether it touches the tile's border).
    """
    if skip is None:
        skip = (0,) if scores_CHW is None or len(scores_CHW) == 1 else ()
    shown_HW = np.where(np.isin(classes_HW, skip), NODATA, classes_HW)
    labels_HW = label(shown_HW, background=NODATA, connectivity=1).astype(np.int32)
    count, shown_N = int(labels_HW.max(initial=0)), np.flatnonzero(labels_HW)  # few pixels of a rare class
    # 1. the first pixel of each component in reading order names it
    labels_N = labels_HW.ravel()[shown_N]
    first = np.zeros(count + 1, np.int64)
    first[labels_N[::-1]] = shown_N[::-1]  # of equal indices the last one written stays
    first = first[1:]
    rows, cols = np.divmod(first, window.width)
    # 2. pixels and scores are counted where they are kept; outlines need all pixels
    counted_N = labels_N if kept_HW is None else np.where(kept_HW.ravel()[shown_N], labels_N, 0)
    scores_N = None if scores_CHW is None else _own_scores(classes_HW, scores_CHW, shown_N, values)
    sums = None if scores_N is None else np.bincount(counted_N, weights=scores_N, minlength=count + 1)[1:]
    on_edge = np.unique(np.concatenate([labels_HW[[0, -1]].ravel(), labels_HW[:, [0, -1]].ravel()]))
    columns = {
        "class": classes_HW.ravel()[first],
        "geometry": shapely.to_wkb(
            _simplified(labels_HW, window, simplify) if simplify else _outlines(labels_HW, window)
        ),
        "pixels": np.bincount(counted_N, minlength=count + 1)[1:],
        "score_sum": pa.nulls(count, pa.int64()) if sums is None else sums.astype(np.int64),
        "first_row": rows + window.row,
        "first_col": cols + window.col,
        **{name: np.full(count, getattr(window, name)) for name in ("col", "row", "col1", "row1")},
        "edge": np.isin(np.arange(1, count + 1), on_edge),
    }
    arrays = [pa.array(columns[name], kind) for name, kind in _COLUMNS.items()]
    table = pa.Table.from_arrays(arrays, schema=_schema(grid))
    return table if kept_HW is None else table.filter(pc.greater(table["pixels"], 0))


def _outlines(labels_HW: np.ndarray, window: Window) -> NDArray[np.object_]:
    """The polygon of each label 1..n, in grid pixels."""
    points: list[tuple[float, float]] = []
    lengths, owners = [], []
    to_grid = Affine.translation(window.col, window.row)
    for geometry, value in shapes(labels_HW, mask=labels_HW > 0, connectivity=4, transform=to_grid):
        for ring in geometry["coordinates"]:
            points += ring
            lengths.append(len(ring))
            owners.append(int(value) - 1)
    # Stable, as the outer ring of a label comes before its holes.
    order = np.argsort(np.array(owners, np.int64), kind="stable")
    ring = np.repeat(np.arange(len(lengths)), lengths)
    rings = np.asarray(shapely.linearrings(np.array(points, float).reshape(-1, 2), indices=ring))
    return np.asarray(shapely.polygons(rings[order], indices=np.array(owners, np.int64)[order]))


def _simplified(labels_HW: np.ndarray, window: Window, tolerance: float) -> NDArray[np.object_]:
    """`_outlines` without small corners; labels that touch still share their outlines."""
    # A coverage without gaps: only then are outlines next to nodata, too, inside it and simplified.
    count = int(labels_HW.max(initial=0))
    rest_HW = label(labels_HW == 0, background=0, connectivity=1)
    whole = _outlines(np.where(labels_HW > 0, labels_HW, rest_HW + count).astype(np.int32), window)
    simple: NDArray[np.object_] = shapely.coverage_simplify(whole, tolerance, simplify_boundary=False)
    return simple[:count]


def write_parts(path: StorePath, parts: pa.Table) -> WrittenFile:
    """Write parts as Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(parts, sink, compression="zstd")
    return write_file(path, sink.getvalue().to_pybytes())


def read_parts(path: StorePath, *, skip: Sequence[int] = ()) -> pa.Table:
    """The parts that `write_parts` wrote, without those of some classes.

    Raises:
        DataError: there are none at `path`.
    """
    try:
        parts = pq.read_table(io.BytesIO(content(path)))
        return parts.filter(pc.invert(pc.is_in(parts["class"], pa.array(skip, pa.uint8())))) if skip else parts
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} holds no parts of polygons ({error}); map the tile again") from error


def no_parts(grid: Grid) -> pa.Table:
    """The parts of a tile without any."""
    return _schema(grid).empty_table()


def _schema(grid: Grid) -> pa.Schema:
    return pa.schema(list(_COLUMNS.items()), metadata={"grid": json.dumps(grid.to_row())})


def _grid_of(parts: pa.Table) -> Grid:
    return Grid.from_row(json.loads(parts.schema.metadata[b"grid"]))


def _own_scores(
    classes_HW: np.ndarray, scores_CHW: np.ndarray, at_N: np.ndarray, values: Sequence[int] | None
) -> np.ndarray:
    """Scores of their own class of the pixels at flat positions."""
    classes_N = classes_HW.ravel()[at_N]
    if len(scores_CHW) == 1:
        scores_N = scores_CHW[0].ravel()[at_N]
        return np.asarray(np.where(classes_N == 0, TOP - scores_N, scores_N))
    rows_N, cols_N = np.divmod(at_N, classes_HW.shape[1])
    bands = np.zeros(NODATA + 1, np.int64)
    bands[list(range(len(scores_CHW)) if values is None else values)] = np.arange(len(scores_CHW))
    own_N: np.ndarray = scores_CHW[bands[classes_N], rows_N, cols_N]
    return own_N


# -- join -------------------------------------------------------------------------------------------------------------


def join_parts(
    parts: Iterable[pa.Table], table: ClassTable, begins: seams.Begins = _NO_TURNS
) -> "geopandas.GeoDataFrame":
    """Polygons of the parts of all tiles, joined over tile borders, in EPSG:4326 and cut at the antimeridian.

    Args:
        parts: of `polygons_of`; each pixel in one tile at most.
        table: the classes.
        begins: `seams.begins_of` the tiles: the grids whose last column meets their first.

    Returns:
        Sorted by grid, class and first pixel: class, name, score_mean (0..1, mean probability of the class over the
        polygon's pixels, missing without scores), pixels, area_m2 (in the equal-area projection EPSG:6933) and
        geometry; image, if scenes have grids of their own. Of images without CRS: pixel coordinates (col, row),
        area_px instead, image, and no CRS.

    Raises:
        DataError: images with and without CRS are mixed, or a grid has coordinates outside the Earth.
    """
    # The first row and column of a tile; a table without parts may come anywhere.
    ordered = sorted(
        parts, key=lambda part: tile_order(_grid_of(part), *(pc.min(part[n]).as_py() or 0 for n in _CORNER))
    )
    by_grid: dict[Grid, list[geopandas.GeoDataFrame]] = {}
    for grid, frame in _over_seams(_frames(ordered, table), begins):
        by_grid.setdefault(grid, []).append(frame)
    sorted_frames = [_concatenated(some).sort_values(list(_FIRST), ignore_index=True) for some in by_grid.values()]
    return _concatenated([frame.drop(columns=list(_AT_FIRST)) for frame in sorted_frames])


def write_joined(
    parts: Iterable[pa.Table], table: ClassTable, path: StorePath, begins: seams.Begins = _NO_TURNS
) -> tuple[int, float | None]:
    """Write the polygons of `join_parts` as GeoParquet; memory holds the parts of about two rows of tiles.

    Args:
        parts: as for `join_parts`, sorted by `tile_order` their tiles.
        table: the classes.
        path: of the file.
        begins: as for `join_parts`.

    Returns:
        How many polygons there are, and their area in m2 (None without CRS).

    Raises:
        DataError: as `join_parts`.
    """
    grids, heads = dict[Grid, int](), dict[Grid, "geopandas.GeoDataFrame"]()
    with Spool() as spool, tempfile.TemporaryFile() as file:
        for grid, frame in _over_seams(_frames(parts, table), begins):
            number = grids.setdefault(grid, len(grids))
            plain = frame.drop(columns=list(_AT_FIRST))
            if not len(heads.get(grid, ())):
                heads[grid] = plain.iloc[:1]
            if not len(frame):
                continue
            # 1. every polygon as geopandas stores it, with what it is sorted by
            stored = pq.read_table(io.BytesIO(_geoparquet(plain, compression="none")))
            for name, values in (("grid", np.full(len(frame), number)), *((n, frame[n].to_numpy()) for n in _AT_FIRST)):
                stored = stored.append_column(f"_{name}", pa.array(values))
            spool.add(stored)
        # 2. the file's schema, of one polygon of each grid, with the bounds and types of all
        schema = pq.read_schema(io.BytesIO(_geoparquet(_concatenated(list(heads.values())))))
        keys = {f"_{name}": pa.int64() for name in ("grid", *_AT_FIRST)}
        sortable = pa.schema([*schema, *keys.items()])
        whole = pa.concat_tables([sortable.empty_table(), *spool.tables()], promote_options="default")
        schema = _with_bounds(schema, [part.schema.metadata[b"geo"] for part in spool.tables()])
        # 3. the polygons in order, some at a time
        order = np.lexsort([whole[name].to_numpy() for name in ("_first_col", "_first_row", "class", "_grid")])
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for start in range(0, max(len(order), 1), _ROWS):
                rows = whole.take(pa.array(order[start : start + _ROWS], pa.int64()))
                writer.write_table(rows.select(schema.names).cast(schema))
        file.flush()
        put(path, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    area = float(whole["area_m2"].to_numpy()[order].sum()) if "area_m2" in schema.names else None
    return len(order), area


def tile_order(grid: Grid, row: int, col: int) -> tuple[Any, ...]:
    """Sorts tiles by grid, row and column."""
    return grid.name, grid.origin, grid.resolution, grid.image or "", row, col


def _frames(parts: Iterable[pa.Table], table: ClassTable) -> Iterator[tuple[Grid, "geopandas.GeoDataFrame"]]:
    """(grid, some of its polygons, not sorted, with `_AT_FIRST`); of each grid at least one frame."""
    placed = set()
    for grid, of_grid in groupby(parts, key=_grid_of):
        placed.add(grid.crs is None)
        if len(placed) > 1:
            raise DataError("images with and without CRS cannot be joined into one table; map them in two runs")
        for columns, polygons in _components(of_grid):
            yield grid, _frame(grid, columns, polygons, table)
    if not placed:
        yield from _frames([no_parts(Grid(LONLAT, (1.0, 1.0), (0.0, 0.0)))], table)


def _over_seams(
    frames: Iterable[tuple[Grid, "geopandas.GeoDataFrame"]], begins: seams.Begins
) -> Iterator[tuple[Grid, "geopandas.GeoDataFrame"]]:
    """`_frames` with polygons joined over seams; those at a seam come last, each with its first grid."""
    # 1. polygons away from seams are complete
    waiting: list[tuple[Grid, geopandas.GeoDataFrame, list[Any]]] = []
    for grid, frame in frames:
        along = [seams.edges(polygon, grid, begins) for polygon in frame.geometry]
        at_seam = np.array([bool(edges) for edges in along], bool)
        yield grid, frame[~at_seam]
        waiting += [(grid, frame.iloc[[at]], along[at]) for at in np.flatnonzero(at_seam)]
    # 2. polygons of one class that share a piece of a seam are one
    edges = [(at, int(frame["class"].iloc[0]), along) for at, (_, frame, along) in enumerate(waiting)]
    pairs = np.array([pair[:2] for pair in seams.touching(edges)], np.int64).reshape(-1, 2)
    members: dict[int, list[int]] = {}
    for at, owner in enumerate(groups(len(waiting), pairs).tolist()):
        members.setdefault(owner, []).append(at)
    for positions in members.values():
        rows = [waiting[at] for at in positions]
        rows.sort(key=lambda row: tile_order(row[0], *row[1][list(_AT_FIRST)].iloc[0]))
        # 3. of each group one polygon, by its first frame; each frame has one row
        singles = [frame for _, frame, _ in rows]
        whole, pixels = singles[0].copy(), np.array([frame["pixels"].iloc[0] for frame in singles])
        if len(singles) > 1:
            whole["score_mean"] = np.average([frame["score_mean"].iloc[0] for frame in singles], weights=pixels)
            whole["pixels"], whole["area_m2"] = pixels.sum(), sum(frame["area_m2"].iloc[0] for frame in singles)
            polygons = np.array([frame.geometry.iloc[0] for frame in singles], object)
            if (begin := begins.get(rows[0][0])) is not None:
                polygons = seams.at_begin(polygons, begin)
            whole.geometry = [shapely.normalize(shapely.union_all(polygons))]
        yield rows[0][0], whole


def _concatenated(frames: list["geopandas.GeoDataFrame"]) -> "geopandas.GeoDataFrame":
    import pandas

    kept = [frame for frame in frames if len(frame)] or frames[:1]
    whole: geopandas.GeoDataFrame = pandas.concat(kept, ignore_index=True) if len(kept) > 1 else kept[0]
    return whole


_Components = tuple[dict[str, np.ndarray], NDArray[np.object_]]
"""Columns and polygons (grid pixels) of whole components."""


def _components(parts: Iterable[pa.Table]) -> Iterator[_Components]:
    """The whole components of one grid, some at a time; the parts come by row and column of their tiles."""
    count, pairs, live = 0, [np.empty((2, 0), np.int64)], np.empty(0, _SEGMENT)
    with Spool() as spool:
        for batch in _batches(parts):
            # 1. a part inside its tile is a component
            yield _united(batch.filter(pc.invert(batch["edge"])), None)
            # 2. which parts at the border touch each other; only those that later tiles can touch stay in memory
            edge = batch.filter(batch["edge"])
            live = np.concatenate([live, _segments(edge, count)])
            touching = _touching(live)
            pairs.append(touching[:, touching.max(axis=0, initial=-1) >= count])
            if len(batch):
                live = live[live["row1"] >= batch["row"][-1].as_py()]
            spool.add(edge)
            count += len(edge)
        # 3. parts that touch, also through others, are one component
        owners = groups(count, np.concatenate(pairs, axis=1).T)
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(np.diff(owners[order], append=-1)) + 1
        whole, start = pa.concat_tables(spool.tables()), 0
        while start < count:
            stop = int(ends[min(int(np.searchsorted(ends, start + _PARTS)), len(ends) - 1)])
            yield _united(whole.take(pa.array(order[start:stop])), owners[order[start:stop]])
            start = stop


def _batches(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= _PARTS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _united(parts: pa.Table, owners: np.ndarray | None) -> _Components:
    """The components of parts; those of one owner are one component, without owners each is one."""
    columns = {name: parts[name].to_numpy() for name in _COLUMNS if name != "geometry"}
    whole = shapely.from_wkb(parts["geometry"].to_numpy())
    if owners is not None:
        # The first pixel in reading order names the component.
        order = np.lexsort([columns["first_col"], columns["first_row"], owners])
        starts = np.flatnonzero(np.diff(owners[order], prepend=-1))
        members, polygons = np.split(order, starts[1:]), whole
        whole = polygons[order[starts]]
        for position in np.flatnonzero(np.diff(starts, append=len(order)) > 1):
            whole[position] = shapely.union_all(polygons[members[position]])
        sums = {name: np.add.reduceat(columns[name][order], starts) for name in ("pixels", "score_sum")}
        columns = {name: columns[name][order[starts]] for name in _FIRST} | sums
    return columns, _canonical(whole)


def _segments(parts: pa.Table, first: int) -> NDArray[np.void]:
    """The pieces of tile borders that parts, numbered from `first`, lie at."""
    columns = {name: parts[name].to_numpy() for name in ("class", "col", "row", "col1", "row1")}
    rings = shapely.get_exterior_ring(shapely.from_wkb(parts["geometry"].to_numpy()))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    # Steps from a point to the next one of the same ring.
    within = ring[:-1] == ring[1:]
    start, end, part = points[:-1][within].astype(np.int64), points[1:][within].astype(np.int64), ring[:-1][within]
    pieces = []
    for across, low, high in ((0, "col", "col1"), (1, "row", "row1")):
        line = start[:, across]
        after, before = line == columns[low][part], line == columns[high][part]
        at = (line == end[:, across]) & (after | before)
        segments = np.empty(int(at.sum()), _SEGMENT)
        along = np.sort(np.stack([start[at, 1 - across], end[at, 1 - across]]), axis=0)
        values = (line[at] * 2 + across, columns["class"][part[at]], *along, part[at] + first, after[at])
        for name, value in zip(_SEGMENT.names or (), (*values, columns["row1"][part[at]]), strict=True):
            segments[name] = value
        pieces.append(segments)
    return np.concatenate(pieces)


def _touching(segments: NDArray[np.void]) -> np.ndarray:
    """(2, n) parts before and after a border that share a piece of it; no two on one side of a line overlap."""
    if not len(segments):
        return np.empty((2, 0), np.int64)
    _, group = np.unique(segments["line"] * 256 + segments["class"], return_inverse=True)
    base = segments["start"].min()
    shift = group * (segments["end"].max() - base + 2) - base  # lines one after the other: one search is for all
    after = np.flatnonzero(segments["after"])
    after = after[np.argsort(segments["start"][after] + shift[after])]
    before = np.flatnonzero(~segments["after"])
    first = np.searchsorted(
        segments["end"][after] + shift[after], segments["start"][before] + shift[before], side="right"
    )
    last = np.searchsorted(
        segments["start"][after] + shift[after], segments["end"][before] + shift[before], side="left"
    )
    counts = np.maximum(last - first, 0)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    part = segments["part"]
    return np.stack([np.repeat(part[before], counts), part[after[np.repeat(first, counts) + offsets]]])


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
    arrives = points - points[before]  # whole pixels, so that the cross product is exact
    after = np.arange(len(points)) + 1
    after[closes - 1] = opens
    leaves = points[after % len(points)] - points
    corners = inside & (arrives[:, 0] * leaves[:, 1] != arrives[:, 1] * leaves[:, 0])
    cleaned = shapely.linearrings(points[corners], indices=ring[corners])
    result: NDArray[np.object_] = shapely.normalize(shapely.polygons(cleaned, indices=polygon))
    return result


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
    first = {name: columns[name] for name in _AT_FIRST}
    if grid.crs is None:
        facts |= {"image": [grid.image or ""] * len(pixels), "area_px": pixels}
        return geopandas.GeoDataFrame(facts, geometry=polygons).assign(**first)
    # Areas come from the cut polygons: EPSG:6933 ends at the antimeridian.
    cut = geopandas.GeoSeries(lonlat_of(grid, polygons), crs=LONLAT)
    facts |= {"image": [grid.image] * len(pixels)} if grid.image else {}
    facts["area_m2"] = cut.to_crs(EQUAL_AREA).area.to_numpy()
    return geopandas.GeoDataFrame(facts, geometry=cut).assign(**first)


def lonlat_of(grid: Grid, polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons in pixels of a grid with CRS, in EPSG:4326, cut at the antimeridian and at the grid's seams.

    Raises:
        DataError: the grid has coordinates outside the Earth.
    """
    affine = grid.transform(Window(0, 0, 1, 1))
    scale, shift = (affine.a, affine.e), (affine.c, affine.f)
    mapped = shapely.transform(polygons, lambda points: points * scale + shift)
    with placing(f"a polygon on the grid {grid.name}", str(grid.crs)):
        lonlat = to_lonlat(mapped, str(grid.crs))
    return seams.cut(lonlat, grid)


def write_geoparquet(frame: "geopandas.GeoDataFrame", path: StorePath) -> None:
    """Write GeoParquet 1.1 with the covering of bounding boxes."""
    put(path, _geoparquet(frame))


def _geoparquet(frame: "geopandas.GeoDataFrame", *, compression: str = "zstd") -> bytes:
    sink = io.BytesIO()
    frame.to_parquet(sink, compression=compression, write_covering_bbox=True, schema_version="1.1.0", index=False)
    return sink.getvalue()


def _with_bounds(schema: pa.Schema, parts: Sequence[bytes]) -> pa.Schema:
    """A schema of GeoParquet with the bounds and geometry types of all parts, given by their metadata."""
    geo = json.loads(schema.metadata[b"geo"])
    columns = [json.loads(part)["columns"]["geometry"] for part in parts]
    if columns:
        west, south, east, north = np.array([column["bbox"] for column in columns]).T
        geo["columns"]["geometry"]["bbox"] = [*map(float, (west.min(), south.min(), east.max(), north.max()))]
        geo["columns"]["geometry"]["geometry_types"] = sorted({kind for c in columns for kind in c["geometry_types"]})
    return schema.with_metadata(schema.metadata | {b"geo": json.dumps(geo).encode()})


def write_geojson(frame: "geopandas.GeoDataFrame", path: StorePath) -> None:
    """Write GeoJSON; pixel coordinates (y downward) where there is no CRS."""
    put(path, frame.to_json(drop_id=True).encode())
