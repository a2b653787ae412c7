"""Simple methods next to a pipeline's result: measured on the same data and split, and shown in its report.

A pipeline has a setting `baseline: bool = added(default=True)` and a step that returns `value_of(...)`; its report gets
`Extras(baseline=comparison(step.value, product))`. The step reaches the report as a keyword of `Run.step`, so that
reports of runs begun without it keep their keys:

    simple = run.step("baseline", measure_baselines, ...) if config.baseline else None
    run.step("report", write_report, ..., baseline=simple)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayseg.metrics import Confusion


@dataclass(frozen=True)
class Method:
    """A simple method as measured.

    Attributes:
        name: with an article, as it stands in a sentence ("a linear head on frozen features").
        value: its measure; higher is better.
        seconds: of processor time, for learning and predicting.
        parts: further measures by name, for example IoU per class.
    """

    name: str
    value: float
    seconds: float
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """What the report shows of the baselines.

    Attributes:
        first: the first line of a report whose model is behind a baseline, else "".
        table: (title, header, rows).
        pictures: (title, path below the run, caption).
    """

    first: str
    table: tuple[str, tuple[str, ...], list[tuple[str, ...]]]
    pictures: tuple[tuple[str, bytes | str, str], ...]


def value_of(
    measure: str, where: str, methods: Sequence[Method], *, pictures: Sequence[tuple[str, str, str]] = ()
) -> dict[str, Any]:
    """The value of a step that measures baselines (JSON values).

    Args:
        measure: its name ("mean IoU"); higher is better.
        where: what all methods were measured on ("the validation scenes tile5, tile6").
        methods: as measured.
        pictures: (title, path below the run, caption); they show the product and the methods on the same place.
    """
    rows = [
        {"name": method.name, "value": method.value, "seconds": method.seconds, "parts": dict(method.parts or {})}
        for method in methods
    ]
    return {"measure": measure, "where": where, "methods": rows, "pictures": [list(picture) for picture in pictures]}


def parts_of(confusion: Confusion, names: Sequence[str]) -> dict[str, float]:
    """IoU of the classes that the reference has, by name."""
    # A class without reference pixels has an IoU of 0 or NaN, which do not describe a method.
    present = confusion.matrix.sum(axis=1) > 0
    return {name: float(iou) for name, iou, seen in zip(names, confusion.iou, present, strict=True) if seen}


def comparison(
    value: Mapping[str, Any], product: float, *, parts: Mapping[str, float] | None = None, name: str = "this model"
) -> Comparison:
    """The product's own measure next to those of the baselines, for the report.

    Args:
        value: of the step, as `value_of` returned it.
        product: measure of the product on the same data.
        parts: further measures of the product, by the names of those of the methods.
        name: of the product.
    """
    measure, methods = value["measure"], value["methods"]
    # The union of all measures: a method may lack some, for example a class that it never predicts.
    columns = list(dict.fromkeys(key for row in [{"parts": parts or {}}, *methods] for key in row["parts"]))
    own = {"name": name, "value": product, "seconds": None, "parts": dict(parts or {})}
    rows = [
        (
            row["name"],
            f"{row['value']:.3f}",
            *(f"{row['parts'][key]:.3f}" if key in row["parts"] else "–" for key in columns),
            "–" if row["seconds"] is None else f"{row['seconds']:.0f} s",
        )
        for row in [own, *methods]
    ]
    # The report begins with a baseline that is more accurate than the model.
    best = max(methods, key=lambda row: row["value"], default=None)
    first = ""
    if best and best["value"] > product:
        first = (
            f"{name[:1].upper()}{name[1:]} is behind its baseline: {measure} {product:.3f}, "
            f"{best['name']} {best['value']:.3f}."
        )
    header = ("method", measure, *columns, "processor time")
    title = f"Next to simple baselines, on {value['where']}"
    return Comparison(first, (title, header, rows), tuple((a, b, c) for a, b, c in value["pictures"]))
