"""Runs to look at: what they say of themselves, their ledger, and their map as web tiles."""

import asyncio
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
from fastapi import APIRouter, Path, Query, Response

from rayseg.engine import run as runs
from rayseg.errors import DataError, RaysegError
from rayseg.geo.grid import Tile, Window, slug
from rayseg.io import mapview, masks
from rayseg.io.maps import MappedTile, mapped_tiles, planned_tiles
from rayseg.io.pictures import shown_colors
from rayseg.io.sources import Source
from rayseg.serve import answers
from rayseg.serve.forms import problems_of
from rayseg.serve.problems import Refused
from rayseg.serve.settings import ServeConfig
from rayseg.steps import report
from rayseg.store import StorePath, upath
from rayseg.vision.color import ClassTable

_FRESH = 5.0  # seconds for which a run that may be going on is not looked at again
_MOST_TROUBLES = 500
_TILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}},
    204: {"description": "Nothing is there."},
    **problems_of(404, 422, 503),
}
Name = Annotated[str, Path(max_length=200)]
Zoom = Annotated[int, Path(ge=0, le=24)]
Place = Annotated[int, Path(ge=0, lt=1 << 24)]


@dataclass(frozen=True, eq=False)
class View:
    """A run as it is looked at.

    Attributes:
        root: its prefix.
        tiles: those with a map.
        planned: every tile, and the imagery it shows.
        bounds_N4: (west, south, east, north) of each of `tiles`, NaN without CRS.
        planned_N4: the same of each of `planned`.
        table: the classes; None while nothing is mapped.
        step: that made the map.
    """

    root: str
    tiles: tuple[MappedTile, ...]
    planned: tuple[tuple[Tile, tuple[Source, ...]], ...]
    bounds_N4: np.ndarray
    planned_N4: np.ndarray
    table: ClassTable | None
    step: str

    def mapped(self, bounds: mapview.Bounds, image: str | None) -> list[MappedTile]:
        """The tiles that meet (west, south, east, north), or those of an image without CRS."""
        if image is not None:
            return [tile for tile in self.tiles if _of_image(tile.tile, image)]
        return [self.tiles[at] for at in _meeting(self.bounds_N4, bounds)]

    def sources(self, bounds: mapview.Bounds, image: str | None) -> list[Source]:
        """The imagery of all tiles that meet (west, south, east, north), or an image without CRS."""
        if image is not None:
            near = [sources for tile, sources in self.planned if _of_image(tile, image)]
        else:
            near = [self.planned[at][1] for at in _meeting(self.planned_N4, bounds)]
        found = {source.item_id: source for sources in near for source in sources}
        return [source for name, source in found.items() if image in {None, name}]


def _of_image(tile: Tile, image: str) -> bool:
    return tile.grid.crs is None and tile.grid.image == image


def _meeting(own: np.ndarray, bounds: mapview.Bounds) -> np.ndarray:
    west, south, east, north = bounds
    return np.flatnonzero((own[:, 0] < east) & (own[:, 2] > west) & (own[:, 1] < north) & (own[:, 3] > south))


def found(prefixes: Sequence[StorePath]) -> dict[str, str]:
    """Name -> prefix of the runs at, directly below, or directly above some prefixes (`RUN/models` names RUN)."""
    prefixes_by_name: dict[str, str] = {}
    for prefix in map(upath, prefixes):
        beside = [path.parent for path in sorted(prefix.glob("*/run.json"))] if prefix.is_dir() else []
        for folder in (prefix, prefix.parent, *beside):
            if (folder / "run.json").exists() and str(folder) not in prefixes_by_name.values():
                name, number = slug(folder.name), 2
                while name in prefixes_by_name:
                    name, number = f"{slug(folder.name)}-{number}", number + 1
                prefixes_by_name[name] = str(folder)
    return prefixes_by_name


def _listed(there: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Name and pipeline of the runs whose run.json can be read; the others are shown when they are asked for."""
    for name, root in there.items():
        with suppress(RaysegError, ValueError):
            yield {"name": name, "pipeline": runs.read(root)["pipeline"]}


def view(root: str) -> View:
    """The map of a run as far as it is there; looked at again after some seconds."""
    return _view(root, int(time.monotonic() / _FRESH))


@lru_cache(maxsize=8)
def _view(root: str, _moment: int) -> View:
    for step in _steps(root):
        tiles = tuple(mapped_tiles(root, step))
        if tiles and upath(tiles[0].href).exists():
            planned = tuple(planned_tiles(root, step))
            bounds = _bounds([one.tile for one in tiles]), _bounds([tile for tile, _ in planned])
            return View(root, tiles, planned, *bounds, masks.table_of(tiles[0].href), step)
    return View(root, (), (), np.empty((0, 4)), np.empty((0, 4)), None, "")


def _steps(root: str) -> list[str]:
    """Steps with a manifest, the usual one first."""
    names = [path.parent.name for path in upath(root).glob("steps/*/manifest.parquet")]
    return sorted(names, key=lambda name: (name != "predict", name))


def _bounds(tiles: Sequence[Tile]) -> np.ndarray:
    """(west, south, east, north) of each, NaN without CRS."""
    return np.array([mapview.lonlat_bounds(one.grid, one.window) if one.grid.crs else (np.nan,) * 4 for one in tiles])


def describe(name: str, root: str) -> dict[str, Any]:
    """What the page shows of a run besides its tiles."""
    asked, state, shown = runs.read(root), runs.status(root), view(root)
    shares = report.class_shares(shown.tiles, shown.table) if shown.table else []
    values = shown.table.values if shown.table else ()
    placed = shown.planned_N4[~np.isnan(shown.planned_N4).any(axis=1)]
    return {
        "name": name,
        "pipeline": asked["pipeline"],
        "region": asked["region"]["name"].rpartition("/")[2],
        "status": state["status"],
        "reason": state["reason"],
        "bounds": [*placed[:, :2].min(axis=0), *placed[:, 2:].max(axis=0)] if len(placed) else None,
        "images": _images(shown.planned),
        "classes": [{"value": value, **row} for value, row in zip(values, shares, strict=True)],
        "ledger": {step: {"planned": one["planned"], "counts": one["counts"]} for step, one in state["steps"].items()},
        "troubles": _troubles(root, state["steps"]),
    }


def _images(tiles: Sequence[tuple[Tile, Sequence[Source]]]) -> list[dict[str, Any]]:
    """Images without CRS, with their sizes."""
    sizes: dict[str, tuple[int, int]] = {}
    for tile, sources in tiles:
        if tile.grid.crs is None and tile.grid.image and (size := _size(sources, tile.grid.image)):
            sizes[tile.grid.image] = size
    return [{"id": name, "width": width, "height": height} for name, (width, height) in sizes.items()]


def _size(sources: Sequence[Source], image: str) -> tuple[int, int] | None:
    """(width, height) of an image; None for one that could not be opened."""
    return next(((source.width, source.height) for source in sources if source.item_id == image), None)


def _troubles(root: str, steps: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that are not settled, with their place on Earth where they have one."""
    rows = []
    for step, account in steps.items():
        places = _places(root, step, set(account["troubles"]))
        for row, reason in list(account["troubles"].items())[:_MOST_TROUBLES]:
            rows.append({"step": step, "id": row, "reason": reason, **places.get(row, {})})
    return rows


def _places(root: str, step: str, ids: set[str]) -> dict[str, dict[str, Any]]:
    if not ids:
        return {}
    with (upath(root) / "steps" / step / "manifest.parquet").open("rb") as file:
        rows = pq.read_table(file).to_pylist()
    places: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row["id"] in ids and row.get("width")):
        tile = Tile.from_row(row)
        if tile.grid.crs:
            places[tile.id] = {"bounds": mapview.lonlat_bounds(tile.grid, tile.window)}
        else:
            window = tile.window
            places[tile.id] = {"image": tile.grid.image, "box": [window.col, window.row, window.col1, window.row1]}
    return places


def tile_png(
    shown: View, place: tuple[int, int, int], layer: str, *, image: str | None, hosts: Sequence[str]
) -> bytes | None:
    """A web tile (z, x, y) of a run as PNG; None where there is nothing."""
    bounds = mapview.bounds_of_tile(*place)
    sources = shown.sources(bounds, image)
    size = _size(sources, image) if image is not None else None
    if not sources or shown.table is None or (image is not None and size is None):
        return None
    whole = Window(0, 0, *size) if size else None
    if layer == "imagery":
        imagery_HWC = mapview.imagery_tile(sources, *place, image=whole, hosts=hosts)
        return _rgba_png(imagery_HWC)
    if not (tiles := shown.mapped(bounds, image)):
        return None
    classes_HW = mapview.classes_tile(tiles, *place, image=whole)
    colors = {value: color for value, _, color in shown.table.classes}
    return answers.palette_png(classes_HW, colors, opaque=set(shown_colors(shown.table)))


def _rgba_png(image_HWC: np.ndarray) -> bytes:
    sink = io.BytesIO()
    PIL.Image.fromarray(image_HWC).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def router(config: ServeConfig) -> APIRouter:
    """Routes of the runs."""
    routes = APIRouter(tags=["runs"])

    def known() -> dict[str, str]:
        return found([*config.runs, *config.models, *([config.jobs] if config.jobs else [])])

    async def looked_up(name: str) -> str:
        there = await asyncio.to_thread(known)
        if name not in there:
            raise Refused(404, f"there is no run {name!r}; those shown are: {', '.join(list(there)[:10]) or 'none'}")
        return there[name]

    @routes.get("/v1/runs", responses=problems_of(503))
    async def runs() -> dict[str, list[dict[str, Any]]]:
        """The runs that can be looked at."""
        return {"runs": await asyncio.to_thread(lambda: [*_listed(known())])}

    @routes.get("/v1/runs/{name}", responses=problems_of(404, 503))
    async def one(name: Name) -> dict[str, Any]:
        """A run: classes and what they cover, ledger, what failed and where."""
        root = await looked_up(name)
        return await asyncio.to_thread(describe, name, root)

    @routes.get(
        "/v1/runs/{name}/tiles/{z}/{x}/{y}.png",
        response_class=Response,
        responses=_TILE,
    )
    async def tile(
        name: Name,
        z: Zoom,
        x: Place,
        y: Place,
        layer: Annotated[Literal["classes", "imagery"], Query(description="What to draw.")] = "classes",
        image: Annotated[str | None, Query(max_length=200, description="An image without georeference.")] = None,
    ) -> Response:
        """A map tile of 256 px: of the web's Mercator grid, or of the pyramid of an image without georeference."""
        if x >= 1 << z or y >= 1 << z:
            raise Refused(404, f"zoom {z} has tiles 0 to {(1 << z) - 1}, asked for was {x}, {y}")
        shown = await asyncio.to_thread(view, await looked_up(name))
        try:
            drawn = await asyncio.to_thread(tile_png, shown, (z, x, y), layer, image=image, hosts=config.imagery_hosts)
        except DataError as error:
            raise Refused(422, f"the tile cannot be drawn: {error}") from error
        if drawn is None:
            return Response(status_code=204)
        return Response(drawn, media_type="image/png", headers={"Cache-Control": "private, max-age=60"})

    return routes
