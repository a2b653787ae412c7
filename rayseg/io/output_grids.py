"""The grids that sources of imagery are mapped on: their own, or UTM zones, and where a source lies on a grid."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import shapely

from rayseg.errors import DataError, listed
from rayseg.geo import lonlat
from rayseg.geo.grid import Grid, Window, zone_bounds, zone_of
from rayseg.geo.lonlat import LONLAT, PAST_POLES, earth_on, from_lonlat, polygons_in, turn_of, within
from rayseg.geo.region import part_in_region
from rayseg.io.sources import (
    Source,
    bounds_in,
    bounds_of,
    crs_of,
    moved,
    name_of_crs,
    newest_first,
    outline_of,
    part_of_image,
    ring_of,
    same_crs,
)

MOST_TILES = 1 << 22
_BEYOND = 3.0  # degrees around a UTM zone that it still holds
_REACH = 42.0  # degrees around a zone in which an image alone is mapped on it: pixels are up to 1.4 times as wide
_FINE = 0.05  # degrees: edges are cut this fine before they are projected


def grids_of(sources: Sequence[Source]) -> list[tuple[Grid, list[Source]]]:
    """The grids that `sources` are mapped on, each with its sources, newest first, then by id.

    Images without CRS are a grid of their own each. The others keep their own grid when all of them are north-up and
    share CRS, turn around the Earth, resolution (to 1e-9) and alignment (to 1e-3 px); if not, they go to UTM (WGS 84,
    standard six-degree zones): one zone if it is that of all centres and holds them, else every zone that a source
    meets, with all sources that meet it. Zones divide the ground: see `Grid.ground`. Of a zone's sources the finest
    resolution in metres counts, rounded to 6 digits. An image alone has one grid.

    Raises:
        DataError: UTM cannot hold a source that has to go there, or its georeference is impossible.
    """
    # 1. images without CRS, a grid each
    ordered = newest_first(sources)
    grids = [(Grid(None, (1.0, 1.0), (0.0, 0.0), source.item_id), [source]) for source in ordered if source.crs is None]
    mapped = [source for source in ordered if source.crs is not None]
    if not mapped:
        return grids
    # 2. the grid that all share, so that no pixel is resampled
    if own := _own_grid(mapped):
        return [*grids, (own, mapped)]
    # 3. UTM: a source belongs to every zone whose ground it meets
    finest = {source: utm_of(source) for source in mapped}
    zones: dict[str, list[Source]] = {}
    for source in mapped:
        for crs in _zones_of(source):
            zones.setdefault(crs, []).append(source)
    # 4. one zone where it holds all sources, else zones that divide the ground
    centres = {crs for crs, _ in finest.values()}
    reach = _REACH if len(mapped) == 1 else _BEYOND
    held = [_held(source, crs, beyond=reach) for source, (crs, _) in finest.items()]
    divided = len(mapped) > 1 and not (len(centres) == 1 and all(held))
    if len(mapped) == 1 and not all(held):
        raise DataError(
            f"{mapped[0].item_id} is rotated, or has control points only, and too wide for its UTM zone, so no grid "
            "holds it; reproject it to a north-up grid of its own CRS"
        )
    if not divided:
        zones = dict.fromkeys(centres, mapped)
    for crs, members in sorted(zones.items()):
        side = float(f"{min(finest[source][1] for source in members):.6g}")
        grids.append((Grid(crs, (side, side), (0.0, 0.0), divided=divided), members))
    return grids


def _zones_of(source: Source) -> list[str]:
    """The UTM zones whose ground the source meets.

    Raises:
        DataError: it has no outline on Earth, or one that UTM zones cannot hold.
    """
    zones = []
    for part in polygons_in(outline_of(source)):
        west, _, east, _ = part.bounds
        for lon in np.arange(west // 6 * 6, east, 6.0) + 3:
            for lat in (-1.0, 1.0):
                zone = zone_of(float(lon), lat)
                if part.intersection(shapely.box(*zone_bounds(zone))).area > 0:
                    zones.append(zone)
    return sorted(set(zones))


def _held(source: Source, crs: str, *, beyond: float) -> bool:
    """Whether the source lies within so many degrees around a UTM zone."""
    west, _, east, _ = zone_bounds(crs)
    outline = outline_of(source)
    wide = within(outline, (west - beyond, -90.0, east + beyond, 90.0))
    return bool(abs(wide.area - outline.area) <= 1e-9 * outline.area)


def beyond_utm(sources: Sequence[Source]) -> dict[str, DataError]:
    """Why some sources cannot be mapped together with the others, by id; see `grids_of`."""
    placed = [source for source in sources if source.crs is not None]
    bare = [source.item_id for source in sources if source.crs is None] if placed else []
    refused = {
        name: DataError(f"{name} has no georeference, other imagery of the region has; map it in a run of its own")
        for name in bare
    }
    # On a grid of their own sources may lie anywhere.
    for source in placed if placed and not _own_grid(placed) else ():
        try:
            utm_of(source)
        except DataError as error:
            refused[source.item_id] = error
    return refused


def out_of_scale(sources: Sequence[Source], geometry: dict[str, Any] | None, *, tile: int) -> dict[str, DataError]:
    """Why some sources cannot share a grid with the others, by id: their pixels make too many tiles of another source.

    The finest source gives a grid its pixels. Of it and the source that has more than `MOST_TILES` tiles of these in
    the region, the one whose pixels differ more from those of the grid's other sources goes (from their median in
    size; of two sources the finer one).

    Args:
        sources: those that `beyond_utm` leaves.
        geometry: the region, GeoJSON in EPSG:4326; None for all of the imagery.
        tile: side of a tile in px.
    """
    left, refused = list(sources), dict[str, DataError]()
    while pair := _too_many_tiles(left, geometry, tile):
        large, members, count = pair
        sides = {source: utm_of(source)[1] for source in members}
        fine = min(members, key=lambda source: (sides[source], source.item_id))
        middle = float(np.median(np.log(list(sides.values()))))
        apart = {source: abs(math.log(sides[source]) - middle) for source in (fine, large)}
        odd, other = (large, fine) if apart[large] > apart[fine] * (1 + 1e-9) else (fine, large)
        refused[odd.item_id] = DataError(
            f"{odd.item_id} has pixels of {sides[odd]:.3g} m, {other.item_id} of {sides[other]:.3g} m: on one grid "
            f"{large.item_id} would have {count:,} tiles of {tile} px, more than {MOST_TILES:,}; map {odd.item_id} in "
            "a run of its own, or give a smaller --region"
        )
        left.remove(odd)
    return refused


def _too_many_tiles(
    sources: Sequence[Source], geometry: dict[str, Any] | None, tile: int
) -> tuple[Source, list[Source], int] | None:
    """The first source that has more than `MOST_TILES` tiles on the common grid, the grid's sources, and how many."""
    for grid, members in grids_of(sources) if len(sources) > 1 else ():
        for source in members if grid.crs else ():
            whole = footprint(source, grid)
            if whole.width * whole.height <= MOST_TILES * tile * tile:
                continue
            window = part_in_region(geometry, grid, whole)
            count = math.ceil(window.width / tile) * math.ceil(window.height / tile)
            if count > MOST_TILES:
                return source, members, count
    return None


@lru_cache(maxsize=4096)
def utm_of(source: Source) -> tuple[str, float]:
    """("EPSG:n" of the UTM zone of the source's centre, its finer pixel side there in metres).

    Raises:
        DataError: there is no zone at its centre, or it is too wide for zones.
    """
    lon, lat = moved(source, LONLAT, [(0.0, 0.0)])[0]
    if not -80.0 <= lat <= 84.0:
        raise DataError(
            f"{source.item_id} has its centre at {lon:.4g} E {lat:.4g} N, where there is no UTM zone (80 S to 84 N); "
            "check its georeference, or bring the imagery to one grid"
        )
    west, south, east, north = lonlat.bounds_of(outline_of(source))
    if (earth := earth_on(str(source.crs))) is not None and not earth.contains(ring_of(source)):
        raise DataError(
            f"{source.item_id} reaches beyond the edge of the Earth ({name_of_crs(str(source.crs))}), and no UTM zone "
            "that it would share with other imagery holds it; map it in a run of its own"
        )
    if (east - west) % 360 > 180 or east - west == 360 or south < -89 or north > 89:
        raise DataError(
            f"{source.item_id} reaches from {west:.4g} to {east:.4g} E and {south:.4g} to {north:.4g} N, too far for "
            "the UTM zones that it would share with other imagery; map it in a run of its own"
        )
    crs = zone_of(lon, lat)
    # The side at the centre: in degrees it changes with the latitude.
    (x, y), *steps = moved(source, crs, [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
    return crs, min(math.hypot(x1 - x, y1 - y) for x1, y1 in steps)


def _own_grid(sources: Sequence[Source]) -> Grid | None:
    """The grid that all `sources` share, None when there is none; the first by id decides the last digits.

    On two turns around the Earth they share none: one place would have two pixels.
    """
    first = min(sources, key=lambda source: source.item_id)
    if not _upright(first) or first.crs is None:
        return None
    if len(sources) > 1 and (turn := turn_of(first.crs)) and all(source.crs == first.crs for source in sources):
        left, _, right, _ = zip(*map(bounds_of, sources), strict=True)
        if max(right) - min(left) > 360 * turn[1] + abs(first.transform[0]):
            return None
    (x, y), width, height = _upper_left(first), abs(first.transform[0]), abs(first.transform[4])
    grid = Grid(first.crs, (width, height), (_phase(x, width), _phase(y, height)))
    return grid if all(aligned(source, grid) for source in sources) else None


def expect_mappable(source: Source, *, tile: int) -> None:
    """Refuse a source whose description shows that every tile would fail.

    Raises:
        DataError: complex pixels, coordinates outside the Earth, or more tiles than `MOST_TILES`.
    """
    if source.dtype.startswith("complex"):
        raise DataError(
            f"{source.item_id} has complex pixels ({source.dtype}); convert it to amplitude or intensity first"
        )
    if source.height * source.width > MOST_TILES * tile * tile:
        raise DataError(
            f"{source.item_id} claims {source.height} x {source.width} px, more than {MOST_TILES:,} tiles of {tile} "
            "px; check its header, or set map.tile higher"
        )
    if source.crs is None:
        return
    ring_of(source)
    # Corners of a projected image may lie outside the domain of its projection: only its centre is checked.
    reach = (source.width / 2, source.height / 2) if crs_of(source.crs).is_geographic else (0.0, 0.0)
    for lon, lat in moved(source, LONLAT, [(-reach[0], -reach[1]), reach]):
        half = 0.51 * abs(source.transform[4])  # of a raster that is registered on the centres of its pixels
        if not (abs(lon) <= 360.1 and abs(lat) <= 90 + max(0.1, min(half, PAST_POLES))):
            raise DataError(
                f"{source.item_id} reaches {lon:.6g} E {lat:.6g} N, nowhere on Earth; check its georeference"
            )
    [(grid, _)] = grids_of([source])
    footprint(source, grid)


def overlap_note(sources: Sequence[Source]) -> str:
    """Which image counts where several show one place, as a sentence; "" if no two do."""
    placed = [source for source in newest_first(sources) if source.crs is not None]
    outlines = np.array([outline_of(source) for source in placed], object)
    one_P, other_P = shapely.STRtree(outlines).query(outlines, predicate="intersects")
    one_P, other_P = one_P[one_P < other_P], other_P[one_P < other_P]
    shared_P = shapely.area(shapely.intersection(outlines[one_P], outlines[other_P]))
    # Neighbours share an edge, up to rounding.
    more_P = shared_P > 1e-6 * np.minimum(shapely.area(outlines[one_P]), shapely.area(outlines[other_P]))
    over = [placed[at] for at in np.unique([*one_P[more_P], *other_P[more_P]]).astype(int)]
    if not over:
        return ""
    times = {source.datetime for source in over}
    rule = "the first by name" if len(times) == 1 else "the newest"
    rule += "" if len(times) in {1, len(over)} else ", of equal times the first by name"
    order = listed([f"{source.item_id} ({source.datetime or 'no date'})" for source in over], most=3)
    return f"{len(over)} of {len(sources)} images overlap; where they do {rule} is used, in the order {order}."


def footprint(source: Source, grid: Grid) -> Window:
    """The grid pixels that `source` touches, rounded outward; empty for another image's own pixel grid.

    On an image's own grid a file lies at (0, 0), or where `part_of_image` places it.

    Raises:
        DataError: the source cannot be placed in the grid's CRS.
    """
    if grid.crs is None:
        at = part_of_image(source) or (0, 0)
        return Window(*at, source.width, source.height) if source.item_id == grid.image else Window(0, 0, 0, 0)
    if aligned(source, grid):
        col, row = _offset(source, grid)
        return Window(round(col), round(row), source.width, source.height)
    if grid.divided:
        return _divided_footprint(source, grid)
    if not np.isfinite(bounds := bounds_in(source, grid.crs)).all():  # on the side of the Earth that is not seen
        return Window(0, 0, 0, 0)
    window = grid.window_of(bounds)
    if window.empty:
        raise DataError(f"{source.item_id} has no extent in {grid.name}; check its georeference")
    return window


@lru_cache(maxsize=4096)
def _divided_footprint(source: Source, grid: Grid) -> Window:
    """The grid pixels of the source on the grid's ground and around it, where patches look."""
    west, south, east, north = grid.ground or (-180.0, -90.0, 180.0, 90.0)
    near = (west - _BEYOND, max(south - _BEYOND, -90.0), east + _BEYOND, min(north + _BEYOND, 90.0))
    part = within(outline_of(source), near)
    if part.is_empty:
        return Window(0, 0, 0, 0)
    return grid.window_of(from_lonlat(shapely.segmentize(part, _FINE), str(grid.crs)).bounds)


def aligned(source: Source, grid: Grid) -> bool:
    """Whether the pixels of `source` are pixels of `grid`."""
    if source.crs is None or grid.crs is None or not _upright(source) or not same_crs(source.crs, grid.crs):
        return False
    sizes = zip((abs(source.transform[0]), abs(source.transform[4])), grid.resolution, strict=True)
    same_size = all(math.isclose(own, size, rel_tol=1e-9) for own, size in sizes)
    return same_size and all(abs(offset - round(offset)) <= 1e-3 for offset in _offset(source, grid))


def _phase(position: float, step: float) -> float:
    """`position` modulo `step`, in [0, step); within 1e-6 px of a multiple it is 0."""
    offset = position - math.floor(position / step) * step
    return 0.0 if min(offset, step - offset) < 1e-6 * step else offset


def _upright(source: Source) -> bool:
    """Whether rows and columns run along the axes of the CRS, in whichever direction: a flip moves whole pixels."""
    a, b, _, d, e, _ = source.transform
    skew = abs(b) * source.height < 1e-3 * abs(a) and abs(d) * source.width < 1e-3 * abs(e)
    return source.crs is not None and not source.gcps and skew


def flips(source: Source) -> tuple[bool, bool]:
    """Whether rows run to the north, and whether columns run to the west."""
    return source.transform[4] > 0, source.transform[0] < 0


def _upper_left(source: Source) -> tuple[float, float]:
    a, _, x, _, e, y = source.transform
    northward, westward = flips(source)
    return x + a * source.width if westward else x, y + e * source.height if northward else y


def _offset(source: Source, grid: Grid) -> tuple[float, float]:
    """(col, row) of the source's upper-left corner on the grid, not rounded."""
    x, y = _upper_left(source)
    return (x - grid.origin[0]) / grid.resolution[0], (grid.origin[1] - y) / grid.resolution[1]
