"""Images, tiles and polygons through a classifier, each as a whole."""

from dataclasses import dataclass, replace

import numpy as np
import shapely

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError, ModelError
from rayseg.geo.grid import Tile, Window
from rayseg.io import plot_joins, rasters
from rayseg.io.pictures import encoded
from rayseg.io.sources import from_json
from rayseg.models.bundle import Bundle
from rayseg.stages.rows import ChipRow
from rayseg.stages.score import Score
from rayseg.store import put, upath
from rayseg.vision.crops import middle, square_crop
from rayseg.vision.fill import mirrored


@dataclass
class ReadUnit:
    """`listed -> image`: the centre of an image or tile, or a polygon on black, (size, size, bands).

    Where there is no imagery, the image is the mirror of what is there; without any it is settled as nodata.

    Args:
        bands: of the model, in its order.
        size: side of the model's input in px.
        cut: whether a polygon is cut out and resized, as crops of plots are; else its centre is seen as it is.
    """

    bands: tuple[str, ...]
    size: int
    cut: bool

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow | Settled]:
        """Read each unit."""
        return [self._read(row) for row in rows]

    def _read(self, row: ChipRow) -> ChipRow | Settled:
        listed = row.listed
        if listed["refused"]:
            raise DataError(listed["refused"])
        tile, sources, outline = Tile.from_row(listed), from_json(listed["sources"]), str(listed.get("polygon") or "")
        cut = bool(outline) and self.cut
        # A polygon is cut out whole and scaled; of a square chip the middle is as large as the training windows.
        window = tile.window if cut else middle(tile.window, self.size)
        image_CHW, valid_HW = rasters.read(sources, tile.grid, window, bands=self.bands)
        if not valid_HW.any():
            return Settled("nodata")
        image_HWC = np.ascontiguousarray(mirrored(image_CHW, valid_HW).transpose(1, 2, 0))
        if cut:
            mask_HW = plot_joins.mask_of(shapely.from_wkb(bytes.fromhex(outline)), window)
            if not mask_HW.any():
                raise DataError(f"polygon {tile.id} holds no pixel's centre, expected one or more; leave it out")
            image_HWC = square_crop(image_HWC, mask_HW, size=self.size)
        return replace(row, image=image_HWC)


@dataclass
class Classify(Score):
    """`id, image -> facts`: `p`, the probability of each class, and `class`, the value of the most probable one.

    Args:
        prefix: of the classifier's bundle.
        features: None.
        pictures: folder of `<id>.webp`, Grad-CAM++ of the most probable class over the image; None writes none.
    """

    pictures: str | None = None

    def __call__(self, rows: list[ChipRow]) -> list[Settled]:
        """Classify the batch in one pass."""
        settled = []
        for row, scored in zip(rows, super().__call__(rows), strict=True):
            p_K = by_class(self._loaded[0], scored.facts["p"])
            best = int(np.argmax(p_K))
            if self.pictures is not None:
                put(upath(self.pictures) / f"{row.id}.webp", encoded(self.explained(row.image, best), "webp"))
            settled.append(Settled(facts={"p": p_K, "class": self._loaded[0].classes[best][0]}))
        return settled

    def single(
        self, image_CHW: np.ndarray, valid_HW: np.ndarray, *, explain: bool
    ) -> tuple[list[float], np.ndarray | None]:
        """(probability of each class, Grad-CAM++ of the most probable one if requested) of the centre of an image.

        Raises:
            DataError: the centre has no valid pixel.
            ModelError: see `expect_explainable`.
        """
        described = self.bundle
        whole = Window(0, 0, image_CHW.shape[2], image_CHW.shape[1])
        window = middle(whole, described.patch)
        # A small image is filled up with its mirror, as a chip is.
        inside = window.intersect(whole)
        centre_CHW = np.zeros((len(image_CHW), window.height, window.width), image_CHW.dtype)
        seen_HW = np.zeros((window.height, window.width), bool)
        centre_CHW[:, *inside.slices(window)] = image_CHW[:, *inside.slices(whole)]
        seen_HW[inside.slices(window)] = valid_HW[inside.slices(whole)]
        if not seen_HW.any():
            raise DataError("the image's centre has no valid pixel, expected some to classify; send another image")
        image_HWC = np.ascontiguousarray(mirrored(centre_CHW, seen_HW).transpose(1, 2, 0))
        [settled] = self([ChipRow("image", {}, image_HWC)])
        p_K: list[float] = settled.facts["p"]
        return p_K, self.explained(image_HWC, int(np.argmax(p_K))) if explain else None

    def explained(self, image_HWC: np.ndarray, position: int) -> np.ndarray:
        """Grad-CAM++ of the class at `position` over the image's first three bands, (height, width, 3) uint8.

        Raises:
            ModelError: see `expect_explainable`.
        """
        import matplotlib
        import torch

        from rayseg.models.cam import gradcam_plusplus

        described, model = self._loaded
        expect_explainable(described)
        normal = torch.from_numpy(described.normalize(image_HWC.transpose(2, 0, 1))[None])
        # A model of one logit has one map, for either class.
        target = min(position, described.outputs - 1)
        [cam_HW], _ = gradcam_plusplus(model, normal, target_class=target)
        heat_HWC = matplotlib.colormaps["inferno"](cam_HW)[..., :3] * 255
        shown_HWC: np.ndarray = ((image_HWC[..., :3] + heat_HWC) / 2).astype(np.uint8)
        return shown_HWC


def expect_explainable(described: Bundle) -> None:
    """Refuse a classifier whose architecture has no place for Grad-CAM++, which is that of `network: chips`.

    Raises:
        ModelError: it has none.
    """
    if described.architecture.factory != "classifier":
        raise ModelError(
            f"model {described.name} is of the kind {described.architecture.factory}, Grad-CAM++ needs a classifier of "
            "network: chips; leave pictures out"
        )


def by_class(described: Bundle, p: list[float]) -> list[float]:
    """The probability of each class; a model of one logit gives that of its positive class alone."""
    if len(p) == len(described.classes):
        return p
    positive = int(described.provenance.config.get("positive") or 0)
    return [p[0] if at == positive else 1 - p[0] for at in range(len(described.classes))]
