"""A region's geometry on a grid: which tiles and which pixels lie in it."""

from typing import Any

import numpy as np
import shapely
from rasterio.features import geometry_mask
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from rayseg.geo import Grid, Window

_DEGREES = 0.01  # edges are cut this fine before they are projected, so straight lines may become curves


def on_grid(geometry: dict[str, Any] | None, grid: Grid) -> BaseGeometry | None:
    """A GeoJSON geometry in EPSG:4326 in the CRS of `grid`; None for everything, and on grids without CRS."""
    if geometry is None or grid.crs is None:
        return None
    import geopandas  # takes long, and most regions are all of their imagery

    edges = shapely.segmentize(shape(geometry), _DEGREES)
    projected: BaseGeometry = geopandas.GeoSeries([edges], crs="EPSG:4326").to_crs(grid.crs).iloc[0]
    return projected


def windows_inside(area: BaseGeometry | None, grid: Grid, corners_N4: np.ndarray) -> np.ndarray:
    """(N,) bool: windows of `grid`, as (col, row, col1, row1), that share some ground with `area` (CRS of the grid)."""
    if area is None:
        return np.ones(len(corners_N4), bool)
    shapely.prepare(area)
    affine = grid.transform(Window(0, 0, 1, 1))
    col, row, col1, row1 = corners_N4.T
    (left, right), ys = affine.c + affine.a * np.stack([col, col1]), affine.f + affine.e * np.stack([row, row1])
    boxes = shapely.box(left, ys.min(axis=0), right, ys.max(axis=0))
    inside: np.ndarray = shapely.contains_properly(area, boxes)
    at = np.flatnonzero(~inside)  # few, and slower to decide
    inside[at] = shapely.intersects(area, boxes[at]) & ~shapely.touches(area, boxes[at])
    return inside


def pixels_inside(area: BaseGeometry | None, grid: Grid, window: Window) -> np.ndarray:
    """(height, width) bool: pixels of `window` whose centre lies in `area`."""
    size = (window.height, window.width)
    if area is None or area.contains(shapely.box(*_ordered(grid.bounds(window)))):
        return np.ones(size, bool)
    return np.asarray(geometry_mask([area], size, grid.transform(window), invert=True))


def _ordered(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, bottom, right, top = bounds
    return left, min(bottom, top), right, max(bottom, top)
