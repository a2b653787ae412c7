"""S4GAN: a segmenter learns from few masks, and from images without masks by a discriminator (Mittal et al. 2019).

    <prefix>/checkpoint.pt    both networks after every `checkpoint` steps, and the best segmenter so far

Every checkpoint is measured on the validation chips. Random numbers and batches are functions of the seed and the step,
so a training that goes on from a checkpoint is the one that was not disturbed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rayseg.errors import ConfigError, DataError
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling
from rayseg.models.s4gan import (
    cross_entropy,
    discriminator_loss,
    expect_seen,
    feature_matching,
    one_hot,
    self_training,
)
from rayseg.models.segmenter import build_segmenter
from rayseg.store import StorePath, absolute
from rayseg.train import session
from rayseg.train.augment import augment
from rayseg.train.batches import Batch, Chips, Indices, Kept, endless, read_ahead, shard
from rayseg.train.classifier import key_of
from rayseg.train.learning import Learning, precision
from rayseg.train.pair import Pair, S4ganConfig

State = dict[str, Any]


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
    """Confusion of the network's answer on each of the chips, which are mirrored at the edge up to whole units."""
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
