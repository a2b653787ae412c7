"""The segmenter of al-s4gan: trained on chips with masks and chips without, then measured on other chips."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from rayseg.engine.manifest import Row
from rayseg.engine.run import Step
from rayseg.io.maps import mean_metres
from rayseg.metrics import Confusion, bootstrap
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.models.crf import Refined
from rayseg.pipelines.al_s4gan import annotation, chip_pixels, chip_pool, queries
from rayseg.pipelines.al_s4gan.config import Config
from rayseg.steps import baseline, models, simple_maps
from rayseg.train import learning
from rayseg.train.batches import Chips
from rayseg.train.consistency import fit_consistency
from rayseg.train.frozen import Pair, fit_head
from rayseg.train.s4gan import Data, S4ganConfig, confusions, expect_trainable, fit_s4gan, measures_of


def describe(config: Config) -> Bundle:
    """Metadata of the segmenter's bundle.

    Raises:
        ConfigError: the values of the classes are not 0, 1, 2, ...
    """
    described = models.segmenter_bundle(
        _settings(config), config.table.classes, scaling=config.scaling, patch=config.patch, stride=config.stride
    ).model_copy(update={"in_masks": config.table.stored, "unlabelled": config.table.unlabelled})
    if not config.crf:
        return described
    options = dict(described.architecture.options) | config.crf.model_dump()
    return described.model_copy(update={"architecture": bundle.Architecture(factory="refined", options=options)})


def _settings(config: Config) -> S4ganConfig:
    assert config.segmenter is not None
    return config.segmenter


def fit(step: Step, listed: Step, chosen: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter on the chosen chips and all others; models/segmenter is its bundle.

    Raises:
        RunIncomplete: chosen chips still need masks.
    """
    labelled = _chosen(listed, chosen, config)
    annotation.expect_masks(step.root, labelled, config.common.classes)
    return _fit(step, listed, labelled, config)


def _chosen(listed: Step, chosen: Step, config: Config) -> list[Row]:
    # In the order of selection: the first draw comes first.
    ids = [row["id"] for row in queries.labelled(chosen)]
    if config.active.chosen is None and not config.active.count_pool:
        ids = ids[config.active.budget(listed.value["pool"]).initial :]
    rows = {row["id"]: row for row in chip_pool.rows_of(listed, "pool")}
    return [rows[chip] for chip in ids]


def fit_drawn(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Train as `fit` does, on the first chips that have masks already; for the forecast."""
    count = config.active.budget(listed.value["pool"]).target
    return _fit(step, listed, chip_pool.masked_rows(listed)[:count], config)


def _fit(step: Step, listed: Step, labelled: Sequence[Row], config: Config) -> dict[str, Any]:
    settings, channels = _settings(config), len(models.RGB)
    seeded = settings.model_copy(update={"learning": settings.learning.model_copy(update={"seed": config.seed})})
    # The chips that show their masks, all others of the pool, and the chips of the validation part.
    shown = {row["id"] for row in labelled}
    others = [row for row in chip_pool.rows_of(listed, "pool") if row["id"] not in shown]
    held = chip_pool.rows_of(listed, "validation")
    of_pool = (_masked(step.root, rows, config) if rows else None for rows in (others, held))
    data = Data(_masked(step.root, labelled, config), *of_pool)
    if settings.network != "decoder":
        return _fit_head(step, listed, seeded, data, config)
    expect = partial(expect_trainable, seeded)
    setup = models.training_setup(step, workers=config.workers, expect=expect, described=describe(config))
    train = fit_consistency if settings.learner == "consistency" else fit_s4gan
    measures = train(seeded, data, setup, scaling=config.scaling)
    net = seeded.build(classes=len(config.table.classes), channels=channels, weights="none")
    model: Any = learning.trained(net, step.prefix)
    if config.crf:
        model = Refined(model, channels=channels, kernels=config.crf)
        model.std.copy_(model.std.new_tensor(config.scaling.std) / config.scaling.scale)
    described = describe(config).of(listed.value.get("origins", ()), measures)
    described = described.model_copy(update=_known(step.root, listed, config))
    kept_in = models.keep_model(step, described, model, samples=(data.validation or data.labelled).pairs())
    return {"bundle": kept_in, "measures": measures, "masks": len(labelled)}


def _fit_head(step: Step, listed: Step, settings: S4ganConfig, data: Data, config: Config) -> dict[str, Any]:
    """Fit a head on the frozen encoder to the chips with masks; nothing is chosen by the validation chips."""
    classes, lab = len(config.table.classes), models.is_rgb8(models.RGB, "uint8", config.scaling)
    pairs, count = _pairs(data.labelled), len(data.labelled)
    head = fit_head(settings, pairs, count, config.scaling, classes=classes, lab=lab, seed=config.seed)
    chips = data.validation
    matrices = confusions(head, chips, range(len(chips)), config.scaling, unit=32) if chips else []
    measures = measures_of(sum(matrices[1:], matrices[0])) if matrices else {}
    described = describe(config).of(listed.value.get("origins", ()), measures)
    described = described.model_copy(update=_known(step.root, listed, config))
    return {"bundle": models.keep_model(step, described, head), "measures": measures, "masks": count}


def _known(root: str, listed: Step, config: Config) -> dict[str, Any]:
    """What the model has seen: the whole pool, as it learns from chips without masks, too."""
    rows = chip_pool.rows_of(listed, "pool")
    metres = mean_metres([chip_pixels.placed(row)[0].image for row in rows])
    return {"statistics": models.statistics_of(_masked(root, rows, config)), "metres": metres}


def _masked(root: str, rows: Sequence[Row], config: Config) -> Chips:
    return chip_pixels.masked_chips(rows, config.table, annotation.drawn_prefix(root))


def measure(step: Step, listed: Step, segmenter: Step, config: Config) -> dict[str, Any]:
    """Measure the segmenter on the test chips, else on the validation chips; `part` is "none" without either."""
    part: chip_pool.Part = "test" if listed.value["test"] else "validation"
    rows = chip_pool.rows_of(listed, part)
    if not rows:
        return {"part": "none"}
    _, model = bundle.build(segmenter.value["bundle"])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chips = _masked(step.root, rows, config)
    measured = confusions(model, chips, range(len(chips)), config.scaling, unit=32 * _settings(config).reduce)
    total = sum(measured[1:], measured[0])
    # Chips of one scene are alike, so the interval comes from resampling scenes.
    by_scene: dict[str, Confusion] = {}
    for row, confusion in sorted(zip(rows, measured, strict=True), key=lambda pair: pair[0]["scene"]):
        scene = row["scene"]
        by_scene[scene] = by_scene[scene] + confusion if scene in by_scene else confusion
    scenes = list(by_scene.values())
    low, high = bootstrap(scenes, lambda c: c.mean_iou_of_reference) if len(scenes) > 1 else (None, None)
    # Classes without a pixel have NaN here and are left out of the report.
    per_class = dict(zip(config.table.names, map(float, total.iou), strict=True))
    return {"part": part, "chips": len(rows), **measures_of(total), "low": low, "high": high, "iou": per_class}


def measure_baselines(step: Step, parts: Sequence[Step], config: Config) -> dict[str, Any]:
    """Fit a linear head (unless the model is one) and a random forest; compare them on the chips of the measure."""
    listed, trained, measured, last = parts
    if measured.value["part"] == "none":
        return {}
    # 1. learn and measure
    labelled = _masked(step.root, _chosen(listed, last, config), config)
    rows, table = chip_pool.rows_of(listed, measured.value["part"]), config.table
    chips, count, settings = _masked(step.root, rows, config), len(table.classes), _settings(config)
    linear = settings.network != "linear"
    pairs = _pairs(labelled)
    simple = simple_maps.learnt(settings, config.scaling, pairs, len(labelled), classes=count, rgb8=True, linear=linear)
    methods = simple_maps.compare(
        simple, partial(_pairs, chips), table, measure=lambda confusion: confusion.mean_iou_of_reference
    )
    # 2. picture the first chip by the segmenter and by the simple methods
    _, model = bundle.build(trained.value["bundle"])
    image_CHW, classes_HW = next(_pairs(chips))
    own_HW = simple_maps.predicted(model, image_CHW, config.scaling, unit=32 * settings.reduce)
    maps = [classes_HW, own_HW, *(method.predict(image_CHW) for method in simple)]
    names = ["chip", "mask", "this model", *(method.name for method in simple)]
    image_HWC = image_CHW.transpose(1, 2, 0)
    picture = simple_maps.draw_side_by_side(step, image_HWC, maps, table, names=names, place=f"of {rows[0]['id']}")
    return baseline.value_of("mean IoU", f"the {measured.value['part']} chips", methods, pictures=[picture])


def _pairs(chips: Chips) -> Iterator[Pair]:
    return ((image_CHW, mask_HW) for image_CHW, mask_HW in chips.pairs() if mask_HW is not None)
