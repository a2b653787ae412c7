"""Chips to coarse masks: the stages that need no network, from reading a chip to writing its cue."""

import io
from dataclasses import replace

import numpy as np
from skimage.transform import downscale_local_mean
from upath import UPath

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import NODATA, slug
from rayseg.io import cog
from rayseg.io.labels import Chip, read_chip
from rayseg.io.sources import grids_of
from rayseg.stages.rows import ChipRow
from rayseg.store import put, upath
from rayseg.vision import concept, superpixels
from rayseg.vision.coarse_masks import Objects, coarse_mask
from rayseg.vision.crops import middle
from rayseg.vision.fill import filled


class ReadChip:
    """`listed -> image, valid`: the middle of the chip, (size, size, 3) uint8 RGB, and where it has data.

    Elsewhere the image is mirrored, as in training.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Read each chip."""
        pairs = [read_chip(Chip.from_row(row.listed), self.size) for row in rows]
        return [
            replace(row, image=filled(image_HWC, valid_HW), valid=valid_HW)
            for row, (image_HWC, valid_HW) in zip(rows, pairs, strict=True)
        ]


class Superpixels:
    """`image -> superpixels`: Felzenszwalb's, (size, size) int32, computed at 1 / `reduce` of the resolution.

    Args:
        reduce: side in px of the squares that are averaged first.
        min_size: least pixels of a superpixel, at the lower resolution.
    """

    def __init__(self, *, reduce: int = 1, min_size: int = 64) -> None:
        self.reduce, self.min_size = reduce, min_size

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Divide each chip."""
        return [replace(row, superpixels=self._divide(row.image)) for row in rows]

    def _divide(self, image_HWC: np.ndarray) -> np.ndarray:
        height, width = image_HWC.shape[:2]
        small = np.rint(downscale_local_mean(image_HWC, (self.reduce, self.reduce, 1))).astype(np.uint8)
        labels_HW = superpixels.felzenszwalb(small, min_size=self.min_size)
        return labels_HW.repeat(self.reduce, axis=0).repeat(self.reduce, axis=1)[:height, :width]


class WriteDensity:
    """`image, superpixels, cam, certainty -> facts`: write the chip's density over chroma, `<prefix>/<id>.npy`.

    A superpixel's weight is its area times (its mean CAM + the chip's): a low CAM reduces the weight, but not to zero.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, rows: list[ChipRow]) -> list[Settled]:
        """Write each chip's density."""
        return [self._write(row) for row in rows]

    def _write(self, row: ChipRow) -> Settled:
        ab_N2, areas_N = concept.chroma(row.image, row.superpixels)
        cams_N = np.bincount(row.superpixels.ravel(), weights=row.cam.ravel()) / np.maximum(areas_N, 1)
        plane = concept.density(ab_N2, areas_N * (cams_N + row.cam.mean() + 1e-6))
        content = io.BytesIO()
        np.save(content, plane)
        put(density_path(self.prefix, row.id), content.getvalue())
        return Settled(facts={"certainty": row.certainty})


class CamCue:
    """`cam, objects -> mask`: objects whose mean CAM is above Otsu's threshold (the paper's cue).

    Args:
        objects: whether an object is all pixels of a label or a connected component of it.
    """

    def __init__(self, *, objects: Objects) -> None:
        self.objects = objects

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Decide each chip."""
        return [replace(row, mask=coarse_mask(row.cam, row.objects, objects=self.objects)) for row in rows]


class ConceptCue:
    """`image, superpixels -> mask`: superpixels whose chroma belongs to the concept; 255 where the evidence is weak.

    Args:
        evidence_AB: of `concept.evidence`.
        doubtful: evidence above which a superpixel outside the concept is left open.
    """

    def __init__(self, evidence_AB: np.ndarray, *, doubtful: float) -> None:
        self.evidence_AB, self.doubtful = evidence_AB, doubtful

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Decide each chip."""
        return [replace(row, mask=self._mask(row)) for row in rows]

    def _mask(self, row: ChipRow) -> np.ndarray:
        ab_N2, _ = concept.chroma(row.image, row.superpixels)
        return concept.concept_mask(row.superpixels, ab_N2, self.evidence_AB, doubtful=self.doubtful)


class WriteCue:
    """`listed, mask, cam, certainty, valid -> facts`: write the coarse mask and the CAM on the chip's grid.

    Bands of `<prefix>/<id>.tif` (GeoTIFF), uint8: mask (0, 1; 255 open or no data), cam (0..1 x 254).
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, rows: list[ChipRow]) -> list[Settled]:
        """Write each chip's cue."""
        return [self._write(row) for row in rows]

    def _write(self, row: ChipRow) -> Settled:
        mask_HW = np.where(row.valid, row.mask, NODATA).astype(np.uint8)
        bands_CHW = np.stack([mask_HW, np.rint(row.cam * 254).astype(np.uint8)])
        chip = Chip.from_row(row.listed)
        [(grid, _)] = grids_of([chip.source])
        window = middle(chip.window, len(mask_HW))
        cog.write_image(cue_path(self.prefix, row.id), bands_CHW, grid, window, bands=("mask", "cam"))
        return Settled(facts={"certainty": row.certainty, "share": float((mask_HW == 1).mean())})


def cue_path(prefix: str, chip_id: str) -> UPath:
    """The file in which `WriteCue` keeps the cue of a chip."""
    return upath(prefix) / f"{slug(chip_id)}.tif"


def density_path(prefix: str, chip_id: str) -> UPath:
    """The file in which `WriteDensity` keeps the density of a chip."""
    return upath(prefix) / f"{slug(chip_id)}.npy"
