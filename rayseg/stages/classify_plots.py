"""Plots through their classifier, some at a time."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from rayseg.engine.manifest import write_rows
from rayseg.errors import DataError, ModelError
from rayseg.geo.grid import Grid, Window
from rayseg.io import plot_joins, rasters
from rayseg.io.sources import Source, from_json
from rayseg.models import bundle
from rayseg.stages.to_rgb import ImageConfig, eight_bit
from rayseg.store import upath
from rayseg.vision.crops import square_crop

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]


class CutPlots:
    """`plots, numbers, grid, sources -> crops, numbers`: plots on black, (plots, size, size, 3) uint8, across tiles.

    `numbers` are those of the plots that could be read; `unread` says of the others why, if there are any.

    Args:
        image: what the imagery is.
        size: side of a crop in px.
    """

    def __init__(self, image: ImageConfig, *, size: int) -> None:
        self.image, self.size = image, size

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Cut each group of plots."""
        return [row | self._cut(row) for row in rows]

    def _cut(self, row: Row) -> Row:
        grid, sources = Grid.from_row(json.loads(row["grid"])), from_json(row["sources"])
        crops: dict[int, np.ndarray] = {}
        unread: dict[int, DataError] = {}
        for number, geometry in zip(row["numbers"], shapely.from_wkb(np.array(row["plots"], object)), strict=True):
            try:
                crops[number] = self._crop(geometry, sources, grid)
            except DataError as error:
                unread[number] = error
        if not crops:
            raise next(iter(unread.values()))
        told = f"{len(unread)} plots, the first because: {next(iter(unread.values()))}" if unread else ""
        return {"crops": np.stack(list(crops.values())), "numbers": list(crops), "unread": told}

    def _crop(self, geometry: BaseGeometry, sources: Sequence[Source], grid: Grid) -> np.ndarray:
        left, top, right, bottom = (round(value) for value in geometry.bounds)
        window = Window(left, top, right - left, bottom - top)
        image_CHW, _ = rasters.read(sources, grid, window, bands=self.image.bands)
        image_HWC = eight_bit(image_CHW, self.image)
        return square_crop(image_HWC, plot_joins.mask_of(geometry, window), size=self.size)


class ClassifyPlots:
    """`crops, numbers -> classes`: rows of number, class (value) and score, the class's probability.

    Args:
        prefix: of the classifier's bundle.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    @cached_property
    def _loaded(self) -> "tuple[bundle.Bundle, torch.nn.Module, str]":
        import torch

        described, model = bundle.build(self.prefix)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return described, model.to(device), device

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Classify each group of plots."""
        import torch

        from rayseg.models.cpu import threads

        with threads(), torch.inference_mode():
            return [
                {key: row[key] for key in ("id", "seconds", "unread")} | {"classes": self._classes(row)} for row in rows
            ]

    def _classes(self, row: Row) -> list[Row]:
        import torch

        from rayseg.models.classifier import class_probabilities

        described, model, device = self._loaded
        found = []
        for start in range(0, len(row["crops"]), 16):
            images = described.normalize(row["crops"][start : start + 16].transpose(0, 3, 1, 2))
            p_NK = class_probabilities(model(torch.from_numpy(images).to(device)).float()).cpu()
            best = p_NK.max(dim=1)
            for k, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start):
                found.append({"number": row["numbers"][k], "class": described.classes[at][0], "score": score})
        return found


class WriteClasses:
    """`classes, unread -> facts`: kept as `<prefix>/<group>.classes.parquet`; with `unread` the group has failed."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Write each group."""
        return [self._write(row) for row in rows]

    def _write(self, row: Row) -> Row:
        write_rows(upath(self.prefix) / f"{row['id']}.classes.parquet", row["classes"])
        kept = {"id": row["id"], "seconds": row["seconds"], "facts": {"plots": len(row["classes"])}}
        return kept | {"status": "failed", "reason": f"CutPlots, {row['unread']}"} if row["unread"] else kept


def check_classifier(described: bundle.Bundle) -> None:
    """Refuse a model that cannot tell plots apart.

    Raises:
        ModelError: it is no classifier of RGB uint8 images, or one of its class values is 0, the background's.
    """
    values = [value for value, _, _ in described.classes]
    found = (described.task, len(described.bands), described.dtype)
    if found != ("classification", 3, "uint8") or min(values) < 1:
        raise ModelError(
            f"model {described.name} is for {described.task} of {len(described.bands)} bands of {described.dtype} into "
            f"the values {values}, plots need classification of 3 bands of uint8 into values above 0; give such a one"
        )
