"""What the page of a run shows on request: outlines in view, the value at a place, and which files the run has."""

import asyncio
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Response

from rayseg.engine import run as engine
from rayseg.errors import DataError
from rayseg.io import mapview
from rayseg.serve import runs
from rayseg.serve.openapi import problems_of
from rayseg.serve.problems import Problem
from rayseg.serve.runs import Name, RunIndex
from rayseg.serve.settings import ServeConfig
from rayseg.store import STORE_ERRORS, upath

if TYPE_CHECKING:
    import geopandas as gpd

MOST_SHAPES = 2000
"""Outlines in one answer, the largest ones."""
_UNREADABLE: tuple[type[Exception], ...] = (*STORE_ERRORS, ValueError)  # the latter of pyarrow
Degrees = Annotated[float, Query(ge=-1e9, le=1e9)]
Image = Annotated[str | None, Query(max_length=200, description="An image without georeference.")]


class _Handlers:
    """The handlers of the routes of one application."""

    def __init__(self, config: ServeConfig) -> None:
        self._index = RunIndex(config)

    async def shapes(
        self, name: Name, west: Degrees, south: Degrees, east: Degrees, north: Degrees, image: Image = None
    ) -> Response:
        """The polygons or plots in a box as GeoJSON, the largest ones; `more` counts those left out."""
        root = await asyncio.to_thread(self._index.root, name)
        try:
            text = await asyncio.to_thread(_shapes, root, (west, south, east, north), image)
        except DataError as error:
            raise Problem(422, str(error)) from error
        return Response(text, media_type="application/geo+json", headers={"Cache-Control": "private, no-cache"})

    async def value(self, name: Name, x: Degrees, y: Degrees, image: Image = None) -> dict[str, Any]:
        """Class and scores of the map at a place; x, y are longitude and latitude, or column and row of an image."""
        root = await asyncio.to_thread(self._index.root, name)
        try:
            return await runs.in_reader(_value, root, x, y, image)
        except DataError as error:
            raise Problem(422, "the map there is missing or damaged; run rayseg verify RUN") from error


def _value(root: str, x: float, y: float, image: str | None) -> dict[str, Any]:
    shown = runs.view(root)
    names = {value: text for value, text, _ in shown.table.classes} if shown.table else {}
    for at in shown.mapped((x, y, x, y), image) if shown.table else ():
        if found := mapview.values_at(shown.tiles[at], x, y):
            scores = {band: score / 254 for band, score in found[1].items()}
            return {"class": names.get(found[0], str(found[0])), "scores": scores, "tile": shown.tiles[at].tile.id}
    return {"class": None, "scores": {}, "tile": None}


def _shapes(root: str, bounds: tuple[float, float, float, float], image: str | None) -> str:
    path = _table_of(root, runs.version(root))
    if not path:
        return json.dumps({"type": "FeatureCollection", "features": [], "more": 0})
    try:
        frame, count = _largest(root, path, bounds, image)
    except _UNREADABLE as error:
        raise DataError(f"the outlines {path} are missing or damaged; run rayseg verify RUN") from error
    content: dict[str, Any] = json.loads(frame.drop(columns="bbox", errors="ignore").to_json(drop_id=True))
    return json.dumps(content | {"more": count - len(frame)})


def _largest(
    root: str, path: str, bounds: tuple[float, float, float, float], image: str | None
) -> "tuple[gpd.GeoDataFrame, int]":
    """(the largest outlines in a box, how many are in it).

    Boxes and sizes are read first, and then the geometry of the chosen rows: all outlines of a region need not fit into
    the memory.
    """
    import geopandas as gpd
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (upath(root) / path).open("rb") as stream:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        size = next((name for name in ("area_m2", "area_px", "pixels") if name in names), None)
        known = table.read(columns=[name for name in ("bbox", "image", size) if name in names])
        # 1. the rows in the box
        if image is not None:
            inside_N = np.array(known["image"].to_numpy() == image) if "image" in names else np.ones(len(known), bool)
        else:
            west, south, east, north = bounds
            boxes = known["bbox"].combine_chunks()
            xmin, ymin, xmax, ymax = (boxes.field(name).to_numpy() for name in ("xmin", "ymin", "xmax", "ymax"))
            inside_N = (xmin <= east) & (xmax >= west) & (ymin <= north) & (ymax >= south)
        rows_N = np.flatnonzero(inside_N)
        # 2. the largest of them
        if size:
            rows_N = rows_N[np.argsort(-known[size].to_numpy()[rows_N], kind="stable")]
        chosen_N = rows_N[:MOST_SHAPES]
        # 3. their geometry, of one part of the file at a time
        ends_P = np.cumsum([table.metadata.row_group(at).num_rows for at in range(table.num_row_groups)])
        begin, parts = 0, [table.schema_arrow.empty_table()]
        for part, end in enumerate(ends_P.tolist()):
            mine_N = np.sort(chosen_N[(chosen_N >= begin) & (chosen_N < end)])
            if len(mine_N):
                parts.append(table.read_row_group(part).take(mine_N - begin))
            begin = end
    frame = gpd.GeoDataFrame.from_arrow(pa.concat_tables(parts))
    return (frame.sort_values(size, ascending=False, kind="stable") if size else frame), len(rows_N)


@lru_cache(maxsize=64)
def _table_of(root: str, _version: str) -> str:
    """Name of the table of polygons or plots that a finished step of the run names; "" if there is none."""
    named = (str(step.get("polygons", "")) for step in engine.read(root).get("steps", {}).values())
    return next((name.rpartition("/")[2] for name in named if name.endswith(".parquet")), "")


def files_of(root: str) -> list[tuple[str, str]]:
    """(what it is, path) of the files of the run as a whole."""
    run = upath(root)
    named = [("report", "report/index.html"), ("QGIS project", "qgis/map.qgs"), ("items", "items.parquet")]
    named += [("collection", "collection.json"), ("outlines", _table_of(root, runs.version(root)))]
    return [(what, path) for what, path in named if path and (run / path).exists()]


def router(config: ServeConfig) -> APIRouter:
    """Routes of the details of runs."""
    routes, handlers = APIRouter(tags=["runs"]), _Handlers(config)
    base, wrong = "/v1/runs/{name}", problems_of(404, 422, 503)
    routes.get(f"{base}/shapes", responses=wrong, response_class=Response)(handlers.shapes)
    routes.get(f"{base}/value", responses=wrong)(handlers.value)

    @routes.get(f"{base}/layers", responses=wrong)
    async def layers(name: Name) -> dict[str, Any]:
        """Further layers and files of a run: the map tiles under it, whether it has scores and outlines, its files."""
        root = await asyncio.to_thread(handlers._index.root, name)
        shown = await runs.in_reader(runs.view, root)
        scored = bool(shown.tiles) and await asyncio.to_thread(mapview.has_scores, shown.tiles[0])
        files = await asyncio.to_thread(files_of, root)
        outlined = bool(_table_of(root, runs.version(root)))
        return {"basemap": config.basemap, "scores": scored, "outlines": outlined, "files": files}

    return routes
