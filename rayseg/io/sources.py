"""Sources of imagery as flat records, where they lie, and the function that opens image files."""

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import rasterio
import shapely
from affine import Affine
from pyproj.exceptions import ProjError
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import CRSError, RasterioError
from rasterio.io import DatasetReader
from rasterio.session import DummySession
from rasterio.warp import calculate_default_transform, transform, transform_bounds
from shapely.errors import ShapelyError
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from rayseg.errors import DataError
from rayseg.geo.grid import Bounds, Window
from rayseg.geo.lonlat import (
    earth_on,
    from_lonlat,
    geographic,
    lobes_of,
    normalised,
    sound,
    to_lonlat,
)
from rayseg.io import drivers, remote
from rayseg.io.gdal_errors import gdal_errors
from rayseg.io.orientation import upright
from rayseg.io.times import time_order
from rayseg.store import is_local, public, upath

_log = logging.getLogger(__name__)
SCHEMES = ("", "file", "s3", "http", "https")
_OPTIONS = {
    "GDAL_CACHEMAX": 256 << 20,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",  # its shortcut returns garbage instead of an error for a truncated PNG
}
PIXELS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # transform of an image without georeference
STORED = (1.0, 0.0)  # scale and offset of values that are units already
NO_NODATA = math.inf  # nodata of a mask whose every value counts, whatever the file declares
_NAMELESS = (ColorInterp.undefined, ColorInterp.gray)
_FAULTS = (RasterioError, CRSError, CPLE_BaseError, ProjError)


Frame = tuple[str | None, tuple[float, ...], int, int]
"""CRS, transform, height and width of a file, as in `Source`."""


@dataclass(frozen=True)
class Source:
    """One item of imagery: its files and the georeference of its pixels.

    Attributes:
        item_id: the item's id.
        assets: (href, names of the bands in file order) of every image file.
        crs: "EPSG:n" or WKT; None for an image without georeference.
        transform: a, b, c, d, e, f of the affine from (col, row) to CRS coordinates, of the finest file.
        height: rows of that file.
        width: columns of that file.
        dtype: numpy name of its pixel type.
        nodata: value that the item (not only the file) declares as nodata; None for NaN and infinity, which always are.
        datetime: `times.utc_text` ("2020-08-31T00:00:00Z"), None when unknown.
        href: of the item, "" if it was not read from a file.
        gcps: the files have ground control points only; `transform` is then just the box around them.
        units: (scale, offset) of each of `bands`, from stored values to units; empty if not stated.
        nodatas: in place of `nodata`, the value of each of `bands`, if bands differ; else empty.
        change: (factor, addend) of each of `bands` that are applied to values as they are read; empty for none.
        dtypes: of each of `bands`, if they are several or an item does not state that they are one; "" for unknown.
        baseline: of Sentinel-2 processing ("04.00"), if it alone determines the offset of the values.
        frames: (crs, transform, height, width) that the item states of each file, if they cover different ground.
        sure: of a mask that a model made: the file of its scores, and the score below which a pixel is not labelled.
    """

    item_id: str
    assets: tuple[tuple[str, tuple[str, ...]], ...]
    crs: str | None
    transform: tuple[float, ...]
    height: int
    width: int
    dtype: str
    nodata: float | None = None
    datetime: str | None = None
    href: str = ""
    gcps: bool = False
    units: tuple[tuple[float, float], ...] = ()
    nodatas: tuple[float | None, ...] = ()
    change: tuple[tuple[float, float], ...] = ()
    baseline: str = ""
    dtypes: tuple[str, ...] = ()
    frames: tuple[Frame, ...] = field(default=(), repr=False)  # trainings identify their images by their repr
    sure: tuple[str, float] = field(default=("", 0.0), repr=False)

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of all bands, file after file."""
        return tuple(name for _, names in self.assets for name in names)

    def to_row(self) -> dict[str, Any]:
        """The source as plain values that JSON and Arrow keep."""
        assets = [{"href": href, "bands": list(names)} for href, names in self.assets]
        row = {**asdict(self), "assets": assets, "transform": list(self.transform)}
        # Fields that a later version added are left out, so that older runs keep their keys.
        absent = [name for name, used in (("frames", self.frames), ("sure", self.sure[0])) if not used]
        return {name: value for name, value in row.items() if name not in absent}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Source":
        """The source that `to_row` made this row of."""
        assets = tuple((asset["href"], tuple(asset["bands"])) for asset in row["assets"])
        pairs = {key: tuple((a, b) for a, b in row.get(key, ())) for key in ("units", "change")}
        lists = {key: tuple(row.get(key, ())) for key in ("transform", "nodatas", "dtypes")} | {"assets": assets}
        frames = tuple((crs, tuple(affine), *size) for crs, affine, *size in row.get("frames", ()))
        href, least = row.get("sure", ("", 0.0))
        return cls(**{**row, **lists, **pairs, "frames": frames, "sure": (href, least)})

    def of_file(self, href: str) -> "Source":
        """The source with the georeference that its item states of one of its files."""
        if not self.frames:
            return self
        crs, transform, height, width = next(
            frame for (own, _), frame in zip(self.assets, self.frames, strict=True) if own == href
        )
        return replace(self, crs=crs, transform=transform, height=height, width=width)


def from_json(text: str) -> list[Source]:
    """The sources in a JSON list."""
    return [Source.from_row(row) for row in json.loads(text)]


@remote.patient
def source_of_file(href: str, item_id: str, *, datetime: str | None = None) -> Source:
    """The image file at `href` as a source of its own; `band_names` gives the names of its bands.

    Args:
        href: local path, `file:`, `s3://`, `http(s)://`.
        item_id: its id.
        datetime: acquisition time, ISO 8601 in UTC.

    Raises:
        DataError: the file cannot be opened, or has a sensor model instead of a georeference.
    """
    with gdal(href), open_file(href) as dataset:
        source = described(dataset)
        if source.crs is None and dataset.rpcs:
            raise DataError(
                f"{href} has RPCs (a model of the sensor) instead of a georeference; orthorectify it first, with "
                "gdalwarp -rpc -to RPC_DEM=DEM.tif -t_srs EPSG:CODE, or remove its RPCs to map it in its own pixels"
            )
        # Pages of one TIFF may be bands, dates or thumbnails: that cannot be known here.
        if pages := len(dataset.subdatasets):
            _log.warning(
                "%s holds %d images, only the first is read: save the others as files of their own", href, pages
            )
        return replace(source, item_id=item_id, assets=((href, band_names(dataset)),), datetime=datetime)


def band_names(dataset: DatasetReader) -> tuple[str, ...]:
    """Names of an open dataset's bands in file order.

    A band's description, else its colour (red, green, blue, alpha, palette); 3 or 4 uint8 bands without either are
    red, green, blue (and nir, as aerial imagery is delivered); anything else is b1, b2, ... by position.
    """
    colors = [color.name if color not in _NAMELESS else "" for color in dataset.colorinterp]
    names = [text or color for text, color in zip(dataset.descriptions, colors, strict=True)]
    position = [f"b{index}" for index in dataset.indexes]
    visible = [name for name in names if name != "alpha"]
    if len(visible) in {3, 4} and set(visible) <= {"", "red", "green", "blue"} and set(dataset.dtypes) == {"uint8"}:
        position[:4] = ["red", "green", "blue", "nir"][: len(position)]
    unique = [name or other for name, other in zip(names, position, strict=True)]
    return tuple(unique) if len(set(unique)) == len(unique) else tuple(f"b{index}" for index in dataset.indexes)


# -- files -------------------------------------------------------------------------------------------------------------


def described(dataset: DatasetReader) -> Source:
    """An open dataset as a source without id and files."""
    crs, affine, gcps = dataset.crs, dataset.transform, False
    height, width = dataset.shape
    if not crs and dataset.gcps[0]:
        points, crs = dataset.gcps
        gcps = True
        box, columns, rows = calculate_default_transform(crs, crs, width, height, gcps=points)
        affine = box @ Affine.scale(columns / width, rows / height)
        if crs.is_geographic and not -180 <= affine.c <= affine.c + affine.a * width <= 180:
            raise DataError(
                f"{dataset.name} has control points in degrees on both sides of 180, half of which GDAL loses; "
                "reproject them to a UTM zone, or the image with gdalwarp -t_srs EPSG:CODE"
            )
    # NaN and infinity are nodata in any file.
    nodatas = tuple(None if value is None or not math.isfinite(value) else value for value in dataset.nodatavals)
    nodata, nodatas = (nodatas[0], ()) if len(set(nodatas)) == 1 else (None, nodatas)
    if crs is None and dataset.transform != Affine.identity():
        crs = _prj_crs(dataset.name)
    units = tuple(zip(dataset.scales, dataset.offsets, strict=True))
    for unit in units:
        expect_unit(dataset.name, unit)
    units = units if set(units) != {STORED} else ()
    place = (crs_text(crs), tuple(affine)[:6], height, width)
    dtypes = tuple(dataset.dtypes) if len(set(dataset.dtypes)) > 1 else ()  # a VRT may have several
    return Source("", (), *place, dataset.dtypes[0], nodata, gcps=gcps, units=units, nodatas=nodatas, dtypes=dtypes)


def _prj_crs(href: str) -> CRS | None:
    """The CRS in the `.prj` next to a file with a world file, which GDAL reads for few formats; None without one."""
    beside = (upath(href).with_suffix(suffix) for suffix in (".prj", ".PRJ")) if is_local(href) else ()
    if (path := next((path for path in beside if path.exists()), None)) is None:
        return None
    try:
        return CRS.from_wkt(path.read_text(), morph_from_esri_dialect=True)
    except (CRSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CRS in WKT: {error}; correct it, or remove it") from None


def expect_unit(name: str, unit: tuple[float, float]) -> None:
    """Refuse a scale and an offset that give no value for stored ones.

    Raises:
        DataError: one is not finite, or the scale is 0.
    """
    if not (unit[0] and np.isfinite(unit).all()):
        raise DataError(
            f"{name} states the scale {unit[0]:g} and the offset {unit[1]:g}, expected finite numbers and a scale "
            "other than 0; correct them, in a file with gdal_edit.py -scale 1 -offset 0"
        )


def open_file(href: str, allowed: tuple[str, ...] = ()) -> DatasetReader:
    """The image file at `href`, open; inside `gdal`.

    Args:
        href: local path or URL.
        allowed: the only drivers that may open it; by default those of `drivers.opened`.

    Raises:
        DataError: the href's scheme is not one of `SCHEMES`, or GDAL cannot open it, with all of its header.
    """
    if urlsplit(href).scheme not in SCHEMES or href.startswith("/vsi"):
        raise DataError(f"{href} cannot be read: expected a local path or one of {', '.join(filter(None, SCHEMES))}")

    def attempt() -> DatasetReader:
        with _refused(href):  # errors in the header are logged while the file opens
            return upright(drivers.opened(href, allowed), href)

    return remote.patiently(attempt)


@contextmanager
def gdal(name: str, window: Window | None = None) -> Iterator[None]:
    """GDAL's options, and its errors, those that it only logs included, as DataError that names file and window."""
    options = _OPTIONS if is_local(name) else {**_OPTIONS, **remote.settings(name)}
    with _refused(name, f" in {window}" if window else ""), rasterio.Env(**options):
        yield


@contextmanager
def _refused(name: str, place: str = "") -> Iterator[None]:
    try:
        with gdal_errors() as messages:
            yield
    except _FAULTS as error:
        reason = str(error.__cause__ or error)
        if "not recognized as being in a supported" in reason:
            reason = drivers.unknown(name)
    else:
        reason = messages[0] if messages else ""
    if reason:
        raise remote.failure(name, public(f"{name} cannot be read{place}: {reason.rstrip('.')}"))


@contextmanager
def placing(name: str, crs: str | CRS) -> Iterator[None]:
    """Errors of GDAL and of overlays in a transformation from or to `crs` as DataError that names what it places."""
    try:
        # No file is opened: without its session, rasterio would prepare a request to AWS, 8 ms wherever keys are set.
        with rasterio.Env(session=DummySession()):
            yield
    except (*_FAULTS, ShapelyError) as error:
        place = f"{name} cannot be placed on Earth by its CRS {name_of_crs(str(crs))}"
        if isinstance(error, ShapelyError):
            raise DataError(
                f"{place}: its outline in degrees crosses itself, is empty or leaves the Earth, expected one area; "
                "check its georeference, or cut it to the area of use of its CRS"
            ) from error
        raise DataError(f"{place}; check its georeference, and that it is not of another planet") from error


# -- place ------------------------------------------------------------------------------------------------------------


def newest_first(sources: Sequence[Source]) -> list[Source]:
    """Sources by time, newest first, then by id."""
    return sorted(sorted(sources, key=lambda s: s.item_id), key=lambda s: time_order(s.datetime), reverse=True)


def ring_of(source: Source) -> shapely.Polygon:
    """The source's outline in its own CRS.

    Raises:
        DataError: its transform is not finite, or gives its pixels no area.
    """
    affine, width, height = Affine(*source.transform), source.width, source.height
    corners = [affine @ corner for corner in ((0, 0), (0, height), (width, height), (width, 0))]
    if np.isfinite(corners).all() and (outline := shapely.Polygon(corners)).is_valid and outline.area > 0:
        return outline
    raise DataError(
        f"{source.item_id} cannot be placed by its transform {source.transform}: expected finite numbers that give a "
        "pixel two sides; correct its georeference"
    )


@lru_cache(maxsize=4096)
def outline_of(source: Source) -> BaseGeometry:
    """The source's outline in EPSG:4326, cut at the antimeridian; it has an area and does not cross itself.

    Raises:
        DataError: it has none, or a part of it has coordinates outside the Earth.
    """
    outline, crs = ring_of(source), str(source.crs)
    edges = shapely.segmentize(orient(outline), outline.length / 128)
    with placing(source.item_id, crs):
        # A geographic CRS may count to 360.
        return sound(normalised(edges) if geographic(crs) else to_lonlat(np.array([edges], object), crs)[0])


def part_of_image(source: Source) -> tuple[int, int] | None:
    """(col, row) at which a file without CRS lies in its image, if its transform is that of a tile (see `cog`)."""
    a, b, x, d, e, y = source.transform
    placed = source.crs is None and (a, b, d, e) == (1, 0, 0, -1) and x >= 0 >= y
    return (int(x), int(-y)) if placed and float(x).is_integer() and float(y).is_integer() else None


@lru_cache(maxsize=256)
def crs_of(text: str) -> CRS:
    """The CRS of an EPSG code or WKT, parsed once."""
    return CRS.from_user_input(text)


@lru_cache(maxsize=256)
def same_crs(one: str, other: str) -> bool:
    """Whether two CRS texts (EPSG code or WKT) describe the same system."""
    return one == other or bool(crs_of(one) == crs_of(other))


def holds(dtype: str, value: float) -> bool:
    """Whether a pixel type (numpy name) can hold a value; one that it cannot hold is not the nodata of any pixel."""
    if dtype not in np.sctypeDict:  # of GDAL or STAC alone
        return True
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        return float(value).is_integer() and np.iinfo(kind).min <= value <= np.iinfo(kind).max
    with np.errstate(over="ignore"):
        return not math.isfinite(value) or bool(np.isfinite(kind.type(value)))


def crs_text(crs: CRS | None) -> str | None:
    """A rasterio CRS as "EPSG:n" where it has a code, else as WKT; None stays None."""
    if not crs:
        return None
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt())


def moved(source: Source, crs: str, pixels: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(x, y) in `crs` of points given in pixels (col, row) from the source's centre."""
    affine = Affine(*source.transform)
    points = [affine @ (source.width / 2 + col, source.height / 2 + row) for col, row in pixels]
    with placing(source.item_id, str(source.crs)):
        xs, ys = transform(crs_of(str(source.crs)), crs_of(crs), [x for x, _ in points], [y for _, y in points])
    if not np.isfinite([*xs, *ys]).all():
        raise DataError(f"{source.item_id} cannot be placed in {crs}; check its georeference")
    return list(zip(xs, ys, strict=True))


def bounds_in(source: Source, crs: str) -> Bounds:
    """Bounds of the source in `crs`, from points along the edges."""
    bounds = bounds_of(source)
    if same_crs(str(source.crs), crs):
        return bounds
    earth = earth_on(str(source.crs))
    with placing(source.item_id, str(source.crs)):
        if (there := earth_on(crs)) is not None or (earth is not None and not earth.contains(ring_of(source))):
            # Corners are in space, or lie on the side of the Earth that is not seen.
            seen = to_lonlat(np.array([there], object), crs)[0] if there is not None and not lobes_of(crs) else None
            area = outline_of(source) if seen is None else outline_of(source).intersection(seen)
            around: Bounds = from_lonlat(shapely.segmentize(area, 0.1), crs).bounds
            return around
        moved: Bounds = transform_bounds(crs_of(str(source.crs)), crs_of(crs), *bounds, densify_pts=21)
    if not np.isfinite(moved).all():
        raise DataError(f"{source.item_id} with bounds {bounds} cannot be placed in {crs}; check its georeference")
    return moved


def name_of_crs(text: str) -> str:
    """The code or the name of a CRS given as EPSG code or WKT, for messages."""
    match = re.search(r'"([^"]+)"', text)
    return match[1] if match else text


def same_place(one: Source, other: Source, *, part: bool = False) -> bool:
    """Whether two rasters with CRS cover the same ground to within a pixel of the coarser one.

    Boxes around control points are approximate: of those a tenth of the width and height counts.

    Args:
        one: a raster.
        other: another one.
        part: one may also cover a part of the other only.

    Raises:
        DataError: one cannot be placed in the CRS of the other.
    """
    box_4, their_4 = np.array(bounds_in(one, str(other.crs))), np.array(bounds_of(other))
    sizes = [(source.width, source.height) if not source.gcps else (10, 10) for source in (one, other)]
    steps = [(box[2:] - box[:2]) / size for box, size in zip((box_4, their_4), sizes, strict=True)]
    beyond_4, pixel_4 = (box_4 - their_4) * (-1, -1, 1, 1), np.tile(np.maximum(*steps), 2)
    inside, around = bool((beyond_4 <= pixel_4).all()), bool((-beyond_4 <= pixel_4).all())
    return inside or around if part else inside and around


def expect_same_place(href: str, file: Source, stated: Source) -> None:
    """Refuse a file that lies elsewhere than its item states: a run is planned by the item, and would miss it.

    Args:
        href: of the file.
        file: as `described` reads it.
        stated: with the item's georeference of this file; without CRS the size alone counts.

    Raises:
        DataError: they cover different ground, or the item's only file has another size.
    """
    placed = file.crs is not None and stated.crs is not None
    alone = len(stated.assets) == 1 and not file.gcps  # of several files the finest one has the item's size
    sizes = (file.height, file.width) == (stated.height, stated.width) or (placed and not alone)
    if sizes and (not placed or same_place(file, stated, part=len(stated.assets) > 1 and not stated.frames)):
        return
    found, expected = map(_place_text, (file, stated))
    raise DataError(
        f"{public(href)} has {found}, its item {stated.item_id} states {expected}; correct proj:code, proj:transform, "
        "proj:bbox and proj:shape of the item, or ingest the file again"
    )


def _place_text(source: Source) -> str:
    size = f"{source.height} x {source.width} px"
    if source.crs is None:
        return f"no CRS and {size}"
    return f"{size} in {name_of_crs(source.crs)} within [{', '.join(f'{side:.10g}' for side in bounds_of(source))}]"


def bounds_of(source: Source) -> Bounds:
    """(left, bottom, right, top) around the source's corners, in its own CRS."""
    affine = Affine(*source.transform)
    xs, ys = zip(*(affine @ (col, row) for col in (0, source.width) for row in (0, source.height)), strict=True)
    return min(xs), min(ys), max(xs), max(ys)
