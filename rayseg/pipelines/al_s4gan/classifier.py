"""The classifier of active learning: trained on the labelled chips of a round, it scores all other chips.

Its network is trained from its first weights in each round; or it stays frozen, and each round fits a logistic
regression to the features of all chips.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from rayseg.config import Config, Workers
from rayseg.engine import flow
from rayseg.engine.flow import Work
from rayseg.engine.ledger import Ledger
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Step
from rayseg.errors import RunIncomplete
from rayseg.io.class_tables import Classes
from rayseg.io.tables import concurrently, read_array
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Scaling
from rayseg.pipelines.al_s4gan import annotation, chip_pixels, chip_pool
from rayseg.stages.rows import ChipRow
from rayseg.stages.score import ReadWith, Score, features_path
from rayseg.steps import models
from rayseg.train.augment import Augment
from rayseg.train.classifier import ClassifierConfig, expect_trainable, fit_classifier
from rayseg.train.learning import Learning, Rates, trained
from rayseg.vision import linear
from rayseg.vision.color import ClassTable, label_table

AT_ONCE = 8
"""Chips per batch of the classifier."""


class ChipsClassifierConfig(ClassifierConfig):
    """A classifier of chips into many classes; the defaults are the paper's for UC Merced."""

    network: Literal["chips", "over-imagenet"] = "over-imagenet"
    """over-imagenet: a head on the 1000 outputs of a whole network of timm; chips: a head on an encoder."""
    encoder: str = "resnet101"
    """A name of timm; of segmentation_models_pytorch too for `network: chips`."""
    positive: int | None = None
    """None draws all chips with the same probability."""
    size: Annotated[int, Field(gt=0)] = 256
    """Side in pixels of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    epochs: Annotated[int, Field(gt=0)] = 50
    """One epoch is one pass over the labelled chips."""
    rates: Rates = ((50, 1e-3),)
    """(until epoch, learning rate)."""
    learning: Learning = Learning(batch=4, optimizer="sgd")
    """The optimizer and its batches."""
    augment: Augment = Augment(quadrants=0.0, rotate=0.0)
    """Random changes of training chips."""


class Common(Config):
    """Settings that all rounds share."""

    kinds: Classes
    """Classes of the masks; labelled images have classes of their own."""
    scaling: Scaling
    """From the chips' values to the classifier's input."""
    seed: int
    """Random seed of the run."""
    workers: Workers = 0
    """As of the pipeline."""
    patience: float = 1800.0
    """Seconds after which a chip fails that cannot be read or scored."""
    classifies: bool = True
    """Whether a classifier is trained; the random strategy needs none."""

    @property
    def classes(self) -> ClassTable:
        """The table of the masks' classes."""
        return self.kinds.table


def described(settings: ClassifierConfig, classes: Sequence[str], common: Common) -> Bundle:
    """Metadata of the classifier's bundle; classes of the masks keep their colours."""
    # Classes of labelled images may be others than those of masks.
    colors = dict(zip(common.classes.names, common.classes.colors, strict=True))
    palette = label_table(len(classes)).colors
    coloured = tuple((k, name, colors.get(name, palette[k])) for k, name in enumerate(classes))
    return models.classifier_bundle(settings, coloured, name="classifier", scaling=common.scaling)


def class_probabilities(
    step: Step,
    listed: Step,
    seen: Step | None,
    chosen: list[Row],
    others: list[Row],
    settings: ChipsClassifierConfig,
    common: Common,
    *,
    features: bool,
) -> dict[str, list[float]]:
    """Learn from the chosen chips; return the class probabilities of the others and of the validation chips, by id.

    Args:
        step: the current step.
        listed: the step with the pool.
        seen: the step with the features of all chips, if the network is frozen.
        chosen: rows of the labelled chips, as `queries.labelled` has them.
        others: rows of the chips to score.
        settings: the network and its training.
        common: the settings that all rounds share.
        features: whether a trained network also writes the features of all chips.

    Raises:
        RunIncomplete: chosen chips have no label yet, or a chip was not scored.
    """
    # The table of selected chips has ids alone.
    by_id = {row["id"]: row for row in chip_pool.rows_of(listed, "pool")}
    own = [by_id[row["id"]] for row in chosen]
    labels = annotation.known_labels(step.root, own, common.classes)
    scored = others + chip_pool.rows_of(listed, "validation")
    # The last round without validation chips has nothing to measure.
    if not scored:
        return {}
    if seen is None:
        return fit_and_score(step, listed, own, labels, scored, settings, common, features=features)
    classes, ids = listed.value["classes"], [row["id"] for row in scored]
    # The network is the same in every round, so its features are read and not computed.
    known_NF, features_MF = read_features(seen, [row["id"] for row in own]), read_features(seen, ids)
    numbers = np.array([classes.index(label) for label in labels])
    p_MK = linear.class_probabilities(known_NF, numbers, features_MF, classes=len(classes))
    return {chip: p.tolist() for chip, p in zip(ids, p_MK, strict=True)}


def fit_and_score(
    step: Step,
    listed: Step,
    own: list[Row],
    labels: list[str],
    scored: list[Row],
    settings: ChipsClassifierConfig,
    common: Common,
    *,
    features: bool,
) -> dict[str, list[float]]:
    """Train a network on the labelled chips `own`; return the class probabilities that it computes, by id."""
    classes = listed.value["classes"]
    learning = settings.learning.model_copy(update={"seed": common.seed})
    settings = settings.model_copy(update={"learning": learning})
    fit_classifier(
        settings,
        chip_pixels.labelled_chips(own, labels, classes),
        models.training_setup(
            step,
            workers=common.workers,
            expect=partial(expect_trainable, settings),
            described=described(settings, classes, common),
            prefix=step.prefix / "training",
        ),
        scaling=common.scaling,
    )
    prefix = str(step.prefix / "classifier")
    model = trained(settings.build(classes=len(classes), weights="none"), step.prefix / "training")
    bundle.save(prefix, described(settings, classes, common), model)
    # Diverse selections compare all chips, so they need the features of the labelled ones too.
    rows, folder = (scored + own, str(step.prefix / "features")) if features else (scored, None)
    return score_chips(step, rows, Score(prefix, folder), common)


def score_chips(step: Step, rows: list[Row], score: Score, common: Common) -> dict[str, list[float]]:
    """Run the classifier on all rows; return their class probabilities by id.

    Raises:
        RunIncomplete: a chip was not scored.
    """
    write_rows(step.manifest, rows)
    ledger = Ledger(str(step.prefix / "ledger"))
    works = [
        Work(ReadWith(chip_pixels.image_of), batch=AT_ONCE),
        Work(score, batch=AT_ONCE, cpus=0.5, gpus=0.5, model=True),
    ]
    engine = replace(step.engine, retry=True)  # a selection needs all of them
    flow.run(rows, works, ledger, engine, record=ChipRow.from_row, title="chips", stall_seconds=common.patience)
    # A choice from a part of the pool would be another choice, so one missing chip ends the step.
    p_by_id = {}
    for record in ledger.read().values():
        if record.status != "done":
            raise RunIncomplete(
                f"chip {record.id} was not scored ({record.reason}); fix the cause, then run the same command to resume"
            )
        p_by_id[record.id] = list(record.facts["p"])
    return p_by_id


def read_features(step: Step, chips: Sequence[str]) -> np.ndarray:
    """Features of chips as a step wrote them, (chips, features)."""
    prefix = str(step.prefix / "features")
    return np.stack(list(concurrently(read_array, [features_path(prefix, chip) for chip in chips])))


def accuracy(listed: Step, p_by_id: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy of the classifier on the validation chips; empty without them."""
    rows, classes = chip_pool.rows_of(listed, "validation"), listed.value["classes"]
    if not rows:
        return {}
    truth = np.array([classes.index(row["label"]) for row in rows])
    predicted = np.array([int(np.argmax(p_by_id[row["id"]])) for row in rows])
    confusion = Confusion.from_arrays(truth, predicted, len(classes))
    return {"accuracy": confusion.overall_accuracy, "class_accuracy": confusion.class_accuracy}
