"""gpc: green plastic cover over a region from a yes or no per chip (Cao & Huang 2022, ISPRS 188, 157-176).

    chips + yes/no --> classifier --> Grad-CAM++ --.
    chips          --> unsupervised objects -------+--> mean CAM per object, Otsu --> coarse masks
    coarse masks   --> segmenter: warm-up, label correction, from scratch --> cover map

No mask is ever drawn. What is not said here is in the modules named by the steps; the settings of the paper are
`configs/gpc/paper.yaml`.
"""

import io
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import matplotlib
import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from rayseg import evaluation, flow, mapping, publication
from rayseg.config import Config as Frozen
from rayseg.errors import DataError
from rayseg.flow import Row, Work
from rayseg.geo import Region
from rayseg.io import catalog, cog, labels
from rayseg.io.labels import Chip
from rayseg.ledger import Account, Ledger
from rayseg.mapping import MapConfig
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.unsupervised import Precision
from rayseg.run import Run, Step
from rayseg.stages.weak import (
    Cam,
    CamCue,
    ConceptCue,
    ReadChip,
    Segment,
    Superpixels,
    WriteCue,
    WriteDensity,
    cue_path,
    density_path,
)
from rayseg.store import put, upath
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, fit_classifier, trained_classifier
from rayseg.train.segmenter import SegmenterConfig, fit_segmenter, trained_segmenter
from rayseg.vision import concept
from rayseg.vision.cues import Objects
from rayseg.vision.fill import mirrored

YES, NO = "gpc", "nongpc"
LABELS = (YES, NO)
CLASSES = ((0, "background", (0, 0, 0)), (1, YES, (0, 158, 115)))
BANDS = ("red", "green", "blue")


class ChipsConfig(Frozen):
    """The labelled chips."""

    source: str | None = None
    """Catalogue of the chips (`catalog.json#collection`); by default the collection `chips` of the region's."""
    size: int = 512
    """Side in px of what is used, the middle of each chip."""
    held_out: float = 0.4
    """Share of the chips of each class kept from training, to choose the classifier's epoch and to measure it."""
    seed: int = 1337
    """Of the division."""


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


class Config(Frozen):
    """Settings of the pipeline; the defaults are the paper's unless `configs/gpc/default.yaml` says otherwise."""

    chips: ChipsConfig = ChipsConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    cues: CuesConfig = CuesConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    map: MapConfig = MapConfig()
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 640
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance of these windows; the rest of a window is margin."""
    workers: int = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    scaling: Scaling = Scaling(mean=(98.3519, 96.9567, 95.5713), std=(52.7343, 45.8798, 44.3465))
    """How chips and imagery become the networks' input; mean and standard deviation of the paper's chips."""
    truth: str | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""


def list_chips(step: Step, region: Region, config: ChipsConfig) -> dict[str, Any]:
    """Find the chips, look at each once, divide them; chips.parquet is what the other steps read."""
    uri, _, collection = (config.source or f"{region.catalog}#chips").partition("#")
    chips = labels.chips_of(catalog.open_items(uri, collection or None))
    unknown = sorted({str(chip.label) for chip in chips} - set(LABELS))
    if unknown:
        raise DataError(f"chips of {uri} have the label {', '.join(unknown)}, expected {YES} or {NO}; correct them")
    for label in LABELS:
        if not any(chip.label == label for chip in chips):
            raise DataError(f"no chip of {uri} is labelled {label}; the classifier needs chips of both, add some")
    rows = [chip.to_row() | {"held_out": held} for chip, held in zip(chips, _held_out(chips, config), strict=True)]
    put(step.prefix / "chips.parquet", _parquet(rows))
    return {label: sum(chip.label == label for chip in chips) for label in LABELS}


def _held_out(chips: list[Chip], config: ChipsConfig) -> list[bool]:
    """Which chips are kept from training: the same share of both labels, drawn by seed."""
    held = np.zeros(len(chips), bool)
    for label in LABELS:
        of_label = np.array([position for position, chip in enumerate(chips) if chip.label == label])
        order = np.random.default_rng((config.seed, LABELS.index(label))).permutation(of_label)
        held[order[: round(config.held_out * len(order))]] = True
    return held.tolist()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _chip_rows(chips: Step, *, held_out: bool) -> list[dict[str, Any]]:
    with (chips.prefix / "chips.parquet").open("rb") as file:
        return [row for row in pq.read_table(file).to_pylist() if row["held_out"] == held_out]


def _as_chips(rows: list[dict[str, Any]], size: int, cues: str | None = None) -> Chips:
    """Chips for training, read when they are needed; with masks if there are cues (chips without one are empty)."""
    found = [Chip.from_row(row) for row in rows]
    mask = partial(_read_mask, cues, found, size) if cues else None
    ids, values = [chip.id for chip in found], [LABELS.index(str(chip.label)) for chip in found]
    return Chips(tuple(ids), tuple(values), partial(_read_image, found, size), mask)


def _read_image(chips: list[Chip], size: int, position: int) -> np.ndarray:
    image_HWC, valid_HW = labels.read_chip(chips[position], size)
    return mirrored(image_HWC.transpose(2, 0, 1), valid_HW).transpose(1, 2, 0) if valid_HW.any() else image_HWC


def _read_mask(cues: str, chips: list[Chip], size: int, position: int) -> np.ndarray:
    if chips[position].label == NO:
        return np.zeros((size, size), np.uint8)
    mask: np.ndarray = cog.read_bands(cue_path(cues, chips[position].id))[0]
    return mask


def fit_yes_no(step: Step, chips: Step, config: Config) -> dict[str, Any]:
    """Train the classifier of chips; models/classifier is its bundle."""
    size, settings = config.chips.size, config.classifier
    _connect(step, config)
    held = _chip_rows(chips, held_out=True)
    measures = fit_classifier(
        settings,
        _as_chips(_chip_rows(chips, held_out=False), size),
        prefix=step.prefix,
        scaling=config.scaling,
        held_out=_as_chips(held, size) if held else None,
        workers=config.workers,
        use_gpu=torch.cuda.is_available(),
    )
    model = trained_classifier(settings, step.prefix, classes=len(LABELS))
    described = Bundle(
        name="classifier",
        task="classification",
        architecture=Architecture(factory="classifier", options=settings.options(classes=len(LABELS), channels=3)),
        classes=tuple((value, name, color) for (value, _, color), name in zip(CLASSES, (NO, YES), strict=True))[::-1],
        bands=BANDS,
        dtype="uint8",
        scaling=config.scaling,
        patch=settings.size,
        stride=settings.size,
        metrics=measures,
        provenance=Provenance(config=settings.model_dump(mode="json")),
    )
    return {"bundle": _keep(step, described, model), "measures": measures}


def _keep(step: Step, described: Bundle, model: torch.nn.Module) -> str:
    prefix = str(upath(step.root) / "models" / described.name)
    bundle.save(prefix, described, model)
    return prefix


def _connect(step: Step, config: Config) -> None:
    if config.workers:
        flow.connect(step.engine.address)


def write_cues(step: Step, chips: Step, classifier: Step, config: CuesConfig, size: int) -> dict[str, Any]:
    """Coarse masks of the positive chips in training, `<step>/<chip>.tif`, by the method chosen."""
    cam = Cam(
        classifier.value["bundle"],
        target=LABELS.index(YES),
        layer=config.layer,
        scales=config.scales,
        flip=config.flip,
    )
    seen = [Work(ReadChip(size)), Work(cam, batch=8, cpus=0.5, gpus=0.5, model=True)]
    rows = _chip_rows(chips, held_out=False)
    decide = {"cam": _decide_by_cam, "concept": _decide_by_concept}[config.method]
    works = [*seen, *decide(step, rows, seen, config), Work(WriteCue(str(step.prefix)))]
    account = _through(step, "", [row for row in rows if row["label"] == YES], works)
    return {"cues": str(step.prefix), "account": account.counts, "troubles": account.troubles}


def _decide_by_cam(_: Step, __: list[Row], ___: list[Work], config: CuesConfig) -> list[Work]:
    segment = Segment(
        config.network,
        iterations=config.iterations,
        min_labels=config.min_labels,
        precision=config.precision,
        seed=config.seed,
    )
    return [Work(segment, cpus=0.5, gpus=0.5, model=True), Work(CamCue(objects=config.objects))]


def _decide_by_concept(step: Step, rows: list[Row], seen: list[Work], config: CuesConfig) -> list[Work]:
    """Learn the concept from all chips first."""
    prefix = str(step.prefix / "densities")
    divide = Work(Superpixels(reduce=config.reduce, min_size=32))
    account = _through(step, "densities", rows, [*seen, divide, Work(WriteDensity(prefix))])
    if account.troubles:
        raise DataError(
            f"{len(account.troubles)} chips could not be read, first {next(iter(account.troubles.items()))}"
        )
    evidence_AB = concept.evidence(*(_densities(prefix, rows, label) for label in LABELS))
    return [divide, Work(ConceptCue(evidence_AB, doubtful=config.doubtful))]


def _densities(prefix: str, rows: list[Row], label: str) -> Iterator[np.ndarray]:
    for row in rows:
        if row["label"] == label:
            yield np.load(io.BytesIO(density_path(prefix, row["id"]).read_bytes()), allow_pickle=False)


def _through(step: Step, part: str, rows: list[Row], works: list[Work]) -> Account:
    """Chips through stages, with a ledger and a manifest of their own."""
    prefix = step.prefix / part if part else step.prefix
    put(prefix / "manifest.parquet", _parquet(rows))
    return flow.run(rows, works, Ledger(str(prefix / "ledger")), step.engine, title="chips")


def fit_mask(step: Step, chips: Step, cues: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter on the coarse masks; models/segmenter is its bundle, models/warm-up what it began with."""
    settings, size = config.segmenter, config.chips.size
    _connect(step, config)
    failed = cues.value["troubles"]
    rows = [row for row in _chip_rows(chips, held_out=False) if row["id"] not in failed]
    measures = fit_segmenter(
        settings,
        _as_chips(rows, size, cues.value["cues"]),
        prefix=step.prefix,
        scaling=config.scaling,
        workers=config.workers,
        use_gpu=torch.cuda.is_available(),
    )
    described = Bundle(
        name="segmenter",
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=settings.options(channels=len(BANDS))),
        classes=CLASSES,
        bands=BANDS,
        dtype="uint8",
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        metrics=measures,
        provenance=Provenance(config=settings.model_dump(mode="json")),
    )
    if settings.warm_up.epochs:
        warm = trained_segmenter(settings, step.prefix, stage="warm_up")
        _keep(step, described.model_copy(update={"name": "warm-up", "metrics": {}}), warm)
    return {"bundle": _keep(step, described, trained_segmenter(settings, step.prefix)), "measures": measures}


def measure(step: Step, predicted: Step, region: Region, truth: str | None) -> dict[str, Any]:
    """Compare the map with its truth, if there is one."""
    if not truth:
        return {}
    return evaluation.evaluate_run(step, predicted, f"{region.catalog}{truth}" if truth.startswith("#") else truth)


def draw_cues(step: Step, chips: Step, cues: Step, size: int) -> dict[str, Any]:
    """A sheet of the first positive chips: chip, CAM, coarse mask (open pixels grey)."""
    rows = [row for row in _chip_rows(chips, held_out=False) if row["label"] == YES]
    columns = []
    for chip in [Chip.from_row(row) for row in rows if row["id"] not in cues.value["troubles"]][:6]:
        image_HWC, _ = labels.read_chip(chip, size)
        mask_HW, cam_HW = cog.read_bands(cue_path(cues.value["cues"], chip.id))
        heat_HWC = (matplotlib.colormaps["inferno"](cam_HW / 254)[..., :3] * 255).astype(np.uint8)
        shown_HW = np.select([mask_HW == 1, mask_HW == 255], [np.uint8(255), np.uint8(110)], np.uint8(0))
        columns.append(np.concatenate([image_HWC, heat_HWC, np.repeat(shown_HW[..., None], 3, axis=2)]))
    content = io.BytesIO()
    matplotlib.image.imsave(content, np.concatenate(columns, axis=1)[:: max(1, size // 256), :: max(1, size // 256)])
    put(step.prefix / "cues.png", content.getvalue())
    return {"picture": f"steps/{step.name}/cues.png"}


def write_report(
    step: Step, chips: Step, drawn: Step, predicted: Step, polygons: Step, measured: Step
) -> dict[str, Any]:
    """The report, with what the map was learnt from."""
    learnt = (
        f"Learnt from {chips.value[YES]} chips labelled {YES} and {chips.value[NO]} labelled {NO}; no mask was drawn."
    )
    caption = "Chips labelled gpc, their Grad-CAM++, and the coarse masks the segmenter began with (grey: left open)."
    extras = publication.Extras(labels=learnt, pictures=(("Cues", drawn.value["picture"], caption),))
    return publication.write_report(step, predicted, polygons, measured, extras)


def run(config: Config, run: Run, region: Region) -> str:
    """Map green plastic cover over `region`; return where the report is and what it says."""
    chips = run.step("chips", list_chips, region, config.chips)
    classifier = run.step("classifier", fit_yes_no, chips, config)
    cues = run.step("cues", write_cues, chips, classifier, config.cues, config.chips.size)
    segmenter = run.step("segmenter", fit_mask, chips, cues, config)
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map)
    polygons = run.step("polygons", mapping.join_polygons, predicted, YES)
    measured = run.step("evaluate", measure, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Green plastic cover, {region.name}")
    drawn = run.step("pictures", draw_cues, chips, cues, config.chips.size)
    report = run.step("report", write_report, chips, drawn, predicted, polygons, measured)
    return publication.headline(report)
