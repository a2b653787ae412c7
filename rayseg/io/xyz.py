"""Web-map tiles as georeferenced scenes or chips in EPSG:3857, with a STAC item each.

    region or polygons -> windows of a global grid -> tiles of the next finer zoom -> area average -> COG and item

`ingest_xyz` resumes after an interruption: a window whose image and item exist is not fetched again.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import compress
from typing import Any
from urllib.parse import urlsplit

import geopandas
import numpy as np
import pandas as pd
import pystac
import shapely
from pystac.utils import datetime_to_str
from rasterio.warp import Resampling, reproject
from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry
from upath import UPath

from rayseg.engine import progress
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import Grid, Window, slug
from rayseg.geo.region import on_grid
from rayseg.geo.vector_files import read_frame
from rayseg.io import cog, stac_write
from rayseg.io.labels import LABEL
from rayseg.io.sources import crs_of
from rayseg.io.webmap import CRS, HALF_WORLD, Fetching, Service, Session, mosaic, service_for, session
from rayseg.io.written_files import WrittenFile
from rayseg.store import StorePath, put, upath

__all__ = ["Fetching", "ingest_xyz"]

BANDS = ("red", "green", "blue")
SCENE = 2048  # px; scenes lie on multiples of it
_MERCATOR = shapely.box(-180.0, -85.0511, 180.0, 85.0511)
_WORLD = (-HALF_WORLD, -HALF_WORLD, HALF_WORLD, HALF_WORLD)
_LARGEST_CHIP = 4096  # px
_SLIVER = 1e-3  # pixels; a smaller area is a rounding error
_FAILURES_IN_A_ROW = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Unit:
    """One image to fetch: a window of the output grid, and a chip's label."""

    id: str
    window: Window
    label: str | None = None


@dataclass(frozen=True)
class _Job:
    """Settings of one ingest; `folder` is the folder of the collection."""

    service: Service
    grid: Grid
    folder: UPath
    attribution: str | None

    @property
    def facts(self) -> dict[str, Any]:
        """Properties of all items: their source."""
        service = self.service
        return {
            "rayseg:tiles": service.public,
            "rayseg:zoom": service.zoom,
            "rayseg:tile_size": service.fetching.tile_size,
        }

    def place(self, window: Window) -> dict[str, Any]:
        """Properties of an item: its place on the grid."""
        affine = [float(value) for value in tuple(self.grid.transform(window))[:6]]
        return {"proj:shape": [window.height, window.width], "proj:transform": affine}

    def around(self, window: Window) -> Window:
        """The native pixels under a window of the output grid."""
        return self.service.native.window_of(self.grid.bounds(window))


def ingest_xyz(
    url: str,
    out: StorePath,
    *,
    geometry: dict[str, Any] | None = None,
    chips: StorePath | None = None,
    label: str | None = None,
    resolution: float = 1.0,
    attribution: str | None = None,
    fetching: Fetching | None = None,
) -> str:
    """Fetch web-map tiles as GeoTIFF in EPSG:3857: scenes that cover a region, or a chip per polygon.

    Pixels come from the zoom of `resolution` or the next finer one, averaged by area to exactly `resolution` on one
    global grid with a corner at (0, 0). A resolution within 1e-6 of a zoom's counts as equal, and its pixels are not
    resampled. Tiles that the server lacks (204, 404, 410) and transparent pixels are nodata; a window without data
    gives no image and is requested again the next time. Query values of `url` that are not placeholders, such as a key,
    are used in requests only, never in items, messages or logs.

    Args:
        url: template with {z} and {x} and {y} or {-y} (rows counted from the south, TMS), or with {q} (quadkey);
            {s} becomes a, b or c.
        out: folder or URI of the catalogue, new or from the same command.
        geometry: polygon or multipolygon, GeoJSON in EPSG:4326. All blocks of 2048 x 2048 px of the grid that it
            touches become scenes `3857_<block col>_<block row>` of the collection `imagery`, whole, but for pixels
            with their centre beyond 180 degrees, which are those of a scene on the other side.
        chips: GeoJSON, GeoParquet or another vector file of polygons with a column `id`: the envelope of each becomes
            the image of that id in the collection `chips`.
        label: column with the chips' labels; default: `label`, if it exists.
        resolution: pixel side in units of EPSG:3857 (metres at the equator).
        attribution: attribution text of the imagery, stored in every item.
        fetching: concurrency, retries, limit, tile size.

    Returns:
        URI of the catalogue.

    Raises:
        ConfigError: the template, the resolution or the region is invalid, or more than `limit` tiles are needed.
        DataError: the polygons are invalid, `out` holds images of other settings, or tiles failed in every attempt; the
            catalogue then has the other images, and the same command resumes with the rest.
    """
    if (geometry is None) == (chips is None):
        raise ConfigError("tiles need a region with an area or chips; give one of the two")
    service, grid = service_for(url, resolution, fetching or Fetching())
    folder = upath(out) / ("imagery" if chips is None else "chips")
    job = _Job(service, grid, folder, attribution)
    units = _scenes(job, geometry or {}) if chips is None else _chips(chips, label, grid)
    # Finished units are found before the limit is checked: it concerns new requests only.
    with ThreadPoolExecutor(service.fetching.concurrency) as pool:
        exists = list(pool.map(partial(_exists, job), units))
    old, todo = list(compress(units, exists)), [unit for unit, done in zip(units, exists, strict=True) if not done]
    _check_limit(service, sum(math.prod(map(len, service.span(job.around(unit.window)))) for unit in todo))
    fetched, failures = _fetch_all(job, todo)
    catalogue = _link(out, job, fetched, old) if fetched or old else None
    if failures:
        raise DataError(
            f"{len(failures)} of {len(units)} {folder.name} were not fetched, the first because {failures[0]}; "
            "run the same command again to fetch the rest"
        )
    if catalogue is None:
        raise DataError(f"{service.public} has no imagery there at zoom {service.zoom}; check region and resolution")
    return catalogue


# -- what to fetch -----------------------------------------------------------------------------------------------------


def _scenes(job: _Job, geometry: dict[str, Any]) -> list[_Unit]:
    """All blocks of the grid that overlap the region, row by row."""
    covered = shapely.make_valid(shape(geometry)).intersection(_MERCATOR)
    area = on_grid(mapping(covered), job.grid, job.grid.window_of(_WORLD))
    if area is None or not area.area > _SLIVER * job.grid.resolution[0] ** 2:
        raise ConfigError("the region has no area between 85 S and 85 N; give a polygon")
    _check_limit(
        job.service, math.floor(area.area / job.service.tile_side**2)
    )  # before cutting, which takes long in a large region
    window = job.grid.window_of(area.bounds)
    col, row = window.col // SCENE, window.row // SCENE
    cells = Window(col, row, -(-window.col1 // SCENE) - col, -(-window.row1 // SCENE) - row)
    blocks = sorted(_cells(area, job.grid, cells), key=lambda cell: (cell.row, cell.col))
    return [
        _Unit(
            f"{job.grid.name}_{cell.col}_{cell.row}",
            Window(cell.col * SCENE, cell.row * SCENE, SCENE, SCENE).intersect(_world_of(job.grid)),
        )
        for cell in blocks
    ]


def _world_of(grid: Grid) -> Window:
    """The pixels with their centre between 180 W and 180 E, and as far north and south."""
    half = math.floor(HALF_WORLD / grid.resolution[0] + 0.5)
    return Window(-half, -half, 2 * half, 2 * half)


def _cells(area: BaseGeometry, grid: Grid, cells: Window) -> Iterator[Window]:
    """The blocks in a window (counted in blocks) that overlap `area`, found by halving the window."""
    pixels = Window(cells.col * SCENE, cells.row * SCENE, cells.width * SCENE, cells.height * SCENE)
    part = area.intersection(shapely.box(*grid.bounds(pixels)))
    if not part.area > _SLIVER * grid.resolution[0] ** 2:
        return
    if cells.width == cells.height == 1:
        yield cells
        return
    col, row, width, height = cells.col, cells.row, cells.width, cells.height
    if width >= height:  # cut across the longer side
        halves = Window(col, row, width // 2, height), Window(col + width // 2, row, width - width // 2, height)
    else:
        halves = Window(col, row, width, height // 2), Window(col, row + height // 2, width, height - height // 2)
    for half in halves:
        yield from _cells(part, grid, half)


def _chips(path: StorePath, label: str | None, grid: Grid) -> list[_Unit]:
    """The envelope of every polygon of a vector file, extended to whole pixels."""
    frame = _polygons(path)
    if label is not None and label not in frame:
        raise ConfigError(
            f"{path} has the columns {', '.join(map(str, frame.columns))} and no column {label!r} for the label; "
            "correct --label"
        )
    ids = _ids(path, frame)
    labels = frame[label or "label"] if (label or "label") in frame else [None] * len(frame)
    texts = [_text(value) or None for value in labels]
    # The envelope in EPSG:3857, as images have straight edges there.
    boxes = frame.to_crs(CRS).bounds.to_numpy()
    windows = [_envelope(f"{path}: chip {name}", box, grid) for name, box in zip(ids, boxes, strict=True)]
    return [_Unit(*each) for each in zip(ids, windows, texts, strict=True)]


def _polygons(path: StorePath) -> geopandas.GeoDataFrame:
    try:
        frame = read_frame(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; give polygons as GeoJSON or GeoParquet") from error
    kinds = set(frame.geometry.geom_type) if len(frame) else {"nothing"}
    if frame.crs is None or not kinds <= {"Polygon", "MultiPolygon"}:
        content = ", ".join(sorted(str(kind) for kind in kinds))
        raise DataError(f"{path} holds {content} in CRS {frame.crs}: expected polygons, none empty, with a CRS")
    return frame


def _ids(path: StorePath, frame: geopandas.GeoDataFrame) -> list[str]:
    """Ids of the polygons, made valid file names."""
    if "id" not in frame:
        columns = ", ".join(map(str, frame.columns))
        raise DataError(f"{path} has the columns {columns} and no column `id`, which names the chips' files; add it")
    texts = [_text(value) for value in frame["id"]]
    if missing := texts.count(""):
        raise DataError(f"{missing} of {len(texts)} polygons in {path} have no id; add them")
    # Ids become names of files.
    ids = [slug(text) for text in texts]
    if twice := [name for name, count in Counter(ids).items() if count > 1 or name == "collection"]:
        raise DataError(
            f"{path} has ids that are reserved or used twice ({listed(twice)}), expected all different; change them"
        )
    return ids


def _text(value: Any) -> str:  # noqa: ANN401 - a cell of a table
    """A cell as text, "" if empty; whole floats get no point, because pandas makes integers with gaps floats."""
    if pd.isna(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _envelope(name: str, bounds: np.ndarray, grid: Grid) -> Window:
    if not np.isfinite(bounds).all():
        raise DataError(f"{name} cannot be projected to {CRS}, expected a polygon between 85 S and 85 N")
    left, bottom, right, top = map(float, bounds)
    if right - left > HALF_WORLD:
        raise DataError(f"{name} lies on both sides of 180 degrees, where no image does; divide the polygon there")
    window = grid.window_of((left, bottom, right, top))
    if not 0 < min(window.width, window.height) <= max(window.width, window.height) <= _LARGEST_CHIP:
        raise DataError(
            f"{name} would have {window.width} x {window.height} px, expected 1 to {_LARGEST_CHIP} per side; correct "
            "the polygon"
        )
    return window


def _check_limit(service: Service, tiles: int) -> None:
    if tiles > (limit := service.fetching.limit):
        raise ConfigError(
            f"{tiles} tiles of zoom {service.zoom} would be fetched, the limit is {limit}; "
            "choose a smaller region or a coarser resolution, or raise the limit"
        )


# -- images and items --------------------------------------------------------------------------------------------------


def _exists(job: _Job, unit: _Unit) -> bool:
    """Whether image and item exist; a changed label is updated.

    Raises:
        DataError: they have another place, resolution, server or zoom.
    """
    path = job.folder / f"{unit.id}.json"
    try:
        row = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: a partial file
        return False
    properties, made_of = row["properties"], job.facts | job.place(unit.window)
    if different := [key for key, value in made_of.items() if properties.get(key) != value]:
        key = different[0]
        raise DataError(
            f"{path} has {key} {properties.get(key)}, expected {made_of[key]}: it was fetched with other settings; "
            "choose another --out"
        )
    if properties.get(LABEL) != unit.label:
        row["properties"] = {key: value for key, value in properties.items() if key != LABEL} | _labelled(unit)
        put(path, json.dumps(row, indent=2, ensure_ascii=False).encode())
    return bool((job.folder / f"{unit.id}.tif").exists())


def _fetch_all(job: _Job, todo: Sequence[_Unit]) -> tuple[list[_Unit], list[str]]:
    """Fetch units, with a progress line on stderr: (fetched units, error messages of the others).

    A failed unit does not stop the others; three in a row do, because the server is then probably down.
    """
    fetched: list[_Unit] = []
    failures: list[str] = []
    in_a_row = 0
    with session(job.service) as server, progress.shown(job.folder.name, len(todo)) as advance:
        for unit in todo:
            try:
                fetched += _fetch(job, server, unit)
                in_a_row = 0
            except DataError as error:
                failures.append(str(error))
                in_a_row += 1
            advance(1, f"{len(failures)} failed")
            if in_a_row == _FAILURES_IN_A_ROW:
                break
    return fetched, failures


def _fetch(job: _Job, server: Session, unit: _Unit) -> list[_Unit]:
    """Write one unit's image, then its item; without data on the server, write neither and return an empty list."""
    around = job.around(unit.window)
    rgba_CHW = _resampled(mosaic(server, around), job, around, unit.window)
    valid_HW = rgba_CHW[3] > 0
    if not valid_HW.any():
        _log.warning("%s: the server has no imagery there", unit.id)
        return []
    # the item last: its presence marks the unit as complete
    partly = None if valid_HW.all() else valid_HW
    image = cog.write_image(
        job.folder / f"{unit.id}.tif", rgba_CHW[:3], job.grid, unit.window, bands=BANDS, valid_HW=partly
    )  # fmt: skip
    stac_write.write_item(_item(job, unit, image), job.folder / f"{unit.id}.json")
    return [unit]


def _resampled(mosaic_CHW: np.ndarray, job: _Job, around: Window, window: Window) -> np.ndarray:
    """Resample the mosaic (native pixels of `around`) to the output grid, each pixel the mean of the data under it."""
    native = job.service.native
    if native.resolution == job.grid.resolution:
        return mosaic_CHW
    image_CHW = np.zeros((4, window.height, window.width), np.uint8)
    reproject(
        mosaic_CHW,
        image_CHW,
        src_transform=native.transform(around),
        src_crs=crs_of(CRS),
        dst_transform=job.grid.transform(window),
        dst_crs=crs_of(CRS),
        resampling=Resampling.average,
        # Transparent pixels do not count in the mean.
        src_alpha=4,
        dst_alpha=4,
        tolerance=1e-9,
    )
    return image_CHW


def _item(job: _Job, unit: _Unit, image: WrittenFile) -> pystac.Item:
    """The unit's item with its source and attribution.

    Its time is the time of fetching, because the acquisition time is unknown.
    """
    item = stac_write.item_of(unit.id, job.grid, unit.window, folder=job.folder, files=[image])
    item.assets = {"image": item.assets[unit.id]}
    # Half a pixel may reach beyond 180 degrees, which would be ground of the other side.
    ground = shapely.box(*job.grid.bounds(unit.window)).intersection(shapely.box(*_WORLD))
    item.geometry, item.bbox = stac_write.lonlat_geometry(mapping(ground), crs_of(CRS), name=unit.id)
    item.datetime = datetime.now(UTC).replace(microsecond=0)
    site = urlsplit(job.service.public)
    providers = [{"name": site.hostname, "roles": ["host"], "url": f"{site.scheme}://{site.netloc}"}]
    if job.attribution:
        providers.insert(0, {"name": job.attribution, "roles": ["licensor", "producer"]})
        item.properties["attribution"] = job.attribution
    item.properties |= job.facts | _labelled(unit) | {
        "created": datetime_to_str(item.datetime),
        "license": "other",
        "providers": providers,
        "processing:level": "L3",
        "processing:lineage": f"Web-map tiles {job.service.public} of zoom {job.service.zoom}, averaged by area.",
    }  # fmt: skip
    return item


def _labelled(unit: _Unit) -> dict[str, str]:
    return {} if unit.label is None else {LABEL: unit.label}


def _link(out: StorePath, job: _Job, fetched: Sequence[_Unit], old: Sequence[_Unit]) -> str:
    """Link the fetched items, and items that an interrupted ingest left unlinked; return the catalogue's URI."""
    linked: set[str] = set()
    if (path := job.folder / "collection.json").exists():
        linked = {link["href"] for link in json.loads(path.read_text())["links"]}
    new = [*fetched, *(unit for unit in old if f"./{unit.id}.json" not in linked)]
    # Read from the files: old items were fetched by an earlier call.
    rows = [json.loads((job.folder / f"{unit.id}.json").read_text()) for unit in new]
    items = [pystac.Item.from_dict(row, preserve_dict=False) for row in rows]
    return stac_write.write_catalog(out, {job.folder.name: items})
