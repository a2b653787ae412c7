import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayseg.errors import ConfigError, DataError
from rayseg.io import scenes
from rayseg.models.bundle import Scaling
from rayseg.train import session, supervised
from rayseg.train.augment import Augment
from rayseg.train.learning import Learning, Schedule, trained
from rayseg.train.session import Setup
from rayseg.train.supervised import (
    Labelled,
    PixelLoss,
    SupervisedConfig,
    class_weights,
    fit_supervised,
)
from rayseg.train.windows import Draw, Sampling, Windows
from rayseg.vision.color import ClassTable

torch.set_num_threads(1)

TABLE = ClassTable(((0, "land", (130, 40, 240)), (1, "water", (20, 60, 160)), (2, "wood", (10, 90, 20))))
SCALING = Scaling(mean=(110.0, 100.0, 90.0), std=(60.0, 60.0, 60.0))
QUICK = SupervisedConfig(
    architecture="linknet",
    encoder="test_resnet",
    weights="none",
    epochs=3,
    schedule=Schedule(rate=3e-3),
    sampling=Sampling(size=32, windows=16, rare=0.5, cell=16),
    learning=Learning(batch=4, optimizer="adamw", seed=3),
    augment=Augment(crop="random", scale=(0.7, 1.4), quadrants=0, jitter=0.3),
)


def write(folder, count, *, size=64, seed=0):
    """Images of noisy colours in three classes, with a strip that nobody labelled."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    lut = np.array([(150, 120, 90), (40, 70, 150), (50, 110, 50)])
    for number in range(count):
        classes = np.zeros((size, size), np.uint8)
        for value in (1, 2):
            top, left = rng.integers(0, size // 2, 2)
            classes[top : top + size // 2, left : left + size // 3] = value
        image = (lut[classes] + rng.normal(0, 15, (size, size, 3))).clip(0, 255).astype(np.uint8)
        classes[:4] = 255
        Image.fromarray(image).save(folder / "images" / f"i{number}.png")
        Image.fromarray(classes).save(folder / "masks" / f"i{number}.png")


def labelled(folder):
    images = tuple(scenes.labelled_images(str(folder)))
    counts = tuple(scenes.count_all(images, TABLE, cell=16))
    return Labelled(Windows(images, ("red", "green", "blue"), TABLE), counts)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write(root / "a", 5)
    write(root / "b", 2, seed=9)
    return labelled(root / "a"), labelled(root / "b")


def fit(settings, parts, prefix, *, on_ray=False, **where):
    return fit_supervised(settings, *parts, Setup(prefix, **where), scaling=SCALING, on_ray=on_ray)


def weights_of(prefix):
    return session.load_checkpoint(prefix, None)["learner"]["net"]


def changed(**values):
    return QUICK.model_copy(update=values)


def of_learning(**values):
    return changed(learning=QUICK.learning.model_copy(update=values))


def test_it_learns_and_the_best_epoch_is_kept(tmp_path, parts):
    measures = fit(changed(epochs=10), parts, tmp_path)
    assert measures["mean_iou"] > 0.75
    state = session.load_checkpoint(tmp_path, None)
    assert state["epoch"] == 10
    assert measures["epoch"] <= 10
    model = trained(QUICK.build(classes=3, channels=3), tmp_path)
    cut = parts[1].read(Draw(0, parts[1].images[0].window))
    with torch.inference_mode():
        found = model(SCALING.normalize(torch.from_numpy(cut.image_CHW))[None]).argmax(1)[0].numpy()
    assert (found == cut.classes_HW)[cut.classes_HW != 255].mean() > 0.85


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_training_that_fell_goes_on_as_if_nothing_had_been(tmp_path, parts, monkeypatch, store):
    fallen = tmp_path / "fallen" if store == "local" else f"memory://{tmp_path.name}/fallen"
    fit(QUICK, parts, tmp_path / "whole")
    epoch = supervised._epoch

    def fall(number, *arguments):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(number, *arguments)

    monkeypatch.setattr(supervised, "_epoch", fall)
    with pytest.raises(KeyboardInterrupt):
        fit(QUICK, parts, fallen)
    monkeypatch.setattr(supervised, "_epoch", epoch)
    assert session.load_checkpoint(fallen, None)["epoch"] == 2
    fit(QUICK, parts, fallen)
    whole, again = weights_of(tmp_path / "whole"), weights_of(fallen)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_parts_of_a_batch_teach_what_the_whole_does(tmp_path, parts):
    frozen = {"freeze_batchnorm": "all", "optimizer": "sgd"}
    for name, micro in (("whole", None), ("parts", 1)):
        fit(of_learning(**frozen, micro=micro).model_copy(update={"epochs": 1}), parts, tmp_path / name)
    whole, split = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name].float(), split[name].float(), atol=1e-5) for name in whole)


@pytest.mark.parametrize(
    "loss",
    [
        PixelLoss(kind="focal"),
        PixelLoss(balance=0.5),
        PixelLoss(published=True),
        PixelLoss(kind="focal", published=True),
    ],
)
def test_every_loss_falls(tmp_path, parts, loss):
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "report", rows.append)
        fit(changed(loss=loss, epochs=4, schedule=Schedule(rate=3e-3, kind="cos", warm_up=0.5)), parts, tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 <= row["waited"] <= 1 for row in rows)


def test_weights_balance_the_classes():
    pixels = np.array([90, 10, 0])
    assert class_weights(PixelLoss(), pixels) is None
    assert class_weights(PixelLoss(weights=(1.0, 2.0, 3.0)), pixels).tolist() == [1, 2, 3]
    balanced = class_weights(PixelLoss(balance=1), pixels).numpy()
    np.testing.assert_allclose(balanced * pixels / 100, [0.5, 0.5, 0])
    softer = class_weights(PixelLoss(balance=0.5), pixels).numpy()
    assert float(softer[1] / softer[0]) == pytest.approx(3)
    assert float((softer * pixels).sum() / 100) == pytest.approx(1)


def test_a_loss_that_is_no_number_stops_with_its_images_and_the_checkpoint(tmp_path, parts, monkeypatch):
    fit(changed(epochs=2), parts, tmp_path)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(supervised, "_key", lambda *_: json.loads("null"))
    monkeypatch.setattr(session, "load_checkpoint", _any_key(session.load_checkpoint))
    monkeypatch.setattr(supervised.losses, "cross_entropy_sum", lambda logits, *_: logits.sum() * float("nan"))
    message = (
        r"^segmenter, epoch 2, step 0: loss nan on images i\d at \(\d+, \d+\), .*; "
        r"the last good checkpoint is .*checkpoint.pt, of 2 epochs; check these"
    )
    with pytest.raises(DataError, match=message):
        fit(changed(epochs=3), parts, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def _any_key(load):
    return lambda prefix, _: load(prefix, None)


def test_what_cannot_be_trained_is_refused(tmp_path, parts):
    for settings, match in (
        (of_learning(batch=1), "batch norms would see one image at a time"),
        (changed(loss=PixelLoss(weights=(1.0, 1.0))), "loss.weights has 2 values, expected 3"),
        (changed(sampling=Sampling(size=32), reduce=2), "size 32 is not a multiple of 32 x reduce = 64"),
        (
            of_learning(micro=2).model_copy(update={"loss": PixelLoss(kind="focal", published=True)}),
            "the published focal loss needs the mean of a whole batch",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            fit(settings, parts, tmp_path)
    assert not list(tmp_path.iterdir())


def test_whole_images_teach_at_the_size_of_training(tmp_path, parts, caplog):
    settings = changed(epochs=6, sampling=Sampling(size=32, whole=True, windows=24))
    measures = fit(settings, parts, tmp_path)
    assert measures["mean_iou"] > 0.5  # at half the resolution; one class for all gives .2
    assert "whole images teach at 1/2.0 of their resolution, but the map sees imagery as it is" in caplog.text
    frozen = changed(network="frozen", sampling=Sampling(size=32, whole=True))
    with pytest.raises(ConfigError, match="network frozen learns from windows at full resolution"):
        supervised.expect_supervisable(frozen, classes=3, workers=0)


# -- workers ----------------------------------------------------------------------------------------------------------


def losses_of(prefix):
    """The loss of every epoch."""
    events = EventAccumulator(str(prefix / "tensorboard")).Reload()
    return [event.value for event in sorted(events.Scalars("loss"), key=lambda event: event.step)]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_see_the_losses_that_one_sees(tmp_path, parts):
    settings = of_learning(freeze_batchnorm="all", optimizer="sgd").model_copy(
        update={
            "epochs": 5,  # of four steps each
            "every": 5,
            "sampling": Sampling(size=32, windows=16, rare=0.5, cell=16),
            "schedule": Schedule(rate=0.05),
            "loss": PixelLoss(balance=0.5),
        }
    )
    for name, workers in (("one", 0), ("two", 2)):
        fit(settings, parts, tmp_path / name, workers=workers, on_ray=workers > 0)
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 5
    assert one[-1] < one[0]
    np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_is_replaced_and_the_training_goes_on(tmp_path, parts):
    class Mortal(Windows):
        """Kills its process once, after the first epoch."""

        def __call__(self, draw):
            if (tmp_path / "fallen" / "checkpoint.pt").exists() and not (tmp_path / "killed").exists():
                (tmp_path / "killed").write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(draw)

    frozen = of_learning(freeze_batchnorm="all")
    read = Mortal(parts[0].read.images, parts[0].read.bands, parts[0].read.table)
    fit(frozen, (Labelled(read, parts[0].counts), parts[1]), tmp_path / "fallen", workers=2)
    assert (tmp_path / "killed").exists()
    fit(frozen, parts, tmp_path / "whole")
    whole, fallen = (weights_of(tmp_path / name) for name in ("whole", "fallen"))
    assert all(torch.allclose(whole[name].float(), fallen[name].float(), atol=1e-3) for name in whole)


def test_a_sample_stands_for_all_steps(tmp_path, parts, stood_for):
    settings = QUICK.model_copy(update={"sampling": Sampling(size=32, windows=40, cell=16), "every": 2})
    made, all_of_them = stood_for(lambda: fit(settings, parts, tmp_path))
    assert made == 7
    assert all_of_them == pytest.approx(3 * 40 // 4)
    assert trained(settings.build(classes=3, channels=3), tmp_path)
