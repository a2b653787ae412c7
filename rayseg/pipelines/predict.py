"""predict: a trained model over a region, a catalogue or a folder of images.

model + imagery --> tiles --> polygons --> items, report
"""

from rayseg.config import Config as Frozen
from rayseg.engine.run import Run
from rayseg.geo.region import Region
from rayseg.models import bundle
from rayseg.steps import estimate, report
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.store import Location

Plan = mapping.Plan[None]


class Config(Frozen):
    """Which model predicts, and how."""

    model: Location
    """Prefix of the bundle."""
    map: MapConfig = MapConfig()


def check(config: Config, region: Region) -> Plan:
    """Plan a run; refuse an incomplete model, and imagery that it cannot map, before anything is written."""
    described, _ = bundle.whole(config.model)
    return Plan(mapping.tiles_for(region, described, config.map))


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    return estimate.by_model(config.model, plan, config.map)


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Map `region` with a trained model; return the report's path and its headline."""
    tiles = plan.tiles if plan else None
    model = run.step("model", mapping.load_model, config.model)
    predicted = run.step("predict", mapping.predict_region, region, model, config.map, tiles=tiles)
    polygons = run.step("polygons", mapping.join_polygons, predicted, "polygons")
    run.step("publish", mapping.publish, predicted, f"{region.name} by {config.model}")
    written = run.step("report", report.write_report, predicted, polygons)
    return report.headline(written)
