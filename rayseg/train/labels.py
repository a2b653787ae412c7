"""Labels of pixels in training: coarse masks, the network's own, and losses that ignore unknown pixels."""

import zlib
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayseg.config import Config
from rayseg.errors import DataError
from rayseg.models import losses
from rayseg.train.batches import Chips, Indices, Kept, whole_units

Mask = NDArray[np.uint8]
Loss = Callable[[Tensor, Tensor], Tensor]

UNKNOWN = 255


class Labelling(Config):
    """How a network's probabilities become labels."""

    above: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability above which a pixel is of the class."""
    below: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability up to which it is not; between the two it is unknown."""
    keep_cues: bool = False
    """A pixel of the coarse mask keeps the class while its probability is above `below`."""
    flip: bool = False
    """Average the probabilities of a chip and of its mirror image."""

    @model_validator(mode="after")
    def _ordered(self) -> "Labelling":
        if self.below > self.above:
            raise ValueError(f"below {self.below} exceeds above {self.above}; lower it")
        return self


def labelled(probabilities_N1HW: Tensor, coarse_N1HW: Tensor, settings: Labelling) -> Tensor:
    """Labels (N, 1, H, W) uint8: 1 = the class, 0 = not, 255 = unknown."""
    labels = torch.full_like(coarse_N1HW, UNKNOWN)
    labels[probabilities_N1HW <= settings.below] = 0
    labels[probabilities_N1HW > settings.above] = 1
    if settings.keep_cues:
        labels[(coarse_N1HW == 1) & (probabilities_N1HW > settings.below)] = 1
    return labels


def probabilities(model: nn.Module, images_NCHW: Tensor, *, unit: int, flip: bool) -> Tensor:
    """Probabilities (N, 1, H, W) float32 on images of any size, padded to multiples of `unit` px."""
    height, width = images_NCHW.shape[2:]
    whole = whole_units(images_NCHW, unit)
    p: Tensor = model(whole).float().sigmoid()
    if flip:
        p = (p + model(whole.flip(3)).float().sigmoid().flip(3)) / 2
    return p[..., :height, :width]


class Masks:
    """position -> targets of a chip, (M, height, width) uint8: the coarse mask, then the network's labels, if any.

    Both are empty for negative chips.
    """

    def __init__(self, chips: Chips, positive: int, *, kept: int) -> None:
        assert chips.read_mask is not None
        self._chips = chips
        self._positive = positive
        self._read = Kept(chips.read_mask, limit=kept)
        self._shape: tuple[int, ...] = chips.read(0).shape[:2]
        self._own: dict[int, bytes] = {}

    @property
    def relabelled(self) -> bool:
        """Whether a network has labelled any chip."""
        return bool(self._own)

    def __call__(self, position: int) -> Mask:
        """The masks of a chip."""
        coarse = self.coarse(position)
        if not self._own:
            return coarse[None]
        own = self._own.get(position)
        return np.stack([coarse, np.frombuffer(zlib.decompress(own), np.uint8).reshape(self._shape) if own else coarse])

    def coarse(self, position: int) -> Mask:
        """The coarse mask of a chip.

        Raises:
            DataError: its size differs from the chip's, or a value is not 0, 1 or 255.
        """
        if self._chips.labels[position] != self._positive:
            return np.zeros(self._shape, np.uint8)
        mask: Mask = self._read(position)
        values = set(np.unique(mask).tolist())
        if mask.shape != self._shape or not values <= {0, 1, UNKNOWN}:
            raise DataError(
                f"mask of chip {self._chips.ids[position]} is {mask.shape} with values {sorted(values)[:5]}, "
                f"expected {self._shape} with 0, 1 and 255 only; create it again"
            )
        return mask

    def relabel(self, chips: Indices, labels_N1HW: Tensor) -> None:
        """Store a network's labels of some chips."""
        for position, label in zip(chips, labels_N1HW.cpu().numpy(), strict=True):
            self._own[int(position)] = zlib.compress(label.tobytes(), 1)


def _known(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with 0 for unknown pixels, and the pixels' weights: 1 if known, else 0."""
    weight = (mask != UNKNOWN).float()
    return mask * weight, weight


def _bce_iou(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy and IoU, the latter only of images with the class: of an empty mask the IoU is always 0."""
    known, weight = _known(mask)
    filled = known.amax(dim=(1, 2, 3)) > 0
    missed = 1 - losses.soft_iou(logits.sigmoid(), known, weight)
    return losses.bce(logits, known, weight).mean() + (missed * filled).sum() / filled.sum().clamp(min=1)


LOSSES: dict[str, Loss] = {
    "bce_ssim_iou": lambda logits, mask: losses.bce_ssim_iou(logits, *_known(mask)),
    "bce_iou": _bce_iou,
    "bce": lambda logits, mask: losses.bce(logits, *_known(mask)).mean(),
}
"""name -> loss of logits (N, 1, H, W) float32 against masks of 0, 1 and 255 = ignored."""
