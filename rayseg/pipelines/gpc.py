"""gpc: green plastic cover over a region from a yes or no per chip (Cao & Huang 2022, ISPRS 188, 157-176).

    chips + yes/no --> classifier --> Grad-CAM++ --.
    chips          --> unsupervised objects -------+--> mean CAM per object, Otsu --> coarse masks
    coarse masks   --> segmenter: warm-up, label correction, from scratch --> cover map

No mask is ever drawn. What is not said here is in the modules named by the steps; the settings of the paper are
`configs/gpc/paper.yaml`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rayseg.config import Config as Frozen
from rayseg.config import Workers
from rayseg.engine import cluster
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Run, Step
from rayseg.errors import DataError
from rayseg.geo.region import Region
from rayseg.io import masks
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.encoders import NO_FILES, encoder_name, read_state
from rayseg.models.segmenter import Ensemble
from rayseg.steps import chips, estimate, evaluate, report
from rayseg.steps import map as mapping
from rayseg.steps.chips import ChipsConfig
from rayseg.steps.cues import LABELS, NO, YES, CuesConfig, draw_cues, make_cues, read_mask
from rayseg.steps.map import MapConfig
from rayseg.store import Location
from rayseg.train import probe
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, expect_trainable, fit_classifier, trained_classifier
from rayseg.train.labels import probabilities
from rayseg.train.segmenter import SegmenterConfig, fit_segmenter, trained_segmenter

COLORS = {YES: (0, 158, 115), NO: (0, 0, 0)}
CLASSES = ((0, "background", COLORS[NO]), (1, YES, COLORS[YES]))
BANDS = ("red", "green", "blue")
MOST_CALIBRATED = 500
"""Negative chips that the threshold is taken from, at most."""


class YesNoConfig(ClassifierConfig):
    """The classifier of chips; the defaults are the paper's."""

    network: Literal["chips"] = "chips"
    """A head on an encoder, at whose stages Grad-CAM++ looks."""


class Config(Frozen):
    """Settings of the pipeline; the defaults are the paper's, `configs/gpc/default.yaml` is what we would use today."""

    chips: ChipsConfig = ChipsConfig()
    classifier: YesNoConfig = YesNoConfig()
    cues: CuesConfig = CuesConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    map: MapConfig = MapConfig()
    members: Annotated[int, Field(gt=0)] = 1
    """Segmenters trained from different seeds, of whose logits the map takes the mean; for few chips."""
    marked: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the negative training chips' pixels that the map may mark: sets the threshold; by default it is .5."""
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 640
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance of these windows; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    scaling: Scaling = Scaling(mean=(98.3519, 96.9567, 95.5713), std=(52.7343, 45.8798, 44.3465))
    """How chips and imagery become the networks' input; mean and standard deviation of the paper's chips."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        reduce = self.segmenter.reduce
        mapping.expect_windows(BANDS, self.scaling, patch=self.patch, stride=self.stride, reduce=reduce)
        return self


def fit_yes_no(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Train the classifier of chips; models/classifier is its bundle."""
    size, settings = config.chips.size, config.classifier
    held = chips.rows_of(listed, held_out=True)
    measures = fit_classifier(
        settings,
        chips.learnable(chips.rows_of(listed, held_out=False), LABELS, size),
        prefix=step.prefix,
        scaling=config.scaling,
        held_out=chips.learnable(held, LABELS, size) if held else None,
        workers=config.workers,
        use_gpu=cluster.connect_training(step.engine.address, workers=config.workers),
    )
    model = trained_classifier(settings, step.prefix, classes=len(LABELS))
    described = Bundle(
        name="classifier",
        task="classification",
        architecture=Architecture(factory=settings.factory, options=settings.options(classes=len(LABELS), channels=3)),
        classes=tuple((position, label, color) for position, (label, color) in enumerate(COLORS.items())),
        bands=BANDS,
        dtype="uint8",
        scaling=config.scaling,
        patch=settings.size,
        stride=settings.size,
        metrics=measures,
        provenance=Provenance(config=settings.model_dump(mode="json"), parents=(_catalog_of(listed),)),
    )
    return {"bundle": mapping.keep_model(step, described, model), "measures": measures}


def _catalog_of(listed: Step) -> str:
    """The catalogue of the chips."""
    source: str = listed.value["source"]
    return source.partition("#")[0]


def fit_mask(step: Step, listed: Step, cues: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter on the coarse masks; models/segmenter is its bundle, models/warm-up what it began with."""
    rows = [row for row in chips.rows_of(listed, held_out=False) if row["id"] not in cues.value["troubles"]]
    return _fit_members(step, listed, rows, partial(read_mask, cues.value["cues"], rows, config.chips.size), config)


def _fit_members(
    step: Step, listed: Step, rows: list[Row], masks_of: Callable[[int], np.ndarray], config: Config
) -> dict[str, Any]:
    learnt = chips.learnable(rows, LABELS, config.chips.size, read_mask=masks_of)
    measures = [_fit_member(step, member, learnt, config) for member in range(config.members)]
    kept = {}
    for name, stage in (("warm-up", "warm_up"), ("segmenter", None)):
        if stage is None or config.segmenter.warm_up.epochs:
            model = _trained(step, stage, config)
            threshold = _threshold(model, rows, config)
            of_all = measures if name == "segmenter" else []
            described = _described(config, name, threshold=threshold, measures=of_all, parents=(_catalog_of(listed),))
            kept[name] = mapping.keep_model(step, described, model)
    return {"bundle": kept["segmenter"], "measures": measures}


def _member(step: Step, member: int, config: Config) -> tuple[SegmenterConfig, str]:
    """Settings and prefix of one of the networks that are averaged."""
    learning = config.segmenter.learning.model_copy(update={"seed": config.segmenter.learning.seed + member})
    settings = config.segmenter.model_copy(update={"learning": learning})
    return settings, str(step.prefix / f"member-{member}")


def _fit_member(step: Step, member: int, learnt: Chips, config: Config) -> dict[str, float]:
    settings, prefix = _member(step, member, config)
    return fit_segmenter(
        settings,
        learnt,
        prefix=prefix,
        scaling=config.scaling,
        workers=config.workers,
        use_gpu=cluster.connect_training(step.engine.address, workers=config.workers),
    )


def _trained(step: Step, stage: str | None, config: Config) -> torch.nn.Module:
    """The network, or the mean of the networks, at the end of a stage."""
    members = [trained_segmenter(*_member(step, k, config), stage=stage) for k in range(config.members)]
    return Ensemble(members) if len(members) > 1 else members[0]


def _described(
    config: Config,
    name: str = "segmenter",
    *,
    threshold: float = 0.5,
    measures: Sequence[dict[str, float]] = (),
    parents: tuple[str, ...] = (),
) -> Bundle:
    """The bundle of the members together; its metrics are the means of theirs."""
    options = config.segmenter.options(channels=len(BANDS)) | {"members": config.members}
    return Bundle(
        name=name,
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=options),
        classes=CLASSES,
        bands=BANDS,
        dtype="uint8",
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        threshold=threshold,
        metrics={key: float(np.mean([of_one[key] for of_one in measures])) for key in measures[0]} if measures else {},
        provenance=Provenance(config=config.segmenter.model_dump(mode="json"), parents=parents),
    )


@torch.inference_mode()
def _threshold(model: torch.nn.Module, rows: list[Row], config: Config) -> float:
    """The probability above which `config.marked` of the negative chips' pixels lie; .5 if that is not asked for."""
    if config.marked is None:
        return 0.5
    size, unit = config.chips.size, 32 * config.segmenter.reduce
    counts = np.zeros(1001, np.int64)
    negatives = [row for row in rows if row["label"] == NO][:MOST_CALIBRATED]
    for position in probe.batches(range(len(negatives)), len(negatives)):
        image_CHW = chips.read_image(negatives, size, position).transpose(2, 0, 1)
        normal = config.scaling.normalize(torch.from_numpy(image_CHW.copy())[None])
        p_HW = probabilities(model, normal, unit=unit, flip=False)[0, 0].numpy()
        counts += np.bincount(np.rint(p_HW * 1000).astype(np.int64).ravel(), minlength=1001)
    if not negatives:
        raise DataError("no negative chip is left to set the threshold by; lower chips.held_out, or leave out `marked`")
    low_enough = counts[::-1].cumsum()[::-1] / counts.sum() <= config.marked
    return float(np.argmax(low_enough)) / 1000 if low_enough.any() else 1.0


def measure(step: Step, predicted: Step, region: Region, truth: str | None) -> dict[str, Any]:
    """Compare the map with its truth, if there is one."""
    located = region.located(truth)
    return evaluate.evaluate_run(step, predicted, located) if located else {}


def write_report(
    step: Step, listed: Step, drawn: Step, predicted: Step, polygons: Step, measured: Step
) -> dict[str, Any]:
    """The report, with what the map was learnt from."""
    learnt = (
        f"Learnt from {listed.value[YES]} chips labelled {YES} and {listed.value[NO]} labelled {NO}; no mask was drawn."
    )
    caption = "Chips labelled gpc, their Grad-CAM++, and the coarse masks the segmenter began with (grey: left open)."
    extras = report.Extras(labels=learnt, pictures=(("Cues", drawn.value["picture"], caption),))
    return report.write_report(step, predicted, polygons, measured, extras)


def check(config: Config, region: Region) -> None:
    """Refuse, before anything is written, chips, imagery and weights that cannot be used."""
    chips.find_chips(region, LABELS, config.chips)
    mapping.plan(region, _described(config), config.map)
    expect_trainable(config.classifier, workers=config.workers)
    if truth := region.located(config.truth):
        masks.masks_of(truth, names=[name for _, name, _ in CLASSES])
    for network in (config.classifier, config.segmenter):
        encoder_name(network.encoder)
        if network.weights not in NO_FILES:
            read_state(network.weights)


def forecast(config: Config, region: Region) -> estimate.Forecast:
    """What is known of a run before it is begun."""
    found = [chip.label for chip in chips.find_chips(region, LABELS, config.chips)]
    learnt = 1 - config.chips.held_out
    counts = {"cues": round(learnt * found.count(YES))}
    if config.cues.method == "concept":
        counts["densities"] = round(learnt * len(found))
    learn = partial(_learn, config.model_copy(update={"workers": 0}), region)
    return estimate.by_untrained(
        _described(config), region, config.map, learn=learn, counts=counts, unknown=estimate.by_workers(config.workers)
    )


def _learn(config: Config, region: Region, run: Run) -> None:
    """All before the map, with trainings that are cut short, cues of a few chips, and masks that are empty.

    The map is then timed with a network of zeros, for what is learnt from such masks is of no use.
    """
    listed = run.step("chips", chips.list_chips, region, LABELS, config.chips)
    classifier = run.step("classifier", estimate.training, fit_yes_no, listed, config)
    few = run.step("few", _list_few, listed)
    _cues(run, few, classifier, config)
    run.step("segmenter", estimate.training, _fit_blank, listed, config)


def _list_few(step: Step, listed: Step) -> dict[str, Any]:
    rows = chips.rows_of(listed, held_out=False)
    few = [row for label in LABELS for row in [row for row in rows if row["label"] == label][: estimate.TIMED + 1]]
    write_rows(step.prefix / "chips.parquet", few)
    return {}


def _fit_blank(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    size = config.chips.size
    rows = chips.rows_of(listed, held_out=False)
    return _fit_members(step, listed, rows, lambda _: np.zeros((size, size), np.uint8), config)


def _cues(run: Run, listed: Step, classifier: Step, config: Config) -> Step:
    return make_cues(run, listed, classifier, config.cues, size=config.chips.size, patience=config.map.stall_seconds)


def run(config: Config, run: Run, region: Region) -> str:
    """Map green plastic cover over `region`; return where the report is and what it says."""
    listed = run.step("chips", chips.list_chips, region, LABELS, config.chips)
    classifier = run.step("classifier", fit_yes_no, listed, config)
    cues = _cues(run, listed, classifier, config)
    segmenter = run.step("segmenter", fit_mask, listed, cues, config)
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map)
    polygons = run.step("polygons", mapping.join_polygons, predicted, YES)
    measured = run.step("evaluate", measure, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Green plastic cover, {region.name}")
    drawn = run.step("pictures", draw_cues, listed, cues, config.chips.size)
    written = run.step("report", write_report, listed, drawn, predicted, polygons, measured)
    return report.headline(written)
