"""Training of chip classifiers: balanced batches, best epoch kept (Cao & Huang 2022, section 3.1)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rayseg.config import Config, added
from rayseg.errors import ConfigError
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling, take_over
from rayseg.models.classifier import build_classifier, build_over_imagenet
from rayseg.models.plot_classifier import build_plot_classifier
from rayseg.store import Location
from rayseg.train import probe, session
from rayseg.train.augment import Augment, augment, centre
from rayseg.train.batches import Batch, Chips, Indices, Kept, Read, epoch_batches, read_ahead
from rayseg.train.learning import Epoch, Learner, Learning, Rates, expect_size, precision, resumed, run_epochs
from rayseg.train.pictures import of_classes
from rayseg.train.session import Setup, State


class ClassifierConfig(Config):
    """A classifier and its training; the defaults are the paper's."""

    network: Literal["chips", "plots", "over-imagenet"] = "chips"
    """chips: a head on an encoder; over-imagenet: a head on the 1000 outputs of a whole network of timm, without
    dropout, stride, pooling and one_logit; plots: rayseg.models.plot_classifier, without these and reduce."""
    encoder: str = "regnety_040"
    """A name of segmentation_models_pytorch or of timm."""
    weights: session.Weights = "imagenet"
    """Of the encoder: "imagenet", "packaged" (of a Python package), "none", or a file."""
    start: Location | None = added(default=None)
    """Bundle whose weights the training starts from, instead of `weights`; layers of another shape start at random."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the channels dropped before the head."""
    stride: int = 32
    """Pixels per position of the last feature map: 32, 16 or 8."""
    reduce: Annotated[int, Field(gt=0)] = 1
    """Side in px of the squares that are averaged to one input pixel of the encoder."""
    pooling: str = "average"
    """How the scores of all positions become the chip's; see rayseg.models.classifier.POOLINGS."""
    one_logit: bool = False
    """One logit for the positive class instead of one per class."""
    positive: int | None = 0
    """The class that fills half of each batch; None draws all chips alike."""
    size: Annotated[int, Field(gt=0)] = 512
    """Side in px of the windows cut out of the chips; a multiple of 32 times `reduce`."""
    epochs: Annotated[int, Field(gt=0)] = 80
    """Passes over the positive chips."""
    rates: Rates = ((40, 1e-3), (60, 1e-4), (80, 1e-5))
    """(until epoch, learning rate)."""
    learning: Learning = Learning(batch=12)
    """How weights are changed."""
    augment: Augment = Augment()
    """Augmentation of the training chips."""

    @property
    def factory(self) -> Literal["classifier", "over-imagenet", "plots"]:
        """Name of the network's factory in a bundle."""
        return "classifier" if self.network == "chips" else self.network

    def options(self, *, classes: int, channels: int) -> dict[str, str | int | float]:
        """Arguments of the network's factory, as a bundle stores them."""
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

    def build(self, *, classes: int, channels: int = 3, weights: str | None = None) -> nn.Module:
        """The network, in training mode, from its own weights or from `weights`.

        Raises:
            ConfigError: encoder, stride or pooling are unknown or cannot be combined.
            ModelError: the weights are missing or do not fit.
        """
        options = self.options(classes=classes, channels=channels)
        net = NETWORKS[self.network](**options, weights=weights or ("none" if self.start else self.weights))
        if self.start and weights is None:
            take_over(net, self.start)
        return net


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "chips": build_classifier,
    "over-imagenet": build_over_imagenet,
    "plots": build_plot_classifier,
}


def fit_classifier(
    settings: ClassifierConfig, chips: Chips, setup: Setup, *, scaling: Scaling, held_out: Chips | None = None
) -> dict[str, float]:
    """Train a classifier, or resume its training; return the measures of the epoch that is kept.

    The kept epoch has the highest overall accuracy on `held_out`, then the lowest loss; without `held_out` it is the
    last. `learning.trained` returns the network.

    Args:
        settings: the network and its training.
        chips: to learn from.
        setup: where the training runs.
        scaling: from the chips' values to the network's input.
        held_out: to choose the epoch by.

    Raises:
        ConfigError: the batch cannot be shared by the workers.
        DataError: chips cannot be read, a class is missing, or the loss is not finite.
        ModelError: the initial weights or the checkpoint do not fit.
    """
    expect_trainable(settings, workers=setup.workers)
    if settings.one_logit and (settings.positive is None or max(chips.labels) > 1):
        raise ConfigError("one_logit separates two classes; set positive, and use the labels 0 and 1 only")
    config = {"settings": settings, "chips": chips, "held_out": held_out, "scaling": scaling}
    return session.fit(_train, config | {"key": key_of(settings, chips, held_out)}, setup, name="classifier")


def expect_trainable(settings: ClassifierConfig, *, workers: int) -> None:
    """Raise ConfigError if the workers cannot share the batch, or the network cannot halve the windows."""
    unit = max(workers, 1) * (1 if settings.positive is None else 2)
    if settings.learning.batch % unit:
        raise ConfigError(
            f"the classifier's learning.batch {settings.learning.batch} cannot be shared evenly; "
            f"make it a multiple of {unit}"
        )
    expect_size(settings.size, reduce=settings.reduce, what="the classifier's size")


def key_of(settings: Config, chips: Chips, held_out: Chips | None) -> str:
    """Settings and chips of a training as text: a checkpoint is only valid for the same."""
    ids = [(part.ids, part.labels) for part in (chips, held_out) if part]
    return f"{settings.model_dump_json()} {hashlib.sha256(repr(ids).encode()).hexdigest()}"


def names_of(chips: Chips, positions: Indices) -> str:
    """The ids of some chips, for messages."""
    return f"chips {', '.join(chips.ids[k] for k in positions)}"


# -- the loop ---------------------------------------------------------------------------------------------------------


def _train(config: State) -> State:
    settings: ClassifierConfig = config["settings"]
    chips: Chips = config["chips"]
    state = session.load_checkpoint(config["prefix"], config["key"])
    shape = {"classes": max(chips.count, 2), "channels": chips.read(0).shape[2]}
    learner, state = resumed(state, lambda weights: settings.build(**shape, weights=weights), settings.learning, config)
    # The held-out chips are not kept: they are read once per epoch, after all others.
    read = Kept(chips.read, limit=settings.learning.memory)
    config = config | {"device": session.device_of(config)}

    def one_epoch(epoch: int) -> Epoch:
        measures = {"loss": _epoch(epoch, learner, read, config), **_evaluate(learner, read, config)}
        # Of equal accuracy, as on few chips, the lower loss.
        order = (measures["accuracy"], -measures["held_out_loss"]) if config["held_out"] else (epoch, 0)
        return Epoch(measures, order, {})

    shown = of_classes(partial(_samples, config["held_out"] or chips, config))
    kept = run_epochs(one_epoch, learner, state, epochs=settings.epochs, config=config, shown=shown)
    return dict(kept["measures"])


def _samples(chips: Chips, config: State) -> Iterator[tuple[str, NDArray[Any], Tensor, int]]:
    """Chips for pictures: name, image_CHW, the network's input, label."""
    settings: ClassifierConfig = config["settings"]
    for k, (name, label) in enumerate(zip(chips.ids, chips.labels, strict=True)):
        image_CHW = chips.read(k).transpose(2, 0, 1)
        images = torch.from_numpy(image_CHW.copy())[None].to(config["device"])
        yield name, image_CHW, centre(images, settings.augment, config["scaling"], size=settings.size), label


def _epoch(epoch: int, learner: Learner, read: Read, config: State) -> float:
    """Train for an epoch; return its mean loss."""
    settings: ClassifierConfig = config["settings"]
    chips: Chips = config["chips"]
    generator = session.seed_epoch(settings.learning.seed, epoch)
    order = _order(epoch, settings, chips)
    losses = []
    learner.train_mode()
    coming = read_ahead(order, read, threads=settings.learning.threads)
    for step, batch in enumerate(probe.batches(coming, len(order))):
        images, _ = augment(
            batch.images_NCHW.to(config["device"]),
            None,
            settings.augment,
            generator,
            size=settings.size,
            fill=settings.augment.fill(config["scaling"]),
        )
        labels = _labels(chips, batch, images.device)
        rate = session.rate_at(settings.rates, epoch + step / len(order), gradual=settings.learning.gradual)
        # A function of the part of the batch, as memory may not hold the whole.
        loss_of = partial(_loss_of, learner, config["scaling"].normalize(images), labels, settings)
        ids, what = partial(names_of, chips, batch.chips), f"classifier, epoch {epoch}, step {step}"
        losses.append(learner.step(loss_of, len(labels), rate, items=ids, what=what))
    return float(np.mean(losses))


def _order(epoch: int, settings: ClassifierConfig, chips: Chips) -> list[Indices]:
    """This worker's batches of an epoch."""
    batch = settings.learning.batch // session.world()
    labels = np.array(chips.labels)
    # Without a positive class, all chips are in the first half of the batch.
    chosen = np.ones(len(labels), bool) if settings.positive is None else labels == settings.positive
    return epoch_batches(
        np.flatnonzero(chosen),
        np.flatnonzero(~chosen),
        counts=(batch, 0) if settings.positive is None else (batch // 2, batch // 2),
        seed=settings.learning.seed,
        epoch=epoch,
        rank=session.rank(),
        world=session.world(),
    )


def _loss_of(learner: Learner, images: Tensor, labels: Tensor, settings: ClassifierConfig, part: slice) -> Tensor:
    """What a part of a batch adds to its loss."""
    with precision(settings.learning, images.device):
        logits = learner.net(images[part])
    return _loss(logits.float(), labels[part], settings.positive) * (len(labels[part]) / len(labels))


def _loss(logits_NK: Tensor, labels_N: Tensor, positive: int | None) -> Tensor:
    if logits_NK.shape[1] > 1:
        return cross_entropy(logits_NK, labels_N)
    targets_N = torch.eq(labels_N, -1 if positive is None else positive).float()
    return binary_cross_entropy_with_logits(logits_NK[:, 0], targets_N)


def _labels(chips: Chips, batch: Batch, device: torch.device) -> Tensor:
    return torch.tensor([chips.labels[k] for k in batch.chips], device=device)


@torch.no_grad()
def _evaluate(learner: Learner, read: Read, config: State) -> dict[str, float]:
    """Measures of all workers together on the held-out chips; none without them."""
    settings: ClassifierConfig = config["settings"]
    model = learner.show_mode(images for _, images in _inputs(config["chips"], read, config))
    held_out: Chips | None = config["held_out"]
    if held_out is None:
        return {}
    # Counts of (label, predicted) and the sum of losses travel between workers as one tensor.
    classes = max(config["chips"].count, held_out.count)
    sums = torch.zeros(classes * classes + 1, dtype=torch.float64, device=config["device"])
    coming = _inputs(held_out, held_out.read, config)
    for batch, images in probe.batches(coming, -(-len(held_out) // settings.learning.batch)):
        with precision(settings.learning, images.device):
            logits = model(images).float()
        labels = _labels(held_out, batch, images.device)
        yes = settings.positive or 0  # the class of a positive logit, if there is one logit
        predicted = logits.argmax(dim=1) if logits.shape[1] > 1 else torch.where(logits[:, 0] > 0, yes, 1 - yes)
        sums[:-1] += torch.bincount(labels * classes + predicted, minlength=classes**2)
        sums[-1] += _loss(logits, labels, settings.positive) * len(labels)
    counts = session.sum_over_workers(sums).cpu().numpy()
    confusion = Confusion(counts[:-1].reshape(classes, classes).astype(np.int64))
    f1 = {f"f1_{k}": float(value) for k, value in enumerate(confusion.f1)}
    return {"accuracy": confusion.overall_accuracy, "held_out_loss": float(counts[-1]) / len(held_out), **f1}


def _inputs(chips: Chips, read: Read, config: State) -> Iterator[tuple[Batch, Tensor]]:
    """(batch, network's input) of this worker's share of chips, without augmentation."""
    settings: ClassifierConfig = config["settings"]
    own = np.arange(session.rank(), len(chips), session.world())
    parts = [own[k : k + settings.learning.batch] for k in range(0, len(own), settings.learning.batch)]
    for batch in read_ahead(parts, read, threads=settings.learning.threads):
        images = batch.images_NCHW.to(config["device"])
        yield batch, centre(images, settings.augment, config["scaling"], size=settings.size)
