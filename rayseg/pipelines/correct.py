"""correct: a finished map whose classes follow clicks, by a light head on the frozen features of the run's own model.

clicks --> features --> head on the model --> tiles --> polygons --> items, report
"""

import hashlib
from typing import Any

from rayseg.config import Config as Frozen
from rayseg.engine import run as runs
from rayseg.engine.run import Run, Step
from rayseg.errors import DataError
from rayseg.geo.region import Region
from rayseg.models import bundle
from rayseg.steps import correct, estimate, generalize, remap, report
from rayseg.steps import map as mapping
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.map import MapConfig
from rayseg.steps.numbers import counted
from rayseg.store import Location, upath
from rayseg.train.correction import CorrectionConfig

Plan = mapping.Plan[None]


class Config(Frozen):
    """Which run is corrected, and by which clicks."""

    run: Location
    """Prefix of a finished run with a map of classes by one model."""
    clicks: Location
    """File of points and short lines with a property `class`."""
    head: CorrectionConfig = CorrectionConfig()
    map: MapConfig = MapConfig()
    """By default as the run has it."""
    polygons: PolygonsConfig = PolygonsConfig()
    """By default as the run has them."""


def _clicks(config: Config) -> tuple[str, str]:
    """(path, checksum) of the file of clicks.

    Raises:
        DataError: it does not exist.
    """
    try:
        return config.clicks, hashlib.sha256(upath(config.clicks).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise DataError(f"there is no file of clicks {config.clicks}; give points with a property class") from None


def write_report(step: Step, predicted: Step, polygons: Step, clicks: Step, fitted: Step) -> dict[str, Any]:
    """The report, with the run that was corrected and how many clicks the map follows."""
    before, after = (f"{share:.0%}" for share in fitted.value["right"])
    made = counted(clicks.value["clicks"], "click")
    labels = (
        f"{fitted.value['run']} corrected by {made}: the model was right at {before} of them, and is now at {after}."
    )
    return report.write_report(step, predicted, polygons, extras=report.Extras(labels=labels))


def check(config: Config, region: Region) -> Plan:
    """Refuse a run without a model, and clicks that are not on its map, before anything is written."""
    base = correct.base_of(config.run)
    correct.clicks_for(config.run, config.clicks)
    bundle.whole(base)
    tiles = remap.tiles_of(config.run)
    generalize.expect_small(tiles, config.polygons)
    return Plan(tiles)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    return estimate.by_model(correct.base_of(config.run), plan, config.map)


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Correct a run's map; return the report's path and its headline."""
    # The run's own tiles, also where its catalogue has changed since.
    tiles = plan.tiles if plan else remap.tiles_of(config.run)
    origin = (config.run, runs.key_of(config.run, mapping.SCORED))
    model = run.step("model", mapping.load_model, correct.base_of(config.run))
    clicks = run.step("clicks", correct.list_clicks, origin, *_clicks(config))
    embedded = run.step("features", correct.embed, config.run, model, clicks, config.map)
    fitted = run.step("head", correct.fit, model, clicks, embedded, config.run, config.head)
    predicted = run.step("predict", mapping.predict_region, region, fitted, config.map, tiles=tiles)
    shown = generalize.generalized(run, predicted, config.polygons, region)
    polygons = run.step("polygons", mapping.join_polygons, shown, "polygons")
    run.step("publish", mapping.publish, predicted, f"{region.name}, corrected from {config.run}")
    run.step("qgis", mapping.save_project, predicted, polygons)
    written = run.step("report", write_report, predicted, polygons, clicks, fitted)
    return report.headline(written)
