"""predict: a trained model over a region, a catalogue or a folder of images.

segmenter + imagery --> tiles --> polygons --> items, report
classifier + imagery --> images, tiles or polygons --> table of classes, report
"""

from rayseg.config import Config as Frozen
from rayseg.config import added
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError, ModelError
from rayseg.geo.region import Region
from rayseg.models import bundle
from rayseg.steps import classify, estimate, generalize, report
from rayseg.steps import map as mapping
from rayseg.steps.certificate import certify
from rayseg.steps.classify import UnitsConfig
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.map import MapConfig
from rayseg.store import Location

Plan = mapping.Plan[None]


class Config(Frozen):
    """Which model predicts, and how."""

    model: Location
    """Prefix of the bundle."""
    map: MapConfig = MapConfig()
    polygons: PolygonsConfig = added(default=PolygonsConfig())
    units: UnitsConfig = added(default=UnitsConfig())
    """Of a classifier: what it classifies."""
    certificate: bool = added(default=True)
    """Of a segmenter: whether the map's stability is measured at the end, on a sample of its own tiles."""
    earlier: Location | None = added(default=None)
    """Run whose tiles are taken over where neither their imagery nor the model has changed (`rayseg refresh`)."""


def check(config: Config, region: Region) -> Plan:
    """Plan a run; refuse an incomplete model, and imagery that it cannot map, before anything is written."""
    described, _ = bundle.whole(config.model)
    if described.task == "classification":
        if config.earlier:
            raise ModelError(
                f"model {described.name} is for classification, {config.earlier} is a map; give a segmenter"
            )
        return Plan(classify.plan_units(region, described, config.units, config.map))
    if config.units != UnitsConfig():
        raise ConfigError(f"model {described.name} is for {described.task}, units are of classifiers; leave units out")
    tiles = mapping.tiles_for(region, described, config.map)
    generalize.expect_small(tiles, config.polygons)
    return Plan(tiles)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    if bundle.description(config.model).task == "classification":
        return estimate.Forecast([], unknown=(f"the classification of {len(plan.tiles or ()):,} units",))
    return estimate.by_model(config.model, plan, config.map)


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Map or classify `region` with a trained model; return the report's path and its headline."""
    tiles = plan.tiles if plan else None
    # A step of its own: a model that is trained again under the same name gives other keys.
    model = run.step("model", mapping.load_model, config.model)
    if model.value.get("task") == "classification":
        units = config.units
        classified = run.step("classify", classify.classify_units, region, model, units, config.map, rows=tiles)
        table = run.step("classes", classify.write_classes, classified)
        written = run.step("report", classify.write_report, classified, table, units)
        return f"{run.root}/report/index.html: {written.value['summary']}"
    predicted = run.step(
        "predict", mapping.predict_region, region, model, config.map, tiles=tiles, earlier=config.earlier
    )
    shown = generalize.generalized(run, predicted, config.polygons, region)
    polygons = run.step("polygons", mapping.join_polygons, shown, "polygons")
    run.step("publish", mapping.publish, predicted, f"{region.name} by {config.model}")
    run.step("qgis", mapping.save_project, predicted, polygons)
    certified = run.step("certificate", certify, predicted, region) if config.certificate else None
    extras = report.Extras(labels=_carried(predicted, config.earlier)) if config.earlier else None
    shown_too = [None, extras] if extras else []
    written = run.step("report", report.write_report, predicted, polygons, *shown_too, certified=certified)
    return report.headline(written, extras.labels if extras else "")


def _carried(predicted: Step, earlier: str) -> str:
    counts = predicted.value["account"]
    return f"{predicted.value['carried']:,} of {sum(counts.values()):,} tiles are those of {earlier}."
