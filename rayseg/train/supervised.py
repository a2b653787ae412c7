"""Supervised training of segmenters of many classes: one plain loop, the best epoch by mean IoU kept.

<prefix>/checkpoint.pt    everything the loop needs to go on after the last whole epoch
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayseg.config import Config
from rayseg.errors import ConfigError
from rayseg.io.scenes import LabelledImage
from rayseg.metrics import Confusion
from rayseg.models import losses
from rayseg.models.bundle import Scaling
from rayseg.store import StorePath, absolute
from rayseg.train import probe, session, windows
from rayseg.train.augment import Augment
from rayseg.train.learning import Learner, Learning, NetworkConfig, Schedule, expect_batch, expect_size, precision
from rayseg.train.windows import Counts, Cut, Sampling, Step, Waiting, Windows

State = dict[str, Any]


class PixelLoss(Config):
    """The loss of a pixel; its mean over all labelled pixels of a batch is the batch's."""

    kind: Literal["ce", "focal"] = "ce"
    """Cross-entropy, or focal loss per pixel."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: how much less pixels count that are told well."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """focal: weight of all pixels."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Of the classes, in their order."""
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Without `weights`: a class's weight is its share of the pixels to minus this power; 1 lets all count alike."""
    published: bool = False
    """As the prototype has it: divided by the batch size once more, focal of the mean instead of each pixel."""

    @model_validator(mode="after")
    def _meant(self) -> "PixelLoss":
        if self.weights is not None and self.balance:
            raise ValueError(f"weights {list(self.weights)} and balance {self.balance:g} are both set; leave one out")
        if self.weights is not None and not sum(self.weights):
            raise ValueError("weights are all 0: no pixel would count")
        return self


class SupervisedConfig(NetworkConfig):
    """A segmenter of many classes and how it is trained; the defaults are the prototype's, but for its faults."""

    architecture: str = "deeplab"
    """deeplab is the prototype's DeepLabv3+; else a name of segmentation_models_pytorch, such as deeplabv3plus."""
    encoder: str = "resnet50"
    """A name of segmentation_models_pytorch or of timm."""
    epochs: Annotated[int, Field(gt=0)] = 400
    """An epoch shows `sampling.windows` windows."""
    schedule: Schedule = Schedule()
    """How the learning rate falls, step by step."""
    loss: PixelLoss = PixelLoss()
    """Of a pixel."""
    sampling: Sampling = Sampling()
    """Which windows are shown."""
    learning: Learning = Learning(batch=4, optimizer="sgd", weight_decay=5e-4, encoder_rate=0.1)
    """How weights are changed."""
    augment: Augment = Augment(crop="random", scale=(0.5, 2.0), quadrants=0.0, rotate=0.0)
    """What happens to windows."""
    every: Annotated[int, Field(gt=0)] = 1
    """Epochs from validation to validation; the last one is always validated."""


@dataclass(frozen=True)
class Labelled:
    """What a training learns from.

    Attributes:
        read: gives windows of `read.images`.
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
        return np.asarray(sum(found.sum(axis=(0, 1)) for found in self.counts), np.int64)


def fit_supervised(
    settings: SupervisedConfig,
    training: Labelled,
    validation: Labelled,
    *,
    prefix: StorePath,
    scaling: Scaling,
    workers: int = 0,
    use_gpu: bool = False,
    on_ray: bool = False,
) -> dict[str, float]:
    """Train a segmenter under `prefix`, or go on with one; return the measures of the epoch that is kept.

    Kept is the epoch of the highest mean IoU on `validation`. `trained_supervised` gives the network.

    Args:
        settings: the network and its training.
        training: to learn from.
        validation: to choose the epoch by; every image is seen whole, in windows side by side.
        prefix: where the checkpoint lies.
        scaling: how values become the network's input.
        workers: processes of Ray Train; 0 trains in this one.
        use_gpu: one GPU for each.
        on_ray: read windows in Ray Data's tasks, if Ray has CPUs that the workers leave; else in threads.

    Raises:
        ConfigError: batch, size or loss cannot be meant.
        DataError: imagery or masks cannot be read, or the loss is no number.
        ModelError: the weights to start from or the checkpoint do not fit, or the GPU's memory is too small.
    """
    expect_supervisable(settings, classes=len(training.pixels_K), workers=workers)
    config = {
        "settings": settings,
        "training": training,
        "validation": validation,
        "prefix": absolute(prefix),
        "scaling": scaling,
        "on_ray": on_ray and session.spare_cpus(workers) >= 1,
        "key": _key(settings, training, validation),
    }
    return session.fit(_train, config, storage=prefix, name="segmenter", workers=workers, use_gpu=use_gpu)


def expect_supervisable(settings: SupervisedConfig, *, classes: int, workers: int) -> None:
    """Raise ConfigError if batch, size or loss cannot be meant."""
    expect_batch(settings.learning, workers=workers, what="segmenter")
    loss = settings.loss
    if loss.weights is not None and len(loss.weights) != classes:
        raise ConfigError(f"loss.weights are {len(loss.weights)}, there are {classes} classes; give one for each")
    if loss.published and loss.kind == "focal" and (settings.learning.micro or workers > 1):
        raise ConfigError(
            "the published focal loss is of a whole batch's mean, which parts and workers do not know; "
            "leave learning.micro out and take one worker, or set loss.published=false"
        )
    expect_size(settings.sampling.size, reduce=settings.reduce, what="sampling.size")


def _key(settings: SupervisedConfig, *parts: Labelled) -> str:
    known = [(part.read, [found.tolist() for found in part.counts]) for part in parts]
    return f"{settings.model_dump_json()} {hashlib.sha256(repr(known).encode()).hexdigest()}"


def trained_supervised(settings: SupervisedConfig, prefix: StorePath, *, classes: int, channels: int = 3) -> nn.Module:
    """The network `fit_supervised` kept under `prefix`, in evaluation mode."""
    model = settings.build(classes=classes, channels=channels, weights="none")
    model.load_state_dict(session.best_weights(prefix))
    return model.eval()


# -- the loop ---------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    settings: SupervisedConfig = config["settings"]
    training: Labelled = config["training"]
    device = session.device_of(config)
    state = session.load_checkpoint(config["prefix"], config["key"])
    torch.manual_seed(settings.learning.seed)
    classes, channels = len(training.pixels_K), len(training.read.bands)
    net = settings.build(classes=classes, channels=channels, weights="none" if state else None)
    learner = Learner.start(net, settings.learning, device)
    config = config | {"device": device, "weights_K": class_weights(settings.loss, training.pixels_K)}
    state = state or {"epoch": 0, "best": session.NOTHING}
    if state["epoch"]:
        learner.resume(state["learner"])
        learner.is_kept(config["prefix"], state["epoch"])
    epochs = range(state["epoch"], settings.epochs)
    waiting = Waiting()
    batches = windows.timed(
        windows.stream(
            (_steps(epoch, config) for epoch in epochs),
            training.read,
            on_ray=config["on_ray"],
            threads=settings.learning.threads,
        ),
        waiting,
    )
    with session.scalars(config["prefix"]) as write:
        for epoch in probe.epochs(epochs):
            measures = _epoch(epoch, learner, batches, waiting, config)
            best = state["best"]
            if (epoch + 1) % settings.every == 0 or epoch + 1 == settings.epochs or probe.is_taken():
                measures |= _validate(learner, config)
                best = session.better(best, (measures["mean_iou"],), measures | {"epoch": epoch + 1}, learner.weights)
            state = {"epoch": epoch + 1, "best": best}
            learner.keep(config["prefix"], config["key"], state)
            write(epoch, measures)
            session.report(measures)
    return dict(state["best"]["measures"])


def _steps(epoch: int, config: State) -> list[Step]:
    """This worker's part of the batches of an epoch."""
    settings: SupervisedConfig = config["settings"]
    training: Labelled = config["training"]
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
    """Mean loss of an epoch and the share of its time that it waited for data."""
    settings: SupervisedConfig = config["settings"]
    count = windows.windows_per_epoch(config["training"].images, settings.sampling, settings.learning.batch)
    session.seed_epoch(settings.learning.seed, epoch)
    waiting.share()
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
    images, classes = windows.to_device(cuts, settings.augment, config["device"], size=settings.sampling.size)
    weights_K = None if config["weights_K"] is None else config["weights_K"].to(config["device"])
    share = _share(classes, weights_K, settings.loss)
    loss_of = partial(_loss_of, learner.net, config["scaling"].normalize(images), classes, weights_K, share, settings)
    items = partial(config["training"].read.names, [cut.draw for cut in cuts])
    return learner.step(loss_of, len(cuts), rate, items=items, what=what)


def _share(classes_NHW: Tensor, weights_K: Tensor | None, loss: PixelLoss) -> Tensor:
    """What the sum over this worker's pixels is multiplied by, so that the mean of all workers' is the batch's loss."""
    images = len(classes_NHW) * session.world() if loss.published and loss.kind == "ce" else 1
    return session.share_of(losses.mass(classes_NHW, weights_K)) / images


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
    if loss.kind == "ce" or loss.published:
        mean = losses.cross_entropy_sum(logits, classes_NHW[part], weights_K) * share
    else:
        mean = share * losses.focal_sum(logits, classes_NHW[part], weights_K, gamma=loss.gamma, alpha=loss.alpha)
    if loss.kind == "focal" and loss.published:
        return losses.published_focal(mean, gamma=loss.gamma, alpha=loss.alpha) / len(images)
    return mean


def class_weights(loss: PixelLoss, pixels_K: Counts) -> Tensor | None:
    """Weights of the classes, float32; balanced ones are 1 in the mean over all pixels, 0 for a class without any."""
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
    seen = probe.batches(_as_seen(config), settings.learning.recalibrate, share=1 / settings.every)
    model = learner.show_mode(seen)
    matrix = torch.zeros((len(config["training"].pixels_K),) * 2, dtype=torch.float64, device=config["device"])
    steps = _covering(config["validation"], config)
    coming = _seen(config["validation"], steps, config)
    for images, classes_NHW in probe.batches(coming, len(steps), share=1 / settings.every):
        with precision(settings.learning, config["device"]):
            found_NHW = model(images).argmax(dim=1)
        known = classes_NHW != losses.IGNORE
        pairs = classes_NHW[known] * len(matrix) + found_NHW[known]
        matrix += torch.bincount(pairs, minlength=len(matrix) ** 2).reshape(matrix.shape)
    confusion = Confusion(session.summed(matrix).cpu().numpy().astype(np.int64))
    return {
        "mean_iou": confusion.mean_iou,
        "accuracy": confusion.overall_accuracy,
        "class_accuracy": confusion.class_accuracy,
        "fw_iou": confusion.fw_iou,
    }


def _covering(labelled: Labelled, config: State) -> list[Step]:
    """This worker's share of windows that cover images once, in batches."""
    settings: SupervisedConfig = config["settings"]
    share = -(-settings.learning.batch // session.world())
    return windows.cover(
        labelled.images, size=settings.sampling.size, batch=share, rank=session.rank(), world=session.world()
    )


def _seen(labelled: Labelled, steps: Sequence[Step], config: State) -> Iterator[tuple[Tensor, Tensor]]:
    """(input, classes (N, H, W) int64) of windows, not augmented."""
    threads = config["settings"].learning.threads
    for cuts in windows.stream([steps], labelled.read, on_ray=config["on_ray"], threads=threads):
        images, classes_NHW = windows.as_read(cuts, config["device"])
        yield config["scaling"].normalize(images), classes_NHW


def _as_seen(config: State) -> Iterator[Tensor]:
    training: Labelled = config["training"]
    for images, _ in _seen(training, _covering(training, config), config):
        yield images
