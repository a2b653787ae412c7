"""Labelled chips of a run: found once, divided once, read when they are needed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from rayseg.config import Config
from rayseg.engine.manifest import read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import expect_ids
from rayseg.geo.region import Region
from rayseg.io import labels, stac_read
from rayseg.io.labels import Chip
from rayseg.store import Location
from rayseg.train.batches import Chips
from rayseg.vision.fill import filled

Row = dict[str, Any]


class ChipsConfig(Config):
    """The labelled chips."""

    source: Location | None = None
    """Catalogue of the chips (`catalog.json#collection`); by default the collection `chips` of the region's."""
    size: Annotated[int, Field(gt=0)] = 512
    """Side in px of what is used, the middle of each chip."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of the chips of each class kept from training, to choose the classifier's epoch and to measure it."""
    seed: int = 1337
    """Of the division."""


def list_chips(step: Step, region: Region, expected: tuple[str, ...], config: ChipsConfig) -> dict[str, Any]:
    """Find the chips and divide them; `<step>/chips.parquet` is what other steps read.

    Args:
        step: this one.
        region: in whose catalogue they are, unless the configuration names another.
        expected: the labels there may be, each at least once.
        config: where they are and how they are divided.

    Returns:
        `source`: where they are; and label -> how many.

    Raises:
        RaysegError: see `find_chips`.
    """
    found = find_chips(region, expected, config)
    held = _held_out([str(chip.label) for chip in found], expected, config)
    rows = [chip.to_row() | {"held_out": kept} for chip, kept in zip(found, held, strict=True)]
    write_rows(step.prefix / "chips.parquet", rows)
    return {"source": _source(region, config)} | {label: sum(c.label == label for c in found) for label in expected}


def find_chips(region: Region, expected: tuple[str, ...], config: ChipsConfig) -> list[Chip]:
    """The chips of a region, by id; each has one of the labels expected, and each label a chip in training.

    Raises:
        ConfigError: neither the region nor the configuration says where they are, or there is nothing.
        DataError: there are no chips, one has another label, a label is missing, or all of its chips are held out.
    """
    if not (config.source or region.catalog):
        raise ConfigError(
            f"region {region.name} has no catalogue with chips; name one with --set chips.source=catalog.json#chips"
        )
    uri, _, collection = _source(region, config).partition("#")
    found = labels.chips_of(stac_read.open_items(uri, collection or None))
    expect_ids([chip.id for chip in found])
    unknown = sorted({str(chip.label) for chip in found} - set(expected))
    if unknown:
        raise DataError(
            f"chips of {uri} are labelled {', '.join(unknown)}, expected {' or '.join(expected)}; correct them"
        )
    for label in expected:
        count = sum(chip.label == label for chip in found)
        if not count:
            raise DataError(f"no chip of {uri} is labelled {label}, expected chips of every label; add some")
        if round(config.held_out * count) == count:
            raise DataError(
                f"chips.held_out {config.held_out} keeps all {count} chips of {uri} labelled {label} from training; "
                "lower it"
            )
    return found


def _source(region: Region, config: ChipsConfig) -> str:
    return config.source or f"{region.catalog}#chips"


def _held_out(of: list[str], expected: tuple[str, ...], config: ChipsConfig) -> list[bool]:
    """Which chips are kept from training: the same share of every label, drawn by seed."""
    held = np.zeros(len(of), bool)
    for number, label in enumerate(expected):
        positions = np.flatnonzero(np.array(of) == label)
        order = np.random.default_rng((config.seed, number)).permutation(positions)
        held[order[: round(config.held_out * len(order))]] = True
    return [bool(one) for one in held]


def rows_of(listed: Step, *, held_out: bool) -> list[Row]:
    """Rows of `Chip.to_row` of the chips in training, or of those held out."""
    return [row for row in read_rows(listed.prefix / "chips.parquet") if row["held_out"] == held_out]


def read_image(rows: list[Row], size: int, position: int) -> np.ndarray:
    """The middle of a chip, (size, size, 3) uint8; mirrored where it has no data."""
    return filled(*labels.read_chip(Chip.from_row(rows[position]), size))


def learnable(
    rows: list[Row], labels: Sequence[str], size: int, *, read_mask: Callable[[int], np.ndarray] | None = None
) -> Chips:
    """Chips for training.

    Args:
        rows: of `rows_of`.
        labels: what the chips may be labelled, in the order of the classes.
        size: side of what is used, in px.
        read_mask: position -> mask (size, size) uint8, where there are masks.
    """
    ids, classes = tuple(row["id"] for row in rows), tuple(labels.index(row["label"]) for row in rows)
    return Chips(ids, classes, partial(read_image, rows, size), read_mask)
