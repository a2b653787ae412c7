"""Learn a network for fields, their boundaries and the background, and the level at which a watershed divides its map.

    images + plots (masks of ids, polygons) --> classes background, field, boundary --> segmenter --> bundle
    bundle + validation images --> the level with the highest F1 of objects

The classes are written as masks below the step, so that training reads them as it reads those of landcover.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from rayseg.config import Config, added
from rayseg.engine.run import Step
from rayseg.errors import DataError
from rayseg.geo.region import Region
from rayseg.io import cog, instances, scenes
from rayseg.io.instances import Ids, Polygons
from rayseg.io.rasters import read, source_of_file
from rayseg.io.scenes import LabelledImage
from rayseg.metrics import MATCHED
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Scaling
from rayseg.stages.boundaries import BoundaryProposer, expect_boundaries
from rayseg.stages.to_rgb import ImageConfig, check_source, eight_bit
from rayseg.steps import labelled, models
from rayseg.steps import map as mapping
from rayseg.store import Location
from rayseg.train import supervised
from rayseg.train.augment import Augment
from rayseg.train.learning import Learning, Schedule, trained
from rayseg.train.supervised import Labelled, PixelLoss, SupervisedConfig
from rayseg.train.windows import Sampling, Windows
from rayseg.vision.boundaries import classes_of, divided
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "background", (0, 0, 0)), (1, "field", (0, 158, 115)), (2, "boundary", (230, 159, 0))))
LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
JUDGED = 24
"""Most validation images by which the level is chosen."""


class BoundariesConfig(Config):
    """The plots to learn from, and the network; the defaults are for tens of chips and a CPU."""

    model: Location | None = None
    """Prefix of a trained bundle; without one, a network is trained."""
    source: Location | None = None
    """A folder of `images` and `masks` of ids, or `catalog.json#collection`; by default the region's."""
    masks: Location | None = None
    """With a catalogue: its masks, as `catalog.json#collection/asset`, or `#collection/asset` of the region's."""
    polygons: Location | None = None
    """In place of masks: plots as polygons (GeoParquet, fiboa, GeoJSON), or a folder of LabelMe's JSONs."""
    validation: tuple[str, ...] = ()
    """Scenes by which the level is chosen; by default a random sample. Name them where images overlap."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the scenes in the random sample."""
    seed: int = 1337
    """Seed of the random sample."""
    segmenter: SupervisedConfig = SupervisedConfig(
        architecture="unet",
        encoder="tf_efficientnet_lite0",
        enlarge=2,
        epochs=4,
        schedule=Schedule(kind="cos", rate=2e-3, warm_up=1.0),
        loss=PixelLoss(weights=(1.0, 1.0, 2.0)),
        sampling=Sampling(size=128, windows=400),
        learning=Learning(batch=8, optimizer="adamw", weight_decay=1e-4, encoder_rate=0.3, half=True),
        augment=Augment(
            crop="random",
            scale=(0.75, 1.35),
            quadrants=0.0,
            rotate=0.75,
            jitter=0.8,
            brightness=0.25,
            cast=0.1,
            contrast=0.25,
            saturation=(0.7, 1.3),
            hue=0.02,
        ),
        every=4,
    )
    """The network and its training."""
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 288
    """Side in px of the network's window."""
    stride: Annotated[int, Field(gt=0)] = 256
    """Distance of these windows in px."""
    slivers: Annotated[float, Field(ge=0)] = 6.0
    """Inscribed radius in px below which a plot goes to its neighbours."""
    background: Annotated[float, Field(gt=0, le=1)] = added(default=1.0)
    """Mean probability of the background in a plot above which it is left out; 1 keeps all plots."""


def find_labelled(region: Region, config: BoundariesConfig, kind: ImageConfig) -> list[LabelledImage]:
    """The images to learn from.

    Raises:
        ConfigError: neither the region nor the configuration names images.
        DataError: they have no masks, there are too few, or they cannot be used.
    """
    images = labelled.find_images(region, config.source, config.masks, table=None, setting="boundaries.source")
    kept = images if config.polygons else [image for image in images if image.masks]
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} of the {len(images)} images to learn boundaries from have masks, expected at least 2; put "
            "masks of ids of the same names into a folder masks next to images, or set boundaries.polygons"
        )
    for image in kept:
        check_source(image.image, kind)
    # For its errors, before polygons are read.
    scenes.split(kept, validation=config.validation, share=config.share, seed=config.seed)
    if config.polygons:
        polygons = Polygons.open(config.polygons)
        kept = [image for image in kept if (polygons.ids(image.grid, image.window) > 0).any()]
        if len(kept) < 2:
            raise DataError(
                f"{len(kept)} of the {len(images)} images hold polygons of {config.polygons}, expected at least 2; "
                "give polygons that lie on the images; for images without a CRS, polygons in pixels with a column "
                "image that names them"
            )
    return kept


def described_by(config: BoundariesConfig, kind: ImageConfig) -> Bundle:
    """The description of the network before it is trained."""
    # The encoder expects 0..255 of RGB: the range that becomes 8-bit is mapped to it.
    expected = models.input_scaling(config.segmenter.encoder)
    size = (kind.high - kind.low) / 255
    mean, std = (tuple(values[: len(kind.bands)]) for values in (expected.mean, expected.std))
    scaling = Scaling(mean=tuple(kind.low + value * size for value in mean), std=tuple(value * size for value in std))
    return models.segmenter_bundle(
        config.segmenter,
        TABLE.classes,
        scaling=scaling,
        patch=config.patch,
        stride=config.stride,
        bands=kind.bands,
        dtype=kind.dtype,
    ).model_copy(update={"name": "boundaries"})


def check(region: Region, config: BoundariesConfig, kind: ImageConfig, *, workers: int) -> list[LabelledImage] | None:
    """Refuse a model, or images and a network, that cannot be used; return the images to learn from."""
    if config.model:
        expect_boundaries(bundle.description(config.model), kind)
        return None
    images = find_labelled(region, config, kind)
    supervised.expect_supervisable(config.segmenter, classes=len(TABLE.classes), workers=workers)
    models.expect_weights(config.segmenter)
    bundle.blank(described_by(config, kind))
    return images


def learn(
    step: Step,
    region: Region,
    config: BoundariesConfig,
    kind: ImageConfig,
    workers: int,
    *,
    listed: Sequence[LabelledImage] | None = None,
) -> dict[str, Any]:
    """Train the network and choose the level; models/boundaries is the bundle. A given model is only loaded."""
    if config.model:
        return mapping.load_model(step, config.model)
    # 1. classes of all images, as masks below the step
    images = listed or find_labelled(region, config, kind)
    polygons = Polygons.open(config.polygons) if config.polygons else None
    classes = []
    for image in images:
        path = step.prefix / "masks" / f"{image.id}.tif"
        cog.write_classes(path, classes_of(_ids(image, polygons)), image.grid, image.window, TABLE)
        classes.append(replace(image, masks=(source_of_file(str(path), image.id),)))
    parts = scenes.split(classes, validation=config.validation, share=config.share, seed=config.seed)
    training, validation = (_labelled(part, config, kind) for part in parts)
    # 2. the network
    described, settings = described_by(config, kind), config.segmenter
    measures = supervised.fit_supervised(
        settings,
        training,
        validation,
        models.training_setup(
            step,
            workers=workers,
            expect=partial(supervised.expect_supervisable, config.segmenter, classes=len(TABLE.classes)),
            described=described,
        ),
        scaling=described.scaling,
        on_ray=step.engine.kind == "ray",
    )
    net = settings.build(classes=len(TABLE.classes), channels=len(kind.bands), weights="none")
    described = described.model_copy(update={"metrics": measures, "level": LEVELS[0]})
    prefix = models.keep_model(step, described, model := trained(net, step.prefix))
    # 3. the level at which the plots of validation images are found best
    by_id = {image.id: image for image in images}
    judged = [by_id[image.id] for image in parts[1]][:JUDGED]
    scores = _scores(BoundaryProposer(prefix, kind, config.slivers, background=config.background), judged, polygons)
    level = max(LEVELS, key=lambda at: scores[at])
    measures = measures | {"f1": scores[level]}
    models.keep_model(step, described.model_copy(update={"metrics": measures, "level": level}), model)
    return {"bundle": prefix, "measures": measures, "level": level, "images": len(images)}


def _ids(image: LabelledImage, polygons: Polygons | None) -> Ids:
    """Ids of a whole image."""
    if polygons:
        return polygons.ids(image.grid, image.window)
    masks = scenes.masks_on(image)
    return instances.read_ids(masks, image.grid, image.window)


def _labelled(images: Sequence[LabelledImage], config: BoundariesConfig, kind: ImageConfig) -> Labelled:
    counts = scenes.count_all(images, TABLE, cell=config.segmenter.sampling.cell)
    return Labelled(Windows(tuple(images), kind.bands, TABLE), tuple(counts))


def _scores(
    proposer: BoundaryProposer, images: Sequence[LabelledImage], polygons: Polygons | None
) -> dict[float, float]:
    """F1 of objects at each level, over all images."""
    counts = {level: np.zeros(3) for level in LEVELS}
    for image in images:
        # Whole images: a plot that a patch cuts would count as missed.
        pixels_CHW, valid_HW = read([image.image], image.grid, image.window, bands=proposer.image.bands)
        ids_HW = _ids(image, polygons)
        # -1 is where the reference is unknown; plots there are neither right nor wrong.
        valid_HW &= ids_HW >= 0
        if not valid_HW.any():
            continue
        map_CHW = proposer.probabilities(eight_bit(pixels_CHW, proposer.image), valid_HW)
        for level in LEVELS:
            labels_HW = divided(map_CHW, level=level, slivers=proposer.slivers, background=proposer.background)
            counts[level] += _matched(ids_HW[valid_HW], labels_HW[valid_HW])
    return {level: float(2 * hits / max(ours + theirs, 1)) for level, (hits, ours, theirs) in counts.items()}


def _matched(ids_N: Ids, labels_N: np.ndarray) -> tuple[int, int, int]:
    """Matched, reference and predicted objects among the same pixels."""
    # Sizes of all intersections by one count of pairs, as `Confusion.from_arrays` counts classes.
    ids, one_N, sizes = np.unique(ids_N, return_inverse=True, return_counts=True)
    labels, other_N, areas = np.unique(labels_N, return_inverse=True, return_counts=True)
    shared = np.bincount(one_N * len(labels) + other_N, minlength=len(ids) * len(labels)).reshape(len(ids), len(labels))
    iou = shared / (sizes[:, None] + areas - shared)
    matched = (iou > MATCHED)[ids > 0][:, labels > 0]
    return int(matched.sum()), matched.shape[0], matched.shape[1]
