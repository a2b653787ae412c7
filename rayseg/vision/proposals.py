"""Proposals: masks of things in an image, and how sure their proposer is of each.

A proposer is any callable `(image_HWC, open_HW) -> Proposals`: an RGB uint8 image, and where it may be asked what lies
there (bool; elsewhere is already known). `SuperpixelProposer` needs no weights; `rayseg.models.sam` has another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage
from skimage.transform import downscale_local_mean

from rayseg.config import Config
from rayseg.vision import rle
from rayseg.vision.rle import Mask, Runs
from rayseg.vision.superpixels import felzenszwalb

Image = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Proposals:
    """Masks of one image.

    Attributes:
        masks: runs of each; they may overlap.
        iou_N: predicted IoU with the true thing, as the proposer thinks.
        stability_N: IoU of the mask with itself under a shifted threshold, 0..1.
    """

    masks: tuple[Runs, ...]
    iou_N: NDArray[np.float64]
    stability_N: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, positions: Sequence[int] | NDArray[np.intp]) -> "Proposals":
        """Some of them, in that order."""
        at = np.asarray(positions, np.intp)
        return Proposals(tuple(self.masks[k] for k in at), self.iou_N[at], self.stability_N[at])

    def with_masks(self, found: Sequence[Runs]) -> "Proposals":
        """The same with other masks."""
        return Proposals(tuple(found), self.iou_N, self.stability_N)

    @classmethod
    def none(cls) -> "Proposals":
        """No masks."""
        return cls((), np.zeros(0), np.zeros(0))

    @classmethod
    def joined(cls, several: Sequence["Proposals"]) -> "Proposals":
        """All of several, in order."""
        everyone = [cls.none(), *several]
        return cls(
            tuple(runs for one in everyone for runs in one.masks),
            np.concatenate([one.iou_N for one in everyone]),
            np.concatenate([one.stability_N for one in everyone]),
        )


Propose = Callable[[Image, Mask], Proposals]
_Level = tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]
"""Labels of one scale, and contrast and stability of each."""


class SuperpixelProposer(Config):
    """Proposes Felzenszwalb's superpixels of several scales that stand out against what is around them.

    The contrast of a superpixel is b / (b + s): b is the mean difference of colours over its outline, between pixels
    `reach` px apart, s their standard deviation inside it, so that several fields in one score below each of them. It
    stands for the predicted IoU; stability is the smaller contrast of two reaches over the larger. Superpixels of all
    scales compete: of two that overlap the one of more contrast is taken, the other only for what is left of it.
    """

    scales: Annotated[tuple[float, ...], Field(min_length=1)] = (60.0, 150.0, 400.0)
    """Of `superpixels.felzenszwalb`, on the reduced image; larger means larger plots."""
    reduce: Annotated[int, Field(gt=0)] = 2
    """Side in px of the squares that are averaged first."""
    least: Annotated[int, Field(gt=0)] = 400
    """Pixels of a plot."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Contrast below which a superpixel is not offered."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of a superpixel that others may have taken before it; above, it is left out."""

    def __call__(self, image_HWC: Image, open_HW: Mask) -> Proposals:
        """Superpixels that do not overlap, of what is open."""
        if not open_HW.any():
            return Proposals.none()
        small_hwC = np.rint(downscale_local_mean(image_HWC, (self.reduce, self.reduce, 1))).astype(np.uint8)
        smooth_hwC = ndimage.gaussian_filter(small_hwC.astype(np.float32), (1.0, 1.0, 0))
        least = max(8, self.least // self.reduce**2)
        levels = []
        for scale in self.scales:
            labels_hw = felzenszwalb(small_hwC, scale=scale, sigma=0.8, min_size=least)
            near_N, far_N = (_contrasts(smooth_hwC, labels_hw, reach) for reach in (2, 4))
            stability_N = np.minimum(near_N, far_N) / np.maximum(np.maximum(near_N, far_N), 1e-6)
            levels.append((labels_hw, near_N, stability_N))
        return self._taken(levels, open_HW)

    def _taken(self, levels: Sequence[_Level], open_HW: Mask) -> Proposals:
        """The best superpixels first, each without what is taken already."""
        height, width = levels[0][0].shape
        open_hw = open_HW[:: self.reduce, :: self.reduce][:height, :width]
        order = sorted(
            (-float(contrast), -level, number)
            for level, (_, near_N, _) in enumerate(levels)
            for number, contrast in enumerate(near_N)
            if contrast >= self.contrast
        )
        boxes = [ndimage.find_objects(labels_hw + 1) for labels_hw, _, _ in levels]
        free_hw, found, scores = open_hw.copy(), [], []
        for negative, deep, number in order:
            labels_hw, _, stability_N = levels[-deep]
            cut = boxes[-deep][number]
            whole_hw = labels_hw[cut] == number
            left_hw = whole_hw & free_hw[cut]
            if left_hw.sum() < max((1 - self.overlap) * whole_hw.sum(), self.least / self.reduce**2):
                continue
            free_hw[cut] &= ~left_hw
            found.append(self._enlarged(left_hw, cut, open_HW))
            scores.append((-negative, float(stability_N[number])))
        scores_N2 = np.array(scores, np.float64).reshape(-1, 2)
        return Proposals(tuple(found), scores_N2[:, 0], scores_N2[:, 1])

    def _enlarged(self, mask_hw: Mask, cut: tuple[slice, slice], open_HW: Mask) -> Runs:
        """The runs of a mask found in a part of the reduced image, where that is open."""
        (top, left), reduce = (cut[0].start * self.reduce, cut[1].start * self.reduce), self.reduce
        mask_HW = mask_hw.repeat(reduce, axis=0).repeat(reduce, axis=1)[: len(open_HW) - top, : open_HW.shape[1] - left]
        height, width = mask_HW.shape
        inside = (top, left, top + height, left + width)
        cut_HW = mask_HW & open_HW[top : top + height, left : left + width]
        return rle.moved(rle.encode(cut_HW), inside, width=width, into=open_HW.shape[1])


def _contrasts(image_HWC: NDArray[np.float32], labels_HW: NDArray[np.int32], reach: int) -> NDArray[np.float64]:
    """Contrast of every label 0..n-1: mean difference of colours over its outline against their spread in it, 0..1."""
    labels, count = labels_HW.ravel(), int(labels_HW.max()) + 1
    across = np.zeros((2, count))
    for axis in (0, 1):
        ahead, behind = (np.s_[reach:], np.s_[:-reach]) if axis == 0 else (np.s_[:, reach:], np.s_[:, :-reach])
        one, other = labels_HW[ahead].ravel(), labels_HW[behind].ravel()
        difference = np.abs(image_HWC[ahead] - image_HWC[behind]).mean(axis=-1).ravel()
        apart = one != other
        across += _sums(one[apart], difference[apart], count) + _sums(other[apart], difference[apart], count)
    over = across[0] / np.maximum(across[1], 1)
    sizes = np.maximum(np.bincount(labels, minlength=count), 1)
    spread = np.zeros(count)
    for channel in np.moveaxis(image_HWC, -1, 0).reshape(image_HWC.shape[2], -1).astype(np.float64):
        means = np.bincount(labels, weights=channel, minlength=count) / sizes
        squares = np.bincount(labels, weights=(channel - means[labels]) ** 2, minlength=count)
        spread += np.sqrt(squares / sizes) / image_HWC.shape[2]
    return np.asarray(over / (over + spread + 1.0))


def _sums(labels: NDArray[np.int32], values: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """(2, count) sum of the values and their number, per label."""
    return np.stack([np.bincount(labels, weights=values, minlength=count), np.bincount(labels, minlength=count)])
