"""Classifier of plots: an encoder's features and two colour features (LiSegAgr, ICONIP)."""

import torch
from torch import Tensor, nn

from rayseg.models.encoders import build_encoder

HUE_WEIGHT, RICHNESS_WEIGHT = 3.0, 2.0
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlotClassifier(nn.Module):
    """images_NCHW (RGB, 0..1) -> logits_NK, from the encoder's mean features, attended hue and colour richness.

    The encoder sees the image normalised by ImageNet's mean and std; hue and richness use the image itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, *, classes: int, dropout: float) -> None:
        super().__init__()
        widths: list[int] = encoder.out_channels  # type: ignore[assignment]
        self.encoder = encoder
        self.hue = AttendedHue()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1] + 2, classes)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NK."""
        features_NF = self.encoder((images_NCHW - self.mean) / self.std)[-1].mean(dim=(2, 3))
        # Scaled to 0..1 first: as published both are hundreds, next to features of order 1.
        colour_N2 = torch.stack(
            [HUE_WEIGHT * self.hue(images_NCHW) / 360, RICHNESS_WEIGHT * richness(images_NCHW) / 256], dim=1
        )
        logits: Tensor = self.head(torch.cat([self.dropout(features_NF), colour_N2.to(features_NF.dtype)], dim=1))
        return logits


class AttendedHue(nn.Module):
    """images_NCHW (RGB) -> mean over the image of hue x sigmoid(conv(relu(conv(hue)))), (N,) in degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, kernel_size=1)
        self.conv2 = nn.Conv2d(1, 1, kernel_size=1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Attended hue in degrees, (N,)."""
        hue_N1HW = hue(images_NCHW.float())[:, None]
        # Attention: which pixels count in the mean hue.
        weights = self.conv2(self.conv1(hue_N1HW).relu()).sigmoid()
        attended: Tensor = (hue_N1HW * weights).mean(dim=(1, 2, 3))
        return attended


def hue(images_NCHW: Tensor) -> Tensor:
    """H of HSV in degrees, 0..360, (N, H, W); 0 where all channels are equal."""
    red, green, blue = images_NCHW.unbind(dim=1)
    top, low = images_NCHW.amax(dim=1), images_NCHW.amin(dim=1)
    spread = top - low
    # HSV's hexcone (Smith 1978). A grey pixel has no hue; dividing by 1 instead of 0 keeps gradients finite.
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    by_green, by_blue = (blue - red) / safe + 2, (red - green) / safe + 4
    sixths = torch.where(top == red, (green - blue) / safe, torch.where(top == green, by_green, by_blue))
    return torch.where(spread > 0, 60 * (sixths % 6), torch.zeros_like(spread))


@torch.no_grad()
def richness(images_NCHW: Tensor) -> Tensor:
    """Number of the 256 values that occur, mean over the channels, (N,), of images 0..1; other values do not count."""
    scaled = images_NCHW.float() * 255
    # As numpy's histogram with 256 bins over 0..255: the last bin includes its upper edge.
    bins = (scaled * (256 / 255)).floor().clamp(max=255).long().flatten(2)
    bins = torch.where(((scaled >= 0) & (scaled <= 255)).flatten(2), bins, 256)
    seen = torch.zeros((*bins.shape[:2], 257), device=bins.device).scatter_(2, bins, 1.0)
    return seen[:, :, :256].sum(dim=2).mean(dim=1)


def build_plot_classifier(
    encoder: str, *, classes: int = 2, dropout: float = 0.0, weights: str = "imagenet"
) -> PlotClassifier:
    """A classifier of plots on a black background.

    Args:
        encoder: a name of segmentation_models_pytorch or of timm, for example "resnet50".
        classes: number of logits K.
        dropout: share of the features dropped in training.
        weights: of the encoder: "imagenet" (downloaded), "packaged", "none", or a file.

    Raises:
        ConfigError: the encoder is unknown.
        ModelError: the weights are missing or do not fit.
    """
    return PlotClassifier(build_encoder(encoder, weights=weights), classes=classes, dropout=dropout)
