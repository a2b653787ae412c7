"""Training of segmenters on coarse masks: warm-up, label correction, from scratch (Cao & Huang 2022, section 3.3).

    <prefix>/<stage>/checkpoint.pt    of each of the stages `warm_up`, `correction`, `scratch`

One loop serves all three: they differ in where the labels of an epoch come from.
"""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from rayseg.config import Config
from rayseg.errors import ConfigError, DataError
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling
from rayseg.store import StorePath, absolute, upath
from rayseg.train import probe, session
from rayseg.train.augment import Augment, augment, centre
from rayseg.train.batches import Chips, Indices, Kept, epoch_batches, read_ahead, shard
from rayseg.train.classifier import key_of, names_of
from rayseg.train.labels import LOSSES, Labelling, Masks, labelled, probabilities
from rayseg.train.learning import Learner, Learning, NetworkConfig, Rates, expect_size, precision

State = dict[str, Any]

STAGES = ("warm_up", "correction", "scratch")


class StageConfig(Config):
    """One stage: how long, how fast, on which labels."""

    epochs: Annotated[int, Field(ge=0)]
    """One epoch is one pass over the positive chips; 0 leaves the stage out."""
    rates: Rates
    """(until epoch, learning rate)."""
    restart: bool = False
    """Begin with a fresh network instead of the one of the stage before."""
    relabel: Literal["never", "once", "every epoch"] = "never"
    """When the network (of the stage before, for the first time) makes labels of its own for the positive chips."""
    cue_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss on the coarse masks beside that on the network's own labels."""
    best: Literal["last", "accuracy", "iou", "loss"] = "last"
    """Which epoch is kept, if there are chips with masks to measure on; else the last."""


class SegmenterConfig(NetworkConfig):
    """A segmenter and how it is trained; the defaults are the paper's."""

    architecture: str = "unet"
    """A name of segmentation_models_pytorch."""
    encoder: str = "regnety_040"
    """A name of segmentation_models_pytorch or of timm."""
    loss: Literal["bce_ssim_iou", "bce_iou", "bce"] = "bce_ssim_iou"
    """Sum of cross-entropy, 1 - SSIM and 1 - soft IoU; see rayseg.train.labels.LOSSES."""
    size: Annotated[int, Field(gt=0)] = 512
    """Side in pixels of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    positive: int = 0
    """Label of the chips that hold what is looked for."""
    negatives: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each batch that is negative chips with empty masks."""
    labelling: Labelling = Labelling()
    """How the network makes labels of its own."""
    warm_up: StageConfig = StageConfig(epochs=10, rates=((10, 1e-3),))
    """On the coarse masks."""
    correction: StageConfig = StageConfig(epochs=20, rates=((20, 1e-3),), relabel="every epoch", cue_weight=0.2)
    """On the network's own labels, with a little of the coarse masks."""
    scratch: StageConfig = StageConfig(
        epochs=35, rates=((15, 1e-3), (30, 1e-4), (35, 1e-5)), restart=True, relabel="once", best="accuracy"
    )
    """A fresh network on the last labels."""
    learning: Learning = Learning(batch=6)
    """How weights are changed."""
    augment: Augment = Augment()
    """What happens to training chips and their masks."""


def fit_segmenter(
    settings: SegmenterConfig,
    chips: Chips,
    *,
    prefix: StorePath,
    scaling: Scaling,
    held_out: Chips | None = None,
    workers: int = 0,
    use_gpu: bool = False,
    max_failures: int = 2,
) -> dict[str, float]:
    """Train a segmenter under `prefix`, or go on with one; return the measures of the epoch that is kept.

    `trained_segmenter` gives the network.

    Args:
        settings: the network and its training.
        chips: with `read_mask` for the positive ones: coarse masks, 1 of the class, 0 not, 255 unknown. Negative
            chips are empty by definition.
        prefix: where the checkpoints lie.
        scaling: how the chips' values become the network's input.
        held_out: chips with true masks (0, 1, 255 unknown) to measure on.
        workers: processes of Ray Train; 0 trains in this one.
        use_gpu: one GPU for each.
        max_failures: how often lost workers are replaced.

    Raises:
        ConfigError: batch, size or thresholds cannot be meant.
        DataError: chips or masks cannot be read, there are no positive ones, or the loss is no number.
        ModelError: the weights to start from or a checkpoint do not fit.
    """
    _check(settings, chips, max(workers, 1))
    config = {
        "settings": settings,
        "chips": chips,
        "held_out": held_out,
        "prefix": absolute(prefix),
        "scaling": scaling,
        "key": key_of(settings, chips, held_out),
    }
    return session.fit(
        _train, config, storage=prefix, name="segmenter", workers=workers, use_gpu=use_gpu, max_failures=max_failures
    )


def trained_segmenter(
    settings: SegmenterConfig, prefix: StorePath, *, stage: str | None = None, channels: int = 3
) -> nn.Module:
    """The network `fit_segmenter` kept under `prefix` at the end of a stage (the last one), in evaluation mode."""
    model = settings.build(channels=channels, weights="none")
    model.load_state_dict(session.best_weights(upath(prefix) / (stage or _stages(settings)[-1])))
    return model.eval()


def _check(settings: SegmenterConfig, chips: Chips, workers: int) -> None:
    if settings.learning.batch % workers or _counts(settings, workers)[0] < 1:
        raise ConfigError(
            f"batch {settings.learning.batch} with {settings.negatives:.0%} negatives cannot be shared by {workers} "
            "workers; make it a larger multiple of them"
        )
    expect_size(settings.size, reduce=settings.reduce, what="the segmenter's size")
    stages = _stages(settings)
    if not stages or getattr(settings, stages[0]).relabel != "never":
        raise ConfigError("the segmenter's first stage with epochs must learn from the coarse masks: relabel never")
    if chips.read_mask is None:
        raise DataError("the segmenter's chips have no masks; make coarse masks first")


def _stages(settings: SegmenterConfig) -> list[str]:
    return [name for name in STAGES if getattr(settings, name).epochs]


def _counts(settings: SegmenterConfig, workers: int) -> tuple[int, int]:
    """Positive and negative chips in a batch of each worker."""
    batch = settings.learning.batch // workers
    negatives = round(batch * settings.negatives)
    return batch - negatives, negatives


def _train(config: State) -> State:
    """All stages, one after the other; those that are done are only asked for their network."""
    settings: SegmenterConfig = config["settings"]
    device = session.device_of(config)
    read = Kept(config["chips"].read, limit=settings.learning.memory)
    before: State = session.NOTHING
    for name in _stages(settings):
        part = config | {"stage": name, "prefix": str(upath(config["prefix"]) / name), "device": device, "read": read}
        before = _stage(before["weights"], part)
    return dict(before["measures"])


def _stage(before: dict[str, Tensor], config: State) -> State:
    """One stage, from the weights of the one before; return what it keeps: weights and measures."""
    settings: SegmenterConfig = config["settings"]
    stage: StageConfig = getattr(settings, config["stage"])
    state = session.load_checkpoint(config["prefix"], config["key"]) or {"epoch": 0, "best": session.NOTHING}
    if state["epoch"] == stage.epochs:
        return dict(state["best"])
    learner = _learner(before, state, config)
    masks = Masks(config["chips"], settings.positive, kept=settings.learning.memory // 4)
    with session.scalars(config["prefix"]) as write:
        for epoch in probe.epochs(range(state["epoch"], stage.epochs)):
            if stage.relabel == "every epoch" or (stage.relabel == "once" and not masks.relabelled):
                teacher = learner.shown if epoch and stage.relabel == "every epoch" else _restored(before, config)
                _relabel(masks, teacher, config)
            loss = _epoch(epoch, learner, masks, config)
            measures = {"loss": loss, **_evaluate(learner, config)}
            order = _order_of(stage.best if config["held_out"] else "last", epoch, measures)
            state = {"epoch": epoch + 1, "best": session.better(state["best"], order, measures, learner.weights)}
            learner.keep(config["prefix"], config["key"], state)
            write(epoch, measures)
            session.report(measures)
    return dict(state["best"])


def _learner(before: dict[str, Tensor], state: State, config: State) -> Learner:
    """A learner at the point the stage has reached."""
    settings: SegmenterConfig = config["settings"]
    fresh = not before or getattr(settings, config["stage"]).restart
    torch.manual_seed(_seed(config))
    channels = config["chips"].read(0).shape[2]
    net = settings.build(channels=channels, weights=None if fresh and not state["epoch"] else "none")
    if not fresh:
        net.load_state_dict(before)
    learner = Learner.start(net, settings.learning, config["device"])
    if state["epoch"]:
        learner.resume(state["learner"])
        learner.is_kept(config["prefix"], state["epoch"])
    return learner


def _seed(config: State) -> int:
    seed: int = config["settings"].learning.seed + STAGES.index(config["stage"])
    return seed


def _restored(weights: dict[str, Tensor], config: State) -> nn.Module:
    settings: SegmenterConfig = config["settings"]
    net = settings.build(channels=config["chips"].read(0).shape[2], weights="none")
    net.load_state_dict(weights)
    return net.to(config["device"])


def _epoch(epoch: int, learner: Learner, masks: Masks, config: State) -> float:
    """The mean loss of an epoch."""
    settings: SegmenterConfig = config["settings"]
    stage: StageConfig = getattr(settings, config["stage"])
    chips: Chips = config["chips"]
    generator = session.seed_epoch(_seed(config), epoch)
    order = _order(epoch, config)
    step_losses = []
    learner.train_mode()
    coming = read_ahead(order, config["read"], masks, threads=settings.learning.threads)
    for step, batch in enumerate(probe.batches(coming, len(order))):
        assert batch.masks_NMHW is not None
        given = (batch.images_NCHW.to(config["device"]), batch.masks_NMHW.to(config["device"]))
        images, targets = augment(*given, settings.augment, generator, size=settings.size)
        assert targets is not None
        rate = session.rate_at(stage.rates, epoch + step / len(order), gradual=settings.learning.gradual)
        loss_of = partial(_loss_of, learner, config["scaling"].normalize(images), targets, config)
        said, what = partial(names_of, chips, batch.chips), f"{config['stage']}, epoch {epoch}, step {step}"
        step_losses.append(learner.step(loss_of, len(images), rate, items=said, what=what))
    return float(np.mean(step_losses))


def _loss_of(learner: Learner, images: Tensor, targets: Tensor, config: State, part: slice) -> Tensor:
    """What a part of a batch adds to its loss."""
    settings: SegmenterConfig = config["settings"]
    stage: StageConfig = getattr(settings, config["stage"])
    with precision(settings.learning, images.device):
        logits = learner.net(images[part]).float()
    loss = LOSSES[settings.loss](logits, targets[part, -1:])
    if stage.relabel != "never" and stage.cue_weight:
        loss = loss + stage.cue_weight * LOSSES[settings.loss](logits, targets[part, :1])
    return loss * (len(logits) / len(images))


def _order(epoch: int, config: State) -> list[Indices]:
    """This worker's batches of an epoch."""
    settings: SegmenterConfig = config["settings"]
    return epoch_batches(
        config["chips"].where(settings.positive),
        config["chips"].where_not(settings.positive),
        counts=_counts(settings, session.world()),
        seed=settings.learning.seed,
        epoch=epoch,
        rank=session.rank(),
        world=session.world(),
    )


def _mine(config: State) -> list[Indices]:
    """This worker's positive chips, in batches."""
    settings: SegmenterConfig = config["settings"]
    positives = config["chips"].where(settings.positive)
    mine = shard(positives, seed=settings.learning.seed, rank=session.rank(), world=session.world())
    batch = settings.learning.batch
    return [mine[k : k + batch] for k in range(0, len(mine), batch)]


@torch.no_grad()
def _relabel(masks: Masks, teacher: nn.Module, config: State) -> None:
    """New labels of this worker's positive chips, not augmented, by a network."""
    settings: SegmenterConfig = config["settings"]
    teacher.eval()
    stage: StageConfig = getattr(settings, config["stage"])
    mine = _mine(config)
    coming = read_ahead(mine, config["read"], masks.coarse, threads=settings.learning.threads)
    for batch in probe.batches(coming, len(mine), once=stage.relabel == "once"):
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
    """Measures of all workers together on the chips held out; none without them."""
    settings: SegmenterConfig = config["settings"]
    model = learner.show_mode(_as_seen(config))
    held_out: Chips | None = config["held_out"]
    if held_out is None:
        return {}
    mine = np.arange(session.rank(), len(held_out), session.world()).reshape(-1, 1)
    sums = torch.zeros(5, dtype=torch.float64)
    coming = read_ahead(mine, held_out.read, held_out.read_mask, threads=settings.learning.threads)
    for batch in probe.batches(coming, len(mine)):
        assert batch.masks_NMHW is not None
        p, truth = _predict(model, batch.images_NCHW, config).cpu(), batch.masks_NMHW
        counts = Confusion.from_arrays(truth.numpy(), (p > settings.labelling.above).numpy().astype(np.uint8), 2)
        sums[:4] += torch.from_numpy(counts.matrix.ravel())
        sums[4] += LOSSES["bce"](p.clamp(1e-6, 1 - 1e-6).logit(), truth)
    total = session.summed(sums.to(config["device"])).cpu().numpy()
    confusion = Confusion(total[:4].reshape(2, 2).astype(np.int64))
    measures = {"accuracy": confusion.overall_accuracy, "iou": float(confusion.iou[1]), "mean_iou": confusion.mean_iou}
    return measures | {"held_out_loss": float(total[4]) / len(held_out)}


def _as_seen(config: State) -> Iterator[Tensor]:
    """This worker's positive chips as the network sees them, not augmented."""
    settings: SegmenterConfig = config["settings"]
    for batch in read_ahead(_mine(config), config["read"], threads=settings.learning.threads):
        images, _ = centre(batch.images_NCHW.to(config["device"]), None, size=settings.size)
        yield config["scaling"].normalize(images)


def _order_of(best: str, epoch: int, measures: State) -> tuple[float, ...]:
    """What makes an epoch better than another: the first number, then the next."""
    if best == "last":
        return (epoch,)
    return (-measures["held_out_loss"],) if best == "loss" else (measures[best], -measures["held_out_loss"])
