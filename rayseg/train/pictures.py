"""Pictures of a few samples for TensorBoard: image, mask and prediction."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayseg.models.bundle import Scaling
from rayseg.models.losses import IGNORE
from rayseg.train.batches import whole_units
from rayseg.vision.color import RGB, label_table

Picture = NDArray[np.uint8]
"""(height, width, 3)."""
Pictures = Callable[[nn.Module], Mapping[str, Picture]]
"""A network in evaluation mode -> pictures by name."""
Sample = tuple[str, NDArray[np.generic], NDArray[np.uint8] | None]
"""Name, image_CHW in stored values, its classes_HW with 255 where not labelled, if it has any."""
MOST = 4
"""Samples of a training, at most."""
_BAR = 8  # px below the image of a chip


def of_segments(
    samples: Callable[[], Iterable[Sample]], scaling: Scaling, *, unit: int, colors: tuple[RGB, ...] = ()
) -> Pictures:
    """Pictures of a segmenter: image, mask and map side by side.

    Args:
        samples: returns them; the first few are shown.
        scaling: from stored values to the network's input.
        unit: px whose multiples the network takes; images are padded to them.
        colors: of the classes; by default those of unnamed labels.
    """
    return partial(_segments, samples, scaling, unit, colors)


@torch.no_grad()
def _segments(
    samples: Callable[[], Iterable[Sample]], scaling: Scaling, unit: int, colors: tuple[RGB, ...], net: nn.Module
) -> dict[str, Picture]:
    device, pictures = next(net.parameters()).device, {}
    for name, image_CHW, classes_HW in islice(samples(), MOST):
        images = scaling.normalize(torch.from_numpy(np.ascontiguousarray(image_CHW))[None].to(device))
        height, width = images.shape[2:]
        logits = net(whole_units(images, unit))[0, :, :height, :width].float()
        found_HW = (logits[0] > 0) if len(logits) == 1 else logits.argmax(dim=0)
        palette_K3 = np.array(colors or label_table(max(len(logits), 2)).colors, np.uint8)
        parts = [visible(image_CHW), _painted(found_HW.cpu().numpy().astype(np.uint8), palette_K3)]
        parts[1:1] = [] if classes_HW is None else [_painted(classes_HW, palette_K3)]
        pictures[name] = np.concatenate(parts, axis=1)
    return pictures


def of_classes(samples: Callable[[], Iterable[tuple[str, NDArray[np.generic], Tensor, int]]]) -> Pictures:
    """Pictures of a classifier: the chip, and below it a bar as long as its label's probability.

    Args:
        samples: returns name, image_CHW in stored values, the network's input (1, C, H, W) and the label of chips.
    """
    return partial(_classes, samples)


@torch.no_grad()
def _classes(
    samples: Callable[[], Iterable[tuple[str, NDArray[np.generic], Tensor, int]]], net: nn.Module
) -> dict[str, Picture]:
    pictures = {}
    for name, image_CHW, seen, label in islice(samples(), MOST):
        logits = net(seen)[0].float()
        p = float(logits.softmax(dim=0)[label]) if len(logits) > 1 else float(logits.sigmoid()[0])
        image_HWC = visible(image_CHW)
        bar_HWC = np.full((_BAR, image_HWC.shape[1], 3), 60, np.uint8)
        bar_HWC[:, : round(p * image_HWC.shape[1])] = (0, 158, 115)
        pictures[name] = np.concatenate([image_HWC, bar_HWC])
    return pictures


def visible(image_CHW: NDArray[np.generic]) -> Picture:
    """The first three bands (or the first one, grey) as they are if uint8, else stretched over their own range."""
    bands_HWC = np.asarray(image_CHW, np.float32)[[0, 1, 2] if len(image_CHW) > 2 else [0, 0, 0]].transpose(1, 2, 0)
    if image_CHW.dtype != np.uint8:
        low, high = float(bands_HWC.min()), float(bands_HWC.max())
        bands_HWC = (bands_HWC - low) / max(high - low, 1e-9) * 255
    return bands_HWC.astype(np.uint8)


def _painted(classes_HW: NDArray[np.uint8], palette_K3: NDArray[np.uint8]) -> Picture:
    """Classes in their colours, grey where not labelled."""
    painted = np.full((*classes_HW.shape, 3), 128, np.uint8)
    known_HW = classes_HW != IGNORE
    painted[known_HW] = palette_K3[classes_HW[known_HW] % len(palette_K3)]
    return painted
