"""The seams between UTM zones that divide the ground, and of a grid in degrees with itself after a whole turn.

Pixels of two zones do not fit together. So a polygon of a zone is drawn a pixel beyond its seam and cut there. The
polygons on both sides then have edges along the same line, and those whose edges share a piece of it are one. So are
those of a grid that goes once around the Earth, where its last column and its first meet.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from rayseg.geo.grid import Grid, Tile
from rayseg.geo.lonlat import polygons_in, turn_of

_EXACT = 1e-9  # degrees; closer vertices lie on a seam
_TURN = 2000  # seam of a grid with itself
_Edge = tuple[int, int, float, float]
"""Seam, side of it (0 west or south, 1 east or north), from and to along it in degrees."""


def cut(lonlat: NDArray[np.object_], grid: Grid) -> NDArray[np.object_]:
    """Polygons of a grid, in degrees, cut at the seams of its ground; unchanged on a grid without seams."""
    if not (ground := grid.ground):
        return lonlat
    box, pieces = shapely.box(*ground), lonlat.copy()

    def snapped(points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        for side, axis in zip(ground, (0, 1, 0, 1), strict=True):
            points_N2[:, axis] = np.where(np.abs(points_N2[:, axis] - side) < _EXACT, side, points_N2[:, axis])
        return points_N2

    for at in np.flatnonzero(~shapely.contains_properly(box, lonlat)):
        # An intersection can also hold points and lines, where a polygon only touches the seam.
        parts = polygons_in(shapely.intersection(lonlat[at], box))
        pieces[at] = shapely.transform(parts[0] if len(parts) == 1 else shapely.MultiPolygon(list(parts)), snapped)
    return pieces


Begins = Mapping[Grid, float]
"""Longitude at which a grid that goes once around the Earth begins and ends; see `begins_of`."""


def begins_of(tiles: Iterable[Tile]) -> Begins:
    """Longitude, -180..180, of the first column of each grid whose tiles reach once around the Earth."""
    ends: dict[Grid, tuple[int, int]] = {}
    for tile in tiles:
        low, high = ends.get(tile.grid, (tile.window.col, tile.window.col1))
        ends[tile.grid] = min(low, tile.window.col), max(high, tile.window.col1)
    begins = {}
    for grid, (low, high) in ends.items():
        turn = turn_of(grid.crs) if grid.crs and not grid.divided else None
        if turn and abs(high - low - 360 * turn[1] / grid.resolution[0]) < 1e-3:
            lon = (grid.origin[0] + low * grid.resolution[0] - turn[0]) / turn[1]
            begins[grid] = (lon + 180) % 360 - 180
    return begins


def at_begin(lonlat: NDArray[np.object_], begin: float) -> NDArray[np.object_]:
    """Polygons in degrees whose vertices next to the meridian at which their grid begins lie on it."""

    def snapped(points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        lons, lats = points_N2.T
        exact = begin + 360 * np.rint((lons - begin) / 360)
        return np.stack([np.where(np.abs(lons - exact) < _EXACT, exact, lons), lats], axis=1)

    moved: NDArray[np.object_] = shapely.transform(lonlat, snapped)
    return moved


def _edges_at(polygon: BaseGeometry, begin: float) -> list[_Edge]:
    """The pieces of the meridian at which its grid begins along which a polygon lies."""
    lons = shapely.get_coordinates(polygon)[:, 0]
    if (np.abs((lons - begin + 180) % 360 - 180) > _EXACT).all():
        return []
    # The interior lies left of a ring that runs counterclockwise: west of an edge that runs north.
    parts = [orient(part) for part in polygons_in(polygon)]
    points, ring = shapely.get_coordinates(shapely.get_rings(parts), return_index=True)
    on = np.abs((points[:, 0] - begin + 180) % 360 - 180) < _EXACT
    both = on[:-1] & on[1:] & (ring[1:] == ring[:-1])
    ends = np.stack([points[:-1, 1], points[1:, 1]], axis=1)[both]
    return [(_TURN, int(high < low), min(low, high), max(low, high)) for low, high in ends.tolist() if low != high]


def edges(polygon: BaseGeometry, grid: Grid, begins: Begins) -> list[_Edge]:
    """The pieces of the grid's seams along which a polygon of `cut` lies; none without seams."""
    if grid in begins:
        return _edges_at(polygon, begins[grid])
    if not (ground := grid.ground) or shapely.contains_properly(shapely.box(*ground), polygon):
        return []
    points, ring = shapely.get_coordinates(shapely.get_rings(polygon), return_index=True)
    same = ring[1:] == ring[:-1]
    start, end = points[:-1][same], points[1:][same]
    pieces = []
    for side, axis, value in ((1, 0, ground[0]), (0, 0, ground[2]), (1, 1, ground[1]), (0, 1, ground[3])):
        on = (start[:, axis] == value) & (end[:, axis] == value)
        if axis == 1 and value != 0:  # the poles are not seams
            continue
        # The antimeridian is one seam, at 180 E and 180 W.
        seam = round(value) % 360 if axis == 0 else 1000
        for low, high in np.sort(np.stack([start[on, 1 - axis], end[on, 1 - axis]], axis=1), axis=1).tolist():
            pieces.append((seam, side, low, high))
    return pieces


def touching(edges_of: Sequence[tuple[int, object, Sequence[_Edge]]]) -> Iterator[tuple[int, int, float, float]]:
    """Pairs of polygons on two sides of a seam, and where along it they touch.

    Args:
        edges_of: (number of the polygon, its kind, its `edges`); only polygons of one kind touch.

    Yields:
        (number on the west or south side, number on the other, from, to in degrees).
    """
    sides: dict[tuple[int, object], tuple[list[tuple[float, float, int]], list[tuple[float, float, int]]]] = {}
    for number, kind, pieces in edges_of:
        for seam, side, low, high in pieces:
            sides.setdefault((seam, kind), ([], []))[side].append((low, high, number))
    for one, other in sides.values():
        one.sort()
        other.sort()
        first = 0
        for low, high, number in one:
            # Edges of one side do not overlap, so those that end before this one begins are past for all that follow.
            while first < len(other) and other[first][1] <= low + _EXACT:
                first += 1
            for begin, end, neighbour in other[first:]:
                if begin >= high - _EXACT:
                    break
                yield number, neighbour, max(low, begin), min(high, end)
