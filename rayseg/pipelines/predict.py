"""predict: a model that is there already over a region, a catalogue or a folder of images.

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


class Config(Frozen):
    """What to predict with, and how."""

    model: Location
    """Prefix of the bundle."""
    map: MapConfig = MapConfig()


def check(config: Config, region: Region) -> None:
    """Refuse, before anything is written, a model that is not whole and imagery that it cannot map."""
    described, _ = bundle.whole(config.model)
    mapping.plan(region, described, config.map)


def forecast(config: Config, region: Region) -> estimate.Forecast:
    """What is known of a run before it is begun."""
    return estimate.by_model(config.model, region, config.map)


def run(config: Config, run: Run, region: Region) -> str:
    """Map `region` with a trained model; return where the report is and what it says in one line."""
    model = run.step("model", mapping.load_model, config.model)
    predicted = run.step("predict", mapping.predict_region, region, model, config.map)
    polygons = run.step("polygons", mapping.join_polygons, predicted, "polygons")
    run.step("publish", mapping.publish, predicted, f"{region.name} by {config.model}")
    written = run.step("report", report.write_report, predicted, polygons)
    return report.headline(written)
