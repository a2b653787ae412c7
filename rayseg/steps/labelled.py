"""Labelled images of a region: find them, count pixels by class, split them by scene, list them in a step."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from rayseg.config import Config, added
from rayseg.engine.manifest import read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import slug
from rayseg.geo.region import Region
from rayseg.io import scenes, stac_read
from rayseg.io.labels import Chip
from rayseg.io.masks import by_image, expect_fit, expect_names, masks_of, two_classes
from rayseg.io.name_lists import Names
from rayseg.io.scenes import LabelledImage, Pairs
from rayseg.io.sources import STORED, Source
from rayseg.io.units import common_units, converted, expect_one_unit
from rayseg.models.bundle import Scaling
from rayseg.store import Location, split_location
from rayseg.train.supervised import Labelled
from rayseg.train.windows import Windows
from rayseg.vision.color import ClassTable

Counted = Sequence[tuple[LabelledImage, np.ndarray]]
"""Images, each with its pixel counts by class, (..., classes)."""
Divided = Mapping[str, Counted]
"""Part -> its images, each with its pixel counts by cell and class, (rows, cols, classes)."""
_log = logging.getLogger(__name__)
PARTS = ("training", "validation")


class LabelledConfig(Config):
    """Labelled scenes and their split into training and validation."""

    source: Location | None = None
    """A folder of scenes (`images` and `masks` side by side) or `catalog.json#collection`; by default the region's."""
    masks: Location | None = None
    """With a catalogue: its masks, as `catalog.json#collection/asset`, or `#collection/asset` of the region's; or the
    map of another run, as `RUN#classes`."""
    min_score: Annotated[float, Field(ge=0, le=1)] = added(default=0.0)
    """Of masks `RUN#classes`: pixels whose class has a lower score there are not labelled."""
    pairs: Pairs | None = added(default=None)
    """Of one folder with images and masks: how they are called, as {image: "{}_sat.jpg", mask: "{}_mask.png"}."""
    validation: Names = ()
    """Scenes that select the epoch and measure the model, or a file with their names (.txt, .csv, .npy); by default a
    random sample."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the scenes in the random sample."""
    seed: int = 1337
    """Seed of the random sample."""
    absent: tuple[str, ...] = ()
    """Classes that may have no pixel."""


def find_images(
    region: Region,
    images: str | None,
    masks: str | None,
    *,
    table: ClassTable | None,
    setting: str,
    pairs: Pairs | None = None,
    min_score: float = 0.0,
) -> list[LabelledImage]:
    """All images with their masks, if any, sorted by id.

    Args:
        region: its images or its catalogue are used if `images` is None.
        images: a folder of scenes, or `catalog.json#collection`.
        masks: with a catalogue, its masks: `catalog.json#collection/asset`, or `#collection/asset` of the region's.
        table: the classes; None for masks of ids.
        setting: the configuration key of `images`, for the error message.
        pairs: names of images and masks in one folder.
        min_score: of masks that a run mapped: pixels with a lower score are not labelled.

    Raises:
        ConfigError: neither the region nor the configuration names images.
        DataError: there are no images, or they cannot be used.
    """
    # The order of precedence: the configuration, the folder that --region names, its catalogue.
    source = images or region.images
    if not source and region.catalog:
        collection = region.collection or stac_read.imagery_collection(region.catalog)
        source = f"{region.catalog}#{collection}" if collection else region.catalog
    if not source:
        raise ConfigError(
            f"region {region.name} names no images; name a folder of images and masks with --set {setting}=FOLDER, or "
            f"a collection with --set {setting}=catalog.json#collection"
        )
    return scenes.labelled_images(source, region.located(masks), table=table, pairs=pairs, min_score=min_score)


def masks_of_all(
    chips: Sequence[Chip], location: str, table: ClassTable, min_score: float
) -> dict[str, tuple[Source, ...]]:
    """Id of a chip -> its mask, called by the chip's id or by the stem of its file.

    Raises:
        DataError: a chip has no mask, a mask is of another size, or the masks name other classes.
    """
    by_name = by_image(masks_of(location, names=table.names, min_score=min_score))
    found = {}
    for chip in chips:
        names = (slug(chip.id), slug(PurePath(chip.source.assets[0][0]).stem))
        masks = next((by_name[name] for name in names if name in by_name), ())
        if not masks:
            raise DataError(
                f"{location} has no mask called {names[0]} or {names[1]}, expected one for each of the {len(chips)} "
                "images of pool.chips; add it, or leave the image out"
            )
        for mask in masks:
            expect_fit(mask, (chip.source.height, chip.source.width), chip.source.assets[0][0])
        found[chip.id] = masks
    every = [mask for masks in found.values() for mask in masks]
    expect_names(every, table, location)
    read_as = iter(two_classes(every, table, location))
    return {name: tuple(next(read_as) for _ in masks) for name, masks in found.items()}


def origins(region: Region, *locations: str | None) -> list[str]:
    """The catalogues and folders of labelled data, for the lineage of a model: those named, else the region's."""
    named = [region.located(location) for location in locations if location] or [region.catalog or region.images]
    return list(dict.fromkeys(split_location(location)[0] for location in named if location))


def divide(
    region: Region,
    config: LabelledConfig,
    table: ClassTable,
    *,
    cell: int,
    bands: Sequence[str],
    scaling: Scaling,
) -> Divided:
    """Count the classes of all labelled images and split the images by scene.

    Args:
        region: see `find_images`.
        config: location of the images and settings of the split.
        table: the classes.
        cell: side in px of the cells in which pixels are counted.
        bands: those that the network sees.
        scaling: of the network; images that state another scale and offset are converted.

    Raises:
        ConfigError: neither the region nor the configuration names images.
        DataError: no image has a mask, the images cannot be used, or the split leaves a class out.
    """
    images = find_images(
        region,
        config.source,
        config.masks,
        table=table,
        setting="labelled.source",
        pairs=config.pairs,
        min_score=config.min_score,
    )
    # Images without masks may stand in the same folder: they are mapped later.
    kept = [image for image in images if image.masks]
    if not kept:
        raise DataError(
            f"none of the {len(images)} images of region {region.name} has a mask; put masks of the same names into "
            "the folder masks next to images, or name them with --set labelled.masks=catalog.json#collection"
        )
    if kinds := sorted({image.image.dtype for image in kept} - {kept[0].image.dtype}):
        raise DataError(
            f"{kept[0].id} has {kept[0].image.dtype} pixels, other images {', '.join(kinds)}; convert all to one type"
        )
    # A scaling that is given states the unit of the values, so all images are converted to it.
    stated = (scaling.scale, scaling.offset)
    sources = [image.image for image in kept]
    units = common_units(sources, bands) if stated == STORED else dict.fromkeys(bands, stated)
    kept = [replace(image, image=converted(image.image, units)) for image in kept]
    expect_one_unit([image.image for image in kept], bands)
    counted = scenes.countable(kept, table, cell=cell)
    kept, by_id = [image for image, _ in counted], {image.id: counts for image, counts in counted}
    if bare := [image for image, counts in by_id.items() if not counts.any()]:
        _log.warning(
            "the masks of %d of %d images label no pixel of them: %s; check that image and mask cover the same ground",
            len(bare),
            len(kept),
            listed(bare),
        )
    # By scene: neighbouring images of one scene are alike, and accuracy would be too high.
    parts = scenes.split(kept, validation=config.validation, share=config.share, seed=config.seed)
    divided = {name: [(image, by_id[image.id]) for image in part] for name, part in zip(PARTS, parts, strict=True)}
    expect_classes(divided, table, config.absent)
    return divided


def expect_classes(divided: Divided, table: ClassTable, absent: Sequence[str]) -> None:
    """Check that every class has pixels and that the training images contain every class.

    Args:
        divided: images of `PARTS`.
        table: the classes.
        absent: classes that may be without pixels.

    Raises:
        RaysegError: see `scenes.expect_classes`.
    """
    # A part may have no image; its sum must have an entry per class all the same.
    none_K = np.zeros(len(table.classes), np.int64)
    pixels = {
        name: sum((np.reshape(counts, (-1, len(none_K))).sum(axis=0) for _, counts in part), none_K)
        for name, part in divided.items()
    }
    named = {name: sorted({image.scene for image, _ in part}) for name, part in divided.items()}
    scenes.expect_classes(pixels, table, named, absent)


def write_images(step: Step, divided: Divided) -> dict[str, Any]:
    """Write the images of both parts to `<step>/images.parquet`; return part -> scenes, images, pixels by class."""
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


def read_images(listed: Step, part: str, bands: tuple[str, ...], table: ClassTable) -> Labelled:
    """The images of a part, as `write_images` wrote them, for training."""
    rows = [row for row in read_rows(listed.prefix / "images.parquet") if row["part"] == part]
    # The counts decide which windows are drawn, so they are stored next to the images.
    read = Windows(tuple(map(LabelledImage.from_row, rows)), bands, table)
    return Labelled(read, tuple(np.array(json.loads(row["counts"]), np.int64) for row in rows))
