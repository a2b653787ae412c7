"""S4GAN: a segmenter learns from few masks, and from images without masks by a discriminator (Mittal et al. 2019).

    <prefix>/checkpoint.pt    both networks after every `checkpoint` steps, and the best segmenter so far

Every checkpoint is evaluated on the validation chips. Random numbers and batches are functions of the seed and the
step, so a training resumed from a checkpoint gives the weights of an undisturbed one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayseg.config import Config, added
from rayseg.errors import DataError
from rayseg.metrics import Confusion
from rayseg.models import published_weights
from rayseg.models.bundle import Scaling
from rayseg.models.discriminator import (
    Discriminator,
    discriminator_loss,
    expect_seen,
    feature_matching,
    one_hot,
    poly,
    self_training,
)
from rayseg.models.encoders import read_state
from rayseg.models.losses import cross_entropy_sum, mass
from rayseg.train import probe, session
from rayseg.train.augment import Augment, augment, centre
from rayseg.train.batches import Batch, Chips, Indices, Kept, endless, read_ahead, shard, whole_units
from rayseg.train.classifier import key_of, names_of
from rayseg.train.frozen import HeadedConfig
from rayseg.train.learning import Groups, Learner, Learning, expect_batch, expect_size, precision
from rayseg.train.pictures import Pictures, Sample, of_segments
from rayseg.train.session import Setup, State

STREAMS = {"labelled": 1, "unlabelled": 2, "drawn": 3}
"""Stream of batches -> number that seeds its order; `drawn` gives the real masks for the discriminator."""
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]


class DiscriminatorConfig(Config):
    """The discriminator and its weight in the segmenter's loss."""

    width: Annotated[int, Field(gt=0)] = 64
    """Channels of its first layer; each further layer has twice as many."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the channels dropped after its first three layers."""
    rate: Positive = 1e-4
    """Learning rate of its Adam (betas .9, .99)."""
    match: Share = 0.1
    """Weight of feature matching in the segmenter's loss."""
    teach: Share = 1.0
    """Weight of self-training in the segmenter's loss."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Score above which a predicted map is used for self-training."""
    after: Annotated[int, Field(ge=0)] = 1000
    """Steps before self-training begins."""
    start: session.Weights | None = added(default=None)
    """Checkpoint of a discriminator, as the published code saves it, from which it learns on."""

    def build(self, *, classes: int, channels: int) -> Discriminator:
        """The discriminator, untrained or as in `start`.

        Raises:
            ModelError: the checkpoint cannot be read or lacks a tensor of the network.
        """
        judge = Discriminator(classes=classes, channels=channels, width=self.width, dropout=self.dropout)
        if self.start:
            judge.load_state_dict(published_weights.fit(judge, read_state(self.start), self.start).state)
        return judge


class ConsistencyConfig(Config):
    """Weak-to-strong consistency; the defaults are the paper's, except the thresholds of single classes."""

    teacher: Annotated[float, Field(gt=0, lt=1)] = 0.996
    """Decay of the teacher, a moving average of the weights, unless `learning.average` is set."""
    weight: Share = 1.0
    """Weight of the images without masks relative to those with masks."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Probability above which a pixel's class by the teacher is learnt; lower for classes of less sure pixels."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of each class's probability, by which its threshold is lowered."""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the strong views that get a rectangle of another image (CutMix)."""
    views: Augment = Augment(
        flip=0.0, quadrants=0.0, rotate=0.0, jitter=0.8, brightness=0.5, contrast=0.5, saturation=(0.0, 1.5), hue=0.25
    )
    """Changes of colour of the strong views; changes of geometry are refused, for the teacher's map would not fit."""

    @model_validator(mode="after")
    def _colours_alone(self) -> "ConsistencyConfig":
        views = self.views
        moved = [name for name in ("flip", "quadrants", "rotate") if getattr(views, name)]
        moved += [name for name, plain in (("crop", "centre"), ("scale", (1.0, 1.0))) if getattr(views, name) != plain]
        if moved:
            raise ValueError(f"views change geometry by {', '.join(moved)}, expected colours alone; leave it out")
        return self


class S4ganConfig(HeadedConfig):
    """A segmenter of few masks and its training; the defaults are the paper's, but for its DeepLab v2."""

    architecture: str = "deeplabv3plus"
    """A name of segmentation_models_pytorch, or "deeplabv2", the paper's."""
    encoder: str = "resnet101"
    """A name of segmentation_models_pytorch or of timm."""
    size: Annotated[int, Field(gt=0)] = 320
    """Side in px of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    steps: Annotated[int, Field(gt=0)] = 20_000
    """Steps of training, over which the rates fall to 0."""
    checkpoint: Annotated[int, Field(gt=0)] = 100
    """Steps between checkpoints, each of which is evaluated."""
    rate: Positive = 2.5e-4
    """Learning rate of the encoder, multiplied by `learning.encoder_rate`."""
    head_rate: Positive = 10.0
    """Learning rate of all other weights, relative to `rate`."""
    bias_rate: Positive = 20.0
    """Learning rate of all other biases, relative to `rate`; they have no weight decay."""
    power: Positive = 0.9
    """Exponent of the rates' decay."""
    every: Annotated[int, Field(gt=0)] = 10
    """Steps between changes of the segmenter's rates."""
    discriminator: DiscriminatorConfig | None = DiscriminatorConfig()
    """None trains on the masks alone; the learner consistency has none."""
    learning: Learning = Learning(batch=10, optimizer="sgd", weight_decay=5e-4)
    """How weights are changed; labelled, unlabelled and real batches have the same size."""
    augment: Augment = Augment(crop="random", scale=(0.5, 1.6), quadrants=0.0, rotate=0.0)
    """Augmentation of the training chips and their masks."""
    learner: Literal["s4gan", "consistency"] = added(default="s4gan")
    """How images without masks teach: by a discriminator, or by the consistency of views with a teacher."""
    consistency: ConsistencyConfig = added(default=ConsistencyConfig())
    """learner consistency: its teacher and its views."""

    @property
    def uses_unlabelled(self) -> bool:
        """Whether images without masks teach."""
        return self.network == "decoder" and (self.learner == "consistency" or self.discriminator is not None)


@dataclass
class Pair:
    """Segmenter and discriminator in training.

    Attributes:
        settings: of both.
        segmenter: class maps from images.
        discriminator: None where the segmenter learns from masks alone.
    """

    settings: S4ganConfig
    segmenter: Learner
    discriminator: Learner | None

    @classmethod
    def start(
        cls, net: nn.Module, settings: S4ganConfig, device: torch.device, *, classes: int, channels: int
    ) -> "Pair":
        """A learner of `net` and, if configured, a learner of a new discriminator."""
        segmenter = Learner.start(net, settings.learning, device, groups_of(net, settings))
        if (chosen := settings.discriminator) is None:
            return cls(settings, segmenter, None)
        judge = chosen.build(classes=classes, channels=channels)
        groups = [{"params": list(judge.parameters()), "factor": 1.0, "betas": (0.9, 0.99)}]
        return cls(settings, segmenter, Learner.start(judge, Learning(optimizer="adam"), device, groups))

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of segmenter and discriminator at a step."""
        settings = self.settings
        rate = poly(settings.rate, step, settings.steps, power=settings.power, every=settings.every)
        if settings.discriminator is None:
            return rate, 0.0
        return rate, poly(settings.discriminator.rate, step, settings.steps, power=settings.power)


def groups_of(net: nn.Module, settings: S4ganConfig) -> Groups:
    """The encoder's weights at the rate itself, all other weights and biases at multiples of it."""
    # As the published code does: the decoder learns from scratch, ten times as fast as the encoder.
    encoder = list(net.get_submodule("encoder").parameters())
    inside = {id(weight) for weight in encoder}
    rest = [(name, weight) for name, weight in net.named_parameters() if id(weight) not in inside]
    trained = [weight for weight in encoder if settings.learning.encoder_rate]
    weights = [weight for name, weight in rest if not name.endswith("bias")]
    biases = [weight for name, weight in rest if name.endswith("bias")]
    return [
        {"params": trained, "factor": settings.learning.encoder_rate},
        {"params": weights, "factor": settings.head_rate},
        {"params": biases, "factor": settings.bias_rate, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Data:
    """Chips of a training.

    Attributes:
        labelled: chips with masks of 0..K-1, 255 = not labelled; K is their `classes`.
        unlabelled: chips without masks, or None.
        validation: chips with masks to choose the checkpoint by, or None to keep the last one.
    """

    labelled: Chips
    unlabelled: Chips | None
    validation: Chips | None


def fit_s4gan(settings: S4ganConfig, data: Data, setup: Setup, *, scaling: Scaling) -> dict[str, float]:
    """Train a segmenter, or resume its training; return the measures of the checkpoint that is kept.

    The kept checkpoint has the highest mean IoU over the classes in the validation masks. `learning.trained` returns
    the network.

    Args:
        settings: the networks and their training.
        data: to learn from and to choose the checkpoint by.
        setup: where the training runs.
        scaling: from the chips' values to the segmenter's input.

    Raises:
        ConfigError: batch, size or architecture are invalid.
        DataError: chips or masks cannot be read, no chip has a mask, or the loss is not finite.
        ModelError: the initial weights or the checkpoint do not fit.
    """
    return fit_by(_train, settings, data, setup, scaling=scaling, name="s4gan")


def fit_by(
    loop: session.Loop, settings: S4ganConfig, data: Data, setup: Setup, *, scaling: Scaling, name: str
) -> dict[str, float]:
    """Check settings and chips, then train as `fit_s4gan` does, by another loop; `name` is for messages."""
    expect_trainable(settings, workers=setup.workers)
    if data.labelled.read_mask is None or not len(data.labelled):
        raise DataError("no chip has a mask, expected some to learn from; draw masks or add them")
    # The key names the unlabelled chips, too: they have no labels, but they teach.
    ids = [part.ids if part else None for part in (data.labelled, data.unlabelled, data.validation)]
    key = f"{key_of(settings, data.labelled, data.validation)} {ids!r}"
    config = {"settings": settings, "data": data, "scaling": scaling, "key": key}
    return session.fit(loop, config, setup, name=name)


def expect_trainable(settings: S4ganConfig, *, workers: int) -> None:
    """Raise ConfigError if the workers cannot share the batch, or the networks cannot halve the windows."""
    expect_batch(settings.learning, workers=workers, what="segmenter")
    expect_size(settings.size, reduce=settings.reduce, what="the segmenter's size")
    if settings.learner == "s4gan" and settings.discriminator:
        expect_seen(settings.size)


# -- training ----------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    settings: S4ganConfig = config["settings"]
    data = in_memory(config["data"], settings.learning.memory)
    config = config | {"device": session.device_of(config), "data": data}
    # 1. both networks, as they were at the last checkpoint
    state = session.load_checkpoint(config["prefix"], config["key"])
    torch.manual_seed(settings.learning.seed)
    shape = {"classes": data.labelled.count, "channels": data.labelled.read(0).shape[2]}
    net = settings.build(**shape, weights="none" if state else None)
    pair = Pair.start(net, settings, config["device"], **shape)
    if state:
        pair.segmenter.resume(state["learner"])
        if pair.discriminator:
            pair.discriminator.resume(state["judge"])
        pair.segmenter.note_kept(config["prefix"], state["epoch"])
    # 2. the steps, from checkpoint to checkpoint
    return run_checkpoints(
        lambda first: _steps(first, pair, config),
        pair.segmenter,
        state,
        config,
        more=lambda: {"judge": pair.discriminator.state() if pair.discriminator else None},
    )


def run_checkpoints(
    make_steps: Callable[[int], dict[str, float]],
    learner: Learner,
    state: State | None,
    config: State,
    *,
    more: Callable[[], State],
) -> State:
    """Make the steps from the checkpoint `state` to the last, each checkpoint evaluated; return the best's measures.

    Args:
        make_steps: makes the steps from one up to the next checkpoint; returns the mean of each loss.
        learner: of the segmenter.
        state: of the checkpoint; None to start.
        config: of the loop.
        more: what checkpoints hold besides the segmenter.
    """
    settings: S4ganConfig = config["settings"]
    shown = pictures_of(config["data"], config["scaling"], unit=32 * settings.reduce)
    state = state or {"step": 0, "epoch": 0, "best": session.UNTRAINED}
    with session.scalars(config["prefix"]) as write:
        starts = range(state["step"], settings.steps, settings.checkpoint)
        for first in probe.epochs(starts, count=(settings.steps - state["step"]) / settings.checkpoint):
            measures = make_steps(first) | _measure(learner, config)
            step = min(first + settings.checkpoint, settings.steps)
            order = (measures["mean_iou"],) if config["data"].validation else (step,)
            noted = {"step": float(step), **measures}
            # The checkpoint has the best weights so far, so that a resumed training can still keep them.
            best = session.better(state["best"], order, noted, learner.weights)
            state = {"step": step, "epoch": state["epoch"] + 1, "best": best}
            learner.keep(config["prefix"], config["key"], state | more())
            pictures = learner.pictures(shown, state["epoch"] - 1, -(-settings.steps // settings.checkpoint))
            write(state["epoch"] - 1, measures | learner.rates(), pictures)
            session.note(config, step, settings.steps, measures, unit="step")
            session.report(measures)
    return dict(state["best"]["measures"])


def pictures_of(data: Data, scaling: Scaling, *, unit: int) -> Pictures:
    """Pictures of validation chips, else of labelled ones, with their masks."""
    chips = data.validation or data.labelled

    def samples() -> Iterator[Sample]:
        for k, name in enumerate(chips.ids):
            yield name, chips.read(k).transpose(2, 0, 1), chips.read_mask(k) if chips.read_mask else None

    return of_segments(samples, scaling, unit=unit)


def in_memory(data: Data, memory: int) -> Data:
    """The same chips, of which those read first stay in memory: most of it is for the images without masks."""

    def kept(chips: Chips, *, images: int, masks: int) -> Chips:
        read_mask = Kept(chips.read_mask, limit=masks * (memory // 8)) if chips.read_mask and masks else None
        return replace(chips, read=Kept(chips.read, limit=images * (memory // 8)), read_mask=read_mask)

    return Data(
        kept(data.labelled, images=2, masks=1),
        kept(data.unlabelled, images=3, masks=0) if data.unlabelled else None,
        kept(data.validation, images=1, masks=1) if data.validation and data.validation.read_mask else None,
    )


def stream(name: str, first: int, last: int, config: State) -> Iterator[Batch]:
    """The batches of a stream from step `first` to `last`."""
    data: Data = config["data"]
    settings: S4ganConfig = config["settings"]
    chips = data.unlabelled if name == "unlabelled" else data.labelled
    assert chips is not None
    order = _order(name, len(chips), first, last, settings.learning)
    return read_ahead(order, chips.read, chips.read_mask, threads=settings.learning.threads)


def _order(name: str, count: int, first: int, last: int, learning: Learning) -> list[Indices]:
    rank, world, size = session.rank(), session.world(), learning.batch // session.world()
    # Fewer chips than workers: each worker then uses all of them.
    own = shard(np.arange(count), seed=learning.seed, rank=rank, world=world) if count >= world else np.arange(count)
    row = endless(own, first * size, (last - first) * size, seed=(learning.seed, STREAMS[name], rank))
    return list(row.reshape(last - first, size))


def names_in(sources: Sequence[Chips | None], batches: Sequence[Batch]) -> str:
    """The ids of the chips in a batch of each source, for messages."""
    return "; ".join(names_of(part, batch.chips) for part, batch in zip(sources, batches, strict=True) if part)


class StepData(NamedTuple):
    """(images, masks) of a step: labelled, unlabelled, and real ones for the discriminator."""

    labelled: tuple[Tensor, Tensor | None]
    unlabelled: tuple[Tensor, Tensor | None] | None = None
    drawn: tuple[Tensor, Tensor | None] | None = None


def _steps(first: int, pair: Pair, config: State) -> dict[str, float]:
    """Make the steps up to the next checkpoint; return the mean of each loss."""
    settings: S4ganConfig = config["settings"]
    data: Data = config["data"]
    last = min(first + settings.checkpoint, settings.steps)
    generator = session.seed_epoch(settings.learning.seed, first)
    # Without images without masks there is nothing to judge.
    names = list(STREAMS) if pair.discriminator and data.unlabelled else ["labelled"]
    sources = [data.labelled, data.unlabelled, data.labelled][: len(names)]
    streams = [stream(name, first, last, config) for name in names]
    pair.segmenter.train_mode()
    if pair.discriminator:
        pair.discriminator.net.train()

    losses: dict[str, list[float]] = {}
    for step, batches in enumerate(probe.batches(zip(*streams, strict=True), last - first), first):
        shown = StepData(*(augmented(batch, generator, config) for batch in batches))
        for name, loss in _step(step, shown, pair, config, partial(names_in, sources, batches)).items():
            losses.setdefault(name, []).append(loss)
    return {name: float(np.mean(values)) for name, values in losses.items()}


def augmented(batch: Batch, generator: torch.Generator, config: State) -> tuple[Tensor, Tensor | None]:
    """Images (values as they were read, float32) and masks_NHW int64 of a batch, on the device.

    Images without masks get one where windows may reach beyond them: 255 beyond, 0 elsewhere.
    """
    settings: S4ganConfig = config["settings"]
    images, masks = batch.images_NCHW.to(config["device"]), batch.masks_NMHW
    fill = settings.augment.fill(config["scaling"])
    if masks is None and fill:
        masks = images.new_zeros(len(images), 1, *images.shape[2:])
    masks = None if masks is None else masks.to(config["device"])
    images, masks = augment(images, masks, settings.augment, generator, size=settings.size, fill=fill)
    return images, None if masks is None else masks[:, 0].long()


class Judged(NamedTuple):
    """What the segmenter's part of a step computes for the discriminator's: its inputs, and measures to write."""

    fake: Tensor
    real: Tensor
    measures: dict[str, float]


def _step(step: int, shown: StepData, pair: Pair, config: State, items: Callable[[], str]) -> dict[str, float]:
    """Make one step of both networks; return the losses."""
    rate, judging_rate = pair.rates(step)
    what, count = f"s4gan, step {step}", len(shown.labelled[0])
    # 1. the segmenter, by all three of its losses
    parts: list[Judged] = []
    assert shown.labelled[1] is not None
    share = session.batch_share(mass(shown.labelled[1]))
    loss_of = partial(_loss_of, step, shown, share, pair, config, parts)
    loss = pair.segmenter.step(loss_of, count, rate, items=items, what=what)
    if pair.discriminator is None or shown.unlabelled is None:
        return {"loss": loss}
    # 2. the discriminator, on the maps that the segmenter gave before its step
    pair.discriminator.net.requires_grad_(True)
    fake, real = (torch.cat([getattr(part, side) for part in parts]) for side in ("fake", "real"))
    judge_loss_of = partial(_judge_loss_of, pair.discriminator.net, fake, real)
    judge_loss = pair.discriminator.step(judge_loss_of, count, judging_rate, items=items, what=f"{what}, discriminator")
    means = {name: float(np.mean([part.measures[name] for part in parts])) for name in parts[0].measures}
    return {"loss": loss, **means, "discriminator_loss": judge_loss}


def _loss_of(
    step: int, shown: StepData, share: Tensor, pair: Pair, config: State, parts: list[Judged], part: slice
) -> Tensor:
    """What a part of the batches adds to the segmenter's loss; matching and self-training use the part alone."""
    if not part.start:
        parts.clear()  # a step begins again where memory was short
    # 1. cross-entropy against the masks
    images, masks = shown.labelled
    assert masks is not None
    supervised: Tensor = cross_entropy_sum(logits_of(pair.segmenter.net, images[part], config), masks[part]) * share
    if pair.discriminator is None or shown.unlabelled is None or shown.drawn is None:
        return supervised
    settings, judge = pair.settings.discriminator, pair.discriminator.net
    assert settings is not None
    assert shown.drawn[1] is not None
    # 2. feature matching and self-training: gradients pass through the discriminator, and leave its weights alone
    unlabelled = shown.unlabelled[0][part]
    logits = logits_of(pair.segmenter.net, unlabelled, config)
    fake = torch.cat([logits.softmax(dim=1), unlabelled / 255], dim=1)
    real = torch.cat([one_hot(shown.drawn[1][part], logits.shape[1]), shown.drawn[0][part] / 255], dim=1)
    judge.requires_grad_(False)
    scores, features = judge(fake)
    matching = feature_matching(judge(real)[1], features)
    teaching, count = self_training(logits, scores.detach().sigmoid(), settings.threshold)
    measures = {
        "ce_loss": supervised,
        "matching_loss": matching,
        "self_training_loss": teaching,
        "score": scores.sigmoid().mean(),
    }
    numbers = {name: float(value.detach()) for name, value in measures.items()}
    parts.append(Judged(fake.detach(), real, numbers | {"taught": count / len(logits)}))
    taught = settings.teach * teaching if step >= settings.after else 0.0
    loss: Tensor = supervised + (settings.match * matching + taught) * (len(logits) / len(images))
    return loss


def _judge_loss_of(judge: nn.Module, fake: Tensor, real: Tensor, part: slice) -> Tensor:
    """What a part of both batches adds to the discriminator's loss."""
    loss = discriminator_loss(judge(real[part])[0], judge(fake[part])[0])
    return loss * (len(fake[part]) / len(fake))


def logits_of(net: nn.Module, images: Tensor, config: State) -> Tensor:
    """Float32 logits of images with values as they were read."""
    with precision(config["settings"].learning, images.device):
        logits: Tensor = net(config["scaling"].normalize(images))
    return logits.float()


# -- evaluation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(learner: Learner, config: State) -> dict[str, float]:
    """Measures of all workers together on the validation chips; none without them."""
    chips: Chips | None = config["data"].validation
    if chips is None:
        return {}
    counts = torch.zeros(chips.count**2, dtype=torch.float64)
    own = range(session.rank(), len(chips), session.world())
    net = learner.show_mode(_inputs(config))
    for confusion in confusions(net, chips, own, config["scaling"], unit=32 * config["settings"].reduce):
        counts += torch.from_numpy(confusion.matrix.ravel())
    total = session.sum_over_workers(counts.to(config["device"])).cpu().numpy().astype(np.int64)
    return measures_of(Confusion(total.reshape(chips.count, chips.count)))


def _inputs(config: State) -> Iterator[Tensor]:
    """The segmenter's input of the labelled chips, without augmentation."""
    settings: S4ganConfig = config["settings"]
    chips: Chips = config["data"].labelled
    order = _order("labelled", len(chips), 0, settings.learning.recalibrate, settings.learning)
    for batch in read_ahead(order, chips.read):
        images = batch.images_NCHW.to(config["device"])
        yield centre(images, settings.augment, config["scaling"], size=settings.size)


@torch.no_grad()
def confusions(
    net: nn.Module, chips: Chips, positions: Iterable[int], scaling: Scaling, *, unit: int
) -> list[Confusion]:
    """Confusion of the network's prediction on each of the chips, which are padded to whole units."""
    assert chips.read_mask is not None
    net.eval()
    device = next(net.parameters()).device
    matrices = []
    singles = [np.array([position]) for position in positions]
    for batch in probe.batches(read_ahead(singles, chips.read, chips.read_mask), len(singles)):
        assert batch.masks_NMHW is not None
        images = scaling.normalize(batch.images_NCHW.to(device))
        height, width = images.shape[2:]
        predicted = net(whole_units(images, unit))[..., :height, :width].argmax(dim=1).cpu().numpy()
        matrices.append(Confusion.from_arrays(batch.masks_NMHW[:, 0].numpy(), predicted, chips.count))
    return matrices


def measures_of(confusion: Confusion) -> dict[str, float]:
    """The paper's measures; the mean IoU is over the classes in the reference."""
    return {
        "mean_iou": confusion.mean_iou_of_reference,
        "accuracy": confusion.overall_accuracy,
        "class_accuracy": confusion.class_accuracy,
        "fw_iou": confusion.fw_iou,
    }
