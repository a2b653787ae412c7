"""Segmenter and discriminator in training: their settings, their optimisers, and what a checkpoint must hold."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from rayseg.config import Config
from rayseg.models.discriminator import Discriminator, poly
from rayseg.train.augment import Augment
from rayseg.train.learning import Learner, Learning
from rayseg.train.network import NetworkConfig

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
