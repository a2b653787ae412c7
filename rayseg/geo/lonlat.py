"""Geometries in longitude and latitude, cut where they cross the antimeridian (RFC 7946, section 3.1.9)."""

from collections.abc import Callable

import antimeridian
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

Project = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(N, 2) coordinates of a CRS -> (N, 2) longitudes and latitudes in degrees."""
_STEPS = 32


def to_lonlat(polygons: NDArray[np.object_], project: Project) -> NDArray[np.object_]:
    """Project polygons to EPSG:4326; those that cross the antimeridian become multipolygons with an edge on it.

    A ring crosses where the longitude jumps by more than half a turn between neighbouring vertices. How wide a polygon
    is decides nothing: one around the world does not cross. Long edges jump too, so a ring that jumps is projected
    again with more vertices before it counts.

    Args:
        polygons: polygons and multipolygons with y upward.
        project: from their CRS.
    """
    lonlat: NDArray[np.object_] = shapely.transform(polygons, project)
    for position in np.flatnonzero(jumps(lonlat)):
        points, ring = shapely.get_coordinates(shapely.get_rings(polygons[position]), return_index=True)
        longest = np.abs(np.diff(points, axis=0))[ring[1:] == ring[:-1]].max()
        parts = shapely.get_parts(shapely.segmentize(polygons[position], longest / _STEPS))
        # The interior lies left of a ring that runs counterclockwise, also where it encloses a pole.
        moved = shapely.transform(np.array([orient(part) for part in parts], object), project)
        if jumps(moved).any():
            cut = [antimeridian.fix_polygon(part, fix_winding=True, great_circle=False) for part in moved]
            pieces = [piece for part in cut for piece in shapely.get_parts(part)]
            whole = shapely.MultiPolygon(pieces) if len(pieces) > 1 else pieces[0]
            # Pieces of a ring of 0..360 degrees share an edge on the prime meridian.
            lonlat[position] = whole if whole.is_valid else shapely.union_all(pieces)
    return lonlat


def jumps(lonlat: NDArray[np.object_]) -> NDArray[np.bool_]:
    """(N,) bool: geometries that leave -180..180, or whose longitude jumps between neighbouring vertices."""
    rings, owner = shapely.get_rings(lonlat, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    steps = np.abs(np.diff(points[:, 0]))
    jumping = (ring[1:] == ring[:-1]) & (steps > 180) & (steps != 360)  # 360: from one edge of the world to the other
    found = np.zeros(len(lonlat), bool)
    found[owner[ring[1:][jumping]]] = True
    found[owner[ring[np.abs(points[:, 0]) > 180 + 1e-9]]] = True
    return found


def bounds_of(lonlat: BaseGeometry) -> tuple[float, float, float, float]:
    """(west, south, east, north); west > east where the geometry is cut at the antimeridian (RFC 7946, section 5.2)."""
    west, south, east, north = lonlat.bounds
    parts = [part.bounds for part in shapely.get_parts(lonlat)]
    if len(parts) > 1 and east - west > 180:
        west = min(part[0] for part in parts if part[0] + part[2] > 0)
        east = max(part[2] for part in parts if part[0] + part[2] < 0)
    return west, south, east, north
