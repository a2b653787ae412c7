"""The chips that active learning selects from: cells of scenes, or whole labelled images, split by scene.

A chip is a window of its scene's files and is read when it is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayseg.config import Config, added
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import Window, expect_ids
from rayseg.geo.region import Region
from rayseg.io import labels, rasters, scenes, stac_read
from rayseg.io.class_tables import Classes
from rayseg.io.masks import pixels_of
from rayseg.io.name_lists import Names
from rayseg.io.scenes import LabelledImage, Pairs
from rayseg.io.tables import concurrently
from rayseg.pipelines.al_s4gan.chip_pixels import dominant, expect_rgb
from rayseg.steps.labelled import expect_classes, find_images, masks_of_all, origins
from rayseg.steps.models import RGB
from rayseg.store import Location, split_location
from rayseg.vision.color import ClassTable
from rayseg.vision.crops import middle

Part = Literal["pool", "validation", "test"]
PARTS: tuple[Part, ...] = ("pool", "validation", "test")


class PoolConfig(Config):
    """Source of the chips and their split."""

    images: Location | None = None
    """A folder of scenes with images and masks side by side, or `catalog.json#collection`; by default the region's
    imagery."""
    masks: Location | None = None
    """With a catalogue: existing masks, used instead of manual annotation: a folder,
    `catalog.json#collection/asset`, or `#collection/asset` of the region. Without masks,
    people draw them, see `rayseg labels import`. `RUN#classes` is the map of another run."""
    min_score: Annotated[float, Field(ge=0, le=1)] = added(default=0.0)
    """Of masks `RUN#classes`: pixels whose class has a lower score there are not labelled."""
    chips: Location | None = None
    """Instead of scenes: whole images with a label each, as `catalog.json#chips` of `ingest folder --labels folder`.
    With `masks` (of their names) the labels choose the images, and the masks teach the segmenter."""
    size: Annotated[int, Field(gt=0)] = 320
    """Side of a chip in px: a cell of a scene, or the middle of a labelled image; smaller images are extended."""
    covered: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of a cell with imagery."""
    pairs: Pairs | None = added(default=None)
    """Of one folder with images and masks: how they are called, as {image: "{}_sat.jpg", mask: "{}_mask.png"}."""
    validation: Names = ()
    """Scenes that select the checkpoint; by default a random sample."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the scenes, or of the labelled images of each class, in the random sample."""
    test: Names = ()
    """Test scenes; without them the validation scenes are measured."""
    absent: tuple[str, ...] = ()
    """Classes that may have no pixel."""


@dataclass(frozen=True)
class ChipList:
    """The chips of a pool before the split.

    Attributes:
        rows: one per chip, without its part.
        classes: names.
        images: scenes of the chips.
        pixels: id of every image with masks -> its labelled pixels of each class, in order.
    """

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    pixels: Mapping[str, Sequence[int]]


def list_pool(
    step: Step,
    region: Region,
    config: PoolConfig,
    classes: Classes,
    seed: int,
    given: ChipList | None,
    *,
    chip_list: ChipList | None = None,
) -> dict[str, Any]:
    """Find the chips and divide them; later steps read `<step>/pool.parquet`.

    Args:
        step: this step.
        region: its imagery has the chips, unless the configuration names other images.
        config: source of the chips and their split.
        classes: of the masks.
        seed: of the split.
        given: the chips of a sweep, which enter the keys of its trials.
        chip_list: the chips, if the check of the run found them.

    Returns:
        `classes`: names; `oracle`: whether all chips of the pool have labels; part -> number of chips.

    Raises:
        RaysegError: see `find_chips` and `divide`.
    """
    pool = given or chip_list or find_chips(region, config, classes.table)
    rows = divide(pool, config, classes.table, seed=seed)
    write_rows(step.prefix / "pool.parquet", rows)
    counts = {str(part): sum(row["part"] == part for row in rows) for part in PARTS}
    oracle = all(row["label"] for row in rows if row["part"] == "pool")
    masks = any(row["masks"] != "[]" for row in rows)
    named = origins(region, config.chips, config.images, config.masks)
    return {"classes": list(pool.classes), "oracle": oracle, "masks": masks, "origins": named, **counts}


def rows_of(listed: Step, part: Part) -> list[Row]:
    """Rows of the chips of a part, by id."""
    return [row for row in read_rows(listed.prefix / "pool.parquet") if row["part"] == part]


def masked_rows(listed: Step) -> list[Row]:
    """Chips of the pool that have masks already."""
    return [row for row in rows_of(listed, "pool") if row["masks"] != "[]"]


def find_chips(region: Region, config: PoolConfig, table: ClassTable) -> ChipList:
    """Find all chips; their files are read.

    Raises:
        ConfigError: neither the region nor the configuration names images.
        DataError: images or masks cannot be read, or images are not RGB of 8 bits.
    """
    if config.chips:
        return _labelled_images(region, config, table)
    find = partial(find_images, region, config.images, config.masks, table=table, setting="pool.images")
    images = tuple(find(pairs=config.pairs, min_score=config.min_score))
    _parts(images, config, seed=0)  # wrong names are refused before anything is read
    expect_rgb(images)
    # 1. pixels of each class in every cell of the scenes with masks
    masked = [image for image in images if image.masks]
    counts_of = {image.id: cells for image, cells in scenes.countable(masked, table, cell=config.size)}
    images = tuple(image if image.id in counts_of else replace(image, masks=()) for image in images)
    # 2. whole cells with imagery; of scenes with masks, those with a labelled pixel
    rows_of_images = concurrently(
        lambda image: _cells_of(image, counts_of.get(image.id), table, config), images, threads=4
    )
    rows = tuple(row for rows in rows_of_images for row in rows)
    pixels = {name: tuple(cells.sum(axis=(0, 1)).tolist()) for name, cells in counts_of.items()}
    return ChipList(rows, table.names, images, pixels)


def divide(chip_list: ChipList, config: PoolConfig, table: ClassTable, *, seed: int) -> list[Row]:
    """Rows of all chips with their parts, by id.

    Raises:
        ConfigError: named scenes are missing, or no scene remains for training.
        DataError: no chips remain to select from, or a class has no pixels or images for training.
    """
    if config.chips:
        rows = _by_class(chip_list, config, seed)
        parts = {row["id"]: row["part"] for row in rows}
    else:
        parts = _parts(chip_list.images, config, seed)
        rows = [row | {"part": parts[row["of"]]} for row in chip_list.rows]
        # Outside the pool only chips with masks are of use.
        rows = [row for row in rows if row["label"] or row["part"] == "pool"]
    # Masks may lack a class, or show one in the validation images alone. Without a mask in the pool people draw them.
    if chip_list.pixels and (config.chips or any(parts[name] == "pool" for name in chip_list.pixels)):
        counted: dict[str, list[tuple[LabelledImage, NDArray[np.int64]]]] = {"training": [], "validation": []}
        for image in chip_list.images:
            counts = np.array(chip_list.pixels.get(image.id, [0] * len(table.classes)))
            counted["training" if parts.get(image.id) == "pool" else "validation"].append((image, counts))
        expect_classes(counted, table, config.absent)
    expect_ids([row["id"] for row in rows])
    if not any(row["part"] == "pool" for row in rows):
        raise DataError(f"the pool has no chips of {config.size} px; lower pool.size or add imagery")
    return sorted(rows, key=lambda row: str(row["id"]))


def _labelled_images(region: Region, config: PoolConfig, table: ClassTable) -> ChipList:
    """Whole labelled images, with their masks if there are some."""
    uri, collection = split_location(str(config.chips))
    chips = labels.chips_of(stac_read.open_items(uri, collection or None))
    classes = tuple(sorted({str(chip.label) for chip in chips if chip.label}))
    if len(classes) < 2 or not all(chip.label for chip in chips):
        raise DataError(
            f"{config.chips} has images of {len(classes)} classes, expected a label on each and two or more"
        )
    masks = masks_of_all(chips, str(region.located(config.masks)), table, config.min_score) if config.masks else {}
    rows, images, size = [], [], config.size
    for chip in chips:
        # The middle, as `size` may be less than the image.
        window = middle(Window(0, 0, chip.source.width, chip.source.height), size)
        own = masks.get(chip.id, ())
        images.append(LabelledImage(chip.id, chip.id, chip.source, own, pixels_of(chip.source), window))
        rows.append(_row(images[-1], window, str(chip.label)))
    expect_rgb(images)
    counted = scenes.countable([image for image in images if image.masks], table, cell=size) if masks else []
    pixels = {image.id: tuple(cells.sum(axis=(0, 1)).tolist()) for image, cells in counted}
    return ChipList(tuple(rows), classes, tuple(images), pixels)


def _by_class(chip_list: ChipList, config: PoolConfig, seed: int) -> list[Row]:
    """Of the images of every class some are for validation."""
    rows = []
    # Each class has a random stream of its own: images of one do not change the split of another.
    for number, name in enumerate(chip_list.classes):
        of_class = [row for row in chip_list.rows if row["label"] == name]
        order = np.random.default_rng((seed, number)).permutation(len(of_class))
        held = set(order[: max(1, round(config.share * len(of_class)))].tolist())
        if len(held) == len(of_class):
            raise DataError(
                f"pool.share {config.share:g} keeps all {len(of_class)} images labelled {name} for validation; lower "
                "it, or add some"
            )
        rows += [row | {"part": "validation" if at in held else "pool"} for at, row in enumerate(of_class)]
    return rows


def _row(image: LabelledImage, window: Window, label: str, name: str = "") -> Row:
    return image.to_row() | asdict(window) | {"id": name or image.id, "of": image.id, "label": label}


def _parts(images: Sequence[LabelledImage], config: PoolConfig, seed: int) -> dict[str, Part]:
    """Part of every image, whole scenes each."""
    # Whole scenes: cells of one scene are alike, and accuracy would be too high.
    known = {image.scene for image in images}
    if unknown := sorted(set(config.test) - known):
        raise ConfigError(f"pool.test names {', '.join(unknown)}, the scenes are {listed(sorted(known))}; correct it")
    others = [image for image in images if image.scene not in config.test]
    if not others:
        raise ConfigError("pool.test names every scene, expected one or more for training; name fewer")
    pool, held = scenes.split(others, validation=config.validation, share=config.share, seed=seed)
    parts: dict[str, Part] = {image.id: "test" for image in images}
    return parts | {image.id: "pool" for image in pool} | {image.id: "validation" for image in held}


def _cells_of(
    image: LabelledImage, counts: NDArray[np.int64] | None, table: ClassTable, config: PoolConfig
) -> list[Row]:
    rows, whole, size = [], image.window, config.size
    # An image smaller than a chip is one chip, mirrored and not labelled beyond its edge.
    for down in range(max(1, whole.height // size)):
        for right in range(max(1, whole.width // size)):
            window = Window(whole.col + right * size, whole.row + down * size, size, size)
            label = ""
            if counts is not None and not (label := dominant(counts[down, right], table)):
                continue
            # Reading is the slow part, so cells without a label are left out before.
            inside = window.intersect(whole)
            if rasters.read([image.image], image.grid, inside, bands=RGB)[1].mean() >= config.covered:
                rows.append(_row(image, window, label, f"{image.id}_{right}_{down}"))
    return rows
