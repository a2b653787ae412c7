"""STAC in: catalogues, APIs and tables of items; items as sources of pixels."""

import logging
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyproj
import pystac
import shapely
from affine import Affine
from rasterio.errors import CRSError
from shapely.affinity import translate
from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry

from rayseg.errors import ConfigError, DataError
from rayseg.geo.lonlat import bounds_of, box_of, divided, jumps, normalised, on_earth
from rayseg.io import drivers, stac_catalog
from rayseg.io.sources import (
    PIXELS,
    STORED,
    Source,
    crs_of,
    crs_text,
    expect_unit,
    holds,
    outline_of,
    same_place,
    source_of_file,
)
from rayseg.io.stac_catalog import Box, Row, resolved
from rayseg.io.tables import concurrently
from rayseg.io.times import UNKNOWN, time_order, utc_text
from rayseg.io.units import Unit, baseline_in, baseline_text
from rayseg.store import suffix_of

_log = logging.getLogger(__name__)
BROKEN = "rayseg:broken"
"""Property of an item that replaces one that cannot be read: the reason."""
_INVALID = (
    *(pystac.STACError, pystac.STACTypeError, shapely.errors.ShapelyError),
    *(AttributeError, ArithmeticError, LookupError, TypeError, ValueError),
)
"""What pystac and shapely raise for JSON that is not as STAC describes it."""
_POLES = shapely.box(-540, -90, 540, 90)
_COARSE = 0.01  # degrees: no pixel of a table's items is taken to be larger than about a kilometre
_DEGREE = 111_320.0  # metres of a degree at the equator
_AROUND = 0.1  # degrees around a region in which a STAC API is searched for scenes of its halo
_PICTURES = ("thumbnail", "overview", "metadata", "visual")
_CODE = re.compile(r"EPSG:\d+", re.IGNORECASE)
"""How a code is kept; "EPSG: 32633" and "EPSG:32633+5773" (with heights) are valid too, but not as a name of a grid."""
_NUMBERED = re.compile(r"(b|band)?[ _-]?\d+", re.IGNORECASE)
_COMMON = {
    "pan", "coastal", "blue", "green", "green05", "yellow", "red", "rededge", "rededge071", "rededge075", "rededge078",
    "nir", "nir08", "nir09", "cirrus", "swir16", "swir22", "lwir", "lwir11", "lwir12", "alpha",
}  # fmt: skip
"""Common names of bands, of STAC's extension `eo`."""
_USUAL_UNITS = {"scale": 1.0, "offset": 0.0}
_STAC_TYPES = {"cint16": "complex_int16", "cint32": "complex64", "cfloat32": "complex64", "cfloat64": "complex128"}


# -- items ------------------------------------------------------------------------------------------------------------


def open_items(
    uri: str, collection: str | None = None, *, geometry: dict[str, Any] | None = None, halo: int = 0
) -> list[pystac.Item]:
    """The items of a catalogue, newest first, then by id.

    Args:
        uri: a catalogue, collection, item or item collection as JSON, an `items.parquet`, or a STAC API.
        collection: id of the collection wanted, wherever it is below; None for all. Of an API also a question, as
            `a,b&datetime=2020-01-01/2020-12-31&query=eo:cloud_cover<20`.
        geometry: GeoJSON in EPSG:4326 that items must meet; an item without geometry and bbox lies where its fields
            or files say, and is one that `source_of` refuses if they do not.
        halo: of their own pixels by which items may miss it, where others meet it.

    Raises:
        ConfigError: there is no such catalogue or collection.
        DataError: no item remains; the message names the bounds of both sides.
    """
    area = None if geometry is None else shape(geometry)
    wide = geometry
    if area is not None and halo:  # no edge of what surrounds a wide area is one across the antimeridian
        wide = mapping(normalised(shapely.segmentize(area.buffer(_AROUND).intersection(_POLES), 90.0)))
    box = None if area is None else (area.buffer(_COARSE * halo) if halo else area).bounds
    # 1. items that may lie near, by their boxes where the catalogue has an index
    items = _read_items(uri, collection, wide, box)
    if area is not None:
        # 2. items without a usable outline are placed by their pixels, which costs a request each
        unclear = [item for item in items if BROKEN not in item.properties and _unclear(item)]
        names = {item.id for item in unclear}
        items = [*(item for item in items if item.id not in names), *concurrently(_placed_by_pixels, unclear)]
    near = [item for item in items if area is None or _near(item, area, halo)]
    # 3. broken items go along, so that each fails by name; alone they are an error
    broken = [item for item in items if BROKEN in item.properties and (not item.geometry or item in near)]
    valid = [item for item in near if BROKEN not in item.properties]
    if not any(area is None or _near(item, area, 0) for item in valid):
        if broken:
            more = f"; and {len(broken) - 1} more such items" if len(broken) > 1 else ""
            raise DataError(f"{broken[0].properties[BROKEN]}{more}")
        # The index has read only what is near: the message needs the bounds of all.
        place = f"{uri}#{collection}" if collection else uri
        everything = _read_items(uri, collection, wide, None) if suffix_of(uri) == ".parquet" else items
        raise DataError(_nothing(place, everything, area))
    by_id = sorted(valid + broken, key=lambda item: item.id)
    return sorted(by_id, key=lambda item: time_order(time_of(item)), reverse=True)


def imagery_collection(uri: str) -> str | None:
    """Id of the collection that holds a catalogue's imagery: `imagery`, else `chips`, else its only one.

    None where the catalogue has no collections, or is one, or only one of its collections can be read.

    Raises:
        ConfigError: there is no such catalogue, or it has several other collections.
    """
    if suffix_of(uri) == ".parquet":
        return None
    names, unread = stac_catalog.collections_of(uri)
    for name in ("imagery", "chips"):
        if name in names:
            if unread:
                _log.warning("%s; the imagery is that of %s", "; ".join(map(str, unread.values())), name)
            return name
    if len(names) > 1:
        raise ConfigError(f"{uri} has the collections {', '.join(sorted(names))}; choose one, as {uri}#{names[0]}")
    return names[0] if names and not unread else None


def _read_items(
    uri: str, collection: str | None, geometry: dict[str, Any] | None, box: Box | None
) -> list[pystac.Item]:
    """The items of a catalogue; those of tables that miss the box, and of APIs the geometry, may be left out.

    An item that cannot be read is one without geometry that `source_of` refuses.
    """
    rows = stac_catalog.rows_of(uri, collection, geometry, box)
    items = [_item_of(row) for row in rows]
    kept: dict[str, pystac.Item] = {}
    # Good items first: a broken one may have the id of one of them.
    for item in sorted(items, key=lambda item: BROKEN in item.properties):
        names = chain([item.id], (f"{item.id}-{number}" for number in range(2, len(items) + 2)))
        name = next(name for name in names if name not in kept or _same(kept[name], item))
        if name != item.id and BROKEN not in item.properties:
            _log.warning("%s has several items called %s, one of them is called %s here", uri, item.id, name)
        if name not in kept:
            item.id, kept[name] = name, item
    return list(kept.values())


def _same(one: pystac.Item, other: pystac.Item) -> bool:
    """Whether two items of one id are one, which a catalogue lists twice."""
    # Items of one tile at several times often have one id, and relative hrefs that look alike.
    bases = [item.get_self_href() or "" for item in (one, other)]
    hrefs = [
        sorted(resolved(asset.href, base) for asset in item.assets.values())
        for item, base in zip((one, other), bases, strict=True)
    ]
    return bool(hrefs[0]) and hrefs[0] == hrefs[1] and one.geometry == other.geometry


def _item_of(row: Row) -> pystac.Item:
    """The item of a row, valid as far as this program uses it; else one that names the reason."""
    reason = row.wrong
    if not reason:
        values = {"links": [], "assets": {}} | row.values
        try:
            if values.get("id") is None:
                raise ValueError("it has no id")
            values["id"] = str(values["id"])  # some programs write numbers
            if row.href:  # relative hrefs are relative to the file that was read, wherever it has been published
                values["links"] = [link for link in values["links"] if link.get("rel") != "self"]
            item = pystac.Item.from_dict(values, href=row.href or None, migrate=True)
            time_of(item)
            _place(item)
        except _INVALID as error:
            reason = f"{row.id} of {row.place} is not a valid STAC item: {_told(error)}"
        else:
            return item
    try:  # where it would be, so that only its own region loses it
        stated = row.values["geometry"]
        place = mapping(normalised(shape(stated))) if _is_place(stated) else None
    except _INVALID:
        place = None
    return pystac.Item(row.id, place, None, UNKNOWN, {BROKEN: reason})


def _place(item: pystac.Item) -> None:
    """Keep the geometry and the bbox that lie on Earth; a bbox alone is the geometry too."""
    if item.geometry and not _is_place(item.geometry):
        item.geometry = None
    if item.bbox and not all(math.isfinite(value) for value in item.bbox):
        raise ValueError("its bbox has values that are not numbers")
    if item.bbox and not on_earth(box_of(item.bbox)):
        item.bbox = None
    if item.bbox and not item.geometry:  # STAC forbids it, but the item has a place
        west, south, east, north = box_of(item.bbox)
        item.geometry = mapping(normalised(divided(shapely.box(west, south, east + 360 * (west > east), north))))


def _is_place(geometry: dict[str, Any]) -> bool:
    """Whether a geometry of GeoJSON lies on Earth; some programs write metres, or no coordinates."""
    outline = shape(geometry)
    normalised(outline)  # raises errors for coordinates that are none
    return on_earth(outline.bounds)


def _unclear(item: pystac.Item) -> bool:
    """Whether an item has no place, or a ring that either crosses the antimeridian or is wider than half a turn."""
    if not item.geometry:
        return True
    outline = shape(item.geometry)
    crosses = item.bbox and box_of(item.bbox)[0] > box_of(item.bbox)[2]
    return not crosses and shapely.box(-180, -91, 180, 91).covers(outline) and bool(jumps(np.array([outline]))[0])


def _placed_by_pixels(item: pystac.Item) -> pystac.Item:
    """The item with the outline of its pixels as its geometry.

    Where they have none, an item without geometry becomes one with the reason, and a ring is read by its direction.
    """
    outline = None
    reason = (
        f"{item.id} has no geometry or bbox on Earth (are longitude and latitude swapped?) and no georeference, so it "
        "lies in no region: state them in its item, or map it without a region"
    )
    try:
        source = source_of(item)
        outline = outline_of(source) if source.crs else None
    except DataError as error:
        reason = str(error).rstrip(".")
    if outline is None and item.geometry:
        outline = normalised(shape(item.geometry), wound=True)
    if outline is None:
        return pystac.Item(item.id, None, None, UNKNOWN, {BROKEN: reason})
    item.geometry, item.bbox = mapping(outline), list(bounds_of(outline))
    return item


def _told(error: Exception) -> str:
    reason = str(error) if isinstance(error, (pystac.STACError, pystac.STACTypeError, ValueError)) else repr(error)
    return f"{' '.join(reason.split()).rstrip('.')[:200]}; correct the item, or remove it from the catalogue"


def _near(item: pystac.Item, area: BaseGeometry, halo: int) -> bool:
    """Whether the item lies within `halo` of its own pixels of the area."""
    if not item.geometry:
        return False
    outline = normalised(shape(item.geometry))
    if not halo:
        return bool(area.intersects(outline))
    turns = [translate(outline, by) for by in (-360.0, 0.0, 360.0)]
    try:
        # The longer side of the item's pixels in degrees, approximately; without proj:shape 1/1024 of its own side.
        fields = (item.properties, *(asset.extra_fields for asset in item.assets.values()))
        sizes = [row["proj:shape"] for row in fields if row.get("proj:shape")]
        height, width = max(sizes, default=(1024, 1024))
        west, south, east, north = box_of(item.bbox or shape(item.geometry).bounds)
        reach = halo * max((east - west + 360 * (west > east)) / width, (north - south) / height)
    except _INVALID:  # fields that `source_of` refuses
        reach = 0.0
    return bool(shapely.dwithin(area, turns, reach).any())


def _nothing(place: str, items: Sequence[pystac.Item], area: BaseGeometry | None) -> str:
    boxes = [box_of(item.bbox or shape(item.geometry).bounds) for item in items if item.geometry]
    if area is None or not boxes:
        return f"{place} holds no items; give a catalogue or collection with items"
    west, south, east, north = zip(*boxes, strict=True)
    have = _box((min(west), min(south), max(east), max(north)))
    return (
        f"the region {_box(area.bounds)} and the imagery of {place} {have} (degrees) do not overlap; choose another one"
    )


def _box(bounds: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in bounds) + "]"


def time_of(item: pystac.Item) -> str | None:
    """The time of an item, else the start of its interval, as `utc_text`."""
    moment = item.datetime or item.common_metadata.start_datetime
    return utc_text(moment) if moment else None


# -- sources ----------------------------------------------------------------------------------------------------------


def source_of(item: pystac.Item, *, bands: Sequence[str] | None = None) -> Source:
    """The item's image files as a source of pixels.

    CRS, transform, shape, pixel type and band names come from the item (projection, eo, raster and STAC 1.1 bands);
    a file is opened only for what is missing. A band is called by its common name (red, nir, ...) where only one has
    it, else by its name; the only band of one file among several without band names by its asset's key.
    Thumbnails and the like are left out, and files that only repeat bands.

    Args:
        item: as read from somewhere, or with absolute hrefs.
        bands: the only bands of interest, by name or common name; other files are ignored.

    Raises:
        DataError: no image asset, no such bands, a relative href of an item from nowhere, an unreadable file, or fields
            that are not as STAC describes them.
    """
    if reason := item.properties.get(BROKEN):
        raise DataError(f"{reason}.")
    try:
        return _source_of(item, bands)
    except _INVALID as error:
        raise DataError(f"{item.id} is not a valid STAC item: {_told(error)}") from error


def _source_of(item: pystac.Item, bands: Sequence[str] | None) -> Source:
    # 1. which files have the bands
    assets = _image_assets(item)
    names = _band_names(assets, bands)
    sides = {key: _pixel_side(item, asset) for key, asset in assets.items()}
    used = _used(names, bands, sides)
    if not used:
        present = [name for names_of in names.values() for name in names_of or ()]
        raise DataError(f"{item.id} has none of the bands {', '.join(bands or ())}: found {', '.join(present)}")
    # 2. what the item states; files are opened for the rest alone, as each costs a request
    hrefs = {key: href_of(item, assets[key]) for key in used}
    frames = {key: frame for key in used if (frame := _frame(item, assets[key]))}
    dtypes = {key: dtype for key in used if (dtype := _dtype(item, assets[key]))}
    unclear = {key for key in used if names[key] is None or key not in frames} | ({used[0]} if not dtypes else set())
    opened = {key: source_of_file(hrefs[key], item.id) for key in used if key in unclear}
    if any(source.units for source in opened.values()):  # then the item's other files have tags with units too
        opened |= {key: source_of_file(hrefs[key], item.id) for key in used if key not in opened}
    frames |= {key: source for key, source in opened.items() if key not in frames}
    dtypes |= {key: source.dtype for key, source in opened.items() if key not in dtypes}
    # 3. the finest file gives the grid; nodata, scale and offset may differ from band to band
    first = min(frames, key=lambda key: (_side(frames[key]), used.index(key)))
    counts = {key: len(names[key] or opened[key].bands) for key in used}
    of_files = {key: source.dtypes for key, source in opened.items() if len(source.dtypes) == counts[key]}
    each = tuple(name for key in used for name in of_files.get(key, (dtypes.get(key, ""),) * counts[key]))
    nodatas = tuple(
        None if value is None or (key in dtypes and not holds(dtypes[key], value)) else value
        for key in used
        for value in nodatas_of(item, assets[key], counts[key])
    )
    units = _units(item, [(assets[key], counts[key], opened.get(key)) for key in used])
    main = frames[first]
    places = [frames.get(key, main) for key in used]
    apart = any(place.crs and not (main.crs and same_place(place, main)) for place in places)
    return Source(
        item_id=item.id,
        assets=tuple((hrefs[key], names[key] or opened[key].bands) for key in used),
        crs=main.crs,
        transform=main.transform if main.crs else PIXELS,
        height=main.height,
        width=main.width,
        dtype=dtypes.get(first) or next(iter(dtypes.values())),
        nodata=nodatas[0] if len(set(nodatas)) == 1 else None,
        datetime=time_of(item),
        href=item.get_self_href() or "",
        gcps=main.gcps,
        units=units,
        nodatas=() if len(set(nodatas)) == 1 else nodatas,
        baseline="" if units else _baseline(item),
        dtypes=() if len(set(each)) == 1 else each,
        frames=tuple((one.crs, one.transform, one.height, one.width) for one in places) if apart else (),
    )


def _image_assets(item: pystac.Item) -> dict[str, pystac.Asset]:
    """Assets with pixels: those of role data if there are any, pictures (visual, thumbnail, ...) last or not at all."""
    images = {
        key: asset
        for key, asset in item.assets.items()
        if (asset.media_type or "").lower().startswith("image/") or drivers.kind_of(asset.href)
    }
    plain = {
        key: a for key, a in images.items() if not {key, *(a.roles or ())} & set(_PICTURES) or "data" in (a.roles or ())
    }
    data = {key: asset for key, asset in plain.items() if "data" in (asset.roles or ())}
    if any(_is_map(asset) for asset in plain.values()):  # a browse picture without a role
        plain = {key: asset for key, asset in plain.items() if _is_map(asset)}
    chosen = data or plain or {key: a for key, a in images.items() if "visual" in {key, *(a.roles or ())}}
    if not chosen:
        raise DataError(
            f"{item.id} has no image asset: found {', '.join(sorted(item.assets)) or 'none'}; give one the role data"
        )
    return dict(sorted(chosen.items(), key=lambda entry: entry[0] == "visual"))


def _is_map(asset: pystac.Asset) -> bool:
    kind = drivers.kind_of(asset.href)
    if not asset.media_type and kind:
        return kind[0] not in {"PNG", "JPEG"}
    return (asset.media_type or "").lower().startswith(("image/tiff", "image/jp2", "image/vnd.stac.geotiff"))


def _rows(asset: pystac.Asset, field: str) -> list[dict[str, Any]]:
    return [row for row in asset.extra_fields.get(field) or [] if isinstance(row, dict)]


def _band_names(assets: dict[str, pystac.Asset], wanted: Sequence[str] | None) -> dict[str, tuple[str, ...] | None]:
    """Names of each asset's bands; None if only the file has them."""
    bands = {key: _named_rows(asset) for key, asset in assets.items()}
    pairs = {key: [(_text_in(row, "name"), _common_name(row)) for row in rows] for key, rows in bands.items()}
    # A common name that several bands have ("rededge" of Sentinel-2) is not a name.
    holders: dict[str, set[str | None]] = {}
    for name, common in (pair for rows in pairs.values() for pair in rows):
        holders.setdefault(common or "", set()).add(name or common)
    names: dict[str, tuple[str, ...] | None] = {}
    for key, rows in pairs.items():
        known = [
            common if common and len(holders[common]) == 1 and name not in (wanted or ()) else name
            for name, common in rows
        ]
        named = tuple(name for name in known if name)
        lonely = (key,) if len(assets) > 1 and len(rows) <= 1 else None
        names[key] = named if named and len(named) == len(rows) else lonely
    return names


def _text_in(row: dict[str, Any], field: str) -> str | None:
    """A field's text; some programs write numbers as names."""
    return None if row.get(field) is None else str(row[field])


def _named_rows(asset: pystac.Asset) -> list[dict[str, Any]]:
    """The rows of an asset's bands; that of a single band may have its names on the asset, as STAC 1.1 allows."""
    rows = _rows(asset, "bands") or _rows(asset, "eo:bands")
    if len(rows) > 1:
        return rows
    own: dict[str, Any] = {
        name: asset.extra_fields[name] for name in ("name", "eo:common_name") if name in asset.extra_fields
    }
    return [own | rows[0]] if rows else [own] if "eo:common_name" in own else []


def _common_name(row: dict[str, Any]) -> str | None:
    """The band's common name; of a band that is only numbered its description if that is one (rio-stac's way)."""
    stated = _text_in(row, "eo:common_name") or _text_in(row, "common_name")
    described = str(row.get("description") or "").strip().lower()
    numbered = _NUMBERED.fullmatch(str(row.get("name") or ""))
    return stated or (described if numbered and described in _COMMON else None)


def _used(
    names: dict[str, tuple[str, ...] | None], wanted: Sequence[str] | None, sides: Mapping[str, float]
) -> list[str]:
    """Keys of the assets with a (wanted) band that no asset of smaller pixels, or before it, has."""
    seen: set[str] = set()
    used = set()
    for key in sorted(names, key=lambda key: (key == "visual", sides[key])):
        bands = names[key]
        fresh = set(bands or ()) - seen
        if bands is None or (fresh if wanted is None else fresh & set(wanted)):
            used.add(key)
        seen |= fresh
    return [key for key in names if key in used]


def _pixel_side(item: pystac.Item, asset: pystac.Asset) -> float:
    """Side of the asset's pixels as it is stated, to compare an item's assets; infinity if it is not."""
    rows = [asset.extra_fields, *_rows(asset, "bands"), *_rows(asset, "raster:bands")]
    stated = (row.get(name) for row in rows for name in ("gsd", "raster:spatial_resolution", "spatial_resolution"))
    if side := next((float(value) for value in stated if value), None):
        return side
    frame = _frame(item, asset)
    return _side(frame) if frame else math.inf


def _side(frame: Source) -> float:
    """Side of a frame's pixels: in metres, of degrees those of the equator; else in the units of its CRS."""
    side = math.sqrt(abs(Affine(*frame.transform).determinant))
    return side * _DEGREE if frame.crs and crs_of(frame.crs).is_geographic else side


def _frame(item: pystac.Item, asset: pystac.Asset) -> Source | None:
    """The georeference of the asset's pixels in the item, None if only the file can have one."""
    fields = item.properties | asset.extra_fields
    box, size, affine = fields.get("proj:bbox"), fields.get("proj:shape"), fields.get("proj:transform")
    # Without a CRS the file is looked at, whatever else is stated: it may have one, or a sensor model.
    if not size or not (crs := _crs(fields)):
        return None
    height, width = (int(side) for side in size)
    if not affine and box:
        left, bottom, right, top = box_of(box)
        affine = ((right - left) / width, 0.0, left, 0.0, (bottom - top) / height, top)
    if not affine:
        return None
    return Source(item.id, (), crs, tuple(float(value) for value in affine[:6]), height, width, "")


def _crs(fields: Mapping[str, Any]) -> str | None:
    """The CRS that an item's or asset's fields state, by code or in full; None if only the file can state it."""
    code, epsg, in_json = fields.get("proj:code"), fields.get("proj:epsg"), fields.get("proj:projjson")
    for text in (code, epsg and f"EPSG:{epsg}", fields.get("proj:wkt2"), in_json):
        try:
            crs = crs_of(pyproj.CRS.from_json_dict(text).to_wkt() if text is in_json else str(text)) if text else None
        except (CRSError, ValueError, pyproj.exceptions.CRSError):
            continue  # "EPSG:None" and its kind
        if crs:
            return str(text).upper() if _CODE.fullmatch(str(text)) else crs_text(crs)
    return None


def _dtype(item: pystac.Item, asset: pystac.Asset) -> str | None:
    rows = [*_rows(asset, "bands"), *_rows(asset, "raster:bands"), asset.extra_fields, item.properties]
    stated = [row["data_type"] for row in rows if row.get("data_type")]
    return _STAC_TYPES.get(stated[0], stated[0]) if stated else None


def _band_rows(item: pystac.Item, asset: pystac.Asset, count: int) -> list[dict[str, Any]]:
    """Nodata, scale and offset that are stated of each of an asset's `count` bands.

    A field of a band (STAC 1.1 `bands`, else `raster:bands`) counts before the asset's, and that before the item's.
    """
    merged = [_pixel_fields(item.properties, ("raster:",)) | _pixel_fields(asset.extra_fields)] * count
    for field in ("raster:bands", "bands"):
        rows = [_pixel_fields(row) for row in _rows(asset, field)]
        rows = rows * count if len(rows) == 1 else rows
        merged = [fields | row for fields, row in zip(merged, rows, strict=True)] if len(rows) == count else merged
    return merged


def _pixel_fields(fields: Mapping[str, Any], prefixes: Sequence[str] = ("", "raster:")) -> dict[str, Any]:
    stated = {"nodata": fields.get("nodata")}
    stated |= {key: fields[prefix + key] for prefix in prefixes for key in _USUAL_UNITS if prefix + key in fields}
    return {key: value for key, value in stated.items() if value is not None}


def nodatas_of(item: pystac.Item, asset: pystac.Asset, count: int) -> list[float | None]:
    """The nodata value of each band, None if not stated or not finite, which always counts as nodata.

    Raises:
        DataError: the value is not a number; STAC allows text for "nan", "inf" and "-inf" only, but "0" is common.
    """
    values: list[float | None] = []
    for stated in (row.get("nodata") for row in _band_rows(item, asset, count)):
        try:
            value = math.nan if stated is None or isinstance(stated, bool) else float(stated)
        except (TypeError, ValueError):
            raise DataError(
                f"{item.id} states the nodata value {stated!r}, expected a number or nan; correct the item"
            ) from None
        values.append(value if math.isfinite(value) else None)
    return values


def _units(item: pystac.Item, assets: Sequence[tuple[pystac.Asset, int, Source | None]]) -> tuple[Unit, ...]:
    """(scale, offset) of all bands of assets with so many bands each; empty where none has any.

    A file that had to be opened counts where the item states nothing.
    """
    units: list[Unit] = []
    for asset, count, opened in assets:
        rows = _band_rows(item, asset, count)
        if opened and opened.units and not any(_USUAL_UNITS.keys() & row.keys() for row in rows):
            units += opened.units
            continue
        for row in rows:
            scale, offset = (float(row.get(key, usual)) for key, usual in _USUAL_UNITS.items())
            expect_unit(item.id, (scale, offset))
            units.append((scale, 0.0 if _offset_applied(item) else offset))
    return tuple(units) if set(units) != {STORED} else ()


def _offset_applied(item: pystac.Item) -> bool:
    """Whether a provider subtracted Sentinel-2's offset from the pixels, whatever offset the bands still state."""
    return any(item.properties.get(f"{name}:boa_offset_applied") is True for name in ("earthsearch", "sentinel"))


def _baseline(item: pystac.Item) -> str:
    """The Sentinel-2 processing baseline; "" if there is none, and "00.00" if its offset is not in the pixels."""
    if _offset_applied(item):
        return "00.00"
    fields = item.properties
    text = str(fields.get("s2:processing_baseline") or fields.get("sentinel:processing_baseline") or "").strip()
    satellite = str(fields.get("constellation") or fields.get("platform") or "sentinel-2").lower()
    if not text and satellite.startswith(("sentinel-2", "s2")):  # others have versions of other forms, and meanings
        text = str(fields.get("processing:version", ""))
        text = text if re.fullmatch(r"N?\d\d\.?\d\d", text) else ""
    names = (fields.get(key) for key in ("s2:product_uri", "s2:product_id", "sentinel:product_id", "title"))
    return baseline_text(text) or next((number for name in names if (number := baseline_in(str(name)))), "")


def href_of(item: pystac.Item, asset: pystac.Asset) -> str:
    """Path or URL of an asset's file.

    Raises:
        DataError: it is relative, and the item was not read from a file.
    """
    href = resolved(asset.href, item.get_self_href() or "")
    if "://" not in href and not posixpath.isabs(href):
        raise DataError(
            f"{item.id} has the relative href {asset.href}, but was not read from a file; give it absolute hrefs"
        )
    return href
