import pickle
import threading
import time

import numpy as np
import pytest
import torch

from rayseg.errors import DataError
from rayseg.train.batches import Chips, Kept, epoch_batches, read_ahead, whole_units

POSITIVES, NEGATIVES = np.arange(10), np.arange(100, 117)


def batches_of(epoch, *, rank=0, world=1, counts=(3, 2), seed=7, negatives=NEGATIVES):
    return epoch_batches(POSITIVES, negatives, counts=counts, seed=seed, epoch=epoch, rank=rank, world=world)


def test_an_epoch_passes_over_every_positive_and_fills_the_last_batch():
    batches = batches_of(0)
    positives = np.concatenate([batch[:3] for batch in batches])
    assert [len(batch) for batch in batches] == [5] * 4
    assert sorted(positives[:10]) == list(POSITIVES)
    assert set(positives) == set(POSITIVES)
    assert all((batch[:3] < 100).all() and (batch[3:] >= 100).all() for batch in batches)


def test_negatives_go_on_from_epoch_to_epoch_so_that_all_serve_equally():
    drawn = np.concatenate([batch[3:] for epoch in range(17) for batch in batches_of(epoch)])
    assert len(drawn) == 17 * 8
    assert (np.bincount(drawn)[100:] == 8).all()


def test_an_epoch_can_be_made_again_and_no_two_are_alike():
    assert np.array_equal(batches_of(3), batches_of(3))
    assert not np.array_equal(batches_of(3), batches_of(4))
    assert not np.array_equal(batches_of(3), batches_of(3, seed=8))


def test_workers_share_the_chips_without_overlap_and_take_as_many_steps():
    seen = {}
    for rank in range(3):
        epochs = [np.array(batches_of(epoch, rank=rank, world=3)) for epoch in range(12)]
        assert len({len(epoch) for epoch in epochs}) == 1
        seen[rank] = set(np.concatenate(epochs).ravel())
        assert len(epochs[0]) == 2
    assert not seen[0] & seen[1]
    assert set.union(*seen.values()) == {*POSITIVES, *NEGATIVES}


def test_negatives_may_be_left_out():
    assert sorted(np.concatenate(batches_of(0, counts=(5, 0), negatives=NEGATIVES[:0]))) == list(POSITIVES)


def test_a_worker_without_chips_of_a_class_is_an_error():
    with pytest.raises(DataError, match="worker 2 of 3 has no negative chips"):
        batches_of(0, rank=2, world=3, negatives=NEGATIVES[:2])


def test_reading_ahead_keeps_the_order_and_stays_two_batches_ahead():
    started = []

    def read(position):
        started.append(position)
        time.sleep(0.01 if position % 2 else 0.001)
        return np.full((4, 4, 3), position, np.uint8)

    stream = read_ahead([np.array([n, n + 1]) for n in range(0, 20, 2)], read, lambda n: np.full((4, 4), n, np.uint8))
    first = next(stream)
    time.sleep(0.1)
    assert max(started) <= 7
    rest = list(stream)
    assert [int(batch.chips[0]) for batch in [first, *rest]] == list(range(0, 20, 2))
    assert first.images_NCHW.shape == (2, 3, 4, 4)
    assert all((batch.images_NCHW[1, 0] == batch.masks_NMHW[1, 0]).all() for batch in rest)


def test_an_error_while_reading_reaches_the_reader():
    def read(position):
        raise DataError(f"chip {position} is broken")

    before = set(threading.enumerate())
    with pytest.raises(DataError, match="chip 5 is broken"):
        list(read_ahead([np.array([5])], read))
    assert set(threading.enumerate()) <= before


def test_chips_of_different_sizes_are_refused():
    with pytest.raises(DataError, match=r"\(4, 4, 3\), \(5, 5, 3\)"):
        list(read_ahead([np.array([4, 5])], lambda n: np.zeros((n, n, 3), np.uint8)))


def test_what_is_kept_is_read_once_and_never_more_than_the_limit():
    reads = []

    def read(position):
        reads.append(position)
        return np.zeros(100, np.uint8)

    kept = Kept(read, limit=250)
    for position in [0, 1, 2, 0, 1, 2]:
        kept(position)
    assert reads == [0, 1, 2, 2]


def test_values_beyond_uint8_become_float():
    chips = Chips.of_arrays(["a"], [1], np.full((1, 2, 2, 4), 40_000, np.uint16), None)
    batch = next(read_ahead([np.array([0])], chips.read))
    assert batch.images_NCHW.dtype.is_floating_point
    assert batch.images_NCHW.max() == 40_000
    assert batch.masks_NMHW is None


def test_chips_survive_pickle_and_know_their_classes():
    chips = pickle.loads(pickle.dumps(Chips.of_arrays("abc", [1, 0, 1], np.zeros((3, 2, 2, 3)), np.ones((3, 2, 2)))))
    assert list(chips.where(1)) == [0, 2]
    assert chips.read_mask(1).sum() == 4
    with pytest.raises(DataError, match="3 chip ids but 2 labels"):
        Chips.of_arrays("abc", [1, 0], np.zeros((3, 2, 2, 3)), None)


@pytest.mark.parametrize(
    ("sides", "mode"), [((5, 7), "reflect"), ((8, 8), "reflect"), ((4, 7), "edge"), ((1, 9), "edge")]
)
def test_images_of_any_size_are_padded_to_whole_units(sides, mode):
    image_HW = np.arange(np.prod(sides), dtype=np.float32).reshape(sides)
    height, width = sides
    expected = np.pad(image_HW, ((0, -height % 8), (0, -width % 8)), mode=mode)
    np.testing.assert_array_equal(whole_units(torch.from_numpy(image_HW)[None, None], 8)[0, 0].numpy(), expected)
