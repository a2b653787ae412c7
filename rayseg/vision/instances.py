"""Instances of one image: painted into one label image, and freed of slivers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from rayseg.vision import rle
from rayseg.vision.rle import Mask, Runs

Labels = NDArray[np.int32]
_NEXT = ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1]))
"""Slices of the pixels below or right of others, and of those others."""


def painted(masks: Sequence[Runs], shape: tuple[int, int], *, where_HW: Mask, least: int) -> tuple[Labels, list[int]]:
    """Paint masks over each other, smaller ones last, so that each pixel belongs to at most one mask.

    Args:
        masks: runs of each mask.
        shape: (height, width).
        where_HW: True where instances are allowed.
        least: fewest visible pixels of a mask that is kept.

    Returns:
        (labels_HW, kept): 0 for none, k + 1 for the mask at position kept[k]; `kept` ascends.
    """
    labels = np.zeros(shape[0] * shape[1], np.int32)
    # Largest first: a small mask inside a large one stays visible. A stable sort keeps ties in order.
    for position in np.argsort(-rle.areas(masks), kind="stable"):
        starts, lengths = masks[position][::2], masks[position][1::2] - masks[position][::2]
        # the pixels of all runs at once: each run's start, then steps of 1
        inside = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        labels[inside + np.arange(len(inside))] = position + 1
    labels[~where_HW.ravel()] = 0
    counts = np.bincount(labels, minlength=len(masks) + 1)
    kept = np.flatnonzero(counts[1:] >= least)
    number = np.zeros(len(masks) + 1, np.int32)
    number[kept + 1] = np.arange(1, len(kept) + 1)
    return number[labels].reshape(shape), [int(k) for k in kept]


def inscribed_radii(labels_HW: Labels) -> NDArray[np.float64]:
    """Radius in px of the largest circle inside each label 0..n; infinite for a label without a border.

    The image's edge is not a border: a label that the edge cuts may extend beyond it.
    """
    border_HW = np.zeros(labels_HW.shape, bool)
    for one, other in _NEXT:
        differs = labels_HW[one] != labels_HW[other]
        border_HW[one] |= differs
        border_HW[other] |= differs
    if not border_HW.any():
        return np.full(int(labels_HW.max(initial=0)) + 1, np.inf)
    depth_HW = ndimage.distance_transform_edt(~border_HW) + 1  # a border pixel is half a pixel deep, counted as 1
    return np.asarray(ndimage.maximum(depth_HW, labels_HW, np.arange(int(labels_HW.max()) + 1)), np.float64)


def without_slivers(labels_HW: Labels, radius: float) -> Labels:
    """Give every pixel of a label with an inscribed radius below `radius` to the nearest other label, or to none.

    A sliver between two labels goes to both, one inside a label to that label. As a whole it could not go to one
    neighbour: all roads of an image are often one label, and would make a plot of whichever field they went to.

    Args:
        labels_HW: 0 for none, which is never a sliver.
        radius: in px.

    Returns:
        Labels (height, width) int32, numbered 1..n in the order of the old ones.
    """
    thin_N = inscribed_radii(labels_HW) < radius
    thin_N[0] = False
    thin_HW = thin_N[labels_HW]
    if thin_HW.all():
        return np.zeros_like(labels_HW)
    # A flood over a flat surface reaches each pixel first from the nearest label, and keeps labels connected.
    seeds_HW = np.where(thin_HW, 0, labels_HW + 1)
    flooded_HW = watershed(np.zeros(labels_HW.shape, np.uint8), seeds_HW) - 1
    _, inverse = np.unique(np.append(flooded_HW, 0), return_inverse=True)
    return inverse[:-1].reshape(labels_HW.shape).astype(np.int32)
