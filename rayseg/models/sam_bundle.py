"""Segment Anything as a bundle for serving, and its masks for points and boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils import amg

from rayseg.models.bundle import Architecture, Bundle, Scaling, save
from rayseg.models.sam import SamConfig, Variant, load_sam
from rayseg.store import StorePath
from rayseg.vision import rle
from rayseg.vision.proposals import Image, Proposals


def build_sam(variant: Variant, *, weights: str = "none") -> Sam:
    """The network of a bundle of Segment Anything, without its weights."""
    assert weights == "none"
    model: Sam = sam_model_registry[variant]()
    return model


def save_sam(config: SamConfig, prefix: StorePath) -> Bundle:
    """Write a checkpoint of segment-anything as a bundle, for serving.

    Raises:
        ModelError: see `load_sam`.
    """
    model = load_sam(config, device="cpu").sam
    # SAM normalises in its own preprocessing; the bundle states the same values.
    mean, std = (tuple(float(value) for value in part.flatten()) for part in (model.pixel_mean, model.pixel_std))
    side = int(model.image_encoder.img_size)
    described = Bundle(
        name=f"sam-{config.variant.replace('_', '-')}",
        task="instances",
        architecture=Architecture(factory="sam", options={"variant": config.variant}),
        classes=((0, "none", (0, 0, 0)), (1, "thing", (0, 158, 115))),
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=Scaling(mean=mean, std=std),
        patch=side,
        stride=side,
    )
    return save(prefix, described, model)


@torch.inference_mode()
def prompted(
    sam: Sam,
    image_HWC: Image,
    *,
    points: Sequence[tuple[float, float]] = (),
    labels: Sequence[int] = (),
    boxes: Sequence[tuple[float, float, float, float]] = (),
) -> Proposals:
    """The object that all points mark together, then the object in each box, as `SamPredictor` returns them.

    Args:
        sam: the model, on its device.
        image_HWC: RGB uint8.
        points: (x, y) in pixels of the image.
        labels: of every point: 1 = on the object, 0 = outside.
        boxes: (left, top, right, bottom).
    """
    predictor = SamPredictor(sam)
    predictor.set_image(image_HWC)
    prompts: list[dict[str, Any]] = [{"box": np.array(box)} for box in boxes]
    if points:
        prompts.insert(0, {"point_coords": np.array(points, float), "point_labels": np.array(labels)})
    proposals, threshold = [], sam.mask_threshold
    for number, prompt in enumerate(prompts):
        # A single point is ambiguous: of three masks, that of the highest predicted IoU is returned.
        several = len(points) == 1 and number == 0
        logits_NHW, iou_N, _ = predictor.predict(**prompt, multimask_output=several, return_logits=True)
        best = int(iou_N.argmax())
        logits_1HW = torch.from_numpy(logits_NHW[best : best + 1])
        stability = amg.calculate_stability_score(logits_1HW, threshold, 1.0).double().numpy()
        runs = rle.encode((logits_1HW[0] > threshold).numpy())
        proposals.append(Proposals((runs,), iou_N[best : best + 1].astype(np.float64), np.nan_to_num(stability)))
    return Proposals.joined(proposals)
