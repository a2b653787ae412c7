"""landcover: one of several classes for every pixel of a region, learnt from scenes with masks (DeepGlobe 2018).

    labelled scenes --> split by scene --> DeepLabv3+, best epoch by mean IoU --> bundle
    bundle --> validation scenes measured
    simple methods on the same scenes --> measured beside it
    bundle + region --> class map at full resolution --> polygons, items, report

The modules of the steps explain the rest; `configs/landcover/paper.yaml` has the settings of the prototype.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from rayseg.config import Bands, Workers, added
from rayseg.config import Config as Frozen
from rayseg.engine import cluster
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Run, Step
from rayseg.geo.grid import NODATA, Tile
from rayseg.geo.region import Region
from rayseg.io import cog, pictures, scenes
from rayseg.io.class_tables import Classes
from rayseg.io.pictures import encoded
from rayseg.io.rasters import read
from rayseg.io.scenes import LabelledImage
from rayseg.io.sources import Source
from rayseg.io.units import units_of
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Scaling
from rayseg.stages.compare import CompareTile, images_on, pictured, truth_of
from rayseg.stages.predict import Predict
from rayseg.stages.read import ReadTile, tile_rows
from rayseg.steps import baseline, estimate, evaluate, labelled, models, report, simple_maps
from rayseg.steps import map as mapping
from rayseg.steps.baseline import Method
from rayseg.steps.evaluate import Compared
from rayseg.steps.labelled import PARTS, Divided, LabelledConfig
from rayseg.steps.map import MapConfig
from rayseg.steps.simple_maps import Simple
from rayseg.store import Location, put
from rayseg.train import supervised, windows
from rayseg.train.learning import trained
from rayseg.train.supervised import Labelled, SupervisedConfig
from rayseg.train.windows import Windows
from rayseg.vision.crops import middle
from rayseg.vision.fill import mirrored

Plan = mapping.Plan[Divided]
PRODUCT = "landcover"
WORST = 6
"""Tiles that the report shows."""
SHOWN = 1024
"""Side in px of the place that the report shows by all methods."""


class Config(Frozen):
    """Settings of the pipeline."""

    labelled: LabelledConfig = LabelledConfig()
    classes: Classes = Classes.model_validate("deepglobe")
    """The classes of the masks: a YAML file, its name under configs/classes, or its content."""
    segmenter: SupervisedConfig = SupervisedConfig()
    map: MapConfig = MapConfig()
    bands: Bands = models.RGB
    """Bands of the imagery, in the order of the network's input."""
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 1024
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 768
    """Distance of these windows in px; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    scaling: Scaling = Field(default_factory=models.scaling_of)
    """From the imagery's values to the network's input; by default what the encoder's weights expect of uint8."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""
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
    divided = divided or _divide(region, config)
    rows = [
        image.to_row() | {"part": name, "counts": json.dumps(counts.tolist())}
        for name, part in divided.items()
        for image, counts in part
    ]
    write_rows(step.prefix / "images.parquet", rows)
    return {
        name: {
            "scenes": sorted({image.scene for image, _ in part}),
            "images": len(part),
            "pixels": sum(counts.sum(axis=(0, 1)) for _, counts in part).tolist(),
        }
        for name, part in divided.items()
    }


def _labelled(listed: Step, part: str, config: Config) -> Labelled:
    rows = [row for row in read_rows(listed.prefix / "images.parquet") if row["part"] == part]
    read = Windows(tuple(map(LabelledImage.from_row, rows)), config.bands, config.classes.table)
    return Labelled(read, tuple(np.array(json.loads(row["counts"]), np.int64) for row in rows))


def fit(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter; models/segmenter is its bundle."""
    training, validation = (_labelled(listed, part, config) for part in PARTS)
    learnt_from = training.images[0].image
    if config.segmenter.network != "decoder":
        lab = models.is_rgb8(config.bands, learnt_from.dtype, config.scaling)
        head, measures = supervised.fit_frozen(config.segmenter, training, validation, scaling=config.scaling, lab=lab)
        described = _segmenter(config, learnt_from).model_copy(update={"metrics": measures})
        return {"bundle": models.keep_model(step, described, head), "measures": measures}
    if step.engine.kind == "ray":
        cluster.connect(step.engine.address)
    measures = supervised.fit_supervised(
        config.segmenter,
        training,
        validation,
        models.training_setup(step, workers=config.workers),
        scaling=config.scaling,
        on_ray=step.engine.kind == "ray",
    )
    net = config.segmenter.build(classes=len(config.classes.table.classes), channels=len(config.bands), weights="none")
    model = trained(net, step.prefix)
    described = _segmenter(config, learnt_from).model_copy(update={"metrics": measures})
    return {"bundle": models.keep_model(step, described, model), "measures": measures}


def _segmenter(config: Config, image: Source | None = None) -> Bundle:
    return models.segmenter_bundle(
        config.segmenter,
        config.classes.table.classes,
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        bands=config.bands,
        dtype=image.dtype if image else "uint8",
    ).model_copy(update={"units": units_of(image, config.bands) if image else ()})


def validate(step: Step, listed: Step, model: Step, config: Config, count: int | None = None) -> dict[str, Any]:
    """Predict the validation images, or `count` of their tiles, as a region is, and compare them with their masks."""
    images, table = _labelled(listed, "validation", config).images, config.classes.table
    described, prefix = bundle.load(model.value["bundle"]), str(step.prefix / "tiles")
    # 1. predict and compare tile by tile
    rows = _tiles_of(images, described, config)
    rows = estimate.spread(rows, count) if count else rows
    write_rows(step.manifest, rows)
    works = [
        Work(ReadTile(described.bands, patch=described.patch, stride=described.stride)),
        Work(Predict(model.value["bundle"], batch=config.map.batch), cpus=1.0, gpus=1.0, model=True),
        Work(CompareTile(prefix, images, table)),
    ]
    done = mapping.through(step, rows, works, patience=config.map.stall_seconds)
    compared = [
        Compared(row["id"], row["grid_image"], Confusion(np.array(record.facts["confusion"])), 0)
        for row, record in mapping.rows_with(step, "confusion")
    ]
    # 2. picture the tiles with the smallest share of right pixels
    by_id, worst = {row["id"]: Tile.from_row(row) for row in rows}, []
    labelled = [tile for tile in compared if tile.confusion.pixels]
    for tile in sorted(labelled, key=lambda tile: tile.confusion.overall_accuracy)[:WORST]:
        path = f"steps/{step.name}/worst/{tile.id}.webp"
        picture_HWC = pictured(prefix, by_id[tile.id], images, table)
        put(step.prefix / "worst" / f"{tile.id}.webp", encoded(picture_HWC, "webp"))
        worst.append({"id": tile.id, "right": tile.confusion.overall_accuracy, "picture": path})
    truth = f"the validation scenes {', '.join(listed.value['validation']['scenes'])}"
    none = {"count": 0, "names": []}
    found = evaluate.summary(compared, table) | {"prediction": "", "truth": truth}
    return found | done | {"unmatched": {"prediction": none, "truth": none}, "worst": worst}


def measure_baselines(step: Step, listed: Step, validated: Step, config: Config) -> dict[str, Any]:
    """Fit a linear head and a random forest to the training scenes; compare them with the validation scenes' masks."""
    training, validation = (_labelled(listed, part, config) for part in PARTS)
    table, network = config.classes.table, config.segmenter
    count, rgb8 = len(table.classes), models.is_rgb8(config.bands, training.images[0].image.dtype, config.scaling)
    draws = windows.spread(training.images, size=config.patch, most=supervised.MOST_WINDOWS)
    pairs = supervised.pairs_of(training, draws)
    linear = network.network != "linear"
    simple = simple_maps.learnt(network, config.scaling, pairs, len(draws), classes=count, rgb8=rgb8, linear=linear)
    whole = windows.spread(validation.images, size=config.patch)
    methods = []
    for method in simple:
        confusion = simple_maps.compare(method, supervised.pairs_of(validation, whole), classes=count)
        parts = baseline.parts_of(confusion, table.names)
        methods.append(Method(method.name, confusion.mean_iou, method.seconds, parts))
    where = f"the validation scenes {', '.join(listed.value['validation']['scenes'])}"
    return baseline.value_of("mean IoU", where, methods, pictures=_beside(step, validated, simple, validation, config))


def _beside(
    step: Step, validated: Step, simple: Sequence[Simple], validation: Labelled, config: Config
) -> list[tuple[str, str, str]]:
    """The middle of the validation tile of median accuracy, by the segmenter and by the simple methods."""
    compared = [
        (Confusion(np.array(record.facts["confusion"])), Tile.from_row(row))
        for row, record in mapping.rows_with(validated, "confusion")
    ]
    known = sorted(((c.overall_accuracy, tile.id, tile) for c, tile in compared if c.pixels), key=lambda row: row[:2])
    _, _, tile = known[len(known) // 2]
    window = middle(tile.window, SHOWN).intersect(tile.window)
    images, table = validation.images, config.classes.table
    sources = [scenes.image_on(image) for image in images_on(images, tile.grid)]
    image_CHW, valid_HW = read(sources, tile.grid, window, bands=config.bands)
    [mapped_HW] = cog.read_bands(validated.prefix / "tiles" / f"{tile.id}.tif")
    maps = [
        truth_of(images, replace(tile, window=window), table),
        mapped_HW[window.slices(tile.window)],
        *(np.where(valid_HW, method.predict(mirrored(image_CHW, valid_HW)), NODATA) for method in simple),
    ]
    picture_HWC = simple_maps.panels(pictures.shown(sources, tile.grid, window), maps, table)
    put(step.prefix / "beside.webp", encoded(picture_HWC, "webp"))
    names = ", ".join(["imagery", "mask", "this model", *(method.name for method in simple)])
    return [("Next to simple baselines", f"steps/{step.name}/beside.webp", f"From left: {names}, in {tile.id}.")]


def _tiles_of(images: Sequence[LabelledImage], described: Bundle, config: Config) -> list[Row]:
    """Rows of the tiles of the validation images."""
    seen = [scenes.image_on(image) for image in images]
    rows = tile_rows(seen, None, size=config.map.tile, halo=described.patch + described.stride)
    return [row | {"refused": ""} for row in rows]


def write_report(
    step: Step,
    listed: Step,
    predicted: Step,
    polygons: Step,
    validated: Step,
    measured: Step,
    *,
    simple: Step | None = None,
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
        f"{report.counted(part['images'], 'image')} of {report.counted(len(part['scenes']), 'scene')}"
        for part in (listed.value[name] for name in PARTS)
    )
    labels = f"Labelled: {training} to learn from, {validation} to choose the epoch by."
    shown = measured if "overall" in measured.value else validated
    own, beside = validated.value, None
    if simple:
        parts = {row["name"]: row["iou"]["value"] for row in own["classes"] if row["reference"]}
        beside = baseline.beside(simple.value, own["overall"]["mean_iou"]["value"], parts=parts)
    extras = report.Extras(labels=labels, pictures=worst, baseline=beside)
    return report.write_report(step, predicted, polygons, shown, extras)


def check(config: Config, region: Region) -> Plan:
    """Plan a run; refuse scenes, imagery and weights that it cannot use before it writes anything."""
    classes = _segmenter(config).classes
    supervised.expect_supervisable(config.segmenter, classes=len(classes), workers=config.workers)
    divided = _divide(region, config)
    learnt_from = divided["training"][0][0].image
    models.expect_weights(config.segmenter, config.scaling if learnt_from.dtype == "uint8" else None)
    tiles = mapping.tiles_for(region, _segmenter(config, learnt_from), config.map)
    evaluate.expect_masks(region, config.truth, config.classes.table.names)
    return Plan(tiles, divided)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """What is known of a run before it begins."""
    training, validation = ([image for image, _ in (plan.labels or {})[part]] for part in PARTS)
    described = _segmenter(config, training[0].image)
    counts = {"validation": len(_tiles_of(validation, described, config))}
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
    polygons = run.step("polygons", mapping.join_polygons, predicted, PRODUCT)
    measured = run.step("evaluate", evaluate.compare_truth, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Land cover, {region.name}")
    parts = (listed, predicted, polygons, validated, measured)
    written = run.step("report", write_report, *parts, simple=simple)
    return report.headline(written)
