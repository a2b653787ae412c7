"""Charts of a report, all of one size: trainings over epochs, measures over labels, coverage and sizes of plots."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from upath import UPath

from rayseg.store import is_local, upath

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (4.8, 2.8)  # inches
_INK = "#80868b"  # readable on a light and on a dark background


def curves(history: Sequence[Mapping[str, float]]) -> list[bytes]:
    """A training's values per epoch as SVG drawings: one of the losses, one of the measures.

    Args:
        history: per epoch, name -> value, in order; epochs may lack names. `epoch` is the number of the epoch.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for row in history for name in row if name != "epoch"))
    # Losses and measures have different scales, so each gets axes of its own.
    losses = [name for name in names if "loss" in name]
    drawings = []
    for part in filter(None, (losses, [name for name in names if name not in losses])):
        axes = _axes()
        for name in part:
            points = [(row.get("epoch", at), row[name]) for at, row in enumerate(history, 1) if name in row]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.6, marker=".", markersize=4)
        axes.set_xlabel("epoch", color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawings.append(_svg(axes))
    return drawings


def histories(root: str) -> dict[str, list[dict[str, float]]]:
    """Read the TensorBoard logs of a local run: step, in the order of their begin -> values of every epoch.

    The last value written wins.
    """
    if not is_local(root):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # slow to import

    by_training, begun = {}, {}
    for folder in sorted(upath(root).glob("steps/**/tensorboard")):
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        rows: dict[int, dict[str, float]] = {}
        for tag in (tag for tag in events.Tags()["scalars"] if not tag.startswith("learning_rate")):
            for event in events.Scalars(tag):
                rows.setdefault(event.step, {"epoch": float(event.step + 1)})[tag] = event.value
        name = str(folder.parent.relative_to(upath(root) / "steps"))
        # A stage of a training has a folder below that of the training.
        name += next((_trained_on(path) for path in folder.parents[:2] if (path / "setup.json").exists()), "")
        if rows:
            by_training[name] = [rows[epoch] for epoch in sorted(rows)]
            begun[name] = min(event.wall_time for tag in events.Tags()["scalars"] for event in events.Scalars(tag))
    return {name: by_training[name] for name in sorted(by_training, key=begun.__getitem__)}


def _trained_on(folder: UPath) -> str:
    """How many processes trained under a prefix, and on what, as " (...)"."""
    setup = json.loads((folder / "setup.json").read_bytes())
    count, device = setup["workers"], "GPU" if setup["gpu"] else "CPU"
    if not count:
        return f" (in the command's process, {device})"
    return f" ({count} worker{'s' * (count > 1)} of Ray Train, {device})"


def learning_curves(lines: Mapping[str, Sequence[tuple[float, ...]]], *, across: str, up: str) -> bytes:
    """Draw a metric over the number of labels, as SVG.

    Args:
        lines: name -> points (x, y), or (x, y, low, high) with an interval.
        across: label of the x axis.
        up: label of the y axis.
    """
    axes = _axes()
    for name, points in lines.items():
        x, y, *bounds = zip(*sorted(points), strict=True)
        [line] = axes.plot(x, y, label=name, linewidth=1.6, marker=".", markersize=6)
        if bounds:
            axes.fill_between(x, bounds[0], bounds[1], color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(up, color=_INK)
    return _svg(axes)


def coverage_chart(patches: Sequence[tuple[float, Sequence[float]]]) -> bytes:
    """Mean share of the imagery under plots after each round, as SVG; a patch with fewer rounds keeps its last share.

    Args:
        patches: (area or valid pixels, share under plots after each round) of every patch.
    """
    patches = [(size, shares) for size, shares in patches if shares]
    if not patches:
        return b""
    # Weighted by ground, because patches at the border of the region are small.
    rounds = max(len(shares) for _, shares in patches)
    weights = [size for size, _ in patches]
    means = [
        float(np.average([shares[min(k, len(shares) - 1)] for _, shares in patches], weights=weights))
        for k in range(rounds)
    ]
    axes = _axes()
    bars = axes.bar([f"{k + 1}" for k in range(rounds)], means, color="#009e73")
    axes.bar_label(bars, [f"{mean:.1%}" for mean in means], color=_INK, fontsize=9)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("round", color=_INK)
    return _svg(axes)


def size_chart(pixels: Sequence[int]) -> bytes:
    """Histogram of plot sizes, as SVG."""
    if not pixels:
        return b""
    axes = _axes()
    # Plot sizes span orders of magnitude, so the bins are logarithmic.
    edges = np.geomspace(max(min(pixels), 1), max(pixels) + 1, 25)
    axes.hist(pixels, bins=list(edges), color="#e69f00")
    axes.set_xscale("log")
    axes.set_xlabel("pixels", color=_INK)
    axes.set_ylabel("plots", color=_INK)
    return _svg(axes)


def _axes() -> "Axes":
    from matplotlib.figure import Figure  # slow to import, needed at the end of a run only

    return Figure(figsize=_SIZE, layout="constrained").subplots()


def _svg(axes: "Axes") -> bytes:
    """The chart in the report's colours as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    axes.tick_params(colors=_INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    figure, sink = axes.figure, io.BytesIO()
    assert isinstance(figure, Figure)
    # A fixed salt and no date: the same data give the same bytes.
    with rc_context({"svg.hashsalt": "rayseg"}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return sink.getvalue()
