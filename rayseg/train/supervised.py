"""Supervised training of segmenters of many classes: one plain loop that keeps the epoch of the best mean IoU.

<prefix>/checkpoint.pt    all that the loop needs to resume after the last whole epoch
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import ray
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayseg.config import Config
from rayseg.errors import ConfigError
from rayseg.io.scenes import LabelledImage
from rayseg.metrics import Confusion
from rayseg.models import losses
from rayseg.models.bundle import Scaling
from rayseg.models.input_statistics import MOST, InputStatistics
from rayseg.models.pixel_head import PixelHead
from rayseg.train import pictures, probe, session, windows
from rayseg.train.augment import Augment
from rayseg.train.frozen import HeadedConfig, Pair, fit_head
from rayseg.train.learning import (
    Epoch,
    Learner,
    Learning,
    Schedule,
    expect_batch,
    expect_size,
    precision,
    resumed,
    run_epochs,
)
from rayseg.train.session import Setup, State
from rayseg.train.windows import Counts, Cut, Draw, Sampling, Step, Waiting, Windows

COARSER = 1.5
"""Factor by which whole images may be scaled down before it is said that the map is not."""
_log = logging.getLogger(__name__)
UNCHANGED = Augment(flip=0.0, quadrants=0.0, rotate=0.0)
MOST_WINDOWS = 400
"""Windows that a head on a frozen encoder learns from, spread over all images."""


class PixelLoss(Config):
    """The loss of a pixel; a batch's loss is the mean over all its labelled pixels."""

    kind: Literal["ce", "focal"] = "ce"
    """Cross-entropy, or focal loss per pixel."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: exponent that lowers the weight of well classified pixels."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """focal: weight of all pixels."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weights of the classes, in their order."""
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Without `weights`: a class's weight is its share of the pixels to minus this power; 1 balances all classes."""
    published: bool = False
    """The prototype's loss: divided by the batch size once more, focal of the mean instead of each pixel."""

    @model_validator(mode="after")
    def _one_weighting(self) -> "PixelLoss":
        if self.weights is not None and self.balance:
            raise ValueError(f"weights {list(self.weights)} and balance {self.balance:g} are both set; leave one out")
        if self.weights is not None and not sum(self.weights):
            raise ValueError("weights are all 0, expected one above 0; raise one")
        return self


class SupervisedConfig(HeadedConfig):
    """A segmenter of many classes and its training; the defaults are the prototype's, without its faults."""

    architecture: str = "deeplab"
    """deeplab is the prototype's DeepLabv3+; others are names of segmentation_models_pytorch, such as deeplabv3plus."""
    encoder: str = "resnet50"
    """A name of segmentation_models_pytorch or of timm."""
    epochs: Annotated[int, Field(gt=0)] = 400
    """Epochs of `sampling.windows` windows each."""
    schedule: Schedule = Schedule()
    """How the learning rate falls from step to step."""
    loss: PixelLoss = PixelLoss()
    """Loss of a pixel."""
    sampling: Sampling = Sampling()
    """Which windows are drawn."""
    learning: Learning = Learning(batch=4, optimizer="sgd", weight_decay=5e-4, encoder_rate=0.1)
    """How weights are changed."""
    augment: Augment = Augment(crop="random", scale=(0.5, 2.0), quadrants=0.0, rotate=0.0)
    """Augmentation of the windows."""
    every: Annotated[int, Field(gt=0)] = 1
    """Epochs between validations; the last epoch is always validated."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images of a training.

    Attributes:
        read: reads windows of `read.images`.
        counts: of each image, pixels by cell and class (rows, cols, classes).
    """

    read: Windows
    counts: tuple[Counts, ...]

    @property
    def images(self) -> tuple[LabelledImage, ...]:
        """All images."""
        return self.read.images

    @property
    def pixels_K(self) -> Counts:
        """Labelled pixels of each class."""
        return np.asarray(sum(cells.sum(axis=(0, 1)) for cells in self.counts), np.int64)


def fit_supervised(
    settings: SupervisedConfig,
    training: Labelled,
    validation: Labelled,
    setup: Setup,
    *,
    scaling: Scaling,
    on_ray: bool = False,
) -> dict[str, float]:
    """Train a segmenter, or resume its training; return the measures of the epoch that is kept.

    The kept epoch has the highest mean IoU on `validation`. `learning.trained` returns the network.

    Args:
        settings: the network and its training.
        training: to learn from.
        validation: to choose the epoch by; every image is seen as a whole, in adjacent windows.
        setup: where the training runs.
        scaling: from stored values to the network's input.
        on_ray: read windows in tasks of Ray Data if Ray has a CPU that no worker uses; else in threads.

    Raises:
        ConfigError: batch, size or loss are invalid.
        DataError: imagery or masks cannot be read, or the loss is not finite.
        ModelError: the initial weights or the checkpoint do not fit, or GPU memory is too small.
    """
    expect_supervisable(settings, classes=len(training.pixels_K), workers=setup.workers)
    # The map is made at full resolution, which a network that learnt from much smaller images has not seen.
    sides = [max(image.window.height, image.window.width) / settings.sampling.size for image in training.images]
    if settings.sampling.whole and max(sides) > COARSER:
        _log.warning(
            "whole images teach at 1/%.1f of their resolution, but the map sees imagery as it is: raise sampling.size, "
            "or map imagery that was scaled likewise",
            max(sides),
        )
    # Read tasks would wait for ever where the workers hold all CPUs.
    spare_cpus = ray.cluster_resources().get("CPU", 0) - setup.workers if ray.is_initialized() else 0
    config = {
        "settings": settings,
        "training": training,
        "validation": validation,
        "scaling": scaling,
        "on_ray": on_ray and spare_cpus >= 1,
        "key": _key(settings, training, validation),
    }
    return session.fit(_train, config, setup, name="segmenter")


def fit_frozen(
    settings: SupervisedConfig, training: Labelled, validation: Labelled, *, scaling: Scaling, lab: bool
) -> tuple[PixelHead, dict[str, float]]:
    """Fit a head on the frozen encoder in this process; return it and its measures on `validation`.

    Args:
        settings: `network` is linear or frozen.
        training: to learn from.
        validation: to measure on; nothing is chosen by it.
        scaling: from stored values to the network's input.
        lab: whether the imagery is 8-bit RGB, whose colour is taken as Lab.

    Raises:
        DataError: imagery or masks cannot be read.
        ModelError: the encoder's weights do not fit.
    """
    classes, size = len(training.pixels_K), settings.sampling.size
    # 1. the head, from features of windows spread over all images
    draws = windows.spread(training.images, size=size, most=MOST_WINDOWS)
    pairs = pairs_of(training, draws)
    net = fit_head(settings, pairs, len(draws), scaling, classes=classes, lab=lab, seed=settings.learning.seed)
    # 2. its measures
    confusion = Confusion(np.zeros((classes, classes), np.int64))
    draws = windows.spread(validation.images, size=size, most=MOST_WINDOWS)
    for image_CHW, classes_HW in pairs_of(validation, draws):
        with torch.inference_mode():
            logits = net(torch.from_numpy(scaling.normalize(image_CHW))[None])[0]
        confusion += Confusion.from_arrays(classes_HW, logits.argmax(dim=0).numpy(), classes)
    return net, _measures(confusion)


def pairs_of(labelled: Labelled, draws: Sequence[Draw]) -> Iterator[Pair]:
    """Image and classes of windows, read ahead; in a sample of the training's time the first few."""
    steps = [(draw,) for draw in draws]
    for [cut] in probe.batches(windows.stream([steps], labelled.read, on_ray=False), len(draws), once=True):
        yield cut.image_CHW, cut.classes_HW


def input_statistics(labelled: Labelled, *, size: int) -> InputStatistics | None:
    """Statistics of windows all over the images; those that end at an image's edge are left out."""
    draws = windows.spread(labelled.images, size=size, most=MOST)
    least = max(min(draw.window.height, draw.window.width) for draw in draws)
    whole = [draw for draw in draws if min(draw.window.height, draw.window.width) == least]
    return InputStatistics.of(image_CHW for image_CHW, _ in pairs_of(labelled, whole))


def expect_supervisable(settings: SupervisedConfig, *, classes: int, workers: int) -> None:
    """Raise ConfigError if batch, size or loss are invalid for so many classes and workers."""
    expect_batch(settings.learning, workers=workers, what="segmenter")
    loss = settings.loss
    if loss.weights is not None and len(loss.weights) != classes:
        raise ConfigError(f"loss.weights has {len(loss.weights)} values, expected {classes}; give one for each class")
    if loss.published and loss.kind == "focal" and (settings.learning.micro or workers > 1):
        raise ConfigError(
            "the published focal loss needs the mean of a whole batch, which parts and workers do not have; "
            "leave learning.micro out and use one worker, or set loss.published=false"
        )
    expect_size(settings.sampling.size, reduce=settings.reduce, what="sampling.size")
    if settings.sampling.whole and settings.network != "decoder":
        raise ConfigError(
            f"sampling.whole is set, but network {settings.network} learns from windows at full resolution; leave it "
            "out"
        )


def _key(settings: SupervisedConfig, *parts: Labelled) -> str:
    """Settings and images as text: a checkpoint is only valid for the same."""
    images = [(part.read, [cells.tolist() for cells in part.counts]) for part in parts]
    return f"{settings.model_dump_json()} {hashlib.sha256(repr(images).encode()).hexdigest()}"


# -- the loop ---------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    settings: SupervisedConfig = config["settings"]
    training: Labelled = config["training"]
    state = session.load_checkpoint(config["prefix"], config["key"])
    shape = {"classes": len(training.pixels_K), "channels": len(training.read.bands)}
    learner, state = resumed(state, lambda weights: settings.build(**shape, weights=weights), settings.learning, config)
    device = session.device_of(config)
    config = config | {"device": device, "weights_K": class_weights(settings.loss, training.pixels_K)}
    # One stream over all epochs: the first batches of an epoch are read while the one before is validated.
    epochs = range(state["epoch"], settings.epochs)
    waiting = Waiting()
    steps = (_steps(epoch, config) for epoch in epochs)
    threads = settings.learning.threads
    stream = windows.stream(steps, training.read, on_ray=config["on_ray"], threads=threads)
    batches = windows.timed(stream, waiting)

    def one_epoch(epoch: int) -> Epoch:
        measures = _epoch(epoch, learner, batches, waiting, config)
        if (epoch + 1) % settings.every and epoch + 1 < settings.epochs and not probe.is_taken():
            return Epoch(measures, None, {})
        measures |= _validate(learner, config)
        return Epoch(measures, (measures["mean_iou"],), {"epoch": epoch + 1})

    shown = pictures.of_segments(
        partial(_samples, config["validation"], settings.sampling.size),
        config["scaling"],
        unit=32 * settings.reduce,
        colors=training.read.table.colors if training.read.table else (),
    )
    kept = run_epochs(one_epoch, learner, state, epochs=settings.epochs, config=config, shown=shown)
    return dict(kept["measures"])


def _samples(validation: Labelled, size: int) -> Iterator[pictures.Sample]:
    """Windows spread over the validation images, for pictures."""
    for draw in windows.spread(validation.images, size=size, most=pictures.MOST):
        cut = validation.read(draw)
        yield f"{validation.images[draw.image].id}-{draw.window.row}-{draw.window.col}", cut.image_CHW, cut.classes_HW


def _steps(epoch: int, config: State) -> list[Step]:
    """This worker's part of the batches of an epoch."""
    settings: SupervisedConfig = config["settings"]
    training: Labelled = config["training"]
    # All workers draw the whole epoch, and take their parts of it.
    steps = windows.draw_epoch(
        training.images,
        training.counts,
        settings.sampling,
        settings.augment,
        batch=settings.learning.batch,
        seed=settings.learning.seed,
        epoch=epoch,
    )
    return windows.part_of(steps, rank=session.rank(), world=session.world())


def _epoch(
    epoch: int, learner: Learner, batches: Iterator[list[Cut]], waiting: Waiting, config: State
) -> dict[str, float]:
    """Train for an epoch; return its mean loss and the share of its time that it waited for data."""
    settings: SupervisedConfig = config["settings"]
    count = windows.windows_per_epoch(config["training"].images, settings.sampling, settings.learning.batch)
    session.seed_epoch(settings.learning.seed, epoch)
    waiting.share()  # restarts the count: validation is not waiting
    step_losses = []
    learner.train_mode()
    steps = range(count // settings.learning.batch)
    for step in probe.batches(steps, len(steps)):
        cuts = next(batches)
        rate = settings.schedule.at(epoch + step * settings.learning.batch / count, settings.epochs)
        step_losses.append(_step(learner, cuts, rate, config, what=f"segmenter, epoch {epoch}, step {step}"))
    return {"loss": float(np.mean(step_losses)), "waited": waiting.share()}


def _step(learner: Learner, cuts: Sequence[Cut], rate: float, config: State, *, what: str) -> float:
    settings: SupervisedConfig = config["settings"]
    loss = settings.loss
    images, classes = windows.to_device(cuts, settings.augment, config["device"], size=settings.sampling.size)
    weights_K = None if config["weights_K"] is None else config["weights_K"].to(config["device"])
    # A sum over this worker's pixels times `share`, averaged over the workers, is the loss of the whole batch.
    share = session.batch_share(losses.mass(classes, weights_K))
    if loss.published and loss.kind == "ce":
        share = share / (len(classes) * session.world())
    loss_of = partial(_loss_of, learner.net, config["scaling"].normalize(images), classes, weights_K, share, settings)
    items = partial(config["training"].read.names, [cut.draw for cut in cuts])
    return learner.step(loss_of, len(cuts), rate, items=items, what=what)


def _loss_of(
    net: nn.Module,
    images: Tensor,
    classes_NHW: Tensor,
    weights_K: Tensor | None,
    share: Tensor,
    settings: SupervisedConfig,
    part: slice,
) -> Tensor:
    """What a part of a batch adds to its loss."""
    loss = settings.loss
    with precision(settings.learning, images.device):
        logits = net(images[part]).float()
    if loss.kind == "focal" and not loss.published:
        return share * losses.focal_sum(logits, classes_NHW[part], weights_K, gamma=loss.gamma, alpha=loss.alpha)
    mean = losses.cross_entropy_sum(logits, classes_NHW[part], weights_K) * share
    if loss.kind == "focal":
        return losses.published_focal(mean, gamma=loss.gamma, alpha=loss.alpha) / len(images)
    return mean


def class_weights(loss: PixelLoss, pixels_K: Counts) -> Tensor | None:
    """Weights of the classes, float32; balanced ones have the mean 1 over all pixels, and 0 for an absent class."""
    if loss.weights is not None:
        return torch.tensor(loss.weights)
    if not loss.balance:
        return None
    share_K = pixels_K / pixels_K.sum()
    weights_K = np.where(share_K > 0, np.maximum(share_K, 1e-12) ** -loss.balance, 0.0)
    return torch.tensor(weights_K / (weights_K * share_K).sum(), dtype=torch.float32)


# -- validation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _validate(learner: Learner, config: State) -> dict[str, float]:
    """Measures of all workers together on the whole validation images."""
    settings: SupervisedConfig = config["settings"]
    share = 1 / settings.every
    training = (images for images, _ in _inputs(config["training"], config))
    model = learner.show_mode(probe.batches(training, settings.learning.recalibrate, share=share))
    matrix = torch.zeros((len(config["training"].pixels_K),) * 2, dtype=torch.float64, device=config["device"])
    coming = _inputs(config["validation"], config)
    for images, classes_NHW in probe.batches(coming, len(_covering(config["validation"], config)), share=share):
        with precision(settings.learning, config["device"]):
            predicted_NHW = model(images).argmax(dim=1)
        # One histogram over (reference, predicted) is the confusion matrix.
        known = classes_NHW != losses.IGNORE
        pairs = classes_NHW[known] * len(matrix) + predicted_NHW[known]
        matrix += torch.bincount(pairs, minlength=len(matrix) ** 2).reshape(matrix.shape)
    return _measures(Confusion(session.sum_over_workers(matrix).cpu().numpy().astype(np.int64)))


def _measures(confusion: Confusion) -> dict[str, float]:
    return {
        "mean_iou": confusion.mean_iou,
        "accuracy": confusion.overall_accuracy,
        "class_accuracy": confusion.class_accuracy,
        "fw_iou": confusion.fw_iou,
    }


def _covering(labelled: Labelled, config: State) -> list[Step]:
    """This worker's share of the windows that cover images once, in batches."""
    settings: SupervisedConfig = config["settings"]
    batch = -(-settings.learning.batch // session.world())
    size, images = settings.sampling.size, labelled.images
    if settings.sampling.whole:
        draws = [Draw(at, image.window) for at, image in enumerate(images)][session.rank() :: session.world()]
        return [tuple(draws[start : start + batch]) for start in range(0, len(draws), batch)]
    return windows.cover(labelled.images, size=size, batch=batch, rank=session.rank(), world=session.world())


def _inputs(labelled: Labelled, config: State) -> Iterator[tuple[Tensor, Tensor]]:
    """(network's input, classes (N, H, W) int64) of this worker's share of images, without augmentation."""
    threads = config["settings"].learning.threads
    for cuts in windows.stream([_covering(labelled, config)], labelled.read, on_ray=config["on_ray"], threads=threads):
        if config["settings"].sampling.whole:
            size = config["settings"].sampling.size
            images, classes_NHW = windows.to_device(cuts, UNCHANGED, config["device"], size=size)
        else:
            images, classes_NHW = windows.as_read(cuts, config["device"])
        yield config["scaling"].normalize(images), classes_NHW
