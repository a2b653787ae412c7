"""Labelled chips of a run: list and split them once, read them during training, train a classifier on them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rayseg.config import Config
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import expect_ids
from rayseg.geo.region import Region
from rayseg.io import labels, stac_read
from rayseg.io.labels import Chip
from rayseg.models.bundle import Bundle
from rayseg.steps import models
from rayseg.store import Location, split_location
from rayseg.train import probe
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, fit_classifier
from rayseg.train.labels import probabilities
from rayseg.train.learning import trained
from rayseg.vision.fill import filled

MOST_CALIBRATED = 500
"""Negative chips that a threshold is taken from, at most."""


class ChipsConfig(Config):
    """The labelled chips."""

    source: Location | None = None
    """Catalogue of the chips (`catalog.json#collection`); by default `#chips` of the region's catalogue."""
    size: Annotated[int, Field(gt=0)] = 512
    """Side in px of the central part of each chip that is used."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of the chips of each class that is held out from training; the held-out chips select the classifier's epoch
    and measure its accuracy."""
    seed: int = 1337
    """Seed of the split."""


def list_chips(
    step: Step, region: Region, expected: tuple[str, ...], config: ChipsConfig, *, listed: Sequence[Chip] | None = None
) -> dict[str, Any]:
    """List and split the chips; later steps read `<step>/chips.parquet`.

    Args:
        step: the current step.
        region: its catalogue contains the chips, unless the configuration names another.
        expected: the allowed labels; each must occur at least once.
        config: location of the chips and settings of the split.
        listed: the chips, if `find_chips` has already listed them.

    Returns:
        `source`: location of the chips; and label -> number of chips.

    Raises:
        RaysegError: see `find_chips`.
    """
    chips = find_chips(region, expected, config) if listed is None else listed
    held_out = np.zeros(len(chips), bool)
    # Stratified split: each label has its own random stream, so one label's chips do not affect the draw of another.
    for number, label in enumerate(expected):
        positions = np.flatnonzero([chip.label == label for chip in chips])
        order = np.random.default_rng((config.seed, number)).permutation(positions)
        held_out[order[: round(config.held_out * len(order))]] = True
    rows = [chip.to_row() | {"held_out": held} for chip, held in zip(chips, held_out.tolist(), strict=True)]
    write_rows(step.prefix / "chips.parquet", rows)
    counts = {label: sum(chip.label == label for chip in chips) for label in expected}
    return {"source": config.source or f"{region.catalog}#chips"} | counts


def find_chips(region: Region, expected: tuple[str, ...], config: ChipsConfig) -> list[Chip]:
    """Chips of a region, checked: each has one of the expected labels, and each label has a training chip.

    Raises:
        ConfigError: neither the region nor the configuration names a catalogue.
        DataError: there are no chips, a chip has an unexpected label, a label is missing, or all chips of a label
            are held out.
    """
    if not (config.source or region.catalog):
        raise ConfigError(
            f"region {region.name} has no catalogue with chips; name one with --set chips.source=catalog.json#chips"
        )
    uri, collection = split_location(config.source or f"{region.catalog}#chips")
    chips = labels.chips_of(stac_read.open_items(uri, collection or None))
    expect_ids([chip.id for chip in chips])
    unknown = sorted({str(chip.label) for chip in chips} - set(expected))
    if unknown:
        raise DataError(
            f"chips of {uri} are labelled {', '.join(unknown)}, expected {' or '.join(expected)}; correct the labels"
        )
    for label in expected:
        count = sum(chip.label == label for chip in chips)
        if not count:
            raise DataError(f"no chip of {uri} is labelled {label}, expected chips of every label; add some")
        if round(config.held_out * count) == count:
            raise DataError(
                f"chips.held_out {config.held_out} holds out all {count} chips of {uri} labelled {label}; lower it"
            )
    return chips


def rows_of(listed: Step, *, held_out: bool) -> list[Row]:
    """Rows of `Chip.to_row`: the training chips, or the held-out chips."""
    return [row for row in read_rows(listed.prefix / "chips.parquet") if row["held_out"] == held_out]


def read_image(rows: list[Row], size: int, position: int) -> np.ndarray:
    """The centre of a chip, (size, size, 3) uint8; nodata is filled by mirroring."""
    return filled(*labels.read_chip(Chip.from_row(rows[position]), size))


def learnable(
    rows: list[Row], labels: Sequence[str], size: int, *, read_mask: Callable[[int], np.ndarray] | None = None
) -> Chips:
    """Chips for training.

    Args:
        rows: of `rows_of`.
        labels: names of the classes, in order.
        size: side of the central part that is used, in px.
        read_mask: position -> mask (size, size) uint8; None without masks.
    """
    ids, classes = tuple(row["id"] for row in rows), tuple(labels.index(row["label"]) for row in rows)
    return Chips(ids, classes, partial(read_image, rows, size), read_mask)


def fit_on_chips(
    step: Step, listed: Step, settings: ClassifierConfig, described: Bundle, *, size: int, workers: int
) -> dict[str, Any]:
    """Train a classifier on the training chips and keep it; the held-out chips select the epoch.

    Args:
        step: the current step; checkpoints are written under its prefix.
        listed: the step that listed the chips.
        settings: the network and its training.
        described: metadata of the classifier's bundle, without metrics.
        size: side of the chips in px.
        workers: number of Ray Train processes.

    Returns:
        `bundle`: prefix of the classifier; `measures`: metrics of the selected epoch.
    """
    labels = [name for _, name, _ in described.classes]
    learnt, held_out = (learnable(rows_of(listed, held_out=part), labels, size) for part in (False, True))
    measures = fit_classifier(
        settings,
        learnt,
        models.training_setup(step, workers=workers),
        scaling=described.scaling,
        held_out=held_out if len(held_out) else None,
    )
    model = trained(settings.build(classes=len(labels), weights="none"), step.prefix)
    kept = described.model_copy(update={"metrics": dict(measures)})
    return {"bundle": models.keep_model(step, kept, model), "measures": measures}


@torch.inference_mode()
def threshold_at(
    marked: float | None, model: nn.Module, negatives: list[Row], described: Bundle, *, size: int
) -> float:
    """The lowest probability that at most a share of the negative chips' pixels exceeds.

    Args:
        marked: the share; None takes the probability 0.5.
        model: of one class.
        negatives: rows of chips without the class; the first `MOST_CALIBRATED` are used.
        described: the model's scaling and architecture.
        size: side of the chips in px.

    Raises:
        DataError: there is no negative chip.
    """
    if marked is None:
        return 0.5
    if not negatives:
        raise DataError(
            "no negative chip is in training to set the threshold by; lower chips.held_out or omit `marked`"
        )
    unit, negatives = 32 * int(described.architecture.options.get("reduce", 1)), negatives[:MOST_CALIBRATED]
    counts = np.zeros(1001, np.int64)  # pixels by probability in thousandths: memory is the same for any chips
    for position in probe.batches(range(len(negatives)), len(negatives)):
        image_CHW = read_image(negatives, size, position).transpose(2, 0, 1)
        normal = described.scaling.normalize(torch.from_numpy(image_CHW.copy())[None])
        p_HW = probabilities(model, normal, unit=unit, flip=False)[0, 0].numpy()
        counts += np.bincount(np.rint(p_HW * 1000).astype(np.int64).ravel(), minlength=1001)
    low_enough = counts[::-1].cumsum()[::-1] / counts.sum() <= marked
    return float(np.argmax(low_enough)) / 1000 if low_enough.any() else 1.0
