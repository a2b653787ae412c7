"""Chips to coarse masks: the stages that need no network, from reading a chip to writing its cue."""

from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from skimage.transform import downscale_local_mean
from upath import UPath

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import NODATA, slug
from rayseg.io import cog
from rayseg.io.labels import Chip, read_chip
from rayseg.io.output_grids import grids_of
from rayseg.io.tables import write_array
from rayseg.stages.rows import ChipRow
from rayseg.store import upath
from rayseg.vision import concept, superpixels
from rayseg.vision.coarse_masks import Objects, coarse_mask
from rayseg.vision.crops import middle
from rayseg.vision.fill import filled


@dataclass
class ReadChip:
    """`listed -> image, valid`: the middle of the chip, (size, size, 3) uint8 RGB, and where it has data.

    Elsewhere the image is mirrored, as in training.
    """

    size: int

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Read each chip."""
        pairs = [read_chip(Chip.from_row(row.listed), self.size) for row in rows]
        return [
            replace(row, image=filled(image_HWC, valid_HW), valid=valid_HW)
            for row, (image_HWC, valid_HW) in zip(rows, pairs, strict=True)
        ]


@dataclass
class Superpixels:
    """`image -> superpixels`: Felzenszwalb's, (size, size) int32, computed at 1 / `reduce` of the resolution.

    Args:
        reduce: side in px of the squares that are averaged first.
        min_size: least pixels of a superpixel, at the lower resolution.
    """

    _: KW_ONLY
    reduce: int = 1
    min_size: int = 64

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Divide each chip."""
        divided = []
        for row in rows:
            height, width = row.image.shape[:2]
            small = np.rint(downscale_local_mean(row.image, (self.reduce, self.reduce, 1))).astype(np.uint8)
            labels_HW = superpixels.felzenszwalb(small, min_size=self.min_size)
            labels_HW = labels_HW.repeat(self.reduce, axis=0).repeat(self.reduce, axis=1)[:height, :width]
            divided.append(replace(row, superpixels=labels_HW))
        return divided


@dataclass
class WriteDensity:
    """`image, superpixels, cam, certainty -> facts`: write the chip's density over chroma, `<prefix>/<id>.npy`.

    A superpixel's weight is its area times (its mean CAM + the chip's): a low CAM reduces the weight, but not to zero.
    """

    prefix: str

    def __call__(self, rows: list[ChipRow]) -> list[Settled]:
        """Write each chip's density."""
        for row in rows:
            ab_N2, areas_N = concept.chroma(row.image, row.superpixels)
            cams_N = np.bincount(row.superpixels.ravel(), weights=row.cam.ravel()) / np.maximum(areas_N, 1)
            plane = concept.density(ab_N2, areas_N * (cams_N + row.cam.mean() + 1e-6))
            write_array(density_path(self.prefix, row.id), plane)
        return [Settled(facts={"certainty": row.certainty}) for row in rows]


@dataclass
class CamCue:
    """`cam, objects -> mask`: objects whose mean CAM is above Otsu's threshold (the paper's cue).

    Args:
        objects: whether an object is all pixels of a label or a connected component of it.
    """

    _: KW_ONLY
    objects: Objects

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Decide each chip."""
        return [replace(row, mask=coarse_mask(row.cam, row.objects, objects=self.objects)) for row in rows]


@dataclass
class ConceptCue:
    """`image, superpixels -> mask`: superpixels whose chroma belongs to the concept; 255 where the evidence is weak.

    Args:
        evidence_AB: of `concept.evidence`.
        doubtful: evidence above which a superpixel outside the concept is left open.
    """

    evidence_AB: np.ndarray
    _: KW_ONLY
    doubtful: float

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Decide each chip."""
        decided = []
        for row in rows:
            ab_N2, _ = concept.chroma(row.image, row.superpixels)
            mask_HW = concept.concept_mask(row.superpixels, ab_N2, self.evidence_AB, doubtful=self.doubtful)
            decided.append(replace(row, mask=mask_HW))
        return decided


@dataclass
class WriteCue:
    """`listed, mask, cam, certainty, valid -> facts`: write the coarse mask and the CAM on the chip's grid.

    Bands of `<prefix>/<id>.tif` (GeoTIFF), uint8: mask (0, 1; 255 open or no data), cam (0..1 x 254).
    """

    prefix: str

    def __call__(self, rows: list[ChipRow]) -> list[Settled]:
        """Write each chip's cue."""
        settled = []
        for row in rows:
            mask_HW = np.where(row.valid, row.mask, NODATA).astype(np.uint8)
            bands_CHW = np.stack([mask_HW, np.rint(row.cam * 254).astype(np.uint8)])
            chip = Chip.from_row(row.listed)
            [(grid, _)] = grids_of([chip.source])
            window = middle(chip.window, len(mask_HW))
            cog.write_image(cue_path(self.prefix, row.id), bands_CHW, grid, window, bands=("mask", "cam"))
            settled.append(Settled(facts={"certainty": row.certainty, "share": float((mask_HW == 1).mean())}))
        return settled


def cue_path(prefix: str, chip_id: str) -> UPath:
    """The file in which `WriteCue` keeps the cue of a chip."""
    return upath(prefix) / f"{slug(chip_id)}.tif"


def density_path(prefix: str, chip_id: str) -> UPath:
    """The file in which `WriteDensity` keeps the density of a chip."""
    return upath(prefix) / f"{slug(chip_id)}.npy"
