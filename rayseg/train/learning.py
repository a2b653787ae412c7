"""What every training loop does with a network: how its weights are changed, averaged and kept."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from rayseg.config import Config
from rayseg.models.encoders import averaged, freeze_batchnorm, recalibrate_batchnorm
from rayseg.train import session

State = dict[str, Any]
Rates = tuple[tuple[float, float], ...]


class Learning(Config):
    """How weights are changed."""

    batch: Annotated[int, Field(gt=0)] = 12
    """Chips per step, over all workers together."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam with betas .9, .999; AdamW with its decoupled weight decay; SGD with momentum .9."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Pull of the weights towards 0."""
    encoder_rate: Annotated[float, Field(ge=0)] = 1.0
    """Learning rate of the encoder relative to the rest; 0 leaves it as it is."""
    gradual: bool = False
    """Go from rate to rate of a schedule in straight lines instead of in steps."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Longest gradient; longer ones are shortened to it."""
    freeze_batchnorm: Literal["none", "encoder", "all"] = "none"
    """Where batch norms keep the statistics they start with; for few chips or small batches on pretrained weights."""
    recalibrate: Annotated[int, Field(ge=0)] = 0
    """Batches from which the batch norms' statistics are taken anew before every evaluation; 0 leaves them."""
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then what is evaluated, relabels and is kept."""
    half: bool | None = None
    """Compute in bfloat16 where it is safe; by default on GPUs only."""
    seed: int = 1337
    """Of everything random."""
    memory: Annotated[int, Field(ge=0)] = 2 << 30
    """Bytes of chips each worker keeps in memory; the rest is read again every epoch."""
    threads: Annotated[int, Field(gt=0)] = 2
    """Threads of each worker that read chips."""


@dataclass
class Learner:
    """A network in training, with all that must be remembered to go on."""

    settings: Learning
    net: nn.Module
    model: nn.Module
    """`net`, wrapped if there are several workers."""
    optimizer: Optimizer
    average: AveragedModel | None

    @classmethod
    def start(cls, net: nn.Module, settings: Learning, device: torch.device) -> "Learner":
        """A learner of `net`, whose part `encoder` may learn at its own rate."""
        if not settings.encoder_rate:
            net.get_submodule("encoder").requires_grad_(False)
        net = net.to(device)
        average = averaged(net, decay=settings.average) if settings.average else None
        return cls(settings, net, session.distributed(net, device), _optimizer(net, settings), average)

    @property
    def shown(self) -> nn.Module:
        """What is evaluated and kept: the average of the weights if there is one."""
        return self.average.module if self.average else self.net

    def train_mode(self) -> None:
        """Make the network ready for steps."""
        self.model.train()
        frozen = {"none": None, "encoder": self.net.get_submodule("encoder"), "all": self.net}
        if (part := frozen[self.settings.freeze_batchnorm]) is not None:
            freeze_batchnorm(part)

    def step(self, loss: Tensor, rate: float) -> None:
        """Change the weights by the gradient of `loss` at a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.net)

    def show_mode(self, batches: Iterable[Tensor]) -> nn.Module:
        """`shown`, ready to predict; its batch norms taken anew from the first of `batches` if that is asked for."""
        if self.settings.recalibrate:
            recalibrate_batchnorm(self.shown, islice(batches, self.settings.recalibrate))
        return self.shown.eval()

    def state(self) -> State:
        """All that must be remembered."""
        average = self.average.state_dict() if self.average else None
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "average": average}

    def resume(self, state: State) -> None:
        """Go on from `state()` of another learner with the same settings."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights of `shown` on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.shown.state_dict().items()}


def precision(settings: Learning, device: torch.device) -> AbstractContextManager[Any]:
    """The context to compute in: bfloat16 where it is safe on GPUs, unless asked otherwise."""
    wanted = device.type == "cuda" if settings.half is None else settings.half
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _optimizer(net: nn.Module, settings: Learning) -> Optimizer:
    encoder = [weight for weight in net.get_submodule("encoder").parameters() if weight.requires_grad]
    inside = {id(weight) for weight in encoder}
    rest = [weight for weight in net.parameters() if weight.requires_grad and id(weight) not in inside]
    groups = [{"params": encoder, "factor": settings.encoder_rate}, {"params": rest, "factor": 1.0}]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return SGD(groups, lr=0.0, momentum=0.9, weight_decay=settings.weight_decay)
    kind = Adam if settings.optimizer == "adam" else AdamW
    return kind(groups, lr=0.0, weight_decay=settings.weight_decay)
