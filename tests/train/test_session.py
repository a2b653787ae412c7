import json
import signal
import threading
import time

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayseg.errors import ConfigError, ModelError
from rayseg.train import session
from rayseg.train.session import Setup


def loop_of_values(config):
    with session.scalars(config["prefix"]) as write:
        for epoch, value in enumerate(config["values"]):
            write(epoch, {"loss": value})
            session.report({"loss": value})
    return {"rank": session.rank(), "world": session.world(), "device": str(session.device_of(config))}


def test_without_workers_the_loop_runs_here_and_ray_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    result = session.fit(loop_of_values, {"prefix": str(tmp_path), "values": [1.0]}, Setup(tmp_path), name="t")
    assert result == {"rank": 0, "world": 1, "device": "cpu"}


def test_workers_without_ray_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests may have started it in this process
    with pytest.raises(ConfigError, match="needs Ray"):
        session.fit(loop_of_values, {}, Setup(tmp_path, workers=1), name="t")


def test_a_controller_that_is_gone_is_an_error_unless_a_signal_was_received():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ModelError, match=r"training t failed .*out of memory"), session._interruptible("t"):
        raise RayActorError(error_msg="the actor died: out of memory")

    def lose(number):
        before = signal.signal(number, lambda *_: None)  # as Ray Train does
        signal.raise_signal(number)
        signal.signal(number, before)
        raise RayActorError

    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt), session._interruptible("t"):
            lose(number)
    assert signal.getsignal(signal.SIGINT) == handler
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("prefix", ["local", "memory"])
def test_scalars_can_be_read_by_tensorboard(tmp_path, prefix):
    place = session.upath(tmp_path if prefix == "local" else "memory://training")
    session.fit(loop_of_values, {"prefix": str(place), "values": [3.0, 2.0]}, Setup(tmp_path), name="t")
    files = list((place / "tensorboard").iterdir())
    for path in files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    events = EventAccumulator(str(tmp_path / files[0].name)).Reload()
    assert [event.value for event in events.Scalars("loss")] == [3.0, 2.0]


def test_progress_is_shown_while_a_training_runs_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "_EVERY", 0.01)
    monkeypatch.setattr(session.progress, "EVERY", 0.0)
    monkeypatch.setattr(session.progress, "as_json", True)

    def loop(config):
        for stage, epochs in (("warm_up", 2), ("scratch", 3)):
            for epoch in range(epochs):
                session.note(config | {"stage": stage}, epoch + 1, epochs, {"loss": 0.25, "f1": 0.5})
                time.sleep(0.1)
        return {}

    session.fit(loop, {}, Setup(tmp_path), name="segmenter")
    rows = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    noted = [(row["work"], row["done"], row["total"]) for row in rows]
    assert noted == [*(("segmenter warm up", k, 2) for k in (1, 2)), *(("segmenter scratch", k, 3) for k in (1, 2, 3))]
    assert {row["text"] for row in rows} == {"loss 0.25, f1 0.5"}
    assert not (tmp_path / "progress.json").exists()


def test_a_note_that_cannot_be_written_does_not_end_the_training(tmp_path):
    loop = {"title": "t", "progress": str(tmp_path / "gone" / "progress.json")}
    session.fit(lambda config: session.note(config | loop, 1, 2, {"loss": 1.0}) or {}, {}, Setup(tmp_path), name="t")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1), (39.9, 1), (40, 0.1), (60, 0.01), (99, 0.01)])
def test_the_rate_goes_down_in_steps(epoch, rate):
    assert session.rate_at(((40, 1), (60, 0.1), (80, 0.01)), epoch) == rate


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1), (1, 2), (2, 3), (4, 2), (6, 1), (9, 1)])
def test_the_rate_goes_in_straight_lines_if_asked(epoch, rate):
    assert session.rate_at(((0, 1), (2, 3), (6, 1)), epoch, gradual=True) == pytest.approx(rate)


def in_session(tmp_path, function):
    return session.fit(lambda config: {"value": function()}, {}, Setup(tmp_path), name="t")["value"]


def test_an_epoch_draws_the_same_numbers_whatever_came_before(tmp_path):
    def draw(epoch):
        generator = session.seed_epoch(3, epoch)
        return torch.rand(3).tolist() + torch.rand(3, generator=generator).tolist()

    once, again, other = in_session(tmp_path, lambda: [draw(1), draw(1), draw(2)])
    assert once == again
    assert not set(once) & set(other)
    assert len(set(once)) == 6


def test_a_checkpoint_is_there_or_not_and_a_damaged_one_is_refused(tmp_path):
    assert session.load_checkpoint(tmp_path, "a") is None
    in_session(tmp_path, lambda: session.save_checkpoint(tmp_path, "a", {"epoch": 1, "w": torch.ones(2000)}))
    assert torch.equal(session.load_checkpoint(tmp_path, "a")["w"], torch.ones(2000))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelError, match="damaged"):
        session.load_checkpoint(tmp_path, "a")
    with pytest.raises(ModelError, match="train first"):
        session.best_weights(tmp_path / "none")


def test_the_best_is_kept_until_a_better_comes():
    best = session.UNTRAINED
    for order in [(1, 0), (0, 9), (1, 0), (1, 1)]:
        best = session.better(best, order, {"at": order[1]}, lambda order=order: {"w": torch.tensor(order)})
    assert best["measures"] == {"at": 1}
    assert best["weights"]["w"].tolist() == [1, 1]


def test_what_is_no_number_is_never_better():
    best = session.UNTRAINED
    for order in [(float("nan"),), (0.5,), (float("nan"),), (0.4,)]:
        best = session.better(best, order, {"at": order[0]}, lambda: {"w": torch.ones(1)})
    assert best["measures"] == {"at": 0.5}


def test_no_thread_outlives_a_session(tmp_path):
    before = threading.active_count()
    session.fit(loop_of_values, {"prefix": str(tmp_path), "values": [1.0]}, Setup(tmp_path), name="t")
    assert threading.active_count() <= before


def test_pictures_are_those_of_the_first_the_last_and_some_epochs(tmp_path):
    assert [epoch for epoch in range(40) if session.is_shown(epoch, 40)] == [*range(0, 40, 4), 39]
    assert [epoch for epoch in range(3) if session.is_shown(epoch, 3)] == [0, 1, 2]
    picture = np.full((4, 6, 3), 7, np.uint8)
    with session.scalars(tmp_path) as write:
        write(0, {"loss": 1.0}, {"a": picture})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [event] = events.Images("samples/a")
    assert (event.width, event.height) == (6, 4)
