"""Classifiers of whole chips: an encoder, a score per class at every position, and a pooling over the positions."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rayseg.errors import ConfigError
from rayseg.models.encoders import build_encoder

Pooling = Callable[[Tensor], Tensor]
Stages = tuple[int, ...]


class Classifier(nn.Module):
    """images_NCHW -> logits_NK, by pooling one score per class and position of the encoder's feature maps.

    `stages[k]` passes on the encoder's k-th feature map (0 is the image, -1 the last): a place for hooks that is the
    same for every encoder, at which class activation maps are taken.

    With average pooling of the last stage this is the usual average pool, dropout and linear layer in another order:
    whole channels are dropped, and a mean of linear scores is the linear score of the mean. The other poolings come
    from learning with many instances per label: a chip is positive because some part of it is.
    """

    def __init__(self, encoder: nn.Module, *, stages: Stages, classes: int, dropout: float, pool: Pooling) -> None:
        super().__init__()
        widths: list[int] = encoder.out_channels  # type: ignore[assignment]
        self.encoder = encoder
        self.stages = nn.ModuleList(nn.Identity() for _ in widths)
        self.seen = stages
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(sum(widths[stage] for stage in stages), classes, kernel_size=1)
        self.pool = pool

    def position_logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of every class at every position of the finest stage the head sees."""
        feature_maps = [stage(x) for stage, x in zip(self.stages, self.encoder(images_NCHW), strict=True)]
        seen = [feature_maps[stage] for stage in self.seen]
        finest = max(seen, key=lambda x: x.shape[2]).shape[2:]
        alike = [x if x.shape[2:] == finest else interpolate(x, size=finest, mode="bilinear") for x in seen]
        scores: Tensor = self.head(self.dropout(torch.cat(alike, dim=1)))
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
    stages: Stages = (5,),
    stride: int = 32,
    pooling: str = "average",
) -> Classifier:
    """A classifier of normalised images_NCHW (float32, sides multiples of 32) into `classes`.

    Args:
        encoder: a name of segmentation_models_pytorch or of timm, for example "regnety_040".
        classes: number of logits K; 1 for a class against the rest.
        dropout: share of the channels dropped before the head in training.
        weights: of the encoder: "imagenet" (downloaded), "none", or a `.pth`, `.pt` or `.safetensors` file.
        channels: bands of the images.
        stages: of the encoder, 1..5, that the head sees; stage k has 1/2^k of the resolution, finer to localise.
        stride: pixels per position of the last stage: 32, or 16 or 8 by dilation where the encoder can.
        pooling: one of `POOLINGS`: the mean over the positions, a soft maximum (logsumexp), or the mean of a class's
            highest 1, 5, 10 or 20 % of positions.

    Raises:
        ConfigError: encoder, stages, stride or pooling are unknown or do not go together.
        ModelError: the weights are not to be had or do not fit.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r} is unknown, expected one of: {', '.join(POOLINGS)}")
    if not stages or not set(stages) <= set(range(1, 6)):
        raise ConfigError(f"the classifier's stages are {list(stages)}, expected some of 1, 2, 3, 4, 5")
    trunk = build_encoder(encoder, channels=channels, depth=max(stages), stride=stride, weights=weights)
    return Classifier(trunk, stages=tuple(stages), classes=classes, dropout=dropout, pool=POOLINGS[pooling])


def class_probabilities(logits_NK: Tensor) -> Tensor:
    """Probabilities_NK: softmax, or sigmoid where there is one logit."""
    return logits_NK.sigmoid() if logits_NK.shape[1] == 1 else logits_NK.softmax(dim=1)


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


POOLINGS: Mapping[str, Pooling] = {
    "average": _average,
    "logsumexp": _log_sum_exp,
    "top1": partial(_top, share=0.01),
    "top5": partial(_top, share=0.05),
    "top10": partial(_top, share=0.1),
    "top20": partial(_top, share=0.2),
}
