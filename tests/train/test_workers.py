import os
import signal

import pytest
import torch

from rayseg.errors import DataError, ModelError
from rayseg.models.bundle import Scaling
from rayseg.train import session
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, fit_classifier
from rayseg.train.learning import Learning, trained
from rayseg.train.session import Setup

pytestmark = pytest.mark.ray

SCALING = Scaling(mean=(110.0, 100.0, 90.0), std=(40.0, 40.0, 40.0))
QUICK = ClassifierConfig(
    encoder="test_resnet", weights="none", size=32, epochs=3, rates=((3, 3e-3),), learning=Learning(batch=8)
)


@pytest.mark.more  # test_supervised.py: two workers see the losses of one
def test_two_workers_train_one_network_and_each_class_is_measured_once(local_ray, tmp_path, chips, held_out):
    setup = Setup(tmp_path, workers=2, max_failures=0)
    measures = fit_classifier(QUICK, chips, setup, scaling=SCALING, held_out=held_out)
    state = session.load_checkpoint(tmp_path, None)
    assert state["epoch"] == 3
    assert 0 <= measures["accuracy"] <= 1
    assert measures["accuracy"] * len(held_out) == pytest.approx(round(measures["accuracy"] * len(held_out)))
    assert trained(QUICK.build(classes=2), tmp_path)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.more  # stopped trainings of each paradigm go on; two workers train one network
def test_a_training_begun_here_goes_on_with_workers_after_one_was_killed(local_ray, tmp_path, chips):
    def loop(config):
        state = session.load_checkpoint(config["prefix"], "x") or {"epochs": []}
        for epoch in range(len(state["epochs"]), config["epochs"]):
            marker = session.upath(config["prefix"]) / "killed"
            if epoch == 2 and session.rank() == 1 and not marker.exists():
                marker.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            total = session.sum_over_workers(torch.ones(1))
            state = {"epochs": [*state["epochs"], int(total)]}
            if session.rank() == 0:
                session.save_checkpoint(config["prefix"], "x", state)
            session.report({"epoch": epoch})
        return state

    config = {"prefix": str(tmp_path), "epochs": 1}
    session.fit(loop, config, Setup(tmp_path), name="t")
    result = session.fit(loop, config | {"epochs": 4}, Setup(tmp_path, workers=2, max_failures=1), name="t")
    assert (tmp_path / "killed").exists()
    assert result["epochs"] == [1, 2, 2, 2]


@pytest.mark.chaos
def test_a_worker_that_keeps_dying_ends_the_training_with_what_to_do(local_ray, tmp_path):
    def loop(config):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ModelError, match=r"failed on its workers.*start it again"):
        session.fit(loop, {}, Setup(tmp_path, workers=1, max_failures=0), name="t")


@pytest.mark.more  # the same without workers in test_classifier_training.py
def test_a_bad_loss_on_one_worker_stops_all_with_its_chips(local_ray, tmp_path, chips):
    def read(position):
        return chips.read(position) * (float("nan") if position == 3 else 1.0)

    bad = Chips(chips.ids, chips.labels, read)
    with pytest.raises(DataError, match=r"^classifier, epoch 0, step \d: loss nan on chips .*chip3"):
        fit_classifier(QUICK, bad, Setup(tmp_path, workers=2, max_failures=0), scaling=SCALING)
