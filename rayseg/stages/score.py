"""What a classifier says of chips that have no label."""

import io
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from upath import UPath

from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.store import put, upath

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]


class ReadWith:
    """`<chip> -> image`: the chip, (height, width, 3) uint8 RGB, by a reader of rows."""

    def __init__(self, read: Callable[[Row], np.ndarray]) -> None:
        self.read = read

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Read each chip."""
        return [row | {"image": self.read(row)} for row in rows]


class Score:
    """`image -> facts`: class probabilities (`p`) of the middle of each chip, of the size the classifier learnt on.

    Args:
        prefix: of the classifier's bundle.
        features: where the input of its last layer goes, `<features>/<id>.npy` float32; None keeps none.
    """

    def __init__(self, prefix: str, features: str | None) -> None:
        self.prefix, self.features = prefix, features

    @cached_property
    def _loaded(self) -> "tuple[Bundle, torch.nn.Module]":
        import torch

        described, model = bundle.build(self.prefix)
        return described, model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Score the batch in one pass."""
        import torch

        from rayseg.models.classifier import class_probabilities

        described, model = self._loaded
        images = [_middle(row["image"], described.patch).transpose(2, 0, 1) for row in rows]
        device = next(model.parameters()).device
        seen = torch.from_numpy(np.stack([described.normalize(image) for image in images])).to(device)
        with torch.inference_mode():
            logits, features = model.embed(seen)  # type: ignore[operator]
            p_NK = class_probabilities(logits.double()).cpu().numpy()
        for row, feature in zip(rows, features.cpu().numpy(), strict=True):
            self._keep(row["id"], feature)
        return [
            {"id": row["id"], "seconds": row["seconds"], "facts": {"p": p.tolist()}}
            for row, p in zip(rows, p_NK, strict=True)
        ]

    def _keep(self, chip: str, feature_F: np.ndarray) -> None:
        if self.features is not None:
            content = io.BytesIO()
            np.save(content, feature_F)
            put(features_path(self.features, chip), content.getvalue())


def features_path(prefix: str, chip: str) -> UPath:
    """Where the features of a chip are kept."""
    return upath(prefix) / f"{chip}.npy"


def _middle(image_HWC: np.ndarray, size: int) -> np.ndarray:
    top, left = ((whole - size) // 2 for whole in image_HWC.shape[:2])
    return image_HWC[top : top + size, left : left + size]
