"""Clicks: points and short strokes on a run's map where its class is wrong, each with the class that is right.

    {"type": "Feature", "geometry": {"type": "Point", "coordinates": [55.27, 25.2]}, "properties": {"class": "road"}}

One feature a line, as the server appends them, or any file of points and lines in any CRS. Of an image without
georeference the property `image` names it, and coordinates are its columns and rows. A line without a geometry, whose
property `undo` is the `id` of an earlier click, takes that back.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rayseg.engine import run as runs
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import NODATA, Grid, Tile, Window, slug
from rayseg.geo.lonlat import LONLAT, transformer
from rayseg.geo.vector_files import read_frame
from rayseg.io.maps import MappedTile, read_tile
from rayseg.store import StorePath, absolute, upath
from rayseg.vision.color import ClassTable

MOST_PIXELS = 5_000
"""Pixels of a stroke: a longer one is a drawing."""
_STEP = 0.5  # px between two places of a stroke that are looked at
_KINDS = ("Point", "LineString", "MultiPoint", "MultiLineString")
_SCALARS = ("id", "undo", "run", "image")


@dataclass(frozen=True)
class Click:
    """A click or stroke.

    Attributes:
        geometry: in degrees, longitude first; of an image without georeference in its pixels.
        properties: `class`, and perhaps `image`, `run`, `id`, `name` and `time`.
        number: its place in the file, from 1.
    """

    geometry: shapely.Geometry
    properties: dict[str, Any]
    number: int

    def feature(self) -> dict[str, Any]:
        """The click as a GeoJSON feature."""
        geometry = json.loads(shapely.to_geojson(self.geometry))
        return {"type": "Feature", "geometry": geometry, "properties": self.properties}


@dataclass(frozen=True)
class Clicked:
    """The pixels of a tile that were clicked.

    Attributes:
        rows_N, cols_N: of the pixels, inside the tile.
        values_N: the class that is right.
        weights_N: a click has the weight 1, and a stroke of n pixels sqrt(n).
    """

    rows_N: NDArray[np.int64]
    cols_N: NDArray[np.int64]
    values_N: NDArray[np.int64]
    weights_N: NDArray[np.float32]


def read_clicks(path: StorePath) -> list[Click]:
    """The clicks of a file, without those that were taken back.

    Raises:
        DataError: there is no such file, it holds no clicks, or a row is not a point or line with a class.
    """
    features = read_features(path)
    numbers = {id(feature): number for number, feature in enumerate(features, 1)}
    clicks = []
    for feature in kept(features):
        number, properties = numbers[id(feature)], feature["properties"]
        properties = {name: value for name, value in properties.items() if value is not None}
        geometry = _geometry(feature.get("geometry"), f"click {number} of {path}")
        if not isinstance(properties.get("class"), str):
            raise DataError(f"click {number} of {path} has no property class, expected the name of a class; add it")
        clicks.append(Click(geometry, properties, number))
    if not clicks:
        raise DataError(f"{path} holds no clicks; give points or short lines with a property class")
    return clicks


def _geometry(geometry: Any, what: str) -> shapely.Geometry:  # noqa: ANN401 - what a file holds
    """A point or line of GeoJSON.

    Raises:
        DataError: it is missing, empty, damaged or of another type.
    """
    if not isinstance(geometry, dict):
        raise DataError(f"{what} has no geometry, expected a point or a line; add it, or remove the click")
    if geometry.get("type") not in _KINDS:
        raise DataError(f"{what} is of type {geometry.get('type')}, expected a point or a line; remove it")
    try:
        found = shapely.from_geojson(json.dumps(geometry))
    except shapely.errors.GEOSException:
        raise DataError(f"{what} has coordinates that are no {geometry['type']}; correct or remove it") from None
    if found.is_empty:
        raise DataError(f"{what} has no coordinates, expected a point or a line; add them, or remove the click")
    return found


def read_features(path: StorePath) -> list[dict[str, Any]]:
    """The rows of a file as GeoJSON features in degrees, also those that were taken back.

    Raises:
        DataError: there is no such file, it cannot be read, or a property that names something has another type.
    """
    try:
        features = _lines(upath(path).read_bytes()) or list(_rows(path))
    except FileNotFoundError:
        raise DataError(f"there is no file of clicks {path}; give points with a property class") from None
    for number, feature in enumerate(features, 1):
        properties = feature["properties"]
        if not isinstance(properties, dict):
            raise DataError(
                f"click {number} of {path} has the properties {properties!r}, expected an object; correct it"
            )
        for name in _SCALARS:
            if not isinstance(value := properties.get(name), str | int | float | None):
                raise DataError(f"{name} of click {number} of {path} is {value!r}, expected a text; correct it")
    return features


def kept(features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The features without those that were taken back, and without the lines that did so."""
    undone = {feature["properties"].get("undo") for feature in features} - {None}
    return [
        feature
        for feature in features
        if feature["properties"].get("undo") is None and feature["properties"].get("id") not in undone
    ]


def _lines(content: bytes) -> list[dict[str, Any]]:
    """The features of a text with one on each line; [] of any other file."""
    features = []
    for line in content.splitlines():
        if line.strip():
            try:
                feature = json.loads(line)
            except ValueError:
                return []
            if not isinstance(feature, dict) or feature.get("type") != "Feature":
                return []
            features.append(feature | {"properties": feature.get("properties") or {}})
    return features


def _rows(path: StorePath) -> Iterator[dict[str, Any]]:
    """The rows of a file of any other format as features in degrees."""
    frame = read_frame(path, every=True)
    names = [name for name in frame.columns if name != frame.geometry.name]
    if frame.crs is None and "image" not in names:
        raise DataError(f"{path} states no CRS, expected one; write the clicks with a CRS")
    if frame.crs is not None:
        frame = frame.to_crs(LONLAT)
    for geometry, values in zip(frame.geometry, frame[names].to_dict("records"), strict=True):
        # A missing value of a table is NaN or NaT, which are not equal to themselves.
        properties = {name: value if np.all(value == value) else None for name, value in values.items()}
        placed = json.loads(shapely.to_geojson(geometry)) if geometry else None
        yield {"type": "Feature", "geometry": placed, "properties": properties}


def expect_of(clicks: Sequence[Click], identity: str, table: ClassTable, root: str) -> None:
    """Check that clicks are for a run's map.

    Raises:
        ConfigError: a click is of another run, or its class is not in the map.
    """
    for click in clicks:
        own = click.properties
        if own.get("run", identity) != identity:
            raise ConfigError(
                f"click {click.number} was made on run {own['run']}, {root} is {identity}; give clicks of this run"
            )
        if own["class"] not in table.names:
            raise ConfigError(
                f"click {click.number} has the class {own['class']!r}, {root} has {listed(table.names, most=20)}; "
                "correct it"
            )


def expect_inside(clicks: Sequence[Click], tiles: Sequence[MappedTile]) -> None:
    """Check that clicks, and all places that a stroke goes through, are on a map.

    Raises:
        DataError: one lies outside of it, or a stroke is too long.
    """
    inside = [np.zeros(shapely.count_coordinates(click.geometry), bool) for click in clicks]
    for grid, members in _by_grid(tiles).items():
        corners_N4 = _corners(members)
        for click, inside_V in zip(clicks, inside, strict=True):
            if parts := _places(click, grid):
                places_V2 = np.floor(np.concatenate(parts))
                for hit in _hits(corners_N4, places_V2):
                    first, last = corners_N4[hit, :2], corners_N4[hit, 2:]
                    inside_V[((places_V2 >= first) & (places_V2 < last)).all(axis=1)] = True
    if outside := {at: int(inside_V.argmin()) for at, inside_V in enumerate(inside) if not inside_V.all()}:
        raise _misplaced(clicks, outside, "lies outside of the map")


def placed(clicks: Sequence[Click], tiles: Sequence[MappedTile], table: ClassTable) -> dict[str, Clicked]:
    """The clicked pixels of every tile, by id; where clicks meet, the last one counts.

    Args:
        clicks: see `expect_of`.
        tiles: of the map.
        table: its classes.

    Raises:
        DataError: a click lies on no pixel of the map.
    """
    values = dict(zip(table.names, table.values, strict=True))
    by_id = {tile.tile.id: tile for tile in tiles}
    empty, found = set(range(len(clicks))), {}
    for name, parts in _touched(clicks, tiles).items():
        classes_HW = read_tile(by_id[name], "classes")[0]
        kept: dict[tuple[int, int], tuple[int, float]] = {}
        for at, pixels_P2 in parts:
            # A stroke may cross the edge of the data.
            on_data_P2 = pixels_P2[classes_HW[tuple(pixels_P2.T)] != NODATA]
            if len(on_data_P2):
                empty.discard(at)
            value = values[clicks[at].properties["class"]]
            kept |= {(row, col): (value, len(on_data_P2) ** -0.5) for row, col in on_data_P2.tolist()}
        if kept:
            rows_N, cols_N = np.array(list(kept)).T
            values_N, weights_N = (np.array(column) for column in zip(*kept.values(), strict=True))
            found[name] = Clicked(rows_N, cols_N, values_N, weights_N.astype(np.float32))
    if empty:
        raise _misplaced(clicks, dict.fromkeys(empty, 0), "lies on nodata, where nothing is mapped")
    return found


def _touched(clicks: Sequence[Click], tiles: Sequence[MappedTile]) -> dict[str, list[tuple[int, NDArray[np.int64]]]]:
    """Tile -> (number of the click, (row, col) of its pixels inside the tile), in the order of the clicks.

    Raises:
        DataError: a click lies in no tile.
    """
    touched: defaultdict[str, list[tuple[int, NDArray[np.int64]]]] = defaultdict(list)
    outside = set(range(len(clicks)))
    for grid, members in _by_grid(tiles).items():
        corners_N4 = _corners(members)
        for at, click in enumerate(clicks):
            pixels_P2 = _pixels(click, grid)
            if not len(pixels_P2):
                continue
            for hit in _hits(corners_N4, pixels_P2):
                # A stroke may cross tiles: each tile gets its own pixels of it.
                first, last = corners_N4[hit, :2], corners_N4[hit, 2:]
                own_P2 = pixels_P2[((pixels_P2 >= first) & (pixels_P2 < last)).all(axis=1)] - first
                if len(own_P2):
                    outside.discard(at)
                    touched[members[hit].id].append((at, own_P2))
    if outside:
        raise _misplaced(clicks, dict.fromkeys(outside, 0), "lies outside of the map")
    return touched


def _by_grid(tiles: Sequence[MappedTile]) -> dict[Grid, list[Tile]]:
    on_grid: defaultdict[Grid, list[Tile]] = defaultdict(list)
    for mapped in tiles:
        on_grid[mapped.tile.grid].append(mapped.tile)
    return on_grid


def _corners(tiles: Sequence[Tile]) -> NDArray[np.int64]:
    return np.array([(t.window.row, t.window.col, t.window.row1, t.window.col1) for t in tiles])


def _hits(corners_N4: NDArray[np.int64], places_P2: NDArray[Any]) -> NDArray[np.int64]:
    """Positions of the tiles that intersect the box of (row, col) places."""
    low, high = places_P2.min(axis=0), places_P2.max(axis=0)
    return np.flatnonzero((corners_N4[:, :2] <= high).all(axis=1) & (corners_N4[:, 2:] > low).all(axis=1))


def _pixels(click: Click, grid: Grid) -> NDArray[np.int64]:
    """(row, col) of the pixels of a click on a grid; none on the grid of another image."""
    parts = [
        shapely.get_coordinates(shapely.segmentize(shapely.LineString(places_V2), _STEP))
        if len(places_V2) > 1
        else places_V2
        for places_V2 in _places(click, grid)
    ]
    if not parts:
        return np.empty((0, 2), np.int64)
    return np.unique(np.floor(np.concatenate(parts)).astype(np.int64), axis=0)


def _places(click: Click, grid: Grid) -> list[NDArray[np.float64]]:
    """(row, col) on a grid of the places of each part of a click; none on the grid of another image.

    Raises:
        DataError: a stroke is too long.
    """
    # Clicks in pixels belong to one image; those in degrees to all grids with a CRS.
    if click.properties.get("image") != (grid.image if grid.crs is None else None):
        return []
    parts = []
    for part in shapely.get_parts(click.geometry):
        xy_N2 = shapely.get_coordinates(part)
        if grid.crs is not None:
            xy_N2 = np.stack(transformer(LONLAT, grid.crs).transform(*xy_N2.T), axis=1)
        if not np.isfinite(xy_N2).all():  # beyond what the grid's projection shows
            return []
        # From coordinates to pixels of the whole grid, so that clicks do not depend on tiles.
        inverse = ~grid.transform(Window(0, 0, 1, 1))
        places_V2 = np.stack(inverse @ tuple(xy_N2.T), axis=1)[:, ::-1]
        length = float(np.hypot(*np.diff(places_V2, axis=0).T).sum())
        if length > MOST_PIXELS:
            raise DataError(
                f"stroke {click.number} is {length:,.0f} px long, expected at most {MOST_PIXELS:,} px; draw it shorter"
            )
        parts.append(places_V2)
    return parts


def _misplaced(clicks: Sequence[Click], at: dict[int, int], what: str) -> DataError:
    """The refusal of the clicks at some positions, each with the number of its wrong place."""
    first = clicks[min(at)]
    x, y = shapely.get_coordinates(first.geometry)[at[min(at)]]
    others = f" and {len(at) - 1} more" if len(at) > 1 else ""
    return DataError(f"click {first.number} at {x:.6g}, {y:.6g}{others} {what}; move or remove it")


def identity(root: str) -> str:
    """A short name of what a run maps, by its pipeline, region and settings; clicks keep it."""
    content = runs.read(root)
    text = json.dumps([content[key] for key in ("pipeline", "region", "config")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def beside(root: str) -> str:
    """The file next to a run that the server appends clicks to."""
    folder = upath(absolute(root).rstrip("/"))
    return str(folder.parent / f"{slug(folder.name)}.clicks.geojsonl")
