"""The simple baselines of plots: superpixels, measured next to the plots on parts of a run with reference plots."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.run import Step
from rayseg.io import pictures
from rayseg.io.instances import UNKNOWN
from rayseg.io.maps import mapped_tiles
from rayseg.io.masks import Piece
from rayseg.io.rasters import read
from rayseg.stages.to_rgb import ImageConfig, eight_bit
from rayseg.steps.baseline import Method, value_of
from rayseg.steps.evaluate_plots import Count, compared_pieces
from rayseg.store import put
from rayseg.vision.crops import middle
from rayseg.vision.instances import painted
from rayseg.vision.proposals import Image, SuperpixelProposer
from rayseg.vision.rle import Mask
from rayseg.vision.rounds import RoundsConfig, find_plots
from rayseg.vision.superpixels import felzenszwalb, outlined

MOST, SIDE = 32, 512
"""Parts that are measured at most, and the side of a part in px."""
PRODUCT = "this map of plots"
_OTHERS = ("precision", "recall")
Find = Callable[[Image, Mask], NDArray[np.int32]]


def measure_baselines(
    step: Step, predicted: Step, truth: str, image: ImageConfig, superpixels: SuperpixelProposer | None
) -> dict[str, Any]:
    """Measure the plots and the baselines on parts with reference plots, evenly spread, and draw the first part.

    Args:
        step: the current step.
        predicted: the step that wrote the plots of every tile.
        truth: as `evaluate_plots` takes it.
        image: how the imagery becomes 8-bit RGB.
        superpixels: settings of the superpixels that serve as plots; None where the product are such superpixels.

    Returns:
        A value of `baseline.value_of`, and the measures of the plots as `product`.
    """
    methods: dict[str, Find] = {"plain felzenszwalb superpixels": _plain}
    if superpixels:
        methods = {"superpixels by contrast": partial(_by_contrast, superpixels), **methods}
    counts = {name: Count() for name in (PRODUCT, *methods)}
    seconds = dict.fromkeys(methods, 0.0)
    tiles = {tile.tile.id: tile for tile in mapped_tiles(predicted.root, predicted.name)}
    compared, _ = compared_pieces(predicted.root, truth)
    chosen = sorted({round(at) for at in np.linspace(0, len(compared) - 1, min(MOST, len(compared)))})
    parts, drawn = list[Piece](), list[tuple[str, str, str]]()
    for part in (compared[at] for at in chosen):
        tile = tiles[part.piece.tile.id]
        window = middle(tile.tile.window, SIDE).intersect(tile.tile.window)
        inner = window.slices(tile.tile.window)
        own_HW, truth_HW = part.predicted()[inner], part.truth()[inner]
        image_CHW, valid_HW = read(tile.sources, tile.tile.grid, window, bands=image.bands)
        image_HWC = eight_bit(image_CHW, image)
        ids_of = {PRODUCT: own_HW}
        for name, find in methods.items():
            began = time.process_time()
            labels_HW = find(image_HWC, valid_HW).astype(np.int64)
            seconds[name] += time.process_time() - began
            # Labels begin at 1 in every part; the count takes equal ids for one plot.
            ids_of[name] = np.where(labels_HW > 0, labels_HW + len(parts) * 2**32, 0)
        parts.append(replace(part.piece, tile=replace(part.piece.tile, window=window)))
        for name, ids_HW in ids_of.items():
            # All sides count the same pixels, those of the plots.
            counts[name].add(parts[-1], np.where(own_HW == UNKNOWN, UNKNOWN, ids_HW), truth_HW)
        if not drawn:
            panels = [outlined(image_HWC, np.maximum(ids_HW, 0)) for ids_HW in (truth_HW, *ids_of.values())]
            put(step.prefix / "part.png", pictures.encoded(np.concatenate(panels, axis=1)))
            caption = f"Outlines of the reference, {', '.join(ids_of)}."
            drawn.append(("Next to simple baselines", f"steps/{step.name}/part.png", caption))
    measured = {
        name: {key: entry["value"] or 0.0 for key, entry in count.summary(parts)["objects"].items()}
        for name, count in counts.items()
    }
    rows = [Method(name, measured[name]["f1"], seconds[name], _others(measured[name])) for name in methods]
    where = f"{len(chosen)} parts of at most {SIDE} x {SIDE} px"
    return value_of("F1 of objects at IoU .5", where, rows, pictures=drawn) | {
        "product": measured[PRODUCT]["f1"],
        "parts": _others(measured[PRODUCT]),
    }


def _others(measures: dict[str, float]) -> dict[str, float]:
    return {name: measures[name] for name in _OTHERS}


def _plain(image_HWC: Image, valid_HW: Mask) -> NDArray[np.int32]:
    # Of 36 settings (scale 50-400, sigma .5-1.2, min_size 50-200) the best on 15 chips of 10 m imagery.
    return np.where(valid_HW, felzenszwalb(image_HWC, scale=200, sigma=0.5, min_size=200) + 1, 0)


def _by_contrast(settings: SuperpixelProposer, image_HWC: Image, valid_HW: Mask) -> NDArray[np.int32]:
    rounds = RoundsConfig()
    plots = find_plots(image_HWC, settings, rounds, valid_HW)
    return painted(plots.proposals.masks, valid_HW.shape, where_HW=valid_HW, least=rounds.least)[0]
