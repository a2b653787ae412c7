"""Runs as the page shows them: classes, ledger, failed tiles, and the map as web tiles."""

import asyncio
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from threading import Event, Lock, Thread
from time import monotonic
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response

from rayseg import __version__
from rayseg.engine import run as runs
from rayseg.engine.manifest import read_rows
from rayseg.errors import DataError, RaysegError
from rayseg.geo.grid import Tile, Window, slug
from rayseg.io import mapview, masks
from rayseg.io.maps import MappedTile, mapped_tiles, planned_tiles
from rayseg.io.pictures import shown_colors
from rayseg.io.qgis import RAMP
from rayseg.io.sources import Source
from rayseg.serve import answers
from rayseg.serve.openapi import problems_of
from rayseg.serve.problems import Problem, busy
from rayseg.serve.settings import ServeConfig
from rayseg.steps import report
from rayseg.store import StorePath, upath
from rayseg.vision.color import ClassTable

_log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_OPENED = 16
"""Maximum files that one web tile opens; a web tile over more of them is drawn from the ledger, without imagery."""
MAX_MOSAIC = 50_000
"""Maximum tiles of a run that has a mosaic; a larger one shows each tile in one class at low zooms."""
TILE_THREADS = 2
TILE_SECONDS = 10.0
"""Time limit of a tile."""
_RECHECK = 5.0  # seconds between two looks at run.json, and at everything else of an unfinished run
_MAX_TROUBLES = 500
_TILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}},
    204: {"description": "The tile is empty."},
    304: {"description": "The tile is the one that If-None-Match names."},
    **problems_of(404, 422, 503),
}
_RAMP_N3 = np.stack(
    [np.interp(np.arange(255), [at for at, _ in RAMP], [rgb[band] for _, rgb in RAMP]) for band in range(3)], axis=1
)
_RAMP = {score: (int(red), int(green), int(blue)) for score, (red, green, blue) in enumerate(_RAMP_N3.tolist())}
_GREYS = {score: (score, score, score) for score in range(255)}  # a page reads the score itself from them
"""Score -> colour, as in the run's QGIS project."""
Name = Annotated[str, Path(max_length=200)]
Zoom = Annotated[int, Path(ge=0, le=24)]
Index = Annotated[int, Path(ge=0, lt=1 << 24)]


class Overview:
    """The mosaic of a run, made in a thread once the run has ended and a tile of it was requested.

    There is none if a tile cannot be read: a mosaic with a hole would hide it.
    """

    def __init__(self) -> None:
        self._begun = Lock()
        self.mosaic: mapview.Mosaic | None = None

    def start(self, tiles: Sequence[MappedTile]) -> None:
        """Make the mosaic, unless somebody else does."""
        if len(tiles) <= MAX_MOSAIC and self._begun.acquire(blocking=False):
            Thread(target=self._make, args=(tiles,), daemon=True).start()

    def _make(self, tiles: Sequence[MappedTile]) -> None:
        try:
            self.mosaic = mapview.Mosaic.of(tiles)
        except DataError as error:
            _log.warning("no mosaic: %s; map tiles of low zooms are drawn from the run's files", error)


@dataclass(frozen=True, eq=False)
class RunView:
    """The map of a run.

    Attributes:
        tiles: the mapped tiles.
        planned: every tile with its imagery.
        bounds_N4: (west, south, east, north) of each of `tiles`, NaN without CRS.
        planned_N4: the same for each of `planned`.
        majority_N: most frequent class of each of `tiles`, uint8.
        table: the classes; None while nothing is mapped.
        version: of the run's files; see `version`.
        overview: of a finished run; None of another.
    """

    tiles: tuple[MappedTile, ...]
    planned: tuple[tuple[Tile, tuple[Source, ...]], ...]
    bounds_N4: np.ndarray
    planned_N4: np.ndarray
    majority_N: np.ndarray
    table: ClassTable | None
    version: str = ""
    overview: Overview | None = None

    def mapped(self, bounds: mapview.Bounds, image: str | None) -> list[int]:
        """Positions in `tiles` of those that intersect (west, south, east, north), or of an image without CRS."""
        if image is not None:
            return [
                at for at, tile in enumerate(self.tiles) if (tile.tile.grid.crs, tile.tile.grid.image) == (None, image)
            ]
        return _intersecting(self.bounds_N4, bounds)

    def sources(self, bounds: mapview.Bounds, image: str | None) -> list[Source]:
        """The imagery of all tiles that intersect (west, south, east, north), or an image without CRS."""
        if image is not None:
            near = [sources for tile, sources in self.planned if tile.grid.crs is None and tile.grid.image == image]
        else:
            near = [self.planned[at][1] for at in _intersecting(self.planned_N4, bounds)]
        by_id = {source.item_id: source for sources in near for source in sources}
        return [source for name, source in by_id.items() if image in {None, name}]


def _intersecting(bounds_N4: np.ndarray, bounds: mapview.Bounds) -> list[int]:
    (west, south, east, north), (left_N, bottom_N, right_N, top_N) = bounds, bounds_N4.T
    right_N = right_N + 360 * (left_N > right_N)  # across the antimeridian
    turns_3N = np.array([[-360.0], [0.0], [360.0]])  # some grids count to 360
    hits_N = ((left_N + turns_3N < east) & (right_N + turns_3N > west)).any(axis=0) & (bottom_N < north)
    hits_N &= top_N > south
    return np.flatnonzero(hits_N).tolist()


def runs_below(prefixes: Sequence[StorePath]) -> dict[str, str]:
    """Name -> prefix of the runs at, directly below, or directly above some prefixes (`RUN/models` finds RUN)."""
    prefixes_by_name: dict[str, str] = {}
    for prefix in map(upath, prefixes):
        below = [path.parent for path in sorted(prefix.glob("*/run.json"))] if prefix.is_dir() else []
        # A server started with RUN/models shows RUN as well.
        for folder in (prefix, prefix.parent, *below):
            if (folder / "run.json").exists() and str(folder) not in prefixes_by_name.values():
                name, number = slug(folder.name), 2
                while name in prefixes_by_name:
                    name, number = f"{slug(folder.name)}-{number}", number + 1
                prefixes_by_name[name] = str(folder)
    return prefixes_by_name


class RunIndex:
    """The runs that a server shows, looked for again every few seconds.

    Args:
        config: prefixes of runs, models and jobs.
    """

    def __init__(self, config: ServeConfig) -> None:
        prefixes = [*config.runs, *config.models, *([config.jobs] if config.jobs else [])]
        self._at = lru_cache(maxsize=1)(lambda _moment: runs_below(prefixes))

    def root(self, name: str) -> str:
        """Prefix of a run.

        Raises:
            Problem: 404, no run has that name.
        """
        moment = int(monotonic() / _RECHECK)
        if name not in self._at(moment):
            self._at.cache_clear()  # a run can have begun since
        known = self._at(moment)
        if name not in known:
            raise Problem(404, f"there is no run {name!r}; known runs: {', '.join(list(known)[:10]) or 'none'}")
        return known[name]

    def rows(self) -> list[dict[str, Any]]:
        """Name and pipeline of every run; an unreadable one is reported when it is requested by name."""
        rows = []
        self._at.cache_clear()
        for name, root in self._at(0).items():
            with suppress(RaysegError, ValueError):
                rows.append({"name": name, "pipeline": runs.read(root)["pipeline"]})
        return rows


# -- one run, read once ------------------------------------------------------------------------------------------------


def version(root: str) -> str:
    """Identity of a run's files: that of run.json for a finished run, a new one every few seconds for another."""
    return _version(root, int(monotonic() / _RECHECK))


@lru_cache(maxsize=64)
def _version(root: str, moment: int) -> str:
    content = runs.read(root)
    if content["status"] == "running":
        return f"{moment}"  # decimal digits alone
    return "f" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


_READERS = ThreadPoolExecutor(2, thread_name_prefix="runs")


async def in_reader(function: Callable[..., T], *arguments: object) -> T:
    """Call a function that may read a run for the first time, for seconds, in threads that do nothing else."""
    return await asyncio.get_running_loop().run_in_executor(_READERS, function, *arguments)


_READING: defaultdict[str, Lock] = defaultdict(Lock)  # per run: concurrent requests for a run read it once


def view(root: str) -> RunView:
    """The map of a run as far as it exists; a finished run is read once."""
    with _READING[root]:
        return _view(root, version(root))


@lru_cache(maxsize=4)  # of each also the mosaic is kept
def _view(root: str, version: str) -> RunView:
    # The step with the map is usually called predict; other steps have manifests as well.
    names = [path.parent.name for path in upath(root).glob("steps/*/manifest.parquet")]
    for step in sorted(names, key=lambda name: (name != "predict", name)):
        # A step can have a manifest and no map yet: the next one is tried.
        tiles = tuple(mapped_tiles(root, step))
        if tiles and upath(tiles[0].href).exists():
            planned = tuple(planned_tiles(root, step))
            planned_N4 = _bounds([tile for tile, _ in planned])
            at = {tile.id: number for number, (tile, _) in enumerate(planned)}
            counts = [tile.counts for tile in tiles]
            return RunView(
                tiles=tiles,
                planned=planned,
                bounds_N4=planned_N4[[at[tile.tile.id] for tile in tiles]],
                planned_N4=planned_N4,
                majority_N=np.array([max(of, key=of.__getitem__, default=answers.NODATA) for of in counts], np.uint8),
                table=masks.table_of(tiles[0].href),
                version=f"{root} {version}",
                overview=None if version.isdecimal() else Overview(),
            )
    nothing = np.empty((0, 4))
    return RunView((), (), nothing, nothing, np.empty(0, np.uint8), None, f"{root} {version}")


def _bounds(tiles: Sequence[Tile]) -> np.ndarray:
    """(west, south, east, north) of each, NaN without CRS."""
    nowhere = (np.nan,) * 4
    return np.array([mapview.lonlat_bounds(tile.grid, tile.window) if tile.grid.crs else nowhere for tile in tiles])


def describe(name: str, root: str) -> dict[str, Any]:
    """What the page shows of a run next to its tiles; a finished run is read once."""
    with _READING[root]:
        return {"name": name} | _described(root, version(root))


@lru_cache(maxsize=8)
def _described(root: str, version: str) -> dict[str, Any]:
    shown, content, state = _view(root, version), runs.read(root), runs.status(root)
    shares = report.class_shares(shown.tiles, shown.table) if shown.table else []
    values = shown.table.values if shown.table else ()
    placed_N4 = shown.planned_N4[~np.isnan(shown.planned_N4).any(axis=1)]
    # Images without CRS; one that could not be opened has no size.
    sizes = {
        tile.grid.image: (size[0], size[1])
        for tile, sources in shown.planned
        if tile.grid.crs is None and tile.grid.image and (size := _size(sources, tile.grid.image))
    }
    return {
        "pipeline": content["pipeline"],
        "region": content["region"]["name"].rpartition("/")[2],
        "status": state["status"],
        "reason": state["reason"],
        "minzoom": _min_zoom(shown.planned_N4),
        "bounds": [*placed_N4[:, :2].min(axis=0), *placed_N4[:, 2:].max(axis=0)] if len(placed_N4) else None,
        "images": [{"id": image, "width": width, "height": height} for image, (width, height) in sizes.items()],
        "classes": [{"value": value, **row} for value, row in zip(values, shares, strict=True)],
        "ledger": {
            step: {"planned": ledger["planned"], "counts": ledger["counts"]} for step, ledger in state["steps"].items()
        },
        "troubles": _troubles(root, state["steps"]),
    }


def _size(sources: Sequence[Source], image: str) -> tuple[int, int] | None:
    """(width, height) of an image without CRS."""
    return next(((source.width, source.height) for source in sources if source.item_id == image), None)


def _min_zoom(bounds_N4: np.ndarray) -> int:
    """Zoom from which at most `MAX_OPENED` tiles of the run intersect a web tile, so that their pixels are drawn."""
    boxes_N4 = mapview.mercator(bounds_N4[~np.isnan(bounds_N4).any(axis=1)])
    if not len(boxes_N4):
        return 0
    across = math.isqrt(MAX_OPENED) - 1  # n web pixels across can touch n + 1 tiles
    width = float(np.median(boxes_N4[:, 2] - boxes_N4[:, 0]))
    return min(24, max(0, math.ceil(math.log2(2 * math.pi / (across * width)))))


def _troubles(root: str, steps: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that failed or are missing, with their bounds if they have any."""
    rows = []
    for step, ledger in steps.items():
        # A run can fail in every tile; the page shows the first ones.
        troubles = dict(list(ledger["troubles"].items())[:_MAX_TROUBLES])
        places: dict[str, dict[str, Any]] = {}
        if troubles:
            failed = read_rows(upath(root) / "steps" / step / "manifest.parquet").only(troubles)
            for tile in (Tile.from_row(row) for row in failed if row.get("width")):
                window = tile.window
                if tile.grid.crs:
                    places[tile.id] = {"bounds": mapview.lonlat_bounds(tile.grid, window)}
                else:
                    box = [window.col, window.row, window.col1, window.row1]
                    places[tile.id] = {"image": tile.grid.image, "box": box}
        for row, reason in troubles.items():
            rows.append({"step": step, "id": row, "reason": reason, **places.get(row, {})})
    return rows


# -- web tiles ---------------------------------------------------------------------------------------------------------


def tile_png(
    shown: RunView,
    place: mapview.Place,
    layer: str,
    *,
    image: str | None,
    hosts: Sequence[str],
    stop: Event | None = None,
) -> bytes | None:
    """A web tile (z, x, y) of a run as PNG; None if it is empty. Once `stop` is set, no further file is opened."""
    # 1. the imagery under the web tile
    bounds = mapview.bounds_of_tile(*place)
    sources = shown.sources(bounds, image)
    size = _size(sources, image) if image is not None else None
    if not sources or shown.table is None or (image is not None and size is None):
        return None
    whole = Window(0, 0, *size) if size else None
    opened = len(sources) if layer == "imagery" else len(shown.mapped(bounds, image))
    if not opened or (opened > MAX_OPENED and layer != "classes"):
        return None
    if layer == "imagery":
        return answers.rgba_png(mapview.imagery_tile(sources, place, image=whole, hosts=hosts, stop=stop))
    # 2. the classes: from the run's mosaic, from the class maps, or where there are many each tile in one class
    positions = shown.mapped(bounds, image)
    tiles = [shown.tiles[at] for at in positions]
    if layer in {"scores", "probabilities"}:
        scores_HW = mapview.scores_tile(tiles, place, image=whole, stop=stop)
        return answers.palette_png(scores_HW, _RAMP if layer == "scores" else _GREYS, opaque=set(_RAMP))
    mosaic = None
    if shown.overview:
        shown.overview.start(shown.tiles)
        mosaic = shown.overview.mosaic
    if mosaic and (len(tiles) > MAX_OPENED or mosaic.suffices(place, tiles[0].tile.grid, whole)):
        images = dict.fromkeys(tile.tile.grid for tile in tiles) if whole else {}
        classes_HW = mosaic.tile(place, images=list(images), image=whole)
    elif len(tiles) <= MAX_OPENED:
        classes_HW = mapview.classes_tile(tiles, place, image=whole, stop=stop, version=shown.version)
    else:
        classes_HW = _coarse(shown, positions, place, whole)
    colors = {value: color for value, _, color in shown.table.classes}
    return answers.palette_png(classes_HW, colors, opaque=set(shown_colors(shown.table)))


def _coarse(shown: RunView, positions: Sequence[int], place: mapview.Place, whole: Window | None) -> np.ndarray:
    """Class values of a web tile, each tile of the run in its most frequent class, until there is a mosaic."""
    if whole:
        side = max(whole.width, whole.height) / 2 ** place[0]
        windows = [shown.tiles[at].tile.window for at in positions]
        # Rows grow downward, the boxes' y upward.
        boxes_N4 = np.array([(w.col, -w.row1, w.col1, -w.row) for w in windows])
        _, x, y = place
        extent = (x * side, -(y + 1) * side, (x + 1) * side, -y * side)
    else:
        boxes_N4 = mapview.mercator(shown.bounds_N4[positions])
        west, south, east, north = mapview.mercator(np.array([mapview.bounds_of_tile(*place)]))[0].tolist()
        extent = (west, south, east, north)
    return mapview.coarse_classes_tile(shown.majority_N[positions], boxes_N4, extent)


async def drawn(request: Request, draw: Callable[[Event], bytes | None], pool: Executor) -> bytes | None:
    """A tile drawn in a pool; it is given up when the client disconnects, or after `TILE_SECONDS`.

    Args:
        request: of the client.
        draw: opens no further file once its event is set.
        pool: of threads that only draw tiles: slow tiles must not occupy those of other work.

    Raises:
        Problem: 503, the tile takes too long.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    stop = Event()
    tile = asyncio.get_running_loop().run_in_executor(pool, draw, stop)
    gone = asyncio.ensure_future(disconnected())
    both: set[asyncio.Future[Any]] = {tile, gone}
    try:
        await asyncio.wait(both, timeout=TILE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not tile.done():  # the client is gone, or the deadline has passed
            raise busy(f"the tile was not drawn within {TILE_SECONDS:g} s; zoom in, or retry later", seconds=10)
        return tile.result()
    finally:
        stop.set()
        tile.cancel()
        gone.cancel()


class _Handlers:
    """The handlers of the routes of one application."""

    def __init__(self, config: ServeConfig) -> None:
        self._index, self._hosts, self._paths = RunIndex(config), config.imagery_hosts, config.paths
        self._pool = ThreadPoolExecutor(TILE_THREADS, thread_name_prefix="map-tiles")

    async def list_runs(self) -> dict[str, list[dict[str, Any]]]:
        """The runs that the server shows."""
        return {"runs": await asyncio.to_thread(self._index.rows)}

    async def one(self, name: Name) -> dict[str, Any]:
        """A run: classes and their areas, ledger, failed rows with their place."""
        root = self._index.root(name)
        path = {"path": root} if self._paths else {}
        return path | await in_reader(describe, name, root)

    async def tile(
        self,
        request: Request,
        name: Name,
        z: Zoom,
        x: Index,
        y: Index,
        layer: Annotated[
            Literal["classes", "imagery", "scores", "probabilities"], Query(description="Layer to draw.")
        ] = "classes",
        image: Annotated[str | None, Query(max_length=200, description="An image without georeference.")] = None,
    ) -> Response:
        """A map tile of 256 px: on the Web Mercator grid, or in the pyramid of an image without georeference."""
        if x >= 1 << z or y >= 1 << z:
            raise Problem(404, f"zoom {z} has tiles 0 to {(1 << z) - 1}, the request is for {x}, {y}")
        # 1. the browser's copy may still be valid
        root = await asyncio.to_thread(self._index.root, name)
        shown = await in_reader(view, root)
        ended = shown.overview is None or shown.overview.mosaic is not None or layer == "imagery"
        identity = f"{__version__} {shown.version} {ended} {z} {x} {y} {layer} {image}"
        etag = f'"{hashlib.sha256(identity.encode()).hexdigest()[:20]}"'
        headers = {"Cache-Control": f"private, max-age={60 if ended else 5}", "ETag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)

        # 2. draw it in a thread
        def draw(stop: Event) -> bytes | None:
            return tile_png(shown, (z, x, y), layer, image=image, hosts=self._hosts, stop=stop)

        try:
            png = await drawn(request, draw, self._pool)
        except DataError as error:
            raise Problem(422, f"the tile cannot be drawn: {error}") from error
        if png is None:
            return Response(status_code=204, headers=headers)
        return Response(png, media_type="image/png", headers=headers)


def router(config: ServeConfig) -> APIRouter:
    """Routes of the runs."""
    routes, handlers = APIRouter(tags=["runs"]), _Handlers(config)
    routes.get("/v1/runs", responses=problems_of(503))(handlers.list_runs)
    routes.get("/v1/runs/{name}", responses=problems_of(404, 503))(handlers.one)
    tile = routes.get("/v1/runs/{name}/tiles/{z}/{x}/{y}.png", response_class=Response, responses=_TILE_RESPONSES)
    tile(handlers.tile)
    return routes
