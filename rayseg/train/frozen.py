"""Fit classifiers of single pixels: heads on frozen features, and a random forest on colour and texture.

Every window is read and encoded once, and pixels are drawn from it: seconds on a CPU for tens of images.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from rayseg.config import Config, added
from rayseg.errors import DataError
from rayseg.models.bundle import Scaling
from rayseg.models.pixel_head import STRIDE, PixelHead, build_pixel_head
from rayseg.train.learning import NetworkConfig
from rayseg.vision.color import IGNORE

Pair = tuple[NDArray[Any], NDArray[np.uint8]]
"""image_CHW in the imagery's data type, its classes_HW with 255 where not labelled."""
Floats = NDArray[np.float32]
MOST_NUMBERS = 1 << 25
"""Numbers of all samples together, 128 MB; with more features there are fewer samples."""
MOST_LINEAR = 50_000
"""Samples of a logistic regression: more samples change the result little and take longer."""
_PENALTY = 1 / 600  # L2 on weights of standardised features, relative to the mean loss; by cross-validation on Dubai


class HeadConfig(Config):
    """How heads on frozen features learn."""

    hidden: Annotated[int, Field(gt=0)] = 64
    """Hidden units of each member."""
    members: Annotated[int, Field(gt=0)] = 3
    """Members, trained from different seeds, whose logits are averaged."""
    steps: Annotated[int, Field(gt=0)] = 600
    """Steps of each member, of 1024 pixels."""
    rate: Annotated[float, Field(gt=0)] = 3e-3
    """Highest learning rate; it falls linearly to 0."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the features left out in each step; of the hidden units, 0.3."""
    balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A class's weight is its share of the pixels to minus this power; 1 balances all classes."""
    flips: Literal[1, 2, 4] = added(default=1)
    """Mirror images that a map is the mean of: 2 adds left to right, 4 top to bottom, too; each takes as long again."""


class HeadedConfig(NetworkConfig):
    """A segmenter of many classes: a decoder on an encoder, or a head on a frozen one."""

    network: Literal["decoder", "linear", "frozen"] = added(default="decoder")
    """decoder: `architecture`; linear: a linear map of the frozen encoder's features and colour; frozen: `head`."""
    head: HeadConfig = added(default=HeadConfig())
    """network frozen: small networks on the frozen encoder's features and colour, trained in a minute on a CPU."""

    @property
    def factory(self) -> Literal["segmenter", "pixel-head"]:
        """Name of the network's factory in a bundle."""
        return "segmenter" if self.network == "decoder" else "pixel-head"

    def options(self, *, classes: int = 1, channels: int) -> dict[str, str | int | float]:
        """Arguments of the network's factory, as a bundle stores them."""
        if self.network == "decoder":
            return super().options(classes=classes, channels=channels)
        hidden = self.head.hidden * self.head.members if self.network == "frozen" else 0
        flips = {"flips": self.head.flips} if self.head.flips > 1 else {}
        return {"encoder": self.encoder, "classes": classes, "channels": channels, "hidden": hidden, **flips}


@dataclass(frozen=True)
class Samples:
    """Pixels with their features and classes.

    Attributes:
        features_NF: of the pixels.
        classes_N: their classes.
        colors: the last so many features are those of colour.
    """

    features_NF: Floats
    classes_N: NDArray[np.uint8]
    colors: int


def untrained(encoder: str, weights: str, scaling: Scaling, *, classes: int, lab: bool, hidden: int = 0) -> PixelHead:
    """A head in evaluation mode that knows the scaling of its input; see `build_pixel_head`.

    Raises:
        ConfigError: the encoder is unknown or has no feature maps.
        ModelError: the weights are missing or do not fit.
    """
    channels = len(scaling.mean)
    net = build_pixel_head(encoder, classes=classes, weights=weights, channels=channels, lab=int(lab), hidden=hidden)
    net.mean.copy_(torch.tensor(scaling.mean))
    net.std.copy_(torch.tensor(scaling.std))
    return net.eval()


def fit_head(
    settings: HeadedConfig,
    pairs: Iterable[Pair],
    count: int,
    scaling: Scaling,
    *,
    classes: int,
    lab: bool,
    seed: int,
) -> PixelHead:
    """The head that `settings` describes, fitted to windows; see `sample` and `untrained` for the arguments."""
    hidden = int(settings.options(classes=classes, channels=len(scaling.mean))["hidden"])
    net = untrained(settings.encoder, settings.weights, scaling, classes=classes, lab=lab, hidden=hidden)
    samples = sample(net, pairs, count, scaling, seed=seed)
    if hidden:
        fit_hidden(net, samples, settings.head, seed=seed)
    else:
        fit_linear(net, samples, balance=settings.head.balance)
    net.flips = settings.head.flips
    return net


def sample(net: PixelHead, pairs: Iterable[Pair], count: int, scaling: Scaling, *, seed: int = 0) -> Samples:
    """Draw pixels from windows, at most equally many from each, and compute their features.

    Args:
        net: computes the features.
        pairs: windows; what exceeds multiples of 32 px is left out.
        count: number of the windows.
        scaling: from stored values to the network's input.
        seed: of the draw.

    Raises:
        DataError: no pixel is labelled.
    """
    rng = np.random.default_rng(seed)
    most = max(1, MOST_NUMBERS // (sum(net.widths) * max(count, 1)))
    features, classes = [], []
    for whole_CHW, whole_HW in pairs:
        rows, cols = (slice(side // 32 * 32) for side in whole_HW.shape)
        image_CHW, classes_HW = whole_CHW[:, rows, cols], whole_HW[rows, cols]
        # The class in the middle of each square of the features' stride.
        middle_hw = classes_HW[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        known = np.flatnonzero(middle_hw != IGNORE)
        if not len(known):
            continue
        taken = np.sort(rng.choice(known, min(most, len(known)), replace=False))
        with torch.inference_mode():
            maps_Fhw = net.features(torch.from_numpy(scaling.normalize(image_CHW))[None])[0]
            features.append(maps_Fhw.flatten(1)[:, torch.from_numpy(taken)].T.numpy().copy())
        classes.append(middle_hw.ravel()[taken])
    if not features:
        raise DataError("no pixel of the training images is labelled; check the masks and the class table")
    return Samples(np.concatenate(features), np.concatenate(classes), net.widths[-1])


def fit_linear(net: PixelHead, samples: Samples, *, balance: float = 0.5) -> None:
    """Set the weights of a linear head by multinomial logistic regression; a class without a sample is never chosen."""
    every = -(-len(samples.classes_N) // MOST_LINEAR)
    features_NF, classes_N = samples.features_NF[::every], samples.classes_N[::every]
    mean_F, std_F = _moments(features_NF)
    weights_KF = np.zeros(net.first.weight.shape)
    bias_K = np.full(len(net.first.bias), -20.0)
    present = np.unique(classes_N)
    bias_K[present] = 0.0
    if len(present) > 1:
        model = LogisticRegression(C=1 / (_PENALTY * len(classes_N)), tol=1e-3, max_iter=100)
        model.fit((features_NF - mean_F) / std_F, classes_N, sample_weight=_weights(classes_N, balance)[classes_N])
        rows, offsets = model.coef_, model.intercept_
        if len(present) == 2:  # scikit-learn gives one row then, that of the second class
            rows, offsets = np.concatenate([np.zeros_like(rows), rows]), np.concatenate([[0.0], offsets])
        # The standardisation of the features becomes part of the weights.
        weights_KF[present] = rows / std_F
        bias_K[present] = offsets - (rows / std_F) @ mean_F
    net.first.weight.data.copy_(torch.from_numpy(weights_KF))
    net.first.bias.data.copy_(torch.from_numpy(bias_K))


def fit_hidden(net: PixelHead, samples: Samples, settings: HeadConfig, *, seed: int) -> None:
    """Set the weights of a head with `members` x `hidden` units; each member learns alone, from its own seed.

    The mean of the members' logits is one head again: their units side by side, divided by the number of members.
    """
    assert net.last is not None
    classes = net.last.out_channels
    mean_F, std_F = (torch.from_numpy(values) for values in _moments(samples.features_NF))
    weights_K = np.zeros(classes)
    weights = _weights(samples.classes_N, settings.balance)
    weights_K[: len(weights)] = weights
    features_NF = (torch.from_numpy(samples.features_NF) - mean_F) / std_F
    classes_N = torch.from_numpy(samples.classes_N.astype(np.int64))
    members = [
        _member(features_NF, classes_N, torch.from_numpy(weights_K).float(), settings, seed=seed + number)
        for number in range(settings.members)
    ]
    # Standardisation becomes part of the first layer: w (x - m) / s = (w / s) x - (w / s) m.
    first_HF = torch.cat([first.weight for first, _ in members]).detach() / std_F
    net.first.weight.data.copy_(first_HF)
    net.first.bias.data.copy_(torch.cat([first.bias for first, _ in members]).detach() - first_HF @ mean_F)
    net.last.weight.data.copy_(torch.cat([last.weight for _, last in members], dim=1)[..., None, None] / len(members))
    assert net.last.bias is not None
    net.last.bias.data.copy_(torch.stack([last.bias for _, last in members]).mean(dim=0))


def _member(
    features_NF: Tensor, classes_N: Tensor, weights_K: Tensor, settings: HeadConfig, *, seed: int
) -> tuple[nn.Linear, nn.Linear]:
    """The two layers of a member that has learnt from standardised features."""
    torch.manual_seed(seed)
    first, last = nn.Linear(features_NF.shape[1], settings.hidden), nn.Linear(settings.hidden, len(weights_K))
    net = nn.Sequential(nn.Dropout(settings.dropout), first, nn.ReLU(), nn.Dropout(0.3), last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=0.05)
    for step in range(settings.steps):
        batch = torch.randint(0, len(features_NF), (1024,))
        optimizer.param_groups[0]["lr"] = settings.rate * (1 - step / settings.steps)
        loss = nn.functional.cross_entropy(net(features_NF[batch]), classes_N[batch], weights_K)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return first, last


def fit_forest(samples: Samples, *, seed: int = 0) -> RandomForestClassifier:
    """A random forest on the features of colour and texture alone, with classes of equal weight."""
    forest = RandomForestClassifier(
        60, min_samples_leaf=5, max_depth=18, class_weight="balanced_subsample", random_state=seed, n_jobs=1
    )
    return forest.fit(samples.features_NF[:, -samples.colors :], samples.classes_N)


def _moments(features_NF: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each feature; a constant one has the deviation 1."""
    std_F = features_NF.std(axis=0)
    return features_NF.mean(axis=0), np.where(std_F > 0, std_F, np.float32(1))


def _weights(classes_N: NDArray[np.uint8], balance: float) -> NDArray[np.float64]:
    """Weight of each class value, with the mean 1 over the samples."""
    counts = np.bincount(classes_N)
    share = counts / counts.sum()
    weights = np.where(counts > 0, np.maximum(share, 1e-12) ** -balance, 0.0)
    return np.asarray(weights / (weights * share).sum())
