"""Proposals: masks of objects in an image, with scores.

A proposer is any callable `(image_HWC, open_HW) -> Proposals`. It takes an RGB uint8 image and a bool array, True where
objects may be proposed. `SuperpixelProposer` needs no weights; `rayseg.models.sam` has another proposer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage
from skimage.transform import downscale_local_mean

from rayseg.config import Config, added
from rayseg.vision import rle
from rayseg.vision.instances import without_slivers
from rayseg.vision.rle import Mask, Runs
from rayseg.vision.superpixels import felzenszwalb

Image = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Proposals:
    """Masks of one image.

    Attributes:
        masks: runs of each; masks may overlap.
        iou_N: predicted IoU with the true object.
        stability_N: IoU of the mask with itself under a shifted threshold, 0..1.
    """

    masks: tuple[Runs, ...]
    iou_N: NDArray[np.float64]
    stability_N: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, positions: Sequence[int] | NDArray[np.intp]) -> "Proposals":
        """The proposals at these positions, in that order."""
        at = np.asarray(positions, np.intp)
        return Proposals(tuple(self.masks[k] for k in at), self.iou_N[at], self.stability_N[at])

    @classmethod
    def none(cls) -> "Proposals":
        """No masks."""
        return cls((), np.zeros(0), np.zeros(0))

    @classmethod
    def joined(cls, several: Sequence["Proposals"]) -> "Proposals":
        """Concatenate several, in order."""
        several = [cls.none(), *several]  # so that there is one to concatenate
        return cls(
            tuple(runs for proposals in several for runs in proposals.masks),
            np.concatenate([proposals.iou_N for proposals in several]),
            np.concatenate([proposals.stability_N for proposals in several]),
        )


Propose = Callable[[Image, Mask], Proposals]


class SuperpixelProposer(Config):
    """Proposes Felzenszwalb's superpixels of several scales that contrast with their surroundings.

    The contrast of a superpixel is b / (b + s): b is the mean difference of colours across its outline, between pixels
    `reach` px apart, s their standard deviation inside it, so that several fields in one score below each of them. The
    contrast serves as the predicted IoU; the stability is the smaller contrast of two reaches over the larger.
    Superpixels of all scales compete: of two that overlap, the one of higher contrast gets the shared pixels.
    """

    scales: Annotated[tuple[float, ...], Field(min_length=1)] = (60.0, 150.0, 400.0)
    """Of `superpixels.felzenszwalb`, on the reduced image; larger means larger plots."""
    reduce: Annotated[int, Field(gt=0)] = 2
    """Side in px of the squares that are averaged first."""
    least: Annotated[int, Field(gt=0)] = 400
    """Fewest pixels of a plot."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Least contrast of a proposed superpixel."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Most of a superpixel's area, as a share, that superpixels of higher contrast may have taken."""
    slivers: Annotated[float, Field(ge=0)] = added(default=0.0)
    """Inscribed radius in px below which the pixels of a plot go to the nearest plot, or to none."""

    def __call__(self, image_HWC: Image, open_HW: Mask) -> Proposals:
        """Propose superpixels that do not overlap, inside the open pixels."""
        if not open_HW.any():
            return Proposals.none()
        # 1. superpixels of every scale on the reduced image (its arrays end in hw), with contrast and stability
        reduce = self.reduce
        small_hwC = np.rint(downscale_local_mean(image_HWC, (reduce, reduce, 1))).astype(np.uint8)
        smooth_hwC = ndimage.gaussian_filter(small_hwC.astype(np.float32), (1.0, 1.0, 0))
        levels, order = [], []
        for level, scale in enumerate(self.scales):
            labels_hw = felzenszwalb(small_hwC, scale=scale, sigma=0.8, min_size=max(8, self.least // reduce**2))
            near_N, far_N = (_contrasts(smooth_hwC, labels_hw, reach) for reach in (2, 4))
            levels.append((labels_hw, ndimage.find_objects(labels_hw + 1), near_N, _stability(near_N, far_N)))
            order += [(-float(near_N[k]), -level, int(k)) for k in np.flatnonzero(near_N >= self.contrast)]
        # 2. the best superpixels first, each without the pixels already taken
        height, width = small_hwC.shape[:2]
        free_hw = open_HW[::reduce, ::reduce][:height, :width].copy()
        plots_hw = np.zeros((height, width), np.int32)
        scores = []
        for _, level, number in sorted(order):
            labels_hw, boxes, near_N, stability_N = levels[-level]
            box = boxes[number]
            whole_hw = labels_hw[box] == number
            free_part_hw = whole_hw & free_hw[box]
            if free_part_hw.sum() < max((1 - self.overlap) * whole_hw.sum(), self.least / reduce**2):
                continue
            free_hw[box] &= ~free_part_hw
            scores.append((near_N[number], stability_N[number]))
            plots_hw[box][free_part_hw] = len(scores)
        if self.slivers:
            plots_hw = without_slivers(plots_hw, self.slivers / reduce)
            near_N, far_N = (_contrasts(smooth_hwC, plots_hw, reach)[1:] for reach in (2, 4))
            scores = list(zip(near_N, _stability(near_N, far_N), strict=True))
        # 3. their runs at full resolution
        masks = []
        for k, box in enumerate(ndimage.find_objects(plots_hw), 1):
            top, left = box[0].start * reduce, box[1].start * reduce
            mask_HW = (plots_hw[box] == k).repeat(reduce, axis=0).repeat(reduce, axis=1)
            part_HW = open_HW[top : top + mask_HW.shape[0], left : left + mask_HW.shape[1]]
            mask_HW = mask_HW[: part_HW.shape[0], : part_HW.shape[1]] & part_HW
            inside = (top, left, top + mask_HW.shape[0], left + mask_HW.shape[1])
            masks.append(rle.moved(rle.encode(mask_HW), inside, width=mask_HW.shape[1], into=open_HW.shape[1]))
        scores_N2 = np.array(scores, np.float64).reshape(-1, 2)
        return Proposals(tuple(masks), scores_N2[:, 0], scores_N2[:, 1])


def _stability(near_N: NDArray[np.float64], far_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smaller of two contrasts over the larger."""
    return np.asarray(np.minimum(near_N, far_N) / np.maximum(np.maximum(near_N, far_N), 1e-6))


def _contrasts(image_HWC: NDArray[np.float32], labels_HW: NDArray[np.int32], reach: int) -> NDArray[np.float64]:
    """Contrast of every label 0..n-1: difference of colours across its outline against their spread in it, 0..1."""
    labels, count = labels_HW.ravel(), int(labels_HW.max()) + 1
    # 1. differences between pixels `reach` px apart in two labels count for both
    sums_N, pairs_N = np.zeros(count), np.zeros(count)
    for axis in (0, 1):
        ahead, behind = (np.s_[reach:], np.s_[:-reach]) if axis == 0 else (np.s_[:, reach:], np.s_[:, :-reach])
        difference = np.abs(image_HWC[ahead] - image_HWC[behind]).mean(axis=-1).ravel()
        apart = (labels_HW[ahead] != labels_HW[behind]).ravel()
        sides = [labels_HW[part].ravel()[apart] for part in (ahead, behind)]
        sums_N += sum(np.bincount(side, weights=difference[apart], minlength=count) for side in sides)
        pairs_N += sum(np.bincount(side, minlength=count) for side in sides)
    across_N = sums_N / np.maximum(pairs_N, 1)
    # 2. mean standard deviation of the channels in every label
    sizes = np.maximum(np.bincount(labels, minlength=count), 1)
    spread_N = np.zeros(count)
    for channel in np.moveaxis(image_HWC, -1, 0).reshape(image_HWC.shape[2], -1).astype(np.float64):
        means = np.bincount(labels, weights=channel, minlength=count) / sizes
        squares = np.bincount(labels, weights=(channel - means[labels]) ** 2, minlength=count)
        spread_N += np.sqrt(squares / sizes) / image_HWC.shape[2]
    # The 1 (one grey level) keeps flat superpixels with weak outlines from a high contrast.
    return np.asarray(across_N / (across_N + spread_N + 1.0))
