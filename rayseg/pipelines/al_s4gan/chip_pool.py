"""The chips that active learning selects from: cells of scenes, or whole labelled images, split by scene.

A chip is a window of its scene's files and is read when it is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayseg.config import Config
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import Window, expect_ids
from rayseg.geo.region import Region
from rayseg.io import cog, labels, rasters, scenes, stac_read
from rayseg.io.class_tables import Classes
from rayseg.io.masks import pixels_of
from rayseg.io.scenes import LabelledImage
from rayseg.io.units import expect_one_unit
from rayseg.store import Location, split_location, upath
from rayseg.train.batches import Chips
from rayseg.vision.color import IGNORE, ClassTable
from rayseg.vision.crops import middle

Part = Literal["pool", "validation", "test"]
PARTS: tuple[Part, ...] = ("pool", "validation", "test")
BANDS = ("red", "green", "blue")


class PoolConfig(Config):
    """Source of the chips and their split."""

    images: Location | None = None
    """A folder of scenes with images and masks side by side, or `catalog.json#collection`; by default the region's
    imagery."""
    masks: Location | None = None
    """With a catalogue: existing masks, used instead of manual annotation: a folder,
    `catalog.json#collection/asset`, or `#collection/asset` of the region. Without masks,
    people draw them, see `rayseg labels import`."""
    chips: Location | None = None
    """Instead of scenes: whole images with a label each, as `catalog.json#chips` of `ingest folder --labels folder`."""
    size: Annotated[int, Field(gt=0)] = 320
    """Side of a chip in px: a cell of a scene, or the middle of a labelled image; smaller images are extended."""
    covered: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of a cell with imagery."""
    validation: tuple[str, ...] = ()
    """Scenes that select the checkpoint; by default a random sample."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the scenes, or of the labelled images of each class, in the random sample."""
    test: tuple[str, ...] = ()
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
    found = given or chip_list or find_chips(region, config, classes.table)
    rows = divide(found, config, classes.table, seed=seed)
    write_rows(step.prefix / "pool.parquet", rows)
    counts = {str(part): sum(row["part"] == part for row in rows) for part in PARTS}
    oracle = all(row["label"] for row in rows if row["part"] == "pool")
    masks = any(row["masks"] != "[]" for row in rows)
    return {"classes": list(found.classes), "oracle": oracle, "masks": masks, **counts}


def rows_of(listed: Step, part: Part) -> list[Row]:
    """Rows of the chips of a part, by id."""
    return [row for row in read_rows(listed.prefix / "pool.parquet") if row["part"] == part]


def find_chips(region: Region, config: PoolConfig, table: ClassTable) -> ChipList:
    """Find all chips; their files are read.

    Raises:
        ConfigError: neither the region nor the configuration names images.
        DataError: images or masks cannot be read, or images are not RGB of 8 bits.
    """
    if config.chips:
        return _labelled_images(config)
    images = tuple(_scenes(region, config, table))
    _parts(images, config, seed=0)  # wrong names are refused before anything is read
    _expect_rgb(images)
    return _cells(images, table, config.size, config.covered)


def divide(chip_list: ChipList, config: PoolConfig, table: ClassTable, *, seed: int) -> list[Row]:
    """Rows of all chips with their parts, by id.

    Raises:
        ConfigError: named scenes are missing, or no scene remains for training.
        DataError: no chips remain to select from, or a class has no pixels or images for training.
    """
    rows = _by_class(chip_list, config, seed) if config.chips else _by_scene(chip_list, config, table, seed)
    expect_ids([row["id"] for row in rows])
    if not any(row["part"] == "pool" for row in rows):
        raise DataError(f"the pool has no chips of {config.size} px; lower pool.size or add imagery")
    return sorted(rows, key=lambda row: str(row["id"]))


def _expect_rgb(images: Sequence[LabelledImage]) -> None:
    for one in images:
        missing = [band for band in BANDS if band not in one.image.bands]
        if missing or one.image.dtype != "uint8":
            found = f"{', '.join(one.image.bands) or 'no bands'} of {one.image.dtype}"
            raise DataError(f"{one.id} has {found}, chips are {', '.join(BANDS)} of uint8; convert it to 0..255")
    expect_one_unit([one.image for one in images], BANDS)


def _labelled_images(config: PoolConfig) -> ChipList:
    """Whole labelled images."""
    uri, collection = split_location(str(config.chips))
    found = labels.chips_of(stac_read.open_items(uri, collection or None))
    classes = tuple(sorted({str(chip.label) for chip in found if chip.label}))
    if len(classes) < 2 or not all(chip.label for chip in found):
        raise DataError(
            f"{config.chips} has images of {len(classes)} classes, expected a label on each and two or more"
        )
    rows, images, size = [], [], config.size
    for chip in found:
        window = middle(Window(0, 0, chip.source.width, chip.source.height), size)
        images.append(LabelledImage(chip.id, chip.id, chip.source, (), pixels_of(chip.source), window))
        rows.append(_row(images[-1], window, str(chip.label)))
    _expect_rgb(images)
    return ChipList(tuple(rows), classes, tuple(images), {})


def _by_class(chip_list: ChipList, config: PoolConfig, seed: int) -> list[Row]:
    """Of the images of every class some are for validation."""
    rows = []
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


def _row(one: LabelledImage, window: Window, label: str, name: str = "") -> Row:
    place = {"col": window.col, "row": window.row, "width": window.width, "height": window.height}
    return one.to_row() | place | {"id": name or one.id, "of": one.id, "label": label}


def _cells(images: tuple[LabelledImage, ...], table: ClassTable, size: int, covered: float) -> ChipList:
    """Whole cells of all scenes; of those with masks, the ones with a labelled pixel."""
    masked = [one for one in images if one.masks]
    counts = dict(zip([one.id for one in masked], scenes.count_all(masked, table, cell=size), strict=True))
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda one: _cells_of(one, counts.get(one.id), table, size, covered), images)
        rows = tuple(row for rows in found for row in rows)
    pixels = {name: tuple(found.sum(axis=(0, 1)).tolist()) for name, found in counts.items()}
    return ChipList(rows, table.names, images, pixels)


def _by_scene(chip_list: ChipList, config: PoolConfig, table: ClassTable, seed: int) -> list[Row]:
    """Whole scenes are for validation and test; there only chips with masks are of use."""
    parts = _parts(chip_list.images, config, seed)
    if chip_list.pixels:
        _expect_classes(chip_list, parts, table, config)
    rows = [row | {"part": parts[row["of"]]} for row in chip_list.rows]
    return [row for row in rows if row["label"] or row["part"] == "pool"]


def _scenes(region: Region, config: PoolConfig, table: ClassTable) -> list[LabelledImage]:
    images = config.images or region.images
    if not images and region.catalog:
        chosen = region.collection or stac_read.imagery_collection(region.catalog)
        images = f"{region.catalog}#{chosen}" if chosen else region.catalog
    if not images:
        raise ConfigError(f"region {region.name} names no imagery; give it with --set pool.images=catalog.json#imagery")
    masks = f"{region.catalog}{config.masks}" if config.masks and config.masks.startswith("#") else config.masks
    return scenes.labelled_images(images, masks, table=table)


def _parts(images: Sequence[LabelledImage], config: PoolConfig, seed: int) -> dict[str, Part]:
    """Part of every image, whole scenes each."""
    known = {image.scene for image in images}
    if unknown := sorted(set(config.test) - known):
        raise ConfigError(f"pool.test names {', '.join(unknown)}, the scenes are {listed(sorted(known))}; correct it")
    rest = [one for one in images if one.scene not in config.test]
    if not rest:
        raise ConfigError("pool.test names every scene, none is left to learn from; name fewer")
    learnt, held = scenes.split(rest, validation=config.validation, share=config.share, seed=seed)
    parts: dict[str, Part] = {one.id: "test" for one in images}
    return parts | {one.id: "pool" for one in learnt} | {one.id: "validation" for one in held}


def _expect_classes(chip_list: ChipList, parts: dict[str, Part], table: ClassTable, config: PoolConfig) -> None:
    """Refuse classes without pixels, and those that only scenes outside the pool show."""
    if not any(parts[name] == "pool" for name in chip_list.pixels):
        return
    pixels = {name: np.zeros(len(table.classes), np.int64) for name in ("training", "validation")}
    named: dict[str, list[str]] = {name: [] for name in pixels}
    for one in chip_list.images:
        part = "training" if parts[one.id] == "pool" else "validation"
        named[part].append(one.scene)
        pixels[part] += chip_list.pixels.get(one.id, 0)
    scenes.expect_classes(pixels, table, {part: sorted(set(found)) for part, found in named.items()}, config.absent)


def _cells_of(
    one: LabelledImage, counts: NDArray[np.int64] | None, table: ClassTable, size: int, covered: float
) -> list[Row]:
    rows = []
    # An image smaller than a chip is one chip, mirrored and not labelled beyond its edge.
    for down in range(max(1, one.window.height // size)):
        for right in range(max(1, one.window.width // size)):
            window = Window(one.window.col + right * size, one.window.row + down * size, size, size)
            label = ""
            if counts is not None and not (label := _dominant(counts[down, right], table)):
                continue
            inside = window.intersect(one.window)
            if rasters.read([one.image], one.grid, inside, bands=BANDS)[1].mean() >= covered:
                rows.append(_row(one, window, label, f"{one.id}_{right}_{down}"))
    return rows


def _dominant(pixels_K: NDArray[np.int64], table: ClassTable) -> str:
    """The class of most pixels, the first of equals; "" where nothing is labelled."""
    return table.names[int(pixels_K.argmax())] if pixels_K.sum() else ""


# -- pixels ------------------------------------------------------------------------------------------------------------


def image_of(row: Row) -> NDArray[np.uint8]:
    """The chip in RGB, (height, width, 3) uint8; mirrored where it has no data."""
    image_CHW, _ = scenes.read_window(_one(row), _window(row), bands=BANDS, table=None)
    if image_CHW.dtype != np.uint8:
        raise DataError(f"{row['of']} has {image_CHW.dtype} pixels, chips are uint8 for now; scale it to 0..255 first")
    return np.ascontiguousarray(image_CHW.transpose(1, 2, 0))


def mask_of(row: Row, table: ClassTable, drawn: str) -> NDArray[np.uint8] | None:
    """Class of every pixel of a chip, 255 = not labelled; from its scene's masks, else from those drawn for the run.

    Args:
        row: of `rows_of`.
        table: the classes.
        drawn: prefix of the masks that were imported.

    Returns:
        (height, width) uint8, or None where there is no mask.
    """
    if row["masks"] != "[]":
        return scenes.read_window(_one(row), _window(row), bands=BANDS, table=table)[1]
    path = drawn_path(drawn, row["id"])
    return cog.read_bands(path)[0] if path.exists() else None


def drawn_path(drawn: str, chip: str) -> Any:  # noqa: ANN401 - a UPath
    """Where the mask of a chip is kept that a person drew."""
    return upath(drawn) / f"{chip}.tif"


def label_of(row: Row, table: ClassTable, drawn: str) -> str:
    """The class of a chip: its own, else the one that most pixels of its drawn mask have; "" where neither is known."""
    if row["label"]:
        return str(row["label"])
    mask_HW = mask_of(row, table, drawn)
    if mask_HW is None:
        return ""
    pixels = np.bincount(mask_HW[mask_HW != IGNORE], minlength=256)[list(table.values)]
    return _dominant(pixels.astype(np.int64), table)


def _one(row: Row) -> LabelledImage:
    return LabelledImage.from_row(row | {"id": row["of"]})


def _window(row: Row) -> Window:
    return Window(row["col"], row["row"], row["width"], row["height"])


def placed(row: Row) -> tuple[LabelledImage, Window]:
    """The scene of a chip, and the chip's window on the scene's grid."""
    return _one(row), _window(row)


def labelled_chips(rows: Sequence[Row], found: Sequence[str], classes: Sequence[str]) -> Chips:
    """Chips for the training of a classifier; `found` are their labels."""
    rows = list(rows)
    return Chips(_ids(rows), tuple(classes.index(name) for name in found), _reader(rows), None, len(classes))


def masked_chips(rows: Sequence[Row], table: ClassTable, drawn: str) -> Chips:
    """Chips with masks for the training of a segmenter, or without if `rows` have none."""
    rows = list(rows)
    return Chips(_ids(rows), (0,) * len(rows), _reader(rows), partial(_mask_at, rows, table, drawn), len(table.classes))


def _ids(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(str(row["id"]) for row in rows)


def _reader(rows: list[Row]) -> Callable[[int], NDArray[np.uint8]]:
    return partial(_image_at, rows)


def _image_at(rows: list[Row], position: int) -> NDArray[np.uint8]:
    return image_of(rows[position])


def _mask_at(rows: list[Row], table: ClassTable, drawn: str, position: int) -> NDArray[np.uint8]:
    mask_HW = mask_of(rows[position], table, drawn)
    if mask_HW is None:
        raise DataError(f"chip {rows[position]['id']} has no mask; draw one and import it")
    return mask_HW
