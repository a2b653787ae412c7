"""Geometries in longitude and latitude, cut where they cross the antimeridian (RFC 7946, section 3.1.9)."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import antimeridian
import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.crs import CoordinateOperation, ProjectedCRS
from pyproj.crs.coordinate_operation import EquidistantCylindricalConversion
from pyproj.exceptions import ProjError
from shapely.affinity import translate
from shapely.errors import TopologicalError
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from rayseg.geo.grid import Bounds

Project = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(N, 2) coordinates of a CRS -> (N, 2) longitudes and latitudes in degrees."""
LONLAT = "EPSG:4326"
_STEPS = 32
PAST_POLES = 1.3
"""Degrees by which rasters may reach beyond a pole: half a pixel of 2.5 degrees, registered on centres."""
_WIDEST = 270.0  # degrees of longitude of a ring that has long edges and does not cross
_BENT = 0.03
_MOST_PARTS = 4096  # of one edge
_DISKS = ("Orthographic", "Geostationary", "Vertical Perspective", "PROJ tpers")
_CURVED = 720  # vertices of an edge as long as the Earth is wide
_LIMB = 7200  # vertices of the edge of a disk
_BESIDE = (1 - 1e-7, 1 + 1e-7, 1 - 1e-6, 1 + 1e-6, 1 - 1e-5, 1 + 1e-5, 1 - 1e-4, 1 + 1e-4)
_OFF = 1e-7  # degrees from the meridian at which a plane ends, where it has two places
_CYLINDRICAL = ("Mercator", "Cylindrical", "Plate Carr", "Miller")
_SHORT = 90.0  # degrees of longitude, far less than half a turn


def to_lonlat(polygons: NDArray[np.object_], crs: str) -> NDArray[np.object_]:
    """Project polygons to EPSG:4326; those that cross the antimeridian become multipolygons with an edge on it.

    A ring crosses where the longitude jumps by more than half a turn between neighbouring vertices. How wide a polygon
    is decides nothing: one around the world does not cross. Long edges jump too, so a ring that jumps is projected
    again with more vertices before it counts. What lies beyond the edge of the Earth (`earth_on`) is left out; a
    polygon that lies there as a whole becomes empty.

    Args:
        polygons: polygons and multipolygons with y upward.
        crs: their CRS, EPSG code or WKT.

    Raises:
        TopologicalError: PROJ places a vertex nowhere.
    """
    project = partial(_degrees_of, crs)
    polygons = _off_poles(bent(_on_earth(polygons, crs), crs), project)
    lonlat: NDArray[np.object_] = shapely.transform(polygons, project)
    if lobes_of(crs):  # longitudes count from the edge of the plane, so that no ring crosses
        for at in np.flatnonzero(jumps(lonlat)).tolist():
            pieces: list[Any] = [piece for part in polygons_in(lonlat[at]) for piece in _turned_back(part)]
            lonlat[at] = divided(shapely.MultiPolygon(pieces) if len(pieces) != 1 else pieces[0])
        return lonlat
    for position in np.flatnonzero(jumps(lonlat)):
        parts = polygons_in(polygons[position])
        if earth_on(crs) is None:  # else its vertices are close already
            points, ring = shapely.get_coordinates(shapely.get_rings(parts), return_index=True)
            # 32 steps per longest edge: half a turn between two of them then is a real crossing.
            longest = np.abs(np.diff(points, axis=0))[ring[1:] == ring[:-1]].max()
            parts = shapely.segmentize(parts, longest / _STEPS)
        # The interior lies left of a ring that runs counterclockwise, also where it encloses a pole.
        moved = shapely.transform(np.array([orient(part) for part in parts], object), project)
        if jumps(moved).any():
            lonlat[position] = _in_world(moved)
    return lonlat


def _degrees_of(crs: str, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 2) coordinates of a CRS -> longitudes and latitudes; longitudes count from the edge of a map of the world.

    Raises:
        TopologicalError: PROJ places a point nowhere.
    """
    degrees, earth, lobes = transformer(crs, LONLAT), earth_on(crs), lobes_of(crs)
    lonlat_N2 = np.stack(degrees.transform(*points_N2.T), axis=1)
    lost = ~np.isfinite(lonlat_N2).all(axis=1)
    if lost.any() and earth is not None:
        center = np.array(earth.centroid.coords[0])
        for factor in _BESIDE:  # some inverses do not converge at single points next to the edge
            lonlat_N2[lost] = np.stack(degrees.transform(*(center + (points_N2[lost] - center) * factor).T), axis=1)
            lost = ~np.isfinite(lonlat_N2).all(axis=1)
    # PROJ gives an error or infinity, depending on the operation and on what ran before.
    if lost.any():
        raise TopologicalError("a vertex lies beyond the edge of the Earth")
    lon_N, lat_N = lonlat_N2.T
    if lobes:
        lon_N = (lon_N - lobes[0][0]) % 360 + lobes[0][0]
    else:  # by rounding a little beyond 180
        lon_N = np.where(np.abs(lon_N) < 180 + 1e-9, np.clip(lon_N, -180, 180), lon_N)
    return np.stack([lon_N, up_to_poles(lat_N)], axis=1)


def _on_earth(polygons: NDArray[np.object_], crs: str) -> NDArray[np.object_]:
    """The parts of polygons on the Earth, with vertices so close that edges follow their curves there."""
    if (earth := earth_on(crs)) is None or not len(polygons):
        return polygons
    west, _, east, _ = earth.bounds
    kept: NDArray[np.object_] = shapely.segmentize(polygons, (east - west) / _CURVED)
    for at in np.flatnonzero(~shapely.contains_properly(earth, kept)):
        near = shapely.clip_by_rect(earth, *shapely.box(*kept[at].bounds).buffer((east - west) / _CURVED).bounds)
        parts = polygons_in(kept[at].intersection(near))
        kept[at] = parts[0] if len(parts) == 1 else shapely.MultiPolygon(list(parts))
    return kept


def bent(polygons: NDArray[np.object_], crs: str) -> NDArray[np.object_]:
    """Polygons in a projected CRS whose edges follow their curves in degrees, also around a pole.

    An edge longer than `_BENT` of its distance to a pole is divided: straight in degrees it would leave out or add up
    to a tenth of the polygon.
    """
    if geographic(crs) or _edge_of(crs) is not None or not len(polygons):  # only planes around a pole
        return polygons
    for lat in (90.0, -90.0):
        pole, other = np.stack(transformer(LONLAT, crs).transform([0.0, 90.0], [lat, lat]), axis=1)
        # On some planes it is an edge, on others nowhere.
        if not (np.isfinite(pole).all() and np.allclose(pole, other, atol=1e-3)):
            continue
        west, south, east, north = shapely.bounds(polygons).T
        longest = np.maximum(east - west, north - south)
        beside = np.maximum(np.maximum(west - pole[0], pole[0] - east), np.maximum(south - pole[1], pole[1] - north))
        near = np.flatnonzero(longest > _BENT * beside)  # few, and slower to decide
        away = shapely.distance(shapely.boundary(polygons[near]), shapely.Point(pole))
        for at in near[longest[near] > _BENT * away]:
            parts = [
                shapely.Polygon(_divided(part.exterior, pole), [_divided(ring, pole) for ring in part.interiors])
                for part in polygons_in(polygons[at])
            ]
            polygons = polygons.copy()
            polygons[at] = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    return polygons


def _divided(ring: BaseGeometry, pole: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vertices of a ring with further ones along edges that are long for their distance to a pole."""
    points_N2 = shapely.get_coordinates(ring)
    steps_N2 = np.diff(points_N2, axis=0)
    lengths = np.maximum(np.hypot(*steps_N2.T), 1e-9)
    nearest = np.clip(((pole - points_N2[:-1]) * steps_N2).sum(axis=1) / lengths**2, 0, 1)
    away = np.hypot(*(points_N2[:-1] + nearest[:, None] * steps_N2 - pole).T)
    counts = np.clip(np.ceil(lengths / np.maximum(_BENT * away, 1e-9)), 1, _MOST_PARTS).astype(int)
    shares = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) / np.repeat(counts, counts)
    inner = np.repeat(points_N2[:-1], counts, axis=0) + shares[:, None] * np.repeat(steps_N2, counts, axis=0)
    return np.concatenate([inner, points_N2[-1:]])


def up_to_poles(lat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Latitudes in degrees, those a little beyond a pole (`PAST_POLES`) at the pole."""
    return np.where(np.abs(lat) < 90 + PAST_POLES, np.clip(lat, -90, 90), lat)


def on_earth(box: Bounds) -> bool:
    """Whether (west, south, east, north) are degrees, up to a turn beyond 180; those of an empty geometry are not."""
    west, south, east, north = box
    return min(west, east) >= -540 and max(west, east) <= 540 and max(-south, north) < 90 + PAST_POLES


def _off_poles(polygons: NDArray[np.object_], project: Project) -> NDArray[np.object_]:
    """The polygons with a small arc around a pole in place of a vertex there, which has no longitude of its own.

    A polygon in degrees has an edge there, and stays.
    """
    points, owner = shapely.get_coordinates(polygons, return_index=True)
    at_pole = np.abs(project(points)[:, 1]) > 90 - 1e-9
    if not at_pole.any():
        return polygons
    moved = polygons.copy()
    for position in np.unique(owner[at_pole]):
        poles_N2 = np.unique(points[at_pole & (owner == position)].round(6), axis=0)
        if len(poles_N2) == 1:
            parts = [orient(part) for part in polygons_in(polygons[position])]
            radius = 1e-6 * math.sqrt(shapely.area(polygons[position]))
            rings = [[_around_pole(ring, poles_N2[0], radius) for ring in shapely.get_rings(part)] for part in parts]
            parts = [shapely.Polygon(outer, inner) for outer, *inner in rings]
            moved[position] = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    return moved


def _around_pole(ring: BaseGeometry, pole: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """A ring, whose interior lies on its left, with an arc of a radius in place of its vertex at a pole."""
    points_N2 = shapely.get_coordinates(ring)[:-1]
    away_N = np.hypot(*(points_N2 - pole).T)
    if away_N.min() > 1e-5:
        return points_N2
    # Without vertices within the arc, which `bent` may have added.
    rolled = np.roll(np.arange(len(points_N2)), -int(away_N.argmin()))
    others_N2 = points_N2[rolled][away_N[rolled] > 2 * radius]
    before, after = (np.arctan2(*(others_N2[end] - pole)[::-1]) for end in (-1, 0))
    turns = after + (before - after) % (2 * np.pi) * np.array([1, 0.5, 0])
    return np.concatenate([pole + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1), others_N2])


def normalised(area: BaseGeometry, *, wound: bool = False) -> BaseGeometry:
    """A geometry in degrees as others wrote it, within -180..180 and cut at the antimeridian.

    A ring crosses where the longitude jumps by more than half a turn between neighbouring vertices, and where it
    leaves -180..180. Lines and points stay as they are.

    Args:
        area: the geometry.
        wound: an outer ring that jumps does not cross, but has long edges, which are divided, if it runs
            counterclockwise on the flat map (RFC 7946, section 3.1.6: one that crosses runs clockwise there) and is up
            to 270 degrees wide; wider ones are taken for crossing rings of the wrong direction, which are common.
    """
    flat = shapely.force_2d(area)
    return _in_world(polygons_in(flat), wound=wound) if jumps(np.array([flat], object))[0] else flat


def divided(area: BaseGeometry) -> BaseGeometry:
    """A geometry within -180..180 with vertices so close that no edge is taken for one across the antimeridian."""
    long = "Polygon" in area.geom_type and jumps(np.array([area], object))[0]
    parted: BaseGeometry = shapely.segmentize(area, _SHORT) if long else area
    return parted


def of_file(polygons: NDArray[np.object_], crs: str) -> NDArray[np.object_]:
    """Polygons as files of any CRS hold them, in EPSG:4326, within -180..180 and cut at the antimeridian.

    In degrees, of whichever datum and meridian, rings are read as `normalised` reads them with `wound`.
    """
    found, degrees = CRS.from_user_input(crs), transformer(crs, LONLAT)
    if not found.is_geographic or found.is_derived:
        return to_lonlat(polygons, crs)
    meridian, unit = found.prime_meridian, math.degrees(found.axis_info[0].unit_conversion_factor)
    east = math.degrees(meridian.longitude * meridian.unit_conversion_factor) if meridian else 0.0

    def moved(points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        # PROJ wraps longitudes for some datums only: each vertex stays on the turn on which it is.
        lon, lat = degrees.transform(*points_N2.T / unit)
        return np.stack([lon + 360 * np.rint((points_N2[:, 0] + east - lon) / 360), lat], axis=1)

    # Cut as the file counts, before vertices leave its turn.
    cut = [normalised(area, wound=True) for area in shapely.transform(polygons, lambda points_N2: points_N2 * unit)]
    return np.array([normalised(area) for area in shapely.transform(np.array(cut, object), moved)], object)


def _in_world(polygons: NDArray[np.object_], *, wound: bool = False) -> BaseGeometry:
    """Polygons in degrees as one geometry within -180..180; `wound` as in `normalised`."""
    west, _, east, _ = shapely.bounds(polygons).T
    beyond = (west < -180) | (east > 180)  # their vertices are in one row, so a long edge is only long
    crossing = jumps(polygons) & ~beyond
    if wound:
        crossing &= ~shapely.is_ccw(shapely.get_exterior_ring(polygons)) | (east - west > _WIDEST)
    kept: list[Any] = [divided(part) for part in polygons[~beyond & ~crossing]]
    pieces = [*kept, *(piece for part in polygons[beyond] for piece in _turned_back(part))]
    pieces += _cut(polygons[crossing])
    whole: BaseGeometry = shapely.MultiPolygon(pieces) if len(pieces) > 1 else pieces[0]
    # Pieces of a ring of 0..360 degrees share an edge on the prime meridian.
    return whole if whole.is_valid else shapely.union_all(pieces)


def _turned_back(polygon: BaseGeometry) -> list[BaseGeometry]:
    """The parts of a polygon that leaves -180..180, turned back by whole turns."""
    west, south, east, north = polygon.bounds
    turns = np.arange((west + 180) // 360, -((180 - east) // 360) + 1)
    cut = [translate(polygon, -360.0 * turn).intersection(shapely.box(-180.0, south, 180.0, north)) for turn in turns]
    return list(polygons_in(shapely.GeometryCollection(cut)))


def _cut(polygons: NDArray[np.object_]) -> list[BaseGeometry]:
    """The parts of polygons that cross the antimeridian, with edges on it."""
    try:
        cut = [antimeridian.fix_polygon(_wound(part), fix_winding=True, great_circle=False) for part in polygons]
    except (ValueError, RecursionError) as error:  # what it raises for a ring that crosses itself
        raise TopologicalError(str(error)) from error
    return [piece for part in cut for piece in shapely.get_parts(part)]


def _wound(polygon: Any) -> shapely.Polygon:  # noqa: ANN401 - shapely's arrays are of objects
    """The polygon with an outer ring that runs counterclockwise on Earth, and holes that run clockwise.

    Of an outer ring of the other direction `antimeridian` fills the holes that cross. Rings around a pole stay.
    """
    rings = []
    for number, ring in enumerate((polygon.exterior, *polygon.interiors)):
        points_N2 = shapely.get_coordinates(ring)
        turned_N2 = np.stack([np.unwrap(points_N2[:, 0], period=360), points_N2[:, 1]], axis=1)
        closed = abs(turned_N2[-1, 0] - turned_N2[0, 0]) < 180
        right = not closed or shapely.is_ccw(shapely.linearrings(turned_N2)) == (number == 0)
        rings.append(points_N2 if right else points_N2[::-1])
    return shapely.Polygon(rings[0], rings[1:])


def valid(areas: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons as others drew them, valid: ground that two parts of one share belongs to it, holes do not."""
    # GEOS's older method takes ground that two parts of a multipolygon share for a hole.
    made: NDArray[np.object_] = shapely.make_valid(areas, method="structure", keep_collapsed=False)
    return made


def sound(area: BaseGeometry) -> BaseGeometry:
    """A geometry as it is, which overlays can take.

    Raises:
        TopologicalError: it is empty, is not finite, has no area, or crosses itself.
    """
    if area.is_empty or not area.is_valid:
        raise TopologicalError(shapely.is_valid_reason(area))
    return area


def within(area: BaseGeometry, near: Bounds) -> BaseGeometry:
    """Clip a geometry to a box whose longitudes may exceed 180; there the geometry is shifted by 360 degrees.

    Its vertices stay as they are.
    """
    box, pieces = shapely.segmentize(shapely.box(*near), 1.0), []  # its edges may become curves
    for turn in range(int((near[0] - 180) // 360) + 1, int(-((-180 - near[2]) // 360))):
        moved = translate(area, 360.0 * turn) if turn else area
        pieces.append(moved if box.contains(moved) else moved.intersection(box))
    return pieces[0] if len(pieces) == 1 else shapely.union_all(pieces)


def from_lonlat(area: BaseGeometry, crs: str) -> BaseGeometry:
    """Project a geometry in degrees, whose longitudes may lie beyond 180; a geographic CRS of another datum keeps them.

    It is cut where the plane of the CRS ends, as on both sides of 180 degrees in Web Mercator.
    """

    def project(points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = transformer(LONLAT, crs).transform(*points_N2.T)
        return np.stack([x + 360 * np.rint((points_N2[:, 0] - x) / 360) if geographic(crs) else x, y], axis=1)

    edge, (west, _, east, _) = _edge_of(crs), area.bounds
    if edge is None or area.is_empty:
        return shapely.transform(area, project)
    turns = np.arange((west - edge) // 360, -((edge - east) // 360))
    lobes = lobes_of(crs)
    if len(turns) < 2 and len(lobes) < 2:
        return shapely.transform(area, project)
    # A hair's breadth off the edge, where a point has two places.
    boxes = [
        shapely.box(left + 360 * (turn + 1) + 1e-9, south, right + 360 * (turn + 1) - 1e-9, north)
        for turn in turns
        for left, south, right, north in lobes or ((edge - 360, -90.0, edge, 90.0),)
    ]
    parts = shapely.GeometryCollection([area.intersection(box) for box in boxes])
    return shapely.MultiPolygon(list(polygons_in(shapely.transform(parts, project))))


@lru_cache(maxsize=256)
def _edge_of(crs: str) -> float | None:
    """The longitude at which the plane of a projected CRS ends on both sides; None of others and of degrees."""
    system = CRS.from_user_input(crs)
    operation, meridian = system.coordinate_operation, system.prime_meridian
    if system.is_geographic or operation is None or (meridian is not None and meridian.longitude != 0):
        return None
    if (middle := _middle_of(operation, "Longitude", "lon_0")) is None:
        return None
    # There a place has two points. On azimuthal, transverse and oblique planes it has one, or none.
    edge, lats = middle + 180, np.array([-45.0, 45.0])
    one, other = (transformer(LONLAT, crs).transform([edge + side] * 2, lats) for side in (_OFF - 360, -_OFF))
    apart = np.hypot(*np.subtract(one, other)) if np.isfinite([one, other]).all() else np.zeros(2)
    unit = system.axis_info[0].unit_conversion_factor
    return edge if apart.min() * unit > 1000 else None


def _middle_of(operation: CoordinateOperation, name: str, short: str) -> float | None:
    """The longitude or latitude in degrees of a projection's middle; None where it names none.

    Projections that are PROJ's alone have its short names, and 0 by default.
    """
    named = (row for row in operation.params if row.name.startswith(f"{name} of") or row.name == short)
    return next((float(row.value) for row in named), 0.0 if operation.method_name.startswith("PROJ ") else None)


@lru_cache(maxsize=256)
def lobes_of(crs: str) -> tuple[Bounds, ...]:
    """(west, south, east, north) in degrees of the parts of a plane with an edge around a map of the world; else ().

    There is one, or several of an interrupted projection. Longitudes run from the edge of the plane to the east.
    """
    if (edge := _edge_of(crs)) is None or turn_of(crs) is not None:
        return ()
    # Other planes, as Cassini's, overlap themselves far from their middle.
    lons, lats = np.meshgrid(edge - 360 + np.arange(10.0, 360, 20), np.arange(-75.0, 90, 25))
    try:
        back = np.stack(transformer(crs, LONLAT).transform(*transformer(LONLAT, crs).transform(lons, lats)))
    except ProjError:  # it has no inverse
        return ()
    away = np.where(np.isfinite(back), back, np.nan) - (lons, lats)
    if not (np.abs((away + 180) % 360 - 180) < 0.01).all():
        return ()
    ends, lons = [], edge - 360 + np.arange(0.25, 360, 0.5)
    for lat in (-60.0, 60.0, -15.0, 15.0):
        points_N2 = np.stack(transformer(LONLAT, crs).transform(lons, np.full(len(lons), lat)), axis=1)
        steps = np.hypot(*np.diff(points_N2, axis=0).T)
        breaks = (lons[:-1] + 0.25)[steps > 3 * np.median(steps)]
        ends.append([edge - 360, *breaks.tolist(), edge])
    if [len(end) for end in ends[:2]] != [len(end) for end in ends[2:]]:  # gaps that end before the equator
        return ()
    ends = ends[:2]
    pole = 90 - 1e-3  # closer to it, both ends of a parallel are one point for PROJ
    if len(ends[0]) == len(ends[1]) == 2:
        return ((edge - 360, -pole, edge, pole),)
    sides = zip(ends, ((-pole, 0.0), (0.0, pole)), strict=True)
    return tuple((west, south, east, north) for lons, (south, north) in sides for west, east in pairwise(lons))


@lru_cache(maxsize=64)
def earth_on(crs: str) -> BaseGeometry | None:
    """The whole Earth, or the side of it that is seen, on the plane of a CRS; None where the plane has no such edge."""
    system, lobes = CRS.from_user_input(crs), lobes_of(crs)
    method = system.coordinate_operation.method_name if system.coordinate_operation else ""
    if lobes:
        boxes = [shapely.box(west + _OFF, south, east - _OFF, north) for west, south, east, north in lobes]
        forward = transformer(LONLAT, crs).transform
        if not np.isfinite(forward([lobes[0][0] + 180] * 2, [-90.0, 90.0])).all():  # as on conformal cones
            return None
        rings = shapely.transform(shapely.segmentize(boxes, 0.1), lambda points_N2: np.stack(forward(*points_N2.T), 1))
        earth = shapely.union_all(shapely.make_valid(rings))
    elif any(name in method for name in _DISKS):
        earth = _disk(crs)
    else:
        return None
    shapely.prepare(earth)
    return earth


def _disk(crs: str) -> shapely.Polygon:
    """The side of the Earth that is seen from a point, on the plane of a perspective CRS."""
    operation = CRS.from_user_input(crs).coordinate_operation
    names = (("Longitude", "lon_0"), ("Latitude", "lat_0"))
    lon, lat = ((operation and _middle_of(operation, *name)) or 0.0 for name in names)
    center = np.array(transformer(LONLAT, crs).transform(lon, lat))
    turns = np.linspace(0, 2 * np.pi, _LIMB, endpoint=False)
    ways_N2 = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    # Bisection: where its inverse ends, a projection has no formula in common with others.
    inside, outside = np.zeros(_LIMB), np.full(_LIMB, 1e8)
    for _ in range(60):
        middle = (inside + outside) / 2
        seen = np.isfinite(transformer(crs, LONLAT).transform(*(center + ways_N2 * middle[:, None]).T)).all(axis=0)
        inside, outside = np.where(seen, middle, inside), np.where(seen, outside, middle)
    # A hair's breadth inside, where PROJ finds the way back.
    return shapely.Polygon(center + ways_N2 * inside[:, None] * (1 - 1e-9))


@lru_cache(maxsize=256)
def turn_of(crs: str) -> tuple[float, float] | None:
    """(x of longitude 0, x per degree of longitude) where x counts turns around the Earth; None in other planes."""
    system, edge = CRS.from_user_input(crs), _edge_of(crs)
    if system.is_bound:  # its shift to another datum would be lost
        return None
    if geographic(crs):
        return 0.0, 1.0
    method = system.coordinate_operation.method_name if system.coordinate_operation else ""
    turned = "Transverse" in method or "Oblique" in method  # about another axis than the Earth's
    if edge is None or turned or not any(name in method for name in _CYLINDRICAL):
        return None
    # Of two places in the plane, because projections have several constants that scale x.
    lons, base = (edge - 270, edge - 90), system.geodetic_crs
    (left, right), _ = transformer(base.to_2d().to_wkt() if base else LONLAT, crs).transform(lons, (0.0, 0.0))
    step = (right - left) / 180
    return left - lons[0] * step, step


@lru_cache(maxsize=256)
def around(crs: str, lon: float) -> tuple[str, Affine] | None:
    """A plane of the same datum that is continuous within half a turn of a longitude, and the affine to it.

    Transformations to degrees and cylindrical projections jump where a turn ends: of what lies on both sides of it, and
    of what lies beyond it, one is lost.

    Returns:
        WKT and affine from (x, y) of `crs`, which may be beyond its turn; None if x does not count turns.
    """
    if (turn := turn_of(crs)) is None:
        return None
    system = CRS.from_user_input(crs)
    if not geographic(crs):
        row = system.to_2d().to_json_dict()
        row = {key: value for key, value in row.items() if key != "id"} | {"name": "plane"}  # GDAL goes by both
        [middle] = [value for value in row["conversion"]["parameters"] if value["name"].startswith("Longitude of")]
        east, middle["value"] = lon - middle["value"], lon
        return CRS.from_json_dict(row).to_wkt(), Affine.translation(-east * turn[1], 0)
    # Degrees are those of the Equidistant Cylindrical projection on the equator, but for a factor.
    plane = ProjectedCRS(EquidistantCylindricalConversion(longitude_natural_origin=lon), geodetic_crs=system.to_2d())
    metres = math.radians(system.ellipsoid.semi_major_metre)
    return plane.to_wkt(), Affine.scale(metres) @ Affine.translation(-lon, 0)


@lru_cache(maxsize=256)
def transformer(source: str, target: str) -> Transformer:
    """From one CRS (EPSG code or WKT) to another, x (longitude) first, made once."""
    return Transformer.from_crs(source, target, always_xy=True)


@lru_cache(maxsize=256)
def geographic(crs: str) -> bool:
    """Whether coordinates of a CRS are degrees of longitude from Greenwich and of latitude.

    They are not in grads, from Paris, or around another pole.
    """
    system = CRS.from_user_input(crs)
    if not system.is_geographic or system.is_derived:
        return False
    meridian = system.prime_meridian
    # ESRI writes "Degree".
    return system.axis_info[0].unit_name.lower() == "degree" and (meridian is None or meridian.longitude == 0)


def polygons_in(area: BaseGeometry) -> NDArray[np.object_]:
    """The polygons of a geometry, without the lines and points that an overlay leaves."""
    parts = shapely.get_parts(shapely.get_parts(area))
    polygons: NDArray[np.object_] = parts[shapely.get_dimensions(parts) == 2]
    return polygons


def box_of(bbox: Sequence[float]) -> Bounds:
    """(west, south, east, north) or (left, bottom, right, top) of a box of four or, with heights, six numbers."""
    # With heights the box is (west, south, bottom, east, north, top).
    half = len(bbox) // 2
    west, south, east, north = (float(value) for value in (*bbox[:2], *bbox[half : half + 2]))
    return west, south, east, north


def jumps(lonlat: NDArray[np.object_]) -> NDArray[np.bool_]:
    """(N,) bool: geometries that leave -180..180, or whose longitude jumps between neighbouring vertices."""
    parts, of_whole = shapely.get_parts(lonlat, return_index=True)  # rings are of polygons alone
    members, of_part = shapely.get_parts(parts, return_index=True)
    rings, owner = shapely.get_rings(members, return_index=True)
    owner = of_whole[of_part[owner]]
    points, ring = shapely.get_coordinates(rings, return_index=True)
    steps = np.abs(np.diff(points[:, 0]))
    jumping = (ring[1:] == ring[:-1]) & (steps > 180) & (steps != 360)  # 360: from one edge of the world to the other
    jumps_N = np.zeros(len(lonlat), bool)
    jumps_N[owner[ring[1:][jumping]]] = True
    jumps_N[owner[ring[np.abs(points[:, 0]) > 180 + 1e-9]]] = True
    return jumps_N


def bounds_of(lonlat: BaseGeometry) -> tuple[float, float, float, float]:
    """(west, south, east, north); west > east where the geometry is cut at the antimeridian (RFC 7946, section 5.2)."""
    west, south, east, north = lonlat.bounds
    parts = [part.bounds for part in shapely.get_parts(lonlat)]
    # Parts east and west of the antimeridian: the box then runs over it, not around the world.
    if len(parts) > 1 and east - west > 180:
        left = min((part[0] for part in parts if part[0] + part[2] > 0), default=west)
        right = max((part[2] for part in parts if part[0] + part[2] < 0), default=east)
        if left > right + 1e-6:  # else they go around the world
            west, east = left, right
    return west, south, east, north
