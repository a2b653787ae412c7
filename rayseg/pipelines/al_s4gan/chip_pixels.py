"""Pixels and labels of the chips of a pool, read when they are needed from the files of their scenes."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from rayseg.engine.manifest import Row
from rayseg.errors import DataError
from rayseg.geo.grid import Window
from rayseg.io import cog, scenes
from rayseg.io.scenes import LabelledImage
from rayseg.io.units import expect_one_unit
from rayseg.steps.models import RGB
from rayseg.store import upath
from rayseg.train.batches import Chips
from rayseg.vision.color import IGNORE, ClassTable


def placed(row: Row) -> tuple[LabelledImage, Window]:
    """The scene of a chip, and the chip's window on the scene's grid."""
    return LabelledImage.from_row(row | {"id": row["of"]}), Window(row["col"], row["row"], row["width"], row["height"])


def expect_rgb(images: Sequence[LabelledImage]) -> None:
    """Refuse images that chips cannot be cut from.

    Raises:
        DataError: an image is not RGB of uint8, or the images state different units.
    """
    for image in images:
        source = image.image
        if not set(RGB) <= set(source.bands) or source.dtype != "uint8":
            kind = f"{', '.join(source.bands) or 'no bands'} of {source.dtype}"
            raise DataError(f"{image.id} has {kind}, chips are {', '.join(RGB)} of uint8; convert it to 0..255")
    expect_one_unit([image.image for image in images], RGB)


def image_of(row: Row) -> NDArray[np.uint8]:
    """The chip in RGB, (height, width, 3) uint8; mirrored where it has no data."""
    image_CHW, _ = scenes.read_window(*placed(row), bands=RGB, table=None)
    if image_CHW.dtype != np.uint8:
        raise DataError(f"{row['of']} has {image_CHW.dtype} pixels, chips are uint8 for now; scale it to 0..255 first")
    return np.ascontiguousarray(image_CHW.transpose(1, 2, 0))


def mask_of(row: Row, table: ClassTable, drawn: str) -> NDArray[np.uint8] | None:
    """Class of every pixel of a chip, 255 = not labelled; from its scene's masks, else from those drawn for the run.

    Args:
        row: of `chip_pool.rows_of`.
        table: the classes.
        drawn: prefix of the masks that were imported.

    Returns:
        (height, width) uint8, or None where there is no mask.
    """
    if row["masks"] != "[]":
        return scenes.read_window(*placed(row), bands=RGB, table=table)[1]
    path = drawn_path(drawn, row["id"])
    return cog.read_bands(path)[0] if path.exists() else None


def drawn_path(drawn: str, chip: str) -> UPath:
    """The file of the mask that a person drew for a chip."""
    return upath(drawn) / f"{chip}.tif"


def label_of(row: Row, table: ClassTable, drawn: str) -> str:
    """The class of a chip: its own, else the one that most pixels of its drawn mask have; "" where neither is known."""
    if row["label"]:
        return str(row["label"])
    mask_HW = mask_of(row, table, drawn)
    if mask_HW is None:
        return ""
    pixels = np.bincount(mask_HW[mask_HW != IGNORE], minlength=256)[list(table.values)]
    return dominant(pixels.astype(np.int64), table)


def dominant(pixels_K: NDArray[np.int64], table: ClassTable) -> str:
    """The class of most pixels, the first of equals; "" where nothing is labelled."""
    return table.names[int(pixels_K.argmax())] if pixels_K.sum() else ""


def labelled_chips(rows: Sequence[Row], labels: Sequence[str], classes: Sequence[str]) -> Chips:
    """Chips for the training of a classifier."""
    ids, numbers = tuple(str(row["id"]) for row in rows), tuple(classes.index(label) for label in labels)
    return Chips(ids, numbers, partial(_image_at, list(rows)), None, len(classes))


def masked_chips(rows: Sequence[Row], table: ClassTable, drawn: str) -> Chips:
    """Chips for the training of a segmenter; a mask that is read and is not there raises DataError."""
    ids, read_mask = tuple(str(row["id"]) for row in rows), partial(_mask_at, list(rows), table, drawn)
    return Chips(ids, (0,) * len(ids), partial(_image_at, list(rows)), read_mask, len(table.classes))


# Module functions, because workers of a training unpickle them.
def _image_at(rows: list[Row], position: int) -> NDArray[np.uint8]:
    return image_of(rows[position])


def _mask_at(rows: list[Row], table: ClassTable, drawn: str, position: int) -> NDArray[np.uint8]:
    mask_HW = mask_of(rows[position], table, drawn)
    if mask_HW is None:
        raise DataError(f"chip {rows[position]['id']} has no mask; draw one and import it")
    return mask_HW
