"""Masks as runs, against what the words mean pixel by pixel."""

import time

import numpy as np
import pytest

from rayseg.vision import rle


def blobs(rng, count, shape, *, radius=(3, 14)):
    """Ellipses, some of them twice, (count, height, width) bool."""
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    found = []
    for _ in range(count):
        (row, col), (a, b) = rng.uniform(0, shape, 2), rng.uniform(*radius, 2)
        found.append(((rows - row) / a) ** 2 + ((cols - col) / b) ** 2 <= 1)
    found[1] = found[0].copy()
    return np.stack(found)


def iou_by_pixels(masks_NHW):
    flat = masks_NHW.reshape(len(masks_NHW), -1)
    return np.array([[(a & b).sum() / max((a | b).sum(), 1) for b in flat] for a in flat])


def survivors_by_definition(masks_NHW, threshold):
    """Every mask against every other, again and again until nothing goes."""
    sizes, iou, alive, again = masks_NHW.sum((1, 2)), iou_by_pixels(masks_NHW), [True] * len(masks_NHW), True
    while again:
        again = False
        for i in range(len(alive)):
            for j in range(len(alive)):
                if i != j and alive[i] and alive[j] and iou[i, j] > threshold:
                    again = True
                    alive[i if sizes[i] <= sizes[j] else j] = False
    return [k for k, kept in enumerate(alive) if kept]


@pytest.fixture
def some():
    return blobs(np.random.default_rng(3), 60, (70, 90))


def test_runs_become_the_mask_again(some):
    for mask_HW in [*some, np.zeros((70, 90), bool), np.ones((70, 90), bool)]:
        runs = rle.encode(mask_HW)
        assert np.array_equal(rle.decode(runs, mask_HW.shape), mask_HW)
        assert rle.area(runs) == mask_HW.sum()


def test_the_box_is_the_smallest_around_the_mask(some):
    wide_HW = np.zeros((70, 90), bool)
    wide_HW[5, 80:] = wide_HW[6, :4] = True  # one run over the end of a row
    for mask_HW in [*some[some.any((1, 2))], wide_HW, np.ones((70, 90), bool)]:
        rows, cols = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
        assert rle.box(rle.encode(mask_HW), 90) == (rows[0], cols[0], rows[-1] + 1, cols[-1] + 1)


def test_union_and_shares_are_those_of_the_pixels(some):
    runs, of_HW = [rle.encode(m) for m in some], np.random.default_rng(0).random((70, 90)) < 0.3
    assert np.array_equal(rle.union(runs, (70, 90)), some.any(0))
    assert not rle.union([], (70, 90)).any()
    expected = [(m & of_HW).sum() / max(m.sum(), 1) for m in some]
    assert rle.shares(runs, of_HW) == pytest.approx(expected)


@pytest.mark.parametrize("width", [40, 12])
def test_a_mask_of_a_crop_lies_at_its_place_in_the_image(width):
    crop_HW = np.random.default_rng(1).random((20, 12)) < 0.6
    crop_HW[3], crop_HW[4] = True, True  # a run over two rows of the crop
    image_HW = np.zeros((50, width), bool)
    col = width - 12
    image_HW[7:27, col:] = crop_HW
    found = rle.moved(rle.encode(crop_HW), (7, col, 27, width), width=12, into=width)
    assert np.array_equal(found, rle.encode(image_HW))


@pytest.mark.parametrize("dense", [0.0, 2.0])
def test_intersections_are_counted_pixel_by_pixel(some, dense, monkeypatch):
    monkeypatch.setattr(rle, "_DENSE", dense)
    monkeypatch.setattr(rle, "_BLOCK", 7)
    everything = [*some, np.ones((70, 90), bool), np.zeros((70, 90), bool)]
    runs = [rle.encode(m) for m in everything]
    expected = [[(a & b).sum() for b in everything] for a in everything]
    assert np.array_equal(rle.intersections(runs), expected)
    assert np.array_equal(rle.ious(runs), iou_by_pixels(np.stack(everything)))
    assert rle.intersections([]).shape == (0, 0)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6, 0.8])
def test_survivors_are_those_of_the_definition(threshold):
    for seed in range(4):
        many = blobs(np.random.default_rng(seed), 40, (40, 40), radius=(6, 14))
        expected = survivors_by_definition(many, threshold)
        assert rle.survivors([rle.encode(m) for m in many], threshold) == expected
        assert len(expected) < 40


def test_of_two_equal_masks_the_later_stays():
    mask_HW = np.eye(9, dtype=bool)
    assert rle.survivors([rle.encode(mask_HW)] * 2, 0.8) == [1]


def test_parts_are_connected_by_edges_and_large_enough():
    mask_HW = np.zeros((8, 9), bool)
    mask_HW[0:2, 0:2] = mask_HW[2, 2] = mask_HW[4:6, 0:9] = True
    found = rle.parts(rle.encode(mask_HW), mask_HW.shape)
    assert [rle.area(part) for part in found] == [4, 1, 18]
    assert np.array_equal(rle.union(found, mask_HW.shape), mask_HW)
    assert [rle.area(part) for part in rle.parts(rle.encode(mask_HW), mask_HW.shape, least=4)] == [4, 18]
    assert rle.parts(np.empty(0, np.int64), (8, 9)) == []


def test_400_masks_of_a_million_pixels_take_less_than_a_second():
    many = [rle.encode(m) for m in blobs(np.random.default_rng(0), 400, (1000, 1000), radius=(30, 120))]
    began = time.process_time()
    assert len(rle.survivors(many, 0.8)) < 400
    assert time.process_time() - began < 1
    assert sum(runs.nbytes for runs in many) < 100 << 20


@pytest.mark.real
def test_survivors_and_parts_are_the_published_ones(shared):
    golden = np.load(shared / "golden/agri/delete_iou.npz")
    runs = [rle.encode(m > 0) for m in golden["masks"]]
    assert np.array_equal(rle.ious(runs), golden["iou"])
    for name, threshold in (("kept_080", 0.8), ("kept_090", 0.9), ("kept_060", 0.6)):
        assert rle.survivors(runs, threshold) == golden[name].tolist()
    layers = [rle.encode(m > 0) for m in golden["split_in"]]
    whole = [part for layer in layers for part in rle.parts(layer, (128, 128))]
    assert np.array_equal([rle.decode(part, (128, 128)) for part in whole], golden["split_out"] > 0)
    large = [part for layer in layers for part in rle.parts(layer, (128, 128), least=50)]
    assert np.array_equal([rle.decode(part, (128, 128)) for part in large], golden["small_removed"] > 0)
