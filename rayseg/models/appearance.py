"""A class by the colour and texture of its pixels: one Gaussian for the class, a mixture of Gaussians for the rest.

    image --> colour (CIE Lab), texture (log of the local deviation of lightness) --> log density of both --> logit

Whatever is unlike the class is not the class, in any direction of colour: a discriminative model of few chips extends
the class to all that lies beyond its training pixels, such as white roofs. A single Gaussian on the class's side is
wide, so that it holds the colours between those of the chips.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

FEATURES = 4
"""L, a, b and texture."""
COLOR_SIGMA, TEXTURE_SIGMA = 1.5, 4.0
"""Standard deviations in px of the Gaussian windows of colour and texture."""
_TEXTURE_UNIT = 5.0  # a factor e of deviation weighs as much as 5 units of colour
_SRGB_TO_XYZ = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)
"""Linear sRGB to XYZ, relative to the white point D65 (IEC 61966-2-1)."""


def lab(rgb_N3HW: Tensor) -> Tensor:
    """CIE Lab (D65) of sRGB values 0..255, (N, 3, H, W) float32."""
    x = rgb_N3HW / 255
    linear = torch.where(x > 0.04045, ((x.clamp(min=0) + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = torch.einsum("rc,nchw->nrhw", linear.new_tensor(_SRGB_TO_XYZ), linear)
    # CIE 15: the cube root is linear near black.
    f = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1)


def features(rgb_N3HW: Tensor) -> Tensor:
    """Colour and texture of every pixel, (N, 4, H, W) float32, from sRGB values 0..255.

    Texture is 5 log(deviation + 0.5), where the deviation is that of L in a Gaussian window.
    """
    lab_N3HW = lab(rgb_N3HW)
    lightness = lab_N3HW[:, :1] - 50  # small numbers, whose squares lose few digits
    moments_N2HW = _blur(torch.cat([lightness, lightness.square()], dim=1), TEXTURE_SIGMA)
    deviation = (moments_N2HW[:, 1:] - moments_N2HW[:, :1].square()).clamp(min=1e-4).sqrt()
    return torch.cat([_blur(lab_N3HW, COLOR_SIGMA), _TEXTURE_UNIT * (deviation + 0.5).log()], dim=1)


def _blur(x_NCHW: Tensor, sigma: float) -> Tensor:
    """Gaussian filter, cut at four standard deviations; the image is mirrored at its edge."""
    reach, channels = round(4 * sigma), x_NCHW.shape[1]
    steps = torch.arange(-reach, reach + 1, device=x_NCHW.device, dtype=torch.float32)
    weights = (-steps.square() / (2 * sigma**2)).exp()
    kernel = (weights / weights.sum()).repeat(channels, 1, 1, 1)
    wide = pad(x_NCHW, (reach, reach, reach, reach), mode="reflect")
    return conv2d(conv2d(wide, kernel, groups=channels), kernel.mT, groups=channels)


class Appearance(nn.Module):
    """Logits_N1HW of the class from normalised images_N3HW.

    Attributes:
        mean, std: of the input's scaling, in values 0..255.
        centres: (1 + components, 4) means of the Gaussians, the class's first.
        whitening: (1 + components, 4, 4) lower factors of the inverse covariances.
        heights: (1 + components,) log weight plus log normalisation; without the constant that both sides share.
    """

    def __init__(self, *, components: int) -> None:
        super().__init__()
        count = 1 + components
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.register_buffer("centres", torch.zeros(count, FEATURES))
        self.register_buffer("whitening", torch.eye(FEATURES).repeat(count, 1, 1))
        self.register_buffer("heights", torch.zeros(count))

    mean: Tensor
    std: Tensor
    centres: Tensor
    whitening: Tensor
    heights: Tensor

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Log ratio of the densities of the class and of the rest."""
        with torch.autocast(images_NCHW.device.type, enabled=False):  # bfloat16 has too few digits for squares of L
            seen = features(images_NCHW.float() * self.std[:, None, None] + self.mean[:, None, None])
            logs = [
                height - torch.einsum("fg,nfhw->nghw", factor, seen - centre[:, None, None]).square().sum(dim=1) / 2
                for centre, factor, height in zip(self.centres, self.whitening, self.heights, strict=True)
            ]
            ratio: Tensor = logs[0] - torch.stack(logs[1:]).logsumexp(dim=0)
            return ratio[:, None]


def build_appearance(*, components: int, weights: str = "none") -> Appearance:
    """A model whose Gaussians are not fitted yet.

    Args:
        components: Gaussians of the rest.
        weights: not used; all factories of bundles take it.
    """
    del weights
    return Appearance(components=components)
