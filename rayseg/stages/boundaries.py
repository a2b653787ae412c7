"""Plots proposed by a network for fields and boundaries, and a watershed of its map."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import find_boundaries

from rayseg.errors import ModelError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.models.bundle import Bundle
from rayseg.stages.predict import Predict, lattice_of, patches_of
from rayseg.stages.to_rgb import ImageConfig
from rayseg.vision import rle
from rayseg.vision.blend import Blend
from rayseg.vision.boundaries import BOUNDARY, FIELD, divided
from rayseg.vision.proposals import Image, Proposals
from rayseg.vision.rle import Mask

CLASS_NAMES = ("background", "field", "boundary")


@dataclass
class BoundaryProposer:
    """Proposes the plots of a watershed; the predicted IoU is the mean probability of `field` in a plot.

    The stability is the mean probability of `boundary` on the plot's outline, which is 0 for a plot without one.

    Args:
        prefix: of the bundle.
        image: how the imagery became 8-bit RGB.
        slivers: inscribed radius in px below which a plot goes to its neighbours.
        level: height of the ridges between plots; None takes the bundle's.
        background: mean probability of the background in a plot above which it is left out.
    """

    prefix: str
    image: ImageConfig
    slivers: float
    level: float | None = None
    background: float = 1.0

    @cached_property
    def _predict(self) -> Predict:
        return Predict(self.prefix)

    def __call__(self, image_HWC: Image, open_HW: Mask) -> Proposals:
        """Propose plots that do not overlap, inside the open pixels."""
        if not open_HW.any():
            return Proposals.none()
        level = self._predict.bundle.level if self.level is None else self.level
        map_CHW = self.probabilities(image_HWC, open_HW)
        plots_HW = divided(map_CHW, level=level or 0.0, slivers=self.slivers, background=self.background) * open_HW
        # The 0 that is appended makes the background label 0 where plots cover every pixel.
        numbers, inverse = np.unique(np.append(plots_HW, 0), return_inverse=True)
        labels_HW = inverse[:-1].reshape(plots_HW.shape)
        which = np.arange(1, len(numbers))
        line_HW = find_boundaries(labels_HW, mode="inner")
        iou_N = ndimage.mean(map_CHW[FIELD], labels_HW, which)
        stability_N = np.nan_to_num(ndimage.mean(map_CHW[BOUNDARY], np.where(line_HW, labels_HW, 0), which))
        masks = []
        for k, box in enumerate(ndimage.find_objects(labels_HW), 1):
            rows, cols = box
            inside = (rows.start, cols.start, rows.stop, cols.stop)
            runs = rle.encode(labels_HW[box] == k)
            masks.append(rle.moved(runs, inside, width=cols.stop - cols.start, into=open_HW.shape[1]))
        return Proposals(tuple(masks), np.asarray(iou_N, np.float64).reshape(-1), np.asarray(stability_N).reshape(-1))

    def probabilities(self, image_HWC: Image, valid_HW: Mask) -> NDArray[np.float32]:
        """The map (3, height, width) of an 8-bit image: background, field, boundary."""
        described = self._predict.bundle
        # The image is a tile of its own: its patches begin at its corner, and reach beyond it into mirrored pixels.
        height, width = valid_HW.shape
        tile = Tile("patch", Grid(None, (1.0, 1.0), (0.0, 0.0), "patch"), Window(0, 0, width, height))
        lattice = lattice_of(described, tile)
        reach = lattice.reach(tile.window)
        own = tile.window.slices(reach)
        stored_CHW = np.zeros((len(described.bands), reach.height, reach.width), np.float32)
        # The stored values of the imagery, as the network learnt them.
        low, high = self.image.low, self.image.high
        image_CHW = image_HWC.transpose(2, 0, 1)[: len(self.image.bands)]
        stored_CHW[:, *own] = image_CHW * np.float32((high - low) / 255) + np.float32(low)
        known_HW = np.zeros((reach.height, reach.width), bool)
        known_HW[own] = valid_HW
        patches = patches_of(described, tile, known_HW, reach)
        blend = Blend(tile.window, described.outputs, lattice)
        cuts = [(slice(None), *patch.slices(reach)) for patch in patches]
        batches = (batch.float().cpu().numpy() for batch in self._predict.probabilities(stored_CHW, known_HW, cuts))
        for patch, map_CHW in zip(patches, chain.from_iterable(batches), strict=True):
            blend.add(patch, map_CHW)
        return blend.result()


def expect_boundaries(described: Bundle, image: ImageConfig) -> None:
    """Refuse a model that does not map boundaries, or that learnt from other imagery.

    Raises:
        ModelError: its classes, bands or data type differ.
    """
    names = tuple(name for _, name, _ in described.classes)
    if names != CLASS_NAMES or described.level is None:
        raise ModelError(
            f"model {described.name} has the classes {', '.join(names)}, expected {', '.join(CLASS_NAMES)} and a "
            "level; give a bundle that proposer=boundaries has trained"
        )
    described.check_contract(image.bands, image.dtype, source="image.bands")
