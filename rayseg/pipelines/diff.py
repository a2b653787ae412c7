"""diff: which class became which between two runs, as a map, as polygons and in hectares.

classes of two runs --> compared on one grid --> polygons of the changes --> items, report
"""

import logging
from typing import Annotated, Any

from pydantic import Field

from rayseg.config import Config as Frozen
from rayseg.engine import run as runs
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError
from rayseg.geo.region import Region
from rayseg.steps import diff, estimate, generalize, report
from rayseg.steps import map as mapping
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.remap import origin_of
from rayseg.store import Location

Plan = mapping.Plan[None]
_log = logging.getLogger(__name__)


class Config(Frozen):
    """Which runs are compared, and how."""

    before: Location
    """Prefix of a finished run with a map of classes."""
    after: Location
    """Prefix of the run that it is compared with."""
    tile: Annotated[int, Field(gt=0)] = 2048
    """Side in px of the tiles of the comparison."""
    polygons: PolygonsConfig = PolygonsConfig()
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Timeout for comparing or writing one tile; the tile is then recorded as failed."""


def check(config: Config, region: Region) -> Plan:
    """Refuse runs that cannot be compared, before anything is written."""
    if config.before == config.after:
        raise ConfigError(f"both runs are {config.before}, expected two; name another one")
    before, after = origin_of(config.before), origin_of(config.after)
    diff.changes_of(before.table, after.table)
    diff.expect_comparable(config.before, config.after)
    for sentence in filter(None, (diff.unmapped(root) for root in (config.before, config.after))):
        _log.warning(sentence)
    tiles = diff.list_tiles(config.before, config.after, size=config.tile)
    generalize.expect_small(tiles, config.polygons)
    return Plan(tiles)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    return estimate.Forecast(plan.tiles or [], unknown=("the time, which is that of writing the tiles",))


def write_report(step: Step, compared: Step, polygons: Step, before: str, after: str) -> dict[str, Any]:
    """The report, with the runs that were compared."""
    labels = f"Compared: {before} and then {after}. The polygons are those of the changes."
    labels = " ".join(filter(None, [labels, *(diff.unmapped(root) for root in (before, after))]))
    return report.write_report(step, compared, polygons, extras=report.Extras(labels=labels))


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Compare two runs; return the report's path and its headline."""
    maps = (config.before, config.after)
    keys = tuple(runs.key_of(root, "predict") for root in maps)
    compared = run.step("predict", diff.compare_tiles, region, maps, keys, config.tile, config.stall_seconds)
    shown = generalize.generalized(run, compared, config.polygons, region)
    polygons = run.step("polygons", mapping.join_polygons, shown, "changes")
    run.step("publish", mapping.publish, compared, f"{config.before} and {config.after}")
    run.step("qgis", mapping.save_project, compared, polygons)
    written = run.step("report", write_report, compared, polygons, *maps)
    return report.headline(written)
