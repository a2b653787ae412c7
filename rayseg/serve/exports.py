"""A run for GIS and other programs: TileJSON, WMTS capabilities, its STAC collection and its files with ranges."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from hashlib import sha256
from importlib import resources
from typing import Annotated, Any, Literal
from urllib.parse import urljoin

from botocore.exceptions import BotoCoreError
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from jinja2 import Environment

from rayseg.serve import runs
from rayseg.serve.openapi import problems_of
from rayseg.serve.problems import Problem
from rayseg.serve.settings import ServeConfig
from rayseg.store import upath

MAX_ZOOM = 22
_CHUNK = 1 << 20
_NAME = r"[\w.-]+"
_FILE = re.compile(
    rf"collection\.json|{_NAME}\.(?:parquet|geojson|gpkg|fgb)|tiles/{_NAME}/{_NAME}\.(?:tif|json|parquet)"
    rf"|models/(?:{_NAME}/)+{_NAME}\.(?:json|safetensors)|(?:qgis|report)/{_NAME}"
)
"""Files of a run that a client may read: its steps and settings name files of the server."""
_SCRIPT = b64encode(sha256(b"\n" + resources.files("rayseg").joinpath("report.js").read_bytes()).digest()).decode()
_REPORT = (
    f"default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of a report: of all scripts only the one of this version runs."""
_TYPES = {
    "json": "application/json",
    "geojson": "application/geo+json",
    "tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    "parquet": "application/vnd.apache.parquet",
    "gpkg": "application/geopackage+sqlite3",
    "png": "image/png",
    "csv": "text/csv",
    "html": "text/html; charset=utf-8",
}
_FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {} for media in ("application/octet-stream", *_TYPES.values())}},
    206: {"description": "The bytes of `Range`."},
    304: {"description": "The file is the one that If-None-Match names."},
    **problems_of(404, 416, 503),
}
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
Layer = Annotated[Literal["classes", "imagery"], Query(description="Layer to draw.")]


def router(config: ServeConfig) -> APIRouter:
    """Routes of the runs for programs."""
    routes, index = APIRouter(tags=["runs"]), runs.RunIndex(config)
    # WMTS 1.0.0 (OGC 07-057r7); a pixel of a scale denominator has 0.28 mm
    text = resources.files("rayseg.serve").joinpath("wmts.xml").read_text()
    capabilities = Environment(autoescape=True).from_string(text)

    async def described(name: str) -> dict[str, Any]:
        return await runs.in_reader(lambda: runs.describe(name, index.root(name)))

    @routes.get("/v1/runs/{name}/tilejson.json", responses=problems_of(404, 422, 503))
    async def tilejson(request: Request, name: runs.Name, layer: Layer = "classes") -> dict[str, Any]:
        """The map tiles as TileJSON 3.0; QGIS takes the address in `tiles` as an XYZ layer."""
        bounds = _bounds_of(run := await described(name))
        west, south, east, north = bounds
        return {
            "tilejson": "3.0.0",
            "name": f"{run['name']} {layer}",
            "tiles": [f"{_base(request)}/v1/runs/{name}/tiles/{{z}}/{{x}}/{{y}}.png?layer={layer}"],
            "minzoom": 0 if layer == "classes" else run["minzoom"],
            "maxzoom": MAX_ZOOM,
            "bounds": bounds,
            "center": [(west + east) / 2, (south + north) / 2, run["minzoom"]],
        }

    @routes.get(
        "/v1/runs/{name}/wmts",
        responses={200: {"content": {"application/xml": {}}}, **problems_of(404, 422, 503)},
        response_class=Response,
    )
    async def wmts(request: Request, name: runs.Name) -> Response:
        """WMTS capabilities with both layers, for QGIS, ArcGIS and GDAL."""
        run = await described(name)
        facts = {"base": f"{_base(request)}/v1/runs/{name}", "title": run["name"], "bounds": _bounds_of(run)}
        return Response(capabilities.render(facts, zooms=MAX_ZOOM + 1), media_type="application/xml")

    @routes.get("/v1/runs/{name}/stac", responses=problems_of(404, 503))
    async def stac(request: Request, name: runs.Name) -> dict[str, Any]:
        """The STAC collection of the run; its links lead to the items, and those to the rasters."""
        root = await asyncio.to_thread(index.root, name)
        try:
            text = await asyncio.to_thread((upath(root) / "collection.json").read_bytes)
        except (OSError, BotoCoreError):
            raise Problem(404, f"run {name} has no collection yet; it is written when the run ends") from None
        # Clients resolve relative links by the address that they asked, not by that of the file.
        collection: dict[str, Any] = json.loads(text)
        here = f"{_base(request)}/v1/runs/{name}/files/collection.json"
        for linked in (*collection["links"], *collection.get("assets", {}).values()):
            linked["href"] = urljoin(here, linked["href"])
        own = {"rel": "self", "href": f"{_base(request)}/v1/runs/{name}/stac", "type": "application/json"}
        return collection | {"links": [*collection["links"], own]}

    @routes.get("/v1/runs/{name}/files/{path:path}", response_class=Response, responses=_FILE_RESPONSES)
    async def file(request: Request, name: runs.Name, path: Annotated[str, Path(max_length=400)]) -> Response:
        """A file of the run: collection, items, rasters, polygons, models; one byte range is answered alone."""
        root = await asyncio.to_thread(index.root, name)
        return await _file(request, root, path)

    return routes


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def _bounds_of(run: dict[str, Any]) -> list[float]:
    if run["bounds"] is None:
        raise Problem(422, f"run {run['name']} has no CRS, and only runs with one have web maps; use its files")
    return [float(value) for value in run["bounds"]]


async def _file(request: Request, root: str, path: str) -> Response:
    # 1. only what a run publishes; its steps and settings name files of the server
    if not _FILE.fullmatch(path) or ".." in path.split("/"):
        raise Problem(404, "the run has no such file for clients; collection.json lists its items and files")
    target = upath(root) / path
    try:
        facts = await asyncio.to_thread(target.stat)
    except (OSError, BotoCoreError):
        raise Problem(404, "the run has no such file; collection.json lists its items and files") from None
    # 2. what of it
    size, changed = int(facts.st_size), getattr(facts, "st_mtime", 0)
    etag = f'"{size:x}-{int(changed * 1000):x}"'
    headers = {"Accept-Ranges": "bytes", "ETag": etag, "Cache-Control": "private, max-age=60"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range", "") if request.headers.get("if-range", etag) == etag else ""
    start, end = _range(wanted, size)
    if end < size or start:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if path.endswith(".html"):
        headers["Content-Security-Policy"] = _REPORT
    media = _TYPES.get(path.rpartition(".")[2], "application/octet-stream")
    status = 206 if "Content-Range" in headers else 200
    return StreamingResponse(_chunks(target, start, end), status, headers, media)


def _range(header: str, size: int) -> tuple[int, int]:
    """(start, end) of one range of bytes (RFC 9110, 14.1.2); of several ranges or another unit the whole file.

    Raises:
        Problem: 416, the file ends before it.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if not match or match[1] == match[2] == "":
        return 0, size
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    if start >= end:
        headers = {"Content-Range": f"bytes */{size}"}
        raise Problem(416, f"the file has {size} bytes, the range begins after them; send one inside", headers=headers)
    return start, end


async def _chunks(target: Any, start: int, end: int) -> AsyncIterator[bytes]:  # noqa: ANN401 - a UPath
    with await asyncio.to_thread(target.open, "rb") as stream:
        await asyncio.to_thread(stream.seek, start)
        while start < end and (chunk := await asyncio.to_thread(stream.read, min(_CHUNK, end - start))):
            start += len(chunk)
            yield chunk
