"""Active learning: the budget of labels, and the strategies that choose unlabelled images to label.

All strategies are functions of arrays. Of images with equal scores the first is taken, so the same arrays give the same
choice.
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
    """The schedule of label queries (Desai & Ghose 2022, section 3).

    Attributes:
        target: number of images to label in all.
        initial: number of these drawn at random before the first training.
        query: images per query, one query after each training; the last query takes the remaining images.
        queries: number of queries.
    """

    target: int
    initial: int
    query: int
    queries: int


def budget(images: int, ratio: float, *, alpha: float, beta: float, count_pool: bool = True) -> Budget:
    """Compute the numbers of images to label.

    Args:
        images: size of the pool.
        ratio: share of the pool to label; the target is rounded up.
        alpha: share of the target drawn at random first, rounded down, at least one image.
        beta: size of a query relative to the initial draw, rounded up.
        count_pool: count the initial images towards the target; the published code counts queried images alone.
    """
    target = min(math.ceil(ratio * images), images)
    initial = max(int(alpha * target), 1)
    query = max(math.ceil(beta * initial), 1)
    queried = target - initial if count_pool else min(target, images - initial)
    return Budget(target, initial, query, math.ceil(queried / query))


def expect_enough(images: int, ratio: float, classes: int) -> None:
    """Check that a share of the images gives at least one label per class.

    Raises:
        ConfigError: it gives fewer; the message has the least share possible.
    """
    target = math.ceil(ratio * images)
    if target >= classes:
        return
    if images < classes:
        raise ConfigError(f"the pool has {images} images for {classes} classes, expected one per class; add imagery")
    least = math.ceil(1e4 * (classes - 1) / images) / 1e4
    least += 1e-4 if math.ceil(least * images) < classes else 0.0  # rounding may fall just short
    raise ConfigError(
        f"ratio {ratio:g} of {images} images gives {target} to label, fewer than one for each of {classes} classes; "
        f"the least possible is {least:.4f}"
    )


def entropy(p_NK: NDArray[np.floating]) -> Floats:
    """Shannon entropy in nats of every row, scaled to sum 1 first."""
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
    """A classifier's output for the unlabelled images, and its features of all images.

    Attributes:
        p_NK: class probabilities of the unlabelled images.
        features_NF: their features, the input of the classifier's last layer; only k-center and badge use them.
        labelled_MF: features of the labelled images.
    """

    p_NK: NDArray[np.floating]
    features_NF: NDArray[np.floating]
    labelled_MF: NDArray[np.floating]


@dataclass(frozen=True)
class Choice:
    """The chosen images, best first, and their scores.

    Attributes:
        positions: rows of the pool.
        scores: entropy, margin, highest probability, distance or a random number, see `SCORES`.
    """

    positions: Positions
    scores: Floats


def _ranked(score: Callable[[Pool, np.random.Generator], Floats], sign: float) -> Callable[..., Choice]:
    """A strategy that takes the images of the lowest `sign` x score."""

    def choose(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
        scores = score(pool, rng)
        positions = np.argsort(sign * scores, kind="stable")[:count]
        return Choice(positions, scores[positions])

    return choose


def _k_center(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
    """Greedy k-centre (Sener & Savarese 2018): repeatedly the image farthest from all labelled and chosen ones."""
    features = np.asarray(pool.features_NF, np.float64)
    gaps = _squares(features, np.asarray(pool.labelled_MF, np.float64)).min(axis=1, initial=np.inf)
    positions: list[int] = []
    scores: list[float] = []
    for _ in range(min(count, len(features))):
        farthest = int(np.argmax(gaps))
        positions.append(farthest)
        scores.append(float(np.sqrt(gaps[farthest])))
        gaps = np.minimum(gaps, _squares(features, features[[farthest]])[:, 0])
        gaps[positions] = -1.0  # below every distance, also where all images are equal
    return Choice(np.array(positions, np.intp), np.array(scores))


def _squares(a_NF: Floats, b_MF: Floats) -> Floats:
    """Squared distances (N, M)."""
    squares_NM = (a_NF**2).sum(axis=1)[:, None] + (b_MF**2).sum(axis=1) - 2 * a_NF @ b_MF.T
    return np.asarray(np.maximum(squares_NM, 0.0), np.float64)  # rounding can make them negative


def _badge(pool: Pool, count: int, rng: np.random.Generator) -> Choice:
    """k-means++ over the gradients of the last layer for the likeliest class of each image (Ash et al. 2020).

    A gradient is the outer product of (p - one-hot of the likeliest class) and the features; distances between such
    products follow from the two factors. The first choice is the longest gradient, the others are drawn by squared
    distance.
    """
    residual = np.asarray(pool.p_NK, np.float64).copy()
    residual[np.arange(len(residual)), residual.argmax(axis=1)] -= 1.0
    features = np.asarray(pool.features_NF, np.float64)
    # |a b^T|^2 = |a|^2 |b|^2: the products themselves, K x F numbers per image, are never formed.
    lengths = (residual**2).sum(axis=1) * (features**2).sum(axis=1)
    gaps = np.full(len(features), np.inf)
    positions: list[int] = []
    scores: list[float] = []
    for number in range(min(count, len(features))):
        if number == 0:
            at = int(np.argmax(lengths))
        elif gaps.sum() > 0:
            at = int(rng.choice(len(gaps), p=gaps / gaps.sum()))
        else:  # all remaining gradients equal a chosen one
            at = int(np.setdiff1d(np.arange(len(gaps)), positions)[0])
        positions.append(at)
        scores.append(float(lengths[at] if number == 0 else gaps[at]))
        # <a b^T, c d^T> = (a . c)(b . d), and |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>
        products = (residual @ residual[at]) * (features @ features[at])
        gaps = np.minimum(gaps, np.maximum(lengths + lengths[at] - 2 * products, 0.0))
        gaps[positions] = 0.0
    return Choice(np.array(positions, np.intp), np.sqrt(scores))


STRATEGIES: Mapping[str, Callable[[Pool, int, np.random.Generator], Choice]] = {
    "margin": _ranked(lambda pool, rng: margin(pool.p_NK), 1.0),
    "entropy": _ranked(lambda pool, rng: entropy(pool.p_NK), -1.0),
    "least-confidence": _ranked(lambda pool, rng: confidence(pool.p_NK), 1.0),
    "random": _ranked(lambda pool, rng: rng.random(len(pool.p_NK)), -1.0),
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
"""Meaning of a strategy's scores."""
FEATURES = frozenset({"k-center", "badge"})
"""Strategies that use features."""
