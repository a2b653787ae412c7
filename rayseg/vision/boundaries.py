"""Plots from a map of fields and their boundaries: a watershed at one level of its hierarchy."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import local_minima, reconstruction
from skimage.segmentation import find_boundaries, watershed

from rayseg.vision.instances import Labels, without_slivers

BACKGROUND, FIELD, BOUNDARY = range(3)
_SMOOTH = 1.0  # px; minima of single pixels are noise of the map
_OPEN = 0.5  # probability of the background from which a pixel is not a plot


def classes_of(ids_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """What a network learns of plots: 0 background, 1 field, 2 boundary: pixels of a plot next to something else.

    Args:
        ids_HW: number of the plot at each pixel, 0 for none; below 0 for pixels that are not labelled.

    Returns:
        Classes (height, width) uint8, 255 where not labelled.
    """
    line_HW = find_boundaries(np.maximum(ids_HW, 0), mode="thick", connectivity=2)
    classes_HW = np.where(line_HW, BOUNDARY, np.where(ids_HW > 0, FIELD, BACKGROUND))
    return np.where(ids_HW < 0, 255, classes_HW).astype(np.uint8)


def divided(probabilities_CHW: NDArray[np.float32], *, level: float, slivers: float, background: float = 1.0) -> Labels:
    """Plots between the boundaries of a map.

    Every minimum of the probability of not being inside a field begins a plot; minima that a ridge of less than `level`
    separates begin one together (the dynamics of minima, Grimaud 1992): raising the level merges plots along their
    weakest boundaries.

    Args:
        probabilities_CHW: of background, field and boundary.
        level: height of the ridge between two plots, 0..1.
        slivers: inscribed radius in px below which a plot goes to its neighbours.
        background: mean probability of the background in a plot, 0..1, above which it is left out.

    Returns:
        Labels (height, width) int32, 0 for none, 1..n.
    """
    # Mirrored at the edge: a plot that the edge cuts does not end there.
    ridge_HW = ndimage.gaussian_filter(1 - probabilities_CHW[FIELD].astype(np.float64), _SMOOTH)
    inside_HW = probabilities_CHW[BACKGROUND] < _OPEN
    # The extended minima (Soille 2003, section 6.3.5): flooded by `level`, minima of equal depth are one, too.
    flooded_HW = reconstruction(ridge_HW + level, ridge_HW, method="erosion")
    seeds_HW, _ = ndimage.label(local_minima(flooded_HW) & inside_HW, np.ones((3, 3)))
    labels_HW = np.asarray(watershed(ridge_HW, seeds_HW, mask=inside_HW), np.int32)
    labels_HW = without_slivers(labels_HW, slivers)
    # A whole plot tells more than its pixels: wood and pasture of doubtful pixels look like plots between boundaries.
    sums_N = np.bincount(labels_HW.ravel(), probabilities_CHW[BACKGROUND].ravel())
    kept_N = sums_N <= background * np.bincount(labels_HW.ravel())
    kept_N[0] = False
    return np.where(kept_N, np.cumsum(kept_N), 0).astype(np.int32)[labels_HW]
