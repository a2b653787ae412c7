"""Classes and their colours: decode coloured masks, paint results."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.errors import ConfigError, DataError

RGB = tuple[int, int, int]
IGNORE = 255
UNCHANGED = "unchanged"
"""Name of the class 0 of a comparison, which is a background whatever the number of classes."""


@dataclass(frozen=True)
class ClassTable:
    """The classes of a mask: value, name and colour of each.

    Attributes:
        classes: (value, name, (red, green, blue)) of every class; values 0..254, all different.
        ignore: further colours that mean "not labelled"; they decode to 255, as the value 255 does.
        unlabelled: further values that mean it in masks of values, and indices in masks with a palette.
        stored: values of the classes in masks of values, where they are others than those of the classes.
        threshold: for masks whose colours are blurred: a channel counts as 255 from this value on, else as 0.
    """

    classes: tuple[tuple[int, str, RGB], ...]
    ignore: tuple[RGB, ...] = ()
    threshold: int | None = None
    unlabelled: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        values = [value for value, _, _ in self.classes]
        colors = [*self.colors, *self.ignore]
        if not values or len(set(values)) < len(values) or not all(0 <= value < IGNORE for value in values):
            raise ConfigError(
                f"class values are {values}, expected at least one, all different and in 0..254; give the whole class "
                "table"
            )
        # A value of two meanings would be read as the first of them without a word.
        stored = [*self.in_masks, *self.unlabelled]
        if len(set(stored)) < len(stored) or min(stored) < 0 or IGNORE in stored:
            raise ConfigError(
                f"classes have the values {list(self.in_masks)} in masks, {list(self.unlabelled)} are ignored, "
                "expected all different, 0 or more, and not 255, which always means not labelled; correct them"
            )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"class names are {', '.join(self.names)}, expected all different; rename a class")
        if len(set(colors)) < len(colors):
            twice = sorted({hex_of(color) for color in colors if colors.count(color) > 1})
            raise ConfigError(
                f"several classes have the colours {', '.join(twice)}, expected all different; change one"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ClassTable":
        """Read `{classes: [{name, color, value?}, ...], ignore: [color or value, ...], threshold: n}` of a YAML file.

        A colour is `"#RRGGBB"` or `[red, green, blue]`. `value` is that of the class in masks, by default its position
        in the list; the table numbers its classes by their positions, as maps do.

        Raises:
            ConfigError: a key is missing or unknown, or a colour or value is invalid.
        """
        _only(config, {"classes", "ignore", "threshold"}, "a class table")
        classes, stored = [], []
        for place, row in enumerate(config.get("classes") or ()):
            _only(row, {"name", "color", "value"}, f"class {place}")
            if "name" not in row or "color" not in row:
                raise ConfigError(f"class {place} has only {sorted(row)}, expected a name and a color; add them")
            try:
                color = rgb_of(row["color"])
            except ConfigError as error:
                # YAML reads an unquoted #RRGGBB as an empty value.
                unquoted = "" if row["color"] is not None else "; in YAML # begins a comment: put the colour in quotes"
                raise ConfigError(f"class {row['name']}: {error}{unquoted}") from None
            classes.append((place, str(row["name"]), color))
            stored.append(int(row.get("value", place)))
        ignore = config.get("ignore") or ()
        values = tuple(value for value in ignore if isinstance(value, int))
        colors = tuple(rgb_of(color) for color in ignore if not isinstance(color, int))
        # Values that equal the positions are not stored.
        own = () if stored == list(range(len(stored))) else tuple(stored)
        return cls(tuple(classes), colors, config.get("threshold"), values, own)

    @property
    def values(self) -> tuple[int, ...]:
        """Class values in the table's order."""
        return tuple(value for value, _, _ in self.classes)

    @property
    def binary(self) -> bool:
        """Whether one class stands against a background, which has the value 0 and is not painted."""
        return len(self.classes) == 2 and 0 in self.values

    @property
    def in_masks(self) -> tuple[int, ...]:
        """Values of the classes in masks of values, in the table's order."""
        return self.stored or self.values

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the table's order."""
        return tuple(name for _, name, _ in self.classes)

    @property
    def colors(self) -> tuple[RGB, ...]:
        """Class colours in the table's order."""
        return tuple(color for _, _, color in self.classes)


def rgb_of(color: object) -> RGB:
    """Read `"#RRGGBB"`, `"RRGGBB"` or three numbers 0..255.

    Raises:
        ConfigError: it is none of these.
    """
    if (
        isinstance(color, str)
        and len(digits := color.removeprefix("#")) == 6
        and set(digits) <= set("0123456789abcdefABCDEF")
    ):
        return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    if isinstance(color, Sequence) and len(color) == 3 and all(isinstance(c, int) and 0 <= c <= 255 for c in color):
        return int(color[0]), int(color[1]), int(color[2])
    raise ConfigError(f'colour is {color!r}, expected "#RRGGBB" or [red, green, blue] with values 0..255; correct it')


def hex_of(color: RGB) -> str:
    """`#RRGGBB` of a colour."""
    return "#{:02X}{:02X}{:02X}".format(*color)


def label_table(count: int) -> ClassTable:
    """A table of unnamed labels "label 0", "label 1", ..., whose colours differ and never change.

    It has at least three, because two classes are shown as one class and a background.
    """
    # hues in steps of the golden ratio stay apart for any count; saturation and value repeat every 3 and 12 labels
    colors = [
        colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.55, 0.7)[k % 3], (0.95, 0.78, 0.6, 0.42)[k // 3 % 4])
        for k in range(max(count, 3))
    ]
    rows = [(k, f"label {k}", tuple(round(255 * part) for part in color)) for k, color in enumerate(colors)]
    return ClassTable(tuple((k, name, (color[0], color[1], color[2])) for k, name, color in rows))


def decode(
    mask: NDArray[np.integer], table: ClassTable, *, palette: Mapping[int, Sequence[int]] | None = None
) -> NDArray[np.uint8]:
    """Decode a mask file's pixels into class values.

    Args:
        mask: (H, W) class values; (H, W) indices into `palette`; or (H, W, 3 or 4) colours, the fourth channel ignored.
        table: the classes and colours that may occur.
        palette: colour (red, green, blue, ...) of every index, for a palette image whose indices are not class values.

    Returns:
        Class values (H, W) uint8; 255 where the mask is not labelled.

    Raises:
        DataError: a value or colour is not in the table (the message names it, its count and the nearest class), an
            index is not in the palette, or the mask has another shape.
    """
    if mask.ndim == 3 and mask.shape[2] in {3, 4}:
        return _decode_colors(_pack(mask, table.threshold), table)
    if mask.ndim != 2:
        raise DataError(f"a mask has the shape {mask.shape}, expected (height, width) or (height, width, 3 or 4)")
    if palette is not None:
        # Only indices that occur are decoded: unused palette entries may hold any colour.
        used, at_HW = np.unique(mask, return_inverse=True)
        if missing := [int(index) for index in used if int(index) not in palette]:
            raise DataError(
                f"the mask has the indices {missing[:5]}, its palette of {len(palette)} colours lacks them; repair the "
                "mask"
            )
        colors = np.array([list(palette[int(index)])[:3] for index in used], np.int32).reshape(-1, 3)
        blank = np.isin(used, table.unlabelled)
        colors[blank] = table.colors[0]
        classes = _decode_colors(_pack(colors, table.threshold)[at_HW].reshape(mask.shape), table)
        return np.where(blank[at_HW].reshape(mask.shape), np.uint8(IGNORE), classes)
    open_values = (*table.unlabelled, IGNORE)
    decoded_HW, wrong_HW = _looked_up(
        mask, (*table.in_masks, *open_values), (*table.values, *[IGNORE] * len(open_values))
    )
    if wrong_HW.any():
        unknown, counts = np.unique(mask[wrong_HW], return_counts=True)
        value, count = int(unknown[counts.argmax()]), int(counts.max())
        nearest, name = min(zip(table.in_masks, table.names, strict=True), key=lambda row: abs(row[0] - value))
        raise DataError(
            f"mask value {value} ({count} pixels; {len(unknown)} unknown values in all) is not a class, the nearest is "
            f"{nearest} ({name}); add it to the classes, to ignore if it means not labelled, or correct the mask"
        )
    return decoded_HW


def _looked_up(
    codes_HW: NDArray[np.integer], known: Sequence[int], values: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """(the value of each code, where a code is not known)."""
    # Binary search in the sorted codes; searchsorted returns len(known) beyond the last one.
    order = np.argsort(known)
    codes = np.asarray(known)[order]
    at_HW = np.searchsorted(codes, codes_HW).clip(max=len(codes) - 1)
    return np.asarray(values, np.uint8)[order][at_HW], codes[at_HW] != codes_HW


def mean_color(image_HWC: NDArray[np.uint8], labels_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Paint every pixel with the mean colour of its label (rounded to the nearest integer).

    Args:
        image_HWC: image, uint8, any number of channels.
        labels_HW: label of every pixel, 0 or more.

    Returns:
        The painted image (H, W, C) uint8.
    """
    labels = labels_HW.ravel().astype(np.intp)
    counts = np.maximum(np.bincount(labels), 1)
    channels = [np.bincount(labels, weights=image_HWC[..., c].ravel()) for c in range(image_HWC.shape[2])]
    means = np.rint(np.stack(channels, axis=1) / counts[:, None]).astype(np.uint8)
    return means[labels].reshape(image_HWC.shape)


def overlay(
    image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.uint8], colors: Mapping[int, RGB], alpha: float = 0.5
) -> NDArray[np.uint8]:
    """Lay the colours of a class mask over an image.

    Args:
        image_HWC: RGB image, uint8.
        mask_HW: class of every pixel, uint8.
        colors: colour of every class to show; pixels of other classes stay unchanged.
        alpha: share of the colour, 0..1.

    Returns:
        The painted image (H, W, 3) uint8.
    """
    # Lookup tables of all 256 values: one indexing step paints any number of classes.
    shown = np.zeros(256, np.float32)
    lut = np.zeros((256, 3), np.float32)
    for value, color in colors.items():
        shown[value], lut[value] = alpha, color
    share_HW1 = shown[mask_HW][..., None]
    return np.rint(image_HWC * (1 - share_HW1) + lut[mask_HW] * share_HW1).astype(np.uint8)


def _only(row: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(row) - known):
        raise ConfigError(
            f"{what} has the unknown keys {unknown}, expected some of {sorted(known)}; remove or rename them"
        )


def _pack(colors: NDArray[np.integer], threshold: int | None = None) -> NDArray[np.int32]:
    """One integer 0xRRGGBB for every colour of an array (..., 3 or more), its channels made 0 or 255 by a threshold."""
    wide = colors[..., :3].astype(np.int32)
    wide = wide if threshold is None else np.where(wide >= threshold, 255, 0)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _decode_colors(codes_HW: NDArray[np.int32], table: ClassTable) -> NDArray[np.uint8]:
    # Colours are packed into one number each, which one search compares.
    known = _pack(np.array([*table.colors, *table.ignore], np.int32))
    decoded_HW, wrong_HW = _looked_up(codes_HW, known.tolist(), (*table.values, *[IGNORE] * len(table.ignore)))
    if wrong_HW.any():
        unknown, counts = np.unique(codes_HW[wrong_HW], return_counts=True)
        # The most frequent unknown colour is the likely class; rare ones are edges blurred by JPEG.
        code = int(unknown[counts.argmax()])
        color = code >> 16, code >> 8 & 255, code & 255
        value, name, near = min(
            table.classes, key=lambda row: sum((a - b) ** 2 for a, b in zip(row[2], color, strict=True))
        )
        raise DataError(
            f"mask colour {hex_of(color)} ({counts.max()} pixels; {len(unknown)} unknown colours in all) is not a "
            f"class, the nearest is {hex_of(near)} ({value} {name}); add it to the classes or ignored colours, or "
            "correct the mask"
        )
    return decoded_HW
