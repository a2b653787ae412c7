"""Masks of one image as run lengths: areas, intersections, duplicates, connected parts.

The runs of a mask are its starts and ends along the image's pixels in reading order, (2 n,) int64:
`[start, end, start, end, ...]`, ascending, ends excluded. A mask of a plot takes a few kilobytes in an image of any
size.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Runs = NDArray[np.int64]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""(row, col, row1, col1), the last two excluded."""
_DENSE = 0.05  # share of atoms in a mask above which the dense product is faster
_BLOCK = 1 << 14  # columns of the dense product at once


def encode(mask_HW: Mask) -> Runs:
    """The runs of a mask (height, width) bool."""
    # A False at both ends makes masks at the first and last pixel start and end too.
    flat = np.concatenate([[False], mask_HW.ravel(), [False]])
    return np.flatnonzero(flat[1:] != flat[:-1]).astype(np.int64)


def decode(runs: Runs, shape: tuple[int, int]) -> Mask:
    """The mask (height, width) bool of runs."""
    change = np.zeros(shape[0] * shape[1] + 1, np.int8)
    change[runs[::2]] = 1
    change[runs[1::2]] -= 1  # runs of one mask do not touch, so no start is an end
    return np.cumsum(change[:-1], dtype=np.int8).astype(bool).reshape(shape)


def area(runs: Runs) -> int:
    """Pixels of a mask."""
    return int((runs[1::2] - runs[::2]).sum())


def areas(masks: Sequence[Runs]) -> NDArray[np.int64]:
    """Pixels of each mask."""
    return np.array([area(runs) for runs in masks], np.int64)


def union(masks: Sequence[Runs], shape: tuple[int, int]) -> Mask:
    """The union of masks, (height, width) bool."""
    change = np.zeros(shape[0] * shape[1] + 1, np.int32)
    if masks:
        runs = np.concatenate(masks)
        np.add.at(change, runs[::2], 1)
        np.subtract.at(change, runs[1::2], 1)
    covered: Mask = np.cumsum(change[:-1]).reshape(shape) > 0
    return covered


def shares(masks: Sequence[Runs], of_HW: Mask) -> NDArray[np.float64]:
    """Share of each mask's pixels that lie in `of_HW`; 0 for an empty mask."""
    # Cumulative counts: the pixels of a run are one difference.
    before = np.concatenate([[0], np.cumsum(of_HW.ravel(), dtype=np.int64)])
    inside = [int((before[runs[1::2]] - before[runs[::2]]).sum()) for runs in masks]
    return np.array(inside, np.float64) / np.maximum(areas(masks), 1)


def box(runs: Runs, width: int) -> Box:
    """The smallest box around a non-empty mask in an image `width` px wide."""
    first, last = runs[::2], runs[1::2] - 1
    row, row1 = int(first[0]) // width, int(last[-1]) // width + 1
    over = first // width != last // width
    if over.any():  # a run that continues in the next row touches both sides of the image
        return row, 0, row1, width
    return row, int((first % width).min()), row1, int((last % width).max()) + 1


def moved(runs: Runs, inside: Box, *, width: int, into: int) -> Runs:
    """Runs of a mask of the crop `inside`, `width` px wide, as runs in an image `into` px wide."""
    mask_HW = decode(runs, (inside[2] - inside[0], width))
    # first and last pixel of every run, cut at the ends of rows: the image's rows are wider
    padded_HW = np.pad(mask_HW, ((0, 0), (1, 1)))
    rows, cols = np.nonzero(padded_HW[:, 1:] != padded_HW[:, :-1])
    places = (rows * width + cols).astype(np.int64)
    starts, ends = places[::2], places[1::2] - 1
    offset = inside[0] * into + inside[1]
    return joined((starts // width) * into + starts % width + offset, (ends // width) * into + ends % width + offset)


def joined(first: Runs, last: Runs) -> Runs:
    """Runs of pixels first..last; runs that touch become one."""
    apart = first[1:] > last[:-1] + 1
    starts = first[np.concatenate([[True], apart])] if len(first) else first
    ends = last[np.concatenate([apart, [True]])] + 1 if len(last) else last
    return np.stack([starts, ends], axis=1).ravel()


# -- intersections ----------------------------------------------------------------------------------------------------


def intersections(masks: Sequence[Runs]) -> NDArray[np.int64]:
    """Count the pixels that every two masks share, (n, n); the diagonal holds their areas.

    All starts and ends together cut the image into segments that each mask contains or not. Segments in the same masks
    form one atom, so the intersections are the product of the (masks x atoms) matrix with itself, weighted by size. The
    sum of the masks' random 64-bit keys identifies the masks of a segment: two different sets of masks share a sum with
    probability 2^-64.
    """
    # 1. segments, and the atom of each
    count = len(masks)
    owner = np.repeat(np.arange(count), [len(runs) // 2 for runs in masks])
    runs = np.concatenate([*masks, np.empty(0, np.int64)])
    if not len(runs):
        return np.zeros((count, count), np.int64)
    cuts, place = np.unique(runs, return_inverse=True)
    keys = np.random.default_rng(0).integers(2**64, size=count, dtype=np.uint64)
    change = np.zeros(len(cuts), np.uint64)
    np.add.at(change, place[::2], keys[owner])
    np.subtract.at(change, place[1::2], keys[owner])
    _, first, atom = np.unique(np.cumsum(change)[:-1], return_index=True, return_inverse=True)
    weights = np.bincount(atom, weights=np.diff(cuts))
    # 2. the atoms of each mask; an atom is ordered by its first segment, so those inside a run are neighbours
    order = np.argsort(first)
    rank = np.searchsorted(first[order], np.arange(len(cuts)))
    low, high = rank[place[::2]], rank[place[1::2]]
    held = high - low
    atoms = np.arange(held.sum()) + np.repeat(low - (np.cumsum(held) - held), held)
    whole = np.float32 if cuts[-1] < 2**24 else np.float64  # sums of pixels stay exact
    shape, weights = (count, len(first)), weights[order].astype(whole)
    holds = csr_array((np.ones(len(atoms), whole), (np.repeat(owner, held), atoms)), shape=shape)
    # 3. (holds x weights) holds^T: dense and block by block where many masks overlap, else sparse
    if holds.nnz < _DENSE * count * len(first):
        return np.asarray((holds.multiply(weights).tocsr() @ holds.T).toarray()).astype(np.int64)
    by_column, product = holds.tocsc(), np.zeros((count, count), whole)
    for start in range(0, len(first), _BLOCK):
        part = by_column[:, start : start + _BLOCK].toarray()
        product += (part * weights[start : start + _BLOCK]) @ part.T
    return product.astype(np.int64)


def ious(masks: Sequence[Runs]) -> NDArray[np.float64]:
    """Intersection over union of every two masks, (n, n); 0 where both are empty."""
    shared = intersections(masks)
    sizes = np.diagonal(shared)
    return np.asarray(shared / np.maximum(sizes[:, None] + sizes[None] - shared, 1))


def survivors(masks: Sequence[Runs], threshold: float) -> list[int]:
    """Positions of the masks that remain when the smaller of two masks with IoU > `threshold` is removed, until stable.

    Each mask in order is compared with all others in order; of two masks of the same size the current one is removed.
    The order matters: it is the order of the published loops, whose result this reproduces.
    """
    iou = ious(masks)
    np.fill_diagonal(iou, 0)
    sizes = areas(masks)
    alike = {int(k): np.flatnonzero(iou[k] > threshold) for k in np.flatnonzero((iou > threshold).any(axis=1))}
    remains = np.ones(len(masks), bool)
    # one pass is enough: a mask that remains after its turn has no similar mask left
    for here, others in alike.items():
        for other in others:
            if not remains[here]:
                break
            if remains[other]:
                remains[here if sizes[here] <= sizes[other] else other] = False
    return [int(k) for k in np.flatnonzero(remains)]


# -- parts ------------------------------------------------------------------------------------------------------------


def parts(runs: Runs, shape: tuple[int, int], *, least: int = 1) -> list[Runs]:
    """The 4-connected components of a mask with at least `least` pixels, in reading order."""
    if not len(runs):
        return []
    # Only the mask's box is decoded, which in a large image is a small part.
    row, col, row1, col1 = box(runs, shape[1])
    mask_HW = decode(runs, shape)[row:row1, col:col1]
    count, labels_HW, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=4)
    if count == 2:  # background and one component: the mask itself
        return [runs] if stats[1, cv2.CC_STAT_AREA] >= least else []
    components = []
    for number in range(1, count):
        left, top, width, height, size = stats[number]
        if size >= least:
            cut_HW = labels_HW[top : top + height, left : left + width] == number
            at = (row + top, col + left, row + top + height, col + left + width)
            components.append(moved(encode(cut_HW), at, width=width, into=shape[1]))
    return components
