"""Coarse masks from image-level labels: the steps of gpc between classifier and segmenter."""

import io
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import matplotlib
import matplotlib.image
import numpy as np
from pydantic import Field

from rayseg.config import Config
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Run, Step
from rayseg.errors import DataError
from rayseg.io import cog
from rayseg.io.tables import read_array
from rayseg.models.unsupervised import Precision
from rayseg.stages.decide_cues import (
    CamCue,
    ConceptCue,
    ReadChip,
    Superpixels,
    WriteCue,
    WriteDensity,
    cue_path,
    density_path,
)
from rayseg.stages.locate import Cam, Segment
from rayseg.stages.rows import ChipRow
from rayseg.steps import chips
from rayseg.steps import map as mapping
from rayseg.store import put
from rayseg.vision import concept
from rayseg.vision.coarse_masks import Objects

YES, NO = "gpc", "nongpc"
LABELS = (YES, NO)
BATCH = 8
"""Chips per batch; reading and CAM use the same batch size, so that batches are identical on every engine."""


class CuesConfig(Config):
    """Settings for coarse masks from image-level labels."""

    method: Literal["cam", "concept"] = "cam"
    """cam: objects whose mean Grad-CAM++ exceeds Otsu's threshold (the paper's method). concept: superpixels of the
    colours that all positive chips share and no negative chip has (diverse density), with the CAM as a prior; for few
    chips."""
    layer: int = -1
    """Encoder stage at which Grad-CAM++ is taken; -1 is the last."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    """Scales of the chip over which the CAM is averaged."""
    flip: bool = False
    """Whether to average the CAM over the mirrored chip as well."""
    network: Literal["v1", "v2"] = "v1"
    """cam: unsupervised segmentation method; v1 takes a vote in superpixels (the paper's), v2 (Kim et al. 2020) uses no
    superpixels."""
    iterations: Annotated[int, Field(gt=0)] = 64
    """cam: training steps of the object network on each chip."""
    min_labels: Annotated[int, Field(gt=1)] = 4
    """cam: training stops when fewer labels remain."""
    precision: Precision = "float32"
    """cam: bfloat16 is faster on hardware that supports it."""
    seed: int = 1943
    """cam: seed of the object network's initial weights."""
    objects: Objects = "labels"
    """cam: an object is all pixels of a label, or a connected component of it."""
    reduce: Annotated[int, Field(gt=0)] = 2
    """concept: side in px of the blocks that are averaged before superpixels are computed."""
    doubtful: float = -1.0
    """concept: evidence (log ratio) above which a superpixel outside the concept stays undecided."""


def make_cues(run: Run, listed: Step, classifier: Step, settings: CuesConfig, *, size: int, patience: float) -> Step:
    """Run the steps from labels to coarse masks: `densities` (method "concept" only) and `cues`."""
    # The concept needs the colours of all chips, negative ones too, before the first chip can be decided.
    if settings.method == "cam":
        return run.step("cues", write_cues, listed, classifier, None, settings, size, patience)
    densities = run.step("densities", write_densities, listed, classifier, settings, size, patience)
    return run.step("cues", write_cues, listed, classifier, densities, settings, size, patience)


def write_densities(
    step: Step, listed: Step, classifier: Step, config: CuesConfig, size: int, patience: float
) -> dict[str, Any]:
    """Write the superpixel colours of all training chips, `<step>/<chip>.npy`; the concept is learned from them."""
    rows = chips.rows_of(listed, held_out=False)
    works = [*_seen(classifier, config, size), _divide(config), Work(WriteDensity(str(step.prefix)))]
    troubles = _through(step, rows, works, patience)["troubles"]
    # A missing negative chip would leave its colours in the concept.
    if troubles:
        chip, why = next(iter(troubles.items()))
        raise DataError(
            f"{len(troubles)} of {len(rows)} chips cannot be used, first {chip} ({why}); the concept needs "
            f"all of them; fix the files, then run: rayseg retry {step.root}"
        )
    return {}


def write_cues(
    step: Step,
    listed: Step,
    classifier: Step,
    densities: Step | None,
    config: CuesConfig,
    size: int,
    patience: float,
) -> dict[str, Any]:
    """Write coarse masks of the positive training chips, `<step>/<chip>.tif`; by the concept if densities exist."""
    rows = chips.rows_of(listed, held_out=False)
    positive = [row for row in rows if row["label"] == YES]
    # The concept needs superpixels alone; Grad-CAM++ needs objects of a network trained on each chip.
    if densities:
        decide = [_divide(config), Work(ConceptCue(evidence_in(densities, rows), doubtful=config.doubtful))]
    else:
        segment = Segment(
            config.network,
            iterations=config.iterations,
            min_labels=config.min_labels,
            precision=config.precision,
            seed=config.seed,
        )
        decide = [Work(segment, cpus=0.5, gpus=0.5), Work(CamCue(objects=config.objects))]
    works = [*_seen(classifier, config, size), *decide, Work(WriteCue(str(step.prefix)))]
    return {"cues": str(step.prefix), **_through(step, positive, works, patience)}


def evidence_in(densities: Step, rows: list[Row]) -> concept.Plane:
    """The evidence of the concept: colours that all positive chips have and no negative one, from their densities."""

    def planes(label: str) -> Iterator[concept.Plane]:
        for row in rows:
            if row["label"] == label:
                yield read_array(density_path(str(densities.prefix), row["id"]))

    return concept.evidence(*map(planes, LABELS))


def _seen(classifier: Step, config: CuesConfig, size: int) -> list[Work]:
    cam = Cam(
        classifier.value["bundle"],
        target=LABELS.index(YES),
        layer=config.layer,
        scales=config.scales,
        flip=config.flip,
    )
    return [Work(ReadChip(size), batch=BATCH), Work(cam, batch=BATCH, cpus=0.5, gpus=0.5, model=True)]


def _divide(config: CuesConfig) -> Work:
    return Work(Superpixels(reduce=config.reduce, min_size=32))


def _through(step: Step, rows: list[Row], works: list[Work], patience: float) -> dict[str, Any]:
    write_rows(step.manifest, rows)
    return mapping.through(step, rows, works, record=ChipRow.from_row, title="chips", patience=patience)


def read_mask(cues: str, rows: list[Row], size: int, position: int) -> np.ndarray:
    """The coarse mask of a chip; the mask of a negative chip is all background."""
    if rows[position]["label"] == NO:
        return np.zeros((size, size), np.uint8)
    mask: np.ndarray = cog.read_bands(cue_path(cues, rows[position]["id"]))[0]
    return mask


def draw_cues(step: Step, listed: Step, cues: Step, size: int) -> dict[str, Any]:
    """Draw a contact sheet of the first positive chips: chip, CAM, coarse mask (undecided pixels are grey)."""
    # Chips that failed have no file.
    troubled = cues.value["troubles"]
    rows = [row for row in chips.rows_of(listed, held_out=False) if row["label"] == YES and row["id"] not in troubled][
        :6
    ]
    columns = []
    for position, row in enumerate(rows):
        image_HWC = chips.read_image(rows, size, position)
        # A cue has two bands: its classes, and the CAM that they come from.
        mask_HW, cam_HW = cog.read_bands(cue_path(cues.value["cues"], row["id"]))
        heat_HWC = (matplotlib.colormaps["inferno"](cam_HW / 254)[..., :3] * 255).astype(np.uint8)
        shown_HW = np.select([mask_HW == 1, mask_HW == 255], [np.uint8(255), np.uint8(110)], np.uint8(0))
        columns.append(np.concatenate([image_HWC, heat_HWC, np.repeat(shown_HW[..., None], 3, axis=2)]))
    content = io.BytesIO()
    matplotlib.image.imsave(content, np.concatenate(columns, axis=1)[:: max(1, size // 256), :: max(1, size // 256)])
    put(step.prefix / "cues.png", content.getvalue())
    return {"picture": f"steps/{step.name}/cues.png"}
