"""What every training loop does with a network: how its weights are changed, averaged and kept."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from rayseg.config import Config
from rayseg.errors import ConfigError, ModelError
from rayseg.models.encoders import averaged, freeze_batchnorm, recalibrate_batchnorm
from rayseg.models.segmenter import build_segmenter
from rayseg.store import StorePath, upath
from rayseg.train import session


class NetworkConfig(Config):
    """A segmenter, before it has learnt anything."""

    architecture: str
    """A name of segmentation_models_pytorch; or deeplab, our own DeepLabv3+."""
    encoder: str
    """A name of segmentation_models_pytorch or of timm."""
    weights: session.Weights = "imagenet"
    """Of the encoder: "imagenet", "none", or a file."""
    reduce: Annotated[int, Field(gt=0)] = 1
    """Side in pixels of the squares whose mean the network sees as one pixel."""

    def options(self, *, classes: int = 1, channels: int) -> dict[str, str | int | float]:
        """Arguments of `build_segmenter`, as a bundle keeps them."""
        return {
            "architecture": self.architecture,
            "encoder": self.encoder,
            "classes": classes,
            "channels": channels,
            "reduce": self.reduce,
        }

    def build(self, *, classes: int = 1, channels: int, weights: str | None = None) -> nn.Module:
        """The network, in training mode; `weights` take the place of its own.

        Raises:
            ConfigError: the architecture or the encoder is unknown, or they do not go together.
            ModelError: the weights are not to be had or do not fit.
        """
        return build_segmenter(
            self.architecture,
            self.encoder,
            classes=classes,
            channels=channels,
            weights=weights or self.weights,
            reduce=self.reduce,
        )


State = dict[str, Any]


def _rising(rates: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    ends = [end for end, _ in rates]
    if not rates or sorted(set(ends)) != ends or min(min(pair) for pair in rates) < 0:
        raise ValueError(
            f"{[list(pair) for pair in rates]} is no schedule; give [until epoch, learning rate], at least one, with "
            "rising epochs and nothing below 0"
        )
    return rates


Rates = Annotated[tuple[tuple[float, float], ...], AfterValidator(_rising)]
Groups = Sequence[dict[str, Any]]
"""Of an optimizer: `params`, `factor` on the learning rate, and what else the optimizer knows."""
_log = logging.getLogger(__name__)


class Schedule(Config):
    """How the learning rate falls."""

    kind: Literal["poly", "cos", "step"] = "poly"
    """rate x (1 - t)^power, rate x (1 + cos(pi t)) / 2 at the share t of the training, or x `factor` every `every`."""
    rate: Annotated[float, Field(gt=0)] = 0.1
    """Of the head at its highest; the encoder's is `learning.encoder_rate` of it."""
    power: Annotated[float, Field(gt=0)] = 0.9
    """poly: 1 is a straight line."""
    every: Annotated[float, Field(gt=0)] = 30.0
    """step: epochs from drop to drop."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: what each drop leaves."""
    warm_up: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the rate rises from 0 to what it would be."""

    def at(self, done: float, whole: float) -> float:
        """The rate after `done` of `whole` epochs (or of whatever both and `every` and `warm_up` are counted in)."""
        share = min(done / whole, 1.0)
        fallen: float = {
            "poly": (1 - share) ** self.power,
            "cos": (1 + math.cos(math.pi * share)) / 2,
            "step": self.factor ** math.floor(done / self.every + 1e-9),
        }[self.kind]
        return self.rate * fallen * min(1.0, done / self.warm_up if self.warm_up else 1.0)


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
    micro: Annotated[int, Field(gt=0)] | None = None
    """Images of each worker that are computed at once, their gradients added up; by default all of a step."""
    sync_batchnorm: bool = False
    """On several GPUs: batch norms see the images of all workers together."""
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
    optimizer: Optimizer
    average: AveragedModel | None
    micro: int | None = None
    """Images computed at once; falls where memory is short."""
    kept: str = "no epoch has been kept yet"
    """Where the last good checkpoint is, for messages."""

    @classmethod
    def start(cls, net: nn.Module, settings: Learning, device: torch.device, groups: Groups | None = None) -> "Learner":
        """A learner of `net`, the same on every worker.

        Args:
            net: its part `encoder` may learn at its own rate.
            settings: how it learns.
            device: where.
            groups: of its weights; by default the encoder and the rest.
        """
        if not settings.encoder_rate:
            net.get_submodule("encoder").requires_grad_(False)
        if settings.sync_batchnorm and device.type == "cuda" and session.world() > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        net = session.alike(net.to(device))
        average = averaged(net, decay=settings.average) if settings.average else None
        return cls(settings, net, _optimizer(net, settings, groups), average, settings.micro)

    @property
    def shown(self) -> nn.Module:
        """What is evaluated and kept: the average of the weights if there is one."""
        return self.average.module if self.average else self.net

    def train_mode(self) -> None:
        """Make the network ready for steps."""
        self.net.train()
        frozen = {"none": None, "encoder": self.net.get_submodule("encoder"), "all": self.net}
        if (part := frozen[self.settings.freeze_batchnorm]) is not None:
            freeze_batchnorm(part)

    def step(
        self, loss_of: Callable[[slice], Tensor], count: int, rate: float, *, items: Callable[[], str], what: str
    ) -> float:
        """Change the weights by the gradient of a batch's loss at a learning rate; return the mean over all workers.

        The batch is computed in parts of `micro` images, or half as many where the GPU's memory does not hold them.
        A loss or gradient that is no number changes nothing.

        Args:
            loss_of: part of this worker's images -> its share of the loss; shares add up to the loss.
            count: this worker's images.
            rate: the learning rate.
            items: names them, for the message.
            what: the training and how far it is, for the message.

        Raises:
            DataError: on every worker, if a loss of any of them is no number.
            ModelError: the GPU's memory does not hold the smallest part.
        """
        loss = self._backward(loss_of, count)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        mean, finite = session.together(loss, [weight.grad for weight in weights if weight.grad is not None])
        if not finite:
            session.refuse_loss(loss, items, what=what, kept=self.kept)
        self.descend(rate)
        return mean

    def _backward(self, loss_of: Callable[[slice], Tensor], count: int) -> float:
        """Gradients of the whole batch, and its loss."""
        self.micro = min(self.micro or count, count)
        while True:
            self.optimizer.zero_grad()
            total = torch.zeros(())
            try:
                for start in range(0, count, self.micro):
                    loss = loss_of(slice(start, min(start + self.micro, count)))
                    loss.backward()  # type: ignore[no-untyped-call]
                    total = total + loss.detach()
                return float(total)
            except torch.OutOfMemoryError:
                self._halve()

    def _halve(self) -> None:
        assert self.micro is not None
        least = 2 if feeds_batchnorm(self.net) else 1
        if self.micro // 2 < least:
            why = ", and batch norms need more than one; freeze them," if least == 2 else ";"
            raise ModelError(
                f"the GPU's memory does not hold {self.micro} image{'s' * (self.micro > 1)} in training{why} "
                "lower size, or take a smaller network"
            )
        self.micro //= 2
        _log.warning(
            "the GPU's memory is short: images are computed %d at a time and their gradients added", self.micro
        )
        torch.cuda.empty_cache()

    def descend(self, rate: float) -> None:
        """Change the weights by the gradients that they have."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.net)

    def keep(self, prefix: StorePath, key: str, state: State) -> None:
        """Write the checkpoint after an epoch: `state` (with `epoch`, how many are done) and all of this."""
        session.save_checkpoint(prefix, key, state | {"learner": self.state()})
        self.is_kept(prefix, state["epoch"])

    def is_kept(self, prefix: StorePath, epochs: int) -> None:
        """Remember, for messages, which checkpoint is the last good one."""
        path = upath(prefix) / "checkpoint.pt"
        self.kept = f"the last good checkpoint is {path}, of {epochs} epoch{'s' * (epochs > 1)}"

    def show_mode(self, batches: Iterable[Tensor]) -> nn.Module:
        """`shown`, ready to predict, alike on all workers; its batch norms taken anew from `batches` if asked for."""
        session.alike_buffers(self.shown)
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


def feeds_batchnorm(net: nn.Module) -> bool:
    """Whether a batch norm of a network in training takes its statistics from the batch."""
    return any(isinstance(module, _BatchNorm) and module.training for module in net.modules())


def expect_batch(settings: Learning, *, workers: int, what: str) -> None:
    """Refuse a batch that the workers cannot share, or of which batch norms would see one image at a time.

    Raises:
        ConfigError: what is wrong with `learning.batch` or `learning.micro`.
    """
    share, left = divmod(settings.batch, max(workers, 1))
    if left or not share:
        raise ConfigError(
            f"the {what}'s learning.batch {settings.batch} cannot be shared by {workers} workers; "
            "make it a multiple of them"
        )
    seen = min(settings.micro or share, share)
    if (seen == 1 or share % seen == 1) and settings.freeze_batchnorm != "all" and not settings.sync_batchnorm:
        raise ConfigError(
            f"the {what}'s batch norms would see one image at a time (learning.batch {settings.batch}, {workers or 1} "
            f"worker{'s' * (workers > 1)}, learning.micro {settings.micro}), of which no statistics can be taken; "
            "raise learning.batch, or set learning.freeze_batchnorm=all"
        )


def expect_size(size: int, *, reduce: int, what: str) -> None:
    """Refuse windows of `size` px that a network with `reduce` cannot halve five times.

    Raises:
        ConfigError: what is wrong, of the size called `what`.
    """
    if size % (32 * reduce):
        raise ConfigError(f"{what} {size} is no multiple of 32 x reduce = {32 * reduce} px; change it")


def precision(settings: Learning, device: torch.device) -> AbstractContextManager[Any]:
    """The context to compute in: bfloat16 where it is safe on GPUs, unless asked otherwise."""
    wanted = device.type == "cuda" if settings.half is None else settings.half
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _optimizer(net: nn.Module, settings: Learning, groups: Groups | None = None) -> Optimizer:
    groups = [dict(group) for group in groups or _groups(net, settings) if group["params"]]
    if settings.optimizer == "sgd":
        return SGD(groups, lr=0.0, momentum=0.9, weight_decay=settings.weight_decay)
    kind = Adam if settings.optimizer == "adam" else AdamW
    return kind(groups, lr=0.0, weight_decay=settings.weight_decay)


def _groups(net: nn.Module, settings: Learning) -> Groups:
    encoder = [weight for weight in net.get_submodule("encoder").parameters() if weight.requires_grad]
    inside = {id(weight) for weight in encoder}
    rest = [weight for weight in net.parameters() if weight.requires_grad and id(weight) not in inside]
    return [{"params": encoder, "factor": settings.encoder_rate}, {"params": rest, "factor": 1.0}]
