"""Active learning: a classifier selects the chips worth a mask (Desai & Ghose 2022, WACV, section 3).

Public functions with a `step` are steps of a `Run`. `<step>/labelled.parquet` lists every chip selected so far, in
order: its round, the strategy's score, the predicted class and its probability.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from rayseg.config import Config, added
from rayseg.engine.manifest import Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import DataError
from rayseg.geo.grid import slug
from rayseg.io.name_lists import Names, write_names
from rayseg.models import bundle
from rayseg.pipelines.al_s4gan import chip_pool, classifier
from rayseg.pipelines.al_s4gan.classifier import ChipsClassifierConfig, Common
from rayseg.stages.score import Score
from rayseg.steps import charts, models, report
from rayseg.vision import query_strategies
from rayseg.vision.query_strategies import SCORES, Budget

Strategy = Literal["margin", "entropy", "least-confidence", "random", "k-center", "badge"]
Share = Annotated[float, Field(gt=0, le=1)]


class ActiveConfig(Config):
    """How chips are selected; the defaults are the paper's for UC Merced."""

    strategy: Strategy = "entropy"
    """margin, entropy, least-confidence: the least certain chips; k-center, badge: diverse ones, too; random: any
    chips, without a classifier."""
    ratio: Share = 0.125
    """Share of the pool that gets masks."""
    chosen: Literal["masked"] | Names | None = added(default=None)
    """Instead of all that: the chips, or the images of the chips, that get masks; names, or a file of them. masked:
    all chips of the pool that have a mask already."""
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


def take_chosen(step: Step, listed: Step, config: ActiveConfig) -> dict[str, Any]:
    """Take the chips that the configuration names, in its order, or all that have masks.

    Raises:
        DataError: a name is neither that of a chip of the pool nor of its image, or no chip has a mask.
    """
    if config.chosen == "masked":
        masked = chip_pool.masked_rows(listed)
        if not masked:
            raise DataError(
                f"active.chosen is masked, but none of the {listed.value['pool']} chips of the pool has a mask; give "
                "pool.masks, or leave active.chosen out to be asked for masks"
            )
        return _keep(step, [_picked(row, rank, 0, "given") for rank, row in enumerate(masked)])
    # Lists of other programs name images, whose cells are then all meant, or single chips.
    by_name: dict[str, list[Row]] = {}
    for row in chip_pool.rows_of(listed, "pool"):
        for name in {row["id"], row["of"]}:
            by_name.setdefault(name, []).append(row)
    names = list(dict.fromkeys(map(slug, config.chosen or ())))
    if unknown := [name for name in names if name not in by_name]:
        raise DataError(
            f"active.chosen names {', '.join(unknown[:5])}, which is not in the pool of {listed.value['pool']} chips "
            f"({', '.join(list(by_name)[:5])}, ...); correct the list, or keep these scenes out of validation"
        )
    rows = {row["id"]: row for name in names for row in by_name[name]}
    return _keep(step, [_picked(row, rank, 0, "given") for rank, row in enumerate(rows.values())])


def draw_first(step: Step, listed: Step, config: ActiveConfig, seed: int) -> dict[str, Any]:
    """Draw the chips at random that are labelled before the first training."""
    rows = chip_pool.rows_of(listed, "pool")
    count = config.budget(len(rows)).initial
    # Each round has a stream of its own, so that a resumed run draws the same chips.
    drawn = np.random.default_rng((seed, 0)).permutation(len(rows))[:count]
    return _keep(step, [_picked(rows[at], rank, 0, "first") for rank, at in enumerate(drawn)])


def see(step: Step, listed: Step, config: ActiveConfig, common: Common) -> dict[str, Any]:
    """Compute the features of all chips with the frozen network: `<step>/features/<chip>.npy`."""
    settings, classes = config.classifier, listed.value["classes"]
    torch.manual_seed(common.seed)  # layers without pretrained weights are the same when the step resumes
    model = settings.build(classes=len(classes), channels=len(models.RGB)).eval()
    prefix = str(step.prefix / "classifier")
    bundle.save(prefix, classifier.described(settings, classes, common), model)
    rows = chip_pool.rows_of(listed, "pool") + chip_pool.rows_of(listed, "validation")
    score = Score(prefix, str(step.prefix / "features"))
    return {"chips": len(classifier.score_chips(step, rows, score, common))}


def query(
    step: Step, listed: Step, seen: Step | None, before: Step, config: ActiveConfig, common: Common, number: int
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
    # 1. how many chips this round selects
    rows, chosen = chip_pool.rows_of(listed, "pool"), labelled(before)
    ids = [row["id"] for row in chosen]
    others = [row for row in rows if row["id"] not in set(ids)]
    budget = config.budget(len(rows))
    last = budget.target + (0 if config.count_pool else budget.initial)
    count = min(budget.query, last - len(chosen))
    # 2. score the others by a classifier of the chips chosen so far
    p_by_id, diverse = {}, config.strategy in query_strategies.FEATURES
    if common.classifies:
        p_by_id = classifier.class_probabilities(
            step, listed, seen, chosen, others, config.classifier, common, features=diverse
        )
    # 3. select by the strategy; a diverse one also sees the features of the chips chosen before
    p_NK = np.array([p_by_id.get(row["id"], [0.0]) for row in others])
    features = [np.zeros((len(part), 1)) for part in (others, chosen)]
    if diverse:
        features = [classifier.read_features(seen or step, part) for part in ([row["id"] for row in others], ids)]
    selected = query_strategies.STRATEGIES[config.strategy](
        query_strategies.Pool(p_NK, *features), count, np.random.default_rng((common.seed, number))
    )
    picked = [
        _picked(others[at], len(chosen) + k, number, config.strategy, score=float(score),
                classes=listed.value["classes"], p=p_by_id.get(others[at]["id"]))
        for k, (at, score) in enumerate(zip(selected.positions, selected.scores, strict=True))
    ]  # fmt: skip
    measured = classifier.accuracy(listed, p_by_id) if p_by_id else {}
    return _keep(step, chosen + picked) | {"before": len(chosen)} | measured


def measure_last(
    step: Step, listed: Step, seen: Step | None, before: Step, config: ActiveConfig, common: Common
) -> dict[str, Any]:
    """Measure a classifier that is trained on all selected chips."""
    chosen = labelled(before)
    features = config.strategy in query_strategies.FEATURES
    p_by_id = classifier.class_probabilities(
        step, listed, seen, chosen, [], config.classifier, common, features=features
    )
    return {"before": len(chosen), "labelled": len(chosen)} | classifier.accuracy(listed, p_by_id)


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
    write_names(step.prefix, "chosen", [row["id"] for row in rows])
    return {"labelled": len(rows), "table": f"steps/{step.name}/labelled.parquet"}


def accuracies(rounds: Sequence[Step]) -> list[tuple[int, float]]:
    """(labels, accuracy) of every classifier that was measured."""
    return [(step.value["before"], step.value["accuracy"]) for step in rounds if "accuracy" in step.value]


def curve(rounds: Sequence[Step]) -> tuple[tuple[str, bytes | str, str], ...]:
    """The learning curve as a picture: (title, SVG, caption); empty for fewer than two points."""
    points = [(float(labels), accuracy) for labels, accuracy in accuracies(rounds)]
    # A curve needs two points.
    if len(points) < 2:
        return ()
    drawn = charts.learning_curves({"classifier": points}, across="labels", up="accuracy")
    return (("Learning curve", drawn, "Accuracy of the classifier of chips on the validation chips."),)


_WHY = {"first": "drawn at random first", "given": "named in active.chosen"}


def picks(chosen: Step, strategy: str) -> report.Table:
    """Table of the selected chips and the reasons."""
    rows: list[tuple[str, ...]] = [
        (
            str(row["id"]),
            str(row["round"]),
            _WHY[row["why"]] if row["why"] in _WHY else f"{SCORES[row['why']]} {row['score']:.3f}",
            f"{row['taken_for']} ({row['probability']:.2f})" if row["taken_for"] else "",
        )
        for row in labelled(chosen)
    ]
    return f"Chips chosen by {strategy}", ("chip", "round", "why", "taken for"), rows
