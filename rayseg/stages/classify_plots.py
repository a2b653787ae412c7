"""Plots through their classifier, a group of plots at a time."""

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import shapely

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row, write_rows
from rayseg.errors import DataError, ModelError
from rayseg.geo.grid import Window
from rayseg.io import plot_joins, rasters
from rayseg.io.sources import from_json
from rayseg.models import bundle
from rayseg.stages.rows import ABSENT, PlotsRow
from rayseg.stages.to_rgb import ImageConfig, eight_bit
from rayseg.store import upath
from rayseg.vision.crops import square_crop

if TYPE_CHECKING:
    import torch


@dataclass
class CutPlots:
    """`plots, numbers, grid, sources -> crops, numbers, unread`: plots on black, (plots, size, size, 3) uint8.

    A crop may cross tile borders. `numbers` are those of the plots that can be read.

    Args:
        image: bands and values of the imagery.
        size: side of a crop in px.
    """

    image: ImageConfig
    _: KW_ONLY
    size: int

    def __call__(self, rows: list[PlotsRow]) -> list[PlotsRow]:
        """Cut each group of plots."""
        return [self._cut(row) for row in rows]

    def _cut(self, row: PlotsRow) -> PlotsRow:
        sources = from_json(row.sources_json)
        crops: dict[int, np.ndarray] = {}
        errors: list[DataError] = []
        for number, geometry in zip(row.numbers, shapely.from_wkb(np.array(row.plots, object)), strict=True):
            left, top, right, bottom = (round(value) for value in geometry.bounds)
            # A plot may lie in several tiles, so its pixels come from the imagery, not from a tile.
            window = Window(left, top, right - left, bottom - top)
            try:
                image_CHW, _ = rasters.read(sources, row.grid, window, bands=self.image.bands)
                mask_HW = plot_joins.mask_of(geometry, window)
                crops[number] = square_crop(eight_bit(image_CHW, self.image), mask_HW, size=self.size)
            except DataError as error:
                errors.append(error)
        if not crops:
            raise errors[0]
        unread = f"{len(errors)} plots, the first because: {errors[0]}" if errors else ""
        return replace(row, crops=np.stack(list(crops.values())), numbers=tuple(crops), plots=(), unread=unread)


@dataclass
class ClassifyPlots:
    """`crops, numbers -> classes`: rows of number, class (value) and score, the class's probability.

    Args:
        prefix: of the classifier's bundle.
    """

    prefix: str

    @cached_property
    def _loaded(self) -> "tuple[bundle.Bundle, torch.nn.Module, str]":
        import torch

        described, model = bundle.build(self.prefix)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return described, model.to(device), device

    def __call__(self, rows: list[PlotsRow]) -> list[PlotsRow]:
        """Classify each group of plots."""
        import torch

        from rayseg.models.cpu import threads

        with threads(), torch.inference_mode():
            return [replace(row, crops=ABSENT, classes=self._classes(row)) for row in rows]

    def _classes(self, row: PlotsRow) -> tuple[Row, ...]:
        import torch

        from rayseg.models.classifier import class_probabilities

        described, model, device = self._loaded
        rows = []
        # 16 crops at a time, whatever the size of the group.
        for start in range(0, len(row.crops), 16):
            images = described.normalize(row.crops[start : start + 16].transpose(0, 3, 1, 2))
            p_NK = class_probabilities(model(torch.from_numpy(images).to(device)).float()).cpu()
            best = p_NK.max(dim=1)
            for k, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start):
                rows.append({"number": row.numbers[k], "class": described.classes[at][0], "score": score})
        return tuple(rows)


@dataclass
class WriteClasses:
    """`classes, unread -> facts`: write `<prefix>/<group>.classes.parquet`; a group with unread plots fails."""

    prefix: str

    def __call__(self, rows: list[PlotsRow]) -> list[Settled]:
        """Write each group."""
        settled = []
        for row in rows:
            write_rows(upath(self.prefix) / f"{row.id}.classes.parquet", row.classes)
            facts = {"plots": len(row.classes)}
            failed = Settled("failed", f"CutPlots, {row.unread}", facts)
            settled.append(failed if row.unread else Settled(facts=facts))
        return settled


def check_classifier(described: bundle.Bundle) -> None:
    """Refuse a model that cannot classify plots.

    Raises:
        ModelError: it is not a classifier of RGB uint8 images, or one of its class values is 0, the background's.
    """
    values = [value for value, _, _ in described.classes]
    kind = (described.task, len(described.bands), described.dtype)
    if kind != ("classification", 3, "uint8") or min(values) < 1:
        raise ModelError(
            f"model {described.name} is for {described.task} of {len(described.bands)} bands of {described.dtype} into "
            f"the values {values}, plots need classification of 3 bands of uint8 into values above 0; choose another "
            "classifier"
        )
