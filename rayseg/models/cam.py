"""Class activation maps: where in an image a classifier sees a class."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam import GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from rayseg.errors import ConfigError
from rayseg.models.classifier import class_probabilities

FloatArray = NDArray[np.float32]


def gradcam_plusplus(
    model: nn.Module,
    images_NCHW: Tensor,
    *,
    target_class: int,
    layer: nn.Module | int = -1,
    batch_size: int = 16,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """Grad-CAM++ (Chattopadhay et al. 2018) of one class, and the model's score for it.

    Args:
        model: images_NCHW -> logits_NK; in evaluation mode during the call.
        images_NCHW: normalised float32 images; they are moved to the model's device.
        target_class: position of the class.
        layer: a module of the model that returns feature maps, or the number of an encoder stage of a
            `Classifier` (-1 the last, -2 one of twice the resolution).
        batch_size: images per pass.
        scales: factors of image size over which maps and scores are averaged.
        flip: average over the mirrored images, too.

    Returns:
        cams_NHW, float32 in 0..1 at the images' size, each image with its own minimum 0 and maximum 1 (all 0 for
        a flat map), and scores_N, float32, the softmax of the class
        (the sigmoid where the model has one logit).
    """
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    device = next(model.parameters()).device
    cams, scores = [], []
    with _frozen(model):
        # Not used as a context manager, which would swallow errors.
        cam = GradCAMPlusPlus(model, [_layer_of(model, layer)])
        for images in torch.split(images_NCHW, batch_size):
            seen = [_view(cam, images.to(device), target_class, scale=scale, mirrored=flag) for scale, flag in views]
            maps, view_scores = zip(*seen, strict=True)
            mean_NHW: FloatArray = maps[0] if len(maps) == 1 else np.mean(maps, axis=0)
            if len(maps) > 1:
                # Grad-CAM stretches each map to 0..1; a mean of several has to be stretched again.
                low = mean_NHW.min(axis=(1, 2), keepdims=True)
                span = mean_NHW.max(axis=(1, 2), keepdims=True) - low
                mean_NHW = ((mean_NHW - low) / np.where(span > 0, span, 1)).astype(np.float32)
            cams.append(mean_NHW)
            scores.append(np.mean(view_scores, axis=0))
        cam.activations_and_grads.release()
    return np.concatenate(cams), np.concatenate(scores)


def _layer_of(model: nn.Module, layer: nn.Module | int) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    stages: list[nn.Module] = list(model.get_submodule("stages").children())
    if not -len(stages) <= layer < len(stages):
        raise ConfigError(
            f"layer {layer} is not one of the encoder's {len(stages)} stages; choose -1 (the last) to {-len(stages)}"
        )
    return stages[layer]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and gradients through the weights but not for them; both are restored afterwards."""
    training = [(module, module.training) for module in model.modules()]
    learning = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for weight, flag in learning:
            weight.requires_grad_(flag)


def _view(
    cam: GradCAMPlusPlus, images_NCHW: Tensor, target_class: int, *, scale: float, mirrored: bool
) -> tuple[FloatArray, FloatArray]:
    """Maps of the resized and mirrored images, transformed back to the images' pixels, and scores."""
    height, width = images_NCHW.shape[2:]
    seen = images_NCHW.flip(3) if mirrored else images_NCHW
    if scale != 1:
        # Encoders halve the image five times.
        size = [max(32, round(side * scale / 32) * 32) for side in (height, width)]
        seen = nn.functional.interpolate(seen, size=size, mode="bilinear", antialias=scale < 1)
    # The weights have no gradients, so the image needs one: else there is nothing to differentiate.
    seen = seen.detach().clone().requires_grad_()
    maps: FloatArray = cam(seen, [ClassifierOutputTarget(target_class)] * len(seen))
    scores: FloatArray = class_probabilities(cam.outputs.detach())[:, target_class].cpu().numpy()
    if scale != 1:
        back = nn.functional.interpolate(torch.from_numpy(maps)[:, None], size=(height, width), mode="bilinear")
        maps = back[:, 0].numpy()
    return (np.ascontiguousarray(maps[:, :, ::-1]) if mirrored else maps), scores
