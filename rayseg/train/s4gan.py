"""S4GAN: a segmenter learns from few masks, and from images without masks by a discriminator (Mittal et al. 2019).

    <prefix>/checkpoint.pt    both networks after every `checkpoint` steps, and the best segmenter so far

Every checkpoint is measured on the validation chips. Random numbers and batches are functions of the seed and the step,
so a training that goes on from a checkpoint is the one that was not disturbed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from rayseg.config import Config
from rayseg.errors import DataError
from rayseg.metrics import Confusion
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
from rayseg.models.losses import cross_entropy_sum, mass
from rayseg.store import StorePath, absolute
from rayseg.train import probe, session
from rayseg.train.augment import Augment, augment, centre
from rayseg.train.batches import Batch, Chips, Indices, Kept, endless, read_ahead, shard
from rayseg.train.classifier import key_of, names_of
from rayseg.train.learning import Learner, Learning, NetworkConfig, expect_batch, expect_size, precision

State = dict[str, Any]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]


class DiscriminatorConfig(Config):
    """The discriminator and what it gives the segmenter."""

    width: Annotated[int, Field(gt=0)] = 64
    """Channels of its first layer; the next have twice as many each."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the channels dropped after its first three layers."""
    rate: Positive = 1e-4
    """Learning rate of its Adam (betas .9, .99)."""
    match: Share = 0.1
    """Weight of feature matching in the segmenter's loss."""
    teach: Share = 1.0
    """Weight of self-training in the segmenter's loss."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Score above which a predicted map teaches itself."""
    after: Annotated[int, Field(ge=0)] = 1000
    """Steps before any does."""


class S4ganConfig(NetworkConfig):
    """A segmenter and how it is trained; the defaults are the paper's but for the architecture, which is DeepLab v2."""

    architecture: str = "deeplabv3plus"
    """A name of segmentation_models_pytorch."""
    encoder: str = "resnet101"
    """A name of segmentation_models_pytorch or of timm."""
    size: Annotated[int, Field(gt=0)] = 320
    """Side in pixels of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    steps: Annotated[int, Field(gt=0)] = 20_000
    """Steps of training; the rates fall to 0 with them."""
    checkpoint: Annotated[int, Field(gt=0)] = 100
    """Steps from one checkpoint, which is measured, to the next."""
    rate: Positive = 2.5e-4
    """Learning rate of the encoder, times `learning.encoder_rate`."""
    head_rate: Positive = 10.0
    """Learning rate of all other weights relative to it."""
    bias_rate: Positive = 20.0
    """Learning rate of all other biases relative to it; weight decay leaves them alone."""
    power: Positive = 0.9
    """Exponent by which the rates fall."""
    every: Annotated[int, Field(gt=0)] = 10
    """Steps after which the segmenter's rates change."""
    discriminator: DiscriminatorConfig | None = DiscriminatorConfig()
    """None learns from the masks alone."""
    learning: Learning = Learning(batch=10, optimizer="sgd", weight_decay=5e-4)
    """How weights are changed; batches of labelled and unlabelled chips, and of masks to compare with, are equal."""
    augment: Augment = Augment(crop="random", scale=(0.5, 1.6), quadrants=0.0, rotate=0.0)
    """What happens to training chips and their masks."""


@dataclass
class Pair:
    """Segmenter and discriminator in training.

    Attributes:
        settings: of both.
        segmenter: maps of classes from images.
        judge: the discriminator; None where the segmenter learns from masks alone.
    """

    settings: S4ganConfig
    segmenter: Learner
    judge: Learner | None

    @classmethod
    def start(
        cls, net: nn.Module, settings: S4ganConfig, device: torch.device, *, classes: int, channels: int
    ) -> "Pair":
        """A pair of `net` and, if it is asked for, a discriminator of its answers."""
        segmenter = Learner.start(net, settings.learning, device, _groups(net, settings))
        judge = None
        if (chosen := settings.discriminator) is not None:
            judged = Discriminator(classes=classes, channels=channels, width=chosen.width, dropout=chosen.dropout)
            groups = [{"params": list(judged.parameters()), "factor": 1.0, "betas": (0.9, 0.99)}]
            judge = Learner.start(judged, Learning(optimizer="adam"), device, groups)
        return cls(settings, segmenter, judge)

    def train_mode(self) -> None:
        """Make both ready for steps."""
        self.segmenter.train_mode()
        if self.judge:
            self.judge.net.train()

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of both at a step."""
        settings = self.settings
        own = poly(settings.rate, step, settings.steps, power=settings.power, every=settings.every)
        if settings.discriminator is None:
            return own, 0.0
        return own, poly(settings.discriminator.rate, step, settings.steps, power=settings.power)

    def state(self) -> State:
        """What must be remembered of the discriminator, besides the segmenter."""
        return {"judge": self.judge.state() if self.judge else None}

    def resume(self, state: State) -> None:
        """Go on from a checkpoint of another pair with the same settings."""
        self.segmenter.resume(state["learner"])
        if self.judge:
            self.judge.resume(state["judge"])


def _groups(net: nn.Module, settings: S4ganConfig) -> list[dict[str, Any]]:
    """The encoder's weights at the rate itself, the others' and their biases at multiples of it."""
    encoder = list(net.get_submodule("encoder").parameters())
    inside = {id(weight) for weight in encoder}
    rest = [(name, weight) for name, weight in net.named_parameters() if id(weight) not in inside]
    biases = [weight for name, weight in rest if name.endswith("bias")]
    others = [weight for name, weight in rest if not name.endswith("bias")]
    trained = [weight for weight in encoder if settings.learning.encoder_rate]
    return [
        {"params": trained, "factor": settings.learning.encoder_rate},
        {"params": others, "factor": settings.head_rate},
        {"params": biases, "factor": settings.bias_rate, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Data:
    """What is learnt from.

    Attributes:
        labelled: chips with masks of 0..K-1, 255 = not labelled; `classes` says K.
        unlabelled: chips whose masks are not known, or None.
        validation: chips with masks to choose the checkpoint by, or None for the last one.
    """

    labelled: Chips
    unlabelled: Chips | None
    validation: Chips | None

    @property
    def ids(self) -> str:
        """All chips by their part, as text."""
        return repr([part.ids if part else None for part in (self.labelled, self.unlabelled, self.validation)])


def fit_s4gan(
    settings: S4ganConfig, data: Data, *, prefix: StorePath, scaling: Scaling, workers: int = 0, use_gpu: bool = False
) -> dict[str, float]:
    """Train a segmenter under `prefix`, or go on with one; return the measures of the checkpoint that is kept.

    Kept is the one of the highest mean IoU over the classes in the validation masks. `trained_s4gan` gives the network.

    Raises:
        ConfigError: batch, size or architecture cannot be meant.
        DataError: chips or masks cannot be read, none has a labelled pixel, or the loss is no number.
        ModelError: the weights to start from or the checkpoint do not fit.
    """
    expect_trainable(settings, workers=workers)
    if data.labelled.read_mask is None or not len(data.labelled):
        raise DataError("no chip has a mask, expected some to learn from; draw masks or give them")
    config = {
        "settings": settings,
        "data": data,
        "prefix": absolute(prefix),
        "scaling": scaling,
        "key": f"{key_of(settings, data.labelled, data.validation)} {data.ids}",
    }
    return session.fit(_train, config, storage=prefix, name="s4gan", workers=workers, use_gpu=use_gpu)


def expect_trainable(settings: S4ganConfig, *, workers: int) -> None:
    """Raise ConfigError if batch or size cannot be meant."""
    expect_batch(settings.learning, workers=workers, what="segmenter")
    expect_size(settings.size, reduce=settings.reduce, what="the segmenter's size")
    if settings.discriminator:
        expect_seen(settings.size)


def trained_s4gan(settings: S4ganConfig, prefix: StorePath, *, classes: int, channels: int = 3) -> nn.Module:
    """The segmenter `fit_s4gan` kept under `prefix`, in evaluation mode."""
    net = settings.build(classes=classes, channels=channels, weights="none")
    net.load_state_dict(session.best_weights(prefix))
    return net.eval()


# -- training ----------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    settings: S4ganConfig = config["settings"]
    device = session.device_of(config)
    state = session.load_checkpoint(config["prefix"], config["key"])
    pair = _pair(state, config, device)
    if state:
        pair.segmenter.is_kept(config["prefix"], state["epoch"])
    state = state or {"step": 0, "epoch": 0, "best": session.NOTHING}
    config = config | {
        "device": device,
        "read": _reading(config["data"], settings),
        "held": _held(config["data"], settings),
    }
    with session.scalars(config["prefix"]) as write:
        begins = range(state["step"], settings.steps, settings.checkpoint)
        for first in probe.epochs(begins, count=(settings.steps - state["step"]) / settings.checkpoint):
            measures = _steps(first, pair, config) | _measure(pair, config)
            step = min(first + settings.checkpoint, settings.steps)
            order = (measures["mean_iou"],) if config["data"].validation else (step,)
            measured = {"step": float(step), **measures}
            best = session.better(state["best"], order, measured, pair.segmenter.weights)
            state = {"step": step, "epoch": state["epoch"] + 1, "best": best}
            pair.segmenter.keep(config["prefix"], config["key"], state | pair.state())
            write(state["epoch"] - 1, measures)
            session.report(measures)
    return dict(state["best"]["measures"])


def _pair(state: State | None, config: State, device: torch.device) -> Pair:
    settings, labelled = config["settings"], config["data"].labelled
    torch.manual_seed(settings.learning.seed)
    channels = labelled.read(0).shape[2]
    net = settings.build(classes=labelled.count, channels=channels, weights="none" if state else None)
    pair = Pair.start(net, settings, device, classes=labelled.count, channels=channels)
    if state:
        pair.resume(state)
    return pair


def _reading(data: Data, settings: S4ganConfig) -> dict[str, Kept]:
    """Readers that keep what fits into their part of the memory, most of it for images."""
    limit = settings.learning.memory // 8
    assert data.labelled.read_mask is not None
    readers = {
        "labelled": Kept(data.labelled.read, limit=2 * limit),
        "masks": Kept(data.labelled.read_mask, limit=limit),
    }
    if data.unlabelled:
        readers["unlabelled"] = Kept(data.unlabelled.read, limit=3 * limit)
    return readers


def _held(data: Data, settings: S4ganConfig) -> Chips | None:
    """The validation chips, kept in the rest of the memory: every checkpoint looks at all of them."""
    chips = data.validation
    if chips is None or chips.read_mask is None:
        return None
    limit = settings.learning.memory // 8
    return replace(chips, read=Kept(chips.read, limit=limit), read_mask=Kept(chips.read_mask, limit=limit))


STREAMS = {"labelled": 1, "unlabelled": 2, "drawn": 3}
"""Row of batches -> number that its order is seeded with; `drawn` are the masks shown to the discriminator."""


def _stream(name: str, first: int, last: int, config: State) -> Iterator[Batch]:
    """The batches of one row from step `first` to `last`."""
    data: Data = config["data"]
    settings: S4ganConfig = config["settings"]
    chips = data.unlabelled if name == "unlabelled" else data.labelled
    assert chips is not None
    order = _order(name, len(chips), first, last, settings.learning)
    part = "unlabelled" if name == "unlabelled" else "labelled"
    masks = None if name == "unlabelled" else config["read"]["masks"]
    return read_ahead(order, config["read"][part], masks, threads=settings.learning.threads)


def _order(name: str, count: int, first: int, last: int, learning: Learning) -> list[Indices]:
    rank, world, size = session.rank(), session.world(), learning.batch // session.world()
    mine = shard(np.arange(count), seed=learning.seed, rank=rank, world=world) if count >= world else np.arange(count)
    row = endless(mine, first * size, (last - first) * size, seed=(learning.seed, STREAMS[name], rank))
    return list(row.reshape(last - first, size))


def _steps(first: int, pair: Pair, config: State) -> dict[str, float]:
    """The steps up to the next checkpoint; return the mean of each loss."""
    settings: S4ganConfig = config["settings"]
    last = min(first + settings.checkpoint, settings.steps)
    generator = session.seed_epoch(settings.learning.seed, first)
    names = list(STREAMS) if pair.judge and config["data"].unlabelled else ["labelled"]
    streams = [_stream(name, first, last, config) for name in names]
    pair.train_mode()
    losses: dict[str, list[float]] = {}
    for step, batches in enumerate(probe.batches(zip(*streams, strict=True), last - first), first):
        given = [_changed(batch, generator, config) for batch in batches]
        for name, loss in _step(step, Given(*given), pair, config, partial(_named, batches, config)).items():
            losses.setdefault(name, []).append(loss)
    return {name: float(np.mean(values)) for name, values in losses.items()}


def _named(batches: Sequence[Batch], config: State) -> str:
    """The ids of the chips of a step, for messages."""
    data: Data = config["data"]
    parts = [data.labelled, data.unlabelled, data.labelled]
    return "; ".join(names_of(part, batch.chips) for part, batch in zip(parts, batches, strict=False) if part)


def _changed(batch: Batch, generator: torch.Generator, config: State) -> tuple[Tensor, Tensor | None]:
    """Augmented images (values as they were read, float32) and masks_NHW int64 of a batch, on the device."""
    settings: S4ganConfig = config["settings"]
    masks = None if batch.masks_NMHW is None else batch.masks_NMHW.to(config["device"])
    images, masks = augment(
        batch.images_NCHW.to(config["device"]), masks, settings.augment, generator, size=settings.size
    )
    return images, None if masks is None else masks[:, 0].long()


class Given(NamedTuple):
    """What a step is given: (images, masks) of a labelled batch, an unlabelled one, and one to compare with."""

    labelled: tuple[Tensor, Tensor | None]
    unlabelled: tuple[Tensor, Tensor | None] | None = None
    drawn: tuple[Tensor, Tensor | None] | None = None


def _step(step: int, given: Given, pair: Pair, config: State, items: Callable[[], str]) -> dict[str, float]:
    """One step of both networks; return the losses."""
    rate, judging_rate = pair.rates(step)
    what, count = f"s4gan, step {step}", len(given.labelled[0])
    told: list[Told] = []
    assert given.labelled[1] is not None
    share = session.share_of(mass(given.labelled[1]))
    loss_of = partial(_loss_of, step, given, share, pair, config, told)
    loss = pair.segmenter.step(loss_of, count, rate, items=items, what=what)
    if pair.judge is None or given.unlabelled is None:
        return {"loss": loss}
    pair.judge.net.requires_grad_(True)
    fake, real = (torch.cat([getattr(one, side) for one in told]) for side in ("fake", "real"))
    judged = partial(_judged, pair.judge.net, fake, real)
    said = {name: float(np.mean([one.said[name] for one in told])) for name in told[0].said}
    return {"loss": loss, **said} | {
        "discriminator_loss": pair.judge.step(judged, count, judging_rate, items=items, what=f"{what}, discriminator")
    }


class Told(NamedTuple):
    """What the segmenter's part of a step leaves for the discriminator's: its inputs, and figures to be written."""

    fake: Tensor
    real: Tensor
    said: dict[str, float]


def _loss_of(
    step: int, given: Given, share: Tensor, pair: Pair, config: State, told: list[Told], part: slice
) -> Tensor:
    """What a part of the batches adds to the segmenter's loss; matching and self-training are of the part alone."""
    if not part.start:
        told.clear()  # where memory was short, a step begins again
    images, masks = given.labelled
    assert masks is not None
    own: Tensor = cross_entropy_sum(_logits(pair.segmenter.net, images[part], config), masks[part]) * share
    if pair.judge is None or given.unlabelled is None or given.drawn is None:
        return own
    settings, judge = pair.settings.discriminator, pair.judge.net
    assert settings is not None
    assert given.drawn[1] is not None
    unlabelled = given.unlabelled[0][part]
    logits = _logits(pair.segmenter.net, unlabelled, config)
    fake = torch.cat([logits.softmax(dim=1), unlabelled / 255], dim=1)
    real = torch.cat([one_hot(given.drawn[1][part], logits.shape[1]), given.drawn[0][part] / 255], dim=1)
    judge.requires_grad_(False)
    answers, features = judge(fake)
    matching = feature_matching(judge(real)[1], features)
    teaching, count = self_training(logits, answers.detach().sigmoid(), settings.threshold)
    said = {
        "ce_loss": own,
        "matching_loss": matching,
        "self_training_loss": teaching,
        "score": answers.sigmoid().mean(),
    }
    figures = {name: float(value.detach()) for name, value in said.items()} | {"taught": count / len(logits)}
    told.append(Told(fake.detach(), real, figures))
    taught = settings.teach * teaching if step >= settings.after else 0.0
    added: Tensor = own + (settings.match * matching + taught) * (len(logits) / len(images))
    return added


def _judged(judge: nn.Module, fake: Tensor, real: Tensor, part: slice) -> Tensor:
    """What a part of both batches adds to the discriminator's loss."""
    loss = discriminator_loss(judge(real[part])[0], judge(fake[part])[0])
    return loss * (len(fake[part]) / len(fake))


def _logits(net: nn.Module, images: Tensor, config: State) -> Tensor:
    with precision(config["settings"].learning, images.device):
        logits: Tensor = net(config["scaling"].normalize(images))
    return logits.float()


# -- measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(pair: Pair, config: State) -> dict[str, float]:
    """Measures of all workers together on the validation chips; none without them."""
    chips: Chips | None = config["held"]
    if chips is None:
        return {}
    counts = torch.zeros(chips.count**2, dtype=torch.float64)
    mine = range(session.rank(), len(chips), session.world())
    net = pair.segmenter.show_mode(_as_seen(config))
    for confusion in confusions(net, chips, mine, config["scaling"], unit=32 * pair.settings.reduce):
        counts += torch.from_numpy(confusion.matrix.ravel())
    total = session.summed(counts.to(config["device"])).cpu().numpy().astype(np.int64)
    return measures_of(Confusion(total.reshape(chips.count, chips.count)))


def _as_seen(config: State) -> Iterator[Tensor]:
    """The labelled chips as the network sees them, not augmented."""
    settings: S4ganConfig = config["settings"]
    order = _order("labelled", len(config["data"].labelled), 0, settings.learning.recalibrate, settings.learning)
    for batch in read_ahead(order, config["read"]["labelled"]):
        images, _ = centre(batch.images_NCHW.to(config["device"]), None, size=settings.size)
        yield config["scaling"].normalize(images)


@torch.no_grad()
def confusions(
    net: nn.Module, chips: Chips, positions: Iterable[int], scaling: Scaling, *, unit: int
) -> list[Confusion]:
    """Confusion of the network's answer on each of the chips, which are mirrored at the edge up to whole units."""
    assert chips.read_mask is not None
    net.eval()
    device = next(net.parameters()).device
    found = []
    ones = [np.array([at]) for at in positions]
    for batch in probe.batches(read_ahead(ones, chips.read, chips.read_mask), len(ones)):
        assert batch.masks_NMHW is not None
        images = scaling.normalize(batch.images_NCHW.to(device))
        height, width = images.shape[2:]
        whole = pad(images, (0, -width % unit, 0, -height % unit), mode="reflect")
        predicted = net(whole)[..., :height, :width].argmax(dim=1).cpu().numpy()
        found.append(Confusion.from_arrays(batch.masks_NMHW[:, 0].numpy(), predicted, chips.count))
    return found


def measures_of(confusion: Confusion) -> dict[str, float]:
    """The measures of the paper; the mean IoU is over the classes that the reference holds."""
    return {
        "mean_iou": confusion.mean_iou_of_reference,
        "accuracy": confusion.overall_accuracy,
        "class_accuracy": confusion.class_accuracy,
        "fw_iou": confusion.fw_iou,
    }
