"""S4GAN: a segmenter learns from few masks, and from images without masks by a discriminator (Mittal et al. 2019).

    <prefix>/checkpoint.pt    both networks after every `checkpoint` steps, and the best segmenter so far

Every checkpoint is measured on the validation chips. Random numbers and batches are functions of the seed and the step,
so a training that goes on from a checkpoint is the one that was not disturbed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from rayseg.config import Config
from rayseg.errors import ConfigError, DataError
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling
from rayseg.models.encoders import averaged, freeze_batchnorm
from rayseg.models.s4gan import (
    Discriminator,
    cross_entropy,
    discriminator_loss,
    expect_seen,
    feature_matching,
    one_hot,
    poly,
    self_training,
)
from rayseg.models.segmenter import build_segmenter
from rayseg.store import StorePath, absolute
from rayseg.train import session
from rayseg.train.augment import Augment, augment
from rayseg.train.batches import Batch, Chips, Indices, Kept, endless, read_ahead, shard
from rayseg.train.classifier import key_of
from rayseg.train.learning import Learning, precision

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


class S4ganConfig(Config):
    """A segmenter and how it is trained; the defaults are the paper's but for the architecture, which is DeepLab v2."""

    architecture: str = "deeplabv3plus"
    """A name of segmentation_models_pytorch."""
    encoder: str = "resnet101"
    """A name of segmentation_models_pytorch or of timm."""
    weights: session.Weights = "imagenet"
    """Of the encoder: "imagenet", "none", or a file."""
    reduce: Annotated[int, Field(gt=0)] = 1
    """Side in pixels of the squares whose mean the network sees as one pixel."""
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
    """How weights are changed; a batch of labelled, one of unlabelled and one of masks to compare with have one size."""
    augment: Augment = Augment(crop="random", scale=(0.5, 1.6), quadrants=0.0, rotate=0.0)
    """What happens to training chips and their masks."""

    def options(self, *, classes: int, channels: int) -> dict[str, str | int | float]:
        """Arguments of `build_segmenter`, as a bundle keeps them."""
        return {
            "architecture": self.architecture,
            "encoder": self.encoder,
            "classes": classes,
            "channels": channels,
            "reduce": self.reduce,
        }


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
    workers, batch = max(workers, 1), settings.learning.batch
    if batch % workers:
        raise ConfigError(f"the segmenter's learning.batch {batch} cannot be shared by {workers} workers; make it even")
    if batch // workers == 1 and settings.learning.freeze_batchnorm != "all":
        raise ConfigError(
            "a batch of one chip has no statistics for batch norms; make segmenter.learning.batch at least "
            f"{2 * workers}, or set segmenter.learning.freeze_batchnorm to all"
        )
    if settings.size % (32 * settings.reduce):
        raise ConfigError(
            f"the segmenter's size {settings.size} is no multiple of 32 x reduce = {32 * settings.reduce} px; change it"
        )
    if settings.discriminator:
        expect_seen(settings.size)


def trained_s4gan(settings: S4ganConfig, prefix: StorePath, *, classes: int, channels: int = 3) -> nn.Module:
    """The segmenter `fit_s4gan` kept under `prefix`, in evaluation mode."""
    net = build_segmenter(**settings.options(classes=classes, channels=channels), weights="none")  # type: ignore[arg-type]
    net.load_state_dict(session.best_weights(prefix))
    return net.eval()


# -- the two networks --------------------------------------------------------------------------------------------------


class Pair:
    """Segmenter and discriminator in training, with all that must be remembered to go on.

    Gradients are averaged over workers by hand: both networks are used several times in a step, which torch's wrapper
    for distributed training does not allow for.
    """

    def __init__(self, net: nn.Module, settings: S4ganConfig, *, classes: int, channels: int) -> None:
        self.settings = settings
        self.net = net
        self.optimizer = _optimizer(net, settings)
        self.average: AveragedModel | None = None
        self.judge: Discriminator | None = None
        if settings.learning.average:
            self.average = averaged(net, decay=settings.learning.average)
        if (chosen := settings.discriminator) is not None:
            options = {"width": chosen.width, "dropout": chosen.dropout}
            device = next(net.parameters()).device
            self.judge = Discriminator(classes=classes, channels=channels, **options).to(device)  # type: ignore[arg-type]
            self.judging = Adam(self.judge.parameters(), lr=chosen.rate, betas=(0.9, 0.99))

    @property
    def shown(self) -> nn.Module:
        """What is measured and kept."""
        return self.average.module if self.average else self.net

    def train_mode(self) -> None:
        """Make both ready for steps."""
        self.net.train()
        frozen = {"none": None, "encoder": self.net.get_submodule("encoder"), "all": self.net}
        if (part := frozen[self.settings.learning.freeze_batchnorm]) is not None:
            freeze_batchnorm(part)

    def learn(self, loss: Tensor, step: int) -> None:
        """Change the segmenter by the gradient of `loss`."""
        settings = self.settings
        rate = poly(settings.rate, step, settings.steps, power=settings.power, every=settings.every)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(self.net)
        if settings.learning.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), settings.learning.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.net)

    def judge_better(self, loss: Tensor, step: int) -> None:
        """Change the discriminator by the gradient of `loss`."""
        assert self.judge is not None
        assert self.settings.discriminator is not None
        for group in self.judging.param_groups:
            group["lr"] = poly(self.settings.discriminator.rate, step, self.settings.steps, power=self.settings.power)
        self.judging.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(self.judge)
        self.judging.step()

    def state(self) -> State:
        """All that must be remembered."""
        return {name: part.state_dict() if part else None for name, part in self._parts().items()}

    def resume(self, state: State) -> None:
        """Go on from `state()` of another pair with the same settings."""
        for name, part in self._parts().items():
            if part:
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        judging = self.judging if self.judge else None
        parts = {"net": self.net, "optimizer": self.optimizer, "average": self.average}
        return parts | {"judge": self.judge, "judging": judging}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights of `shown` on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.shown.state_dict().items()}


def _optimizer(net: nn.Module, settings: S4ganConfig) -> Optimizer:
    """The encoder's weights at the rate itself, the others' and their biases at multiples of it."""
    inside = {id(weight) for weight in net.get_submodule("encoder").parameters()}
    rest = [(name, weight) for name, weight in net.named_parameters() if id(weight) not in inside]
    learning = settings.learning
    groups: list[dict[str, Any]] = [
        {"params": list(net.get_submodule("encoder").parameters()), "factor": learning.encoder_rate},
        {"params": [w for name, w in rest if not name.endswith("bias")], "factor": settings.head_rate},
        {"params": [w for name, w in rest if name.endswith("bias")], "factor": settings.bias_rate, "weight_decay": 0.0},
    ]
    if learning.optimizer == "sgd":
        return SGD(groups, lr=0.0, momentum=0.9, weight_decay=learning.weight_decay)
    return {"adam": Adam, "adamw": AdamW}[learning.optimizer](groups, lr=0.0, weight_decay=learning.weight_decay)


def _average_gradients(net: nn.Module) -> None:
    """The mean of all workers' gradients."""
    if session.world() == 1:
        return
    for weight in net.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = session.summed(weight.grad) / session.world()


# -- training ----------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    settings: S4ganConfig = config["settings"]
    device = session.device_of(config)
    state = session.load_checkpoint(config["prefix"], config["key"])
    pair = _pair(state, config, device)
    state = state or {"step": 0, "best": session.NOTHING}
    config = config | {"device": device, "read": _reading(config["data"], settings)}
    with session.scalars(config["prefix"]) as write:
        while state["step"] < settings.steps:
            measures = _steps(state["step"], pair, config) | _measure(pair, config)
            step = min(state["step"] + settings.checkpoint, settings.steps)
            order = (measures["mean_iou"],) if config["data"].validation else (step,)
            measured = {"step": float(step), **measures}
            state = {"step": step, "best": session.better(state["best"], order, measured, pair.weights)}
            session.save_checkpoint(config["prefix"], config["key"], state | {"pair": pair.state()})
            write(step // settings.checkpoint, measures)
            session.report(measures)
    return dict(state["best"]["measures"])


def _pair(state: State | None, config: State, device: torch.device) -> Pair:
    settings, labelled = config["settings"], config["data"].labelled
    torch.manual_seed(settings.learning.seed)
    channels = labelled.read(0).shape[2]
    options = settings.options(classes=labelled.count, channels=channels)
    net = build_segmenter(**options, weights="none" if state else settings.weights).to(device)
    pair = Pair(net, settings, classes=labelled.count, channels=channels)
    if state:
        pair.resume(state["pair"])
    return pair


def _reading(data: Data, settings: S4ganConfig) -> dict[str, Kept]:
    """Readers that keep what fits into memory: most of it for images."""
    limit = settings.learning.memory // 4
    assert data.labelled.read_mask is not None
    readers = {"labelled": Kept(data.labelled.read, limit=limit), "masks": Kept(data.labelled.read_mask, limit=limit)}
    if data.unlabelled:
        readers["unlabelled"] = Kept(data.unlabelled.read, limit=2 * limit)
    return readers


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
    losses: dict[str, list[Tensor]] = {}
    for step, batches in enumerate(zip(*streams, strict=True), first):
        given = [_changed(batch, generator, config) for batch in batches]
        for name, loss in _step(step, given, pair, config).items():
            losses.setdefault(name, []).append(loss)
    labelled: Chips = config["data"].labelled
    order = _order("labelled", len(labelled), first, last, settings.learning)
    for name in losses:
        session.check_finite(
            losses[name], lambda step: [labelled.ids[k] for k in order[step]], what=f"s4gan, steps from {first}, {name}"
        )
    return {name: float(torch.stack(values).mean()) for name, values in losses.items()}


def _changed(batch: Batch, generator: torch.Generator, config: State) -> tuple[Tensor, Tensor | None]:
    """Augmented images (values as they were read, float32) and masks_NHW int64 of a batch, on the device."""
    settings: S4ganConfig = config["settings"]
    masks = None if batch.masks_NMHW is None else batch.masks_NMHW.to(config["device"])
    images, masks = augment(
        batch.images_NCHW.to(config["device"]), masks, settings.augment, generator, size=settings.size
    )
    return images, None if masks is None else masks[:, 0].long()


def _step(step: int, given: list[tuple[Tensor, Tensor | None]], pair: Pair, config: State) -> dict[str, Tensor]:
    """One step of both networks; return the losses."""
    images, masks = given[0]
    assert masks is not None
    labelled = cross_entropy(_logits(pair.net, images, config), masks)
    if len(given) == 1:
        pair.learn(labelled, step)
        return {"loss": labelled.detach()}
    assert pair.judge is not None
    (unlabelled, _), (shown, drawn) = given[1:]
    assert drawn is not None
    settings = pair.settings.discriminator
    assert settings is not None
    logits = _logits(pair.net, unlabelled, config)
    fake = torch.cat([logits.softmax(dim=1), unlabelled / 255], dim=1)
    real = torch.cat([one_hot(drawn, logits.shape[1]), shown / 255], dim=1)
    pair.judge.requires_grad_(False)
    answers, features = pair.judge(fake)
    matching = feature_matching(pair.judge(real)[1], features)
    pair.judge.requires_grad_(True)
    teaching, count = self_training(logits, answers.detach().sigmoid(), settings.threshold)
    taught = settings.teach * teaching if step >= settings.after else 0.0
    pair.learn(labelled + settings.match * matching + taught, step)
    judged = discriminator_loss(pair.judge(real)[0], pair.judge(fake.detach())[0])
    pair.judge_better(judged, step)
    parts = {"loss": labelled, "matching_loss": matching, "self_training_loss": teaching, "discriminator_loss": judged}
    found = {"taught": torch.tensor(count / len(logits)), "score": answers.sigmoid().mean()}
    return {name: value.detach().cpu() for name, value in (parts | found).items()}


def _logits(net: nn.Module, images: Tensor, config: State) -> Tensor:
    with precision(config["settings"].learning, config["device"]):
        logits: Tensor = net(config["scaling"].normalize(images))
    return logits.float()


# -- measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(pair: Pair, config: State) -> dict[str, float]:
    """Measures of all workers together on the validation chips; none without them."""
    chips: Chips | None = config["data"].validation
    if chips is None:
        return {}
    counts = torch.zeros(chips.count**2, dtype=torch.float64)
    mine = range(session.rank(), len(chips), session.world())
    for confusion in confusions(pair.shown, chips, mine, config["scaling"], unit=32 * pair.settings.reduce):
        counts += torch.from_numpy(confusion.matrix.ravel())
    total = session.summed(counts.to(config["device"])).cpu().numpy().astype(np.int64)
    return measures_of(Confusion(total.reshape(chips.count, chips.count)))


@torch.no_grad()
def confusions(
    net: nn.Module, chips: Chips, positions: Iterable[int], scaling: Scaling, *, unit: int
) -> list[Confusion]:
    """Confusion of the network's answer on each of the whole chips, which are mirrored at the edge up to whole units."""
    assert chips.read_mask is not None
    net.eval()
    device = next(net.parameters()).device
    found = []
    for batch in read_ahead([np.array([at]) for at in positions], chips.read, chips.read_mask):
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
