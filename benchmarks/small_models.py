"""Bundles of untrained segmenters that the benchmarks predict with."""

from pathlib import Path

import numpy as np

MEAN, STD = 120.0, 50.0


def save_segmenter(
    prefix: Path, image_CHW: np.ndarray | None, *, patch: int, stride: int, encoder: str, architecture: str = "unet"
) -> None:
    """Save a bundle of an untrained network; with an image, its last layer is scaled so that it marks about half."""
    import torch

    from rayseg.models import bundle
    from rayseg.models.bundle import Architecture, Bundle, Scaling
    from rayseg.models.segmenter import build_segmenter

    torch.manual_seed(7)
    options = {"architecture": architecture, "encoder": encoder, "classes": 1, "channels": 3}
    model = build_segmenter(**options, weights="none").eval()
    if image_CHW is not None:
        head = model.get_submodule("segmentation_head")[0]
        with torch.inference_mode():
            logits = model((torch.from_numpy(image_CHW[None].copy()).float() - MEAN) / STD)
            head.weight /= logits.std()
            head.bias.copy_((head.bias - logits.median()) / logits.std())
    described = Bundle(
        name=prefix.name,
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=options),
        classes=((0, "background", (0, 0, 0)), (1, "found", (0, 158, 115))),
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=Scaling(mean=(MEAN,) * 3, std=(STD,) * 3),
        patch=patch,
        stride=stride,
    )
    bundle.save(prefix, described, model)
