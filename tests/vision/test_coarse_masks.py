from pathlib import Path

import numpy as np
import pytest

from rayseg.errors import ConfigError, DataError
from rayseg.vision import coarse_masks

CAM = np.array([[0.0, 0.2, 0.9, 1.0], [0.1, 0.1, 0.8, 0.1], [0.1, 0.1, 0.1, 0.1]], np.float32)
LABELS = np.array([[7, 7, 2, 2], [0, 0, 2, 0], [0, 0, 0, 2]], np.uint8)


def test_every_label_gets_the_mean_of_its_pixels_though_labels_have_gaps():
    means = coarse_masks.object_means(CAM, LABELS)
    for label in (0, 2, 7):
        inside = label == LABELS
        np.testing.assert_allclose(means[inside], CAM[inside].mean(), atol=1e-7)
    assert means.dtype == np.float32


def test_components_part_equal_labels_that_do_not_touch():
    parts = coarse_masks.components(LABELS)
    assert set(np.unique(parts)) == set(range(5))
    assert parts[0, 2] == parts[1, 2] != parts[2, 3]
    assert parts[1, 0] != parts[1, 3]
    diagonal = coarse_masks.components(np.array([[1, 0], [0, 1]]), connectivity=2)
    assert diagonal[0, 0] == diagonal[1, 1]


def test_label_zero_is_an_object_like_every_other():
    assert coarse_masks.components(np.zeros((3, 3), np.int32)).max() == 0
    assert coarse_masks.coarse_mask(CAM, np.where(LABELS == 2, 0, 1))[LABELS == 2].all()


def test_objects_are_labels_or_their_components():
    by_label = coarse_masks.coarse_mask(CAM, LABELS)
    by_part = coarse_masks.coarse_mask(CAM, LABELS, objects="components")
    assert by_label[2, 3] == 1
    assert by_part[2, 3] == 0
    assert by_part[0, 2] == 1
    assert by_label.dtype == np.uint8


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_cam_gives_an_empty_mask(value):
    assert not coarse_masks.coarse_mask(np.full((3, 4), value, np.float32), LABELS).any()


def test_a_cam_whose_object_means_are_all_the_same_gives_an_empty_mask():
    assert not coarse_masks.coarse_mask(CAM, np.zeros_like(LABELS)).any()


def test_wrong_input_is_refused_with_what_was_found():
    with pytest.raises(DataError, match=r"\(3, 4\).*\(2, 4\)"):
        coarse_masks.object_means(CAM, LABELS[:2])
    with pytest.raises(DataError, match="start at -1"):
        coarse_masks.object_means(CAM, LABELS.astype(int) - 1)
    with pytest.raises(DataError, match="11 of 12 values are finite"):
        coarse_masks.otsu(np.where(CAM == 1, np.nan, CAM))
    with pytest.raises(ConfigError, match="blobs"):
        coarse_masks.coarse_mask(CAM, LABELS, objects="blobs")


@pytest.mark.real
@pytest.mark.parametrize("case", "abc")
def test_cues_equal_the_reference_when_every_label_counts(shared: Path, case):
    golden = np.load(shared / "golden/gpc/object_cue.npz")
    cam, labels = golden["cam"], golden[f"{case}.labels"]
    means = coarse_masks.object_means(cam, labels)
    np.testing.assert_allclose(means, golden[f"{case}.camobj_all"], atol=1e-6)
    np.testing.assert_allclose(means, golden[f"{case}.label_mean"][labels], atol=1e-6)
    assert coarse_masks.otsu(means) == pytest.approx(float(golden[f"{case}.thr_skimage_all"]), abs=1e-6)
    np.testing.assert_array_equal(coarse_masks.coarse_mask(cam, labels), golden[f"{case}.mask_skimage_all"])
