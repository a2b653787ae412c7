"""Rows of STAC: the items of catalogues, tables and APIs as JSON values, each with the address it was read from.

A member that cannot be read is a row with the reason; the other members are not affected.
"""

import io
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial, reduce
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pystac
import shapely
from aiohttp import ClientError
from shapely.errors import ShapelyError

from rayseg.errors import ConfigError, DataError, RaysegError
from rayseg.geo.lonlat import PAST_POLES
from rayseg.io.remote import Passing, failure, patiently, retry_after
from rayseg.io.tables import concurrently, content
from rayseg.store import STORE_ERRORS, absolute, public, suffix_of, upath

if TYPE_CHECKING:  # only STAC APIs need it
    from pystac_client.stac_api_io import StacApiIO

Box = tuple[float, float, float, float]
"""(west, south, east, north) in degrees."""


_FAULTS: tuple[type[Exception], ...] = (*STORE_ERRORS, ClientError)
"""Of reading a file; aiohttp's errors are not the system's."""


@dataclass(frozen=True)
class Row:
    """An item as it was read, or the place of one that cannot be read.

    Attributes:
        id: of the item, else a name by its position.
        place: file or URL that holds it, for messages.
        href: address that its relative hrefs are relative to; "" if it names its own.
        values: the JSON object; empty if it cannot be read.
        wrong: why it cannot be read, "" if it can.
    """

    id: str
    place: str
    href: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


def rows_of(uri: str, collection: str | None, geometry: dict[str, Any] | None, box: Box | None) -> list[Row]:
    """The items of a catalogue; those of tables that miss the box, and of APIs the geometry, may be left out.

    Args:
        uri: a catalogue, collection, item or item collection as JSON, an `items.parquet`, or a STAC API.
        collection: id of the wanted collection; None for all. Of an API also a query, see `search`.
        geometry: GeoJSON in EPSG:4326.
        box: around it.

    Raises:
        ConfigError: there is no such catalogue or collection.
        DataError: the catalogue itself cannot be read.
    """
    if suffix_of(uri) == ".parquet":
        return _only(_listed_rows(uri, items_of(uri, box)), collection, uri)
    row = _read_json(uri)
    if row.get("type") == "Feature":
        return [_row(uri, absolute(uri), row)]
    if row.get("type") == "FeatureCollection":
        if not isinstance(row.get("features"), list):
            raise DataError(f"{uri} is a FeatureCollection without a list of features; correct the file")
        return _only(_listed_rows(uri, row["features"]), collection, uri)
    # The landing page of an API lists its conformance classes.
    if "conformsTo" in row:
        return [_row(public(uri), "", item) for item in search(uri, collection, geometry)]
    _expect_catalog(uri, row)
    return list(_walk(*_chosen(absolute(uri), row, collection)))


def collections_of(uri: str) -> tuple[list[str], dict[str, DataError]]:
    """(ids of the collections at any depth of a catalogue, the errors of its children that cannot be read, by address).

    There are none of a file that is not a catalogue.

    Raises:
        ConfigError: there is no such catalogue.
        DataError: it cannot be read.
    """
    row = _read_json(uri)
    if row.get("type") != "Catalog":
        return [], {}
    _expect_catalog(uri, row)
    children, unread = _descendants(absolute(uri), row)
    return [str(child["id"]) for _, child in children if child["type"] == "Collection"], unread


# -- files ------------------------------------------------------------------------------------------------------------


def _read_json(uri: str) -> dict[str, Any]:
    try:
        row = json.loads(patiently(lambda: _content(uri)))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(f"catalogue {public(uri)} does not exist; name its JSON file or items.parquet") from error
    except ValueError as error:
        raise DataError(f"catalogue {public(uri)} cannot be read as JSON: {error}; write it again") from error
    if not isinstance(row, dict):
        raise DataError(f"{public(uri)} is not STAC: it holds a {type(row).__name__}, expected a JSON object")
    return row


def _content(uri: str) -> str:
    try:
        return content(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except _FAULTS as error:
        message = f"catalogue {uri} cannot be read ({error}); correct the address, or try again later"
        raise failure(uri, public(message)) from error


def resolved(href: str, base: str) -> str:
    """The address of an href in a file: STAC's hrefs are URIs, but many catalogues hold plain paths.

    Args:
        href: as it is written, relative or not.
        base: address of the file, absolute.

    Returns:
        A URL, or the path of a local file, decoded if only the decoded one exists.
    """
    if urlsplit(href).scheme in {"http", "https"}:
        return href
    if base.startswith(("http://", "https://")) and "://" not in href and not href.startswith("file:"):
        return urljoin(base.partition("?")[0], href)
    if href.startswith("file:"):
        return absolute(href)
    # urljoin knows no s3, and a key has no leading slash.
    if href.startswith("s3://") or (base.startswith("s3://") and not posixpath.isabs(href)):
        head = base.rpartition("/")[0] if not href.startswith("s3://") else ""
        bucket, _, folder = head.removeprefix("s3://").partition("/")
        if href.startswith("s3://"):
            bucket, _, href = href.removeprefix("s3://").partition("/")
        return _existing(f"s3://{bucket}/", folder, href)
    if "://" in href:
        return href
    return _existing("", posixpath.dirname(base), href)


def _existing(root: str, folder: str, href: str) -> str:
    """The path of an href as it is, or decoded if it has escapes and only the decoded one exists."""
    # The folder is an address already, whose percent signs stay.
    path, plain = (root + posixpath.normpath(posixpath.join(folder, one)) for one in (href, unquote(href)))
    return plain if plain != path and not upath(path).exists() and upath(plain).exists() else path


# -- catalogues of files ----------------------------------------------------------------------------------------------


def _expect_catalog(uri: str, row: dict[str, Any]) -> None:
    if row.get("type") not in {"Catalog", "Collection"} or not isinstance(row.get("links"), list):
        raise DataError(
            f"{public(uri)} is not STAC: found an object of type {row.get('type')!r}, expected a Catalog or Collection "
            "with links, a Feature or a FeatureCollection; name another file"
        )


def _hrefs(href: str, row: dict[str, Any], rel: str) -> list[str]:
    links = [link for link in row["links"] if isinstance(link, dict) and link.get("rel") == rel]
    return [resolved(link["href"], href) for link in links if isinstance(link.get("href"), str)]


def _child(href: str) -> tuple[str, dict[str, Any] | RaysegError]:
    """(address, JSON value of a member of a catalogue, or why it cannot be read)."""
    try:
        row = _read_json(href)
        if row.get("type") != "Feature":
            _expect_catalog(href, row)
    except RaysegError as error:
        return href, error
    return href, row


def _descendants(href: str, row: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, DataError]]:
    """(address and value of all children at any depth, the errors of those that cannot be read), level by level."""
    children: list[tuple[str, dict[str, Any]]] = []
    unread: dict[str, DataError] = {}
    seen, level = {href}, [(href, row)]
    while level:
        # Each address once: catalogues may link in circles.
        hrefs = dict.fromkeys(at for parent in level for at in _hrefs(*parent, "child") if at not in seen)
        seen |= hrefs.keys()
        read = list(concurrently(_child, hrefs))
        unread |= {at: DataError(str(child)) for at, child in read if isinstance(child, RaysegError)}
        level = [(at, child) for at, child in read if isinstance(child, dict) and child["type"] != "Feature"]
        children += [(at, child) for at, child in read if isinstance(child, dict)]
    return children, unread


def _chosen(href: str, row: dict[str, Any], collection: str | None) -> tuple[str, dict[str, Any]]:
    """The collection of that id at or below a catalogue; the catalogue itself if none is named."""
    if not collection or row.get("id") == collection:
        return href, row
    children, unread = _descendants(href, row)
    named = {str(child.get("id")): (at, child) for at, child in children if child["type"] == "Collection"}
    if collection in named:
        return named[collection]
    more = f" {len(unread)} children cannot be read: {next(iter(unread.values()))}" if unread else ""
    raise ConfigError(
        f"{public(href)} has no collection {collection!r}, expected one of {', '.join(sorted(named)) or 'none'}.{more}"
    )


def _walk(href: str, row: dict[str, Any]) -> Iterator[Row]:
    """The items of a catalogue and of all below it, and a row for every child or item that cannot be read."""
    children, unread = _descendants(href, row)
    # Items may be linked as children.
    catalogs = [(href, row), *((at, child) for at, child in children if child["type"] != "Feature")]
    yield from (_row(at, at, child) for at, child in children if child["type"] == "Feature")
    hrefs = dict.fromkeys(item for catalog in catalogs for item in _hrefs(*catalog, "item"))
    for at, item in concurrently(_child, hrefs):
        if isinstance(item, RaysegError):
            unread[at] = DataError(str(item))
        elif item["type"] == "Feature":
            yield _row(at, at, item)
    for at, error in unread.items():
        stem, folder = posixpath.splitext(posixpath.basename(at))[0], posixpath.basename(posixpath.dirname(at))
        yield Row(folder if stem in {"catalog", "collection"} and folder else stem, at, wrong=str(error))


def _row(place: str, href: str, values: object, number: int = 0) -> Row:
    name = values.get("id") if isinstance(values, dict) else None
    named = str(name) if name is not None and str(name).strip() else f"item-{number + 1}"
    if not isinstance(values, dict) or values.get("type") != "Feature":
        kind = values.get("type") if isinstance(values, dict) else type(values).__name__
        return Row(named, place, wrong=f"{named} of {place} is not a STAC item: found {kind!r}, expected a Feature")
    return Row(named, place, href, values)


def _listed_rows(uri: str, values: Sequence[object]) -> list[Row]:
    """The items of one file; each names its own address if it has a `self` link."""
    rows, href = [], absolute(uri)
    for number, value in enumerate(values):
        links = value.get("links") if isinstance(value, dict) else None
        own = any(isinstance(link, dict) and link.get("rel") == "self" for link in links or ())
        rows.append(_row(uri, "" if own else href, value, number))
    return rows


def _only(rows: list[Row], collection: str | None, uri: str) -> list[Row]:
    names = {str(row.values["collection"]) for row in rows if row.values.get("collection")}
    if collection and names and collection not in names:
        raise ConfigError(f"{uri} has no collection {collection!r}, expected one of {', '.join(sorted(names))}")
    return [row for row in rows if not collection or row.values.get("collection") in {None, collection}]


# -- tables -----------------------------------------------------------------------------------------------------------


def items_of(uri: str, box: Box | None) -> list[dict[str, Any]]:
    """The items of an `items.parquet` as STAC JSON values; with a box, those that intersect it.

    Raises:
        ConfigError: there is no such file.
        DataError: the file is not a table of items.
    """
    from stac_geoparquet.arrow import stac_table_to_items  # takes time to import, and few catalogues are tables

    try:
        table = pq.read_table(io.BytesIO(upath(uri).read_bytes()))
        table = table if box is None else table.filter(_meeting(table, box))
        # stac_geoparquet takes no null geometries and boxes, and no table without boxes
        unplaced, boxes = table["geometry"].is_null().to_pylist(), _boxes(table)
        if table["geometry"].null_count:
            at = table.column_names.index("geometry")
            origin = pa.scalar(shapely.to_wkb(shapely.Point(0, 0)), table.schema.field(at).type)
            table = table.set_column(at, table.schema.field(at), pc.fill_null(table["geometry"], origin))
        if None in boxes:
            table = table.drop_columns([name for name in table.column_names if name == "bbox"])
            zeros = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), 0.0)
            table = table.append_column("bbox", pa.array([zeros] * len(table)))
        rows: list[dict[str, Any]] = list(stac_table_to_items(table))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"catalogue {uri} does not exist; correct its path") from error
    except (pa.ArrowException, LookupError, TypeError, ValueError, OSError, ShapelyError) as error:
        raise DataError(f"{uri} is not a table of STAC items: {error}; write it as stac-geoparquet") from error
    for row, lost, bbox in zip(rows, unplaced, boxes, strict=True):
        row |= {"geometry": None if lost else row["geometry"], "bbox": bbox}
    return rows


def _boxes(table: pa.Table) -> list[list[float] | None]:
    """The bbox of each row as STAC has it, None where it or one of its numbers is null."""
    values = table["bbox"].to_pylist() if "bbox" in table.column_names else [None] * len(table)
    names = ("xmin", "ymin", "zmin", "xmax", "ymax", "zmax")
    boxes = ([one[name] for name in names if name in one] if isinstance(one, dict) else one for one in values)
    return [None if box is None or None in box else box for box in boxes]


def _meeting(table: pa.Table, box: Box) -> pa.ChunkedArray:
    """Which rows of a table of items intersect a box, on any turn; true without a bbox and across the antimeridian.

    True also of boxes nowhere on Earth, in metres for example: their geometry or pixels have the place.
    """
    if "bbox" not in table.column_names or not pa.types.is_struct(table.schema.field("bbox").type):
        return pa.chunked_array([np.ones(len(table), bool)])
    west, south, east, north = (pc.struct_field(table["bbox"], name) for name in ("xmin", "ymin", "xmax", "ymax"))
    outside = [pc.or_(pc.greater(west, box[2] + turn), pc.less(east, box[0] + turn)) for turn in (-360, 0, 360)]
    apart = (reduce(pc.and_, outside), pc.greater(south, box[3]), pc.less(north, box[1]))
    stray = pc.or_(pc.greater(north, 90 + PAST_POLES), pc.less(south, -90 - PAST_POLES))
    stray = reduce(pc.or_, (stray, pc.greater(east, 540), pc.less(west, -540)))
    missing = reduce(pc.and_, (reduce(pc.or_, apart), pc.less_equal(west, east), pc.invert(stray)))
    return pc.invert(pc.fill_null(missing, False))


# -- APIs -------------------------------------------------------------------------------------------------------------

_SIGNS = {"<=": "lte", ">=": "gte", "<": "lt", ">": "gt", "!=": "neq", "=": "eq"}
_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|!=|<|>|=)([^<>=!]+)")
_TIME = r"(\.\.|\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01])([Tt ][\d:.]+([Zz]|[+-]\d\d:\d\d)?)?)?)?)"
_DATETIME = re.compile(rf"{_TIME}(/{_TIME})?")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
BUSY = (None, 429, 500, 502, 503, 504)
"""Status codes after which a STAC API may answer later; None is a lost connection."""
API_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to request a page."""
MOST_ITEMS = 500_000
MOST_STALE = 3
"""Pages in succession without a new item, after which a search is given up as endless."""


def search(uri: str, question: str | None, geometry: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The items of a search in a STAC API, page by page, each once.

    Args:
        uri: of the API.
        question: `a,b&datetime=2020-01-01/2020-12-31&query=eo:cloud_cover<20`: collections, and of the search's other
            words `datetime`, `query` (several, with commas) and `limit` (items of a page).
        geometry: GeoJSON in EPSG:4326 that they must meet; None for any.

    Raises:
        ConfigError: the query has another parameter.
        DataError: the API fails, or its pages do not end.
    """
    import pystac_client  # only APIs need it
    from pystac_client.exceptions import APIError

    # Some APIs repeat their last page for ever: pages without a new item are counted.
    names, parameters = _parameters(question or "")
    stale = 0
    items: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        client = pystac_client.Client.open(uri, stac_io=_patient_io())
        search = client.search(collections=names or None, intersects=geometry, **parameters)
        for number, page in enumerate(search.pages_as_dicts(), 1):
            before = len(items)
            for row in page["features"]:
                items.setdefault((str(row.get("collection")), str(row.get("id"))), row)
            stale = stale + 1 if len(items) == before else 0
            if len(items) > MOST_ITEMS or stale == MOST_STALE:
                raise DataError(
                    f"the search of the STAC API {public(uri)} does not end: {number} pages with {len(items)} "
                    f"different items, the limit is {MOST_ITEMS}; choose a smaller region, or add "
                    f"&datetime=... to the collection"
                )
    except (APIError, KeyError, pystac.STACError, Passing) as error:
        raise DataError(
            f"the STAC API {public(uri)} cannot be searched: {public(str(error))[:300]}; check its address"
        ) from None
    return list(items.values())


def _patient_io() -> "StacApiIO":
    """The HTTP client of a STAC API; it repeats requests by `remote.patiently`, as long as a Retry-After requests."""
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO

    # The library raises an error without the header that says how long to wait, so a hook keeps it.
    waits: list[float] = []
    client = StacApiIO(max_retries=0, timeout=60)
    client.session.hooks["response"].append(
        lambda answer, **_: waits.append(retry_after(answer.headers.get("Retry-After", "")))
    )
    request = client.request

    def attempt(*args: Any, **kwargs: Any) -> str:  # noqa: ANN401 - the library's signature
        waits.clear()
        try:
            return request(*args, **kwargs)
        except APIError as error:
            if error.status_code not in BUSY:
                raise
            raise Passing(str(error), max(waits, default=0.0)) from None

    client.request = lambda *args, **kwargs: patiently(partial(attempt, *args, **kwargs), API_WAITS)  # type: ignore[method-assign]
    return client


def _parameters(question: str) -> tuple[list[str], dict[str, Any]]:
    """(collections, other parameters of the search) of a query."""
    names, *words = question.split("&")
    parameters: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in {"datetime", "query", "limit"} or not value or (key == "limit" and not value.isdigit()):
            raise ConfigError(f"{word!r} is not a search parameter, expected datetime=..., query=... or limit=...")
        if key == "datetime" and not _is_time(value):
            raise ConfigError(
                f"datetime={value} is not a time, expected 2020, 2020-06, 2020-06-30 or 2020-01-01/2020-06-30"
            )
        parameters[key] = _conditions(value) if key == "query" else int(value) if key == "limit" else value
    return [name for name in names.split(",") if name], parameters


def _is_time(text: str) -> bool:
    """Whether a STAC API can take the text as a time or an interval."""
    try:
        # Of a day and more, the calendar and the clock decide: no 31st of June, no 25 o'clock.
        for bound in text.upper().split("/"):
            if len(bound) >= len("2020-01-01"):
                datetime.fromisoformat(bound)
    except ValueError:
        return False
    return bool(_DATETIME.fullmatch(text))


def _conditions(text: str) -> dict[str, dict[str, Any]]:
    """`eo:cloud_cover<20,platform=landsat-8` as an object of the query extension; numbers are numbers."""
    conditions: dict[str, dict[str, Any]] = {}
    for part in text.split(","):
        if not (parts := _CONDITION.fullmatch(part)):
            raise ConfigError(f"query {part!r} is not a condition, expected for example eo:cloud_cover<20")
        name, sign, value = parts.groups()
        number = float(value) if _NUMBER.fullmatch(value) else value
        conditions.setdefault(name, {})[_SIGNS[sign]] = (
            int(number) if isinstance(number, float) and number % 1 == 0 else number
        )
    return conditions
