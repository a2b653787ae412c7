"""Geometries in longitude and latitude, cut where they cross the antimeridian (RFC 7946, section 3.1.9)."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import antimeridian
import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.crs import ProjectedCRS
from pyproj.crs.coordinate_operation import EquidistantCylindricalConversion
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
_AZIMUTHAL = ("Stereographic", "Azimuthal", "Orthographic", "Gnomonic", "Perspective", "Geostationary")
_BENT = 0.03
_MOST_PARTS = 4096  # of one edge
_CYLINDRICAL = ("Mercator", "Cylindrical", "Plate Carr", "Miller")
_SHORT = 90.0  # degrees of longitude, far less than half a turn


def to_lonlat(polygons: NDArray[np.object_], to_degrees: Project) -> NDArray[np.object_]:
    """Project polygons to EPSG:4326; those that cross the antimeridian become multipolygons with an edge on it.

    A ring crosses where the longitude jumps by more than half a turn between neighbouring vertices. How wide a polygon
    is decides nothing: one around the world does not cross. Long edges jump too, so a ring that jumps is projected
    again with more vertices before it counts.

    Args:
        polygons: polygons and multipolygons with y upward.
        to_degrees: from their CRS.
    """

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        lon, lat = to_degrees(points).T
        return np.stack([lon, up_to_poles(lat)], axis=1)

    polygons = _off_poles(polygons, project)
    lonlat: NDArray[np.object_] = shapely.transform(polygons, project)
    for position in np.flatnonzero(jumps(lonlat)):
        parts = polygons_in(polygons[position])
        points, ring = shapely.get_coordinates(shapely.get_rings(parts), return_index=True)
        # 32 steps per longest edge: half a turn between two of them then is a real crossing.
        longest = np.abs(np.diff(points, axis=0))[ring[1:] == ring[:-1]].max()
        parts = shapely.segmentize(parts, longest / _STEPS)
        # The interior lies left of a ring that runs counterclockwise, also where it encloses a pole.
        moved = shapely.transform(np.array([orient(part) for part in parts], object), project)
        if jumps(moved).any():
            lonlat[position] = _in_world(moved)
    return lonlat


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
        away = shapely.distance(shapely.boundary(polygons), shapely.Point(pole))
        for at in np.flatnonzero(np.maximum(east - west, north - south) > _BENT * away):
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
    """The polygons, a millionth smaller where one has a vertex at a pole, which has no longitude of its own.

    A polygon in degrees has an edge there, and stays.
    """
    points, owner = shapely.get_coordinates(polygons, return_index=True)
    at_pole = np.abs(project(points)[:, 1]) > 90 - 1e-9
    if not at_pole.any():
        return polygons
    moved = polygons.copy()
    for position in np.unique(owner[at_pole]):
        if len(np.unique(points[at_pole & (owner == position)].round(6), axis=0)) == 1:
            side = np.sqrt(shapely.area(polygons[position]))
            moved[position] = shapely.buffer(polygons[position], -1e-6 * side, join_style="mitre")
    return moved


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
        return to_lonlat(bent(polygons, crs), lambda points_N2: np.stack(degrees.transform(*points_N2.T), axis=1))
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
        cut = [antimeridian.fix_polygon(part, fix_winding=True, great_circle=False) for part in polygons]
    except (ValueError, RecursionError) as error:  # what it raises for a ring that crosses itself
        raise TopologicalError(str(error)) from error
    return [piece for part in cut for piece in shapely.get_parts(part)]


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
    if edge is None or area.is_empty or len(turns := np.arange((west - edge) // 360, -((edge - east) // 360))) < 2:
        return shapely.transform(area, project)
    # A hair's breadth off the edge, where a point has two places.
    sides = [(edge + 360 * turn + 1e-9, edge + 360 * (turn + 1) - 1e-9) for turn in turns]
    parts = shapely.GeometryCollection([area.intersection(shapely.box(low, -90, high, 90)) for low, high in sides])
    return shapely.MultiPolygon(list(polygons_in(shapely.transform(parts, project))))


@lru_cache(maxsize=256)
def _edge_of(crs: str) -> float | None:
    """The longitude at which the plane of a projected CRS ends on both sides; None of azimuthal ones and of degrees."""
    system = CRS.from_user_input(crs)
    operation, meridian = system.coordinate_operation, system.prime_meridian
    if system.is_geographic or operation is None or any(name in operation.method_name for name in _AZIMUTHAL):
        return None
    middle = [float(parameter.value) for parameter in operation.params if parameter.name.startswith("Longitude of")]
    return middle[0] + 180 if middle and (meridian is None or meridian.longitude == 0) else None


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
        west = min(part[0] for part in parts if part[0] + part[2] > 0)
        east = max(part[2] for part in parts if part[0] + part[2] < 0)
    return west, south, east, north
