"""Segmentation without training data: Segment Anything's masks, and labels of a network trained on the image itself.

This module imports PyTorch: only processes that run models import it, never the API's.
"""

from typing import Any

import numpy as np
import torch

from rayseg.errors import DataError
from rayseg.io.untrusted import ImageTooLarge
from rayseg.models import bundle
from rayseg.models.sam import SamConfig, SamProposer
from rayseg.models.sam_bundle import prompted
from rayseg.models.unsupervised import segment
from rayseg.serve.answers import NODATA
from rayseg.serve.uploads import Image
from rayseg.vision.fill import filled
from rayseg.vision.superpixels import halved

_MIN_SIDE, _MULTIPLE = 16, 4  # px; deepnet halves an image twice
_MAX_TRAINED = 1 << 20  # px


def load(prefix: str) -> SamProposer:
    """The Segment Anything model of a bundle, on the GPU if there is one."""
    described, model = bundle.build(prefix)
    variant: Any = described.architecture.options["variant"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SamProposer(model.to(device), SamConfig(variant=variant, checkpoint="random"))


def masks(model: SamProposer, image: Image, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Masks of a Segment Anything model: runs, predicted IoU and stability of each.

    Args:
        model: from `load`.
        image: red, green and blue, uint8.
        options: from `forms.prompts` or `forms.automatic`.
    """
    # SAM takes channels last.
    image_HWC = np.ascontiguousarray(image.image_CHW.transpose(1, 2, 0))
    if "boxes" in options:
        proposals = prompted(model.sam, image_HWC, **options)
    else:
        proposals = SamProposer(model.sam, model.config.model_copy(update=options))(image_HWC, image.valid_HW)
    return [
        {"runs": runs, "iou": float(iou), "stability": float(stability)}
        for runs, iou, stability in zip(proposals.masks, proposals.iou_N, proposals.stability_N, strict=True)
        if len(runs)
    ]


def labels(image: Image, options: dict[str, Any]) -> np.ndarray:
    """Labels (height, width) uint8 of an image by a network trained on it, 255 where not valid.

    Invalid pixels are filled with the mirror image of valid ones, without vote or target, as in `superpixel`.

    Raises:
        DataError: the image is too small for the network's layers, or has no valid pixel.
        ImageTooLarge: training on that many pixels takes too much memory for a server.
    """
    height, width = image.valid_HW.shape
    if min(height, width) < _MIN_SIDE:
        raise DataError(f"the image has {width} x {height} px, labels need {_MIN_SIDE} on each side; send a larger one")
    if height * width > _MAX_TRAINED:
        raise ImageTooLarge(
            f"the image has {width} x {height} px, labels are limited to {_MAX_TRAINED:,} px; send a part of it"
        )
    # 1. sides that the network's halvings divide
    margin = ((0, -height % _MULTIPLE), (0, -width % _MULTIPLE))
    valid_HW = np.pad(image.valid_HW, margin)
    # 2. invalid pixels: mirrored for the network's view, without superpixel and so without vote and target
    image_HWC = filled(np.pad(image.image_CHW.transpose(1, 2, 0), (*margin, (0, 0))), valid_HW)
    superpixels_HW = np.where(valid_HW, 0 if options["network"] == "v2" else halved(image_HWC), -1)
    # 3. labels, without the margin
    labels_HW = segment(image_HWC, superpixels_HW, **options)[:height, :width]
    return np.where(image.valid_HW, labels_HW, NODATA).astype(np.uint8)
