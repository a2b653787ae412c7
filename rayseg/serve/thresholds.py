"""The threshold of a run's map of one class: how much of the map has which score, so that a page needs no request."""

import asyncio
from functools import lru_cache
from typing import Any

import numpy as np
from fastapi import APIRouter

from rayseg.errors import DataError
from rayseg.io.maps import bands_of, pixel_areas_m2, read_tile
from rayseg.serve import runs
from rayseg.serve.openapi import problems_of
from rayseg.serve.problems import Problem
from rayseg.serve.runs import Name, RunIndex
from rayseg.serve.settings import ServeConfig
from rayseg.steps import map as mapping

MOST = 64
"""Tiles whose scores are counted, spread over all."""


def scores_of(root: str) -> dict[str, Any]:
    """What decides a map of one class.

    Returns:
        `class`: its name; `own`: the threshold of the map, None if its model is gone; `shares`: of the mapped ground by
        score 0..254 (probability x 254); `tiles` that were counted, `of` all; `area_m2` of all, None without CRS.

    Raises:
        Problem: 404, the map is not of one class with a score; 422, its files cannot be read.
    """
    try:
        return _counted(root, runs.version(root))
    except DataError as error:
        raise Problem(422, str(error)) from error


@lru_cache(maxsize=8)
def _counted(root: str, _version: str) -> dict[str, Any]:
    shown = runs.view(root)
    table = shown.table
    if not table or not table.binary or len(bands_of(shown.tiles[0], "scores")) != 1:
        raise Problem(404, "the map is not of one class with a score, so it has no threshold")
    count = len(shown.tiles)
    chosen = [shown.tiles[at] for at in sorted({round(at) for at in np.linspace(0, count - 1, min(MOST, count))})]
    ground_S = np.zeros(256)
    for tile in chosen:
        scores_HW, areas_HW = read_tile(tile, "scores")[0], pixel_areas_m2(tile.tile)
        weights = None if areas_HW is None else areas_HW.ravel()
        ground_S += np.bincount(scores_HW.ravel(), weights=weights, minlength=256)
    areas = [tile.areas for tile in shown.tiles]
    whole = None if any(of is None for of in areas) else sum(sum((of or {}).values()) for of in areas)
    shares = ground_S[:255] / max(ground_S[:255].sum(), 1e-12)  # 255 is nodata
    own = mapping.threshold_of(root)
    return {
        "class": table.names[1],
        "own": own,
        "shares": [float(share) for share in shares],
        "tiles": len(chosen),
        "of": count,
        "area_m2": whole,
    }


def router(config: ServeConfig) -> APIRouter:
    """The route of the scores of runs."""
    routes, index = APIRouter(tags=["runs"]), RunIndex(config)

    @routes.get("/v1/runs/{name}/scores", responses=problems_of(404, 422, 503))
    async def scores(name: Name) -> dict[str, Any]:
        """How much of a map of one class has which score, and its threshold."""
        root = await asyncio.to_thread(index.root, name)
        return await runs.in_reader(scores_of, root)

    return routes
