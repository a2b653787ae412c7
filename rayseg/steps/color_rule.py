"""The simple baseline of gpc: one threshold on one axis of colour, fitted on the chips and measured next to the map."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2lab

from rayseg.engine.run import Step
from rayseg.errors import DataError
from rayseg.geo.grid import NODATA
from rayseg.io import masks, pictures
from rayseg.io.maps import mapped_tiles
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.steps import chips, evaluate
from rayseg.steps.baseline import Method, value_of
from rayseg.steps.cues import LABELS, YES
from rayseg.store import put
from rayseg.vision.color import ClassTable

MOST = 16
"""Chips of each label that the rule is fitted on, at most."""
MOST_PIXELS = MOST * 2048**2
"""Pixels of the tiles with truth that are measured, about and at most."""
MARKED = 0.05
"""Share of the negative chips' pixels that the rule marks."""
_NAMES = ("lightness", "a (green to red)", "b (blue to yellow)")
_SPARSE = 3  # every third pixel of a chip in both directions
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ColorRule:
    """Pixels whose axis of CIE Lab, times `sign`, exceeds `limit`."""

    axis: int
    sign: int
    limit: float

    @property
    def name(self) -> str:
        """With an article, as a report shows it."""
        return f"a threshold on {_NAMES[self.axis]} {'>' if self.sign > 0 else '<'} {self.sign * self.limit:.0f}"

    def __call__(self, image_HWC: Image) -> NDArray[np.bool_]:
        """Where an RGB image is of the class."""
        return np.asarray(self.sign * rgb2lab(image_HWC)[..., self.axis] > self.limit)


def fit_rule(positives: Iterable[Image], negatives: Iterable[Image], *, marked: float = MARKED) -> ColorRule:
    """The rule that marks most of the positive chips, of those that mark the share `marked` of the negative ones."""
    # Sparse: neighbouring pixels are alike, and a chip has a quarter of a million.
    of_class, of_rest = (
        np.concatenate([rgb2lab(image[::_SPARSE, ::_SPARSE]).reshape(-1, 3) for image in images])
        for images in (positives, negatives)
    )
    rules = [
        ColorRule(axis, sign, float(np.quantile(sign * of_rest[:, axis], 1 - marked)))
        for axis in range(3)
        for sign in (1, -1)
    ]
    return max(rules, key=lambda rule: float((rule.sign * of_class[:, rule.axis] > rule.limit).mean()))


def measure_baseline(step: Step, listed: Step, predicted: Step, truth: str, size: int) -> dict[str, Any]:
    """Measure the map and the rule on tiles with truth, evenly spread, and draw the first next to the imagery.

    Returns:
        A value of `baseline.value_of`, and the map's own IoU of the class as `product`.
    """
    started = time.process_time()
    # 1. fit the rule to the chips that the segmenter learnt from
    rows = chips.rows_of(listed, held_out=False)
    few = [[row for row in rows if row["label"] == label][:MOST] for label in LABELS]
    rule = fit_rule(*([chips.read_image(part, size, at) for at in range(len(part))] for part in few))
    # 2. compare both with the truth on the same tiles, evenly spread over the region
    table = ClassTable(bundle.description(predicted.value["bundle"]).classes)
    tiles = {tile.tile.id: tile for tile in mapped_tiles(predicted.root, predicted.name)}
    failed: dict[str, str] = {}  # named by the step that evaluates the map
    drawn = masks.masks_of(truth, names=table.names, failed=failed)
    reference = masks.two_classes(drawn, table, truth, failed=failed)
    matches = evaluate.match(masks.pieces_of_tiles(list(tiles.values())), reference)
    area = float(np.mean([match.window.width * match.window.height for match in matches]))
    chosen = sorted({round(at) for at in np.linspace(0, len(matches) - 1, min(int(MOST_PIXELS / area), len(matches)))})
    empty = Confusion(np.zeros((2, 2), np.int64))
    sums, shown = [empty, empty], list[tuple[str, str, str]]()
    for match in (matches[at] for at in chosen):
        tile = tiles[match.piece.tile.id]
        try:
            truth_HW = masks.read_classes(match.truth, match.grid, match.window, table)
        except DataError:
            continue
        map_HW = match.piece.read(table)
        image_HWC = pictures.shown(tile.sources, tile.tile.grid, tile.tile.window)
        rule_HW = np.where(map_HW == NODATA, NODATA, rule(image_HWC)).astype(np.uint8)
        for at, marked_HW in enumerate((map_HW, rule_HW)):
            # Pixels that the map left out count for neither.
            known_HW = np.where(marked_HW == NODATA, NODATA, truth_HW)
            sums[at] += Confusion.from_arrays(known_HW, marked_HW, 2)
        if not shown:
            put(step.prefix / "tile.png", pictures.encoded(_panels(image_HWC, truth_HW, map_HW, rule_HW)))
            shown.append(("Next to the baseline", f"steps/{step.name}/tile.png", f"Imagery, truth, map, {rule.name}."))
    product, simple = (float(confusion.iou[1]) for confusion in sums)
    method = Method(rule.name, simple, time.process_time() - started)
    return value_of(f"IoU of {YES}", f"{len(chosen)} tiles with truth", [method], pictures=shown) | {"product": product}


def _panels(image_HWC: Image, *classes: NDArray[np.uint8]) -> Image:
    """The image and black-and-white masks side by side; pixels without a class are grey."""
    # Every n-th pixel: a report does not need more than 512 px.
    step = max(1, -(-max(image_HWC.shape[:2]) // 512))
    grey: Sequence[Image] = [np.where(marked == NODATA, 110, marked * 255).astype(np.uint8) for marked in classes]
    panels = [image_HWC, *(np.repeat(marked[..., None], 3, axis=2) for marked in grey)]
    return np.concatenate([panel[::step, ::step] for panel in panels], axis=1)
