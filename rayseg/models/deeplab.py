"""DeepLab as two of the published codes have it, on any encoder.

`DeepLab`: the landcover prototype's DeepLabv3+ (Chen et al. 2018, arXiv 1802.02611). Output stride 16, atrous rates
1 6 12 18 and the mean of the image, 48 channels of low-level features at a quarter of the image's sides. In a residual
encoder the last stage's blocks are dilated by 2, 4 and 8 (multi-grid 1, 2, 4).
`DeepLabV2`: S4GAN's segmenter (Chen et al. 2017, arXiv 1606.00915). Output stride 8, atrous rates 6 12 18 24.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rayseg.models.encoders import build_encoder

RATES = (6, 12, 18)
MULTI_GRID = (1, 2, 4)
RATES_V2 = (6, 12, 18, 24)
_LOW, _HIGH = 2, -1  # positions of the encoder's feature maps


class DeepLab(nn.Module):
    """Images_NCHW, sides multiples of 16, to logits_NKHW of their size."""

    def __init__(self, encoder: str, *, classes: int, channels: int = 3, weights: str = "none") -> None:
        super().__init__()
        self.encoder = build_encoder(encoder, channels=channels, stride=16, weights=weights)
        # Only residual encoders have `layer4`; others keep the dilation that their stride needs.
        for block, grid in zip(getattr(self.encoder, "layer4", ()), MULTI_GRID, strict=False):
            for module in block.modules():
                if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2 * grid, 2 * grid)
        widths = self.encoder.out_channels
        self.aspp = Aspp(widths[_HIGH])  # type: ignore[index,arg-type]
        self.decoder = Decoder(widths[_LOW], classes)  # type: ignore[index,arg-type]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW."""
        features = self.encoder(images_NCHW)
        return _to(self.decoder(features[_LOW], self.aspp(features[_HIGH])), images_NCHW)


class DeepLabV2(nn.Module):
    """Images_NCHW to logits_NKHW of their size: the sum of four atrous convolutions of an encoder's last features.

    As in Caffe's network, whose weights the published code starts from, residual blocks halve the image in their first
    convolution, max pooling rounds sizes up, and scale and shift of the encoder's batch norms do not learn.
    """

    def __init__(self, encoder: str, *, classes: int, channels: int = 3, weights: str = "none") -> None:
        super().__init__()
        self.encoder = build_encoder(encoder, channels=channels, stride=8, weights=weights)
        for name, module in self.encoder.named_modules():
            # Only bottleneck blocks have `conv3`; torchvision's halve the image in their second convolution.
            if hasattr(module, "conv3") and name.startswith("layer"):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = True
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        width = self.encoder.out_channels[_HIGH]  # type: ignore[index]
        self.aspp = nn.ModuleList(
            nn.Conv2d(width, classes, 3, padding=rate, dilation=rate)  # type: ignore[arg-type]
            for rate in RATES_V2
        )
        for branch in self.aspp:
            nn.init.normal_(branch.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW."""
        features = self.encoder(images_NCHW)[_HIGH]
        logits: Tensor = torch.stack([branch(features) for branch in self.aspp]).sum(dim=0)
        return _to(logits, images_NCHW)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: features_NCHW to (N, 256, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        atrous = (_unit(channels, 256, dilation=rate) for rate in RATES)
        self.branches = nn.ModuleList([_unit(channels, 256), *atrous])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), _unit(channels, 256))
        self.joined = nn.Sequential(_unit(256 * (len(self.branches) + 1), 256), nn.Dropout(0.5))

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """All levels of the pyramid, joined."""
        levels = [branch(features_NCHW) for branch in self.branches]
        joined: Tensor = self.joined(torch.cat([*levels, _to(self.pooled(features_NCHW), features_NCHW)], dim=1))
        return joined


class Decoder(nn.Module):
    """Low-level features and the pyramid to logits_NKHW at the size of the low-level features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.low = _unit(channels, 48)
        self.mixed = nn.Sequential(
            *(_unit(256 + 48, 256, side=3), nn.Dropout(0.5)), *(_unit(256, 256, side=3), nn.Dropout(0.1))
        )
        self.classify = nn.Conv2d(256, classes, 1)

    def forward(self, low_NCHW: Tensor, high_NCHW: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classify(self.mixed(torch.cat([_to(high_NCHW, low_NCHW), self.low(low_NCHW)], dim=1)))
        return logits


def _unit(channels: int, out: int, *, side: int = 1, dilation: int = 1) -> nn.Sequential:
    side = 3 if dilation > 1 else side
    padding = dilation * (side // 2)
    convolution = nn.Conv2d(channels, out, side, padding=padding, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def _to(features_NCHW: Tensor, like_NCHW: Tensor) -> Tensor:
    """Features at the height and width of others, with aligned corners."""
    return interpolate(features_NCHW, size=like_NCHW.shape[2:], mode="bilinear", align_corners=True)
