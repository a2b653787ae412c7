"""gpc: green plastic cover over a region from a yes or no per chip (Cao & Huang 2022, ISPRS 188, 157-176).

    chips + yes/no --> classifier --> Grad-CAM++ --.
    chips          --> unsupervised objects -------+--> mean CAM per object, Otsu --> coarse masks
    coarse masks   --> segmenter: warm-up, label correction, from scratch --> cover map
    its sure pixels --> colour and texture of cover and of the rest --> cover map, with `appearance`

No mask is drawn. The modules of the steps explain the rest; `configs/gpc/paper.yaml` has the settings of the paper.
"""

from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rayseg.config import Config as Frozen
from rayseg.config import Workers, added
from rayseg.engine import run as runs
from rayseg.engine.manifest import write_rows
from rayseg.engine.run import Run, Step
from rayseg.geo.region import Region
from rayseg.io.labels import Chip
from rayseg.io.maps import mean_metres
from rayseg.models.bundle import Bundle, Scaling
from rayseg.models.segmenter import Ensemble
from rayseg.steps import appearance, baseline, chips, color_rule, estimate, evaluate, generalize, models, report
from rayseg.steps import map as mapping
from rayseg.steps.certificate import certify
from rayseg.steps.chips import ChipsConfig
from rayseg.steps.cues import LABELS, NO, YES, CuesConfig, draw_cues, make_cues, read_mask
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.map import MapConfig
from rayseg.store import Location, split_location
from rayseg.train.appearance import AppearanceConfig
from rayseg.train.classifier import ClassifierConfig, expect_trainable
from rayseg.train.segmenter import SegmenterConfig, expect_shared, fit_segmenter, trained_segmenter
from rayseg.vision.color import ClassTable

Plan = mapping.Plan[list[Chip]]
COLORS = {YES: (0, 158, 115), NO: (0, 0, 0)}
CLASSES = ((0, "background", COLORS[NO]), (1, YES, COLORS[YES]))


class YesNoConfig(ClassifierConfig):
    """The classifier of chips; the defaults are the paper's."""

    network: Literal["chips"] = "chips"
    """A head on an encoder whose stages give Grad-CAM++."""


class Config(Frozen):
    """Settings of the pipeline; the defaults are the paper's, `configs/gpc/default.yaml` is recommended."""

    chips: ChipsConfig = ChipsConfig()
    classifier: YesNoConfig = YesNoConfig()
    cues: CuesConfig = CuesConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    map: MapConfig = MapConfig()
    polygons: PolygonsConfig = added(default=PolygonsConfig())
    members: Annotated[int, Field(gt=0)] = 1
    """Segmenters trained from different seeds; the map takes the mean of their logits. For few chips."""
    marked: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the negative training chips' pixels that the segmenter may mark: sets its threshold; by default 0.5."""
    appearance: AppearanceConfig | None = added(default=None)
    """Map by the colour and texture of the pixels that the segmenter is sure of; None maps by the segmenter itself."""
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 640
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance of these windows in px; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train. 0 or auto: on a cluster one per GPU, else one; locally the command's own process."""
    scaling: Scaling = Scaling(mean=(98.3519, 96.9567, 95.5713), std=(52.7343, 45.8798, 44.3465))
    """From uint8 values to the networks' input; mean and standard deviation of the paper's chips."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""
    certificate: bool = added(default=True)
    """Whether the map's stability is measured at the end, on a sample of its own tiles (docs/certificate.md)."""
    baseline: bool = added(default=True)
    """With a truth: measure a one-threshold colour rule, fitted on the chips, and show it in the report."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        models.expect_windows(
            models.RGB, self.scaling, patch=self.patch, stride=self.stride, reduce=self.segmenter.reduce
        )
        return self


def fit_yes_no(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Train the classifier of chips; models/classifier is its bundle."""
    settings, parents = config.classifier, (split_location(listed.value["source"])[0],)
    classes = tuple((position, label, COLORS[label]) for position, label in enumerate(LABELS))
    described = models.classifier_bundle(settings, classes, name="classifier", scaling=config.scaling, parents=parents)
    return chips.fit_on_chips(step, listed, settings, described, size=config.chips.size, workers=config.workers)


def fit_mask(step: Step, listed: Step, cues: Step | None, config: Config) -> dict[str, Any]:
    """Train the segmenter on the coarse masks; models/segmenter is its bundle, models/warm-up that of the warm-up.

    Without cues, as for a forecast, all masks are empty.
    """
    size, failed = config.chips.size, cues.value["troubles"] if cues else {}
    # Chips whose cue failed have no mask to learn from.
    rows = [row for row in chips.rows_of(listed, held_out=False) if row["id"] not in failed]
    empty_HW = np.zeros((size, size), np.uint8)
    masks_of = partial(read_mask, cues.value["cues"], rows, size) if cues else lambda _: empty_HW
    learnt = chips.learnable(rows, LABELS, size, read_mask=masks_of)
    held_out = chips.masked(listed, ClassTable(CLASSES), LABELS, config.chips)
    # 1. train every member from a seed of its own
    members, measures = [], []
    for member in range(config.members):
        seed, prefix = config.segmenter.learning.seed + member, str(step.prefix / f"member-{member}")
        learning = config.segmenter.learning.model_copy(update={"seed": seed})
        settings = config.segmenter.model_copy(update={"learning": learning})
        shared = partial(expect_shared, settings)
        setup = models.training_setup(
            step, workers=config.workers, prefix=prefix, expect=shared, described=_segmenter(config)
        )
        measures.append(fit_segmenter(settings, learnt, setup, scaling=config.scaling, held_out=held_out))
        members.append((settings, prefix))
    means = {key: float(np.mean([row[key] for row in measures])) for key in measures[0]}
    # 2. keep their mean, after the warm-up and after all stages
    metres = mean_metres([Chip.from_row(row).source for row in rows])
    known = {"statistics": models.statistics_of(learnt), "metres": metres}
    described, kept = _segmenter(config).model_copy(update=known), {}
    provenance = described.provenance.model_copy(update={"parents": (split_location(listed.value["source"])[0],)})
    for name, stage in (("warm-up", "warm_up"), ("segmenter", None)):
        if stage is None or config.segmenter.warm_up.epochs:
            networks = [trained_segmenter(*member, stage=stage) for member in members]
            model = Ensemble(networks) if len(networks) > 1 else networks[0]
            # Negative chips have no netting, so every pixel above the threshold is a false alarm.
            negatives = [row for row in rows if row["label"] == NO]
            threshold = chips.threshold_at(config.marked, model, negatives, described, size=size)
            facts = {"threshold": threshold, "metrics": {} if stage else means, "provenance": provenance}
            own = "network" if config.appearance and not stage else name  # the model of the map is `segmenter`
            whole = described.model_copy(update={"name": own} | facts)
            samples = () if config.appearance else (held_out or learnt).pairs()
            kept[name] = models.keep_model(step, whole, model, samples=samples)
    return {"bundle": kept["segmenter"], "measures": measures}


def _segmenter(config: Config) -> Bundle:
    """The description of the members together."""
    return models.segmenter_bundle(
        config.segmenter,
        CLASSES,
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        options=config.segmenter.options(channels=len(models.RGB)) | {"members": config.members},
    )


def _mapper(config: Config) -> Bundle:
    """The description of the model that maps the region."""
    network = _segmenter(config)
    return appearance.described(network, config.appearance) if config.appearance else network


METHODS = {
    "cam": "the objects that it marks (cues.method: cam)",
    "concept": "superpixels in the colours that all of them share (cues.method: concept)",
}
"""How coarse masks are made -> its description."""


def write_report(
    step: Step,
    listed: Step,
    drawn: Step,
    predicted: Step,
    polygons: Step,
    measured: Step,
    *,
    network: Step,
    others: tuple[Step | None, Step | None] = (None, None),
) -> dict[str, Any]:
    """The report, with what the map was learnt from and how epochs were selected.

    `others` are the steps of the colour rule and of the certificate, if there are such.
    """
    simple, certified = others
    learnt = f"Learnt from {listed.value[YES]} chips labelled {YES} and {listed.value[NO]} labelled {NO}; "
    if drawn_masks := listed.value.get("masks", 0):
        [measures, *_] = network.value["measures"]
        learnt += (
            f"{drawn_masks} drawn masks selected the segmenter's epoch: accuracy {measures['accuracy']:.3f}, "
            f"F1 {measures['f1']:.3f}, IoU {measures['iou']:.3f} on them."
        )
    else:
        learnt += "no mask was drawn, so the segmenter's last epoch is kept."
    method = runs.read(step.root)["config"]["cues"]["method"]
    caption = f"Chips labelled {YES}, their Grad-CAM++, and the coarse masks of {METHODS[method]} (grey: undecided)."
    compared = baseline.comparison(simple.value, simple.value["product"], name="this map") if simple else None
    extras = report.Extras(labels=learnt, pictures=(("Cues", drawn.value["picture"], caption),), baseline=compared)
    return report.write_report(step, predicted, polygons, measured, extras, certified=certified)


def check(config: Config, region: Region) -> Plan:
    """Plan a run; refuse chips, imagery and weights that it cannot use before it writes anything."""
    labelled = chips.find_chips(region, LABELS, config.chips)
    chips.drawn_masks(labelled, ClassTable(CLASSES), config.chips)
    tiles = mapping.tiles_for(region, _mapper(config), config.map)
    generalize.expect_small(tiles, config.polygons)
    expect_trainable(config.classifier, workers=config.workers)
    evaluate.expect_masks(region, config.truth, [name for _, name, _ in CLASSES])
    for network in (config.classifier, config.segmenter):
        models.expect_weights(network, config.scaling)
    return Plan(tiles, labelled)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    labels = [chip.label for chip in plan.labels or ()]
    # Cues are made of training chips alone.
    training = 1 - config.chips.held_out
    counts = {"cues": round(training * labels.count(YES))}
    if config.cues.method == "concept":
        counts["densities"] = round(training * len(labels))
    learn = partial(_learn, config.model_copy(update={"workers": 0}), region)
    return estimate.by_untrained(
        _mapper(config), plan, config.map, learn=learn, counts=counts, unknown=estimate.by_workers(config.workers)
    )


def _learn(config: Config, region: Region, run: Run) -> None:
    """Run every step before the map in short: few cues, and a segmenter of empty masks, which finds nothing."""
    listed = run.step("chips", chips.list_chips, region, LABELS, config.chips)
    classifier = run.step("classifier", estimate.training, fit_yes_no, listed, config)
    few = run.step("few", _list_few, listed)
    make_cues(run, few, classifier, config.cues, size=config.chips.size, patience=config.map.stall_seconds)
    run.step("segmenter", estimate.training, fit_mask, listed, None, config)


def _list_few(step: Step, listed: Step) -> dict[str, Any]:
    rows = chips.rows_of(listed, held_out=False)
    # As many of each label as a probe times, and one to warm up.
    few = [row for label in LABELS for row in [row for row in rows if row["label"] == label][: estimate.TIMED + 1]]
    write_rows(step.prefix / "chips.parquet", few)
    return {}


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Map green plastic cover over `region`; return the report's path and its headline."""
    plan, size = plan or Plan(), config.chips.size
    listed = run.step("chips", chips.list_chips, region, LABELS, config.chips, listed=plan.labels)
    classifier = run.step("classifier", fit_yes_no, listed, config)
    # 1. coarse masks from the labels, and a segmenter that learns from them
    cues = make_cues(run, listed, classifier, config.cues, size=size, patience=config.map.stall_seconds)
    segmenter = network = run.step("segmenter", fit_mask, listed, cues, config)
    if config.appearance:
        segmenter = run.step("appearance", appearance.fit_cover, listed, network, config.appearance, size)
    # 2. the map, its polygons and its accuracy
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map, tiles=plan.tiles)
    shown = generalize.generalized(run, predicted, config.polygons, region)
    polygons = run.step("polygons", mapping.join_polygons, shown, YES)
    measured = run.step("evaluate", evaluate.compare_truth, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Green plastic cover, {region.name}")
    run.step("qgis", mapping.save_project, predicted, polygons)
    drawn = run.step("pictures", draw_cues, listed, cues, size)
    simple, truth = None, region.located(config.truth)
    if config.baseline and truth:
        simple = run.step("baseline", color_rule.measure_baseline, listed, predicted, truth, size)
    certified = run.step("certificate", certify, predicted, region, config.truth) if config.certificate else None
    parts = (listed, drawn, predicted, polygons, measured)
    written = run.step("report", write_report, *parts, network=network, others=(simple, certified))
    return report.headline(written)
