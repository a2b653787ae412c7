"""Measure all weights that the trainings of a run kept (`learning.keep_every`): a table and a curve.

<run>/checkpoints/table.csv, table.json    a row for each training and number of epochs (al-s4gan: steps)
<run>/checkpoints/curve.svg                its measure over them
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from upath import UPath

from rayseg.engine.manifest import Row, read_rows
from rayseg.engine.run import read
from rayseg.errors import DataError, ModelError
from rayseg.geo.grid import Window
from rayseg.geo.region import Region
from rayseg.io import scenes
from rayseg.io.labels import Chip, read_chip
from rayseg.io.scenes import LabelledImage
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.steps import charts
from rayseg.steps.chips import ChipsConfig, drawn_masks
from rayseg.steps.labelled import find_images
from rayseg.store import put, upath
from rayseg.train.augment import Augment, centre
from rayseg.train.batches import whole_units
from rayseg.train.windows import spread
from rayseg.vision.color import ClassTable
from rayseg.vision.crops import middle
from rayseg.vision.fill import filled

Place = tuple[LabelledImage, Window]
"""A labelled image and a window of it that is predicted at once."""
Unit = tuple[NDArray[Any], str]
"""image_CHW of a chip, and its label."""
Measure = Callable[[nn.Module], dict[str, float]]


def measure(root: str, truth: str | None = None) -> list[dict[str, Any]]:
    """Measure the kept weights of a run; write `<run>/checkpoints` and return the rows of its table.

    Args:
        root: the run.
        truth: masks of its imagery, for segmenters; by default the labelled images that the run set apart.
            Classifiers are measured on the chips that it set apart.

    Raises:
        DataError: no weights were kept, or nothing is there to measure them with.
        ModelError: weights do not fit the run's model.
    """
    content, steps = read(root), upath(root) / "steps"
    # A run may have several trainings: a warm-up, members, rounds.
    trainings = sorted({path.parent.parent for path in steps.glob("**/kept/*.pt")}, key=str)
    if not trainings:
        raise DataError(
            f"{root} has no kept weights, expected some; train with --set segmenter.learning.keep_every=N in another "
            "--out"
        )
    rows = []
    for training in trainings:
        name = str(training.relative_to(steps))
        described = _bundle_of(upath(root), content, name)
        if (score := _measure_of(upath(root), content, described, truth)) is None:
            continue
        for path in sorted((training / "kept").glob("[!.]*.pt"), key=str):  # no half file of a running training
            kept = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
            net = _network(described, kept["weights"], path)
            rows.append({"training": name, "number": int(kept["number"]), **score(net)})
    if not rows:
        raise DataError(
            f"{root} set no labelled image or chip apart to measure its weights with, expected some; give masks as the "
            "second argument"
        )
    _write(upath(root) / "checkpoints", rows)
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `measure` as aligned text."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [header, *([_cell(row.get(key, "")) for key in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _write(folder: UPath, rows: Sequence[dict[str, Any]]) -> None:
    sink = io.StringIO()
    table = csv.DictWriter(sink, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    put(folder / "table.csv", sink.getvalue().encode())
    # JSON has no NaN, which an absent class has.
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    put(folder / "table.json", json.dumps(plain, indent=1).encode())
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        value = row.get("mean_iou", row["accuracy"])
        lines.setdefault(row["training"], []).append((float(row["number"]), float(value)))
    up = "mean IoU" if all("mean_iou" in row for row in rows) else "mean IoU, accuracy of classifiers"
    put(folder / "curve.svg", charts.learning_curves(lines, across="epochs, of al-s4gan steps", up=up))


# -- the networks ------------------------------------------------------------------------------------------------------


def _bundle_of(root: UPath, content: Mapping[str, Any], training: str) -> Bundle:
    """The description of the network of a training, which may not have ended."""
    step = training.partition("/")[0]
    own = root / "steps" / step / "classifier"  # of a round of al-s4gan
    if not own.exists() and step not in content.get("steps", {}):
        begun = root / "steps" / training / "model.json"
        if not begun.exists():  # of an earlier version
            raise DataError(
                f"step {step} of {root} has not finished, expected its model; finish the run with its own command"
            )
        return Bundle.model_validate_json(begun.read_bytes())
    described = bundle.description(own if own.exists() else content["steps"][step]["bundle"])
    # The map of gpc may be made by colours, which the network taught.
    network = described.architecture.factory == "appearance"
    return bundle.description(root / "models" / "network") if network else described


def _network(described: Bundle, weights: Mapping[str, torch.Tensor], path: UPath) -> nn.Module:
    """The network of one training; the bundle may hold the mean of several, or refine it by a random field."""
    options = {key: value for key, value in described.architecture.options.items() if key != "members"}
    architecture = described.architecture.model_copy(update={"options": options})
    net = bundle.blank(described.model_copy(update={"architecture": architecture}))
    net = net.get_submodule("net") if described.architecture.factory == "refined" else net
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"weights {path} do not fit the run's model: {reason}; train again") from None
    return net.eval()


# -- what measures them ------------------------------------------------------------------------------------------------


def _measure_of(root: UPath, content: Mapping[str, Any], described: Bundle, truth: str | None) -> Measure | None:
    """What measures the networks of a training; None if there is nothing to measure them with."""
    if described.task == "classification":
        units = list(_units(root, described.patch))
        return None if not units else lambda net: _of_chips(net, described, units)
    places = _of_truth(content, described, truth) if truth else _set_apart(root, content, described)
    return None if not places else lambda net: _of_masks(net, described, places)


@torch.inference_mode()
def _of_masks(net: nn.Module, described: Bundle, places: Sequence[Place]) -> dict[str, float]:
    table, unit = ClassTable(described.classes), 32 * int(described.architecture.options.get("reduce", 1))
    total = Confusion(np.zeros((len(table.classes),) * 2, np.int64))
    for image, window in places:
        image_CHW, classes_HW = scenes.read_window(image, window, bands=described.bands, table=table)
        images = whole_units(torch.from_numpy(described.normalize(image_CHW))[None], unit)
        logits = net(images)[0, :, : window.height, : window.width].float()
        found_HW = logits.argmax(dim=0) if len(logits) > 1 else logits[0].sigmoid() > described.threshold
        total += Confusion.from_arrays(classes_HW, found_HW.numpy().astype(np.uint8), len(table.classes))
    of_classes = {f"iou {name}": float(value) for name, value in zip(table.names, total.iou, strict=True)}
    return {"mean_iou": total.mean_iou_of_reference, "accuracy": total.overall_accuracy, **of_classes}


@torch.inference_mode()
def _of_chips(net: nn.Module, described: Bundle, units: Sequence[Unit]) -> dict[str, float]:
    names = [name for _, name, _ in described.classes]
    pairs = []
    for image_CHW, label in units:
        images = torch.from_numpy(image_CHW.copy())[None]
        logits = net(centre(images, Augment(pad=True), described.scaling, size=described.patch))[0].float()
        yes = int(described.provenance.config.get("positive") or 0)  # the class of a positive logit, if there is one
        found = int(logits.argmax()) if len(logits) > 1 else (yes if logits[0] > 0 else 1 - yes)
        pairs.append((names.index(label), found))
    labels, found_N = (np.array(column, np.uint8) for column in zip(*pairs, strict=True))
    total = Confusion.from_arrays(labels, found_N, len(names))
    of_classes = {f"f1 {name}": float(value) for name, value in zip(names, total.f1, strict=True)}
    return {"accuracy": total.overall_accuracy, **of_classes}


def _of_truth(content: Mapping[str, Any], described: Bundle, truth: str) -> list[Place]:
    """The run's imagery with other masks, in adjacent windows."""
    table = ClassTable(described.classes)
    found = find_images(Region(**content["region"]), None, truth, table=table, setting="labelled.source")
    return _windows([image for image in found if image.masks], described.patch)


def _windows(images: Sequence[LabelledImage], size: int) -> list[Place]:
    return [(images[draw.image], draw.window) for draw in spread(images, size=size)]


def _set_apart(root: UPath, content: Mapping[str, Any], described: Bundle) -> list[Place]:
    """Images or chips with masks that the run did not learn from."""
    images, chips = root / "steps" / "scenes" / "images.parquet", root / "steps" / "chips" / "chips.parquet"
    if images.exists():
        validation = [row for row in read_rows(images) if row["part"] == "validation"]
        return _windows([LabelledImage.from_row(row) for row in validation], described.patch)
    if rows := [row for row in _pool(root) if row["masks"] != "[]"]:
        return [(LabelledImage.from_row(row | {"id": row["of"]}), _window(row)) for row in rows]
    if chips.exists() and (config := ChipsConfig.model_validate(content["config"]["chips"])).masks:
        held_out = [Chip.from_row(row) for row in read_rows(chips) if row["held_out"]]
        drawn = drawn_masks(held_out, ClassTable(described.classes), config)
        return [(image, middle(image.window, config.size)) for image in drawn]
    return []


def _units(root: UPath, size: int) -> Iterator[Unit]:
    """The chips with labels that the run did not learn from, those of files as squares of `size` px."""
    for name in ("chips", "classifier"):  # of gpc, of agri
        path = root / "steps" / name / "chips.parquet"
        for row in read_rows(path) if path.exists() else ():
            if row["held_out"]:
                yield filled(*read_chip(Chip.from_row(row), size)).transpose(2, 0, 1), row["label"]
    for row in (row for row in _pool(root) if row["label"]):
        image = LabelledImage.from_row(row | {"id": row["of"]})
        yield scenes.read_window(image, _window(row), bands=("red", "green", "blue"), table=None)[0], row["label"]


def _pool(root: UPath) -> list[Row]:
    """The test chips of al-s4gan, else its validation chips."""
    path = root / "steps" / "pool" / "pool.parquet"
    rows = list(read_rows(path)) if path.exists() else []
    test = [row for row in rows if row["part"] == "test"]
    return test or [row for row in rows if row["part"] == "validation"]


def _window(row: Row) -> Window:
    return Window(row["col"], row["row"], row["width"], row["height"])
