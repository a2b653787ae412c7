"""Plots by rounds of proposals on the rest of an image (LiSegAgr, ICONIP), and once more inside mixed masks.

    image --> propose --> drop masks that are white --> paint the masks white --> next round
    masks of all rounds --> duplicates --> parts --> mixed masks: the same loop on their crop --> duplicates --> parts

"White" is (255, 255, 255). Images stay arrays between rounds; masks of different rounds stay separate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage
from skimage.color import rgb2gray
from skimage.filters import threshold_otsu

from rayseg.config import Config
from rayseg.vision import rle
from rayseg.vision.proposals import Image, Proposals, Propose
from rayseg.vision.rle import Mask, Runs

WHITE = 255
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_SPECK = 200  # area of a dark contour below which clean_up paints it white
_PIECE = 1000  # pixels of a dark part below which clean_up paints it white
_BRIGHT = 200
_AROUND = 16  # px around a mask in which edges are detected, so that they equal those of the whole image


class Round(Config):
    """One round of proposals."""

    white: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of white from which a mask is dropped; null drops none."""
    edges: bool = False
    """Also paint the neighbourhood of strong edges white afterwards."""


class Refining(Config):
    """Which masks are refined, and how."""

    least: Annotated[int, Field(ge=0)] = 10_000
    """Pixels above which a mask may be mixed."""
    edges: Annotated[float, Field(ge=0)] = 0.4
    """Share of edge pixels off the mask's outline above which it counts as mixed, if the entropy is high too."""
    entropy: Annotated[float, Field(ge=0)] = 6.0
    """Entropy of its colours in bits above which it counts as mixed, if the share of edges is high too."""
    white: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of white from which a mask of the crop is dropped."""
    duplicate: Annotated[float, Field(gt=0, le=1)] = 0.9
    """IoU above which the smaller of two new masks is removed."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.6
    """IoU above which the smaller of any two masks is removed."""


class RoundsConfig(Config):
    """The rounds; the defaults are the published ones."""

    rounds: tuple[Round, ...] = (Round(), Round(white=0.5), Round(white=0.9, edges=True), Round(white=0.9, edges=True))
    """The rounds, in order; later ones are skipped when little of the image remains."""
    left: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Least share of valid pixels that are not white for another round."""
    duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8
    """IoU above which the smaller of two masks is removed."""
    least: Annotated[int, Field(gt=0)] = 50
    """Fewest pixels of a plot."""
    refining: Refining | None = Refining()
    """How mixed masks are refined; null keeps them."""


@dataclass(frozen=True, eq=False)
class Plots:
    """The plots of one image.

    Attributes:
        proposals: masks, one connected part each, and their scores.
        round_N: round that found each, from 1.
        refined_N: True for plots found inside a mixed mask.
        coverage: share of the valid pixels under all masks after each round.
    """

    proposals: Proposals
    round_N: NDArray[np.int64]
    refined_N: NDArray[np.bool_]
    coverage: tuple[float, ...] = field(default=())

    def take(self, positions: Sequence[int]) -> "Plots":
        """The plots at these positions, in that order."""
        at = np.asarray(positions, np.intp)
        return replace(self, proposals=self.proposals.take(at), round_N=self.round_N[at], refined_N=self.refined_N[at])


def find_plots(image_HWC: Image, propose: Propose, config: RoundsConfig, valid_HW: Mask | None = None) -> Plots:
    """Find all plots of an image; white pixels count as known, invalid pixels are ignored.

    Args:
        image_HWC: RGB uint8.
        propose: returns masks of an image.
        config: the rounds.
        valid_HW: True where there is data, at least once; None for everywhere.
    """
    shape = image_HWC.shape[:2]
    if valid_HW is not None:
        image_HWC = alone(image_HWC, valid_HW)
    proposed = in_rounds(image_HWC, propose, config.rounds, left=config.left, valid_HW=valid_HW)
    plots = _apart(proposed, shape, config.duplicate, config.least)
    if config.refining is None:
        return plots
    fresh = [_refined(image_HWC, plots, k, propose, config.refining) for k in range(len(plots.proposals))]
    # Parts of any size pass here; the least size applies once, to the merged result.
    split = _apart(_concatenated(fresh), shape, config.refining.duplicate, 1)
    both = _concatenated([plots, split])
    return replace(_apart(both, shape, config.refining.overlap, config.least), coverage=proposed.coverage)


def in_rounds(
    image_HWC: Image, propose: Propose, rounds: Sequence[Round], *, left: float, valid_HW: Mask | None = None
) -> Plots:
    """The masks of all rounds, as proposed: the loop of the method.

    Args:
        image_HWC: RGB uint8.
        propose: returns masks of an image where it is not white.
        rounds: the rounds, in order.
        left: least share of valid pixels that are not white for another round.
        valid_HW: True where there is data, at least once; None for everywhere. Elsewhere the image is white.
    """
    shape = image_HWC.shape[:2]
    valid_HW = np.ones(shape, bool) if valid_HW is None else valid_HW
    rounds_plots, coverage = [], []
    known_HW = np.zeros(shape, bool)
    for number, round_ in enumerate(rounds, 1):
        white_HW = is_white(image_HWC)
        # The first round always runs, also on an image that is almost white.
        if number > 1 and 1 - white_HW[valid_HW].mean() < left:
            break
        proposals = propose(image_HWC, ~white_HW)
        if round_.white is not None:
            proposals = proposals.take(np.flatnonzero(rle.shares(proposals.masks, white_HW) < round_.white))
        rounds_plots.append(_plots(proposals, number))
        known_HW |= rle.union(proposals.masks, shape)
        coverage.append(float(known_HW[valid_HW].mean()))
        if number < len(rounds):
            image_HWC = whitened(image_HWC, proposals.masks, edges=round_.edges)
    return replace(_concatenated(rounds_plots), coverage=tuple(coverage))


def _plots(proposals: Proposals, number: int) -> Plots:
    count = len(proposals)
    return Plots(proposals, np.full(count, number), np.zeros(count, bool))


def _concatenated(several: Sequence[Plots]) -> Plots:
    rounds = [np.zeros(0, np.int64), *(plots.round_N for plots in several)]
    refined = [np.zeros(0, bool), *(plots.refined_N for plots in several)]
    joined = Proposals.joined([plots.proposals for plots in several])
    return Plots(joined, np.concatenate(rounds), np.concatenate(refined))


def _apart(plots: Plots, shape: tuple[int, int], duplicate: float, least: int) -> Plots:
    """Remove duplicates, then split masks into connected parts of at least `least` pixels."""
    # Duplicates first: they are compared as whole masks, as proposed.
    plots = plots.take(rle.survivors(plots.proposals.masks, duplicate))
    split = [rle.parts(runs, shape, least=least) for runs in plots.proposals.masks]
    owners = np.repeat(np.arange(len(split)), [len(part) for part in split])
    taken = plots.take([int(k) for k in owners])
    return replace(taken, proposals=replace(taken.proposals, masks=tuple(runs for part in split for runs in part)))


def is_white(image_HWC: Image) -> Mask:
    """True where all three channels are 255."""
    return np.asarray((image_HWC == WHITE).all(axis=-1))


# -- between rounds ---------------------------------------------------------------------------------------------------


def whitened(image_HWC: Image, masks: Sequence[Runs], *, edges: bool) -> Image:
    """Paint white: the masks, grown by 3 px, with `edges` the surroundings of strong edges, and specks."""
    image_HWC = image_HWC.copy()
    grown_HW = cv2.dilate(rle.union(masks, image_HWC.shape[:2]).astype(np.uint8), _CROSS, iterations=3)
    image_HWC[grown_HW > 0] = WHITE
    if edges:
        image_HWC = without_edges(image_HWC)
    return clean_up(image_HWC)


def without_edges(image_HWC: Image) -> Image:
    """Canny(100, 200) on grey, dilated 3 x 5 x 5, blurred by a 21 x 21 Gaussian: white where the result is 255."""
    edges_HW = cv2.Canny(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), 100, 200)
    wide_HW = cv2.dilate(edges_HW, np.ones((5, 5), np.uint8), iterations=3)
    full_HW = cv2.GaussianBlur(wide_HW, (21, 21), 0) == WHITE
    return np.where(full_HW[..., None], np.uint8(WHITE), image_HWC)


def clean_up(image_HWC: Image, *, piece: int = _PIECE) -> Image:
    """Paint white: dark specks, then everything that is bright or in a dark part of less than `piece` pixels."""
    # 1. specks: outer contours of dark parts (Otsu) with an area below 200, filled
    grey_HW = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)
    _, dark_HW = cv2.threshold(grey_HW, 0, WHITE, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    contours, _ = cv2.findContours(dark_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    specks = [contour for contour in contours if cv2.contourArea(contour) < _SPECK]
    image_HWC = np.ascontiguousarray(image_HWC).copy()
    cv2.drawContours(image_HWC, specks, -1, (WHITE, WHITE, WHITE), cv2.FILLED)
    # 2. bright pixels and small dark parts
    grey_HW = rgb2gray(image_HWC)
    flat = grey_HW.min() == grey_HW.max()  # Otsu's threshold of a constant is the constant
    dark_HW = grey_HW < (1.0 if flat else threshold_otsu(grey_HW))
    labels_HW, _ = ndimage.label(dark_HW)
    sizes = np.bincount(labels_HW.ravel())
    sizes[0] = 0
    kept_HW = (sizes >= piece)[labels_HW] & ~(image_HWC > _BRIGHT).all(axis=-1)
    return np.where(kept_HW[..., None], image_HWC, np.uint8(WHITE))


# -- mixed masks ------------------------------------------------------------------------------------------------------


def _refined(image_HWC: Image, plots: Plots, at: int, propose: Propose, config: Refining) -> Plots:
    """Find the plots inside a mask by one round on its crop, if the mask is mixed."""
    runs, width = plots.proposals.masks[at], image_HWC.shape[1]
    if rle.area(runs) <= config.least:
        return _plots(Proposals.none(), 0)
    row, col, row1, col1 = rle.box(runs, width)
    mask_HW = rle.decode(runs, image_HWC.shape[:2])
    around = np.s_[max(row - _AROUND, 0) : row1 + _AROUND, max(col - _AROUND, 0) : col1 + _AROUND]
    if not is_mixed(alone(image_HWC[around], mask_HW[around]), mask_HW[around], config):
        return _plots(Proposals.none(), 0)
    # One round, without an end by coverage: plots inside a mask are not divided again.
    crop_HWC = alone(image_HWC[row:row1, col:col1], mask_HW[row:row1, col:col1])
    proposals = in_rounds(crop_HWC, propose, [Round(white=config.white)], left=0.0).proposals
    box = (row, col, row1, col1)
    placed = tuple(rle.moved(mask, box, width=col1 - col, into=width) for mask in proposals.masks)
    count = len(placed)
    number = np.full(count, plots.round_N[at])
    return Plots(replace(proposals, masks=placed), number, np.ones(count, bool))


def alone(image_HWC: Image, mask_HW: Mask) -> Image:
    """Paint everything outside the mask white."""
    return np.where(mask_HW[..., None], image_HWC, np.uint8(WHITE))


def is_mixed(image_HWC: Image, mask_HW: Mask, config: Refining) -> bool:
    """Whether texture and colours both indicate several plots in a mask; `image_HWC` is white outside it."""
    return edge_share(image_HWC, mask_HW) > config.edges and entropy(image_HWC) > config.entropy


def edge_share(image_HWC: Image, mask_HW: Mask) -> float:
    """Share of edge pixels (Canny 100, 100 on grey after a Gaussian 5 x 5) off the mask's outline, 3 px thick."""
    grey_HW = cv2.cvtColor(np.ascontiguousarray(image_HWC), cv2.COLOR_RGB2GRAY)
    edges_HW = cv2.Canny(cv2.GaussianBlur(grey_HW, (5, 5), 0), 100, 100) > 0
    outline_HW = np.zeros(mask_HW.shape, np.uint8)
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(outline_HW, contours, -1, 1, 3)
    count = int(edges_HW.sum())
    return float((edges_HW & (outline_HW == 0)).sum() / count) if count else 0.0


def entropy(image_HWC: Image) -> float:
    """Entropy of the pixels that are not white, in bits, over 256 bins, averaged over the channels."""
    pixels_NC = image_HWC[~is_white(image_HWC)]
    if not len(pixels_NC):
        return 0.0
    shares = [np.bincount(channel, minlength=256) / len(pixels_NC) for channel in pixels_NC.T]
    return float(np.mean([-(p[p > 0] * np.log2(p[p > 0])).sum() for p in shares]))
