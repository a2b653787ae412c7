"""Classifiers of whole chips: an encoder, a score per class at every position, and a pooling over the positions."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from rayseg.errors import ConfigError
from rayseg.models.encoders import build_encoder, build_imagenet

Pooling = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """images_NCHW -> logits_NK, by pooling one score per class and position of the encoder's last feature map.

    `stages[k]` passes the encoder's k-th feature map through (0 is the image, -1 the last): a place for hooks that is
    the same for every encoder, used for class activation maps.

    With average pooling this equals the usual average pool, dropout and linear layer: whole channels are dropped, and
    a mean of linear scores is the linear score of the mean. The other poolings come from multiple-instance learning:
    a chip is positive if some part of it is.
    """

    def __init__(self, encoder: nn.Module, *, classes: int, dropout: float, pool: Pooling, reduce: int) -> None:
        super().__init__()
        widths: list[int] = encoder.out_channels  # type: ignore[assignment]
        self.encoder = encoder
        self.stages = nn.ModuleList(nn.Identity() for _ in widths)
        self.dropout = nn.Dropout2d(dropout)
        # A 1 x 1 convolution is the linear layer at every position.
        self.head = nn.Conv2d(widths[-1], classes, kernel_size=1)
        self.pool = pool
        self.reduce = reduce

    def position_logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of every class at every position of the last feature map."""
        scores: Tensor = self.head(self.dropout(self._last_map(images_NCHW)))
        return scores

    def embed(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_NK, features_NF): the features are the means of the last feature map."""
        last = self._last_map(images_NCHW)
        return self.pool(self.head(self.dropout(last)).float()), last.float().mean(dim=(2, 3))

    def _last_map(self, images_NCHW: Tensor) -> Tensor:
        seen = avg_pool2d(images_NCHW, self.reduce) if self.reduce > 1 else images_NCHW
        feature_maps: list[Tensor] = [stage(x) for stage, x in zip(self.stages, self.encoder(seen), strict=True)]
        return feature_maps[-1]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NK."""
        return self.pool(self.position_logits(images_NCHW).float())


def build_classifier(
    encoder: str,
    *,
    classes: int = 2,
    dropout: float = 0.2,
    weights: str = "imagenet",
    channels: int = 3,
    stride: int = 32,
    pooling: str = "average",
    reduce: int = 1,
) -> Classifier:
    """A classifier of normalised images_NCHW (float32, sides multiples of 32 * reduce) into `classes`.

    Args:
        encoder: a name of segmentation_models_pytorch or of timm, for example "regnety_040".
        classes: number of logits K; 1 for a class against the rest.
        dropout: share of the channels dropped before the head in training.
        weights: of the encoder: "imagenet" (downloaded), "packaged", "none", or a `.pth`, `.pt` or `.safetensors` file.
        channels: bands of the images.
        stride: pixels per position of the last feature map: 32, or 16 or 8 if the encoder supports dilation.
        pooling: one of `POOLINGS`: the mean over the positions, a soft maximum (logsumexp), or the mean of a class's
            highest 1, 5, 10 or 20 % of positions.
        reduce: side in px of the squares that are averaged to one input pixel of the encoder.

    Raises:
        ConfigError: encoder, stride or pooling are unknown or cannot be combined.
        ModelError: the weights are missing or do not fit.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r} is unknown, expected one of: {', '.join(POOLINGS)}")
    trunk = build_encoder(encoder, channels=channels, stride=stride, weights=weights)
    return Classifier(trunk, classes=classes, dropout=dropout, pool=POOLINGS[pooling], reduce=reduce)


class OverImageNet(nn.Module):
    """images_NCHW -> logits_NK: the 1000 outputs of a whole network through one more linear layer (Desai & Ghose 2022).

    The network is called `encoder`, as in the other classifiers, although it has its own head.
    """

    def __init__(self, net: nn.Module, *, classes: int, reduce: int) -> None:
        super().__init__()
        self.encoder = net
        self.head = nn.Linear(1000, classes)
        self.reduce = reduce

    def embed(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_NK, features_NF): the features are the 1000 outputs."""
        seen = avg_pool2d(images_NCHW, self.reduce) if self.reduce > 1 else images_NCHW
        features = self.encoder(seen).float()
        return self.head(features), features

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NK."""
        return self.embed(images_NCHW)[0]


def build_over_imagenet(
    encoder: str, *, classes: int = 2, weights: str = "imagenet", channels: int = 3, reduce: int = 1
) -> OverImageNet:
    """A classifier of normalised images_NCHW into `classes` over any timm network with the 1000 ImageNet outputs.

    Args:
        encoder: a name of timm, for example "vgg16", "resnet50" or "vit_tiny_patch16_224".
        classes: number of logits K.
        weights: "imagenet" (downloaded), "none", or a file with timm's names.
        channels: bands of the images.
        reduce: side in px of the squares that are averaged to one input pixel of the network.

    Raises:
        ConfigError: timm has no such network.
        ModelError: the weights are missing or do not fit.
    """
    return OverImageNet(build_imagenet(encoder, channels=channels, weights=weights), classes=classes, reduce=reduce)


def class_probabilities(logits_NK: Tensor) -> Tensor:
    """Probabilities_NK: softmax, or sigmoid where there is one logit."""
    return logits_NK.sigmoid() if logits_NK.shape[1] == 1 else logits_NK.softmax(dim=1)


def _log_sum_exp(logits_NKHW: Tensor, *, sharpness: float = 5.0) -> Tensor:
    """log(mean(exp(r x))) / r, between the mean and the maximum (Pinheiro & Collobert 2015, r = 5)."""
    flat_NKP = logits_NKHW.flatten(2)
    count = torch.tensor(float(flat_NKP.shape[2]), device=flat_NKP.device)
    return (torch.logsumexp(sharpness * flat_NKP, dim=2) - count.log()) / sharpness


def _top(logits_NKHW: Tensor, *, share: float) -> Tensor:
    flat_NKP = logits_NKHW.flatten(2)
    count = max(1, round(share * flat_NKP.shape[2]))
    return flat_NKP.topk(count, dim=2).values.mean(dim=2)


POOLINGS: Mapping[str, Pooling] = {
    "average": partial(torch.mean, dim=(2, 3)),
    "logsumexp": _log_sum_exp,
    "top1": partial(_top, share=0.01),
    "top5": partial(_top, share=0.05),
    "top10": partial(_top, share=0.1),
    "top20": partial(_top, share=0.2),
}
