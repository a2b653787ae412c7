"""Active learning: a classifier selects the chips worth a mask (Desai & Ghose 2022, WACV, section 3).

Public functions with a `step` are steps of a `Run`. `<step>/labelled.parquet` lists every chip selected so far, in
order: its round, the strategy's score, the predicted class and its probability.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from rayseg.config import Config, Workers
from rayseg.engine import flow
from rayseg.engine.flow import Work
from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import RunIncomplete
from rayseg.io.class_tables import Classes
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Scaling
from rayseg.pipelines.al_s4gan import annotation, chip_pool
from rayseg.stages.rows import ChipRow
from rayseg.stages.score import ReadWith, Score, features_path
from rayseg.steps import models, report
from rayseg.train.augment import Augment
from rayseg.train.classifier import ClassifierConfig, fit_classifier
from rayseg.train.learning import Learning, Rates, trained
from rayseg.vision import linear, query_strategies
from rayseg.vision.color import ClassTable, label_table
from rayseg.vision.query_strategies import SCORES, Budget

Strategy = Literal["margin", "entropy", "least-confidence", "random", "k-center", "badge"]
Share = Annotated[float, Field(gt=0, le=1)]
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


class ActiveConfig(Config):
    """How chips are selected; the defaults are the paper's for UC Merced."""

    strategy: Strategy = "entropy"
    """margin, entropy, least-confidence: the least certain chips; k-center, badge: diverse ones, too; random: any
    chips, without a classifier."""
    ratio: Share = 0.125
    """Share of the pool that gets masks."""
    alpha: Share = 0.5
    """Share of these chips that is drawn at random first."""
    beta: Share = 0.9
    """Size of a query relative to the random first draw."""
    count_pool: bool = True
    """Whether the first chips count towards `ratio` and train the segmenter; the paper uses queried chips alone."""
    classifier: ChipsClassifierConfig = ChipsClassifierConfig()
    """The classifier of whole chips, trained from its first weights in each round."""
    frozen: bool = False
    """Whether the network keeps its weights: it computes the features of all chips once, and each round fits a logistic
    regression to them, in a second."""

    def budget(self, chips: int) -> Budget:
        """Numbers of chips that are selected first, per query and in all, from `chips`."""
        return query_strategies.budget(chips, self.ratio, alpha=self.alpha, beta=self.beta, count_pool=self.count_pool)


def draw_first(step: Step, listed: Step, config: ActiveConfig, seed: int) -> dict[str, Any]:
    """Draw the chips at random that are labelled before the first training."""
    rows = chip_pool.rows_of(listed, "pool")
    count = config.budget(len(rows)).initial
    drawn = np.random.default_rng((seed, 0)).permutation(len(rows))[:count]
    return _keep(step, [_picked(rows[at], rank, 0, "first") for rank, at in enumerate(drawn)])


def see(step: Step, listed: Step, config: ActiveConfig, common: "Common") -> dict[str, Any]:
    """Compute the features of all chips with the frozen network: `<step>/features/<chip>.npy`."""
    settings, classes = config.classifier, listed.value["classes"]
    torch.manual_seed(common.seed)  # layers without pretrained weights are the same when the step resumes
    model = settings.build(classes=len(classes), channels=len(chip_pool.BANDS)).eval()
    prefix = str(step.prefix / "classifier")
    bundle.save(prefix, _described(settings, classes, common), model)
    rows = chip_pool.rows_of(listed, "pool") + chip_pool.rows_of(listed, "validation")
    return {"chips": len(_scored(step, rows, Score(prefix, str(step.prefix / "features")), common))}


def query(
    step: Step, listed: Step, seen: Step | None, before: Step, config: ActiveConfig, common: "Common", number: int
) -> dict[str, Any]:
    """Train on the labelled chips, score the others, select some.

    Args:
        step: this step.
        listed: the step with the pool.
        seen: the step with the features of all chips, if the network is frozen.
        before: the step of the previous round.
        config: how chips are selected.
        common: the settings that all rounds share.
        number: of this round, from 1.

    Returns:
        `labelled`: number of chips selected so far; with a classifier also its accuracy on the validation chips.

    Raises:
        RunIncomplete: chips selected before have no label yet.
    """
    rows, chosen = chip_pool.rows_of(listed, "pool"), labelled(before)
    taken = {row["id"] for row in chosen}
    rest = [row for row in rows if row["id"] not in taken]
    budget = config.budget(len(rows))
    last = budget.target + (0 if config.count_pool else budget.initial)
    count = min(budget.query, last - len(chosen))
    p_by_id = _classified(step, listed, seen, chosen, rest, config, common) if common.classifies else {}
    picks = _select(seen or step, rest, [row["id"] for row in chosen], p_by_id, config, count, number, common)
    rows_picked = [
        _picked(rest[at], len(chosen) + k, number, config.strategy, score=score, classes=listed.value["classes"],
                p=p_by_id.get(rest[at]["id"]))
        for k, (at, score) in enumerate(picks)
    ]  # fmt: skip
    measured = _accuracy(listed, p_by_id) if p_by_id else {}
    return _keep(step, chosen + rows_picked) | {"before": len(chosen)} | measured


def measure_last(
    step: Step, listed: Step, seen: Step | None, before: Step, config: ActiveConfig, common: "Common"
) -> dict[str, Any]:
    """Measure a classifier that is trained on all selected chips."""
    chosen = labelled(before)
    p_by_id = _classified(step, listed, seen, chosen, [], config, common)
    return {"before": len(chosen), "labelled": len(chosen)} | _accuracy(listed, p_by_id)


class Common(Config):
    """Settings that all rounds share."""

    kinds: Classes
    """Classes of the masks; labelled images have classes of their own."""
    scaling: Scaling
    """From the chips' values to the classifier's input."""
    seed: int
    """Random seed of the run."""
    workers: Workers = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    patience: float = 1800.0
    """Seconds after which a chip fails that cannot be read or scored."""
    classifies: bool = True
    """Whether a classifier is trained; the random strategy needs none."""

    @property
    def classes(self) -> ClassTable:
        """The table of the masks' classes."""
        return self.kinds.table


def labelled(step: Step) -> list[Row]:
    """Chips selected up to a step, in order, each with the reason."""
    return list(read_rows(step.prefix / "labelled.parquet"))


def _picked(
    row: Row,
    rank: int,
    number: int,
    why: str,
    *,
    score: float | None = None,
    p: Sequence[float] | None = None,
    classes: Sequence[str] = (),
) -> Row:
    best = int(np.argmax(p)) if p is not None else None
    return {
        "id": row["id"],
        "rank": rank,
        "round": number,
        "why": why,
        "score": score,
        "taken_for": None if best is None else classes[best],
        "probability": None if best is None or p is None else float(p[best]),
    }


def _keep(step: Step, rows: list[Row]) -> dict[str, Any]:
    write_rows(step.prefix / "labelled.parquet", rows)
    return {"labelled": len(rows), "table": f"steps/{step.name}/labelled.parquet"}


# -- training and scoring ----------------------------------------------------------------------------------------------


def _classified(
    step: Step,
    listed: Step,
    seen: Step | None,
    chosen: list[Row],
    rest: list[Row],
    config: ActiveConfig,
    common: Common,
) -> dict[str, list[float]]:
    """Class probabilities by id of the rest and of the validation chips (and of labelled ones, for their features)."""
    by_id = {row["id"]: row for row in chip_pool.rows_of(listed, "pool")}
    own = [by_id[row["id"]] for row in chosen]
    labels = annotation.known_labels(step.root, own, common.classes)
    asked = rest + chip_pool.rows_of(listed, "validation")
    if not asked:
        return {}
    if seen is None:
        return _trained(step, listed, own, labels, asked, config, common)
    classes, ids = listed.value["classes"], [row["id"] for row in asked]
    known_NF, asked_MF = (_features(seen, part, wanted=True) for part in ([row["id"] for row in own], ids))
    numbers = np.array([classes.index(label) for label in labels])
    p_MK = linear.class_probabilities(known_NF, numbers, asked_MF, classes=len(classes))
    return {chip: p.tolist() for chip, p in zip(ids, p_MK, strict=True)}


def _trained(
    step: Step,
    listed: Step,
    own: list[Row],
    labels: list[str],
    asked: list[Row],
    config: ActiveConfig,
    common: Common,
) -> dict[str, list[float]]:
    """The same by a classifier that is trained on the labelled chips, `own`."""
    classes = listed.value["classes"]
    learning = config.classifier.learning.model_copy(update={"seed": common.seed})
    settings = config.classifier.model_copy(update={"learning": learning})
    fit_classifier(
        settings,
        chip_pool.labelled_chips(own, labels, classes),
        models.training_setup(step, workers=common.workers, prefix=step.prefix / "training"),
        scaling=common.scaling,
    )
    prefix = str(step.prefix / "classifier")
    model = trained(settings.build(classes=len(classes), weights="none"), step.prefix / "training")
    bundle.save(prefix, _described(settings, classes, common), model)
    features = str(step.prefix / "features") if config.strategy in query_strategies.FEATURES else None
    return _scored(step, asked + (own if features else []), Score(prefix, features), common)


def _described(settings: ClassifierConfig, classes: Sequence[str], common: Common) -> Bundle:
    colors = dict(zip(common.classes.names, common.classes.colors, strict=True))
    palette = label_table(len(classes)).colors
    coloured = tuple((k, name, colors.get(name, palette[k])) for k, name in enumerate(classes))
    return models.classifier_bundle(settings, coloured, name="classifier", scaling=common.scaling)


def _scored(step: Step, rows: list[Row], score: Score, common: Common) -> dict[str, list[float]]:
    write_rows(step.manifest, rows)
    ledger = Ledger(str(step.prefix / "ledger"))
    works = [
        Work(ReadWith(chip_pool.image_of), batch=AT_ONCE),
        Work(score, batch=AT_ONCE, cpus=0.5, gpus=0.5, model=True),
    ]
    engine = replace(step.engine, retry=True)  # a selection needs all of them
    flow.run(rows, works, ledger, engine, record=ChipRow.from_row, title="chips", stall_seconds=common.patience)
    return {chip: _probabilities(record) for chip, record in ledger.read().items()}


def _probabilities(record: Record) -> list[float]:
    if record.status != "done":
        raise RunIncomplete(
            f"chip {record.id} was not scored ({record.reason}); fix the cause, then run the same command to resume"
        )
    return list(record.facts["p"])


def _select(
    step: Step,
    rest: list[Row],
    taken: list[str],
    p_by_id: dict[str, list[float]],
    config: ActiveConfig,
    count: int,
    number: int,
    common: Common,
) -> list[tuple[int, float]]:
    """(position among the rest, score) of the selected chips."""
    p_NK = np.array([p_by_id.get(row["id"], [0.0]) for row in rest])
    features = partial(_features, step, wanted=config.strategy in query_strategies.FEATURES)
    selected = query_strategies.STRATEGIES[config.strategy](
        query_strategies.Pool(p_NK, features([row["id"] for row in rest]), features(taken)),
        count,
        np.random.default_rng((common.seed, number)),
    )
    return [(int(at), float(score)) for at, score in zip(selected.positions, selected.scores, strict=True)]


def _features(step: Step, chips: Sequence[str], *, wanted: bool) -> np.ndarray:
    if not wanted:
        return np.zeros((len(chips), 1))
    prefix = str(step.prefix / "features")
    contents = [features_path(prefix, chip).read_bytes() for chip in chips]
    return np.stack([np.load(io.BytesIO(content), allow_pickle=False) for content in contents])


def _accuracy(listed: Step, p_by_id: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy of the classifier on the validation chips; empty without them."""
    rows, classes = chip_pool.rows_of(listed, "validation"), listed.value["classes"]
    if not rows:
        return {}
    truth = np.array([classes.index(row["label"]) for row in rows])
    predicted = np.array([int(np.argmax(p_by_id[row["id"]])) for row in rows])
    confusion = Confusion.from_arrays(truth, predicted, len(classes))
    return {"accuracy": confusion.overall_accuracy, "class_accuracy": confusion.class_accuracy}


def accuracies(rounds: Sequence[Step]) -> list[tuple[int, float]]:
    """(labels, accuracy) of every classifier that was measured."""
    return [(step.value["before"], step.value["accuracy"]) for step in rounds if "accuracy" in step.value]


def curve(rounds: Sequence[Step]) -> tuple[tuple[str, bytes | str, str], ...]:
    """The learning curve as a picture: (title, SVG, caption); empty for fewer than two points."""
    points = [(float(labels), accuracy) for labels, accuracy in accuracies(rounds)]
    if len(points) < 2:
        return ()
    drawn = report.learning_curves({"classifier": points}, across="labels", up="accuracy")
    return (("Learning curve", drawn, "Accuracy of the classifier of chips on the validation chips."),)


def picks(chosen: Step, strategy: str) -> report.Table:
    """Table of the selected chips and the reasons."""
    rows: list[tuple[str, ...]] = [
        (
            str(row["id"]),
            str(row["round"]),
            "drawn at random first" if row["why"] == "first" else f"{SCORES[row['why']]} {row['score']:.3f}",
            f"{row['taken_for']} ({row['probability']:.2f})" if row["taken_for"] else "",
        )
        for row in labelled(chosen)
    ]
    return f"Chips chosen by {strategy}", ("chip", "round", "why", "taken for"), rows
