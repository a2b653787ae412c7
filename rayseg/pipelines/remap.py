"""remap: another threshold, other classes or another area for a finished map, from the scores that it kept.

classes and scores of a run --> decided again --> polygons --> items, report
"""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from rayseg.config import Config as Frozen
from rayseg.config import added
from rayseg.engine import run as runs
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError
from rayseg.geo.region import Area, Region
from rayseg.steps import estimate, generalize, remap, report
from rayseg.steps import map as mapping
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.remap import ClassRules, RefineConfig
from rayseg.store import Location

Plan = mapping.Plan[None]


class Config(Frozen):
    """What is decided again, and from which run."""

    run: Location
    """Prefix of a finished run with a map of classes."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability above which a pixel gets the one class of a binary map; by default the run's own."""
    classes: ClassRules = ClassRules()
    """Classes that are merged or left out."""
    inside: Area | None = None
    """File of polygons, or west,south,east,north: pixels outside become nodata."""
    refine: RefineConfig | None = added(default=None)
    """Segments of the imagery, which is read again: every segment gets one class."""
    polygons: PolygonsConfig = PolygonsConfig()
    """By default as the run has them."""
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Timeout for deciding or writing one tile; the tile is then recorded as failed."""


def write_report(
    step: Step, predicted: Step, polygons: Step, *, threshold: float | None = None, segments: str = ""
) -> dict[str, Any]:
    """The report, with the run that the map is made from, its threshold next to that of its model, and its segments."""
    origin = predicted.value["run"]
    labels = f"Decided again from the scores of {origin}."
    if threshold is not None:
        own = mapping.threshold_of(origin)
        labels += f" A pixel has the class above {threshold:g}" + (f"; there it is above {own:g}." if own else ".")
    if segments:
        labels += f" Each segment of the imagery ({segments}) has one class."
    return report.write_report(step, predicted, polygons, extras=report.Extras(labels=labels))


def check(config: Config, region: Region) -> Plan:
    """Refuse a run without the scores that the settings need, before anything is written."""
    origin = remap.origin_of(config.run)
    decision = remap.decision_of(origin, config.classes, config.threshold)
    if config.refine:
        remap.refining(origin, decision, config.refine, region)
    remap.expect_inside(config.run, remap.area_inside(region, config.inside), config.inside)
    same = (None, ClassRules(), None, None, PolygonsConfig(**remap.polygons_of(config.run)))
    if (config.threshold, config.classes, config.inside, config.refine, config.polygons) == same:
        raise ConfigError(
            "nothing is to change; give --set threshold, classes.merge, classes.drop, inside, refine or polygons"
        )
    tiles = remap.tiles_of(config.run)
    generalize.expect_small(tiles, config.polygons)
    return Plan(tiles)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    return estimate.Forecast(plan.tiles or [], unknown=("the time, which is that of writing the tiles",))


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Decide a run's map again; return the report's path and its headline."""
    origin = (config.run, runs.key_of(config.run, mapping.SCORED))
    settings: tuple[Any, ...] = (config.classes, config.threshold, config.inside, config.stall_seconds)
    settings += (config.refine,) if config.refine else ()
    tiles = plan.tiles if plan else None
    predicted = run.step("predict", remap.reclassify_tiles, region, origin, *settings, tiles=tiles)
    inside = replace(region, geometry=remap.area_inside(region, config.inside))
    shown = generalize.generalized(run, predicted, config.polygons, inside)
    polygons = run.step("polygons", mapping.join_polygons, shown, "polygons")
    run.step("publish", mapping.publish, predicted, f"{region.name}, from {config.run}")
    run.step("qgis", mapping.save_project, predicted, polygons)
    more = {"segments": config.refine.proposer} if config.refine else {}
    written = run.step("report", write_report, predicted, polygons, threshold=config.threshold, **more)
    return report.headline(written)
