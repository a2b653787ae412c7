"""Polygons in files of others: few formats are opened, and rows without a geometry are left out alone and by name."""

import io
import logging
import re
from typing import TYPE_CHECKING

import numpy as np
from shapely.errors import ShapelyError

from rayseg.errors import DataError, listed
from rayseg.store import StorePath, allowed_drivers, is_local, suffix_of, upath

if TYPE_CHECKING:  # takes long to import, and few commands read polygons
    import geopandas

_log = logging.getLogger(__name__)
SUFFIXES = (".parquet", ".geoparquet", ".geojson", ".gpkg", ".fgb", ".shp")
"""Of files of polygons, in lower case; formats are told by content."""
_HEAD = 1 << 16
_GEOJSON = re.compile(rb'"type"\s*:\s*"(FeatureCollection|Feature|(Multi)?Polygon|GeometryCollection)"')
_FOREIGN_JSON = re.compile(rb'"(type"\s*:\s*"Topology|esriGeometryType|geometryType)"')
_NAMED = 5
_DAMAGED: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, LookupError, TypeError, ShapelyError)
"""What pyogrio, pyarrow and shapely raise on files whose headers, metadata or geometries are cut or damaged."""


def read_frame(path: StorePath, *, every: bool = False) -> "geopandas.GeoDataFrame":
    """The rows with a geometry of a GeoJSON, GeoPackage, FlatGeobuf, GeoParquet or Shapefile.

    The format is recognized by content, as GDAL does; `--allow-driver` opens others by the driver of their suffix. Rows
    whose geometry is null or empty are left out, with a warning that names them, unless `every` row is asked for.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is of another format, cannot be read, or has no column of geometries.
    """
    import geopandas

    target = upath(path)
    with target.open("rb") as file:
        head = file.read(_HEAD)
    kind = _kind(head)
    allowed = {name.lower() for name in allowed_drivers()}
    if not kind and allowed.isdisjoint(name.lower() for name in _drivers(path)):
        raise DataError(
            f"{path} is damaged, or not a GeoJSON, GeoPackage, FlatGeobuf, GeoParquet or Shapefile; convert it, or, if "
            f"you trust where it is from, allow its GDAL driver with --allow-driver {(_drivers(path) or ['NAME'])[0]}"
        )
    source = str(target) if is_local(target) else io.BytesIO(target.read_bytes())
    try:
        if kind == "Parquet":
            frame = geopandas.read_parquet(source)
        else:
            frame = geopandas.read_file(source, engine="pyogrio", **_layer(source, path))
    except _DAMAGED as error:
        raise DataError(f"{path} cannot be read as polygons: {error}; give GeoParquet or GeoJSON") from error
    if not isinstance(frame, geopandas.GeoDataFrame):
        raise DataError(f"{path} has no geometries, expected polygons; give GeoParquet or GeoJSON")
    return frame if every else _placed(frame, path)


def _layer(source: str | io.BytesIO, path: StorePath) -> dict[str, str]:
    """The first layer with geometries, for geopandas; a warning names the others, which are not read."""
    import pyogrio

    layers = [str(name) for name, kind in pyogrio.list_layers(source) if kind is not None]  # styles are tables
    if len(layers) > 1:
        _log.warning(
            "%s has the layers %s, only %s is read: save the others as files of their own",
            *(path, listed(layers, most=_NAMED), layers[0]),
        )
    return {"layer": layers[0]} if layers else {}


def _kind(head: bytes) -> str:
    """The format by the first bytes of a file, "" for any other."""
    if head.startswith(b"SQLite format 3\0") and head[68:72] in {b"GPKG", b"GP10", b"GP11"}:
        return "GPKG"
    signatures = {b"PAR1": "Parquet", b"fgb\x03fgb": "FlatGeobuf", b"\x00\x00\x27\x0a": "ESRI Shapefile"}
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{") and _GEOJSON.search(text) and not _FOREIGN_JSON.search(text):
        return "GeoJSON"
    return next((kind for signature, kind in signatures.items() if head.startswith(signature)), "")


def _drivers(path: StorePath) -> list[str]:
    """GDAL's vector drivers of a file's suffix; several read KML."""
    import pyogrio

    suffix = suffix_of(path)
    if suffix == ".kml":
        return ["KML", "LIBKML"]
    try:
        return [pyogrio.detect_write_driver(f"a{suffix}")]
    except ValueError:
        return []


def _placed(frame: "geopandas.GeoDataFrame", path: StorePath) -> "geopandas.GeoDataFrame":
    lost = np.flatnonzero(frame.geometry.isna() | frame.geometry.is_empty)
    if not len(lost):
        return frame
    ids = frame["id"].tolist() if "id" in frame else [None] * len(frame)
    names = [f"{at + 1}" if ids[at] is None else f"{at + 1} (id {ids[at]})" for at in lost]
    _log.warning(
        "%d of %d rows of %s have no geometry and are left out: %s; give them one, or remove them",
        *(len(lost), len(frame), path, listed(names, most=_NAMED)),
    )
    return frame.iloc[np.setdiff1d(np.arange(len(frame)), lost)].reset_index(drop=True)
