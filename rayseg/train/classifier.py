"""Training of chip classifiers: balanced batches of yes and no, the best epoch kept (Cao & Huang 2022, section 3.1)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rayseg.config import Config
from rayseg.errors import ConfigError
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling
from rayseg.models.classifier import build_classifier, build_over_imagenet
from rayseg.models.plot_classifier import build_plot_classifier
from rayseg.store import StorePath, absolute
from rayseg.train import probe, session
from rayseg.train.augment import Augment, augment, centre
from rayseg.train.batches import Batch, Chips, Indices, Kept, Read, epoch_batches, read_ahead
from rayseg.train.learning import Learner, Learning, Rates, expect_size, precision

State = dict[str, Any]


class ClassifierConfig(Config):
    """A classifier and how it is trained; the defaults are the paper's."""

    network: Literal["chips", "plots", "over-imagenet"] = "chips"
    """chips: a head on an encoder; over-imagenet: a head on the 1000 outputs of a whole network of timm, where dropout,
    stride, pooling and one_logit are unused; plots: of rayseg.models.plot_classifier, where these and reduce are."""
    encoder: str = "regnety_040"
    """A name of segmentation_models_pytorch or of timm."""
    weights: session.Weights = "imagenet"
    """Of the encoder: "imagenet", "none", or a file."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the channels dropped before the head."""
    stride: int = 32
    """Pixels per position of the last feature map: 32, 16 or 8."""
    reduce: Annotated[int, Field(gt=0)] = 1
    """Side in pixels of the squares whose mean the encoder sees as one pixel."""
    pooling: str = "average"
    """How the scores of the positions become one of the chip; see rayseg.models.classifier.POOLINGS."""
    one_logit: bool = False
    """One logit for the positive class instead of one per class."""
    positive: int | None = 0
    """The class half of each batch is of; None draws all chips alike."""
    size: Annotated[int, Field(gt=0)] = 512
    """Side in pixels of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    epochs: Annotated[int, Field(gt=0)] = 80
    """One epoch is one pass over the positive chips."""
    rates: Rates = ((40, 1e-3), (60, 1e-4), (80, 1e-5))
    """(until epoch, learning rate)."""
    learning: Learning = Learning(batch=12)
    """How weights are changed."""
    augment: Augment = Augment()
    """What happens to training chips."""

    @property
    def factory(self) -> Literal["classifier", "over-imagenet", "plots"]:
        """Name of the network's factory, as a bundle keeps it."""
        return "classifier" if self.network == "chips" else self.network

    def options(self, *, classes: int, channels: int) -> dict[str, str | int | float]:
        """Arguments of the network's factory, as a bundle keeps them."""
        if self.network == "plots":
            return {"encoder": self.encoder, "classes": classes, "dropout": self.dropout}
        if self.network == "over-imagenet":
            return {"encoder": self.encoder, "classes": classes, "channels": channels, "reduce": self.reduce}
        return {
            "encoder": self.encoder,
            "classes": 1 if self.one_logit else classes,
            "dropout": self.dropout,
            "channels": channels,
            "stride": self.stride,
            "pooling": self.pooling,
            "reduce": self.reduce,
        }

    def build(self, *, classes: int, channels: int, weights: str | None = None) -> nn.Module:
        """The network, in training mode; `weights` take the place of its own.

        Raises:
            ConfigError: encoder, stride or pooling are unknown or do not go together.
            ModelError: the weights are not to be had or do not fit.
        """
        options = self.options(classes=classes, channels=channels)
        return NETWORKS[self.network](**options, weights=weights or self.weights)


def fit_classifier(
    settings: ClassifierConfig,
    chips: Chips,
    *,
    prefix: StorePath,
    scaling: Scaling,
    held_out: Chips | None = None,
    workers: int = 0,
    use_gpu: bool = False,
    max_failures: int = 2,
) -> dict[str, float]:
    """Train a classifier under `prefix`, or go on with one; return the measures of the epoch that is kept.

    Kept is the epoch of the highest overall accuracy on `held_out`, the lowest loss among equals; the last one
    without `held_out`. `trained_classifier` gives the network.

    Args:
        settings: the network and its training.
        chips: to learn from.
        prefix: where the checkpoint lies.
        scaling: how the chips' values become the network's input.
        held_out: to choose the epoch by.
        workers: processes of Ray Train; 0 trains in this one.
        use_gpu: one GPU for each.
        max_failures: how often lost workers are replaced.

    Raises:
        ConfigError: the batch cannot be shared by the workers.
        DataError: chips cannot be read, a class is missing, or the loss is no number.
        ModelError: the weights to start from or the checkpoint do not fit.
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
        _train, config, storage=prefix, name="classifier", workers=workers, use_gpu=use_gpu, max_failures=max_failures
    )


def expect_trainable(settings: ClassifierConfig, *, workers: int) -> None:
    """Raise ConfigError if batch or size cannot be meant."""
    unit = max(workers, 1) * (1 if settings.positive is None else 2)
    if settings.learning.batch % unit:
        raise ConfigError(
            f"the classifier's learning.batch {settings.learning.batch} cannot be shared evenly; "
            f"make it a multiple of {unit}"
        )
    expect_size(settings.size, reduce=settings.reduce, what="the classifier's size")


def _check(settings: ClassifierConfig, chips: Chips, workers: int) -> None:
    expect_trainable(settings, workers=workers)
    if settings.one_logit and (settings.positive is None or max(chips.labels) > 1):
        raise ConfigError("one_logit tells one class from another: set positive, and have labels 0 and 1 only")


def key_of(settings: Config, chips: Chips, held_out: Chips | None) -> str:
    """What a training was asked for, as text: a checkpoint is only good for the same."""
    known = [(part.ids, part.labels) for part in (chips, held_out) if part]
    return f"{settings.model_dump_json()} {hashlib.sha256(repr(known).encode()).hexdigest()}"


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "chips": build_classifier,
    "over-imagenet": build_over_imagenet,
    "plots": build_plot_classifier,
}


def trained_classifier(settings: ClassifierConfig, prefix: StorePath, *, classes: int, channels: int = 3) -> nn.Module:
    """The network `fit_classifier` kept under `prefix`, in evaluation mode."""
    model = settings.build(classes=classes, channels=channels, weights="none")
    model.load_state_dict(session.best_weights(prefix))
    return model.eval()


def _train(config: State) -> State:
    settings: ClassifierConfig = config["settings"]
    chips: Chips = config["chips"]
    device = session.device_of(config)
    state = session.load_checkpoint(config["prefix"], config["key"])
    torch.manual_seed(settings.learning.seed)
    classes, channels = max(chips.count, 2), chips.read(0).shape[2]
    net = settings.build(classes=classes, channels=channels, weights="none" if state else None)
    learner = Learner.start(net, settings.learning, device)
    state = state or {"epoch": 0, "best": session.NOTHING}
    if state["epoch"]:
        learner.resume(state["learner"])
        learner.is_kept(config["prefix"], state["epoch"])
    read = Kept(chips.read, limit=settings.learning.memory)
    with session.scalars(config["prefix"]) as write:
        for epoch in probe.epochs(range(state["epoch"], settings.epochs)):
            loss = _epoch(epoch, learner, read, config, device)
            measures = {"loss": loss, **_evaluate(learner, read, config, device)}
            order = (measures["accuracy"], -measures["held_out_loss"]) if config["held_out"] else (epoch, 0)
            state = {"epoch": epoch + 1, "best": session.better(state["best"], order, measures, learner.weights)}
            learner.keep(config["prefix"], config["key"], state)
            write(epoch, measures)
            session.report(measures)
    return dict(state["best"]["measures"])


def _epoch(epoch: int, learner: Learner, read: Read, config: State, device: torch.device) -> float:
    """The mean loss of an epoch."""
    settings: ClassifierConfig = config["settings"]
    chips: Chips = config["chips"]
    generator = session.seed_epoch(settings.learning.seed, epoch)
    order = _order(epoch, settings, chips)
    losses = []
    learner.train_mode()
    coming = read_ahead(order, read, threads=settings.learning.threads)
    for step, batch in enumerate(probe.batches(coming, len(order))):
        images, _ = augment(batch.images_NCHW.to(device), None, settings.augment, generator, size=settings.size)
        labels = _labels(chips, batch, device)
        rate = session.rate_at(settings.rates, epoch + step / len(order), gradual=settings.learning.gradual)
        loss_of = partial(_loss_of, learner, config["scaling"].normalize(images), labels, settings)
        said = partial(names_of, chips, batch.chips)
        what = f"classifier, epoch {epoch}, step {step}"
        losses.append(learner.step(loss_of, len(labels), rate, items=said, what=what))
    return float(np.mean(losses))


def _loss_of(learner: Learner, images: Tensor, labels: Tensor, settings: ClassifierConfig, part: slice) -> Tensor:
    """What a part of a batch adds to its loss."""
    with precision(settings.learning, images.device):
        logits = learner.net(images[part])
    return _loss(logits.float(), labels[part], settings.positive) * (len(labels[part]) / len(labels))


def names_of(chips: Chips, positions: Indices) -> str:
    """The ids of some chips, for messages."""
    return f"chips {', '.join(chips.ids[k] for k in positions)}"


def _order(epoch: int, settings: ClassifierConfig, chips: Chips) -> list[Indices]:
    """This worker's batches of an epoch."""
    batch = settings.learning.batch // session.world()
    labels = np.array(chips.labels)
    chosen = np.ones(len(labels), bool) if settings.positive is None else labels == settings.positive
    counts = (batch, 0) if settings.positive is None else (batch // 2, batch // 2)
    return epoch_batches(
        np.flatnonzero(chosen),
        np.flatnonzero(~chosen),
        counts=counts,
        seed=settings.learning.seed,
        epoch=epoch,
        rank=session.rank(),
        world=session.world(),
    )


def _labels(chips: Chips, batch: Batch, device: torch.device) -> Tensor:
    return torch.tensor([chips.labels[k] for k in batch.chips], device=device)


def _loss(logits_NK: Tensor, labels_N: Tensor, positive: int | None) -> Tensor:
    if logits_NK.shape[1] == 1:
        return binary_cross_entropy_with_logits(
            logits_NK[:, 0], torch.eq(labels_N, positive if positive is not None else -1).float()
        )
    return cross_entropy(logits_NK, labels_N)


@torch.no_grad()
def _evaluate(learner: Learner, read: Read, config: State, device: torch.device) -> dict[str, float]:
    """Measures of all workers together on the chips held out; none without them."""
    settings: ClassifierConfig = config["settings"]
    model = learner.show_mode(_as_seen(config["chips"], read, config, device))
    held_out: Chips | None = config["held_out"]
    if held_out is None:
        return {}
    classes = max(config["chips"].count, held_out.count)
    sums = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device)
    coming = _seen(held_out, held_out.read, config, device)
    for batch, images in probe.batches(coming, -(-len(held_out) // settings.learning.batch)):
        with precision(settings.learning, device):
            logits = model(images).float()
        labels = _labels(held_out, batch, device)
        predicted = _decided(logits, settings.positive)
        sums[:-1] += torch.bincount(labels * classes + predicted, minlength=classes * classes)
        sums[-1] += _loss(logits, labels, settings.positive) * len(labels)
    counts = session.summed(sums).cpu().numpy()
    confusion = Confusion(counts[:-1].reshape(classes, classes).astype(np.int64))
    f1 = {f"f1_{k}": float(value) for k, value in enumerate(confusion.f1)}
    return {"accuracy": confusion.overall_accuracy, "held_out_loss": float(counts[-1]) / len(held_out), **f1}


def _decided(logits_NK: Tensor, positive: int | None) -> Tensor:
    """Class of every chip."""
    if logits_NK.shape[1] > 1:
        return logits_NK.argmax(dim=1)
    yes = positive or 0
    return torch.where(logits_NK[:, 0] > 0, yes, 1 - yes)


def _seen(chips: Chips, read: Read, config: State, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """This worker's share of chips with the network's input, not augmented."""
    settings: ClassifierConfig = config["settings"]
    mine = np.arange(session.rank(), len(chips), session.world())
    parts = [mine[k : k + settings.learning.batch] for k in range(0, len(mine), settings.learning.batch)]
    for batch in read_ahead(parts, read, threads=settings.learning.threads):
        images, _ = centre(batch.images_NCHW.to(device), None, size=settings.size)
        yield batch, config["scaling"].normalize(images)


def _as_seen(chips: Chips, read: Read, config: State, device: torch.device) -> Iterator[Tensor]:
    for _, images in _seen(chips, read, config, device):
        yield images
