"""landcover: one of several classes for every pixel of a region, learnt from scenes with masks (DeepGlobe 2018).

    labelled scenes --> split by scene --> DeepLabv3+, best epoch by mean IoU --> bundle
    bundle --> validation scenes measured
    simple methods on the same scenes --> measured next to it
    bundle + region --> class map at full resolution --> polygons, items, report

The modules of the steps explain the rest; `configs/landcover/paper.yaml` has the settings of the prototype.
"""

from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator

from rayseg.config import Bands, Workers, added
from rayseg.config import Config as Frozen
from rayseg.engine import cluster
from rayseg.engine.run import Run, Step
from rayseg.geo.region import Region
from rayseg.io.class_tables import Classes
from rayseg.io.maps import mean_metres
from rayseg.io.sources import Source
from rayseg.io.units import units_of
from rayseg.models.bundle import Bundle, Scaling
from rayseg.steps import baseline, estimate, evaluate, generalize, labelled, models, report, simple_maps
from rayseg.steps import map as mapping
from rayseg.steps.certificate import certify
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.labelled import PARTS, Divided, LabelledConfig
from rayseg.steps.map import MapConfig
from rayseg.steps.numbers import counted
from rayseg.steps.validate import compare_images, tiles_of
from rayseg.store import Location
from rayseg.train import supervised, windows
from rayseg.train.learning import trained
from rayseg.train.supervised import Labelled, SupervisedConfig

Plan = mapping.Plan[Divided]
PRODUCT = "landcover"


class Config(Frozen):
    """Settings of the pipeline."""

    labelled: LabelledConfig = LabelledConfig()
    classes: Classes = Classes.model_validate("deepglobe")
    """The classes of the masks: a YAML file, its name under configs/classes, or its content."""
    segmenter: SupervisedConfig = SupervisedConfig()
    map: MapConfig = MapConfig()
    polygons: PolygonsConfig = added(default=PolygonsConfig())
    bands: Bands = models.RGB
    """Bands of the imagery, in the order of the network's input."""
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 1024
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 768
    """Distance of these windows in px; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train. 0 or auto: on a cluster one per GPU, else one; locally the command's own process."""
    scaling: Scaling = Field(default_factory=models.scaling_of)
    """From the imagery's values to the network's input; by default what the encoder's weights expect of uint8."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""
    certificate: bool = added(default=True)
    """Whether the map's stability is measured at the end, on a sample of its own tiles (docs/certificate.md)."""
    baseline: bool = added(default=True)
    """Whether the report shows simple methods next to the segmenter, learnt and measured on the same scenes."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        reduce = self.segmenter.reduce
        models.expect_windows(self.bands, self.scaling, patch=self.patch, stride=self.stride, reduce=reduce)
        return self


def _divide(region: Region, config: Config) -> Divided:
    cell, table = config.segmenter.sampling.cell, config.classes.table
    return labelled.divide(region, config.labelled, table, cell=cell, bands=config.bands, scaling=config.scaling)


def list_scenes(step: Step, region: Region, config: Config, *, divided: Divided | None = None) -> dict[str, Any]:
    """List the labelled images of both parts; later steps read `<step>/images.parquet`."""
    counts = labelled.write_images(step, divided or _divide(region, config))
    return counts | {"origins": labelled.origins(region, config.labelled.source, config.labelled.masks)}


def _labelled(listed: Step, part: str, config: Config) -> Labelled:
    return labelled.read_images(listed, part, config.bands, config.classes.table)


def fit(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter; models/segmenter is its bundle."""
    training, validation = (_labelled(listed, part, config) for part in PARTS)
    learnt_from = training.images[0].image
    settings, scaling = config.segmenter, config.scaling
    model: Any
    # Heads on a frozen encoder are fitted in this process; a decoder is trained, on Ray if there are workers.
    if settings.network != "decoder":
        lab = models.is_rgb8(config.bands, learnt_from.dtype, scaling)
        model, measures = supervised.fit_frozen(settings, training, validation, scaling=scaling, lab=lab)
    else:
        on_ray = step.engine.kind == "ray"
        if on_ray:
            cluster.connect(step.engine.address)
        fits = partial(supervised.expect_supervisable, settings, classes=len(training.pixels_K))
        described = _segmenter(config, learnt_from)
        setup = models.training_setup(step, workers=config.workers, expect=fits, described=described)
        measures = supervised.fit_supervised(settings, training, validation, setup, scaling=scaling, on_ray=on_ray)
        net = settings.build(classes=len(config.classes.table.classes), channels=len(config.bands), weights="none")
        model = trained(net, step.prefix)
    statistics = supervised.input_statistics(training, size=settings.sampling.size)
    described = _segmenter(config, learnt_from).of(listed.value.get("origins", ()), measures)
    metres = mean_metres([image.image for image in training.images])
    described = described.model_copy(update={"statistics": statistics, "metres": metres})
    samples = supervised.pairs_of(validation, windows.spread(validation.images, size=config.patch, most=models.SAMPLES))
    return {"bundle": models.keep_model(step, described, model, samples=samples), "measures": measures}


def _segmenter(config: Config, image: Source | None = None) -> Bundle:
    table = config.classes.table
    return models.segmenter_bundle(
        config.segmenter,
        table.classes,
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        bands=config.bands,
        dtype=image.dtype if image else "uint8",
    ).model_copy(
        update={
            "in_masks": table.stored,
            "unlabelled": table.unlabelled,
            "units": units_of(image, config.bands) if image else (),
        }
    )


def validate(step: Step, listed: Step, model: Step, config: Config, count: int | None = None) -> dict[str, Any]:
    """Predict the validation images, or `count` of their tiles, as a region is, and compare them with their masks."""
    images, table = _labelled(listed, "validation", config).images, config.classes.table
    measures = compare_images(step, model, images, table, config.map, count=count)
    return measures | {"truth": _validated_on(listed)}


def _validated_on(listed: Step) -> str:
    return f"the validation scenes {', '.join(listed.value['validation']['scenes'])}"


def measure_baselines(step: Step, listed: Step, validated: Step, config: Config) -> dict[str, Any]:
    """Fit a linear head and a random forest to the training scenes; compare them with the validation scenes' masks."""
    training, validation = (_labelled(listed, part, config) for part in PARTS)
    table, network, scaling = config.classes.table, config.segmenter, config.scaling
    # 1. learn from windows all over the training scenes
    draws = windows.spread(training.images, size=config.patch, most=supervised.MOST_WINDOWS)
    pairs = supervised.pairs_of(training, draws)
    rgb8, linear = models.is_rgb8(config.bands, training.images[0].image.dtype, scaling), network.network != "linear"
    simple = simple_maps.learnt(
        network, scaling, pairs, len(draws), classes=len(table.classes), rgb8=rgb8, linear=linear
    )
    # 2. compare on the whole validation scenes, as the segmenter was
    whole = windows.spread(validation.images, size=config.patch)
    read = partial(supervised.pairs_of, validation, whole)
    methods = simple_maps.compare(simple, read, table, measure=lambda confusion: confusion.mean_iou)
    picture = simple_maps.draw_median_tile(step, validated, simple, validation.images, table, config.bands)
    return baseline.value_of("mean IoU", _validated_on(listed), methods, pictures=[picture])


def write_report(
    step: Step,
    listed: Step,
    predicted: Step,
    polygons: Step,
    validated: Step,
    measured: Step,
    *,
    simple: Step | None = None,
    certified: Step | None = None,
) -> dict[str, Any]:
    """The report: the measures by the region's truth, or those of the validation scenes without one."""
    worst = tuple(
        (
            f"Among the worst: {tile['id']}",
            tile["picture"],
            f"Imagery, mask, map; {tile['right']:.0%} of the pixels are right.",
        )
        for tile in validated.value["worst"]
    )
    training, validation = (
        f"{counted(part['images'], 'image')} of {counted(len(part['scenes']), 'scene')}"
        for part in (listed.value[name] for name in PARTS)
    )
    labels = f"Labelled: {training} to learn from, {validation} to choose the epoch by."
    # Reference masks of the region are stronger evidence than the scenes that selected the epoch.
    shown = measured if "overall" in measured.value else validated
    own, compared = validated.value, None
    if simple:
        parts = {row["name"]: row["iou"]["value"] for row in own["classes"] if row["reference"]}
        compared = baseline.comparison(simple.value, own["overall"]["mean_iou"]["value"], parts=parts)
    extras = report.Extras(labels=labels, pictures=worst, baseline=compared)
    return report.write_report(step, predicted, polygons, shown, extras, certified=certified)


def check(config: Config, region: Region) -> Plan:
    """Plan a run; refuse scenes, imagery and weights that it cannot use before it writes anything."""
    classes = _segmenter(config).classes
    supervised.expect_supervisable(config.segmenter, classes=len(classes), workers=config.workers)
    divided = _divide(region, config)
    # The imagery of the map must be of the kind that the segmenter learns from.
    learnt_from = divided["training"][0][0].image
    models.expect_weights(config.segmenter, config.scaling if learnt_from.dtype == "uint8" else None)
    tiles = mapping.tiles_for(region, _segmenter(config, learnt_from), config.map)
    generalize.expect_small(tiles, config.polygons)
    evaluate.expect_masks(region, config.truth, config.classes.table.names)
    return Plan(tiles, divided)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    training, validation = ([image for image, _ in (plan.labels or {})[part]] for part in PARTS)
    described = _segmenter(config, training[0].image)
    counts = {"validation": len(tiles_of(validation, described, config.map))}
    learn = partial(_learn, config.model_copy(update={"workers": 0}), region, plan)
    unknown = estimate.by_workers(config.workers)
    return estimate.by_untrained(described, plan, config.map, learn=learn, counts=counts, unknown=unknown)


def _learn(config: Config, region: Region, plan: Plan, run: Run) -> Step:
    """All before the map: a short training, and a few validation tiles."""
    listed = run.step("scenes", list_scenes, region, config, divided=plan.labels)
    segmenter = run.step("segmenter", estimate.training, fit, listed, config)
    run.step("validation", validate, listed, segmenter, config, estimate.TIMED + 1)
    return segmenter


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Map the classes of `region`; return the report's path and its headline."""
    plan = plan or Plan()
    listed = run.step("scenes", list_scenes, region, config, divided=plan.labels)
    segmenter = run.step("segmenter", fit, listed, config)
    validated = run.step("validation", validate, listed, segmenter, config)
    simple = run.step("baseline", measure_baselines, listed, validated, config) if config.baseline else None
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map, tiles=plan.tiles)
    shown = generalize.generalized(run, predicted, config.polygons, region)
    polygons = run.step("polygons", mapping.join_polygons, shown, PRODUCT)
    measured = run.step("evaluate", evaluate.compare_truth, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Land cover, {region.name}")
    run.step("qgis", mapping.save_project, predicted, polygons)
    certified = run.step("certificate", certify, predicted, region, config.truth) if config.certificate else None
    parts = (listed, predicted, polygons, validated, measured)
    written = run.step("report", write_report, *parts, simple=simple, certified=certified)
    return report.headline(written)
