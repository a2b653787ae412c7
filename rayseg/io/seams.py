"""The seams between UTM zones that divide the ground: polygons end on them, and are joined across them.

Pixels of two zones do not fit together. So a polygon of a zone is drawn a pixel beyond its seam and cut there. The
polygons on both sides then have edges along the same line, and those whose edges share a piece of it are one.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from rayseg.geo.grid import Grid
from rayseg.geo.lonlat import polygons_in

_EXACT = 1e-9  # degrees; closer vertices lie on a seam
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


def edges(polygon: BaseGeometry, grid: Grid) -> list[_Edge]:
    """The pieces of the grid's seams along which a polygon of `cut` lies; none without seams."""
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
