import numpy as np
import pytest
import torch

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io.scenes import LabelledImage
from rayseg.train import windows
from rayseg.train.augment import Augment
from rayseg.train.windows import Cut, Draw, Sampling

STILL = Augment(crop="random", flip=0, quadrants=0, rotate=0)


def image_of(name, height, width):
    return LabelledImage(name, name, None, (), Grid(None, (1.0, 1.0), (0.0, 0.0), name), Window(0, 0, width, height))


IMAGES = [image_of("a", 100, 200), image_of("b", 50, 60), image_of("c", 300, 100)]
SAMPLING = Sampling(size=32, windows=40, cell=10)


def counted(*places):
    """Pixels of two classes by cell of 10 px: class 0 everywhere, class 1 at (image, row, col) alone."""
    found = [np.zeros((-(-one.window.height // 10), -(-one.window.width // 10), 2), np.int64) for one in IMAGES]
    for image, row, col in places:
        found[image][row, col, 1] = 3
    for counts in found:
        counts[..., 0] = 90
    return found


def drawn(sampling=SAMPLING, augment=STILL, *, counts=(), epoch=0, seed=0, batch=8):
    return windows.draw_epoch(IMAGES, counts, sampling, augment, batch=batch, seed=seed, epoch=epoch)


def read(draw):
    """A window whose pixels say where they are."""
    rows, cols = np.indices((draw.window.height, draw.window.width), dtype=np.uint8)
    image = np.stack([rows + draw.window.row % 100, cols + draw.window.col % 100, np.full_like(rows, draw.image)])
    return Cut(draw, image.astype(np.uint8), (rows % 3).astype(np.uint8))


# -- what comes when --------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_function_of_seed_and_number_and_differs_from_others():
    assert drawn() == drawn()
    firsts = [drawn()[0], drawn(epoch=1)[0], drawn(seed=1)[0]]
    assert len(set(firsts)) == 3
    seeds = [draw.seed for epoch in range(5) for step in drawn(epoch=epoch) for draw in step]
    assert len(set(seeds)) == len(seeds)


def test_windows_lie_inside_their_image_and_come_as_often_as_its_ground_says():
    draws = [draw for epoch in range(50) for step in drawn(epoch=epoch) for draw in step]
    for draw in draws:
        assert draw.window.intersect(IMAGES[draw.image].window) == draw.window
        assert (draw.window.height, draw.window.width) == (32, 32)
    shares = np.bincount([draw.image for draw in draws]) / len(draws)
    ground = np.array([one.window.height * one.window.width for one in IMAGES])
    np.testing.assert_allclose(shares, ground / ground.sum(), atol=0.04)
    corners = {draw.window.row for draw in draws if draw.image == 0}
    assert {0, 68} <= corners


def test_magnified_windows_show_less_ground_and_never_more_than_the_image():
    sides = [
        (draw.image, draw.window.height)
        for step in drawn(augment=STILL.model_copy(update={"scale": (0.5, 2.0)}))
        for draw in step
    ]
    assert {side for image, side in sides if image != 1} <= set(range(16, 65))
    assert max(side for image, side in sides if image != 1) > 50
    assert min(side for _, side in sides) < 20
    assert max([side for image, side in sides if image == 1], default=50) <= 50


def test_an_epoch_covers_the_ground_once_unless_said_otherwise():
    ground = 100 * 200 + 50 * 60 + 300 * 100
    steps = drawn(SAMPLING.model_copy(update={"windows": None}))
    assert sum(map(len, steps)) == -(-(ground // 32**2 + 1) // 8) * 8
    assert {len(step) for step in steps} == {8}


def test_whole_images_come_once_each_before_any_comes_again():
    whole = Sampling(size=32, whole=True)
    assert windows.windows_per_epoch(IMAGES, whole, 2) == 4
    steps = drawn(whole, batch=2)
    assert [len(step) for step in steps] == [2, 2]
    draws = [draw for step in steps for draw in step]
    assert {draw.image for draw in draws[:3]} == {0, 1, 2}
    assert all(draw.window == IMAGES[draw.image].window for draw in draws)
    images, classes = windows.to_device([read(draw) for draw in steps[0]], STILL, torch.device("cpu"), size=32)
    assert (images.shape, classes.shape) == ((2, 3, 32, 32), (2, 32, 32))
    assert "whole" not in Sampling().model_dump()


def test_rare_classes_are_looked_for():
    counts = counted((0, 2, 19), (2, 29, 0))
    steps = drawn(SAMPLING.model_copy(update={"rare": 0.6, "windows": 400}), counts=counts)
    draws = [draw for step in steps for draw in step]
    places = {0: Window(190, 20, 10, 10), 2: Window(0, 290, 10, 10)}
    hits = [draw for draw in draws if draw.image in places and not draw.window.intersect(places[draw.image]).empty]
    by_chance = [
        draw
        for draw in (draw for step in drawn(SAMPLING.model_copy(update={"windows": 400})) for draw in step)
        if draw.image in places and not draw.window.intersect(places[draw.image]).empty
    ]
    assert len(hits) > 0.27 * len(draws)  # half of the 60 % look for class 1
    assert len(by_chance) < 0.1 * len(draws)
    assert {draw.image for draw in hits} == {0, 2}


def test_workers_share_every_batch_and_one_alone_has_it_all():
    steps = drawn()
    parts = [windows.part_of(steps, rank=rank, world=2) for rank in (0, 1)]
    assert [one + other for one, other in zip(*parts, strict=True)] == steps
    assert windows.part_of(steps, rank=0, world=1) == steps


def test_windows_side_by_side_cover_everything_once_over_all_workers():
    seen = [np.zeros((one.window.height, one.window.width), int) for one in IMAGES]
    for rank in range(3):
        for step in windows.cover(IMAGES, size=64, batch=4, rank=rank, world=3):
            assert len(step) <= 4
            for draw in step:
                inside = draw.window.intersect(IMAGES[draw.image].window)
                seen[draw.image][inside.slices(IMAGES[draw.image].window)] += 1
    assert all((counts == 1).all() for counts in seen)


@pytest.mark.parametrize("size", [64, 96])
def test_spread_windows_cover_everything_once_and_end_near_the_edges(size):
    seen = [np.zeros((one.window.height, one.window.width), int) for one in IMAGES]
    for draw in windows.spread(IMAGES, size=size):
        whole = IMAGES[draw.image].window
        assert draw.window.height % 32 == draw.window.width % 32 == 0
        assert draw.window.row1 < whole.row1 + 32
        assert draw.window.col1 < whole.col1 + 32
        inside = draw.window.intersect(whole)
        seen[draw.image][inside.slices(whole)] += 1
    assert all((counts == 1).all() for counts in seen)


def test_few_spread_windows_come_from_all_images():
    draws = windows.spread(IMAGES, size=32, most=8)
    assert len(set(draws)) == 8
    assert {draw.image for draw in draws} == {0, 1, 2}
    assert windows.spread(IMAGES, size=32, most=1000) == windows.spread(IMAGES, size=32)


# -- how it gets here -------------------------------------------------------------------------------------------------


def same(one, other):
    return [[cut.draw for cut in step] for step in one] == [[cut.draw for cut in step] for step in other] and all(
        np.array_equal(a.image_CHW, b.image_CHW) and np.array_equal(a.classes_HW, b.classes_HW)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def fails(draw):
    if draw.image == 2:
        raise DataError("c.tif cannot be read: it is damaged")
    return read(draw)


def test_threads_read_all_epochs_in_order():
    epochs = [drawn(epoch=epoch) for epoch in range(3)]
    found = list(windows.stream(iter(epochs), read, on_ray=False))
    assert same(found, [[read(draw) for draw in step] for epoch in epochs for step in epoch])


def test_the_next_epoch_is_not_asked_for_before_it_is_needed():
    asked = []

    def epochs():
        for epoch in range(3):
            asked.append(epoch)
            yield drawn(epoch=epoch)

    batches = windows.stream(epochs(), read, on_ray=False)
    assert next(batches)
    assert asked == [0]


def test_a_window_that_cannot_be_read_ends_the_stream():
    with pytest.raises(DataError, match=r"c\.tif cannot be read: it is damaged"):
        list(windows.stream([drawn()], fails, on_ray=False))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_data_reads_the_same_in_the_same_order():
    def read_there(draw):
        if draw.seed == 7:
            raise DataError("c.tif cannot be read: it is damaged")
        pixels = np.full((3, draw.window.height, draw.window.width), draw.window.row % 250, np.uint8)
        return Cut(draw, pixels, pixels[0])

    epochs = [drawn(epoch=epoch) for epoch in range(2)]
    here, there = (list(windows.stream(iter(epochs), read_there, on_ray=on_ray)) for on_ray in (False, True))
    assert same(here, there)
    with pytest.raises(DataError, match=r"c\.tif cannot be read: it is damaged"):
        list(windows.stream([[(Draw(0, Window(0, 0, 8, 8), seed),) for seed in range(9)]], read_there, on_ray=True))


def test_the_time_that_is_waited_is_told():
    waiting = windows.Waiting()

    def slow():
        import time

        for _ in range(3):
            time.sleep(0.02)
            yield [read(drawn()[0][0])]

    assert len(list(windows.timed(slow(), waiting))) == 3
    assert waiting.seconds > 0.05
    assert 0.5 < waiting.share() <= 1
    assert waiting.seconds == 0


# -- on the device ----------------------------------------------------------------------------------------------------


def test_a_window_meets_the_same_whatever_batch_it_is_in():
    augment = Augment(crop="random", scale=(0.5, 2.0), jitter=0.8, cast=0.1, gamma=(0.7, 1.4))
    [step] = drawn(SAMPLING.model_copy(update={"windows": 8}), augment)
    cuts = [read(draw) for draw in step]
    images, classes = windows.to_device(cuts, augment, torch.device("cpu"), size=32)
    assert images.shape == (8, 3, 32, 32)
    assert classes.shape == (8, 32, 32)
    assert classes.dtype == torch.int64
    part, part_classes = windows.to_device(cuts[3:6], augment, torch.device("cpu"), size=32)
    assert torch.equal(images[3:6], part)
    assert torch.equal(classes[3:6], part_classes)


def test_masks_follow_their_images_and_keep_their_values():
    cuts = [Cut(Draw(0, Window(0, 0, 64, 64), seed), image, mask) for seed, image, mask in _halves(12)]
    images, classes = windows.to_device(cuts, Augment(quadrants=0.5), torch.device("cpu"), size=32)
    assert set(classes.unique().tolist()) == {0, 255}
    bright = images[:, 0] > 100
    assert ((classes == 255) == bright).float().mean() > 0.99
    assert len({tuple(mask[::31, ::31].flatten().tolist()) for mask in classes}) > 2


def _halves(count):
    for seed in range(count):
        mask = np.zeros((64, 64), np.uint8)
        mask[:32, :16] = 255
        yield seed, np.repeat(mask[None] // 2 + 20, 3, axis=0), mask
