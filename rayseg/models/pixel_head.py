"""Classifiers of single pixels by frozen features: what there is to learn from few masks, in seconds on a CPU.

Features of a pixel are the encoder's maps at strides 2 to 16 and colour (Lab at three scales, and the local deviation
of brightness), interpolated bilinearly to a stride of 4 px. One linear map turns them into logits, or a layer of hidden
units comes first.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from rayseg.models.encoders import build_encoder

STRIDE = 4
"""Pixels per position of the features and logits, before logits are interpolated."""
_FLIPS: tuple[tuple[int, ...], ...] = ((3,), (2,), (2, 3))
"""Axes that each mirror image turns round, in the order of their use."""
_SCALES = (4, 8, 16)  # px over which colour is averaged
# sRGB (IEC 61966-2-1) to CIE XYZ, each row divided by the white point D65; XYZ to Lab / 100 (CIE 15).
_XYZ = ((0.43395, 0.37622, 0.18983), (0.21267, 0.71516, 0.07217), (0.01776, 0.10947, 0.87277))
_LAB = ((0.0, 1.16, 0.0), (5.0, -5.0, 0.0), (0.0, 2.0, -2.0))


class PixelHead(nn.Module):
    """Images_NCHW (float32, normalised, sides multiples of 32) to logits_NKHW of their size.

    The colour features need the values of the bands, so `mean` and `std` are those of the input's normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: nn.Module, *, classes: int, channels: int, lab: bool, hidden: int, flips: int = 1
    ) -> None:
        super().__init__()
        self.flips = flips
        self.encoder = encoder.requires_grad_(False)
        maps: list[int] = encoder.out_channels[1:5]  # type: ignore[index,assignment]
        self.widths = [*maps, channels * len(_SCALES) + len(_SCALES) - 1]
        self.lab = lab
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.first = nn.Linear(sum(self.widths), hidden or classes)
        self.last = nn.Conv2d(hidden, classes, 1) if hidden else None

    def maps(self, images_NCHW: Tensor) -> list[Tensor]:
        """Maps of the strides 2 to 16 and of colour, whose channels together are the features."""
        return [*self.encoder(images_NCHW)[1:5], self.color(images_NCHW)]

    def features(self, images_NCHW: Tensor) -> Tensor:
        """All features, (N, F, height / 4, width / 4)."""
        size = [side // STRIDE for side in images_NCHW.shape[2:]]
        return torch.cat([resized(maps, size) for maps in self.maps(images_NCHW)], dim=1)

    def color(self, images_NCHW: Tensor) -> Tensor:
        """Mean colours of squares of 4, 8 and 16 px, and the deviation of brightness in the larger two."""
        color = _lab(images_NCHW * self.std[:, None, None] + self.mean[:, None, None]) if self.lab else images_NCHW
        light = color[:, :1] if self.lab else color.mean(dim=1, keepdim=True)
        means = [around(color, size) for size in _SCALES]
        squares = [(around(light.square(), size), around(light, size)) for size in _SCALES[1:]]
        return torch.cat([*means, *((square - mean**2).clamp(min=0).sqrt() for square, mean in squares)], dim=1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW; of `flips` mirror images, the logarithm of their mean probabilities."""
        logits = self.logits(images_NCHW)
        if self.flips == 1:
            return logits
        views = [self.logits(images_NCHW.flip(axes)).flip(axes) for axes in _FLIPS[: self.flips - 1]]
        return torch.stack([logits, *views]).log_softmax(dim=2).logsumexp(dim=0) - math.log(self.flips)

    def logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of the images as they are."""
        size = [side // STRIDE for side in images_NCHW.shape[2:]]
        # A linear map and an interpolation can change places; the map first needs far less memory.
        parts = zip(self.maps(images_NCHW), torch.split(self.first.weight, self.widths, dim=1), strict=True)
        units = torch.stack([resized(conv2d(maps, weight[..., None, None]), size) for maps, weight in parts]).sum(dim=0)
        units = units + self.first.bias[:, None, None]
        logits = self.last(units.relu()) if self.last else units
        return interpolate(logits, size=images_NCHW.shape[2:], mode="bilinear")


def build_pixel_head(
    encoder: str,
    *,
    classes: int,
    weights: str = "imagenet",
    channels: int = 3,
    lab: int = 1,
    hidden: int = 0,
    flips: int = 1,
) -> PixelHead:
    """An untrained head on an encoder.

    Args:
        encoder: a name of segmentation_models_pytorch or of timm.
        classes: number of classes K, at least 2.
        weights: of the encoder: "imagenet" (downloaded), "packaged", "none", or a file.
        channels: bands of the images.
        lab: 1 for red, green and blue of 0..255, whose colour is Lab; 0 for other bands, taken as they are.
        hidden: units between features and logits; 0 makes the head linear.
        flips: mirror images whose probabilities are averaged, the image itself included: 1, 2 or 4.

    Raises:
        ConfigError: the encoder is unknown or has no feature maps.
        ModelError: the weights are missing or do not fit.
    """
    trunk = build_encoder(encoder, channels=channels, weights=weights)
    return PixelHead(trunk, classes=classes, channels=channels, lab=bool(lab), hidden=hidden, flips=flips)


def resized(maps_NCHW: Tensor, size: list[int]) -> Tensor:
    """Maps interpolated bilinearly to (height, width) `size`."""
    return interpolate(maps_NCHW, size=size, mode="bilinear") if list(maps_NCHW.shape[2:]) != size else maps_NCHW


def around(maps_NCHW: Tensor, size: int) -> Tensor:
    """Means of squares of `size` px around the middle of every square of 4 px."""
    return avg_pool2d(maps_NCHW, size, stride=STRIDE, padding=(size - STRIDE) // 2, count_include_pad=False)


def _lab(values_N3HW: Tensor) -> Tensor:
    """CIE Lab / 100 of sRGB values 0..255."""
    rgb = (values_N3HW / 255).clamp(0, 1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("kc,nchw->nkhw", linear.new_tensor(_XYZ), linear)
    # The cube root is linear near black (CIE 15), where its slope has no bound.
    bent = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    lab = torch.einsum("kc,nchw->nkhw", linear.new_tensor(_LAB), bent)
    return lab - lab.new_tensor((0.16, 0.0, 0.0))[:, None, None]
