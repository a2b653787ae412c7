import numpy as np
import pytest
import torch
from coloured_squares import GROUND_SCALING as SCALING
from coloured_squares import SEMI_SUPERVISED, chips_on_ground

from rayseg.errors import ConfigError, DataError, ModelError
from rayseg.train import s4gan, session
from rayseg.train.augment import Augment
from rayseg.train.batches import Chips
from rayseg.train.learning import Learning, trained
from rayseg.train.s4gan import Data, DiscriminatorConfig, Pair, fit_s4gan
from rayseg.train.session import Setup

QUICK = SEMI_SUPERVISED.model_copy(
    update={
        "discriminator": DiscriminatorConfig(width=8, after=2, threshold=0.3),
        "learning": Learning(batch=4, optimizer="adamw", average=0.9),
    }
)


def scenes(count, **more):
    return chips_on_ground(count, (50, 170, 80), (40, 80, 200), **more)


@pytest.fixture
def data():
    return Data(scenes(4, seed=1), scenes(8, seed=2, masks=False), scenes(3, seed=3))


def fit(settings, data, prefix, **where):
    return fit_s4gan(settings, data, Setup(prefix, **where), scaling=SCALING)


def changed(settings, **values):
    return settings.model_copy(update=values)


def drawn_pair(settings):
    net = settings.build(classes=3, channels=3)
    return Pair.start(net, settings, torch.device("cpu"), classes=3, channels=3)


def test_it_learns_and_keeps_the_best_checkpoint(tmp_path, data):
    settings = changed(QUICK, steps=60, checkpoint=15, rate=3e-3)
    measures = fit(settings, data, tmp_path)
    assert measures["mean_iou"] > 0.5
    net = trained(settings.build(classes=3, channels=3), tmp_path)
    found = s4gan.confusions(net, data.validation, range(3), SCALING, unit=32)
    assert s4gan.measures_of(sum(found[1:], found[0]))["mean_iou"] == pytest.approx(measures["mean_iou"])
    pixels = 3 * 48 * 46
    assert sum(one.pixels for one in found) == pixels


@pytest.mark.parametrize("variant", [
    {},
    *(pytest.param(other, marks=pytest.mark.more) for other in ({"discriminator": None}, {"checkpoint": 4})),
])  # fmt: skip
def test_a_training_that_was_stopped_gives_the_same_weights_as_one_that_was_not(tmp_path, data, variant, monkeypatch):
    settings = changed(QUICK, **variant)
    whole = fit(settings, data, tmp_path / "whole")
    steps, calls = s4gan._steps, []

    def dies(*arguments):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return steps(*arguments)

    monkeypatch.setattr(s4gan, "_steps", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, data, tmp_path / "parts")
    assert fit(settings, data, tmp_path / "parts") == whole
    assert calls[1] == calls[2] == settings.checkpoint
    first, second = (session.load_checkpoint(tmp_path / name, None) for name in ("whole", "parts"))
    for part in ("learner", "judge"):
        nets = [state[part]["net"] if state[part] else {} for state in (first, second)]
        assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_images_without_masks_teach_only_after_a_while_and_only_by_good_maps(tmp_path, data, monkeypatch):
    rows = []
    step = s4gan._step

    def recorded(number, *arguments):
        losses = step(number, *arguments)
        rows.append((number, losses))
        return losses

    monkeypatch.setattr(s4gan, "_step", recorded)
    fit(QUICK, data, tmp_path)
    for number, losses in rows:
        expected = losses["ce_loss"] + 0.1 * losses["matching_loss"]
        expected += losses["self_training_loss"] if number >= 2 else 0
        assert losses["loss"] == pytest.approx(expected, rel=1e-5)
    assert [number for number, _ in rows] == list(range(6))
    assert all(losses["taught"] > 0 for _, losses in rows)


@pytest.fixture
def _alone(monkeypatch):
    """One worker, outside of a training session."""
    monkeypatch.setattr(session, "world", lambda: 1)
    monkeypatch.setattr(session, "rank", lambda: 0)


@pytest.mark.usefixtures("_alone")
def test_each_network_learns_from_its_own_loss_alone(monkeypatch):
    torch.manual_seed(0)
    pair = drawn_pair(QUICK)
    images, masks = torch.rand(4, 3, 32, 32) * 255, torch.randint(0, 3, (4, 32, 32))
    given = s4gan.StepData((images, masks), (images, None), (images, masks))
    nets = {"segmenter": pair.segmenter.net, "discriminator": pair.discriminator.net}

    def change(frozen):
        before = {name: [weight.clone() for weight in one.parameters()] for name, one in nets.items()}
        with monkeypatch.context() as patch:
            patch.setattr(getattr(pair, frozen), "descend", lambda _: None)
            s4gan._step(0, given, pair, {"settings": QUICK, "scaling": SCALING}, str)
        return {
            name: not all(torch.equal(a, b) for a, b in zip(before[name], one.parameters(), strict=True))
            for name, one in nets.items()
        }

    assert change("discriminator") == {"segmenter": True, "discriminator": False}
    assert change("segmenter") == {"segmenter": False, "discriminator": True}


@pytest.mark.usefixtures("_alone")
def test_pixels_count_alike_whichever_worker_has_them(monkeypatch):
    settings = changed(QUICK, discriminator=None)
    pair = drawn_pair(settings)
    pair.segmenter.net.eval()
    monkeypatch.setattr(pair.segmenter, "step", lambda loss_of, count, *_, **__: loss_of(slice(0, count)).item())
    images, masks = torch.rand(4, 3, 32, 32) * 255, torch.randint(0, 3, (4, 32, 32))
    masks[2:, 1:] = 255

    def loss(*shown):
        given = s4gan.StepData((images[list(shown)], masks[list(shown)]))
        return s4gan._step(0, given, pair, {"settings": settings, "scaling": SCALING}, str)["loss"]

    whole = loss(0, 1, 2, 3)
    monkeypatch.setattr(session, "world", lambda: 2)
    monkeypatch.setattr(session, "sum_over_workers", lambda _: (masks != 255).sum().float())
    assert (loss(0, 1) + loss(2, 3)) / 2 == pytest.approx(whole, rel=1e-5)


@pytest.mark.usefixtures("_alone")
def test_the_discriminator_sees_a_step_that_began_again_once(monkeypatch):
    settings = changed(QUICK, learning=Learning(batch=8, micro=4))
    pair = drawn_pair(settings)
    images, masks = torch.rand(8, 3, 32, 32) * 255, torch.randint(0, 3, (8, 32, 32))
    given = s4gan.StepData((images, masks), (images, None), (images, masks))
    loss_of, parts, judged = s4gan._loss_of, [], []

    def short(*arguments):
        parts.append(arguments[-1].stop - arguments[-1].start)
        if len(parts) == 2:
            raise torch.OutOfMemoryError
        return loss_of(*arguments)

    def seen(net, fake, real, part, own=s4gan._judge_loss_of):
        judged.append((len(fake), len(real)))
        return own(net, fake, real, part)

    monkeypatch.setattr(s4gan, "_loss_of", short)
    monkeypatch.setattr(s4gan, "_judge_loss_of", seen)
    s4gan._step(0, given, pair, {"settings": settings, "scaling": SCALING}, str)
    assert parts == [4, 4, 2, 2, 2, 2]
    assert set(judged) == {(8, 8)}


def test_no_more_is_kept_than_the_memory_asked_for(data):
    settings = changed(QUICK, learning=Learning(memory=800))
    kept = s4gan.in_memory(data, settings.learning.memory)
    readers = [getattr(part, name) for part in vars(kept).values() for name in ("read", "read_mask")]
    assert sum(read._limit for read in readers if read) == 800


@pytest.mark.usefixtures("_alone")
def test_rates_and_decay_are_those_of_the_paper():
    settings = changed(QUICK, rate=2.5e-4, head_rate=10.0, bias_rate=20.0, steps=20_000)
    settings = changed(settings, learning=Learning(batch=4, optimizer="sgd", weight_decay=5e-4))
    pair = drawn_pair(settings)
    for learner, rate in zip((pair.segmenter, pair.discriminator), pair.rates(11), strict=True):
        learner.descend(rate)
    groups = pair.segmenter.optimizer.param_groups
    rate = 2.5e-4 * (1 - 10 / 20_000) ** 0.9
    assert [group["lr"] for group in groups] == pytest.approx([rate, 10 * rate, 20 * rate])
    assert [group["weight_decay"] for group in groups] == [5e-4, 5e-4, 0]
    assert sum(len(group["params"]) for group in groups) == len(list(pair.segmenter.net.parameters()))
    [judging] = pair.discriminator.optimizer.param_groups
    assert judging["lr"] == pytest.approx(1e-4 * (1 - 11 / 20_000) ** 0.9)
    assert judging["betas"] == (0.9, 0.99)


def test_a_mask_without_a_labelled_pixel_does_no_harm(tmp_path, data):
    blank = Chips(("a", "b"), (0, 0), data.labelled.read, lambda k: np.full((48, 48), 255, np.uint8), classes=3)
    measures = fit(QUICK, Data(blank, data.unlabelled, None), tmp_path)
    assert measures["ce_loss"] == 0
    assert np.isfinite(measures["loss"])
    assert measures["step"] == 6


def test_a_loss_that_is_no_number_stops_with_the_step_and_its_chips_and_spoils_nothing(tmp_path, data):
    bad = Chips(
        data.labelled.ids,
        data.labelled.labels,
        lambda k: data.labelled.read(k).astype(np.float32) * (np.nan if k == 2 else 1),
        data.labelled.read_mask,
        classes=3,
    )
    with pytest.raises(DataError, match=r"s4gan, step \d: loss nan on chips .*s1-2.*; chips s2-"):
        fit(QUICK, Data(bad, data.unlabelled, None), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_settings_that_cannot_be_are_refused(tmp_path, data):
    one = changed(QUICK, learning=Learning(batch=1))
    with pytest.raises(ConfigError, match="batch norms would see one image at a time"):
        fit(one, data, tmp_path)
    with pytest.raises(ConfigError, match="size 48 is not a multiple of 32 x reduce = 32"):
        fit(changed(QUICK, size=48), data, tmp_path)
    with pytest.raises(ConfigError, match="cannot be shared by 3 workers"):
        fit(QUICK, data, tmp_path, workers=3)
    with pytest.raises(DataError, match="no chip has a mask"):
        fit(QUICK, Data(data.unlabelled, None, None), tmp_path)
    fit(changed(QUICK, steps=1), data, tmp_path / "done")
    with pytest.raises(ModelError, match="other settings"):
        fit(changed(QUICK, steps=2), data, tmp_path / "done")


@pytest.mark.more  # test_supervised.py: two workers see the losses that one sees
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_learn_as_one(tmp_path, data):
    settings = changed(QUICK, steps=2, learning=Learning(batch=4, optimizer="adamw"))
    fit(settings, data, tmp_path, workers=2)
    state = session.load_checkpoint(tmp_path, None)
    assert state["step"] == 2
    assert np.isfinite(state["best"]["measures"]["loss"])


def test_a_sample_stands_for_all_steps_of_both_networks(tmp_path, data, stood_for):
    settings = QUICK.model_copy(update={"steps": 35, "checkpoint": 10})
    made, all_of_them = stood_for(lambda: fit(settings, data, tmp_path))
    assert made == 2 * 7
    assert all_of_them == pytest.approx(2 * 35)


def test_chips_smaller_than_the_window_are_padded_as_published(tmp_path):
    data = Data(scenes(4, seed=1, size=24), scenes(4, seed=2, masks=False, size=24), scenes(2, seed=3, size=24))
    learning = QUICK.learning.model_copy(update={"recalibrate": 1})
    settings = changed(QUICK, steps=2, augment=Augment(crop="random", scale=(0.5, 1.6)), learning=learning)
    with pytest.raises(DataError, match=r"24 x 24 px, training needs 32 x 32; .* set augment.pad=true"):
        fit(settings, data, tmp_path / "refused")
    padded = changed(settings, augment=settings.augment.model_copy(update={"pad": True}))
    assert 0 <= fit(padded, data, tmp_path / "padded")["mean_iou"] <= 1
