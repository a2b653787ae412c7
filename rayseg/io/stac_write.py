"""Results described: STAC 1.1 items of output tiles, collections and catalogues that link to each other relatively."""

import hashlib
import json
import mimetypes
import posixpath
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pystac
import shapely
from fsspec.implementations.memory import MemoryFileSystem
from pystac.utils import datetime_to_str, str_to_datetime
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.warp import transform_geom
from shapely.geometry import mapping, shape

import rayseg
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.sources import Source, crs_of, placing
from rayseg.store import StorePath, is_local, public, put, upath
from rayseg.vision.color import ClassTable, hex_of

_EXTENSION = "https://stac-extensions.github.io/{}/schema.json"
PROJECTION = _EXTENSION.format("projection/v2.0.0")
PROCESSING = _EXTENSION.format("processing/v1.2.0")
CLASSIFICATION = _EXTENSION.format("classification/v2.0.0")
FILE = _EXTENSION.format("file/v2.1.0")
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
PARQUET_TYPE = "application/vnd.apache.parquet"
_WORLD = [-180.0, -90.0, 180.0, 90.0]


# -- items ------------------------------------------------------------------------------------------------------------


def item_of(
    item_id: str,
    grid: Grid,
    window: Window,
    *,
    folder: StorePath,
    files: Sequence[str],
    sources: Sequence[Source] = (),
    model: str | None = None,
    table: ClassTable | None = None,
) -> pystac.Item:
    """The item of results over `window`; its files lie in `folder`, where `<item_id>.json` belongs too.

    It has the extensions projection, processing (level L4, software, lineage), file (size and checksum of every file)
    and, with a table, classification on `classes.tif`. Without CRS its geometry is null and `proj:code` too. Its
    time is the newest of its sources, 1970-01-01 where none has one.

    Args:
        item_id: unique in the collection.
        grid: grid of the results.
        window: their place on it.
        folder: local path or URI.
        files: names of the files in `folder`; an asset is called by its file's stem.
        sources: the imagery used: its times, and links `derived_from`.
        model: href of the model's item, linked as `derived_from` too.
        table: the classes of `classes.tif`.

    Raises:
        DataError: a file is missing, or the grid lies nowhere on Earth.
    """
    geometry, bbox = lonlat_outline(grid, window)
    times = sorted(source.datetime for source in sources if source.datetime)
    item = pystac.Item(
        item_id,
        geometry,
        bbox,
        datetime=str_to_datetime(times[-1]) if times else datetime(1970, 1, 1, tzinfo=UTC),
        properties=_times(times) | _projection(grid, window) | _processing(sources, model),
        stac_extensions=[PROJECTION, PROCESSING, FILE, *([CLASSIFICATION] if table else [])],
    )
    for name in files:
        item.add_asset(Path(name).stem, _asset(upath(folder) / name, table))
    for source in sources:
        if source.href:
            item.add_link(
                pystac.Link(pystac.RelType.DERIVED_FROM, public(source.href), "application/geo+json", source.item_id)
            )
    if model:
        relative = _relative(model, str(upath(folder)))
        item.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, relative, "application/geo+json", "model"))
    return item


def write_item(item: pystac.Item, path: StorePath) -> None:
    """Write the item as JSON with its hrefs as they are."""
    put(path, _json(item.to_dict(include_self_link=False, transform_hrefs=False)))


def write_tile_item(
    folder: StorePath, tile: Tile, table: ClassTable, *, sources: Sequence[Mapping[str, Any]], model: str
) -> None:
    """Write `<folder>/<tile id>.json` over the tile's classes.tif, scores.tif and, if it is there, parts.parquet.

    Args:
        folder: where the tile's files are.
        tile: the tile.
        table: its classes.
        sources: rows of `Source.to_row`, the imagery it was made of.
        model: href of the model's item.
    """
    files = [name for name in ("classes.tif", "scores.tif", "parts.parquet") if (upath(folder) / name).exists()]
    used = [Source.from_row(dict(row)) for row in sources]
    item = item_of(
        tile.id, tile.grid, tile.window, folder=folder, files=files, sources=used, model=model, table=table
    )  # fmt: skip
    write_item(item, upath(folder) / f"{tile.id}.json")


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
        DataError: it lies nowhere on Earth.
    """
    with placing(name, crs):
        moved = shape(transform_geom(crs, CRS.from_epsg(4326), geometry, precision=9))
    west, south, east, north = moved.bounds if not moved.is_empty else (float("nan"),) * 4
    if not (-180.1 <= west <= east <= 180.1 and -90.1 <= south <= north <= 90.1):
        raise DataError(
            f"{name} lies at {(west, south, east, north)} in degrees, nowhere on Earth: check its georeference."
        )
    parts = [part.bounds for part in getattr(moved, "geoms", [moved])]
    if len(parts) > 1 and east - west > 180:  # RFC 7946: west is then greater than east
        west = min(part[0] for part in parts if part[0] > 0)
        east = max(part[2] for part in parts if part[2] < 0)
    moved = shapely.transform(moved, lambda points: points.round(7))
    return json.loads(json.dumps(mapping(moved))), [round(value, 7) for value in (west, south, east, north)]


def classes_field(table: ClassTable) -> list[dict[str, Any]]:
    """`classification:classes` of a table, nodata (255) included."""
    rows = [
        {"value": value, "name": _word(name), "title": name, "color_hint": hex_of(color).lstrip("#")}
        for value, name, color in table.classes
    ]
    return [*rows, {"value": 255, "name": "nodata", "title": "no data", "nodata": True}]


def checksum(data: bytes) -> str:
    """Multihash (sha2-256) of `data`, as the file extension wants it."""
    return "1220" + hashlib.sha256(data).hexdigest()


def _asset(path: Any, table: ClassTable | None) -> pystac.Asset:  # noqa: ANN401 - a UPath
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there: write a tile's files before its item.") from error
    fields: dict[str, Any] = {"file:size": len(data), "file:checksum": checksum(data)}
    raster = path.suffix == ".tif"
    if raster:
        fields["bands"] = _bands(data)
    if table and path.name == "classes.tif":
        fields["classification:classes"] = classes_field(table)
    guess = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    kind = COG_TYPE if raster else PARQUET_TYPE if path.suffix == ".parquet" else guess
    return pystac.Asset(f"./{path.name}", media_type=kind, roles=["data"], extra_fields=fields)


def _bands(data: bytes) -> list[dict[str, Any]]:
    with MemoryFile(data) as memory, memory.open() as dataset:
        named = zip(dataset.descriptions, dataset.dtypes, dataset.nodatavals, strict=True)
        return [
            {"name": name or f"b{index}", "data_type": dtype, **({} if nodata is None else {"nodata": nodata})}
            for index, (name, dtype, nodata) in enumerate(named, 1)
        ]


def _times(times: Sequence[str]) -> dict[str, Any]:
    return {"start_datetime": times[0], "end_datetime": times[-1]} if len(set(times)) > 1 else {}


def _projection(grid: Grid, window: Window) -> dict[str, Any]:
    code = grid.crs if grid.crs and grid.crs.upper().startswith("EPSG:") else None
    left, bottom, right, top = grid.bounds(window)
    fields: dict[str, Any] = {
        "proj:code": code,
        "proj:shape": [window.height, window.width],
        "proj:transform": [float(value) for value in tuple(grid.transform(window))[:6]],
        "proj:bbox": [left, min(bottom, top), right, max(bottom, top)],
    }
    return fields if code or grid.crs is None else fields | {"proj:wkt2": grid.crs}


def _processing(sources: Sequence[Source], model: str | None) -> dict[str, Any]:
    made_of = ", ".join(source.item_id for source in sources) or "no imagery on record"
    by = f" by the model {model}" if model else ""
    return {
        "processing:level": "L4",
        "processing:software": {"rayseg": rayseg.__version__},
        "processing:lineage": f"Made from {made_of}{by}.",
    }


def _word(name: str) -> str:
    """A class name as the classification extension allows it: letters, digits, - and _."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name)


# -- collections ------------------------------------------------------------------------------------------------------


def write_collection(root: StorePath, hrefs: Iterable[str], *, title: str) -> None:
    """Write `<root>/collection.json` over the items at `hrefs`, and `<root>/items.parquet` with all of them.

    Hrefs become relative to `root`, in the parquet file those of the assets too. There is no parquet file over items
    without a place on Earth, which its format does not know.
    """
    folder = upath(root)
    items = [(_relative(href, str(folder)), json.loads(upath(href).read_text())) for href in hrefs]
    table = [_rooted(item, posixpath.dirname(href)) for href, item in items]
    assets = {}
    if table and all(item["geometry"] for item in table):
        assets["items"] = {
            "href": "./items.parquet",
            "type": PARQUET_TYPE,
            "roles": ["stac-items"],
            "title": "all items",
        }
        write_items_parquet(folder / "items.parquet", table)
    collection = _collection(folder.name or "results", title, dict(items), assets=assets)
    put(folder / "collection.json", _json(collection))


def write_items_parquet(path: StorePath, items: Sequence[dict[str, Any]]) -> None:
    """Write items (as dicts, each with a geometry) as stac-geoparquet."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from stac_geoparquet.arrow import parse_stac_items_to_arrow, to_parquet  # takes time to import; needed at the end

    memory, name = MemoryFileSystem(), f"/{uuid.uuid4().hex}"  # a temporary file would stay if this process were killed
    try:
        to_parquet(parse_stac_items_to_arrow(items), name, filesystem=PyFileSystem(FSSpecHandler(memory)))
        put(path, memory.cat_file(name))
    finally:
        memory.store.pop(name, None)


def write_catalog(
    root: StorePath, collections: Mapping[str, Sequence[pystac.Item]], *, titles: Mapping[str, str] | None = None
) -> str:
    """Write a self-contained catalogue, or add to the one that is there; doing it again changes nothing.

    <root>/catalog.json, <root>/<collection>/collection.json, <root>/<collection>/<item id>.json. Links are relative,
    asset hrefs are left as they are. An item of the same id is replaced.

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
    members = {}
    for item in items:
        row = item.to_dict(include_self_link=False, transform_hrefs=False)
        kept = [link for link in row["links"] if link["rel"] not in {"root", "parent", "collection", "self"}]
        above = [_link("root", "../catalog.json"), _link("parent", "./collection.json")]
        row |= {"collection": name, "links": [*above, _link("collection", "./collection.json"), *kept]}
        put(folder / f"{item.id}.json", _json(row))
        members[f"./{item.id}.json"] = row
    old = _existing(folder / "collection.json")
    above = [_link("root", "../catalog.json"), _link("parent", "../catalog.json")]
    merged = _collection(name, title or (old or {}).get("title") or name, members, old=old, links=above)
    put(folder / "collection.json", _json(merged))


def _collection(
    name: str,
    title: str,
    items: Mapping[str, dict[str, Any]],
    *,
    old: dict[str, Any] | None = None,
    links: Sequence[dict[str, Any]] = (),
    assets: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A collection over `items` (by href) and what the collection `old` has already."""
    known = {link["href"] for link in (old or {}).get("links", []) if link["rel"] == "item"}
    boxes = [item["bbox"] for item in items.values() if item.get("bbox")]
    times = [time for item in items.values() for time in _span(item["properties"])]
    if old:
        box, (start, end) = old["extent"]["spatial"]["bbox"][0], old["extent"]["temporal"]["interval"][0]
        boxes += [] if old.get("rayseg:unplaced") else [box]
        times += [time for time in (start, end) if time]
    interval = [min(times), max(times)] if times else [None, None]
    return {
        "type": "Collection",
        "id": name,
        "stac_version": "1.1.0",
        "title": title,
        "description": title,
        "license": "other",
        "extent": {"spatial": {"bbox": [_around(boxes)]}, "temporal": {"interval": [interval]}},
        "links": [*links, *(_link("item", href) for href in sorted(known | set(items)))],
        **({"assets": dict(assets)} if assets else {}),
        **({} if boxes else {"rayseg:unplaced": True}),
    }


def _around(boxes: Sequence[Sequence[float]]) -> list[float]:
    """The box around boxes: the world for none, and all longitudes where one crosses the antimeridian."""
    if not boxes:
        return list(_WORLD)
    lons = [(-180.0, 180.0) if box[0] > box[2] else (box[0], box[2]) for box in boxes]
    return [min(a for a, _ in lons), min(b[1] for b in boxes), max(a for _, a in lons), max(b[3] for b in boxes)]


def _span(properties: Mapping[str, Any]) -> list[str]:
    fields = ("datetime", "start_datetime", "end_datetime")
    return [datetime_to_str(str_to_datetime(properties[field])) for field in fields if properties.get(field)]


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
    path, start = (
        Path(text).absolute().as_posix() if is_local(text) else urlsplit(text).path for text in (href, folder)
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
