"""Segmenters: a decoder of segmentation_models_pytorch on any encoder, from images to one map of logits per class."""

from collections.abc import Sequence
from functools import partial

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from rayseg.errors import ConfigError
from rayseg.models.deeplab import DeepLab, DeepLabV2
from rayseg.models.encoders import (
    built,
    encoder_name,
    load_encoder_weights,
    pretrained_name,
)
from rayseg.models.pretrained_weights import chosen


class Probabilities(nn.Module):
    """A model's logits (N, K, H, W) as probabilities, float32: of class 1 if K is 1, else of all, adding up to 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Probabilities of images."""
        logits: Tensor = self.model(x_NCHW).float()
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


DEEPLABS = {"deeplab": DeepLab, "deeplabv2": DeepLabV2}
ARCHITECTURES = tuple(sorted([*smp.MODEL_ARCHITECTURES_MAPPING, *DEEPLABS]))


class Reduced(nn.Module):
    """A segmenter of averaged squares of pixels; logits are interpolated bilinearly to the input's size.

    A network pretrained on photographs of near objects sees the imagery at a coarser scale this way, wherever the model
    is used.
    """

    def __init__(self, net: nn.Module, *, reduce: int) -> None:
        super().__init__()
        self.net = net
        self.reduce = reduce

    @property
    def encoder(self) -> nn.Module:
        """Encoder of the inner network."""
        return self.net.get_submodule("encoder")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of the images' size."""
        logits = self.net(avg_pool2d(images_NCHW, self.reduce))
        return interpolate(logits, size=images_NCHW.shape[2:], mode="bilinear")


class Enlarged(nn.Module):
    """A segmenter of bilinearly enlarged images; logits are averaged over the enlarged pixels of a pixel.

    Encoders halve the image at once, and decoders see nothing finer: lines of one or two pixels survive only this way.
    """

    def __init__(self, net: nn.Module, *, enlarge: int) -> None:
        super().__init__()
        self.net = net
        self.enlarge = enlarge

    @property
    def encoder(self) -> nn.Module:
        """Encoder of the inner network."""
        return self.net.get_submodule("encoder")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of the images' size."""
        logits = self.net(interpolate(images_NCHW, scale_factor=self.enlarge, mode="bilinear"))
        return avg_pool2d(logits, self.enlarge)


class Ensemble(nn.Module):
    """The mean of the logits of segmenters of one architecture, trained from different seeds."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW."""
        logits: Tensor = torch.stack([member(images_NCHW) for member in self.members]).mean(dim=0)
        return logits


def build_segmenter(
    architecture: str,
    encoder: str,
    *,
    classes: int = 1,
    weights: str = "imagenet",
    channels: int = 3,
    reduce: int = 1,
    enlarge: int = 1,
    members: int = 1,
) -> nn.Module:
    """A network from normalised images_NCHW (float32, sides multiples of 32 * reduce) to logits_NKHW of that size.

    Args:
        architecture: one of `ARCHITECTURES`, for example "unet" or "deeplabv3plus"; "deeplab" and "deeplabv2" are those
            of rayseg.models.deeplab.
        encoder: a name of segmentation_models_pytorch or of timm, for example "regnety_040".
        classes: number of maps K; 1 for a class against the rest (sigmoid), else one per class (softmax).
        weights: of the encoder: "imagenet" (downloaded), "packaged", "none", or a `.pth`, `.pt` or `.safetensors` file.
        channels: bands of the images.
        reduce: side in px of the squares that are averaged to one input pixel of the network.
        enlarge: factor by which images are enlarged before the network.
        members: networks whose logits are averaged; 1 is a single network.

    Raises:
        ConfigError: the architecture or the encoder is unknown, or they cannot be combined.
        ModelError: the weights are missing or do not fit.
    """
    if members > 1:
        member = partial(build_segmenter, architecture, encoder, classes=classes, weights=weights, channels=channels)
        return Ensemble([member(reduce=reduce, enlarge=enlarge) for _ in range(members)])
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture {architecture!r} is unknown, expected one of: {', '.join(ARCHITECTURES)}")
    if architecture in DEEPLABS:
        deeplab = DEEPLABS[architecture](encoder, classes=classes, channels=channels, weights=weights)
        return _resampled(deeplab, reduce=reduce, enlarge=enlarge)
    name, weights = encoder_name(encoder), chosen(encoder, weights)
    with built(f"{architecture} on encoder {encoder}", weights):
        model: nn.Module = smp.create_model(
            architecture,
            encoder_name=name,
            encoder_weights=pretrained_name(name, weights),
            in_channels=channels,
            classes=classes,
        )
    load_encoder_weights(model.get_submodule("encoder"), weights, encoder)
    return _resampled(model, reduce=reduce, enlarge=enlarge)


def _resampled(net: nn.Module, *, reduce: int, enlarge: int) -> nn.Module:
    net = Enlarged(net, enlarge=enlarge) if enlarge > 1 else net
    return Reduced(net, reduce=reduce) if reduce > 1 else net
