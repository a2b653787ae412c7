"""Regions that `--region` names, and the tiles and pixels of a grid inside them."""

import io
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from pydantic import AfterValidator
from rasterio.features import geometry_mask
from shapely.errors import ShapelyError
from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry

from rayseg.config import shipped
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Bounds, Grid, Window
from rayseg.geo.lonlat import (
    LONLAT,
    bounds_of,
    box_of,
    divided,
    earth_on,
    from_lonlat,
    geographic,
    jumps,
    lobes_of,
    normalised,
    of_file,
    on_earth,
    polygons_in,
    to_lonlat,
    transformer,
    valid,
    within,
)
from rayseg.geo.vector_files import SUFFIXES, read_frame
from rayseg.store import absolute, is_local, public, split_location, suffix_of, upath

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """The region that `--region` names: an area, a catalogue of imagery, or both.

    Attributes:
        name: as typed, for messages and reports.
        geometry: GeoJSON geometry in EPSG:4326; None for all of the imagery.
        catalog: URI of the STAC catalogue with the imagery; None when the configuration names it.
        collection: the collection in `catalog` that holds the imagery; None for its imagery by convention.
        images: a folder of images, or one image, instead of a catalogue.
        tiles: ids of the tiles to map; empty for all.
    """

    name: str
    geometry: dict[str, Any] | None = None
    catalog: str | None = None
    collection: str | None = None
    images: str | None = None
    tiles: tuple[str, ...] = ()

    def located(self, location: str | None) -> str | None:
        """A location with `#collection` alone resolved in the region's catalogue; None for no location.

        Raises:
            ConfigError: the region has no catalogue.
        """
        if not location or not location.startswith("#"):
            return location or None
        if self.catalog is None:
            raise ConfigError(
                f"{location} needs a catalogue, but region {self.name} has none; give the full location, such as "
                f"catalog.json{location}"
            )
        return f"{self.catalog}{location}"


_DEGREES = 0.01  # edges are cut this fine before they are projected, so straight lines may become curves
_WORLD = (-180.0, -90.0, 180.0, 90.0)


def on_grid(geometry: dict[str, Any] | None, grid: Grid, window: Window, *, whole: bool = False) -> BaseGeometry | None:
    """The ground near `window` that a run maps on `grid`, in the CRS of the grid; None for everything.

    It is cut around the window before it is projected, because no projection holds regions of any size.

    Args:
        geometry: GeoJSON in EPSG:4326, the region; None for all imagery.
        grid: the grid; without CRS it has no ground, a divided one has only that of its zone.
        window: grid pixels; the result is valid for them and a margin around them.
        whole: of a divided grid, also the ground of its neighbours.

    Raises:
        DataError: the region around the window cannot be projected to the CRS.
    """
    ground = None if whole else grid.ground
    if grid.crs is None or (geometry is None and ground is None):
        return None
    # Cut first: projected whole, a region of a continent is not finite or crosses itself.
    near = degrees_around(grid, window)
    # Edges become curves before they are cut: where their vertices lie must not depend on the window.
    areas: list[BaseGeometry] = [shapely.box(*ground)] if ground else []
    areas += [shape(geometry)] if geometry else []
    cut = [within(shapely.segmentize(area, _DEGREES), near) for area in areas]
    area = cut[0] if len(cut) == 1 else cut[0].intersection(cut[1])
    if not lobes_of(grid.crs) and (earth := earth_on(grid.crs)) is not None:  # a disk: nothing is known beyond it
        box = shapely.box(*_ordered(grid.bounds(window))).buffer(max(grid.resolution), join_style="mitre")
        [seen] = to_lonlat(np.array([earth.intersection(box)], object), grid.crs)
        area = area.intersection(within(seen, near))
    projected = from_lonlat(area, grid.crs)
    if not np.isfinite(shapely.get_coordinates(projected)).all():
        raise DataError(
            f"the region cannot be projected to the CRS of the grid {grid.name} around {window}; choose a region that "
            "the imagery covers, or reproject the imagery"
        )
    return projected if projected.is_valid else shapely.union_all(polygons_in(shapely.make_valid(projected)))


def part_in_region(geometry: dict[str, Any] | None, grid: Grid, window: Window) -> Window:
    """The pixels of a window around the region: no more than these are planned."""
    if grid.crs is None or geometry is None or (area := on_grid(geometry, grid, window)) is None:
        return window
    return Window(window.col, window.row, 0, 0) if area.is_empty else grid.window_of(area.bounds).intersect(window)


def degrees_around(grid: Grid, window: Window) -> Bounds:
    """(west, south, east, north) around a window, with a margin; east is beyond 180 across the antimeridian."""
    left, bottom, right, top = _ordered(grid.bounds(window))
    west, south, east, north = left, bottom, right, top
    if not geographic(str(grid.crs)):
        if (earth := earth_on(str(grid.crs))) is not None:  # corners may be in space, and edges cross gaps
            seen = earth.intersection(shapely.box(left, bottom, right, top))
            if seen.area == 0:
                return _WORLD
            west, south, east, north = bounds_of(to_lonlat(np.array([seen], object), str(grid.crs))[0])
        else:
            to_degrees = transformer(str(grid.crs), LONLAT)
            west, south, east, north = to_degrees.transform_bounds(left, bottom, right, top, densify_pts=21)
    # A window beyond the plane of its projection: everything is near.
    if not np.isfinite((west, south, east, north)).all():
        return _WORLD
    east += 360 if west > east else 0
    margin = 0.1 + max(east - west, north - south) / 50  # between the points along the edges they may curve outward
    # A box of more than a turn would hold its own ends twice.
    if east - west + 2 * margin >= 360:
        west, east = ((west + east) / 2 + side * (180 - margin) for side in (-1, 1))
    return west - margin, max(south - margin, -90.0), east + margin, min(north + margin, 90.0)


def windows_on_ground(grid: Grid, corners_N4: np.ndarray) -> np.ndarray:
    """Windows of a divided grid, as (col, row, col1, row1), cut to its ground; empty ones beyond, all of other grids.

    Neighbours of two zones then hardly overlap, and what is read, predicted and paid for counts ground once.
    """
    if not grid.divided or not len(corners_N4):
        return corners_N4
    (col, row), (col1, row1) = corners_N4[:, :2].min(axis=0).tolist(), corners_N4[:, 2:].max(axis=0).tolist()
    # The ground is projected once for all windows.
    ground = on_grid(None, grid, Window(col, row, col1 - col, row1 - row))
    assert ground is not None
    shapely.prepare(ground)
    cut_N4 = corners_N4.copy()
    boxes = _boxes(grid, corners_N4)
    for at in np.flatnonzero(~shapely.contains_properly(ground, boxes)):
        part = ground.intersection(boxes[at])
        # Never larger than before: the bounds of a curved edge can reach beyond the window.
        left, top, right, bottom = corners_N4[at].tolist()
        whole, around = Window(left, top, right - left, bottom - top), Window(left, top, 0, 0)
        window = (grid.window_of(part.bounds) if part.area > 0 else around).intersect(whole)
        cut_N4[at] = window.col, window.row, window.col1, window.row1
    return cut_N4


def _boxes(grid: Grid, corners_N4: np.ndarray) -> np.ndarray:
    affine = grid.transform(Window(0, 0, 1, 1))
    col, row, col1, row1 = corners_N4.T
    (left, right), ys = affine.c + affine.a * np.stack([col, col1]), affine.f + affine.e * np.stack([row, row1])
    boxes: np.ndarray = shapely.box(left, ys.min(axis=0), right, ys.max(axis=0))
    return boxes


def windows_inside(area: BaseGeometry | None, grid: Grid, corners_N4: np.ndarray) -> np.ndarray:
    """(N,) bool: windows of `grid`, as (col, row, col1, row1), that overlap `area` (CRS of the grid)."""
    if area is None:
        return np.ones(len(corners_N4), bool)
    shapely.prepare(area)
    boxes = _boxes(grid, corners_N4)
    inside: np.ndarray = shapely.contains_properly(area, boxes)
    at = np.flatnonzero(~inside)  # few, and slower to decide
    inside[at] = shapely.intersects(area, boxes[at]) & ~shapely.touches(area, boxes[at])
    return inside


def pixels_inside(area: BaseGeometry | None, grid: Grid, window: Window, *, all_touched: bool = False) -> np.ndarray:
    """(height, width) bool: pixels of `window` whose centre lies in `area`; or all that it touches."""
    size = (window.height, window.width)
    # Most windows lie inside, where nothing has to be rasterized.
    if area is None or area.contains(shapely.box(*_ordered(grid.bounds(window)))):
        return np.ones(size, bool)
    if area.is_empty:
        return np.zeros(size, bool)
    return np.asarray(geometry_mask([area], size, grid.transform(window), invert=True, all_touched=all_touched))


def kept(geometry: dict[str, Any] | None, grid: Grid, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
    """Which pixels of `window` a run maps, and up to which its polygons are drawn, (height, width) bool each.

    The second is None where it is the first; on a divided grid it also holds the pixels that a seam cuts.

    Args:
        geometry: the region, GeoJSON in EPSG:4326; None for all imagery.
        grid: the grid.
        window: grid pixels.
    """
    kept_HW = pixels_inside(on_grid(geometry, grid, window), grid, window)
    if not grid.divided:
        return kept_HW, None
    region_HW = pixels_inside(on_grid(geometry, grid, window, whole=True), grid, window)
    return kept_HW, region_HW & pixels_inside(on_grid(None, grid, window), grid, window, all_touched=True)


def pixels_on_earth(grid: Grid, window: Window, *, within: float = 0.0) -> np.ndarray | None:
    """(height, width) bool: pixels of which a part lies on the Earth; None where all of them do as a whole.

    Args:
        grid: the grid.
        window: grid pixels.
        within: px; if given, pixels whose centre lies at least so far from the edge of the Earth instead.
    """
    if grid.crs is None or (earth := earth_on(grid.crs)) is None:
        return None
    box, side = shapely.box(*_ordered(grid.bounds(window))), max(grid.resolution)
    around = box.buffer((2 * within + 1) * side, join_style="mitre")
    if earth.contains(around):
        return None
    # Clipped first, as the whole edge of the Earth has thousands of vertices.
    near = shapely.clip_by_rect(earth, *around.bounds).buffer(-within * side)
    return pixels_inside(near, grid, window, all_touched=not within)


def _ordered(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    left, bottom, right, top = bounds
    return left, min(bottom, top), right, max(bottom, top)


_NUMBER = r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*"
_BOX = re.compile(rf"^{_NUMBER}(?:(?:,{_NUMBER}){{3}}|(?:,{_NUMBER}){{5}})$")


def _placed(text: str) -> str:
    return text if _BOX.match(text) else absolute(text)


Area = Annotated[str, AfterValidator(_placed)]
"""A box or a file of polygons in a configuration, as `resolve_region` reads it; the path is made absolute."""


def resolve_region(text: str) -> Region:
    """The region that `text` names.

    `west,south,east,north` in degrees (west > east crosses the antimeridian; heights may stand between), a file of
    polygons as `read_frame` reads it, a STAC catalogue `catalog.json` or `catalog.json#collection`, or a name under
    stac/regions. A region's GeoJSON may have the properties `catalog` (relative to the file) and `collection`.

    Raises:
        ConfigError: it is none of these.
        DataError: a file of polygons is empty or unreadable.
    """
    if _BOX.match(text):
        return Region(text, mapping(_box_geometry(text)))
    path, collection = split_location(text)
    if suffix_of(path) in {".json", *SUFFIXES} or (is_local(path) and upath(path).is_file()):
        return _region_file(text, path, collection or None)
    if file := _region_files().get(text):
        return _region_file(text, str(file), None)
    raise ConfigError(
        f"region {text!r} is not known: expected west,south,east,north, a file of polygons (GeoJSON, GeoParquet, "
        "GeoPackage, FlatGeobuf, Shapefile), catalog.json or catalog.json#collection, demo, or one of the named "
        f"regions ({_known()})"
    )


def region_names() -> list[str]:
    """Names under stac/regions, here and in the project."""
    return sorted(_region_files())


def named_regions() -> dict[str, str]:
    """The same names, each with the `description` in its file's first properties ("" without)."""
    return {name: _description(file) for name, file in sorted(_region_files().items())}


def _description(file: Path) -> str:
    try:
        row = json.loads(file.read_bytes())
    except ValueError as error:
        return f"not readable: {error}"
    return str(_properties(row).get("description", ""))


def _known() -> str:
    return ", ".join(region_names()) or "none here"


def _region_files() -> dict[str, Path]:
    return shipped("stac/regions", "*.geojson")


def _box_geometry(text: str) -> BaseGeometry:
    west, south, east, north = box_of([float(part) for part in text.split(",")])
    known = -360 <= west <= 360 and -360 <= east <= 360 and -90 <= south < north <= 90
    east += 360 if west > east else 0
    if not known or not west < east <= west + 360:
        raise ConfigError(
            f"region {text} is not west,south,east,north in degrees: longitudes are -180 to 180 (or 0 to 360) and "
            "differ, latitudes -90 to 90 with south < north"
        )
    if west >= -180 and east <= 180:
        return shapely.box(west, south, east, north)
    return normalised(shapely.box(west, south, east, north))


def _region_file(name: str, path: str, collection: str | None) -> Region:
    place = upath(path)
    try:
        data = place.fs.cat_file(place.path)  # opening a URL would call every fault of a server a missing file
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        known = _known()
        raise ConfigError(f"region file {path} does not exist; named regions are {known}, and demo") from error
    except OSError as error:
        raise ConfigError(
            f"region file {public(path)} cannot be read ({error}); try again, or correct --region"
        ) from None
    suffix = suffix_of(path)
    if suffix in {".parquet", ".geoparquet"}:
        if "stac_version" in _columns(path, data):
            return Region(name, catalog=path, collection=collection)
        return Region(name, _area(path))
    if suffix not in {".json", ".geojson"}:
        return Region(name, _area(path))
    try:
        row = json.loads(data)
    except ValueError as error:
        raise DataError(f"region file {path} is not JSON: {error}; give GeoJSON, GeoParquet or STAC") from error
    if not isinstance(row, dict):
        raise DataError(
            f"region file {path} is neither GeoJSON nor STAC: it holds a {type(row).__name__}, expected an object"
        )
    first = (row.get("features") or [{}])[0]
    if not isinstance(first, dict):
        raise DataError(f"region file {path} begins with {first!r}, expected a GeoJSON Feature; correct it")
    if "stac_version" in row or "stac_version" in first:
        return Region(name, catalog=path, collection=collection)
    return _with_imagery(Region(name, _area(path)), row, path)


def _columns(path: str, data: bytes) -> list[str]:
    try:
        schema = pq.read_schema(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"region file {path} is not Parquet: {error}; write it again") from error
    if "stac_version" not in schema.names and b"geo" not in (schema.metadata or {}):
        raise DataError(f"region file {path} is Parquet without geometries; write it as GeoParquet")
    return list(schema.names)


def _area(path: str) -> dict[str, Any]:
    """All polygons of a file together, in EPSG:4326."""
    try:
        frame = read_frame(path)
    except DataError as error:
        raise DataError(f"region file {path} is neither a file of polygons nor STAC: {error}") from error
    if frame.empty:
        raise DataError(f"region file {path} is empty, expected a polygon; add one")
    shapes, crs = frame.geometry.to_numpy(), LONLAT if frame.crs is None else frame.crs.to_wkt()
    if geographic(crs) and not on_earth(bounds := tuple(shapely.total_bounds(shapes))):
        raise DataError(
            f"region file {path} lies within {', '.join(f'{side:.6g}' for side in bounds)} (west, south, east, north), "
            "nowhere on Earth; are longitude and latitude swapped, or are these metres without their CRS?"
        )
    try:
        lonlat = of_file(shapes, crs)
    except ShapelyError as error:
        raise DataError(
            f"region file {path} has a polygon that cannot be cut at 180 degrees: {error}; correct its rings"
        ) from error
    if geographic(crs) and jumps(shapes).any():
        _log.warning(
            "%s has edges longer than 180 degrees: a ring that runs counterclockwise on the flat map and is up to "
            "270 degrees wide is as wide as it looks there, any other crosses the antimeridian; if it is read "
            "wrong, divide its edges",
            path,
        )
    area = divided(shapely.union_all(valid(lonlat)))
    if area.is_empty or area.area == 0:
        raise DataError(
            f"region file {path} has no area ({area.geom_type} within {area.bounds}), expected a polygon; draw one"
        )
    return cast(dict[str, Any], json.loads(shapely.to_geojson(area)))


def _with_imagery(region: Region, row: dict[str, Any], path: str) -> Region:
    """The region with the catalogue that its GeoJSON names in its (first feature's) properties."""
    properties = _properties(row)
    catalog = properties.get("catalog")
    if not catalog:
        return region
    if "://" not in catalog:
        catalog = str(upath(path).parent / catalog)
    return Region(region.name, region.geometry, catalog, properties.get("collection"))


def _properties(row: dict[str, Any]) -> dict[str, Any]:
    """The properties of a feature, or of a collection's first."""
    first = row.get("features") or [row]
    found: dict[str, Any] = first[0].get("properties") or {}
    return found
