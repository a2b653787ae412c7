"""Trainings cut short: what is left out is what the whole of them would have taken."""

import pytest

from rayseg.train import probe


class Clock:
    """Time that passes only when somebody works."""

    now = 0.0

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(probe.time, "perf_counter", lambda: found.now)
    return found


def train(clock, *, epochs, count, share=1.0, count_epochs=None):
    """Steps of a second, those read ahead of a tenth, the very first of five; half a second beside them."""
    made = 0
    for epoch in probe.epochs(range(epochs), count=count_epochs):
        for step in probe.batches(iter(range(count)), count, share=share):
            clock.work(5.0 if not epoch + step else 0.1 if step < probe.WARM else 1.0)
            made += 1
        clock.work(0.5)
    return made


def told(clock, **more):
    """Seconds that a sample of a training tells of all of it, and the steps it made."""
    before = clock.now
    with probe.taken() as taken:
        made = train(clock, **more)
    return taken.left_out + clock.now - before, made


def test_nothing_is_left_out_elsewhere(clock):
    assert train(clock, epochs=4, count=10) == 40
    assert not probe.is_taken()
    with probe.taken():
        assert probe.is_taken()


@pytest.mark.parametrize(("epochs", "count"), [(4, 20), (1, 20), (4, 8)])
def test_a_pass_that_is_cut_is_told_from_batches_that_were_not_read_ahead(clock, epochs, count):
    assert told(clock, epochs=epochs, count=count) == (pytest.approx(epochs * (count + 0.5)), 7)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_short_passes_are_made_twice_and_the_second_tells_of_the_others(clock, count):
    usual = sum(0.1 if step < probe.WARM else 1.0 for step in range(count)) + 0.5
    seconds, made = told(clock, epochs=10, count=count)
    assert seconds == pytest.approx(10 * usual + 4.9)  # the very first step was made, and takes what it takes
    assert made == 2 * count
    assert told(clock, epochs=1, count=count)[1] == count


@pytest.mark.parametrize("count", [3, 20])
def test_a_pass_that_is_seldom_made_counts_for_its_share_of_the_epochs(clock, count):
    always, _ = told(clock, epochs=4, count=count)
    seldom, _ = told(clock, epochs=4, count=count, share=0.25)
    assert seldom - 4 * 0.5 == pytest.approx((always - 4 * 0.5) / 4)


@pytest.mark.parametrize("count", [3, 20])
def test_a_pass_that_is_made_once_counts_once(clock, count):
    with probe.taken() as taken:
        for epoch in probe.epochs(range(5)):
            for _ in probe.batches(range(count), count, once=True) if not epoch else ():
                clock.work(1.0)
            clock.work(0.5)
    assert taken.left_out + clock.now == pytest.approx(count + 5 * 0.5)


def test_a_pass_that_is_left_early_counts_as_far_as_it_went(clock):
    with probe.taken() as taken:
        for _ in probe.epochs(range(10)):
            for step in probe.batches(range(1000), 2, share=0.5):
                clock.work(1.0)
                if step:
                    break
    assert taken.left_out + clock.now == pytest.approx(10 * 2 * 0.5)


def test_a_last_epoch_may_be_a_shorter_one(clock):
    assert told(clock, epochs=4, count=20, count_epochs=3.5)[0] == pytest.approx(3.5 * 20.5)


def test_nothing_to_do_takes_no_time(clock):
    assert told(clock, epochs=0, count=10) == (0, 0)
    assert told(clock, epochs=2, count=0) == (pytest.approx(1.0), 0)
