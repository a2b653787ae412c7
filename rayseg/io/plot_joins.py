"""Plots of patches, joined to plots of a region that do not depend on the tiling.

A patch is a cell of the grid's lattice with a margin, so neighbouring patches overlap. Each patch contributes only
the pixels of its own cell; where two patches agree in their overlap, their instances are one plot. Patches are
joined, not tiles, so the tiling makes no difference.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import geopandas
import numpy as np
import pandas
import pyarrow as pa
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import rasterize, shapes
from shapely.geometry.base import BaseGeometry

from rayseg.engine.manifest import Row, read_rows
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.lonlat import LONLAT
from rayseg.io import seams
from rayseg.io.vectors import EQUAL_AREA, lonlat_of
from rayseg.store import StorePath
from rayseg.vision.instances import Labels
from rayseg.vision.segments import alike, groups

Place = tuple[int, int]
_NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))
_PIECE = ("pixels", "first_row", "first_col", "geometry", "cell_row", "cell_col", "label")


def pieces_of(labels_HW: Labels, window: Window) -> Iterator[tuple[int, Row]]:
    """(label, columns pixels, first_row, first_col and geometry in grid pixels) of every label over `window`."""
    polygons: dict[int, list[BaseGeometry]] = {}
    to_grid = Affine.translation(window.col, window.row)
    for geometry, value in shapes(labels_HW, mask=labels_HW > 0, connectivity=4, transform=to_grid):
        polygons.setdefault(int(value), []).append(shapely.geometry.shape(geometry))
    values, first, counts = np.unique(labels_HW, return_index=True, return_counts=True)
    for value, at, count in zip(values.tolist(), first.tolist(), counts.tolist(), strict=True):
        if value:
            place = {"first_row": at // window.width + window.row, "first_col": at % window.width + window.col}
            whole = shapely.to_wkb(shapely.union_all(polygons[value]))
            yield value, {"pixels": count, **place, "geometry": whole}


def read_table(path: StorePath) -> list[Row]:
    """The rows of patches, pieces or plots in a file.

    Raises:
        DataError: there are none at `path`.
    """
    try:
        return list(read_rows(path))
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} holds no plots ({error}); propose them again") from error


def packed(labels_HW: Labels) -> bytes:
    """A label image, compressed."""
    return zlib.compress(np.ascontiguousarray(labels_HW, np.int32).tobytes(), 1)


@lru_cache(maxsize=16)
def _unpacked(data: bytes, height: int, width: int) -> Labels:
    return np.frombuffer(zlib.decompress(data), np.int32).reshape(height, width)


# -- join -------------------------------------------------------------------------------------------------------------


def join_pieces(patches: Sequence[Row], pieces: Sequence[Row], *, least: float) -> list[Row]:
    """The plots of one grid, by the first pixel.

    Args:
        patches: cell_row and cell_col (in cells), col, row, width, height of the patch, labels (`packed`).
        pieces: cell_row, cell_col, label and the columns of `pieces_of`, with any further columns.
        least: IoU within the overlap of two patches above which their instances are one plot.

    Returns:
        One row per plot: members (positions of its pieces), pixels, first_row, first_col, geometry (polygon or
        multipolygon in grid pixels, corners only) and the further columns of its largest piece.
    """
    pieces = sorted(pieces, key=lambda row: (row["cell_row"], row["cell_col"], row["label"]))
    known = {(row["cell_row"], row["cell_col"], row["label"]): k for k, row in enumerate(pieces)}
    pairs = [(known[a], known[b]) for a, b in _matches(patches, least) if a in known and b in known]
    owners = groups(len(pieces), np.array(pairs, np.int64).reshape(-1, 2))
    members: dict[int, list[Row]] = {}
    for owner, row in zip(owners.tolist(), pieces, strict=True):
        members.setdefault(owner, []).append(row)
    plots = []
    for rows in members.values():
        largest = max(rows, key=lambda row: row["pixels"])  # of equal ones the first
        first = min(rows, key=lambda row: (row["first_row"], row["first_col"]))
        # Pieces meet in vertices that the whole plot does not need; its ring begins at the least vertex.
        geometry = shapely.union_all(shapely.from_wkb([row["geometry"] for row in rows]))
        plots.append(
            {
                "members": [(row["cell_row"], row["cell_col"], row["label"]) for row in rows],
                "pixels": sum(row["pixels"] for row in rows),
                "first_row": first["first_row"],
                "first_col": first["first_col"],
                "geometry": shapely.normalize(shapely.simplify(shapely.normalize(geometry), 0)),
                **{name: value for name, value in largest.items() if name not in _PIECE},
            }
        )
    return sorted(plots, key=lambda row: (row["first_row"], row["first_col"]))


def _matches(patches: Sequence[Row], least: float) -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """((cell row, cell col, label), same of another patch) of instances that are one plot."""
    by_cell = {(row["cell_row"], row["cell_col"]): row for row in patches}
    for (row, col), one in sorted(by_cell.items()):
        for down, right in _NEIGHBOURS:
            other = by_cell.get((row + down, col + right))
            zone = _window(one).intersect(_window(other)) if other else Window(0, 0, 0, 0)
            if other is None or zone.empty:
                continue
            overlaps = (_labels(patch)[zone.slices(_window(patch))] for patch in (one, other))
            for a, b in alike(*overlaps, least=least).tolist():
                yield (row, col, a), (row + down, col + right, b)


def _window(row: Row) -> Window:
    return Window(row["col"], row["row"], row["width"], row["height"])


def _labels(row: Row) -> Labels:
    return _unpacked(row["labels"], row["height"], row["width"])


def across_seams(grids: Sequence[Grid], plots: Sequence[Row], *, least: float, begins: seams.Begins) -> dict[int, int]:
    """Number -> number of the plot that it is part of, for plots that seams cut.

    Two plots are one where they share more than `least` of the seam that either of them lies along.

    Args:
        grids: of the plots, by their `grid`.
        plots: rows of `join_pieces` with `number`, `grid` and geometry as WKB.
        least: IoU along the seam.
        begins: `seams.begins_of` the tiles.
    """
    # 1. the plots that lie along a seam, and where
    cut: list[Row] = []
    along: list[list[tuple[int, int, float, float]]] = []
    for at, grid in enumerate(grids):
        if not grid.divided and grid not in begins:
            continue
        rows = [row for row in plots if row["grid"] == at]
        outlines = lonlat_of(grid, shapely.from_wkb(np.array([row["geometry"] for row in rows], object)))
        cut, along = cut + rows, along + [seams.edges(outline, grid, begins) for outline in outlines]
    # 2. pairs by the IoU of their lengths along the seam
    lengths = [sum(high - low for _, _, low, high in edges) for edges in along]
    shared: dict[tuple[int, int], float] = {}
    for one, other, low, high in seams.touching([(at, 0, edges) for at, edges in enumerate(along)]):
        shared[one, other] = shared.get((one, other), 0.0) + high - low
    pairs = [(a, b) for (a, b), length in shared.items() if length > least * (lengths[a] + lengths[b] - length)]
    owners = groups(len(cut), np.array(pairs, np.int64).reshape(-1, 2)).tolist()
    # 3. a plot of several pieces keeps its lowest number
    first: dict[int, int] = {}
    for owner, row in zip(owners, cut, strict=True):
        first[owner] = min(first.get(owner, row["number"]), row["number"])
    return {row["number"]: first[owner] for owner, row in zip(owners, cut, strict=True)}


# -- out --------------------------------------------------------------------------------------------------------------


def frame_of(grid: Grid, plots: Sequence[Row], *, columns: Sequence[str]) -> geopandas.GeoDataFrame:
    """Plots of one grid in EPSG:4326 with area_m2; without CRS in pixels (col, row), with area_px and image.

    Args:
        grid: their grid.
        plots: of `join_pieces`, geometry as WKB, with all `columns`.
        columns: names to keep, in order.
    """
    polygons = shapely.from_wkb(np.array([row["geometry"] for row in plots], object))
    facts: dict[str, Any] = {name: [row[name] for row in plots] for name in columns}
    if grid.crs is None:
        facts |= {"image": [grid.image or ""] * len(plots), "area_px": [row["pixels"] for row in plots]}
        return geopandas.GeoDataFrame(facts, geometry=polygons)
    lonlat = geopandas.GeoSeries(lonlat_of(grid, polygons), crs=LONLAT)
    return geopandas.GeoDataFrame(facts | {"area_m2": lonlat.to_crs(EQUAL_AREA).area.to_numpy()}, geometry=lonlat)


def united(frame: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """The plots of a frame with one row for each `number`, where a seam between zones cuts some of them."""
    if frame.crs is None or not frame["number"].duplicated().any():
        return frame
    areas = frame.groupby("number", sort=False)["area_m2"].sum()
    whole = frame.dissolve(by="number", as_index=False, sort=False)[list(frame.columns)]
    return whole.assign(area_m2=areas.to_numpy())


def one_frame(frames: Sequence[geopandas.GeoDataFrame], *, columns: Sequence[str]) -> geopandas.GeoDataFrame:
    """Frames of several grids as one.

    Raises:
        DataError: images with and without CRS are mixed.
    """
    if not frames:
        return frame_of(Grid(LONLAT, (1.0, 1.0), (0.0, 0.0)), [], columns=columns)
    if len({frame.crs is None for frame in frames}) > 1:
        raise DataError("images with and without CRS cannot be in one table of plots; map them in two runs")
    return pandas.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def mask_of(geometry: BaseGeometry, window: Window) -> NDArray[np.bool_]:
    """Where a geometry in grid pixels covers `window`, (height, width) bool."""
    to_grid = Affine.translation(window.col, window.row)
    covered = rasterize([(geometry, 1)], (window.height, window.width), transform=to_grid, dtype=np.uint8)
    return np.asarray(covered > 0)


def numbered(labels_HW: Labels, numbers: Mapping[int, int]) -> NDArray[np.uint32]:
    """Label image of one patch with the numbers of the plots in place of its labels; 0 for none."""
    table = np.zeros(int(labels_HW.max(initial=0)) + 1, np.uint32)
    for label, number in numbers.items():
        if label < len(table):
            table[label] = number
    return table[labels_HW]


def labels_of(row: Row, window: Window) -> Labels:
    """The labels of a row of `patches` over `window`; 0 beyond the patch."""
    labels_HW = np.zeros((window.height, window.width), np.int32)
    part = _window(row).intersect(window)
    labels_HW[part.slices(window)] = _labels(row)[part.slices(_window(row))]
    return labels_HW


def cell_of(row: Mapping[str, Any]) -> Place:
    """(cell row, cell col) of a row."""
    return row["cell_row"], row["cell_col"]
