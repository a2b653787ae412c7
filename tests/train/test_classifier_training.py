from importlib import import_module

import numpy as np
import pytest
import torch

from rayseg.errors import ConfigError, DataError, ModelError
from rayseg.models.bundle import FACTORIES, Scaling
from rayseg.train import classifier as training
from rayseg.train import session
from rayseg.train.augment import Augment
from rayseg.train.batches import Chips
from rayseg.train.classifier import ClassifierConfig, fit_classifier
from rayseg.train.learning import Learning, trained
from rayseg.train.session import Setup

SCALING = Scaling(mean=(110.0, 100.0, 90.0), std=(40.0, 40.0, 40.0))
LEARNING = Learning(batch=4, seed=5)
QUICK = ClassifierConfig(
    encoder="test_resnet", weights="none", size=32, epochs=6, rates=((6, 3e-3),), learning=LEARNING
)


def fit(settings, chips, prefix, *, held_out=None, **where):
    return fit_classifier(settings, chips, Setup(prefix, **where), scaling=SCALING, held_out=held_out)


def weights_of(prefix):
    return session.load_checkpoint(prefix, None)["learner"]["net"]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_to_tell_chips_apart(tmp_path, chips, held_out):
    measures = fit(QUICK.model_copy(update={"epochs": 12}), chips, tmp_path, held_out=held_out)
    assert measures["accuracy"] == 1
    assert measures["f1_0"] == measures["f1_1"] == 1
    model = trained(QUICK.build(classes=2), tmp_path)
    images = np.stack([held_out.read(k) for k in range(8)]).transpose(0, 3, 1, 2)
    predicted = model(SCALING.normalize(torch.from_numpy(images))).argmax(1)
    assert predicted.tolist() == list(held_out.labels)


VARIANTS = {
    "the paper's": {},
    "average, frozen norms, adamw": {
        "learning": Learning(batch=4, average=0.9, freeze_batchnorm="all", optimizer="adamw", weight_decay=0.01)
    },
    "one logit, top positions, recalibrated": {
        "one_logit": True,
        "pooling": "top10",
        "stride": 16,
        "learning": Learning(batch=4, recalibrate=2, gradual=True, clip=1.0),
    },
    "all chips alike, sgd": {
        "positive": None,
        "learning": Learning(batch=5, optimizer="sgd", memory=20_000),
        "augment": Augment(jitter=0.5, crop="random"),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_that_was_stopped_gives_the_same_weights_as_one_that_was_not(
    tmp_path, chips, held_out, variant, monkeypatch
):
    settings = QUICK.model_copy(update={"epochs": 3, **VARIANTS[variant]})
    whole = fit(settings, chips, tmp_path / "whole", held_out=held_out)

    def dies(*, at):
        calls = iter(range(100))

        def epoch(*arguments):
            if next(calls) == at:
                raise KeyboardInterrupt
            return training_epoch(*arguments)

        return epoch

    training_epoch = training._epoch
    for at in (1, 1):
        monkeypatch.setattr(training, "_epoch", dies(at=at))
        with pytest.raises(KeyboardInterrupt):
            fit(settings, chips, tmp_path / "parts", held_out=held_out)
    monkeypatch.setattr(training, "_epoch", training_epoch)
    parts = fit(settings, chips, tmp_path / "parts", held_out=held_out)
    assert session.load_checkpoint(tmp_path / "parts", None)["epoch"] == 3
    assert parts == whole
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert same(session.best_weights(tmp_path / "whole"), session.best_weights(tmp_path / "parts"))


def test_a_finished_training_is_not_done_again(tmp_path, chips, monkeypatch):
    settings = QUICK.model_copy(update={"epochs": 1})
    first = fit(settings, chips, tmp_path)
    monkeypatch.setattr(training, "_epoch", None)
    assert fit(settings, chips, tmp_path) == first


def test_the_best_epoch_is_kept_and_without_held_out_chips_the_last(tmp_path, chips, held_out, monkeypatch):
    told = iter([(0.5, 0.3), (0.75, 0.9), (0.75, 0.2), (0.75, 0.4)])
    monkeypatch.setattr(
        training, "_evaluate", lambda *_: dict(zip(("accuracy", "held_out_loss"), next(told), strict=True))
    )
    settings = QUICK.model_copy(update={"epochs": 4})
    assert fit(settings, chips, tmp_path / "best", held_out=held_out)["held_out_loss"] == 0.2
    monkeypatch.undo()
    fit(settings, chips, tmp_path / "last")
    assert same(session.best_weights(tmp_path / "last"), weights_of(tmp_path / "last"))


def test_an_encoder_at_rate_zero_stays_and_frozen_norms_keep_their_statistics(tmp_path, chips):
    learning = Learning(batch=4, encoder_rate=0, freeze_batchnorm="all")
    settings = QUICK.model_copy(update={"epochs": 1, "learning": learning})
    fit(settings, chips, tmp_path)
    torch.manual_seed(learning.seed)
    start = training.build_classifier(**settings.options(classes=2, channels=3), weights="none").state_dict()
    end = session.best_weights(tmp_path)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_loss_that_is_no_number_stops_with_the_step_and_its_chips_and_spoils_nothing(tmp_path, chips):
    settings = QUICK.model_copy(update={"epochs": 2})
    fit(settings.model_copy(update={"epochs": 1}), chips, tmp_path / "first")
    bad = Chips(chips.ids, chips.labels, lambda k: chips.read(k).astype(np.float32) * (np.nan if k == 4 else 1))
    with pytest.raises(DataError, match=r"classifier, epoch 0, step \d: loss nan on chips .*chip4"):
        fit(settings, bad, tmp_path / "bad")
    assert not (tmp_path / "bad/checkpoint.pt").exists()


def test_settings_that_cannot_be_are_refused(tmp_path, chips):
    with pytest.raises(ConfigError, match="make it a multiple of 4"):
        fit(QUICK.model_copy(update={"learning": Learning(batch=6)}), chips, tmp_path, workers=2)
    with pytest.raises(ConfigError, match="size 32 is not a multiple of 32 x reduce = 64"):
        fit(QUICK.model_copy(update={"reduce": 2}), chips, tmp_path)
    with pytest.raises(ConfigError, match="one_logit"):
        fit(QUICK.model_copy(update={"positive": None, "one_logit": True}), chips, tmp_path)
    with pytest.raises(DataError, match="no negative chips"):
        fit(QUICK, Chips.of_arrays("ab", [0, 0], np.zeros((2, 32, 32, 3), np.uint8), None), tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, chips):
    fit(QUICK.model_copy(update={"epochs": 1}), chips, tmp_path)
    with pytest.raises(ModelError, match="other settings"):
        fit(QUICK.model_copy(update={"epochs": 2}), chips, tmp_path)


def test_bfloat16_is_used_where_it_is_asked_for(tmp_path, chips):
    settings = QUICK.model_copy(update={"epochs": 1})
    full = fit(settings, chips, tmp_path / "full")["loss"]
    half = fit(
        settings.model_copy(update={"learning": LEARNING.model_copy(update={"half": True})}), chips, tmp_path / "h"
    )
    assert half["loss"] != full
    assert half["loss"] == pytest.approx(full, rel=0.1)


@pytest.mark.parametrize("network", training.NETWORKS)
def test_the_factory_of_a_bundle_is_the_one_that_was_trained(network):
    module, name = FACTORIES[ClassifierConfig(network=network).factory]
    assert getattr(import_module(module), name) is training.NETWORKS[network]


def test_a_sample_stands_for_all_steps(tmp_path, chips, held_out, stood_for):
    made, all_of_them = stood_for(lambda: fit(QUICK, chips, tmp_path / "sample", held_out=held_out))
    batches = len(training._order(0, QUICK, chips))
    assert made == (7 if batches > 7 else 2 * batches)
    assert all_of_them == pytest.approx(6 * batches)
    assert trained(QUICK.build(classes=2), tmp_path / "sample")
