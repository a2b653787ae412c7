"""Classifiers of whole chips: an encoder, a score per class at every position, and a pooling over the positions."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rayseg.errors import ConfigError
from rayseg.models.encoders import build_encoder

Pooling = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """images_NCHW -> logits_NK, by pooling one score per class and position of the encoder's last feature map.

    `stages[k]` passes on the encoder's k-th feature map (0 is the image, -1 the last): a place for hooks that is the
    same for every encoder, at which class activation maps are taken.

    With average pooling this is the usual average pool, dropout and linear layer in another order: whole channels are
    dropped, and a mean of linear scores is the linear score of the mean. The other poolings come from learning with
    many instances per label: a chip is positive because some part of it is.
    """

    def __init__(self, encoder: nn.Module, *, features: int, classes: int, dropout: float, pool: Pooling) -> None:
        super().__init__()
        self.encoder = encoder
        self.stages = nn.ModuleList(nn.Identity() for _ in encoder.out_channels)  # type: ignore[union-attr]
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(features, classes, kernel_size=1)
        self.pool = pool

    def position_logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of every class at every position of the last feature map."""
        feature_maps = [stage(x) for stage, x in zip(self.stages, self.encoder(images_NCHW), strict=True)]
        scores: Tensor = self.head(self.dropout(feature_maps[-1]))
        return scores

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
    depth: int = 5,
    pooling: str = "average",
    share: float = 0.1,
) -> Classifier:
    """A classifier of normalised images_NCHW (float32) into `classes`; `.encoder` is reachable.

    Args:
        encoder: a name of segmentation_models_pytorch or of timm, for example "regnety_040".
        classes: number of logits K.
        dropout: share of the channels dropped before the head in training.
        weights: of the encoder: "imagenet" (downloaded), "none", or a `.pth`, `.pt` or `.safetensors` file.
        channels: bands of the images.
        depth: stages of the encoder; 5 scores positions of 1/32 of the resolution, 4 of 1/16, finer to localise.
        pooling: "average", "logsumexp" (a soft maximum), or "top" (the mean of the highest positions of a class).
        share: of the positions that "top" takes, at least one.

    Raises:
        ConfigError: the encoder or the pooling is unknown.
        ModelError: the weights are not to be had or do not fit.
    """
    poolings: dict[str, Pooling] = {"average": _average, "logsumexp": _log_sum_exp, "top": partial(_top, share=share)}
    if pooling not in poolings:
        raise ConfigError(f"pooling {pooling!r} is unknown, expected one of: {', '.join(poolings)}")
    trunk = build_encoder(encoder, channels=channels, depth=depth, weights=weights)
    features: int = trunk.out_channels[-1]  # type: ignore[index, assignment]
    return Classifier(trunk, features=features, classes=classes, dropout=dropout, pool=poolings[pooling])


def _average(logits_NKHW: Tensor) -> Tensor:
    return logits_NKHW.mean(dim=(2, 3))


def _log_sum_exp(logits_NKHW: Tensor, *, sharpness: float = 5.0) -> Tensor:
    """log(mean(exp(r x))) / r, between the mean and the maximum (Pinheiro & Collobert 2015, r = 5)."""
    flat_NKP = logits_NKHW.flatten(2)
    count = torch.tensor(float(flat_NKP.shape[2]), device=flat_NKP.device)
    return (torch.logsumexp(sharpness * flat_NKP, dim=2) - count.log()) / sharpness


def _top(logits_NKHW: Tensor, *, share: float) -> Tensor:
    flat_NKP = logits_NKHW.flatten(2)
    count = max(1, round(share * flat_NKP.shape[2]))
    return flat_NKP.topk(count, dim=2).values.mean(dim=2)
