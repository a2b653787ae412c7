"""What a report shows of plots: outlines over the imagery, coverage by round, sizes."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rayseg.geo.grid import Window
from rayseg.io import cog
from rayseg.io.maps import MappedTile
from rayseg.io.pictures import encoded, shown
from rayseg.vision.superpixels import outlined

_INK = "#80868b"
_BARE = (200, 30, 30)
_SHOWN = 3
_SIDE = 1000  # px of a tile at most


def overlay(tiles: Sequence[MappedTile]) -> bytes:
    """The tiles of a run with the largest share under plots, cut from the upper left, as WebP; nothing without tiles.

    They are side by side, each with its plots outlined.
    """
    chosen = sorted(tiles, key=lambda tile: -tile.record.facts.get("coverage", 0))[:_SHOWN]
    cells = [_outlined(tile) for tile in chosen]
    if not cells:
        return b""
    height = max(len(cell) for cell in cells)
    padded = [np.pad(cell, ((0, height - len(cell)), (0, 8), (0, 0))) for cell in cells]
    return encoded(np.concatenate(padded, axis=1), "webp")


def _outlined(tile: MappedTile) -> NDArray[np.uint8]:
    whole = tile.tile.window
    window = Window(whole.col, whole.row, min(_SIDE, whole.width), min(_SIDE, whole.height))
    cut = window.slices(whole)
    numbers_HW = cog.read_bands(tile.href.replace("classes.tif", "plots.tif"))[0][cut]
    bare_HW = cog.read_bands(tile.href)[0][cut] == 0
    image_HWC = shown(tile.sources, tile.tile.grid, window)
    image_HWC[bare_HW] = image_HWC[bare_HW] // 2 + np.array(_BARE, np.uint8) // 2
    return outlined(image_HWC, numbers_HW)


def coverage_chart(patches: Sequence[tuple[int, Sequence[float]]]) -> bytes:
    """Mean share of the imagery under plots after each round, as SVG; a patch that needed fewer rounds keeps its share.

    Args:
        patches: (valid pixels, share of these after each round) of every patch.
    """
    patches = [(pixels, shares) for pixels, shares in patches if shares]
    if not patches:
        return b""
    rounds = max(len(shares) for _, shares in patches)
    weights = [pixels for pixels, _ in patches]
    means = [
        float(np.average([shares[min(k, len(shares) - 1)] for _, shares in patches], weights=weights))
        for k in range(rounds)
    ]
    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([f"{k + 1}" for k in range(rounds)], means, color="#009e73")
    axes.bar_label(bars, [f"{mean:.1%}" for mean in means], color=_INK, fontsize=9)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("round", color=_INK)
    return _svg(figure)


def size_chart(pixels: Sequence[int]) -> bytes:
    """How many plots there are of which size, as SVG."""
    if not pixels:
        return b""
    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(max(min(pixels), 1), max(pixels) + 1, 25)
    axes.hist(pixels, bins=list(edges), color="#e69f00")
    axes.set_xscale("log")
    axes.set_xlabel("pixels", color=_INK)
    axes.set_ylabel("plots", color=_INK)
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    axes = figure.axes[0]
    axes.tick_params(colors=_INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return sink.getvalue()
