"""Clicks on the map of a run: appended to a file next to it, one line each; nothing of the run changes.

Several people may click at once: a line is written by one call at the end of the file. A click is taken back by a line
that names it.
"""

import asyncio
import errno
import hashlib
import json
import os
import uuid
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
import shapely
from fastapi import APIRouter, Body, Path, Query, Request, Response
from pydantic import Field

from rayseg.config import Config
from rayseg.engine.run import read
from rayseg.errors import ConfigError, DataError, ModelError
from rayseg.io import clicks as files
from rayseg.io.clicks import identity, kept, read_features
from rayseg.io.pictures import shown_colors
from rayseg.serve import answers, runs
from rayseg.serve.models import Backend
from rayseg.serve.openapi import problems_of
from rayseg.serve.problems import Problem, busy
from rayseg.serve.runs import Index, Name, RunIndex, Zoom
from rayseg.serve.settings import ServeConfig
from rayseg.vision.color import ClassTable

MOST_BYTES = 16 << 20
"""Of the clicks on a run."""
FOLLOW_SECONDS = 60.0
"""Time limit of a tile that follows clicks: the first one of a run computes features."""
Degrees = Annotated[float, Field(ge=-1e9, le=1e9)]


class Click(Config):
    """A click, or a stroke through several places."""

    label: Annotated[str, Field(max_length=200)]
    """Name of the class that is right there."""
    coordinates: Annotated[tuple[tuple[Degrees, Degrees], ...], Field(min_length=1, max_length=500)]
    """(longitude, latitude) of each place; of an image without georeference its (column, row)."""
    image: Annotated[str, Field(max_length=200)] | None = None
    """Name of an image without georeference."""
    name: Annotated[str, Field(max_length=100)] = ""
    """Who clicks."""


class _Handlers:
    """The handlers of the routes of one application."""

    def __init__(self, config: ServeConfig, backend: Backend) -> None:
        self._index, self._folder, self._backend = RunIndex(config), config.clicks, backend
        self._paths = config.paths

    def _file(self, name: str) -> FilePath:
        """The file of a run's clicks.

        Raises:
            Problem: 403, the server keeps no clicks.
        """
        if not self._folder:
            raise Problem(403, "this server keeps no clicks; the administrator can set --set clicks=FOLDER")
        return FilePath(self._folder) / f"{name}.clicks.geojsonl"

    def _found(self, name: str) -> tuple[str, FilePath, ClassTable]:
        """(prefix, file of clicks, classes) of a run.

        Raises:
            Problem: 403, 404; 409, nothing is mapped, or not by a single model.
        """
        root, path = self._index.root(name), self._file(name)
        table = runs.view(root).table
        if table is None:
            raise Problem(409, f"run {name} has no map of classes yet; click when it has one")
        # steps.remap knows more, and imports PyTorch.
        if not read(root).get("steps", {}).get("predict", {}).get("bundle"):
            raise Problem(409, f"no single model made the map of run {name}, so that none can follow clicks")
        return root, path, table

    async def listed(self, name: Name) -> dict[str, Any]:
        """The clicks on a run that count, as GeoJSON, and the file that keeps them."""
        return await asyncio.to_thread(self._listed, name)

    def _listed(self, name: str) -> dict[str, Any]:
        _, path, _ = self._found(name)
        features = kept(read_features(path)) if path.exists() else []
        return {"type": "FeatureCollection", "features": features, "file": str(path) if self._paths else path.name}

    async def add(self, name: Name, click: Annotated[Click, Body()]) -> dict[str, str]:
        """Append a click or stroke with the class that is right there."""
        return {"id": await asyncio.to_thread(self._add, name, click)}

    def _add(self, name: str, click: Click) -> str:
        root, path, table = self._found(name)
        if click.label not in table.names:
            raise Problem(422, f"label is {click.label!r}, the classes are {', '.join(table.names)}; choose one")
        points = [list(place) for place in click.coordinates]
        single = len(points) == 1
        geometry = {"type": "Point" if single else "LineString", "coordinates": points[0] if single else points}
        properties = {"class": click.label, "run": identity(root), **_signed(click.name)}
        properties |= {"image": click.image} if click.image else {}
        number = path.read_bytes().count(b"\n") + 1 if path.is_file() else 1
        try:
            # A click that `rayseg correct` refuses would stop every preview, too.
            clicked = [files.Click(shapely.from_geojson(json.dumps(geometry)), properties, number)]
            tiles = runs.view(root).tiles
            files.expect_inside(clicked, tiles)
            files.placed(clicked, tiles, table)
        except DataError as error:
            raise Problem(422, str(error)) from error
        _append(path, {"type": "Feature", "geometry": geometry, "properties": properties})
        return str(properties["id"])

    async def undo(
        self, name: Name, click: Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Id of the click.")]
    ) -> dict[str, str]:
        """Take a click back; both lines stay in the file."""
        return {"id": await asyncio.to_thread(self._undo, name, click)}

    def _undo(self, name: str, click: str) -> str:
        _, path, _ = self._found(name)
        features = kept(read_features(path)) if path.exists() else []
        if click not in {feature["properties"].get("id") for feature in features}:
            raise Problem(404, f"there is no click {click}; GET the clicks for their ids")
        _append(path, {"type": "Feature", "geometry": None, "properties": {**_signed(""), "undo": click}})
        return click

    async def tile(
        self,
        request: Request,
        name: Name,
        z: Zoom,
        x: Index,
        y: Index,
        image: Annotated[str | None, Query(max_length=200, description="An image without georeference.")] = None,
    ) -> Response:
        """A map tile whose classes follow the clicks; 204 where it is over too many patches of the model, or none."""
        root, path, table = await runs.in_reader(self._found, name)
        # 1. the browser's copy may still be valid
        files = await asyncio.to_thread(runs.version, root)
        state = await asyncio.to_thread(_state, path)
        etag = f'"{hashlib.sha256(f"{files} {state} {z} {x} {y} {image}".encode()).hexdigest()[:20]}"'
        headers = {"Cache-Control": "private, no-cache", "ETag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if not state:
            return Response(status_code=204, headers=headers)
        # 2. features, head and classes, where the models run
        try:
            async with asyncio.timeout(FOLLOW_SECONDS):
                classes_HW = await self._backend.follow(root, files, str(path), (z, x, y), image)
        except TimeoutError:
            raise busy("the features of this place take longer; retry in a moment", seconds=5) from None
        except (ConfigError, DataError, ModelError) as error:
            raise Problem(422, f"the map cannot follow the clicks: {error}") from error
        if classes_HW is None or (classes_HW == answers.NODATA).all():
            return Response(status_code=204, headers=headers)
        png = await asyncio.to_thread(_png, classes_HW, table)
        return Response(png, media_type="image/png", headers=headers)


def _png(classes_HW: np.ndarray, table: ClassTable) -> bytes:
    colors = {value: color for value, _, color in table.classes}
    return answers.palette_png(classes_HW, colors, opaque=set(shown_colors(table)))


def _state(path: FilePath) -> str:
    """What changes with every line of a file; "" if there is none, or no click is left."""
    if not path.exists():
        return ""
    found = path.stat()
    state = f"{found.st_mtime_ns} {found.st_size}"
    return state if _has_clicks(path, state) else ""


@lru_cache(maxsize=64)  # every tile in view asks, and a file can have 16 MiB
def _has_clicks(path: FilePath, _state: str) -> bool:
    return bool(kept(read_features(path)))


def _signed(name: str) -> dict[str, str]:
    """A new id, the time, and who clicks."""
    made = {"id": uuid.uuid4().hex, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    return made | ({"name": name} if name else {})


def _append(path: FilePath, feature: dict[str, Any]) -> None:
    """Append a line to a file, by one call.

    Raises:
        Problem: 409, the file cannot be written, or is full.
    """
    line = json.dumps(feature).encode() + b"\n"
    try:
        # O_APPEND: lines of several processes follow each other.
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size + len(line) > MOST_BYTES:
                raise Problem(409, f"{path.name} has {MOST_BYTES:,} bytes; correct the run, and click on the new one")
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # a line that was cut off would take this one with it
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise Problem(409, f"clicks cannot be written: {error.strerror}; set clicks to a folder that can") from None


def router(config: ServeConfig, backend: Backend) -> APIRouter:
    """Routes of the clicks."""
    routes, handlers = APIRouter(tags=["clicks"]), _Handlers(config, backend)
    base, wrong = "/v1/runs/{name}/clicks", problems_of(403, 404, 409, 422, 503)
    routes.get(base, responses=wrong)(handlers.listed)
    routes.post(base, status_code=201, responses=wrong)(handlers.add)
    routes.delete(f"{base}/{{click}}", responses=wrong)(handlers.undo)
    pictures: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": {}}},
        204: {"description": "The tile does not follow clicks."},
        304: {"description": "The tile is the one that If-None-Match names."},
    }
    tile = routes.get(f"{base}/tiles/{{z}}/{{x}}/{{y}}.png", response_class=Response, responses=pictures | wrong)
    tile(handlers.tile)
    return routes
