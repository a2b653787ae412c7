"""Instances of one image as one label image, and which instances of two overlapping images are the same thing."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rayseg.vision import masks
from rayseg.vision.masks import Mask, Runs

Labels = NDArray[np.int32]


def painted(found: Sequence[Runs], shape: tuple[int, int], *, where_HW: Mask, least: int) -> tuple[Labels, list[int]]:
    """Masks painted one over the other, the smaller ones last: each pixel belongs to one of them at most.

    Args:
        found: runs of each mask.
        shape: (height, width).
        where_HW: where there may be any.
        least: what is left of a mask must have so many pixels.

    Returns:
        (labels_HW, kept): 0 for none, k + 1 for the mask at position kept[k]; `kept` ascends.
    """
    labels = np.zeros(shape[0] * shape[1], np.int32)
    for position in np.argsort(-masks.areas(found), kind="stable"):
        starts, lengths = found[position][::2], found[position][1::2] - found[position][::2]
        inside = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        labels[inside + np.arange(len(inside))] = position + 1
    labels[~where_HW.ravel()] = 0
    counts = np.bincount(labels, minlength=len(found) + 1)
    kept = np.flatnonzero(counts[1:] >= least)
    number = np.zeros(len(found) + 1, np.int32)
    number[kept + 1] = np.arange(1, len(kept) + 1)
    return number[labels].reshape(shape), [int(k) for k in kept]


def same(one_HW: Labels, other_HW: Labels, *, least: float) -> NDArray[np.int64]:
    """(n, 2) labels of two label images of the same ground whose IoU is above `least`, ascending.

    With `least` of a half or more, none is the same as two others.
    """
    one, other = one_HW.ravel(), other_HW.ravel()
    both = (one > 0) & (other > 0)
    width = int(other.max(initial=0)) + 1
    pairs, shared = np.unique(one[both].astype(np.int64) * width + other[both], return_counts=True)
    a, b = pairs // width, pairs % width
    joint = np.bincount(one)[a] + np.bincount(other)[b] - shared
    alike: NDArray[np.int64] = np.stack([a, b], axis=1)[shared > least * joint]
    return alike


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Number of the group of each of `count` things, of which those in `pairs` belong together."""
    at = np.array(list(pairs), np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(at.shape[1], bool), (at[0], at[1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
