"""STAC 1.1 for results: items of output tiles, and collections and catalogues with relative links."""

import base64
import json
import mimetypes
import mmap
import posixpath
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pystac
import shapely
from pystac.extensions.classification import Classification, ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from rasterio.crs import CRS
from shapely.geometry import mapping, shape

import rayseg
from rayseg.errors import DataError
from rayseg.geo.grid import Bounds, Grid, Tile, Window
from rayseg.geo.lonlat import bounds_of, box_of, sound, to_lonlat
from rayseg.io.sources import Source, crs_of, crs_text, placing
from rayseg.io.tables import Spool, concurrently, content
from rayseg.io.times import UNKNOWN, in_utc, time_order, utc_text
from rayseg.io.written_files import WrittenFile
from rayseg.store import StorePath, public, put, upath
from rayseg.vision.color import ClassTable, hex_of

PROJECTION = ProjectionExtension.get_schema_uri()
CLASSIFICATION = ClassificationExtension.get_schema_uri()
PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
IMAGE = "rayseg:image"
"""Property of results without georeference: the image whose pixels `proj:transform` counts."""
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
PARQUET_TYPE = "application/vnd.apache.parquet"
_WORLD = [-180.0, -90.0, 180.0, 90.0]
_ITEMS = 8192  # of items.parquet that are dicts at a time


# -- items ------------------------------------------------------------------------------------------------------------


def item_of(
    item_id: str,
    grid: Grid,
    window: Window,
    *,
    folder: StorePath,
    files: Sequence[WrittenFile],
    sources: Sequence[Source] = (),
    model: str | None = None,
    table: ClassTable | None = None,
) -> pystac.Item:
    """The item of results over `window`; its files lie in `folder`, where `<item_id>.json` belongs too.

    It has the extensions projection, processing (level L4, software, lineage), file (size and checksum of every file)
    and, with a table, classification on `classes.tif`. Without CRS its geometry and `proj:code` are null. Its time is
    that of its newest source, or 1970-01-01 if no source has one.

    Args:
        item_id: unique in the collection.
        grid: grid of the results.
        window: the results' window of the grid.
        folder: local path or URI.
        files: as their writers return them; the key of an asset is the stem of its file's name.
        sources: the imagery used: its times, and links `derived_from`.
        model: href of the model's item, also linked as `derived_from`.
        table: the classes of `classes.tif`.

    Raises:
        DataError: the grid has coordinates outside the Earth.
    """
    # 1. place and time
    geometry, bbox = lonlat_outline(grid, window)
    times = sorted((utc_text(source.datetime) for source in sources if source.datetime), key=time_order)
    item = pystac.Item(
        item_id,
        geometry,
        bbox,
        datetime=in_utc(times[-1]) if times else UNKNOWN,
        properties={"start_datetime": times[0], "end_datetime": times[-1]} if len(set(times)) > 1 else {},
    )
    left, bottom, right, top = grid.bounds(window)
    projection = ProjectionExtension.ext(item, add_if_missing=True)
    projection.code = grid.crs if grid.crs and grid.crs.upper().startswith("EPSG:") else None
    projection.shape = [window.height, window.width]
    projection.transform = [float(value) for value in tuple(grid.transform(window))[:6]]
    projection.bbox = [left, min(bottom, top), right, max(bottom, top)]
    projection.wkt2 = None if projection.code else grid.crs
    # 2. how it was made
    item.stac_extensions.append(PROCESSING)
    FileExtension.add_to(item)
    if table:
        ClassificationExtension.add_to(item)
    # Links within the run are relative, so that it can be moved.
    place = upath(folder)
    home = f"{place.parent.parent if place.parent.name == 'tiles' else place}/"
    model = _relative(model, str(place)) if model else None
    by = f" by the model {model}" if model else ""
    item.properties |= {
        "processing:level": "L4",
        "processing:software": {"rayseg": rayseg.__version__},
        "processing:lineage": f"Made from {', '.join(s.item_id for s in sources) or 'no imagery on record'}{by}.",
    }
    if grid.crs is None and grid.image:
        item.properties[IMAGE] = grid.image
    for file in files:
        # 3. files, and links to imagery and model
        _add_asset(item, file, table)
    hrefs = [
        (public(_relative(href, str(place)) if href.startswith(home) else href), source.item_id)
        for source in sources
        if (href := source.href)
    ]
    hrefs += [(model, "model")] if model else []
    for href, title in hrefs:
        item.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, href, "application/geo+json", title))
    return item


def _add_asset(item: pystac.Item, file: WrittenFile, table: ClassTable | None) -> None:
    guess = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    # The system's table of types lacks COG and Parquet.
    kind = COG_TYPE if file.bands else PARQUET_TYPE if file.name.endswith(".parquet") else guess
    asset = pystac.Asset(f"./{file.name}", media_type=kind, roles=["data"])
    item.add_asset(Path(file.name).stem, asset)
    described = FileExtension.ext(asset)
    described.size, described.checksum = file.size, file.checksum
    if file.bands:
        asset.extra_fields["bands"] = list(file.bands)
    if table and file.name == "classes.tif":
        ClassificationExtension.ext(asset).classes = _classes(table)


def write_item(item: pystac.Item, path: StorePath) -> dict[str, Any]:
    """Write the item as JSON with its hrefs as they are; return its values."""
    row: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
    put(path, _json(row))
    return row


def write_tile_item(
    folder: StorePath,
    tile: Tile,
    table: ClassTable,
    *,
    files: Sequence[WrittenFile],
    sources: Sequence[Source],
    model: str,
) -> dict[str, Any]:
    """Write `<folder>/<tile id>.json`, the item of a mapped tile; return its values.

    Args:
        folder: the tile's.
        tile: the tile.
        table: its classes.
        files: in the folder, as their writers return them.
        sources: the imagery used.
        model: href of the model's item.
    """
    item = item_of(
        tile.id, tile.grid, tile.window, folder=folder, files=files, sources=sources, model=model, table=table
    )  # fmt: skip
    return write_item(item, upath(folder) / f"{tile.id}.json")


def packed(item: Mapping[str, Any]) -> str:
    """An item's values as a short text, about 1.7 KB, for a ledger: publishing reads no file of the tile."""
    return base64.b64encode(zlib.compress(json.dumps(item, separators=(",", ":")).encode())).decode()


def unpacked(text: str) -> dict[str, Any]:
    """The values of a text of `packed`."""
    item: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text)))
    return item


def lonlat_outline(grid: Grid, window: Window) -> tuple[dict[str, Any] | None, list[float] | None]:
    """(GeoJSON geometry, bbox) of `window` in EPSG:4326, cut at the antimeridian; (None, None) without CRS."""
    if grid.crs is None:
        return None, None
    left, bottom, right, top = grid.bounds(window)
    edges = shapely.segmentize(shapely.box(left, bottom, right, top), max(right - left, top - bottom) / 8)
    return lonlat_geometry(mapping(edges), crs_of(grid.crs), name=grid.name)


def lonlat_geometry(
    geometry: Mapping[str, Any], crs: CRS, *, name: str
) -> tuple[dict[str, Any] | None, list[float] | None]:
    """(geometry, bbox) in EPSG:4326 of a geometry in `crs`, rounded to 7 digits, cut at the antimeridian.

    Raises:
        DataError: it has coordinates outside the Earth, or no area there.
    """
    with placing(name, crs):
        [moved] = to_lonlat(np.array([shape(dict(geometry))], np.object_), str(crs_text(crs)))
    west, south, east, north = bounds_of(moved) if not moved.is_empty else (float("nan"),) * 4
    if not (abs(west) <= 180.1 and abs(east) <= 180.1 and -90.1 <= south <= north <= 90.1):
        raise DataError(
            f"{name} lies at {(west, south, east, north)} in degrees, nowhere on Earth; check its georeference"
        )
    with placing(name, crs):
        moved = shapely.transform(sound(moved), lambda points: points.round(7))
    return json.loads(json.dumps(mapping(moved))), [round(value, 7) for value in (west, south, east, north)]


def classes_field(table: ClassTable) -> list[dict[str, Any]]:
    """`classification:classes` of a table, nodata (255) included."""
    return [entry.to_dict() for entry in _classes(table)]


def _classes(table: ClassTable) -> list[Classification]:
    rows = [
        # The extension allows letters, digits, - and _ in a name; the title holds the name as it is.
        Classification.create(
            value,
            name="".join(
                letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name
            ),
            title=name,
            color_hint=hex_of(color).lstrip("#"),
        )
        for value, name, color in table.classes
    ]
    return [*rows, Classification.create(255, name="nodata", title="no data", nodata=True)]


# -- collections ------------------------------------------------------------------------------------------------------


def read_items(hrefs: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(href, item) of items in files, read by several threads."""
    return concurrently(lambda href: (href, json.loads(content(href))), hrefs)


def write_collection(root: StorePath, items: Iterable[tuple[str, dict[str, Any]]], *, title: str) -> int:
    """Write `<root>/collection.json` over items, and `<root>/items.parquet` with all of them; return their number.

    Hrefs become relative to `root`, in the Parquet file also those of the assets. There is no Parquet file if an item
    has no geometry, which the format requires. Memory holds a few thousand items at a time.

    Args:
        root: folder, local or remote.
        items: (href, item) of each; asset hrefs are relative to the item.
        title: of the collection.
    """
    folder, extent = upath(root), _Extent()
    waiting, placed, assets = iter(items), True, {}
    with Spool() as spool:
        # In chunks: the items of a planet do not fit into memory.
        while chunk := list(islice(waiting, _ITEMS)):
            rows = {_relative(href, str(folder)): item for href, item in chunk}
            for href, item in rows.items():
                extent.add(href, item)
            placed = placed and all(item["geometry"] for item in rows.values())
            if placed:
                spool.add(_table([_rooted(item, posixpath.dirname(href)) for href, item in rows.items()]))
        if placed and extent.hrefs:
            place = {"href": "./items.parquet", "type": PARQUET_TYPE}
            assets["items"] = place | {"roles": ["stac-items"], "title": "all items"}
            _write_tables(folder / "items.parquet", spool.tables())
    put(folder / "collection.json", _json(extent.collection(folder.name or "results", title, assets=assets)))
    return len(extent.hrefs)


def write_items_parquet(path: StorePath, items: Sequence[dict[str, Any]]) -> None:
    """Write items (as dicts, each with a geometry) as stac-geoparquet."""
    _write_tables(path, [_table(items)])


def _table(items: Sequence[dict[str, Any]]) -> pa.Table:
    from stac_geoparquet.arrow import parse_stac_items_to_arrow  # takes time to import; needed at the end

    return parse_stac_items_to_arrow(items).read_all()


def _write_tables(path: StorePath, tables: Sequence[pa.Table]) -> None:
    from stac_geoparquet.arrow import to_parquet

    with tempfile.TemporaryFile() as file:  # without a name: a kill leaves nothing behind
        to_parquet(pa.concat_tables(tables, promote_options="permissive"), f"/dev/fd/{file.fileno()}")
        put(path, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def write_catalog(
    root: StorePath, collections: Mapping[str, Sequence[pystac.Item]], *, titles: Mapping[str, str] | None = None
) -> str:
    """Write a self-contained catalogue, or add to an existing one; a second call changes nothing.

    Files are <root>/catalog.json, <root>/<collection>/collection.json and <root>/<collection>/<item id>.json. Links
    are relative, asset hrefs stay as they are. An item of the same id is replaced.

    Args:
        root: folder, local or remote.
        collections: items by collection id.
        titles: of collections, and under "" of the catalogue.

    Returns:
        Path or URI of catalog.json.
    """
    folder, named = upath(root), titles or {}
    old = _existing(folder / "catalog.json")
    for name, items in collections.items():
        _write_members(folder / name, name, items, named.get(name))
    # Collections that this call does not write stay in the catalogue.
    known = {link["href"] for link in (old or {}).get("links", []) if link["rel"] == "child"}
    children = sorted(known | {f"./{name}/collection.json" for name in collections})
    title = named.get("") or (old or {}).get("title") or folder.name
    catalog = {
        "type": "Catalog",
        "id": (old or {}).get("id") or folder.name or "catalog",
        "stac_version": "1.1.0",
        "title": title,
        "description": title,
        "links": [_link("root", "./catalog.json"), *(_link("child", href) for href in children)],
    }
    put(folder / "catalog.json", _json(catalog))
    return str(folder / "catalog.json")


def _write_members(folder: Any, name: str, items: Sequence[pystac.Item], title: str | None) -> None:  # noqa: ANN401
    old, extent = _existing(folder / "collection.json"), _Extent()
    links = [_link("root", "../catalog.json"), _link("parent", "./collection.json")]
    for item in items:
        row = item.to_dict(include_self_link=False, transform_hrefs=False)
        kept = [link for link in row["links"] if link["rel"] not in {"root", "parent", "collection", "self"}]
        row |= {"collection": name, "links": [*links, _link("collection", "./collection.json"), *kept]}
        put(folder / f"{item.id}.json", _json(row))
        extent.add(f"./{item.id}.json", row)
    if old:
        # The collection keeps the items of earlier calls: its extent grows to hold all.
        extent.hrefs |= {link["href"] for link in old["links"] if link["rel"] == "item"}
        if not old.get("rayseg:unplaced"):
            extent.place(old["extent"]["spatial"]["bbox"][0])
        extent.times += [utc_text(time) for time in old["extent"]["temporal"]["interval"][0] if time]
    links = [_link("root", "../catalog.json"), _link("parent", "../catalog.json")]
    merged = extent.collection(name, title or (old or {}).get("title") or name, links=links)
    put(folder / "collection.json", _json(merged))


class _Extent:
    """The items of a collection, as far as the collection describes them."""

    def __init__(self) -> None:
        self.hrefs: set[str] = set()
        self.turns: tuple[list[Bounds], list[Bounds]] = [], []  # of longitudes from -180 and from 0 on
        self.times: list[str] = []

    def add(self, href: str, item: Mapping[str, Any]) -> None:
        """Include an item."""
        self.hrefs.add(href)
        if item.get("bbox"):
            self.place(item["bbox"])
        # Two times stand for all before them, so that memory does not grow.
        named = (item["properties"].get(name) for name in ("datetime", "start_datetime", "end_datetime"))
        times = [*self.times, *(utc_text(time) for time in named if time)]
        self.times = [min(times, key=time_order), max(times, key=time_order)] if times else []

    def place(self, bbox: Sequence[float]) -> None:
        """Include a box in degrees, of four or six numbers; west > east crosses the antimeridian."""
        west, south, east, north = box_of(bbox)
        lons = (west, east) if west <= east else (-180.0, 180.0)
        within = west >= 0 > east if west > east else not west < 0 <= east  # it does not cross the prime meridian
        turned = (west + 360 * (west < 0), east + 360 * (east < 0)) if within else (0.0, 360.0)
        for boxes, (left, right) in zip(self.turns, (lons, turned), strict=True):
            boxes.append((left, south, right, north))
            sides = np.array(boxes)
            boxes[:] = [(*sides[:, :2].min(axis=0).tolist(), *sides[:, 2:].max(axis=0).tolist())]

    @property
    def box(self) -> list[float]:
        """The box around all boxes, the narrower way around the Earth; the world if there is none."""
        if not self.turns[0]:
            return list(_WORLD)
        [(west, south, east, north)], [(left, _, right, _)] = self.turns
        if right - left < east - west:
            west, east = (round(side - 360 * (side > 180), 7) for side in (left, right))
        return [west, south, east, north]

    def collection(
        self, name: str, title: str, *, links: Sequence[dict[str, Any]] = (), assets: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The collection as JSON values."""
        times = sorted(self.times, key=time_order)
        interval = [times[0], times[-1]] if times else [None, None]
        return {
            "type": "Collection",
            "id": name,
            "stac_version": "1.1.0",
            "title": title,
            "description": title,
            "license": "other",
            "extent": {"spatial": {"bbox": [self.box]}, "temporal": {"interval": [interval]}},
            "links": [*links, *(_link("item", href) for href in sorted(self.hrefs))],
            **({"assets": dict(assets)} if assets else {}),
            **({} if self.turns[0] else {"rayseg:unplaced": True}),
        }


def _rooted(item: dict[str, Any], folder: str) -> dict[str, Any]:
    """The item with asset hrefs, which are relative to it, relative to the folder above instead."""
    assets = {
        key: asset | {"href": f"./{posixpath.normpath(posixpath.join(folder, asset['href']))}"}
        for key, asset in item["assets"].items()
    }
    return item | {"assets": assets}


def _relative(href: str, folder: str) -> str:
    """`href` relative to `folder` where both are of one store, with a leading ./ or ../ then."""
    one, other = urlsplit(href), urlsplit(folder)
    if (one.scheme, one.netloc) != (other.scheme, other.netloc) or one.scheme in {"http", "https"}:
        return href
    local = one.scheme in {"", "file"}
    path, start = (
        Path(upath(text).path).absolute().as_posix() if local else urlsplit(text).path for text in (href, folder)
    )
    relative = posixpath.relpath(path, start)
    return relative if relative.startswith("..") else f"./{relative}"


def _link(rel: str, href: str) -> dict[str, Any]:
    return {"rel": rel, "href": href, "type": "application/geo+json" if rel == "item" else "application/json"}


def _existing(path: Any) -> dict[str, Any] | None:  # noqa: ANN401 - a UPath
    if not path.exists():
        return None
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
