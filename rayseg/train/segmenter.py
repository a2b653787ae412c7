"""Training of segmenters on coarse masks: warm-up, label correction, from scratch (Cao & Huang 2022, section 3.3).

    <prefix>/<stage>/checkpoint.pt    of each of the stages `warm_up`, `correction`, `scratch`

One loop serves all three: they differ in the source of an epoch's labels.
"""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from rayseg.config import Config
from rayseg.errors import ConfigError, DataError
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling
from rayseg.store import StorePath, upath
from rayseg.train import learning, probe, session
from rayseg.train.augment import Augment, augment, centre
from rayseg.train.batches import Chips, Indices, Kept, epoch_batches, read_ahead, shard
from rayseg.train.classifier import key_of, names_of
from rayseg.train.labels import LOSSES, Labelling, Masks, labelled, probabilities
from rayseg.train.learning import (
    Epoch,
    Learner,
    Learning,
    NetworkConfig,
    Rates,
    expect_size,
    precision,
    resumed,
    run_epochs,
)
from rayseg.train.pictures import Sample, of_segments
from rayseg.train.session import Setup, State

STAGES = ("warm_up", "correction", "scratch")


class StageConfig(Config):
    """One stage of training: its length, learning rates and labels."""

    epochs: Annotated[int, Field(ge=0)]
    """Passes over the positive chips; 0 skips the stage."""
    rates: Rates
    """(until epoch, learning rate)."""
    restart: bool = False
    """Begin with a new network instead of that of the previous stage."""
    relabel: Literal["never", "once", "every epoch"] = "never"
    """When the network labels the positive chips itself; the first time it is that of the previous stage."""
    cue_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss on the coarse masks relative to that on the network's own labels."""
    best: Literal["last", "accuracy", "iou", "loss"] = "last"
    """Which epoch is kept if there are held-out chips; else the last."""


class SegmenterConfig(NetworkConfig):
    """A segmenter of one class and its training; the defaults are the paper's."""

    architecture: str = "unet"
    """A name of segmentation_models_pytorch."""
    encoder: str = "regnety_040"
    """A name of segmentation_models_pytorch or of timm."""
    loss: Literal["bce_ssim_iou", "bce_iou", "bce"] = "bce_ssim_iou"
    """Sum of cross-entropy, 1 - SSIM and 1 - soft IoU; see rayseg.train.labels.LOSSES."""
    size: Annotated[int, Field(gt=0)] = 512
    """Side in px of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    positive: int = 0
    """Label of the chips that contain the class."""
    negatives: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of negative chips, with empty masks, in each batch."""
    labelling: Labelling = Labelling()
    """How the network's probabilities become labels."""
    warm_up: StageConfig = StageConfig(epochs=10, rates=((10, 1e-3),))
    """On the coarse masks."""
    correction: StageConfig = StageConfig(epochs=20, rates=((20, 1e-3),), relabel="every epoch", cue_weight=0.2)
    """On the network's own labels, and the coarse masks at a small weight."""
    scratch: StageConfig = StageConfig(
        epochs=35, rates=((15, 1e-3), (30, 1e-4), (35, 1e-5)), restart=True, relabel="once", best="accuracy"
    )
    """A new network on the last labels."""
    learning: Learning = Learning(batch=6)
    """How weights are changed."""
    augment: Augment = Augment()
    """Augmentation of the training chips and their masks."""


def fit_segmenter(
    settings: SegmenterConfig, chips: Chips, setup: Setup, *, scaling: Scaling, held_out: Chips | None = None
) -> dict[str, float]:
    """Train a segmenter, or resume its training; return the measures of the epoch that is kept.

    `trained_segmenter` returns the network.

    Args:
        settings: the network and its training.
        chips: with `read_mask` for the positive ones: coarse masks, 1 = the class, 0 = not, 255 = unknown. Negative
            chips are empty by definition.
        setup: where the training runs.
        scaling: from the chips' values to the network's input.
        held_out: chips with reference masks (0, 1, 255 = unknown) to evaluate on.

    Raises:
        ConfigError: batch, size or stages are invalid.
        DataError: chips or masks cannot be read, no chip is positive, or the loss is not finite.
        ModelError: the initial weights or a checkpoint do not fit.
    """
    # 1. settings that cannot be trained
    expect_shared(settings, workers=setup.workers)
    expect_size(settings.size, reduce=settings.reduce, what="the segmenter's size")
    stages = _stages(settings)
    if not stages or getattr(settings, stages[0]).relabel != "never":
        raise ConfigError("the segmenter's first stage with epochs must learn from the coarse masks; relabel never")
    if chips.read_mask is None:
        raise DataError("the segmenter's chips have no masks; make coarse masks first")
    # 2. all stages in one call, so that the workers keep their processes and chips
    config = {"settings": settings, "chips": chips, "held_out": held_out, "scaling": scaling}
    return session.fit(_train, config | {"key": key_of(settings, chips, held_out)}, setup, name="segmenter")


def expect_shared(settings: SegmenterConfig, *, workers: int) -> None:
    """Raise ConfigError if the workers cannot share the batch with a positive chip each."""
    workers = max(workers, 1)
    if settings.learning.batch % workers or _counts(settings, workers)[0] < 1:
        raise ConfigError(
            f"batch {settings.learning.batch} with {settings.negatives:.0%} negatives cannot be shared by {workers} "
            "workers; make it a larger multiple of them"
        )


def trained_segmenter(
    settings: SegmenterConfig, prefix: StorePath, *, stage: str | None = None, channels: int = 3
) -> nn.Module:
    """The network that `fit_segmenter` keeps under `prefix` at the end of a stage (the last one), for evaluation."""
    net = settings.build(channels=channels, weights="none")
    return learning.trained(net, upath(prefix) / (stage or _stages(settings)[-1]))


def _stages(settings: SegmenterConfig) -> list[str]:
    return [name for name in STAGES if getattr(settings, name).epochs]


def _counts(settings: SegmenterConfig, workers: int) -> tuple[int, int]:
    """Positive and negative chips in a batch of each worker."""
    batch = settings.learning.batch // workers
    negatives = round(batch * settings.negatives)
    return batch - negatives, negatives


# -- the loop ---------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    """All stages in turn; a finished stage only returns its network."""
    settings: SegmenterConfig = config["settings"]
    read = Kept(config["chips"].read, limit=settings.learning.memory)
    config = config | {"device": session.device_of(config), "read": read}
    kept: State = session.UNTRAINED
    for name in _stages(settings):
        seed = settings.learning.seed + STAGES.index(name)
        kept = _stage(kept["weights"], config | {"stage": name, "prefix": f"{config['prefix']}/{name}", "seed": seed})
    return dict(kept["measures"])


def _stage(before: dict[str, Tensor], config: State) -> State:
    """One stage, from the weights of the previous one; return what it keeps: weights and measures."""
    settings: SegmenterConfig = config["settings"]
    stage: StageConfig = getattr(settings, config["stage"])
    state = session.load_checkpoint(config["prefix"], config["key"])
    if state and state["epoch"] == stage.epochs:
        return dict(state["best"])
    channels = config["chips"].read(0).shape[2]

    def network(weights: str | None) -> nn.Module:
        if not before or stage.restart:
            return settings.build(channels=channels, weights=weights)
        return restored()

    def restored() -> nn.Module:
        net = settings.build(channels=channels, weights="none")
        net.load_state_dict(before)
        return net

    learner, state = resumed(state, network, settings.learning, config, seed=config["seed"])
    masks = Masks(config["chips"], settings.positive, kept=settings.learning.memory // 4)

    def one_epoch(epoch: int) -> Epoch:
        # Labels are not stored: a resumed stage makes them again, from the weights it had at this epoch.
        if stage.relabel == "every epoch" or (stage.relabel == "once" and not masks.relabelled):
            own = epoch and stage.relabel == "every epoch"
            _relabel(masks, learner.shown if own else restored().to(config["device"]), config)
        measures = {"loss": _epoch(epoch, learner, masks, config), **_evaluate(learner, config)}
        order: tuple[float, ...] = (epoch,)
        if config["held_out"] and stage.best != "last":
            loss = -measures["held_out_loss"]
            order = (loss,) if stage.best == "loss" else (measures[stage.best], loss)
        return Epoch(measures, order, {})

    def samples() -> Iterator[Sample]:
        for k in config["chips"].where(settings.positive):
            yield config["chips"].ids[k], config["read"](int(k)).transpose(2, 0, 1), masks.coarse(int(k))

    shown = of_segments(samples, config["scaling"], unit=32 * settings.reduce)
    return run_epochs(one_epoch, learner, state, epochs=stage.epochs, config=config, shown=shown)


def _epoch(epoch: int, learner: Learner, masks: Masks, config: State) -> float:
    """Train for an epoch; return its mean loss."""
    settings: SegmenterConfig = config["settings"]
    stage: StageConfig = getattr(settings, config["stage"])
    chips: Chips = config["chips"]
    generator = session.seed_epoch(config["seed"], epoch)
    # 1. batches with the share of negatives, and the masks of the stage
    order = epoch_batches(
        chips.where(settings.positive),
        chips.where_not(settings.positive),
        counts=_counts(settings, session.world()),
        seed=settings.learning.seed,
        epoch=epoch,
        rank=session.rank(),
        world=session.world(),
    )
    # 2. a step per batch
    losses = []
    learner.train_mode()
    coming = read_ahead(order, config["read"], masks, threads=settings.learning.threads)
    for step, batch in enumerate(probe.batches(coming, len(order))):
        assert batch.masks_NMHW is not None
        pair = (batch.images_NCHW.to(config["device"]), batch.masks_NMHW.to(config["device"]))
        images, targets = augment(
            *pair, settings.augment, generator, size=settings.size, fill=settings.augment.fill(config["scaling"])
        )
        assert targets is not None
        rate = session.rate_at(stage.rates, epoch + step / len(order), gradual=settings.learning.gradual)
        loss_of = partial(_loss_of, learner, config["scaling"].normalize(images), targets, config)
        ids, what = partial(names_of, chips, batch.chips), f"{config['stage']}, epoch {epoch}, step {step}"
        losses.append(learner.step(loss_of, len(images), rate, items=ids, what=what))
    return float(np.mean(losses))


def _loss_of(learner: Learner, images: Tensor, targets: Tensor, config: State, part: slice) -> Tensor:
    """What a part of a batch adds to its loss."""
    settings: SegmenterConfig = config["settings"]
    stage: StageConfig = getattr(settings, config["stage"])
    with precision(settings.learning, images.device):
        logits = learner.net(images[part]).float()
    # The first target is the coarse mask, the last one the network's own label, if there is one.
    loss = LOSSES[settings.loss](logits, targets[part, -1:])
    if stage.relabel != "never" and stage.cue_weight:
        loss = loss + stage.cue_weight * LOSSES[settings.loss](logits, targets[part, :1])
    return loss * (len(logits) / len(images))


def _positives(config: State) -> list[Indices]:
    """This worker's positive chips, in batches."""
    settings: SegmenterConfig = config["settings"]
    positives = config["chips"].where(settings.positive)
    own = shard(positives, seed=settings.learning.seed, rank=session.rank(), world=session.world())
    return [own[k : k + settings.learning.batch] for k in range(0, len(own), settings.learning.batch)]


@torch.no_grad()
def _relabel(masks: Masks, teacher: nn.Module, config: State) -> None:
    """Label this worker's positive chips, without augmentation, by a network."""
    settings: SegmenterConfig = config["settings"]
    teacher.eval()
    stage: StageConfig = getattr(settings, config["stage"])
    positives = _positives(config)
    coming = read_ahead(positives, config["read"], masks.coarse, threads=settings.learning.threads)
    for batch in probe.batches(coming, len(positives), once=stage.relabel == "once"):
        assert batch.masks_NMHW is not None
        p = _predict(teacher, batch.images_NCHW, config, flip=settings.labelling.flip)
        masks.relabel(batch.chips, labelled(p, batch.masks_NMHW.to(p.device), settings.labelling))


def _predict(model: nn.Module, images_NCHW: Tensor, config: State, *, flip: bool = False) -> Tensor:
    """Probabilities (N, 1, H, W) of whole chips as they were read."""
    settings: SegmenterConfig = config["settings"]
    images = config["scaling"].normalize(images_NCHW.to(config["device"]))
    with precision(settings.learning, config["device"]):
        return probabilities(model, images, unit=32 * settings.reduce, flip=flip)


@torch.no_grad()
def _evaluate(learner: Learner, config: State) -> dict[str, float]:
    """Measures of all workers together on the held-out chips; none without them."""
    settings: SegmenterConfig = config["settings"]
    model = learner.show_mode(_inputs(config))
    held_out: Chips | None = config["held_out"]
    if held_out is None:
        return {}
    # Chips may differ in size, so each is a batch. Counts and loss travel between workers as one tensor.
    own = np.arange(session.rank(), len(held_out), session.world()).reshape(-1, 1)
    sums = torch.zeros(5, dtype=torch.float64)
    coming = read_ahead(own, held_out.read, held_out.read_mask, threads=settings.learning.threads)
    for batch in probe.batches(coming, len(own)):
        assert batch.masks_NMHW is not None
        p, reference = _predict(model, batch.images_NCHW, config).cpu(), batch.masks_NMHW
        counts = Confusion.from_arrays(reference.numpy(), (p > settings.labelling.above).numpy().astype(np.uint8), 2)
        sums[:4] += torch.from_numpy(counts.matrix.ravel())
        sums[4] += LOSSES["bce"](p.clamp(1e-6, 1 - 1e-6).logit(), reference)
    total = session.sum_over_workers(sums.to(config["device"])).cpu().numpy()
    confusion = Confusion(total[:4].reshape(2, 2).astype(np.int64))
    measures = {"accuracy": confusion.overall_accuracy, "f1": float(confusion.f1[1]), "iou": float(confusion.iou[1])}
    measures["mean_iou"] = confusion.mean_iou
    return measures | {"held_out_loss": float(total[4]) / len(held_out)}


def _inputs(config: State) -> Iterator[Tensor]:
    """The network's input of this worker's positive chips, without augmentation."""
    settings: SegmenterConfig = config["settings"]
    for batch in read_ahead(_positives(config), config["read"], threads=settings.learning.threads):
        images = batch.images_NCHW.to(config["device"])
        yield centre(images, settings.augment, config["scaling"], size=settings.size)
