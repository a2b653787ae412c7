"""Labelled chips of a run: list and split them once, read them during training, train a classifier on them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rayseg.config import Config, added
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import expect_ids, slug
from rayseg.geo.region import Region
from rayseg.io import labels, stac_read
from rayseg.io.labels import Chip
from rayseg.io.masks import by_image, expect_fit, expect_names, masks_of, read_classes, two_classes, whole
from rayseg.io.name_lists import Paths
from rayseg.io.scenes import LabelledImage, masks_on, placed
from rayseg.io.sources import Source
from rayseg.models.bundle import Bundle
from rayseg.steps import models
from rayseg.store import Location, split_location
from rayseg.train import probe
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, expect_trainable, fit_classifier
from rayseg.train.labels import probabilities
from rayseg.train.learning import trained
from rayseg.vision.color import ClassTable
from rayseg.vision.crops import middle
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
    test: Paths | None = added(default=None)
    """Instead of a share: the chips that are held out, by id or file, or a list of them (.txt, .csv, .npy). Without it
    chips whose folder is called test or val are held out, if there are some."""
    masks: Location | None = added(default=None)
    """Drawn masks of some chips, called by the chip's id or its file's stem: a folder, or `catalog.json#collection`.
    These chips are held out; the masks select the segmenter's epoch."""


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
        `source`: location of the chips; label -> number of chips; `troubles`: masks that cannot be read.

    Raises:
        RaysegError: see `find_chips`.
    """
    chips = find_chips(region, expected, config) if listed is None else listed
    failed: dict[str, str] = {}
    masks = masks_of_chips(chips, config, failed)
    held_out = np.array([chip.id in masks for chip in chips], bool)
    if named := held_out_by_name(chips, config):
        held_out |= np.array([chip.id in named for chip in chips], bool)
    # Stratified split: each label has its own random stream, so one label's chips do not affect the draw of another.
    for number, label in enumerate(() if named else expected):
        positions = np.flatnonzero([chip.label == label for chip in chips])
        order = np.random.default_rng((config.seed, number)).permutation(positions)
        order = order[np.argsort(~held_out[order], kind="stable")]  # chips with masks first
        held_out[order[: round(config.held_out * len(order))]] = True
    rows = [chip.to_row() | {"held_out": held} for chip, held in zip(chips, held_out.tolist(), strict=True)]
    write_rows(step.prefix / "chips.parquet", rows)
    counts = {label: sum(chip.label == label for chip in chips) for label in expected}
    counts |= {"masks": len(masks)} if config.masks else {}
    return {"source": config.source or f"{region.catalog}#chips"} | counts | ({"troubles": failed} if failed else {})


def find_chips(region: Region, expected: tuple[str, ...], config: ChipsConfig) -> list[Chip]:
    """Chips of a region, checked: each has one of the expected labels, and each label has a training chip.

    Raises:
        ConfigError: neither the region nor the configuration names a catalogue.
        DataError: there are no chips, a chip has an unexpected label, a label is missing, all chips of a label are
            held out, or a mask fits no chip.
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
    # Every label needs a chip to learn from, in whichever way the others were set apart.
    masks, named = masks_of_chips(chips, config), held_out_by_name(chips, config)
    for label in expected:
        ids = {chip.id for chip in chips if chip.label == label}
        if not ids:
            raise DataError(f"no chip of {uri} is labelled {label}, expected chips of every label; add some")
        if not named and round(config.held_out * len(ids)) == len(ids):
            raise DataError(
                f"chips.held_out {config.held_out} holds out all {len(ids)} chips of {uri} labelled {label}; lower it"
            )
        if masks.keys() >= ids:
            raise DataError(
                f"all {len(ids)} chips of {uri} labelled {label} have a mask in chips.masks, which holds them out; "
                "expected some to learn from; leave masks out"
            )
    return chips


def held_out_by_name(chips: Sequence[Chip], config: ChipsConfig) -> set[str]:
    """Ids of the chips that the configuration or their folders hold out; empty where a share is drawn.

    Raises:
        DataError: a name is that of no chip, or of several; or all chips of a label are held out.
    """
    named: set[str] = {chip.id for chip in chips if chip.part in {"test", "validation"}} if not config.test else set()
    stems = {chip.id: slug(PurePath(chip.source.assets[0][0]).stem) for chip in chips}
    for name in config.test or ():
        path = PurePath(name)
        fitting = [chip for chip in chips if slug(path.name) in {chip.id, stems[chip.id]}]
        # Files of two classes may have one name: their folders differ.
        if len(fitting) > 1:
            fitting = [chip for chip in fitting if chip.label in path.parts]
        if len(fitting) != 1:
            raise DataError(
                f"chips.test names {name}, which is {'several chips' if fitting else 'no chip'}, expected an id such "
                f"as {chips[0].id}, or a file in the folder of its class; correct the list"
            )
        named.add(fitting[0].id)
    for label in sorted({str(chip.label) for chip in chips} if named else ()):
        if named >= {chip.id for chip in chips if chip.label == label}:
            raise DataError(f"all chips labelled {label} are held out, expected some to learn from; shorten chips.test")
    return named


def masks_of_chips(
    chips: Sequence[Chip], config: ChipsConfig, failed: dict[str, str] | None = None
) -> dict[str, tuple[Source, ...]]:
    """Id of a chip -> its drawn mask (or the parts of it), of the chips that have one.

    A mask that cannot be read is left out; it is added to `failed` with its error.

    Raises:
        DataError: a mask is called like no chip or like several, or has another size, or none can be read.
    """
    if not config.masks:
        return {}
    failed = {} if failed is None else failed
    readable = whole(masks_of(config.masks, failed=failed), failed=failed)
    # Masks are called by the id or by the file; two folders may hold files of one name.
    named: dict[str, set[str]] = defaultdict(set)
    for chip in chips:
        for name in (chip.id, PurePath(chip.source.assets[0][0]).stem):
            named[slug(name)].add(chip.id)
    by_id, masks = {chip.id: chip for chip in chips}, {}
    for name, parts in by_image(readable).items():
        fitting = sorted(named.get(name, ()))
        if len(fitting) != 1:
            raise DataError(
                f"mask {parts[0].assets[0][0]} is called like {' and '.join(fitting) or 'no chip'}, expected the id of "
                f"one of the {len(chips)} chips ({chips[0].id}, ...) or its file's stem; rename or remove it"
            )
        for mask in parts:
            expect_fit(mask, (by_id[fitting[0]].source.height, by_id[fitting[0]].source.width), fitting[0])
        masks[fitting[0]] = parts
    return masks


def drawn_masks(chips: Sequence[Chip], table: ClassTable, config: ChipsConfig) -> list[LabelledImage]:
    """The chips that have a drawn mask, with it.

    Raises:
        DataError: a mask fits no chip, cannot be read, names other classes, or has a value that is not a class.
    """
    masks = masks_of_chips(chips, config)
    every = [mask for parts in masks.values() for mask in parts]
    expect_names(every, table, str(config.masks))
    read_as = iter(two_classes(every, table, str(config.masks)))
    masks = {name: tuple(next(read_as) for _ in parts) for name, parts in masks.items()}
    images = [placed(chip.id, chip.id, chip.source, masks[chip.id]) for chip in chips if chip.id in masks]
    for position in range(len(images)):
        read_mask(images, table, config.size, position)
    return images


def masked(listed: Step, table: ClassTable, labels: Sequence[str], config: ChipsConfig) -> Chips | None:
    """The held-out chips with drawn masks, to select an epoch by; None without any.

    Args:
        listed: the step that listed the chips.
        table: the classes of the masks.
        labels: names of the chips' classes, in order.
        config: where the masks are, and the size of the central part that is used.

    Raises:
        DataError: see `drawn_masks`.
    """
    rows = read_rows(listed.prefix / "chips.parquet") if config.masks else []
    images = {image.id: image for image in drawn_masks([Chip.from_row(row) for row in rows], table, config)}
    held = [row for row in rows if row["held_out"] and row["id"] in images]
    if not held:
        return None
    read = partial(read_mask, [images[row["id"]] for row in held], table, config.size)
    return learnable(held, labels, config.size, read_mask=read)


def read_mask(images: list[LabelledImage], table: ClassTable, size: int, position: int) -> np.ndarray:
    """Classes of the centre of a chip, (size, size) uint8; 255 where it is not labelled."""
    image = images[position]
    return read_classes(masks_on(image), image.grid, middle(image.window, size), table)


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
        workers: processes of Ray Train; 0 chooses them (`models.training_setup`).

    Returns:
        `bundle`: prefix of the classifier; `measures`: metrics of the selected epoch.
    """
    # The order of the classes is the order of the network's outputs.
    labels = [name for _, name, _ in described.classes]
    learnt, held_out = (learnable(rows_of(listed, held_out=part), labels, size) for part in (False, True))
    measures = fit_classifier(
        settings,
        learnt,
        models.training_setup(step, workers=workers, expect=partial(expect_trainable, settings), described=described),
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
    # Chips are extended to whole units of the encoder, whose five stages halve them.
    unit, negatives = 32 * int(described.architecture.options.get("reduce", 1)), negatives[:MOST_CALIBRATED]
    counts = np.zeros(1001, np.int64)  # pixels by probability in thousandths: memory is the same for any chips
    for position in probe.batches(range(len(negatives)), len(negatives)):
        image_CHW = read_image(negatives, size, position).transpose(2, 0, 1)
        normal = described.scaling.normalize(torch.from_numpy(image_CHW.copy())[None])
        p_HW = probabilities(model, normal, unit=unit, flip=False)[0, 0].numpy()
        counts += np.bincount(np.rint(p_HW * 1000).astype(np.int64).ravel(), minlength=1001)
    # Share of the pixels at or above each thousandth; the first one low enough is the threshold.
    low_enough = counts[::-1].cumsum()[::-1] / counts.sum() <= marked
    return float(np.argmax(low_enough)) / 1000 if low_enough.any() else 1.0
