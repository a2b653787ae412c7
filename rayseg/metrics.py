"""Accuracy of a map against a reference: confusion matrices, agreement of clusterings, objects, intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from rayseg.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixel counts by class: row = reference, column = prediction.

    0/0 is NaN. Recall and F1 of a class that is absent from the reference are NaN; its precision and IoU are 0 if it
    was predicted, else NaN.

    Attributes:
        matrix: (K, K) int64; float64 where pixels count with their area.
    """

    matrix: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise DataError(f"the confusion matrix has the shape {self.matrix.shape}, expected a square")

    @classmethod
    def from_arrays(
        cls,
        reference: NDArray[np.integer],
        prediction: NDArray[np.integer],
        classes: int,
        *,
        ignore: int | None = 255,
        weights: NDArray[np.float64] | None = None,
    ) -> "Confusion":
        """Count two label arrays of equal shape.

        Args:
            reference: true class of every pixel, 0..classes-1 or `ignore`.
            prediction: predicted class, the same.
            classes: number of classes K.
            ignore: pixels with this value in either array are not counted; None counts every pixel.
            weights: of every pixel, such as its area; by default 1.

        Raises:
            DataError: the shapes differ, or a counted value is not a class.
        """
        if reference.shape != prediction.shape:
            raise DataError(f"the reference is {reference.shape}, the prediction {prediction.shape}; crop them alike")
        pairs = np.stack([reference.ravel(), prediction.ravel()]).astype(np.int64)
        counted = np.ones(pairs.shape[1], bool) if ignore is None else (pairs != ignore).all(axis=0)
        pairs = pairs[:, counted]
        wrong = pairs[(pairs < 0) | (pairs >= classes)]
        if wrong.size:
            raise DataError(
                f"value {wrong[0]} ({wrong.size} such values) is not a class, expected 0..{classes - 1} or {ignore}"
            )
        # One integer per pair of classes, so that a single bincount counts all pairs.
        own = None if weights is None else weights.ravel()[counted]
        counts = np.bincount(pairs[0] * classes + pairs[1], own, minlength=classes * classes)
        return cls(counts.reshape(classes, classes))

    def merge(self, other: "Confusion") -> "Confusion":
        """The sum of both counts.

        Raises:
            DataError: the numbers of classes differ.
        """
        if self.matrix.shape != other.matrix.shape:
            raise DataError(f"confusions of {len(self.matrix)} and {len(other.matrix)} classes; use one class table")
        return Confusion(self.matrix + other.matrix)

    __add__ = merge

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
        """Share of pixels with the correct class; NaN without pixels."""
        return float(_ratio(self._hits.sum(), self.matrix.sum()))

    @property
    def precision(self) -> Floats:
        """Correct share of the predicted pixels of each class (user's accuracy), (K,)."""
        return _ratio(self._hits, self.matrix.sum(axis=0))

    @property
    def recall(self) -> Floats:
        """Detected share of the reference pixels of each class (producer's accuracy), (K,)."""
        return _ratio(self._hits, self.matrix.sum(axis=1))

    @property
    def f1(self) -> Floats:
        """Harmonic mean of precision and recall of each class, (K,).

        Computed from counts, 2 hits / (reference + prediction): a class that is never predicted has 0, not NaN.
        """
        reference = self.matrix.sum(axis=1)
        f1 = _ratio(2 * self._hits, reference + self.matrix.sum(axis=0))
        return np.where(reference > 0, f1, np.nan)

    @property
    def iou(self) -> Floats:
        """Intersection over union of each class, (K,); NaN only if the class is in neither."""
        return _ratio(self._hits, self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - self._hits)

    @property
    def class_accuracy(self) -> float:
        """Mean recall over the classes in the reference; NaN without any."""
        return _mean(self.recall)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes in the reference or the prediction: a class that is only predicted counts as 0."""
        return _mean(self.iou)

    @property
    def mean_iou_of_reference(self) -> float:
        """Mean IoU over the classes in the reference: a class that is only predicted does not count."""
        return _mean(self.iou[self.matrix.sum(axis=1) > 0])

    @property
    def fw_iou(self) -> float:
        """IoU weighted by each class's share of the reference (frequency-weighted IoU)."""
        # classes without reference pixels have weight 0, and their IoU may be NaN
        share = _ratio(self.matrix.sum(axis=1), self.matrix.sum())
        return float(np.sum(np.where(share > 0, share * self.iou, 0.0))) if self.pixels else float("nan")

    @property
    def _hits(self) -> NDArray[np.int64]:
        return np.diagonal(self.matrix)


def bootstrap(
    confusions: Sequence[Confusion], statistic: Callable[[Confusion], float], *, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of a measure by resampling whole images or tiles (percentile method, Efron 1979).

    Args:
        confusions: one per image or tile, which are independent of each other; pixels are not.
        statistic: measure of the merged counts, e.g. `lambda c: c.mean_iou`.
        n: number of draws.
        seed: of the draws.

    Returns:
        (low, high), the 2.5 and 97.5 % quantiles of the draws that are not NaN; NaN if all are.

    Raises:
        DataError: there is no confusion, or the numbers of classes differ.
    """
    return percentile_interval(np.array([statistic(drawn) for drawn in resampled(confusions, n=n, seed=seed)]))


def resampled(confusions: Sequence[Confusion], *, n: int = 1000, seed: int = 0) -> list[Confusion]:
    """The merged counts of `n` draws of all images or tiles with replacement.

    Raises:
        DataError: there is no confusion, or the numbers of classes differ.
    """
    if not confusions or len({c.matrix.shape for c in confusions}) != 1:
        raise DataError(f"{len(confusions)} confusions were given, expected at least one and all of the same classes")
    matrices_NKK = np.stack([confusion.matrix for confusion in confusions])
    count = len(confusions)
    # how often each image is drawn is multinomial: no index of images is needed
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n)
    return [Confusion(np.tensordot(draw, matrices_NKK, axes=1)) for draw in draws]


def percentile_interval(values_N: Floats) -> tuple[float, float]:
    """(2.5 %, 97.5 %) quantiles of the values that are not NaN; NaN if all are."""
    # a draw without a class can leave the measure undefined
    known = values_N[~np.isnan(values_N)]
    if known.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, ...]:
    """(mean, low, high): 95 % interval of the mean by Student's t; the mean alone of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return (mean,)
    reach = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def agreement(table_RP: NDArray[np.integer]) -> dict[str, float]:
    """Agreement of two clusterings from the table of their pixel counts, which can be summed tile by tile.

    Args:
        table_RP: pixels by reference label (rows) and predicted label (columns); every pixel counts.

    Returns:
        `ami`: adjusted mutual information, 1 for equal clusterings and about 0 for random ones;
        `fmi`: Fowlkes-Mallows index (Fowlkes & Mallows 1983), 1 for equal clusterings;
        `are`: adapted Rand error (Arganda-Carreras et al. 2015), 0 for equal clusterings.

    Raises:
        DataError: the table is empty.
    """
    table = np.asarray(table_RP, np.int64)
    # labels without pixels: their part of the entropy would be 0 log 0
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    total = int(table.sum())
    if not total:
        raise DataError("two clusterings without a pixel in common cannot be compared; give two of the same pixels")
    rows, cols = table.sum(1), table.sum(0)
    # pairs of pixels (times 2, plus the pixels) that share both labels, the reference label, the predicted label
    same, pairs_R, pairs_P = (float((part.astype(np.float64) ** 2).sum()) for part in (table, rows, cols))
    both, ours, theirs = same - total, pairs_P - total, pairs_R - total
    return {
        "ami": _ami(table, rows, cols),
        "fmi": both / np.sqrt(ours * theirs) if ours and theirs else 0.0,
        "are": 1 - 2 * both / (ours + theirs) if ours + theirs else 0.0,
    }


def _ami(table_RP: NDArray[np.int64], rows_R: NDArray[np.int64], cols_P: NDArray[np.int64]) -> float:
    """Adjusted mutual information (Vinh et al. 2010) with the arithmetic mean of the entropies, as in scikit-learn."""
    # two clusterings of one cluster each are equal, but the formula gives 0/0
    if len(rows_R) == 1 and len(cols_P) == 1:
        return 1.0
    total = table_RP.sum()
    shared = mutual_info_score(None, None, contingency=table_RP)
    expected = expected_mutual_information(table_RP, total)
    entropies = [-float(np.sum(part / total * np.log(part / total))) for part in (rows_R, cols_P)]
    # (MI - E[MI]) / (mean entropy - E[MI])
    largest = float(np.mean(entropies)) - expected
    tiny = np.finfo(float).eps  # the denominator may not be 0, and keeps its sign
    return float((shared - expected) / (min(largest, -tiny) if largest < 0 else max(largest, tiny)))


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    """`part / whole` in float64, NaN where `whole` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(np.asarray(whole) > 0, np.true_divide(part, whole), np.nan), np.float64)


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


# -- objects ----------------------------------------------------------------------------------------------------------

MATCHED = 0.5
"""IoU above which a predicted object is a reference object; each then has one partner at most."""
SIZES = ("small", "medium", "large")
_SUMS = ("reference", "matched", "iou", "best", "found", "over", "under")
"""Sums over the reference objects."""


@dataclass(frozen=True, eq=False)
class Objects:
    """Reference and predicted objects over the same pixels; objects of one side do not overlap.

    Attributes:
        reference_N: pixels of each reference object, at least 1.
        predicted_M: pixels of each predicted object, at least 1.
        pairs_P2: positions of a reference and a predicted object that share pixels.
        shared_P: the number of these pixels.
    """

    reference_N: NDArray[np.int64]
    predicted_M: NDArray[np.int64]
    pairs_P2: NDArray[np.int64]
    shared_P: NDArray[np.int64]

    @property
    def limits(self) -> Floats:
        """The largest small and the largest medium size in px: thirds of the reference objects, (2,)."""
        return np.quantile(self.reference_N, [1 / 3, 2 / 3]) if len(self.reference_N) else np.zeros(2)

    def sums(self, units: tuple[NDArray[np.int64], NDArray[np.int64]], count: int) -> dict[str, Floats]:
        """What the measures are ratios of, per unit of the bootstrap.

        Args:
            units: unit (0..count-1) of each reference object and of each predicted object.
            count: number of units.

        Returns:
            Numbers of `reference`, `matched` (of the reference), `predicted` and `hits` (matched of the predicted), of
            `found` reference objects, which share a pixel with any, and sums over the reference objects: `iou` of the
            matched ones, `best` IoU, `over` and `under` segmentation of those found; each (count,). The same by size
            with the prefixes "small ", "medium " and "large ", by `limits`.
        """
        # 1. IoU of all pairs, the best of each object, and over- and undersegmentation
        ones, others = self.pairs_P2.T
        iou_P = self.shared_P / (self.reference_N[ones] + self.predicted_M[others] - self.shared_P)
        best_N, hit_M = np.zeros(len(self.reference_N)), np.zeros(len(self.predicted_M))
        np.maximum.at(best_N, ones, iou_P)
        np.maximum.at(hit_M, others, iou_P)
        # Over- and undersegmentation by the predicted object that shares most (Clinton et al. 2010, PE&RS 76).
        over_N, under_N = np.zeros(len(self.reference_N)), np.zeros(len(self.reference_N))
        order = np.argsort(self.shared_P, kind="stable")  # the largest share last: it stays
        over_N[ones[order]] = 1 - (self.shared_P / self.reference_N[ones])[order]
        under_N[ones[order]] = 1 - (self.shared_P / self.predicted_M[others])[order]
        # 2. sums per unit, over all objects and by size
        matched_N = best_N > MATCHED
        of_N = (np.ones(len(best_N)), matched_N, np.where(matched_N, best_N, 0.0), best_N, best_N > 0, over_N, under_N)
        size_N, size_M = (np.searchsorted(self.limits, sizes) for sizes in (self.reference_N, self.predicted_M))
        sums: dict[str, Floats] = {}
        for prefix, those_N, those_M in [
            ("", np.ones(len(size_N), bool), np.ones(len(size_M), bool)),
            *((f"{name} ", size_N == k, size_M == k) for k, name in enumerate(SIZES)),
        ]:
            for name, values_N in zip(_SUMS, of_N, strict=True):
                sums[prefix + name] = np.bincount(units[0], weights=values_N * those_N, minlength=count).astype(float)
            sums[f"{prefix}predicted"] = np.bincount(units[1], weights=those_M, minlength=count).astype(float)
            hits_M = (hit_M > MATCHED) & those_M
            sums[f"{prefix}hits"] = np.bincount(units[1], weights=hits_M, minlength=count).astype(float)
        return sums


def object_measures(sums: Mapping[str, Floats]) -> dict[str, Floats]:
    """Measures of objects from the sums of `Objects.sums`, over any units; NaN where nothing can be measured.

    `precision`, `recall` and `f1` of objects that match at an IoU above .5; `best_iou`, the mean IoU of the reference
    objects with the best predicted one; `pq`, panoptic quality (Kirillov et al. 2019, CVPR); `over_segmentation` and
    `under_segmentation`, 0 for none, means over the reference objects
    that share a pixel with a predicted one. With the sums `boundary ...`, `boundary_f1`; with
    `covered` and `either`, `covered_iou` of the pixels under any object.
    """

    def ratio(part: Floats, whole: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(whole > 0, part / whole, np.nan)

    # Denominator of F1 and of panoptic quality: matches + half of the unmatched of both sides.
    both = (sums["reference"] + sums["predicted"]) / 2
    measures = {
        "f1": ratio((sums["matched"] + sums["hits"]) / 2, both),
        "precision": ratio(sums["hits"], sums["predicted"]),
        "recall": ratio(sums["matched"], sums["reference"]),
        "best_iou": ratio(sums["best"], sums["reference"]),
        "pq": ratio(sums["iou"], both),
        "over_segmentation": ratio(sums["over"], sums["found"]),
        "under_segmentation": ratio(sums["under"], sums["found"]),
    }
    if "boundary reference" in sums:
        precision = ratio(sums["boundary hits"], sums["boundary predicted"])
        recall = ratio(sums["boundary matched"], sums["boundary reference"])
        measures["boundary_f1"] = ratio(2 * precision * recall, precision + recall)
        measures["covered_iou"] = ratio(sums["covered"], sums["either"])
    return measures


def object_intervals(sums: Mapping[str, Floats], *, n: int = 1000, seed: int = 0) -> dict[str, dict[str, float | None]]:
    """Measure -> value, low and high (95 % bootstrap over the units); no interval for a single unit, None for NaN."""
    count = len(sums["reference"])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n)
    whole = object_measures({name: values.sum(keepdims=True) for name, values in sums.items()})
    drawn = object_measures({name: draws @ values for name, values in sums.items()})
    rows = {}
    for name, value in whole.items():
        low, high = percentile_interval(drawn[name]) if count > 1 else (float("nan"), float("nan"))
        row = {"value": float(value[0]), "low": low, "high": high}
        rows[name] = {key: None if np.isnan(part) else part for key, part in row.items()}
    return rows


# -- estimates from a stratified sample -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An estimate with its standard error."""

    value: float
    error: float

    def to_row(self, scale: float = 1.0) -> dict[str, float | None]:
        """Value, standard error and 95 % interval (normal) of a share, times `scale`; None where it is not defined."""
        if math.isnan(self.value):
            return dict.fromkeys(("value", "error", "low", "high"))
        ends = (max(0.0, self.value - Z * self.error), min(1.0, self.value + Z * self.error))
        row = {"value": self.value, "error": self.error, "low": ends[0], "high": ends[1]}
        return {name: number * scale for name, number in row.items()}


Z = 1.959964
"""Quantile of the normal distribution for 95 % intervals."""


def stratified_mean(values_N: Floats, strata_N: NDArray[np.integer], weights_H: Floats) -> Estimate:
    """Mean of a variable over all strata (Stehman 2014, equations 3 and 25).

    Args:
        values_N: the variable at the sampled units.
        strata_N: stratum 0..H-1 of each; every stratum with a weight has two units or more.
        weights_H: shares of the strata in the whole, sum 1.
    """
    return stratified_ratio(values_N, np.ones(len(values_N)), strata_N, weights_H)


def stratified_ratio(parts_N: Floats, wholes_N: Floats, strata_N: NDArray[np.integer], weights_H: Floats) -> Estimate:
    """Ratio of the means of two variables over all strata (Stehman 2014, equations 27 and 28); NaN for 0/0.

    With strata that are the map's classes this is Olofsson et al. 2014, equations 1 to 11: user's accuracy is the
    ratio of correct to mapped units, producer's accuracy that of correct to reference units.

    Args:
        parts_N: the numerator at the sampled units.
        wholes_N: the denominator at the sampled units; 1 everywhere estimates the mean of `parts_N`.
        strata_N: as in `stratified_mean`.
        weights_H: as in `stratified_mean`.
    """
    whole = part = variance = 0.0
    for stratum, weight in enumerate(weights_H):
        of_it = strata_N == stratum
        whole += weight * wholes_N[of_it].mean() if weight else 0.0
        part += weight * parts_N[of_it].mean() if weight else 0.0
    if not whole:
        return Estimate(float("nan"), float("nan"))
    ratio = part / whole
    for stratum, weight in enumerate(weights_H):
        if weight:
            residuals = (parts_N - ratio * wholes_N)[strata_N == stratum]
            variance += weight**2 * residuals.var(ddof=1) / len(residuals)
    return Estimate(ratio, math.sqrt(variance) / whole)


def slope(values_N: Floats, auxiliary_N: Floats, strata_N: NDArray[np.integer], weights_H: Floats) -> float:
    """Coefficient of the combined regression estimator (Cochran 1977, equation 7.47); 0 for a constant auxiliary.

    Args:
        values_N: the variable at the sampled units.
        auxiliary_N: a variable at the same units that is known for all units of the population.
        strata_N: as in `stratified_mean`.
        weights_H: as in `stratified_mean`.
    """
    shared = own = 0.0
    for stratum, weight in enumerate(weights_H):
        of_it = strata_N == stratum
        if weight:
            x, y = auxiliary_N[of_it], values_N[of_it]
            factor = weight**2 / (len(x) * (len(x) - 1))
            shared += factor * float((x - x.mean()) @ (y - y.mean()))
            own += factor * float((x - x.mean()) @ (x - x.mean()))
    return shared / own if own > 0 else 0.0


def regression_mean(
    values_N: Floats, auxiliary_N: Floats, strata_N: NDArray[np.integer], weights_H: Floats, *, mean: float
) -> Estimate:
    """Mean of a variable over all strata, assisted by an auxiliary (combined regression; Cochran 1977, section 7.10).

    The closer the auxiliary follows the variable, the smaller is the error; with any auxiliary it is nearly unbiased.

    Args:
        values_N: see `slope`.
        auxiliary_N: see `slope`.
        strata_N: as in `stratified_mean`.
        weights_H: as in `stratified_mean`.
        mean: of the auxiliary over the population.
    """
    b = slope(values_N, auxiliary_N, strata_N, weights_H)
    rest = stratified_mean(values_N - b * auxiliary_N, strata_N, weights_H)
    return Estimate(rest.value + b * mean, rest.error)


def allocation(total: int, weights_H: Floats, deviations_H: Floats, least: int) -> NDArray[np.int64]:
    """Units of each stratum by Neyman's allocation: in proportion to weight x deviation, `least` or more each.

    Args:
        total: units in all; exceeded where `least` units of each are more.
        weights_H: shares of the strata.
        deviations_H: expected standard deviation of the variable in each.
        least: smallest number of units of a stratum with a weight.
    """
    shares = weights_H * deviations_H
    shares = shares / shares.sum() if shares.sum() else weights_H
    return np.where(weights_H > 0, np.maximum(least, np.rint(total * shares)), 0).astype(np.int64)
