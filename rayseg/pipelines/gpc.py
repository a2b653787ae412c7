"""gpc: green plastic cover over a region from a yes or no per chip (Cao & Huang 2022, ISPRS 188, 157-176).

    chips + yes/no --> classifier --> Grad-CAM++ --.
    chips          --> unsupervised objects -------+--> mean CAM per object, Otsu --> coarse masks
    coarse masks   --> segmenter: warm-up, label correction, from scratch --> cover map

No mask is ever drawn. What is not said here is in the modules named by the steps; the settings of the paper are
`configs/gpc/paper.yaml`.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import matplotlib
import matplotlib.image
import numpy as np
import torch
from pydantic import Field, model_validator

from rayseg import chips, cluster, evaluation, mapping, planning, publication
from rayseg.chips import ChipsConfig
from rayseg.config import Config as Frozen
from rayseg.errors import DataError
from rayseg.flow import Row, Work
from rayseg.geo import Region
from rayseg.io import cog, masks
from rayseg.mapping import MapConfig
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.encoders import NO_FILES, encoder_name, read_state
from rayseg.models.segmenter import Ensemble
from rayseg.models.unsupervised import Precision
from rayseg.rowfile import write_rows
from rayseg.run import Run, Step
from rayseg.stages.cues import (
    CamCue,
    ConceptCue,
    ReadChip,
    Superpixels,
    WriteCue,
    WriteDensity,
    cue_path,
    density_path,
)
from rayseg.stages.weak import Cam, Segment
from rayseg.store import Location, put
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, expect_trainable, fit_classifier, trained_classifier
from rayseg.train.labels import probabilities
from rayseg.train.segmenter import SegmenterConfig, fit_segmenter, trained_segmenter
from rayseg.vision import concept
from rayseg.vision.cues import Objects

YES, NO = "gpc", "nongpc"
LABELS = (YES, NO)
COLORS = {YES: (0, 158, 115), NO: (0, 0, 0)}
CLASSES = ((0, "background", COLORS[NO]), (1, YES, COLORS[YES]))
BANDS = ("red", "green", "blue")
BATCH = 8
"""Chips that are mapped at once; they are read together, so that a batch is the same whichever engine makes it."""
MOST_CALIBRATED = 500
"""Negative chips that the threshold is taken from, at most."""


class CuesConfig(Frozen):
    """From labels to coarse masks."""

    method: Literal["cam", "concept"] = "cam"
    """cam: objects whose mean Grad-CAM++ is above Otsu's threshold (the paper's). concept: superpixels of the colours
    that all positive chips share and no negative chip has (diverse density), with the CAM as a hint; for few chips."""
    layer: int = -1
    """Encoder stage at which Grad-CAM++ is taken; -1 is the last."""
    scales: tuple[float, ...] = (1.0,)
    """The map is averaged over the chip at these scales."""
    flip: bool = False
    """And over its mirror image."""
    network: Literal["v1", "v2"] = "v1"
    """cam: how objects are found; v1 votes in superpixels (the paper's), v2 (Kim et al. 2020) does without."""
    iterations: int = 64
    """cam: training steps of the object network on each chip."""
    min_labels: int = 4
    """cam: they end when fewer labels remain."""
    precision: Precision = "float32"
    """cam: bfloat16 is faster where the machine has it."""
    seed: int = 1943
    """cam: of the object network's initial weights."""
    objects: Objects = "labels"
    """cam: an object is all pixels of a label, or a connected component of it."""
    reduce: int = 2
    """concept: side in px of the squares averaged before superpixels are found."""
    doubtful: float = -1.0
    """concept: evidence (log ratio) above which a superpixel outside the concept is left open."""


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
    workers: int = 0
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


def _read_mask(cues: str, rows: list[Row], size: int, position: int) -> np.ndarray:
    """The coarse mask of a chip; that of a negative one is empty."""
    if rows[position]["label"] == NO:
        return np.zeros((size, size), np.uint8)
    mask: np.ndarray = cog.read_bands(cue_path(cues, rows[position]["id"]))[0]
    return mask


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


def write_cues(
    step: Step, listed: Step, classifier: Step, config: CuesConfig, size: int, patience: float
) -> dict[str, Any]:
    """Coarse masks of the positive chips in training, `<step>/<chip>.tif`, by the method chosen."""
    cam = Cam(
        classifier.value["bundle"],
        target=LABELS.index(YES),
        layer=config.layer,
        scales=config.scales,
        flip=config.flip,
    )
    seen = [Work(ReadChip(size), batch=BATCH), Work(cam, batch=BATCH, cpus=0.5, gpus=0.5, model=True)]
    rows = chips.rows_of(listed, held_out=False)
    decide = {"cam": _decide_by_cam, "concept": _decide_by_concept}[config.method]
    works = [*seen, *decide(step, rows, seen, config, patience), Work(WriteCue(str(step.prefix)))]
    found = _through(step, [row for row in rows if row["label"] == YES], works, patience)
    return {"cues": str(step.prefix), **found}


def _decide_by_cam(_: Step, __: list[Row], ___: list[Work], config: CuesConfig, ____: float) -> list[Work]:
    segment = Segment(
        config.network,
        iterations=config.iterations,
        min_labels=config.min_labels,
        precision=config.precision,
        seed=config.seed,
    )
    return [Work(segment, cpus=0.5, gpus=0.5), Work(CamCue(objects=config.objects))]


def _decide_by_concept(
    step: Step, rows: list[Row], seen: list[Work], config: CuesConfig, patience: float
) -> list[Work]:
    """Learn the concept from all chips first."""
    before = replace(step, name=f"{step.name}/densities")
    prefix, divide = str(before.prefix), Work(Superpixels(reduce=config.reduce, min_size=32))
    troubles = _through(before, rows, [*seen, divide, Work(WriteDensity(prefix))], patience)["troubles"]
    if troubles:
        chip, why = next(iter(troubles.items()))
        raise DataError(
            f"{len(troubles)} of {len(rows)} chips cannot be used, first {chip} ({why}); all are needed to "
            f"learn the concept: mend them, then: rayseg retry {step.root}"
        )
    evidence_AB = concept.evidence(*(_densities(prefix, rows, label) for label in LABELS))
    return [divide, Work(ConceptCue(evidence_AB, doubtful=config.doubtful))]


def _densities(prefix: str, rows: list[Row], label: str) -> Iterator[np.ndarray]:
    for row in rows:
        if row["label"] == label:
            yield np.load(io.BytesIO(density_path(prefix, row["id"]).read_bytes()), allow_pickle=False)


def _through(step: Step, rows: list[Row], works: list[Work], patience: float) -> dict[str, Any]:
    write_rows(step.prefix / "manifest.parquet", rows)
    return mapping.through(step, rows, works, title="chips", patience=patience)


def fit_mask(step: Step, listed: Step, cues: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter on the coarse masks; models/segmenter is its bundle, models/warm-up what it began with."""
    rows = [row for row in chips.rows_of(listed, held_out=False) if row["id"] not in cues.value["troubles"]]
    read_mask = partial(_read_mask, cues.value["cues"], rows, config.chips.size)
    learnt = chips.learnable(rows, LABELS, config.chips.size, read_mask=read_mask)
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
    for position in range(len(negatives)):
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
    return evaluation.evaluate_run(step, predicted, located) if located else {}


def draw_cues(step: Step, listed: Step, cues: Step, size: int) -> dict[str, Any]:
    """A sheet of the first positive chips: chip, CAM, coarse mask (open pixels grey)."""
    troubled = cues.value["troubles"]
    rows = [row for row in chips.rows_of(listed, held_out=False) if row["label"] == YES and row["id"] not in troubled][
        :6
    ]
    columns = []
    for position, row in enumerate(rows):
        image_HWC = chips.read_image(rows, size, position)
        mask_HW, cam_HW = cog.read_bands(cue_path(cues.value["cues"], row["id"]))
        heat_HWC = (matplotlib.colormaps["inferno"](cam_HW / 254)[..., :3] * 255).astype(np.uint8)
        shown_HW = np.select([mask_HW == 1, mask_HW == 255], [np.uint8(255), np.uint8(110)], np.uint8(0))
        columns.append(np.concatenate([image_HWC, heat_HWC, np.repeat(shown_HW[..., None], 3, axis=2)]))
    content = io.BytesIO()
    matplotlib.image.imsave(content, np.concatenate(columns, axis=1)[:: max(1, size // 256), :: max(1, size // 256)])
    put(step.prefix / "cues.png", content.getvalue())
    return {"picture": f"steps/{step.name}/cues.png"}


def write_report(
    step: Step, listed: Step, drawn: Step, predicted: Step, polygons: Step, measured: Step
) -> dict[str, Any]:
    """The report, with what the map was learnt from."""
    learnt = (
        f"Learnt from {listed.value[YES]} chips labelled {YES} and {listed.value[NO]} labelled {NO}; no mask was drawn."
    )
    caption = "Chips labelled gpc, their Grad-CAM++, and the coarse masks the segmenter began with (grey: left open)."
    extras = publication.Extras(labels=learnt, pictures=(("Cues", drawn.value["picture"], caption),))
    return publication.write_report(step, predicted, polygons, measured, extras)


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


def forecast(config: Config, region: Region) -> planning.Forecast:
    """What is known of a run before it is begun; what training takes shows only while it is done."""
    found = chips.find_chips(region, LABELS, config.chips)
    stages = (config.segmenter.warm_up, config.segmenter.correction, config.segmenter.scratch)
    epochs = sum(stage.epochs for stage in stages)
    unknown = [
        f"training: {config.classifier.epochs} epochs of a classifier and {epochs} of {config.members} segmenters on "
        f"{len(found)} chips, and their cues; the share of an epoch that is done stands in the run's progress"
    ]
    return planning.by_untrained(_described(config), region, config.map, unknown=unknown)


def run(config: Config, run: Run, region: Region) -> str:
    """Map green plastic cover over `region`; return where the report is and what it says."""
    listed = run.step("chips", chips.list_chips, region, LABELS, config.chips)
    classifier = run.step("classifier", fit_yes_no, listed, config)
    cues = run.step("cues", write_cues, listed, classifier, config.cues, config.chips.size, config.map.stall_seconds)
    segmenter = run.step("segmenter", fit_mask, listed, cues, config)
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map)
    polygons = run.step("polygons", mapping.join_polygons, predicted, YES)
    measured = run.step("evaluate", measure, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Green plastic cover, {region.name}")
    drawn = run.step("pictures", draw_cues, listed, cues, config.chips.size)
    report = run.step("report", write_report, listed, drawn, predicted, polygons, measured)
    return publication.headline(report)
