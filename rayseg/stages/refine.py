"""A map made to follow segments of its imagery: every segment gets one class."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rayseg.geo.grid import NODATA, Window
from rayseg.io import plot_joins
from rayseg.stages.predict import above
from rayseg.stages.rows import ABSENT, TileRow


@dataclass
class Refine:
    """`patches, classes, scores -> classes, scores`: the class of a segment's mean scores, in each cell of a tile.

    Pixels outside of all segments keep their class and scores.

    Args:
        stride: side in px of the cells, whose segments are in `patches`.
        values: of the classes; a score band each, or one band of class 1, or of a pixel's own class.
        threshold: of a map with one band of class 1: the mean probability above which a segment gets it.
    """

    stride: int
    values: tuple[int, ...]
    threshold: float | None

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Refine each tile."""
        return [self._tile(row) for row in rows]

    def _tile(self, row: TileRow) -> TileRow:
        window, classes_HW, scores_CHW = row.tile.window, row.classes.copy(), row.scores.copy()
        for patch in row.patches:
            col, line = patch["cell_col"] * self.stride, patch["cell_row"] * self.stride
            cell = Window(col, line, self.stride, self.stride).intersect(window)
            self.refine(plot_joins.labels_of(patch, cell), classes_HW, scores_CHW, cell.slices(window))
        return replace(row, classes=classes_HW, scores=scores_CHW, scores_file="", patches=(), pieces=(), image=ABSENT)

    def refine(
        self,
        labels_HW: NDArray[np.int32],
        classes_HW: NDArray[np.uint8],
        scores_CHW: NDArray[np.uint8],
        part: tuple[slice, slice],
    ) -> None:
        """Refine a part of a map in place.

        Args:
            labels_HW: numbers of the segments in the part, 0 for none.
            classes_HW: of the map, 255 for nodata.
            scores_CHW: of the map, probability x 254.
            part: rows and columns of the map.
        """
        seen_HW = (labels_HW > 0) & (classes_HW[part] != NODATA)
        if not seen_HW.any():
            return
        at_N, count = labels_HW[seen_HW], int(labels_HW.max()) + 1
        if len(scores_CHW) == 1 and self.threshold is None:  # the band is the score of each pixel's own class
            # A vote of the pixels by one count of pairs (segment, class).
            pairs = at_N * 256 + classes_HW[part][seen_HW]
            chosen_L = np.bincount(pairs, minlength=256 * count).reshape(count, 256).argmax(axis=1)
        else:
            # The mean probability of the segment decides, and becomes the score of its pixels.
            own_CN = scores_CHW[:, *part][:, seen_HW]
            sums_CL = np.stack([np.bincount(at_N, weights=own_N, minlength=count) for own_N in own_CN])
            mean_CL = np.rint(sums_CL / np.maximum(np.bincount(at_N, minlength=count), 1)).astype(np.uint8)
            scores_CHW[:, *part][:, seen_HW] = mean_CL[:, at_N]
            binary = self.threshold is not None
            chosen_L = above(mean_CL[0], self.threshold or 0) if binary else np.array(self.values)[sums_CL.argmax(0)]
        classes_HW[part][seen_HW] = chosen_L[at_N]
