import pickle
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import adapted_rand_error
from sklearn.metrics import adjusted_mutual_info_score, fowlkes_mallows_score
from sklearn.metrics.cluster import contingency_matrix

from rayseg.errors import DataError
from rayseg.metrics import Confusion, agreement, bootstrap, mean_interval

REFERENCE = np.array([[0, 0, 1, 1], [0, 255, 1, 2]], np.uint8)
PREDICTION = np.array([[0, 1, 1, 1], [0, 1, 255, 0]], np.uint8)


def confusion_of(seed: int, size: int = 50, classes: int = 3) -> Confusion:
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, classes, size)
    prediction = np.where(rng.random(size) < 0.3, rng.integers(0, classes, size), reference)
    return Confusion.from_arrays(reference, prediction, classes)


def test_rows_are_the_reference_and_ignored_pixels_count_nowhere():
    confusion = Confusion.from_arrays(REFERENCE, PREDICTION, 3)
    np.testing.assert_array_equal(confusion.matrix, [[2, 1, 0], [0, 2, 0], [1, 0, 0]])
    assert confusion.matrix.dtype == np.int64
    assert confusion.pixels == 6


def test_measures_by_hand():
    confusion = Confusion.from_arrays(REFERENCE, PREDICTION, 3)
    assert confusion.overall_accuracy == pytest.approx(4 / 6)
    np.testing.assert_allclose(confusion.precision, [2 / 3, 2 / 3, np.nan])
    np.testing.assert_allclose(confusion.recall, [2 / 3, 1, 0])
    np.testing.assert_allclose(confusion.f1, [2 / 3, 4 / 5, 0])
    np.testing.assert_allclose(confusion.iou, [1 / 2, 2 / 3, 0])
    assert confusion.mean_iou == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert confusion.fw_iou == pytest.approx(3 / 6 * 1 / 2 + 2 / 6 * 2 / 3)
    assert confusion.class_accuracy == pytest.approx(5 / 9)


def test_a_class_only_predicted_counts_zero_in_one_mean_and_not_at_all_in_the_other():
    confusion = Confusion(np.array([[8, 2, 0], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(confusion.iou, [0.8, 0, np.nan])
    np.testing.assert_allclose(confusion.recall, [0.8, np.nan, np.nan])
    np.testing.assert_allclose(confusion.f1, [16 / 18, np.nan, np.nan])
    assert confusion.mean_iou == pytest.approx(0.4)
    assert confusion.mean_iou_of_reference == pytest.approx(0.8)
    assert confusion.fw_iou == pytest.approx(0.8)


def test_nothing_counted_gives_nan_and_no_warning():
    empty = Confusion(np.zeros((2, 2), np.int64))
    assert all(np.isnan([empty.overall_accuracy, empty.mean_iou, empty.fw_iou, empty.class_accuracy]))


def test_merging_is_associative_and_the_same_as_counting_together():
    a, b, c = (confusion_of(seed) for seed in range(3))
    assert (a + b) + c == a + (b + c) == c.merge(b).merge(a)
    both = Confusion.from_arrays(np.tile(REFERENCE, 2), np.tile(PREDICTION, 2), 3)
    one = Confusion.from_arrays(REFERENCE, PREDICTION, 3)
    assert one + one == both != one
    assert pickle.loads(pickle.dumps(both)) == both
    assert hash(one + one) == hash(both)


def test_wrong_input_is_refused_with_what_was_found():
    with pytest.raises(DataError, match=r"\(2, 4\).*\(1, 4\)"):
        Confusion.from_arrays(REFERENCE, PREDICTION[:1], 3)
    with pytest.raises(DataError, match="value 2 "):
        Confusion.from_arrays(REFERENCE, PREDICTION, 2)
    with pytest.raises(DataError, match="2 and 3 classes"):
        Confusion(np.eye(2, dtype=np.int64)).merge(Confusion(np.eye(3, dtype=np.int64)))
    with pytest.raises(DataError, match=r"\(2, 3\)"):
        Confusion(np.zeros((2, 3), np.int64))
    with pytest.raises(DataError, match="0 confusions"):
        bootstrap([], lambda c: c.mean_iou)


def test_the_interval_holds_the_estimate_is_seeded_and_narrows_with_more_images():
    few, many = [confusion_of(k) for k in range(10)], [confusion_of(k) for k in range(160)]
    low, high = bootstrap(few, lambda c: c.mean_iou, n=300, seed=5)
    assert low < sum(few[1:], few[0]).mean_iou < high
    assert bootstrap(few, lambda c: c.mean_iou, n=300, seed=5) == (low, high)
    assert bootstrap(few, lambda c: c.mean_iou, n=300, seed=6) != (low, high)
    narrow = bootstrap(many, lambda c: c.mean_iou, n=300, seed=5)
    assert narrow[1] - narrow[0] < (high - low) / 2


def test_images_are_drawn_whole_not_pixel_by_pixel():
    right, wrong = Confusion(np.diag([1000, 1000])), Confusion(np.diag([1000, 1000])[::-1].copy())
    assert bootstrap([right, wrong], lambda c: c.overall_accuracy, n=200) == (0.0, 1.0)


def test_one_image_has_an_interval_of_no_width_and_nan_draws_are_left_out():
    one = confusion_of(1)
    assert bootstrap([one], lambda c: c.mean_iou, n=20) == pytest.approx((one.mean_iou, one.mean_iou))
    empty = Confusion(np.zeros((2, 2), np.int64))
    assert np.isnan(bootstrap([empty], lambda c: c.mean_iou, n=20)).all()
    assert bootstrap([empty, Confusion(np.diag([3, 4]))], lambda c: c.mean_iou, n=50) == (1.0, 1.0)


def agreement_of(reference, prediction):
    return agreement(contingency_matrix(reference.ravel(), prediction.ravel()))


def test_clusterings_that_differ_only_in_names_agree_perfectly():
    labels = np.arange(36).reshape(6, 6) % 4 + 1
    renamed = np.array([0, 9, 3, 7, 1])[labels]
    assert agreement_of(labels, renamed) == pytest.approx({"ami": 1, "fmi": 1, "are": 0})
    assert agreement_of(labels, np.zeros_like(labels))["ami"] == pytest.approx(0)


@pytest.mark.real
def test_measures_equal_the_reference(shared: Path):
    golden = np.load(shared / "golden/gpc/metrics.npz")
    for suffix, classes in (("", 4), ("2", 2)):
        confusion = Confusion.from_arrays(golden[f"ref{suffix}"], golden[f"pred{suffix}"], classes)
        np.testing.assert_array_equal(confusion.matrix, golden[f"cm{suffix}"])
        np.testing.assert_allclose(confusion.iou, golden[f"iou{suffix}"], atol=1e-6)
        assert confusion.mean_iou == pytest.approx(float(golden[f"miou{suffix}"]), abs=1e-6)
        assert confusion.overall_accuracy == pytest.approx(float(golden[f"oa{suffix}"]), abs=1e-6)
        np.testing.assert_allclose(confusion.f1, golden["f1_2" if suffix else "f1"], atol=1e-6)
    confusion = Confusion.from_arrays(golden["ref"], golden["pred"], 4)
    np.testing.assert_allclose(confusion.precision, golden["precision"], atol=1e-6)
    np.testing.assert_allclose(confusion.recall, golden["recall"], atol=1e-6)
    assert confusion.fw_iou == pytest.approx(float(golden["fwiou"]), abs=1e-6)


@pytest.mark.real
def test_both_class_mean_conventions_equal_their_references(shared: Path):
    golden = np.load(shared / "golden/landcover/evaluator.npz")
    c = Confusion.from_arrays(golden["truth"], golden["pred"], 7)
    np.testing.assert_array_equal(c.matrix, golden["confusion"])
    found = [c.overall_accuracy, c.class_accuracy, c.mean_iou, c.fw_iou]
    np.testing.assert_allclose(found, golden["values"], atol=1e-12)
    golden = np.load(shared / "golden/als4gan/scores.npz")
    for pair in "ab":
        c = Confusion.from_arrays(golden[f"truth_{pair}"], golden[f"pred_{pair}"], 6)
        found = [c.overall_accuracy, c.class_accuracy, c.fw_iou, c.mean_iou_of_reference]
        np.testing.assert_allclose(found, golden[f"values_{pair}"], atol=1e-12)


@pytest.mark.real
@pytest.mark.parametrize("case", "abcde")
def test_clustering_scores_equal_the_reference(shared: Path, case):
    golden = np.load(shared / "golden/superpixel/eval_metrics.npz")
    reference, prediction = golden[f"{case}.gt"], golden[f"{case}.pred"]
    known = reference > 0  # the reference's adapted Rand error leaves its label 0 out
    found = agreement_of(reference, prediction) | {"are": agreement_of(reference[known], prediction[known])["are"]}
    np.testing.assert_allclose([found["are"], found["ami"], found["fmi"]], golden[f"{case}.values"], atol=1e-9)


def test_agreement_by_counts_equals_that_of_the_pixels():
    rng = np.random.default_rng(4)
    reference, prediction = rng.integers(1, 5, 3000), rng.integers(0, 7, 3000)
    prediction = np.where(rng.random(3000) < 0.6, reference, prediction)
    table = np.zeros((9, 9), int)
    np.add.at(table, (reference, prediction), 1)
    found = agreement(table)
    assert found["ami"] == pytest.approx(adjusted_mutual_info_score(reference, prediction), abs=1e-9)
    assert found["fmi"] == pytest.approx(fowlkes_mallows_score(reference, prediction), abs=1e-9)
    assert found["are"] == pytest.approx(adapted_rand_error(reference, prediction)[0], abs=1e-9)
    assert agreement(np.array([[7]])) == {"ami": 1.0, "fmi": 1.0, "are": 0.0}
    with pytest.raises(DataError, match="without a pixel"):
        agreement(np.zeros((2, 2), int))


def test_intervals_of_means_are_students():
    assert mean_interval([0.5]) == (0.5,)
    mean, low, high = mean_interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.30265 * 0.1 / np.sqrt(3), rel=1e-5)
