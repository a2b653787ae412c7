import numpy as np
import pytest
import torch

from rayseg.errors import ConfigError, DataError
from rayseg.models.bundle import Scaling
from rayseg.train import segmenter as training
from rayseg.train import session
from rayseg.train.augment import Augment
from rayseg.train.batches import Chips
from rayseg.train.labels import LOSSES, Labelling
from rayseg.train.learning import Learning
from rayseg.train.segmenter import SegmenterConfig, StageConfig, fit_segmenter, trained_segmenter
from rayseg.train.session import Setup

SCALING = Scaling(mean=(110.0, 100.0, 90.0), std=(40.0, 40.0, 40.0))
RATES = ((9.0, 5e-3),)
QUICK = SegmenterConfig(
    architecture="linknet",
    encoder="test_resnet",
    weights="none",
    size=32,
    warm_up=StageConfig(epochs=2, rates=RATES),
    correction=StageConfig(epochs=2, rates=RATES, relabel="every epoch", cue_weight=0.2),
    scratch=StageConfig(epochs=2, rates=RATES, relabel="once", restart=True, best="iou"),
    learning=Learning(batch=3, seed=5),
)


def fit(settings, chips, prefix, *, held_out=None, **where):
    return fit_segmenter(settings, chips, Setup(prefix, **where), scaling=SCALING, held_out=held_out)


def net_of(prefix, stage):
    return session.load_checkpoint(prefix / stage, None)["learner"]["net"]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def coarse(chips):
    """The chips with masks that miss a part of the class and claim another."""

    def read_mask(position):
        wrong = np.random.default_rng(position).random((32, 32)) < 0.15
        return np.where(wrong, 1 - chips.read_mask(position), chips.read_mask(position)).astype(np.uint8)

    return Chips(chips.ids, chips.labels, chips.read, read_mask)


def test_the_map_is_better_than_the_masks_it_was_learnt_from(tmp_path, coarse, held_out):
    stages = {"warm_up": 12, "correction": 4, "scratch": 16}
    longer = {name: getattr(QUICK, name).model_copy(update={"epochs": epochs}) for name, epochs in stages.items()}
    settings = QUICK.model_copy(update={**longer, "negatives": 0.5, "learning": Learning(batch=4, seed=5)})
    measures = fit(settings, coarse, tmp_path, held_out=held_out)
    assert measures["iou"] > 0.8
    assert measures["accuracy"] > 0.9
    model = trained_segmenter(settings, tmp_path)
    image = SCALING.normalize(torch.from_numpy(held_out.read(0)).permute(2, 0, 1)[None])
    predicted = (model(image)[0, 0] > 0).numpy()
    truth = held_out.read_mask(0) == 1
    assert (predicted & truth).sum() / (predicted | truth).sum() > 0.7


VARIANTS = {
    "the paper's": {},
    "average, negatives, unsure labels, covered windows": {
        "negatives": 0.5,
        "loss": "bce_iou",
        "labelling": Labelling(below=0.3, above=0.6, keep_cues=True, flip=True),
        "learning": Learning(
            batch=4, average=0.9, freeze_batchnorm="encoder", recalibrate=1, gradual=True, optimizer="adamw"
        ),
        "augment": Augment(crop="random", covered=0.1, jitter=0.5),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_that_was_stopped_gives_the_same_weights_as_one_that_was_not(
    tmp_path, coarse, held_out, variant, monkeypatch
):
    settings = QUICK.model_copy(update=VARIANTS[variant])
    whole = fit(settings, coarse, tmp_path / "whole", held_out=held_out)
    one_epoch = training._epoch
    for _ in range(5):  # once in every stage and between them
        calls = iter(range(100))

        def epoch(*arguments, calls=calls):
            if next(calls) == 1:
                raise KeyboardInterrupt
            return one_epoch(*arguments)

        monkeypatch.setattr(training, "_epoch", epoch)
        with pytest.raises(KeyboardInterrupt):
            fit(settings, coarse, tmp_path / "parts", held_out=held_out)
    monkeypatch.setattr(training, "_epoch", one_epoch)
    assert fit(settings, coarse, tmp_path / "parts", held_out=held_out) == whole
    for stage in training.STAGES:
        assert same(net_of(tmp_path / "whole", stage), net_of(tmp_path / "parts", stage))


def test_each_stage_learns_from_its_own_labels(tmp_path, coarse, monkeypatch):
    teachers, seen = [], []
    relabel, loss = training._relabel, LOSSES["bce_ssim_iou"]

    def watched(masks, teacher, config):
        teachers.append((config["stage"], {name: value.clone() for name, value in teacher.state_dict().items()}))
        relabel(masks, teacher, config)

    monkeypatch.setattr(training, "_relabel", watched)
    monkeypatch.setitem(LOSSES, "bce_ssim_iou", lambda logits, mask: (seen.append(mask.shape), loss(logits, mask))[1])
    fit(QUICK, coarse, tmp_path)
    assert [stage for stage, _ in teachers] == ["correction", "correction", "scratch"]
    assert same(teachers[0][1], net_of(tmp_path, "warm_up"))
    assert not same(teachers[1][1], net_of(tmp_path, "warm_up"))
    assert same(teachers[2][1], net_of(tmp_path, "correction"))
    steps = 2
    assert len(seen) == 2 * steps + 2 * steps * 2 + 2 * steps
    assert set(seen) == {(3, 1, 32, 32)}


def test_own_labels_count_once_and_coarse_masks_by_their_weight(tmp_path, coarse, monkeypatch):
    def loss(logits, mask):
        return logits.mean() * 0 + mask.mean()

    monkeypatch.setitem(LOSSES, "bce_ssim_iou", loss)
    monkeypatch.setattr(training, "labelled", lambda p, given, _: torch.full_like(given, 3))
    ones = Chips(coarse.ids, coarse.labels, coarse.read, lambda _: np.ones((32, 32), np.uint8))
    none = QUICK.scratch.model_copy(update={"epochs": 0})
    assert fit(QUICK.model_copy(update={"scratch": none}), ones, tmp_path)["loss"] == pytest.approx(3 + 0.2 * 1)


def test_the_next_stage_goes_on_with_the_network_or_begins_anew(tmp_path, coarse):
    still = StageConfig(epochs=1, rates=((1, 0.0),), relabel="once")
    learning = Learning(batch=3, freeze_batchnorm="all")
    for restart in (False, True):
        scratch = still.model_copy(update={"restart": restart})
        fit(QUICK.model_copy(update={"scratch": scratch, "learning": learning}), coarse, tmp_path / str(restart))
    assert same(net_of(tmp_path / "False", "correction"), net_of(tmp_path / "False", "scratch"))
    assert not same(net_of(tmp_path / "True", "correction"), net_of(tmp_path / "True", "scratch"))


def test_the_network_may_see_squares_of_pixels_as_one(tmp_path, coarse):
    settings = QUICK.model_copy(
        update={"reduce": 2, "size": 64, "scratch": QUICK.scratch.model_copy(update={"epochs": 0})}
    )
    with pytest.raises(DataError, match="training needs 64 x 64"):
        fit(settings, coarse, tmp_path)
    with pytest.raises(ConfigError, match="not a multiple of 32 x reduce = 64"):
        fit(settings.model_copy(update={"size": 32}), coarse, tmp_path)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"negatives": 0.9}, "90% negatives"),
        ({"warm_up": StageConfig(epochs=0, rates=RATES)}, "must learn from the coarse masks"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, coarse, update, message):
    with pytest.raises(ConfigError, match=message):
        fit(QUICK.model_copy(update=update), coarse, tmp_path)


def test_chips_without_masks_are_refused(tmp_path, coarse):
    with pytest.raises(DataError, match="no masks"):
        fit(QUICK, Chips(coarse.ids, coarse.labels, coarse.read), tmp_path)


def test_a_sample_stands_for_all_steps_of_all_stages(tmp_path, coarse, stood_for, monkeypatch):
    settings = QUICK.model_copy(update={"learning": Learning(batch=2, seed=5)})
    epochs = {"correction": 4, "scratch": 5}
    stages = {name: getattr(settings, name).model_copy(update={"epochs": count}) for name, count in epochs.items()}
    settings = settings.model_copy(update=stages)
    predict = training._predict
    monkeypatch.setattr(training, "_predict", lambda *given, **named: stood_for.also() or predict(*given, **named))
    made, all_of_them = stood_for(lambda: fit(settings, coarse, tmp_path))
    batches = (np.array(coarse.labels) == 0).sum() // 2
    assert made == 3 * 2 * batches + 2 * batches + batches  # two epochs of each stage, and what they label
    assert all_of_them == pytest.approx((2 + 4 + 5) * batches + (4 + 1) * batches)
