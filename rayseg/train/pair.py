"""Segmenter and discriminator in training: their settings, their optimisers, and what a checkpoint must hold."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from rayseg.config import Config
from rayseg.models.encoders import averaged, freeze_batchnorm
from rayseg.models.s4gan import Discriminator, poly
from rayseg.train import session
from rayseg.train.augment import Augment
from rayseg.train.learning import Learning

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
    """How weights are changed; batches of labelled and unlabelled chips, and of masks to compare with, are equal."""
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
