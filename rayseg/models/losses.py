"""Losses of segmenters.

Of one class against the rest: cross-entropy, structural similarity and soft intersection over union. They take the
network's logits (N, 1, H, W) float32, a mask of the same shape with values 0..1, and optionally a weight per pixel of
the same shape, 0 = ignored.

Of K classes: cross-entropy and focal loss as sums over pixels, and the mass to divide them by, so that the loss of a
batch does not depend on the parts it is computed in. They take logits (N, K, H, W) float32 and the class of every pixel
(N, H, W) int64, 255 = ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def bce(logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy per image (N,): the weighted mean over its pixels, 0 if all weights are 0."""
    return _mean(F.binary_cross_entropy_with_logits(logits, mask, reduction="none"), weight)


def ssim(probabilities: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Structural similarity index per image (N,), 1 = equal (Wang et al. 2004, IEEE TIP 13).

    Gaussian window 11x11, sigma 1.5, zeros around the image, K1 = .01, K2 = .03, range 1; the mean over all pixels.
    `weight` weights the mean alone: ignored pixels still contribute to the windows of their neighbours.
    """
    maps = torch.cat([probabilities, mask, probabilities * probabilities, mask * mask, probabilities * mask], dim=1)
    mean_p, mean_t, mean_pp, mean_tt, mean_pt = _blur(maps).chunk(5, dim=1)
    var_p, var_t, covariance = mean_pp - mean_p**2, mean_tt - mean_t**2, mean_pt - mean_p * mean_t
    luminance = (2 * mean_p * mean_t + _C1) / (mean_p**2 + mean_t**2 + _C1)
    structure = (2 * covariance + _C2) / (var_p + var_t + _C2)
    return _mean(luminance * structure, weight, empty=1.0)


def soft_iou(probabilities: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Intersection over union of probabilities and mask per image (N,); 0 for an empty mask."""
    # Sums over the image, not the batch: every image counts alike, however little of the class it shows.
    weights = torch.ones_like(mask) if weight is None else weight
    over = (1, 2, 3)
    both = (probabilities * mask * weights).sum(over)
    return both / ((probabilities * weights).sum(over) + (mask * weights).sum(over) - both + 1e-8)


def bce_ssim_iou(logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy + (1 - SSIM) + (1 - soft IoU), mean over the batch (Cao & Huang 2022, section 3.3).

    Args:
        logits: (N, 1, H, W) float32 before the sigmoid.
        mask: (N, 1, H, W) float32, 0..1.
        weight: (N, 1, H, W) float32, 0 or more, or None for 1 everywhere. An image with all weights 0 adds nothing.

    Returns:
        Scalar loss.
    """
    logits, mask = logits.float(), mask.float()
    probabilities = logits.sigmoid()
    loss = bce(logits, mask, weight) + 2 - ssim(probabilities, mask, weight) - soft_iou(probabilities, mask, weight)
    if weight is not None:
        loss = torch.where(weight.sum((1, 2, 3)) > 0, loss, 0.0)
    return loss.mean()


def cross_entropy_sum(logits_NKHW: Tensor, classes_NHW: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """Sum of -log p(class) x the class's weight over all labelled pixels."""
    return F.cross_entropy(logits_NKHW.float(), classes_NHW, weights_K, ignore_index=IGNORE, reduction="sum")


def focal_sum(
    logits_NKHW: Tensor,
    classes_NHW: Tensor,
    weights_K: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """Sum of -alpha (1 - p)^gamma log p x the class's weight over all labelled pixels (Lin et al. 2017)."""
    surprise_NHW = F.cross_entropy(logits_NKHW.float(), classes_NHW, ignore_index=IGNORE, reduction="none")
    focus_NHW = (1 - torch.exp(-surprise_NHW)) ** gamma
    return alpha * (focus_NHW * surprise_NHW * _weight_of(classes_NHW, weights_K)).sum()


def mass(classes_NHW: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """Sum of the weights of all labelled pixels, float32: their number without weights; 0 without labelled pixels."""
    return _weight_of(classes_NHW, weights_K).sum()


def cross_entropy(logits_NKHW: Tensor, classes_NHW: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """Weighted mean of -log p(class) over all labelled pixels; 0 without labelled pixels."""
    return cross_entropy_sum(logits_NKHW, classes_NHW, weights_K) / mass(classes_NHW, weights_K).clamp(min=1e-12)


def published_focal(mean: Tensor, *, gamma: float = 2.0, alpha: float = 0.5) -> Tensor:
    """The landcover prototype's focal loss: of the mean cross-entropy instead of every pixel's."""
    return alpha * (1 - torch.exp(-mean)) ** gamma * mean


def _weight_of(classes_NHW: Tensor, weights_K: Tensor | None) -> Tensor:
    known_NHW = classes_NHW != IGNORE
    if weights_K is None:
        return known_NHW.float()
    return torch.where(known_NHW, weights_K[torch.where(known_NHW, classes_NHW, 0)], 0.0)


def _mean(values: Tensor, weight: Tensor | None, *, empty: float = 0.0) -> Tensor:
    """Weighted mean per image of (N, 1, H, W); `empty` where all weights are 0."""
    if weight is None:
        return values.mean((1, 2, 3))
    total = weight.sum((1, 2, 3))
    mean = (values * weight).sum((1, 2, 3)) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, mean, empty)


def _blur(maps_NCHW: Tensor) -> Tensor:
    """Gaussian blur of every channel, as a column and a row, with zeros around the image."""
    # In float64 first: the published window is normalised before it is rounded.
    distance = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(distance**2) / (2 * _SIGMA**2))
    line = (weights / weights.sum()).to(maps_NCHW.device, maps_NCHW.dtype)
    channels, reach = maps_NCHW.shape[1], _WINDOW // 2
    # A Gaussian is separable: 2 x 11 products per pixel, not 11 x 11.
    column = line.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    row = line.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    blurred = F.conv2d(maps_NCHW, column, padding=(reach, 0), groups=channels)
    return F.conv2d(blurred, row, padding=(0, reach), groups=channels)
