"""A fully connected conditional random field over a segmenter's prediction (Krähenbühl & Koltun 2011, NIPS 24).

Mean-field iterations with two Gaussian kernels, of position alone and of position and colour, each normalised
symmetrically. Sums run over all pixels within four standard deviations: beyond, a pixel's weight is below exp(-8).
"""

import math
from collections.abc import Iterator
from types import EllipsisType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rayseg.config import Config, load_values
from rayseg.models.segmenter import build_segmenter

Pixels = tuple[EllipsisType, slice, slice]
WIDEST = 8.0
"""Largest standard deviation of position in px: sums are computed directly, (8 s + 1)^2 terms for each pixel."""
Deviation = Annotated[float, Field(gt=0, le=WIDEST)]


class Kernels(Config):
    """The two kernels; the defaults are those of Desai & Ghose 2022."""

    iterations: Annotated[int, Field(ge=0)] = 10
    """Of the mean field; 0 leaves the prediction unchanged."""
    near: Deviation = 1.0
    """Standard deviation in px of the kernel of position alone."""
    near_weight: float = 3.0
    """Its weight."""
    alike: Deviation = 1.0
    """Standard deviation in px of the kernel of position and colour."""
    color: Annotated[float, Field(gt=0)] = 67.0
    """Its standard deviation in colour, in values 0..255."""
    alike_weight: float = 4.0
    """Its weight."""


@torch.no_grad()
def mean_field(log_p_NKHW: Tensor, colors_NCHW: Tensor, kernels: Kernels) -> Tensor:
    """Log probabilities_NKHW after the iterations (algorithm 1), with Potts compatibility.

    Args:
        log_p_NKHW: log probabilities, float32.
        colors_NCHW: the image, values 0..255.
        kernels: of the pairwise terms.
    """
    near = _Kernel(None, log_p_NKHW, deviation=kernels.near, color=kernels.color)
    alike = _Kernel(colors_NCHW, log_p_NKHW, deviation=kernels.alike, color=kernels.color)
    log_q = log_p_NKHW
    for _ in range(kernels.iterations):
        q = log_q.softmax(dim=1)
        # Potts compatibility: what two labels cost apart is the same for all, so only equal labels add up.
        log_q = log_p_NKHW + kernels.near_weight * near(q) + kernels.alike_weight * alike(q)
    return log_q.log_softmax(dim=1)


class _Kernel:
    """q_NKHW -> its Gaussian sums D^-1/2 K D^-1/2 q, where D are the sums of ones."""

    def __init__(self, colors_NCHW: Tensor | None, like_NKHW: Tensor, *, deviation: float, color: float) -> None:
        self._colors, self._deviation, self._color = colors_NCHW, deviation, color
        self._reach = max(1, math.ceil(4 * deviation))
        ones = torch.ones_like(like_NKHW[:, :1])
        self._norm = self._sum(ones).rsqrt()

    def __call__(self, q_NKHW: Tensor) -> Tensor:
        return self._norm * self._sum(q_NKHW * self._norm)

    def _sum(self, q_NKHW: Tensor) -> Tensor:
        """Kernel sums; every pair of pixels is visited once, as the kernel is symmetric."""
        total = q_NKHW.clone()  # the pixel itself, whose weight is 1
        for (here, there), weight in self._pairs(q_NKHW):
            total[here] += weight * q_NKHW[there]
            total[there] += weight * q_NKHW[here]
        return total

    def _pairs(self, like: Tensor) -> Iterator[tuple[tuple[Pixels, Pixels], Tensor]]:
        reach, (height, width) = self._reach, like.shape[2:]
        # Half of the neighbours: the other half are the same pairs seen from the other side.
        for down in range(min(reach + 1, height)):
            for right in range(-min(reach, width - 1) if down else 1, min(reach + 1, width)):
                rows = slice(0, height - down), slice(down, height)
                cols = slice(max(0, -right), width - max(0, right)), slice(max(0, right), width - max(0, -right))
                here, there = (..., rows[0], cols[0]), (..., rows[1], cols[1])
                exponent = torch.tensor((down**2 + right**2) / (2 * self._deviation**2), device=like.device)
                if self._colors is not None:
                    apart = self._colors[here] - self._colors[there]
                    exponent = exponent + apart.square().sum(dim=1, keepdim=True) / (2 * self._color**2)
                yield (here, there), (-exponent).exp()


class Refined(nn.Module):
    """A segmenter with the random field over its logits; colours are computed back from its normalised input.

    Attributes:
        std: the input's divisor per band; a buffer, so it is saved with the weights.
    """

    std: Tensor

    def __init__(self, net: nn.Module, *, channels: int, kernels: Kernels) -> None:
        super().__init__()
        self.net = net
        self.kernels = kernels
        self.register_buffer("std", torch.ones(channels))

    @property
    def encoder(self) -> nn.Module:
        """Encoder of the inner network."""
        return self.net.get_submodule("encoder")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW; only differences of colour matter, so the mean is not needed."""
        logits = self.net(images_NCHW).float()
        colors = images_NCHW.float() * self.std[:, None, None]
        return mean_field(logits.log_softmax(dim=1), colors, self.kernels)


def build_refined(
    *, classes: int, channels: int = 3, weights: str = "imagenet", **options: str | int | float
) -> Refined:
    """A segmenter and the random field over it.

    Args:
        classes: number of maps K, one per class.
        channels: bands of the images.
        weights: of the encoder.
        options: of `Kernels`; all others are arguments of `build_segmenter`.
    """
    kernels = load_values(Kernels, {name: value for name, value in options.items() if name in Kernels.model_fields})
    rest: Any = {name: value for name, value in options.items() if name not in Kernels.model_fields}
    net = build_segmenter(**rest, classes=classes, channels=channels, weights=weights)
    return Refined(net, channels=channels, kernels=kernels)
