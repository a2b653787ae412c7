"""What a report says of active learning: how accurate its classifiers were, what was chosen and why."""

from collections.abc import Sequence

from rayseg import active, publication, report
from rayseg.engine.run import Step
from rayseg.vision.query_strategies import SCORES


def accuracies(rounds: Sequence[Step]) -> list[tuple[int, float]]:
    """(labels, accuracy) of every classifier that was measured."""
    return [(step.value["before"], step.value["accuracy"]) for step in rounds if "accuracy" in step.value]


def curve(rounds: Sequence[Step]) -> tuple[tuple[str, bytes | str, str], ...]:
    """The learning curve as a picture: (title, SVG, caption); none of a single point."""
    points = [(float(labels), accuracy) for labels, accuracy in accuracies(rounds)]
    if len(points) < 2:
        return ()
    drawn = report.learning_curves({"classifier": points}, across="labels", up="accuracy")
    return (("Learning curve", drawn, "Accuracy of the classifier of chips on the validation chips."),)


def picks(chosen: Step, strategy: str) -> publication.Table:
    """What was chosen and why."""
    rows: list[tuple[str, ...]] = [
        (
            str(row["id"]),
            str(row["round"]),
            "drawn at random first" if row["why"] == "first" else f"{SCORES[row['why']]} {row['score']:.3f}",
            f"{row['taken_for']} ({row['probability']:.2f})" if row["taken_for"] else "",
        )
        for row in active.labelled(chosen)
    ]
    return f"Chips chosen by {strategy}", ("chip", "round", "why", "taken for"), rows
