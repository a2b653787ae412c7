"""A region's geometry on a grid: which tiles and which pixels lie in it."""

from collections.abc import Sequence
from typing import Any

import geopandas
import numpy as np
import shapely
from rasterio.features import geometry_mask
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from rayseg.geo import Grid, Tile, Window

_DEGREES = 0.01  # edges are cut this fine before they are projected, so straight lines may become curves


def on_grid(geometry: dict[str, Any] | None, grid: Grid) -> BaseGeometry | None:
    """A GeoJSON geometry in EPSG:4326 in the CRS of `grid`; None for everything, and on grids without CRS."""
    if geometry is None or grid.crs is None:
        return None
    edges = shapely.segmentize(shape(geometry), _DEGREES)
    projected: BaseGeometry = geopandas.GeoSeries([edges], crs="EPSG:4326").to_crs(grid.crs).iloc[0]
    return projected


def tiles_inside(tiles: Sequence[Tile], area: BaseGeometry | None) -> list[Tile]:
    """The tiles that share some ground with `area` (CRS of their grid)."""
    if area is None:
        return list(tiles)
    shapely.prepare(area)
    boxes = shapely.box(*np.array([_ordered(tile.grid.bounds(tile.window)) for tile in tiles]).reshape(-1, 4).T)
    touches = shapely.intersects(area, boxes) & ~shapely.touches(area, boxes)
    return [tile for tile, inside in zip(tiles, touches, strict=True) if inside]


def pixels_inside(area: BaseGeometry | None, grid: Grid, window: Window) -> np.ndarray:
    """(height, width) bool: pixels of `window` whose centre lies in `area`."""
    size = (window.height, window.width)
    if area is None or area.contains(shapely.box(*_ordered(grid.bounds(window)))):
        return np.ones(size, bool)
    return np.asarray(geometry_mask([area], size, grid.transform(window), invert=True))


def _ordered(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, bottom, right, top = bounds
    return left, min(bottom, top), right, max(bottom, top)
