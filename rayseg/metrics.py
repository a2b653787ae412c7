"""Measures of a map against a reference: confusion matrices, bootstrap intervals, agreement of clusterings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import adapted_rand_error
from sklearn.metrics import adjusted_mutual_info_score, fowlkes_mallows_score, mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from rayseg.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixel counts by class: row = reference, column = prediction.

    Measures follow the usual definitions; 0/0 is nan. A class absent from the reference has recall and F1 nan; if it
    was predicted its precision and IoU are 0, if it was not they are nan.

    Attributes:
        matrix: (K, K) int64.
    """

    matrix: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise DataError(f"a confusion matrix of shape {self.matrix.shape} was found, expected a square")

    @classmethod
    def from_arrays(
        cls, reference: NDArray[np.integer], prediction: NDArray[np.integer], classes: int, *, ignore: int | None = 255
    ) -> "Confusion":
        """Count two label arrays of equal shape.

        Args:
            reference: true class of every pixel, 0..classes-1 or `ignore`.
            prediction: predicted class, the same.
            classes: number of classes K.
            ignore: value that leaves a pixel uncounted where either array holds it; None counts every pixel.

        Raises:
            DataError: the shapes differ, or a counted value is no class.
        """
        if reference.shape != prediction.shape:
            raise DataError(f"the reference is {reference.shape} but the prediction {prediction.shape}: cut both alike")
        pairs = np.stack([reference.ravel(), prediction.ravel()]).astype(np.int64)
        if ignore is not None:
            pairs = pairs[:, (pairs != ignore).all(axis=0)]
        wrong = pairs[(pairs < 0) | (pairs >= classes)]
        if wrong.size:
            raise DataError(
                f"value {wrong[0]} ({wrong.size} values in all) is no class, expected 0..{classes - 1} or {ignore}"
            )
        counts = np.bincount(pairs[0] * classes + pairs[1], minlength=classes * classes)
        return cls(counts.reshape(classes, classes).astype(np.int64))

    def merge(self, other: "Confusion") -> "Confusion":
        """The counts of both together.

        Raises:
            DataError: they count different numbers of classes.
        """
        if self.matrix.shape != other.matrix.shape:
            raise DataError(f"cannot add confusions of {len(self.matrix)} and {len(other.matrix)} classes")
        return Confusion(self.matrix + other.matrix)

    def __add__(self, other: "Confusion") -> "Confusion":
        return self.merge(other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Confusion) and np.array_equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash((self.matrix.shape, self.matrix.tobytes()))

    @property
    def pixels(self) -> int:
        """Pixels counted."""
        return int(self.matrix.sum())

    @property
    def overall_accuracy(self) -> float:
        """Share of pixels whose class is right; nan without pixels."""
        return float(_ratio(self._hits.sum(), self.matrix.sum()))

    @property
    def precision(self) -> Floats:
        """Right share of what was predicted (user's accuracy), per class."""
        return _ratio(self._hits, self.matrix.sum(axis=0))

    @property
    def recall(self) -> Floats:
        """Found share of what is there (producer's accuracy), per class."""
        return _ratio(self._hits, self.matrix.sum(axis=1))

    @property
    def f1(self) -> Floats:
        """Harmonic mean of precision and recall, per class.

        Written with counts (2 hits / (reference + prediction)), so a class that is there but never predicted has 0;
        nan where the class is absent from the reference.
        """
        reference = self.matrix.sum(axis=1)
        f1 = _ratio(2 * self._hits, reference + self.matrix.sum(axis=0))
        return np.where(reference > 0, f1, np.nan)

    @property
    def iou(self) -> Floats:
        """Intersection over union, per class; nan only where the class is in neither."""
        return _ratio(self._hits, self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - self._hits)

    @property
    def class_accuracy(self) -> float:
        """Mean recall over the classes that the reference holds; nan without any."""
        return _mean(self.recall)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes in the reference or the prediction: one that is only predicted counts 0."""
        return _mean(self.iou)

    @property
    def mean_iou_of_reference(self) -> float:
        """Mean IoU over the classes that the reference holds: one that is only predicted is left out."""
        return _mean(self.iou[self.matrix.sum(axis=1) > 0])

    @property
    def fw_iou(self) -> float:
        """IoU weighted by each class's share of the reference (frequency-weighted IoU)."""
        share = _ratio(self.matrix.sum(axis=1), self.matrix.sum())
        return float(np.sum(np.where(share > 0, share * self.iou, 0.0))) if self.pixels else float("nan")

    @property
    def _hits(self) -> NDArray[np.int64]:
        return np.diagonal(self.matrix)


def bootstrap(
    confusions: Sequence[Confusion], statistic: Callable[[Confusion], float], *, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a measure, by drawing whole images (or tiles) with replacement (Efron's percentile method).

    Args:
        confusions: one per image or tile: the units that are independent, unlike pixels.
        statistic: measure of the merged counts, e.g. `lambda c: c.mean_iou`.
        n: number of draws.
        seed: seed of the draws.

    Returns:
        (low, high): 2.5 and 97.5 % quantiles over the draws, those with nan left out; nan if all are nan.

    Raises:
        DataError: there is no confusion, or they count different numbers of classes.
    """
    return percentile_interval(np.array([statistic(drawn) for drawn in resampled(confusions, n=n, seed=seed)]))


def resampled(confusions: Sequence[Confusion], *, n: int = 1000, seed: int = 0) -> list[Confusion]:
    """The merged counts of `n` draws of all images (or tiles) with replacement.

    Raises:
        DataError: there is no confusion, or they count different numbers of classes.
    """
    if not confusions or len({c.matrix.shape for c in confusions}) != 1:
        raise DataError(f"found {len(confusions)} confusions, expected at least one and all of the same classes")
    matrices_NKK = np.stack([confusion.matrix for confusion in confusions])
    count = len(confusions)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n)
    return [Confusion(np.tensordot(draw, matrices_NKK, axes=1)) for draw in draws]


def percentile_interval(values_N: Floats) -> tuple[float, float]:
    """(2.5 %, 97.5 %) quantiles of the values that are not nan; nan when all are."""
    known = values_N[~np.isnan(values_N)]
    if known.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def ami(reference: NDArray[np.integer], prediction: NDArray[np.integer]) -> float:
    """Adjusted mutual information of two clusterings (arithmetic mean): 1 alike, about 0 by chance."""
    return float(adjusted_mutual_info_score(*_flat(reference, prediction), average_method="arithmetic"))


def fmi(reference: NDArray[np.integer], prediction: NDArray[np.integer]) -> float:
    """Fowlkes-Mallows index of two clusterings: 1 alike, near 0 unlike."""
    return float(fowlkes_mallows_score(*_flat(reference, prediction)))


def are(reference: NDArray[np.integer], prediction: NDArray[np.integer]) -> float:
    """Adapted Rand error of two clusterings: 0 alike, 1 unlike.

    Pixels with reference label 0 are not counted, as is scikit-image's default; AMI and FMI count them.
    """
    error, _, _ = adapted_rand_error(*_flat(reference, prediction), ignore_labels=(0,))
    return float(error)


def agreement(table_RP: NDArray[np.integer]) -> dict[str, float]:
    """`ami`, `fmi` and `are` of two clusterings by how many pixels each pair of labels shares; every pixel counts.

    The same as of the pixels themselves, without holding them: a scene's table is added up tile by tile.

    Args:
        table_RP: pixels by reference label (rows) and predicted label (columns).
    """
    table = np.asarray(table_RP, np.int64)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    total = int(table.sum())
    if not total:
        raise DataError("two clusterings without a pixel in common cannot be compared: give two of the same pixels")
    rows, cols = table.sum(1), table.sum(0)
    same, pairs_R, pairs_P = (float((part.astype(np.float64) ** 2).sum()) for part in (table, rows, cols))
    both, ours, theirs = same - total, pairs_P - total, pairs_R - total
    return {
        "ami": _ami(table, rows, cols),
        "fmi": both / np.sqrt(ours * theirs) if ours and theirs else 0.0,
        "are": 1 - 2 * both / (ours + theirs) if ours + theirs else 0.0,
    }


def _ami(table_RP: NDArray[np.int64], rows_R: NDArray[np.int64], cols_P: NDArray[np.int64]) -> float:
    """Vinh et al. 2010, arithmetic mean of the entropies, as scikit-learn has it."""
    if len(rows_R) == 1 and len(cols_P) == 1:
        return 1.0
    total = table_RP.sum()
    shared = mutual_info_score(None, None, contingency=table_RP)
    expected = expected_mutual_information(table_RP, total)
    entropies = [-float(np.sum(part / total * np.log(part / total))) for part in (rows_R, cols_P)]
    spare = float(np.mean(entropies)) - expected
    return float(
        (shared - expected) / (min(spare, -np.finfo(float).eps) if spare < 0 else max(spare, np.finfo(float).eps))
    )


def _flat(a: NDArray[np.integer], b: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    if a.shape != b.shape or a.size == 0:
        raise DataError(f"cannot compare clusterings of shapes {a.shape} and {b.shape}: give two of the same pixels")
    return a.ravel(), b.ravel()


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    """`part / whole` in float64, nan where `whole` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(np.asarray(whole) > 0, np.true_divide(part, whole), np.nan), np.float64)


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
