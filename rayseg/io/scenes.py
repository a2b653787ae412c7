"""Labelled scenes: images with their masks, and the pixels of both on any window.

    <folder>/images, <folder>/masks               each image is a scene of its own
    <folder>/<scene>/images, <folder>/<scene>/masks

Or two collections of STAC catalogues, or one folder with names such as N_sat.jpg and N_mask.png (`Pairs`).
Images of one scene are spatially correlated: a split keeps them together.
"""

import json
import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayseg.config import Config
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import NODATA, Grid, Window, expect_ids, slug
from rayseg.io import stac_read
from rayseg.io.drivers import files_in
from rayseg.io.labels import image_folders, sources_of_images
from rayseg.io.masks import by_image, expect_fit, expect_names, masks_of, meets, pixels_of, read_classes, two_classes
from rayseg.io.rasters import footprint, grids_of, read
from rayseg.io.sources import PIXELS, Source, source_of_file
from rayseg.io.tables import attempted, concurrently
from rayseg.store import split_location, suffix_of, upath
from rayseg.vision.color import ClassTable
from rayseg.vision.fill import mirrored

_log = logging.getLogger(__name__)
SCENE = "rayseg:scene"
Pixels = tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.uint8]]
"""image_CHW, where it is valid, its classes."""
_THREADS = 4
_ROWS = 4096  # of a mask that are decoded at once
_WHOLE = 1 << 24  # px of an image without georeference that is decoded as a whole
_ROOM = 512 << 20  # bytes of such images that a process keeps
_kept: dict[Any, Pixels] = {}
_keeping = threading.Lock()


@dataclass(frozen=True)
class LabelledImage:
    """An image and its masks.

    Attributes:
        id: of the image.
        scene: name of its scene.
        image: its file.
        masks: over it, the preferred one first; empty without labels.
        grid: of both.
        window: the whole image.
    """

    id: str
    scene: str
    image: Source
    masks: tuple[Source, ...]
    grid: Grid
    window: Window

    def to_row(self) -> dict[str, Any]:
        """The image as one flat row of plain values."""
        masks = json.dumps([mask.to_row() for mask in self.masks])
        return {"id": self.id, "scene": self.scene, "image": json.dumps(self.image.to_row()), "masks": masks}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "LabelledImage":
        """The image that `to_row` made this row of (further columns are ignored)."""
        image, masks = Source.from_row(json.loads(row["image"])), map(Source.from_row, json.loads(row["masks"]))
        return placed(row["id"], row["scene"], image, tuple(masks))


class Pairs(Config):
    """How images and masks are called that lie in one folder; {} is what both names share."""

    image: str = Field(default="{}_sat.jpg", pattern=r"^[^{}]*\{\}[^{}]*$")
    """Such as {}_sat.jpg of DeepGlobe, or {}.tif of GID."""
    mask: str = Field(default="{}_mask.png", pattern=r"^[^{}]*\{\}[^{}]*$")
    """Such as {}_mask.png, or {}_label.tif."""


def labelled_images(
    images: str,
    masks: str | None = None,
    *,
    table: ClassTable | None = None,
    pairs: Pairs | None = None,
    min_score: float = 0.0,
) -> list[LabelledImage]:
    """The images of all scenes by id, with their masks; `masks` is empty for unlabelled images.

    Args:
        images: a folder as above, or `catalog.json#collection`; an item's scene is its property `rayseg:scene`, else
            the item itself.
        masks: where the masks are, as `masks_of` takes it; by default next to the images of a folder.
        table: the classes; their names identify the mask among several rasters of an item.
        pairs: names of images and masks in one folder, `images`; each image is a scene of its own.
        min_score: of masks that a run mapped: pixels with a lower score are not labelled.

    Raises:
        DataError: there are no images, one cannot be opened, no mask can be read, a mask is of another size than its
            image, or the masks name other classes than the table.
    """
    names = table.names if table else ()
    if pairs:
        labelled = _of_pairs(images, pairs)
    elif suffix_of(split_location(images)[0]) in {".json", ".parquet"}:
        # 1. items of a catalogue, each of the scene that it states
        uri, _, collection = images.partition("#")
        items = stac_read.open_items(uri, collection or None)
        scenes = {item.id: slug(str(item.properties.get(SCENE, item.id))) for item in items}
        mask_sources = _masks(masks, names, min_score) if masks else []
        labelled = _with_masks(list(concurrently(stac_read.source_of, items)), scenes, mask_sources)
    elif masks:
        # 2. a folder of images whose masks are elsewhere; each image is a scene of its own
        sources, wrong = sources_of_images(images)
        if wrong:
            listing = listed(wrong.values(), most=1)
            raise DataError(
                f"{len(wrong)} of the images in {images} cannot be opened: {listing}; repair or remove them"
            )
        scenes = {source.item_id: source.item_id for source in sources}
        labelled = _with_masks(sources, scenes, _masks(masks, names, min_score))
    else:
        # 3. folders of images and masks side by side
        labelled = _of_folder(images)
    expect_ids([image.id for image in labelled])
    if table:
        # All masks together decide whether 255 is a class: one alone may lack it.
        failed: dict[str, str] = {}
        distinct = list(dict.fromkeys(mask for image in labelled for mask in image.masks))
        expect_names(distinct, table, masks or images)
        read_as = {mask.assets: mask for mask in two_classes(distinct, table, masks or images, failed=failed)}
        _warn_of(failed, len(distinct))
        labelled = [
            replace(image, masks=tuple(read_as[mask.assets] for mask in image.masks if mask.assets in read_as))
            for image in labelled
        ]
    return sorted(labelled, key=lambda image: image.id)


def _masks(location: str, names: Sequence[str] = (), min_score: float = 0.0) -> list[Source]:
    """`masks_of` a location; files that cannot be opened are named in a warning."""
    failed: dict[str, str] = {}
    masks = masks_of(location, names=names, failed=failed, min_score=min_score)
    _warn_of(failed, len(masks) + len(failed))
    return masks


def _warn_of(failed: Mapping[str, str], count: int) -> None:
    if failed:
        _log.warning(
            "%d of %d masks cannot be read and are not used: %s", len(failed), count, listed(failed.values(), most=3)
        )


def placed(image_id: str, scene: str, image: Source, masks: tuple[Source, ...]) -> LabelledImage:
    """An image with its masks, on the grid of both: its own pixels unless both are georeferenced."""
    image = replace(image, item_id=image_id)
    grid = grids_of([image])[0][0] if any(mask.crs for mask in masks) and image.crs else pixels_of(image)
    return LabelledImage(image_id, scene, image, masks, grid, footprint(image, grid))


def _of_folder(folder: str) -> list[LabelledImage]:
    folders = image_folders(folder)
    if not folders:
        raise DataError(
            f"{folder} has no folder called images, expected images and masks side by side in it or in each of its "
            "scenes' folders; rename them, or name a catalogue"
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        return [image for part in pool.map(_of_scene, folders, folders.values()) for image in part]


def _of_scene(scene: str, folder: Any) -> list[LabelledImage]:  # noqa: ANN401 - a UPath
    sources, wrong = sources_of_images(folder / "images")
    if wrong:
        raise DataError(
            f"{len(wrong)} of the images in {folder / 'images'} cannot be opened: {listed(wrong.values(), most=1)}; "
            "repair or remove them"
        )
    masks = by_image(_masks(str(folder / "masks"))) if (folder / "masks").is_dir() else {}
    if lost := sorted(set(masks) - {source.item_id for source in sources}):
        raise DataError(f"masks {listed(lost)} in {folder / 'masks'} match no image; rename or remove them")
    return [_named(scene, source, masks.get(source.item_id, ())) for source in sources]


def _named(scene: str, source: Source, masks: tuple[Source, ...]) -> LabelledImage:
    own = f"{scene}-{source.item_id}" if scene else source.item_id
    for mask in masks:
        if not (source.crs and mask.crs):  # else its georeference places it, on whatever grid it is
            expect_fit(mask, (source.height, source.width), source.assets[0][0])
    image = placed(slug(own), slug(scene or source.item_id), source, masks)
    for mask in masks:
        if image.grid.crs and mask.crs and not meets(mask, image.grid, image.window):
            raise DataError(
                f"mask {mask.assets[0][0]} lies elsewhere on Earth than its image {source.assets[0][0]}; correct the "
                "georeference of one"
            )
    return image


def _of_pairs(folder: str, pairs: Pairs) -> list[LabelledImage]:
    """The images of a folder with the masks of the same name."""
    names = [path.name for path in files_in(upath(folder))] if upath(folder).is_dir() else []
    masks, images = (_shared(names, pattern) for pattern in (pairs.mask, pairs.image))
    # {}.tif is the pattern of NAME_label.tif, too, which is a mask.
    images = {name: file for name, file in images.items() if file not in masks.values()}
    if not images:
        raise DataError(
            f"{folder} holds no file called {pairs.image}, expected images of this name; correct pairs.image"
        )
    if lost := sorted(masks.keys() - images.keys()):
        raise DataError(
            f"masks of {listed(lost)} in {folder} match no image called {pairs.image}; rename or remove them"
        )
    with ThreadPoolExecutor(_THREADS) as pool:

        def opened(file: str, name: str) -> Source:
            return source_of_file(str(upath(folder) / file), name)

        sources = list(pool.map(opened, images.values(), images))
        with_masks = [name for name in images if name in masks]
        drawn = dict(zip(with_masks, pool.map(opened, [masks[name] for name in with_masks], with_masks), strict=True))
    return [_named("", source, (drawn[source.item_id],) if source.item_id in drawn else ()) for source in sources]


def _shared(names: Sequence[str], pattern: str) -> dict[str, str]:
    """What stands for {} -> the file, of all files called so."""
    before, after = pattern.split("{}")
    return {
        name[len(before) : len(name) - len(after)]: name
        for name in sorted(names)
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    }


def _with_masks(sources: Sequence[Source], scenes: Mapping[str, str], masks: Sequence[Source]) -> list[LabelledImage]:
    """Each image with the masks over it if both are georeferenced, else with those of its name."""
    on_earth = [mask for mask in masks if mask.crs]
    named = by_image([mask for mask in masks if mask.crs is None] or masks)
    labelled = []
    for source in sources:
        # By place where both have one: names differ between imagery and masks.
        if source.crs and on_earth:
            [(grid, _)] = grids_of([source])
            over = footprint(source, grid)
            near = tuple(mask for mask in on_earth if meets(mask, grid, over))
        else:
            near = _named("", source, named.get(slug(source.item_id), ())).masks
        labelled.append(placed(source.item_id, scenes[source.item_id], source, near))
    if masks and not any(image.masks for image in labelled):
        raise DataError(
            f"no mask has the name or place of an image: the images are {listed([s.item_id for s in sources])}, the "
            f"masks {listed([mask.item_id for mask in masks])}; rename the masks, or name other ones"
        )
    used = {mask.assets for image in labelled for mask in image.masks}
    if idle := [mask.item_id for mask in masks if mask.assets not in used]:
        _log.warning("%d of %d masks lie over no image and are not used: %s", len(idle), len(masks), listed(idle))
    return labelled


# -- pixels -----------------------------------------------------------------------------------------------------------


def read_window(
    labelled: LabelledImage, window: Window, *, bands: Sequence[str], table: ClassTable | None
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """(image_CHW in the imagery's dtype, classes_HW uint8, 255 where not labelled) of a window.

    Without a table nothing is labelled. Where there is no imagery, the image is the mirror of what is there and
    nothing is labelled; a window without any imagery is 0.

    Raises:
        DataError: a file cannot be read, or a value or colour of a mask is not a class.
    """
    if labelled.grid.crs is None and labelled.window.height * labelled.window.width <= _WHOLE:
        image_CHW, valid_HW, classes_HW = _cut(_whole(labelled, tuple(bands), table), labelled.window, window)
    else:
        image_CHW, valid_HW, classes_HW = _read(labelled, window, bands, table)
    return mirrored(image_CHW, valid_HW) if valid_HW.any() else image_CHW, classes_HW


def _read(labelled: LabelledImage, window: Window, bands: Sequence[str], table: ClassTable | None) -> Pixels:
    image_CHW, valid_HW = read([labelled.image], labelled.grid, window, bands=bands)
    if table is None or not labelled.masks:
        return image_CHW, valid_HW, np.full(valid_HW.shape, NODATA, np.uint8)
    classes_HW = read_classes(masks_on(labelled), labelled.grid, window, table)
    return image_CHW, valid_HW, np.where(valid_HW, classes_HW, NODATA).astype(np.uint8)


def _whole(labelled: LabelledImage, bands: tuple[str, ...], table: ClassTable | None) -> Pixels:
    """All of an image that GDAL decodes as a whole (PNG, JPEG); cached up to `_ROOM` bytes."""
    key = (labelled, bands, table)
    if (pixels := _kept.get(key)) is None:
        pixels = _read(labelled, labelled.window, bands, table)
        size = sum(array.nbytes for array in pixels)
        with _keeping:
            if key not in _kept and size + sum(array.nbytes for kept in _kept.values() for array in kept) <= _ROOM:
                _kept[key] = pixels
    return pixels


def _cut(pixels: Pixels, whole: Window, window: Window) -> Pixels:
    """The part in a window, which may reach beyond; nothing is valid there."""
    inside = window.intersect(whole)
    cut: list[NDArray[Any]] = []
    for array, empty in zip(pixels, (0, False, NODATA), strict=True):
        part = np.full((*array.shape[:-2], window.height, window.width), empty, array.dtype)
        if not inside.empty:
            part[..., *inside.slices(window)] = array[..., *inside.slices(whole)]
        cut.append(part)
    return cut[0], cut[1], cut[2]


def image_on(labelled: LabelledImage) -> Source:
    """The image on its grid: without CRS if its masks have none."""
    return labelled.image if labelled.grid.crs is not None else replace(labelled.image, crs=None, transform=PIXELS)


def masks_on(labelled: LabelledImage) -> Sequence[Source]:
    """The masks on the image's grid."""
    if labelled.grid.crs is not None:
        return labelled.masks
    masks = [mask if mask.crs is None else replace(mask, crs=None, transform=PIXELS) for mask in labelled.masks]
    return [replace(mask, item_id=labelled.grid.image or "") for mask in masks]


def count_classes(labelled: LabelledImage, table: ClassTable, *, cell: int) -> NDArray[np.int64]:
    """Pixels of each class in each cell of an image, (rows, cols, classes); cells of `cell` px from its corner.

    Raises:
        DataError: a mask cannot be read, or a value or colour in it is not a class.
    """
    whole, step = labelled.window, max(1, _ROWS // cell) * cell
    return np.concatenate(
        [
            _counted(read_classes(masks_on(labelled), labelled.grid, rows.intersect(whole), table), table, cell)
            for top in range(whole.row, whole.row1, step)
            for rows in [Window(whole.col, top, whole.width, step)]
        ]
    )


def _counted(classes_HW: NDArray[np.uint8], table: ClassTable, cell: int) -> NDArray[np.int64]:
    height, width = classes_HW.shape
    rows, cols = -(-height // cell), -(-width // cell)
    places_HW = (np.arange(height) // cell)[:, None] * cols + np.arange(width) // cell
    counts = [
        np.bincount(places_HW[classes_HW == value], minlength=rows * cols).reshape(rows, cols) for value in table.values
    ]
    return np.stack(counts, axis=-1).astype(np.int64)


def count_all(images: Sequence[LabelledImage], table: ClassTable, *, cell: int) -> list[NDArray[np.int64]]:
    """`count_classes` of every image."""
    return list(concurrently(partial(count_classes, table=table, cell=cell), images, threads=_THREADS))


def countable(
    images: Sequence[LabelledImage], table: ClassTable, *, cell: int
) -> list[tuple[LabelledImage, NDArray[np.int64]]]:
    """(image, its `count_classes`) of every image whose masks can be read; the others are named in a warning.

    Raises:
        DataError: none of them can.
    """
    counted, failed = attempted(partial(count_classes, table=table, cell=cell), images, threads=_THREADS)
    if failed and not counted:
        raise failed[0][1]
    _warn_of({image.id: str(error) for image, error in failed}, len(images))
    return counted


# -- split ------------------------------------------------------------------------------------------------------------


def split(
    images: Sequence[LabelledImage], *, validation: Sequence[str] = (), share: float = 0.2, seed: int = 0
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """(training images, validation images), whole scenes each.

    Args:
        images: all of them.
        validation: names of the validation scenes; drawn at random by default.
        share: of the scenes that are drawn, at least one.
        seed: of the random draw.

    Raises:
        DataError: a scene is not there, or none remains for training.
    """
    scenes = sorted({image.scene for image in images})
    if unknown := sorted(set(validation) - set(scenes)):
        raise DataError(f"there is no scene {', '.join(unknown)}, the scenes are {listed(scenes)}; correct the split")
    # Whole scenes are held out: tiles of one scene look alike.
    drawn = np.random.default_rng(seed).permutation(scenes)[: max(1, round(share * len(scenes)))].tolist()
    held = set(validation or drawn)
    if held >= set(scenes):
        raise DataError(
            f"all {len(scenes)} scenes ({listed(scenes)}) are for validation, expected one or more for training; "
            "hold out fewer"
        )
    parts: dict[bool, list[LabelledImage]] = defaultdict(list)
    for image in images:
        parts[image.scene in held].append(image)
    return parts[False], parts[True]


def expect_classes(
    counts: Mapping[str, NDArray[np.int64]],
    table: ClassTable,
    scenes: Mapping[str, Sequence[str]],
    absent: Sequence[str],
) -> None:
    """Refuse classes without pixels, and a split whose training part lacks a class.

    Args:
        counts: "training" and "validation" -> pixels of each class.
        table: the classes.
        scenes: the same parts -> names of their scenes.
        absent: classes that may be without pixels.

    Raises:
        ConfigError: `absent` names an unknown class.
        DataError: the first such class, or the validation part has labelled images without a pixel of any class.
    """
    if unknown := sorted(set(absent) - set(table.names)):
        raise ConfigError(f"absent names {', '.join(unknown)}, the classes are {', '.join(table.names)}; correct it")
    if scenes["validation"] and not counts["validation"].any():
        raise DataError(
            f"the validation scenes ({listed(scenes['validation'])}) have no labelled pixel, so nothing measures the "
            "model; choose other validation scenes, or correct their masks"
        )
    for position, name in enumerate(table.names):
        here, there = (int(counts[part][position]) for part in ("training", "validation"))
        # A class of the validation alone would count as an IoU of 0 in every epoch.
        if name in absent or here:
            continue
        if not there:
            raise DataError(
                f"class {name} has no pixel in any mask; remove it from the classes, add masks that show it, or name "
                "it under `absent`"
            )
        raise DataError(
            f"the split leaves class {name} out: none of its {there} pixels is in the training scenes "
            f"({listed(scenes['training'])}), all are in {listed(scenes['validation'])}; choose other validation scenes"
        )
