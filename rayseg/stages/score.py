"""A classifier's probabilities and features of chips that have no label."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from upath import UPath

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row
from rayseg.geo.grid import Window
from rayseg.io.tables import write_array
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.stages.rows import ChipRow
from rayseg.store import upath
from rayseg.vision.crops import middle

if TYPE_CHECKING:
    import torch


@dataclass
class ReadWith:
    """`listed -> image`: the chip, (height, width, 3) uint8 RGB, by a function of its row."""

    read: Callable[[Row], np.ndarray]

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Read each chip."""
        return [replace(row, image=self.read(row.listed)) for row in rows]


@dataclass
class Score:
    """`id, image -> facts`: class probabilities (`p`) of the middle of each chip, as large as the training windows.

    Args:
        prefix: of the classifier's bundle.
        features: folder of the inputs of its last layer, `<features>/<id>.npy` float32; None writes none.
    """

    prefix: str
    features: str | None = None

    @property
    def bundle(self) -> Bundle:
        """The model's description."""
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> "tuple[Bundle, torch.nn.Module]":
        import torch

        described, model = bundle.build(self.prefix)
        return described, model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, rows: list[ChipRow]) -> list[Settled]:
        """Score the batch in one pass."""
        import torch

        from rayseg.models.classifier import class_probabilities

        described, model = self._loaded
        # The middle of each chip has the size that the classifier was trained with.
        wholes = [Window(0, 0, row.image.shape[1], row.image.shape[0]) for row in rows]
        cuts = [middle(whole, described.patch).slices(whole) for whole in wholes]
        images = [row.image[cut].transpose(2, 0, 1) for row, cut in zip(rows, cuts, strict=True)]
        device = next(model.parameters()).device
        batch = torch.from_numpy(np.stack([described.normalize(image) for image in images])).to(device)
        with torch.inference_mode():
            features_NF = None
            # Features come with the logits in one pass; strategies without them save the memory.
            if self.features is None:
                logits = model(batch)
            else:
                logits, features_NF = model.embed(batch)  # type: ignore[operator]
            p_NK = class_probabilities(logits.double()).cpu().numpy()
        if self.features is not None and features_NF is not None:
            for row, feature_F in zip(rows, features_NF.cpu().numpy(), strict=True):
                write_array(features_path(self.features, row.id), feature_F)
        return [Settled(facts={"p": p_K.tolist()}) for p_K in p_NK]


def features_path(prefix: str, chip: str) -> UPath:
    """The file of a chip's features."""
    return upath(prefix) / f"{chip}.npy"
