"""Web-map tile servers: the layout of their tiles, and requests with limited rate and retries.

The tiles cover the square of EPSG:3857 from -20037508.34 to +20037508.34 in x and y; a zoom divides it into 2**zoom
rows and columns of tiles, counted from the upper-left corner. "Tile" means the server's tile here, not a tile of a run.
"""

import logging
import math
import random
import re
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
import mercantile
import numpy as np
import rasterio
from pydantic import Field
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile

from rayseg import __version__
from rayseg.config import Config
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io.remote import Passing, patiently, retry_after

CRS = "EPSG:3857"
HALF_WORLD = math.pi * 6_378_137.0  # half the equator of the sphere of EPSG:3857, in metres
_SAME = 1e-6  # relative difference up to which a resolution equals a zoom's
_FINEST_ZOOM = 24
_MOST_BYTES = 8 << 20  # of one tile
_NO_TILE = {204, 404, 410}
_BUSY = {408, 425, 429}
_PLACEHOLDERS = ("{z}", "{x}", "{y}", "{-y}", "{q}", "{s}")
_BRACED = re.compile(r"\{[^{}]*\}")
_BRACED_ALONE = re.compile(r"(\{[^{}]*\})+")
_DRIVERS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP"}
# GDAL's fast PNG reader decodes a truncated file as black
_DECODING = {"GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO", "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE"}


class Fetching(Config):
    """How tiles are requested."""

    tile_size: Literal[256, 512] = 256
    """Width and height of the server's tiles in px."""
    concurrency: Annotated[int, Field(gt=0)] = 8
    """Most requests at once."""
    tries: Annotated[int, Field(gt=0)] = 6
    """Attempts per tile before it counts as failed."""
    backoff: Annotated[float, Field(ge=0)] = 0.5
    """Seconds before the second attempt, doubled before each further one, +-50 % at random, at most 60; a longer
    Retry-After of the server counts instead, up to 60 s."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a byte before a request fails; a whole request may take four times as long."""
    limit: Annotated[int, Field(gt=0)] = 200_000
    """Most tiles of one ingest; a larger ingest is refused before the first request."""


@dataclass(frozen=True)
class Service:
    """One zoom of a tile server. `template` may hold keys, so it is used in requests only."""

    template: str = field(repr=False)
    zoom: int
    fetching: Fetching

    @property
    def public(self) -> str:
        """The template without user, password and query values that are not placeholders."""
        parts = urlsplit(self.template)
        query = [term for term in parts.query.split("&") if _BRACED_ALONE.fullmatch(term.partition("=")[2])]
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "&".join(query), ""))

    @property
    def tile_side(self) -> float:
        """Width and height of a tile in units of EPSG:3857."""
        return _native(1, self.zoom)

    @property
    def native(self) -> Grid:
        """The grid of the tiles' pixels: tile (x, y) starts at pixel (x, y) * tile_size."""
        side = _native(self.fetching.tile_size, self.zoom)
        return Grid(CRS, (side, side), (-HALF_WORLD, HALF_WORLD))

    def url(self, tile: mercantile.Tile) -> str:
        """The URL of a tile."""
        return _expanded(self.template, tile)

    def name(self, tile: mercantile.Tile) -> str:
        """The URL of a tile without keys, for messages."""
        return _expanded(self.public, tile)

    def span(self, window: Window) -> tuple[range, range]:
        """(x, y) of the tiles over a window of native pixels; none beyond the world's edge."""
        size, last = self.fetching.tile_size, 2**self.zoom
        inside = window.intersect(Window(0, 0, last * size, last * size))
        xs, ys = range(inside.col // size, -(-inside.col1 // size)), range(inside.row // size, -(-inside.row1 // size))
        return (range(0), range(0)) if inside.empty else (xs, ys)


def service_for(url: str, resolution: float, fetching: Fetching) -> tuple[Service, Grid]:
    """(the server at the zoom of `resolution` or the next finer one, the output grid with a corner at (0, 0)).

    Raises:
        ConfigError: the template or the resolution is invalid.
    """
    if not 0 < resolution < math.inf:
        raise ConfigError(f"resolution is {resolution}, expected the side of a pixel in metres, above 0; correct it")
    coarsest = _native(fetching.tile_size, 0)
    # The next finer zoom: pixels are averaged, never made up.
    zoom = max(0, math.ceil(math.log2(coarsest / resolution * (1 - _SAME))))
    if zoom > _FINEST_ZOOM:
        raise ConfigError(
            f"resolution is {resolution}, which needs zoom {zoom}, the finest zoom is {_FINEST_ZOOM}; set it to "
            f"{_native(fetching.tile_size, _FINEST_ZOOM):.2g} m per pixel or more"
        )
    service = Service(url, zoom, fetching)
    _check_template(service)
    side = _native(fetching.tile_size, zoom)
    side = side if math.isclose(side, resolution, rel_tol=_SAME) else resolution
    return service, Grid(CRS, (side, side), (0.0, 0.0))


def _native(tile_size: int, zoom: int) -> float:
    """Pixel side of a zoom in units of EPSG:3857: 156543.03392804097 / 2**zoom for tiles of 256 px."""
    return float(2 * HALF_WORLD / tile_size / 2**zoom)


def _check_template(service: Service) -> None:
    url, known = service.template, ", ".join(_PLACEHOLDERS)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError("the template is not a valid URL: expected http(s)://host/path") from None
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ConfigError(
            f"{service.public} is not the address of a tile server: expected http:// or https:// and a host"
        )
    # Messages show `service.public`: the template itself may hold a key.
    placeholders = set(_BRACED.findall(url))
    if unknown := sorted(placeholders - set(_PLACEHOLDERS)) or re.findall(r"[{}]", _BRACED.sub("", url)):
        raise ConfigError(
            f"{service.public} has the unknown placeholders {', '.join(unknown)}: expected some of {known}"
        )
    if "{q}" not in placeholders and not ({"{z}", "{x}"} <= placeholders and placeholders & {"{y}", "{-y}"}):
        raise ConfigError(f"{service.public} lacks placeholders: expected {{z}}, {{x}} and {{y}} or {{-y}}, or {{q}}")
    try:
        httpx.URL(service.url(mercantile.Tile(0, 0, 0)))
    except httpx.InvalidURL:
        raise ConfigError(f"{service.public} is not a valid URL: expected http(s)://host/path") from None


def _expanded(template: str, tile: mercantile.Tile) -> str:
    values = {
        "{z}": tile.z,
        "{x}": tile.x,
        "{y}": tile.y,
        "{-y}": 2**tile.z - 1 - tile.y,
        "{q}": mercantile.quadkey(tile),
        "{s}": "abc"[(tile.x + tile.y) % 3],
    }
    return _BRACED.sub(lambda match: str(values[match.group()]), template)


# -- fetching ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """Open connections to one server, and their threads."""

    service: Service
    client: httpx.Client
    pool: ThreadPoolExecutor


@contextmanager
def session(service: Service) -> Iterator[Session]:
    """Open connections to the server; meanwhile httpx logs warnings only, because its other lines hold whole URLs."""
    many, timeout = service.fetching.concurrency, httpx.Timeout(service.fetching.timeout, pool=None)
    limits = httpx.Limits(max_connections=many, max_keepalive_connections=many)
    headers = {"User-Agent": f"rayseg/{__version__}", "Accept": "image/png, image/jpeg, image/webp"}
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore.http11", "httpcore.connection")]
    for logger in loggers:
        # httpx logs whole URLs, which may hold a key.
        logger.addFilter(_is_warning)
    try:
        with (
            httpx.Client(
                verify=_trusted(), limits=limits, timeout=timeout, headers=headers, follow_redirects=True
            ) as client,
            ThreadPoolExecutor(many, "tiles") as pool,
        ):
            yield Session(service, client, pool)
    finally:
        for logger in loggers:
            logger.removeFilter(_is_warning)


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that httpx trusts, read once."""
    return httpx.create_ssl_context()


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def mosaic(session: Session, window: Window) -> np.ndarray:
    """(4, height, width) uint8 of a window of native pixels: red, green, blue and 255 where there is data.

    Raises:
        DataError: the first tile that failed; the remaining tiles are not requested.
    """
    size, (xs, ys) = session.service.fetching.tile_size, session.service.span(window)
    mosaic_CHW = np.zeros((4, window.height, window.width), np.uint8)
    stop = threading.Event()

    def paste(tile: mercantile.Tile) -> None:
        rgba_CHW = _tile(session, tile, stop)
        if rgba_CHW is not None:
            at = Window(tile.x * size, tile.y * size, size, size)
            part = at.intersect(window)
            mosaic_CHW[:, *part.slices(window)] = rgba_CHW[:, *part.slices(at)]

    futures = [session.pool.submit(paste, mercantile.Tile(x, y, session.service.zoom)) for y in ys for x in xs]
    try:
        for future in as_completed(futures):
            future.result()
    finally:
        # No further attempt begins; all threads are awaited, because they write into the mosaic.
        stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
    return mosaic_CHW


def _tile(session: Session, tile: mercantile.Tile, stop: threading.Event) -> np.ndarray | None:
    """(4, size, size) uint8 as in a mosaic; None if the server has no such tile, or `stop` is set."""
    fetching, name = session.service.fetching, session.service.name(tile)
    # Random waits, so that threads which failed together do not return together.
    waits = (fetching.backoff * 2**attempt * random.uniform(0.5, 1.5) for attempt in range(fetching.tries - 1))

    def attempt() -> np.ndarray | None:
        body = None if stop.is_set() else _ask(session, tile)
        return None if body is None else _decoded(body, name, fetching.tile_size)

    try:
        return patiently(attempt, waits, pause=stop.wait)
    except Passing as failure:
        if stop.is_set():
            return None
        raise DataError(f"{name} failed {fetching.tries} times, last with {failure}") from None


def _ask(session: Session, tile: mercantile.Tile) -> bytes | None:
    """The body of a tile; None if the server has no such tile."""
    name, most = session.service.name(tile), 4 * session.service.fetching.timeout
    body, end = bytearray(), time.monotonic() + most
    try:
        with session.client.stream("GET", session.service.url(tile)) as answer:
            status = answer.status_code
            if status in _NO_TILE:
                return None
            if status in _BUSY or status >= 500:
                raise Passing(f"HTTP {status}", retry_after(answer.headers.get("Retry-After", "")))
            if status != 200:
                raise DataError(
                    f"{name} was answered with HTTP {status}; check the address, the key and the terms of use"
                )
            # Read in parts: limits of size and time end a response that would never end.
            for part in answer.iter_bytes():
                body += part
                if len(body) > _MOST_BYTES:
                    raise DataError(f"{name} has more than {_MOST_BYTES} bytes, expected one tile; check the address")
                if time.monotonic() > end:
                    raise Passing(f"an answer that took more than {most:g} s")
    except httpx.RequestError as error:  # its text and context may hold the URL
        raise Passing(type(error).__name__) from None
    return bytes(body)


def _decoded(body: bytes, name: str, size: int) -> np.ndarray:
    """(4, size, size) uint8: red, green, blue and 255 where there is data, all 0 elsewhere."""
    # By content, not by Content-Type: only these three GDAL drivers open data from the network.
    driver = next((driver for magic, driver in _DRIVERS.items() if body.startswith(magic)), None)
    if driver is None:
        raise Passing("a body that is not a PNG, JPEG or WebP image")
    try:
        with rasterio.Env(**_DECODING), MemoryFile(body) as file, file.open(driver=driver) as dataset:
            if dataset.shape != (size, size) or dataset.dtypes[0] != "uint8":
                height, width = dataset.shape
                raise DataError(
                    f"{name} is {width} x {height} px of {dataset.dtypes[0]}, expected {size} x {size} of uint8; "
                    "check tile_size"
                )
            rgba_CHW = _rgba(dataset)
    except RasterioError:
        raise Passing(f"a broken {driver} image") from None
    rgba_CHW[3] = np.where(rgba_CHW[3] > 0, 255, 0)
    # Servers store arbitrary colours under transparent pixels.
    rgba_CHW[:3, rgba_CHW[3] == 0] = 0
    return rgba_CHW


def _rgba(dataset: DatasetReader) -> np.ndarray:
    """Palette, grey or colour, with or without transparency, as four bands."""
    pixels_CHW: np.ndarray = dataset.read()
    if dataset.colorinterp[0] is ColorInterp.palette:
        colors = np.zeros((256, 4), np.uint8)
        for value, color in dataset.colormap(1).items():
            colors[value] = color
        rgba_HWC: np.ndarray = colors[pixels_CHW[0]]
        return rgba_HWC.transpose(2, 0, 1)
    color_CHW = pixels_CHW[:3] if len(pixels_CHW) >= 3 else pixels_CHW[[0, 0, 0]]
    return np.stack([*color_CHW, dataset.dataset_mask()])
