"""Blend overlapping patches into one field of probabilities, with the same bits in every window."""

import numpy as np
from numpy.typing import NDArray

from rayseg.errors import DataError
from rayseg.geo.grid import Lattice, Window


class Blend:
    """Weighted mean of patch probabilities over one window.

    The sum at a pixel runs over its patches in the order they are added. Added row by row, as `Lattice.patches` lists
    them, patches give a pixel the same float32 bits in every window.
    """

    def __init__(self, window: Window, classes: int, lattice: Lattice) -> None:
        """Start an empty field of `classes` channels over `window`; `lattice` gives the patches' weight.

        Raises:
            DataError: no class, or a window without pixels.
        """
        if window.empty or classes < 1:
            raise DataError(f"blending got {classes} classes over {window}, expected at least one class and one pixel")
        self._window = window
        self._weight_HW = lattice.weight()
        self._sum_CHW = np.zeros((classes, window.height, window.width), np.float32)
        self._weights_HW = np.zeros((window.height, window.width), np.float32)

    def add(self, patch_window: Window, probabilities_CHW: NDArray[np.float32]) -> None:
        """Add one patch; its part outside the window is dropped.

        Args:
            patch_window: the patch in grid pixels.
            probabilities_CHW: its probabilities (classes, patch, patch), float32.

        Raises:
            DataError: the array's shape differs from the lattice's patches with this many classes.
        """
        expected = (self._sum_CHW.shape[0], *self._weight_HW.shape)
        if probabilities_CHW.shape != expected:
            raise DataError(f"a patch has the shape {probabilities_CHW.shape}, expected {expected}")
        part = patch_window.intersect(self._window)
        if part.empty:
            return
        rows, cols = part.slices(patch_window)
        to_rows, to_cols = part.slices(self._window)
        weight_HW = self._weight_HW[rows, cols]
        # Patch by patch: the order of float32 additions determines the bits.
        self._sum_CHW[:, to_rows, to_cols] += weight_HW * probabilities_CHW[:, rows, cols]
        self._weights_HW[to_rows, to_cols] += weight_HW

    def result(self) -> NDArray[np.float32]:
        """The blended probabilities (classes, height, width) float32; 0 where no patch was added."""
        # pixels without a patch have the sum 0; a weight of 1 there avoids 0 / 0
        weights_HW = np.where(self._weights_HW > 0, self._weights_HW, np.float32(1))
        return np.divide(self._sum_CHW, weights_HW, dtype=np.float32)
