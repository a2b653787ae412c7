"""landcover: every pixel of a region one of several classes, learnt from scenes with masks (DeepGlobe 2018).

    labelled scenes --> split by scene --> DeepLabv3+, best epoch by mean IoU --> bundle
    bundle --> validation scenes measured
    bundle + region --> class map at full resolution --> polygons, items, report

What is not said here is in the modules named by the steps; the settings of the prototype are
`configs/landcover/paper.yaml`.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from rayseg.config import Bands, Workers
from rayseg.config import Config as Frozen
from rayseg.engine import cluster
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Tile
from rayseg.geo.region import Region
from rayseg.io import masks, scenes
from rayseg.io.class_tables import Classes
from rayseg.io.pictures import encoded
from rayseg.io.scenes import LabelledImage
from rayseg.io.stac_read import imagery_collection
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.encoders import NO_FILES, encoder_name, read_state
from rayseg.stages.compare import CompareTile, pictured
from rayseg.stages.predict import Predict
from rayseg.stages.read import ReadTile, tile_rows
from rayseg.steps import estimate, evaluate, models, report
from rayseg.steps import map as mapping
from rayseg.steps.evaluate import Compared
from rayseg.steps.map import MapConfig
from rayseg.store import Location, put
from rayseg.train.supervised import (
    Labelled,
    SupervisedConfig,
    expect_supervisable,
    fit_supervised,
    trained_supervised,
)
from rayseg.train.windows import Windows
from rayseg.vision.color import ClassTable

PRODUCT = "landcover"
PARTS = ("training", "validation")
WORST = 6
"""Tiles that the report shows."""


class LabelledConfig(Frozen):
    """The labelled scenes, and which of them the training is not shown."""

    source: Location | None = None
    """A folder of scenes (`images` and `masks` side by side) or `catalog.json#collection`; by default the region's."""
    masks: Location | None = None
    """With a catalogue: its masks, as `catalog.json#collection/asset`, or `#collection/asset` of the region's."""
    validation: tuple[str, ...] = ()
    """Scenes by which the epoch is chosen and the model measured; by default some are drawn."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of the scenes that are drawn."""
    seed: int = 1337
    """Of the draw."""
    absent: tuple[str, ...] = ()
    """Classes that need not occur."""


class Config(Frozen):
    """Settings of the pipeline."""

    labelled: LabelledConfig = LabelledConfig()
    classes: Classes = Classes.model_validate("deepglobe")
    """The classes of the masks: a YAML file, its name under configs/classes, or its content."""
    segmenter: SupervisedConfig = SupervisedConfig()
    map: MapConfig = MapConfig()
    bands: Bands = ("red", "green", "blue")
    """Of the imagery, in the order the model takes them."""
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 1024
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 768
    """Distance of these windows; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    scaling: Scaling = Scaling(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    """How imagery becomes the network's input; mean and standard deviation of ImageNet."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        reduce = self.segmenter.reduce
        models.expect_windows(self.bands, self.scaling, patch=self.patch, stride=self.stride, reduce=reduce)
        return self


def _find(region: Region, config: Config) -> tuple[LabelledImage, ...]:
    """All labelled images, with masks.

    Raises:
        ConfigError: neither the region nor the configuration says where they are.
        DataError: there are none, or they cannot be used.
    """
    settings = config.labelled
    source = settings.source or region.images
    if not source and region.catalog:
        source = f"{region.catalog}#{region.collection or imagery_collection(region.catalog) or ''}".rstrip("#")
    if not source:
        raise ConfigError(
            f"region {region.name} has no labelled scenes; name some with --set labelled.source=FOLDER, which holds "
            "images and masks, or catalog.json#collection"
        )
    found = scenes.labelled_images(source, region.located(settings.masks), names=config.classes.table.names)
    kept = tuple(image for image in found if image.masks)
    if not kept:
        raise DataError(
            f"none of the {len(found)} images of {source} has a mask; put masks of the same names beside them, or name "
            "them with --set labelled.masks=catalog.json#collection"
        )
    if kinds := sorted({image.image.dtype for image in kept} - {kept[0].image.dtype}):
        raise DataError(
            f"{kept[0].id} has {kept[0].image.dtype} pixels, other images {', '.join(kinds)}; bring all to one type"
        )
    return kept


@lru_cache(maxsize=2)
def _counts(images: tuple[LabelledImage, ...], table: ClassTable, cell: int) -> list[np.ndarray]:
    return scenes.count_all(images, table, cell=cell)


def _divided(region: Region, config: Config) -> dict[str, list[tuple[LabelledImage, np.ndarray]]]:
    """Training and validation images, each with its pixels by cell and class.

    Raises:
        RaysegError: of `_find`; a split or classes that cannot be meant.
    """
    settings, table = config.labelled, config.classes.table
    found = _find(region, config)
    parts = scenes.split(found, validation=settings.validation, share=settings.share, seed=settings.seed)
    counts = dict(
        zip([image.id for image in found], _counts(found, table, config.segmenter.sampling.cell), strict=True)
    )
    divided = {name: [(image, counts[image.id]) for image in part] for name, part in zip(PARTS, parts, strict=True)}
    pixels = {name: sum(found.sum(axis=(0, 1)) for _, found in part) for name, part in divided.items()}
    named = {name: sorted({image.scene for image, _ in part}) for name, part in divided.items()}
    scenes.expect_classes(pixels, table, named, settings.absent)
    return divided


def list_scenes(step: Step, region: Region, config: Config) -> dict[str, Any]:
    """Find the labelled scenes, count their classes and divide them; `<step>/images.parquet` is what others read."""
    divided = _divided(region, config)
    rows = [
        image.to_row() | {"part": name, "counts": json.dumps(found.tolist())}
        for name, part in divided.items()
        for image, found in part
    ]
    write_rows(step.prefix / "images.parquet", rows)
    return {
        name: {
            "scenes": sorted({image.scene for image, _ in part}),
            "images": len(part),
            "pixels": sum(found.sum(axis=(0, 1)) for _, found in part).tolist(),
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
    use_gpu = cluster.connect_training(step.engine.address, workers=config.workers)
    if step.engine.kind == "ray":
        cluster.connect(step.engine.address)
    measures = fit_supervised(
        config.segmenter,
        training,
        validation,
        prefix=step.prefix,
        scaling=config.scaling,
        workers=config.workers,
        use_gpu=use_gpu,
        on_ray=step.engine.kind == "ray",
    )
    model = trained_supervised(
        config.segmenter, step.prefix, classes=len(config.classes.table.classes), channels=len(config.bands)
    )
    described = _described(config, dtype=training.images[0].image.dtype, measures=measures)
    return {"bundle": models.keep_model(step, described, model), "measures": measures}


def _described(config: Config, *, dtype: str = "uint8", measures: dict[str, float] | None = None) -> Bundle:
    table = config.classes.table
    if table.values != tuple(range(len(table.values))):
        raise ConfigError(f"class values are {list(table.values)}, a segmenter's are 0, 1, 2, ...; number them so")
    options = config.segmenter.options(classes=len(table.classes), channels=len(config.bands))
    return Bundle(
        name="segmenter",
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=options),
        classes=table.classes,
        bands=config.bands,
        dtype=dtype,
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        metrics=measures or {},
        provenance=Provenance(config=config.segmenter.model_dump(mode="json")),
    )


def validate(step: Step, listed: Step, model: Step, config: Config, count: int | None = None) -> dict[str, Any]:
    """Predict the validation images, or `count` of their tiles, as a region is, and compare them with their masks."""
    images, table = _labelled(listed, "validation", config).images, config.classes.table
    described = bundle.load(model.value["bundle"])
    rows = _tiles_of(images, described, config)
    rows = estimate.spread(rows, count) if count else rows
    write_rows(step.prefix / "manifest.parquet", rows)
    works = [
        Work(ReadTile(described.bands, patch=described.patch, stride=described.stride)),
        Work(Predict(model.value["bundle"], batch=config.map.batch), cpus=1.0, gpus=1.0, model=True),
        Work(CompareTile(str(step.prefix / "tiles"), images, table)),
    ]
    done = mapping.through(step, rows, works, patience=config.map.stall_seconds)
    compared = [
        Compared(row["id"], row["grid_image"], Confusion(np.array(record.facts["confusion"])), 0)
        for row, record in mapping.rows_with(step, "confusion")
    ]
    named = ", ".join(listed.value["validation"]["scenes"])
    found = evaluate.summary(compared, table) | {"prediction": "", "truth": f"the validation scenes {named}"}
    none = {"count": 0, "names": []}
    worst = _worst(step, compared, rows, images, table)
    return found | done | {"unmatched": {"prediction": none, "truth": none}, "worst": worst}


def _tiles_of(images: Sequence[LabelledImage], described: Bundle, config: Config) -> list[Row]:
    seen = [scenes.image_on(one) for one in images]
    rows = tile_rows(seen, None, size=config.map.tile, halo=described.patch + described.stride)
    return [row | {"refused": ""} for row in rows]


def _worst(
    step: Step,
    compared: Sequence[Compared],
    rows: Sequence[Row],
    images: Sequence[LabelledImage],
    table: ClassTable,
) -> list[dict[str, Any]]:
    """Pictures of the tiles with the smallest share of right pixels."""
    by_id = {row["id"]: Tile.from_row(row) for row in rows}
    seen = sorted((one for one in compared if one.confusion.pixels), key=lambda one: one.confusion.overall_accuracy)
    shown = []
    for one in seen[:WORST]:
        picture_HWC = pictured(str(step.prefix / "tiles"), by_id[one.id], images, table)
        put(step.prefix / "worst" / f"{one.id}.webp", encoded(picture_HWC, "webp"))
        right = one.confusion.overall_accuracy
        shown.append({"id": one.id, "right": right, "picture": f"steps/{step.name}/worst/{one.id}.webp"})
    return shown


def write_report(
    step: Step, listed: Step, predicted: Step, polygons: Step, validated: Step, measured: Step
) -> dict[str, Any]:
    """The report: the map's own truth if there is one, else how well the model does on the validation scenes."""
    pictures = tuple(
        (
            f"Among the worst: {one['id']}",
            one["picture"],
            f"Imagery, mask, map; {one['right']:.0%} of the pixels are right.",
        )
        for one in validated.value["worst"]
    )
    learnt, chosen = (
        f"{_number(part['images'], 'image')} of {_number(len(part['scenes']), 'scene')}"
        for part in (listed.value[name] for name in PARTS)
    )
    extras = report.Extras(
        labels=f"Labelled: {learnt} to learn from, {chosen} to choose the epoch by.", pictures=pictures
    )
    shown = measured if "overall" in measured.value else validated
    return report.write_report(step, predicted, polygons, shown, extras)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def check(config: Config, region: Region) -> mapping.Plan[Any]:
    """Refuse, before anything is written, scenes, imagery and weights that cannot be used."""
    described = _described(config)
    expect_supervisable(config.segmenter, classes=len(described.classes), workers=config.workers)
    encoder_name(config.segmenter.encoder)
    if config.segmenter.weights not in NO_FILES:
        read_state(config.segmenter.weights)
    divided = _divided(region, config)
    dtype = divided["training"][0][0].image.dtype
    tiles = mapping.tiles_for(region, described.model_copy(update={"dtype": dtype}), config.map)
    if truth := region.located(config.truth):
        masks.masks_of(truth, names=config.classes.table.names)
    return mapping.Plan(tiles)


def forecast(config: Config, region: Region, plan: mapping.Plan[Any]) -> estimate.Forecast:
    """What is known of a run before it is begun."""
    training, validation = _divided(region, config).values()
    described = _described(config, dtype=training[0][0].image.dtype)
    counts = {"validation": len(_tiles_of([image for image, _ in validation], described, config))}
    learn = partial(_learn, config.model_copy(update={"workers": 0}), region)
    unknown = estimate.by_workers(config.workers)
    return estimate.by_untrained(described, plan, config.map, learn=learn, counts=counts, unknown=unknown)


def _learn(config: Config, region: Region, run: Run) -> Step:
    listed = run.step("scenes", list_scenes, region, config)
    segmenter = run.step("segmenter", estimate.training, fit, listed, config)
    run.step("validation", validate, listed, segmenter, config, estimate.TIMED + 1)
    return segmenter


def run(config: Config, run: Run, region: Region, plan: mapping.Plan[Any] | None = None) -> str:
    """Map the classes of `region`; return where the report is and what it says."""
    listed = run.step("scenes", list_scenes, region, config)
    segmenter = run.step("segmenter", fit, listed, config)
    validated = run.step("validation", validate, listed, segmenter, config)
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map, tiles=plan and plan.tiles)
    polygons = run.step("polygons", mapping.join_polygons, predicted, PRODUCT)
    measured = run.step("evaluate", evaluate.compare_truth, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Land cover, {region.name}")
    written = run.step("report", write_report, listed, predicted, polygons, validated, measured)
    return report.headline(written)
