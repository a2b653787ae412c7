"""Instances of one image, painted into one label image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayseg.vision import rle
from rayseg.vision.rle import Mask, Runs

Labels = NDArray[np.int32]


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
