"""The simple baseline of label maps: k-means of felzenszwalb's segments, measured next to the map on parts of a run."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayseg.engine.run import Step
from rayseg.geo.grid import NODATA
from rayseg.io import pictures
from rayseg.io.maps import mapped_tiles
from rayseg.steps import agreement
from rayseg.steps.baseline import Comparison, Method, comparison, value_of
from rayseg.store import put
from rayseg.vision.color import mean_color
from rayseg.vision.crops import middle
from rayseg.vision.segment_clusters import simple_clusters

MOST, SIDE = 4, 768
"""Tiles of which a part is measured, and the side of the part in px."""
NAMES = ("AMI", "FMI", "ARE")
PRODUCT, SEGMENTS, ONE_LABEL = "this map", "k-means of segments", "one label for everything"


def measure_baseline(step: Step, predicted: Step, truth: str, unlabelled: Sequence[str | int]) -> dict[str, Any]:
    """Measure the map and the baseline on the middle of some tiles with truth, and draw both next to the imagery.

    Returns:
        A value of `baseline.value_of`, and the map's own measures as `product`; {} without a labelled pixel.
    """
    tiles = {tile.tile.id: tile for tile in mapped_tiles(predicted.root, predicted.name)}
    measured: dict[str, list[dict[str, float]]] = {PRODUCT: [], SEGMENTS: [], ONE_LABEL: []}
    seconds, drawn = 0.0, list[tuple[str, str, str]]()
    for tile_id, whole_codes_HW, whole_labels_HW in agreement.coded_parts(
        list(tiles.values()), truth, unlabelled, most=MOST
    ):
        tile, sources = tiles[tile_id].tile, tiles[tile_id].sources
        window = middle(tile.window, SIDE).intersect(tile.window)
        inner = window.slices(tile.window)
        codes_HW, labels_HW = whole_codes_HW[inner], whole_labels_HW[inner]
        seen_HW = labels_HW != NODATA
        if not (seen_HW & (codes_HW >= 0)).any():
            continue
        image_HWC = pictures.shown(sources, tile.grid, window)
        started = time.process_time()
        # Pixels that the map left out count for neither.
        simple_HW = np.where(seen_HW, simple_clusters(image_HWC), NODATA).astype(np.uint8)
        seconds += time.process_time() - started
        for name, found_HW in ((PRODUCT, labels_HW), (SEGMENTS, simple_HW), (ONE_LABEL, np.where(seen_HW, 0, NODATA))):
            measured[name].append(agreement.agreement_of(codes_HW, found_HW.astype(np.uint8)))
        painted = [mean_color(image_HWC, np.minimum(found_HW, NODATA - 1)) for found_HW in (labels_HW, simple_HW)]
        path = f"steps/{step.name}/part-{len(drawn)}.png"
        put(step.prefix / f"part-{len(drawn)}.png", pictures.encoded(np.concatenate([image_HWC, *painted], axis=1)))
        caption = f"Imagery, {PRODUCT}, {SEGMENTS}: every label in its mean colour."
        drawn.append((f"Next to the baseline, {tile_id}", path, caption))
    if not drawn:
        return {}
    means = {
        name: {shown: float(np.mean([part[shown.lower()] for part in parts])) for shown in NAMES}
        for name, parts in measured.items()
    }
    spent = {SEGMENTS: seconds, ONE_LABEL: 0.0}
    methods = [Method(name, means[name]["AMI"], spent[name], _others(means[name])) for name in (SEGMENTS, ONE_LABEL)]
    where = f"{len(drawn)} parts of at most {SIDE} x {SIDE} px"
    return value_of("AMI", where, methods, pictures=drawn) | {"product": means[PRODUCT]}


def comparison_of(value: dict[str, Any]) -> Comparison | None:
    """What the report shows of the baseline; None if it was not measured."""
    if not value:
        return None
    return comparison(value, value["product"]["AMI"], parts=_others(value["product"]), name=PRODUCT)


def _others(measures: dict[str, float]) -> dict[str, float]:
    return {name: measures[name] for name in NAMES[1:]}
