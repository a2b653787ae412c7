"""Which unlabelled images are worth a label: how many are asked for when, and the strategies that choose them.

All strategies are functions of arrays; of equal images the first is taken, so the same arrays give the same choice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayseg.errors import ConfigError

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]


@dataclass(frozen=True)
class Budget:
    """How labels are asked for (Desai & Ghose 2022, section 3).

    Attributes:
        target: images that get a label in all.
        initial: of these, drawn at random before anything is learnt.
        query: asked for after each training; the last query takes what is left.
        queries: number of trainings that end with a query.
    """

    target: int
    initial: int
    query: int
    queries: int


def budget(images: int, ratio: float, *, alpha: float, beta: float, count_pool: bool = True) -> Budget:
    """The numbers of images to label.

    Args:
        images: in the pool.
        ratio: share of them to be labelled; the target is rounded up.
        alpha: share of the target that is drawn at random first, rounded down, at least one image.
        beta: size of a query relative to that, rounded up.
        count_pool: the first ones count. Without, the target is of queried images alone, as in the published code.
    """
    target = min(math.ceil(ratio * images), images)
    initial = max(int(alpha * target), 1)
    query = max(math.ceil(beta * initial), 1)
    left = target - initial if count_pool else min(target, images - initial)
    return Budget(target, initial, query, math.ceil(left / query))


def expect_enough(images: int, ratio: float, classes: int) -> None:
    """Refuse a share of the images that gives fewer than one per class.

    Raises:
        ConfigError: it does; the message has the least share possible.
    """
    target = math.ceil(ratio * images)
    if target >= classes:
        return
    if images < classes:
        raise ConfigError(f"the pool has {images} images for {classes} classes, expected one per class; add imagery")
    least = math.ceil(1e4 * (classes - 1) / images) / 1e4
    least += 1e-4 if math.ceil(least * images) < classes else 0.0
    raise ConfigError(
        f"ratio {ratio:g} of {images} images gives {target} to label, fewer than one for each of {classes} classes; "
        f"the least possible is {least:.4f}"
    )


def entropy(p_NK: NDArray[np.floating]) -> Floats:
    """Shannon entropy in nats of every row, after its sum is made 1."""
    p = np.asarray(p_NK, np.float64)
    p = p / p.sum(axis=1, keepdims=True)
    return np.asarray(-np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=1), np.float64)


def margin(p_NK: NDArray[np.floating]) -> Floats:
    """Difference of the two highest probabilities of every row."""
    top = np.sort(np.asarray(p_NK, np.float64), axis=1)
    return np.asarray(top[:, -1] - top[:, -2] if top.shape[1] > 1 else top[:, -1], np.float64)


def confidence(p_NK: NDArray[np.floating]) -> Floats:
    """Highest probability of every row."""
    return np.asarray(np.max(p_NK, axis=1), np.float64)


@dataclass(frozen=True)
class Pool:
    """What a classifier says of the images that have no label yet, and what it sees in all of them.

    Attributes:
        p_NK: class probabilities of the unlabelled images.
        features_NF: their features, the input of the classifier's last layer; only k-center and badge look at them.
        labelled_MF: features of the labelled images.
    """

    p_NK: NDArray[np.floating]
    features_NF: NDArray[np.floating]
    labelled_MF: NDArray[np.floating]


@dataclass(frozen=True)
class Choice:
    """Images chosen, the most wanted first, and the number each was chosen for.

    Attributes:
        positions: into the rows of the pool.
        scores: entropy, margin, highest probability, distance or a random number, as `SCORES` says.
    """

    positions: Positions
    scores: Floats


def _by(score: Callable[[NDArray[np.floating]], Floats], sign: float) -> Callable[..., Choice]:
    def chosen(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
        scores = score(pool.p_NK)
        positions = np.argsort(sign * scores, kind="stable")[:count]
        return Choice(positions, scores[positions])

    return chosen


def _random(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
    scores = rng.random(len(pool.p_NK))
    positions = np.argsort(-scores, kind="stable")[:count]
    return Choice(positions, scores[positions])


def _k_center(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
    """Greedy k-centre (Sener & Savarese 2018): again and again the image farthest from all labelled and chosen."""
    features = np.asarray(pool.features_NF, np.float64)
    gaps = _squares(features, np.asarray(pool.labelled_MF, np.float64)).min(axis=1, initial=np.inf)
    positions: list[int] = []
    scores: list[float] = []
    for _ in range(min(count, len(features))):
        farthest = int(np.argmax(gaps))
        positions.append(farthest)
        scores.append(float(np.sqrt(gaps[farthest])))
        gaps = np.minimum(gaps, _squares(features, features[[farthest]])[:, 0])
        gaps[positions] = -1.0
    return Choice(np.array(positions, np.intp), np.array(scores))


def _squares(a_NF: Floats, b_MF: Floats) -> Floats:
    """Squared distances (N, M)."""
    found = (a_NF**2).sum(axis=1)[:, None] + (b_MF**2).sum(axis=1) - 2 * a_NF @ b_MF.T
    return np.asarray(np.maximum(found, 0.0), np.float64)


def _badge(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
    """k-means++ over the gradients of the last layer for the class each image seems to be of (Ash et al. 2020).

    A gradient is the outer product of (p - one-hot of the likeliest class) and the features; distances of such
    products need the two factors alone. The first is the longest gradient, the others are drawn by squared distance.
    """
    residual = np.asarray(pool.p_NK, np.float64).copy()
    residual[np.arange(len(residual)), residual.argmax(axis=1)] -= 1.0
    features = np.asarray(pool.features_NF, np.float64)
    lengths = (residual**2).sum(axis=1) * (features**2).sum(axis=1)
    gaps = np.full(len(features), np.inf)
    positions: list[int] = []
    scores: list[float] = []
    for number in range(min(count, len(features))):
        at = int(np.argmax(lengths)) if number == 0 else _drawn(gaps, positions, rng)
        positions.append(at)
        scores.append(float(lengths[at] if number == 0 else gaps[at]))
        products = (residual @ residual[at]) * (features @ features[at])
        gaps = np.minimum(gaps, np.maximum(lengths + lengths[at] - 2 * products, 0.0))
        gaps[positions] = 0.0
    return Choice(np.array(positions, np.intp), np.sqrt(scores))


def _drawn(weights: Floats, taken: list[int], rng: np.random.Generator) -> int:
    """A position drawn by weight; the first that is not taken where all weights are 0."""
    if weights.sum() > 0:
        return int(rng.choice(len(weights), p=weights / weights.sum()))
    return int(np.setdiff1d(np.arange(len(weights)), taken)[0])


STRATEGIES: Mapping[str, Callable[[Pool, int, np.random.Generator], Choice]] = {
    "margin": _by(margin, 1.0),
    "entropy": _by(entropy, -1.0),
    "least-confidence": _by(confidence, 1.0),
    "random": _random,
    "k-center": _k_center,
    "badge": _badge,
}
"""name -> (pool, count, generator) -> choice."""

SCORES: Mapping[str, str] = {
    "margin": "difference of the two highest probabilities",
    "entropy": "entropy of the probabilities in nats",
    "least-confidence": "highest probability",
    "random": "random number",
    "k-center": "distance to the nearest labelled or chosen image",
    "badge": "distance to the nearest chosen gradient",
}
"""What the scores of a strategy are."""
FEATURES = frozenset({"k-center", "badge"})
"""Strategies that look at features."""
