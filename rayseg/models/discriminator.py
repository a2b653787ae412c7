"""S4GAN: the discriminator and the losses that train a segmenter on images without masks (Mittal et al. 2019, TPAMI).

The discriminator classifies a map of class probabilities, together with its image, as drawn by a person or predicted.
Unlike the published code it returns logits; `sigmoid` of them is its score.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayseg.errors import ConfigError
from rayseg.models.losses import IGNORE

SMALLEST = 16
"""Least side in px of the discriminator's input, which is halved four times."""


class Discriminator(nn.Module):
    """maps_NCHW (class probabilities, then the image, 0..1) -> (logits_N of "drawn by a person", features_NF).

    Four convolutions of 4 x 4 px, each halving the size, with channels width x 1, 2, 4, 8; leaky ReLU .2 and, except
    after the last, dropout of whole channels; the features are the means over all positions.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(classes + channels, width, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, kernel_size=4, stride=2, padding=1)
        self.conv4 = nn.Conv2d(4 * width, 8 * width, kernel_size=4, stride=2, padding=1)
        self.fc = nn.Linear(8 * width, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features of every map."""
        x = maps_NCHW
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.dropout(F.leaky_relu(conv(x), 0.2))
        features = F.leaky_relu(self.conv4(x), 0.2).mean(dim=(2, 3))
        return self.fc(features)[:, 0], features


def expect_seen(size: int) -> None:
    """Raise ConfigError if windows of `size` px are too small for the discriminator."""
    if size < SMALLEST:
        raise ConfigError(f"windows of {size} px are too small for the discriminator, expected {SMALLEST} or more")


def one_hot(labels_NHW: Tensor, classes: int) -> Tensor:
    """Maps (N, K, H, W) float32 with 1 at the class of a pixel; all 0 for an unlabelled pixel."""
    known = labels_NHW != IGNORE
    maps = F.one_hot(torch.where(known, labels_NHW, 0), classes).permute(0, 3, 1, 2).float()
    return maps * known[:, None]


def feature_matching(real_MF: Tensor, fake_NF: Tensor) -> Tensor:
    """Mean absolute difference of the batches' mean features (after Salimans et al. 2016, section 3.1)."""
    return (real_MF.mean(dim=0) - fake_NF.mean(dim=0)).abs().mean()


def self_training(logits_NKHW: Tensor, scores_N: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Cross-entropy of maps with a score above `threshold` against their own likeliest classes; and their number."""
    good_N = scores_N > threshold
    count = int(good_N.sum())
    if not count:
        return logits_NKHW.sum() * 0.0, 0
    chosen = logits_NKHW[good_N]
    return F.cross_entropy(chosen, chosen.detach().argmax(dim=1)), count


def discriminator_loss(real_M: Tensor, fake_N: Tensor) -> Tensor:
    """Mean of the cross-entropy of drawn maps against 1 and that of predicted maps against 0, from logits."""
    real = F.binary_cross_entropy_with_logits(real_M, torch.ones_like(real_M))
    fake = F.binary_cross_entropy_with_logits(fake_N, torch.zeros_like(fake_N))
    return (real + fake) / 2


def poly(rate: float, step: int, steps: int, *, power: float = 0.9, every: int = 1) -> float:
    """The learning rate at a step: rate x (1 - t / steps) ^ power.

    With `every` above 1, t is the last multiple of it below `step`: the published code changes the rate after a step.
    """
    t = step if every == 1 else max(step - 1, 0) // every * every
    return float(rate * (1 - min(t, steps) / steps) ** power)
