"""What the training loops share: the network, how its weights change, its epochs, and what is kept of them."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field, field_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from rayseg.config import Config, added
from rayseg.errors import ConfigError, ModelError
from rayseg.models.bundle import take_over
from rayseg.models.encoders import averaged, freeze_batchnorm, recalibrate_batchnorm
from rayseg.models.segmenter import ARCHITECTURES, build_segmenter
from rayseg.store import Location, StorePath, upath
from rayseg.train import probe, session
from rayseg.train.pictures import Picture, Pictures
from rayseg.train.session import State

Groups = Sequence[dict[str, Any]]
"""Of an optimizer: `params`, `factor` on the learning rate, and other options of the optimizer."""
_log = logging.getLogger(__name__)


def _rising(rates: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    ends = [end for end, _ in rates]
    if not rates or sorted(set(ends)) != ends or min(min(pair) for pair in rates) < 0:
        raise ValueError(
            f"{[list(pair) for pair in rates]} is not a schedule; give one or more [until epoch, learning rate] with "
            "rising epochs and no negative number"
        )
    return rates


Rates = Annotated[tuple[tuple[float, float], ...], AfterValidator(_rising)]


class NetworkConfig(Config):
    """An untrained segmenter."""

    architecture: str
    """A name of segmentation_models_pytorch, or "deeplab" (DeepLabv3+) or "deeplabv2" of rayseg.models.deeplab."""
    encoder: str
    """A name of segmentation_models_pytorch or of timm."""
    weights: session.Weights = "imagenet"
    """Of the encoder: "imagenet", "packaged" (of a Python package), "none", or a file."""
    start: Location | None = added(default=None)
    """Bundle whose weights the training starts from, instead of `weights`; layers of another shape start at random."""
    reduce: Annotated[int, Field(gt=0)] = 1
    """Side in px of the squares that are averaged to one input pixel of the network."""
    enlarge: Annotated[int, Field(gt=0)] = added(default=1)
    """Factor by which images are enlarged before the network, for lines of one or two pixels."""

    @field_validator("architecture")
    @classmethod
    def _known(cls, architecture: str) -> str:
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture!r} is unknown, expected one of: {', '.join(ARCHITECTURES)}")
        return architecture

    @property
    def factory(self) -> Literal["segmenter", "pixel-head"]:
        """Name of the network's factory in a bundle."""
        return "segmenter"

    def options(self, *, classes: int = 1, channels: int) -> dict[str, str | int | float]:
        """Arguments of `build_segmenter`, as a bundle stores them."""
        return {
            "architecture": self.architecture,
            "encoder": self.encoder,
            "classes": classes,
            "channels": channels,
            "reduce": self.reduce,
            **({"enlarge": self.enlarge} if self.enlarge > 1 else {}),
        }

    def build(self, *, classes: int = 1, channels: int, weights: str | None = None) -> nn.Module:
        """The network, in training mode, from its own weights or from `weights`.

        Raises:
            ConfigError: the architecture or the encoder is unknown, or they cannot be combined.
            ModelError: the weights are missing or do not fit.
        """
        net = build_segmenter(
            self.architecture,
            self.encoder,
            classes=classes,
            channels=channels,
            weights=weights or ("none" if self.start else self.weights),
            reduce=self.reduce,
            enlarge=self.enlarge,
        )
        if self.start and weights is None:
            take_over(net, self.start)
        return net


class Schedule(Config):
    """How the learning rate falls."""

    kind: Literal["poly", "cos", "step"] = "poly"
    """rate x (1 - t)^power, rate x (1 + cos(pi t)) / 2 at the share t of the training, or x `factor` every `every`."""
    rate: Annotated[float, Field(gt=0)] = 0.1
    """Highest rate of the head; the encoder's is `learning.encoder_rate` times as high."""
    power: Annotated[float, Field(gt=0)] = 0.9
    """poly: exponent; 1 is a straight line."""
    every: Annotated[float, Field(gt=0)] = 30.0
    """step: epochs between drops."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: factor of each drop."""
    warm_up: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up from 0."""

    def at(self, done: float, whole: float) -> float:
        """The rate after `done` of `whole` epochs (or another unit, if `every` and `warm_up` are in it too)."""
        share = min(done / whole, 1.0)
        fallen: float = {
            # Chen et al. 2018 (DeepLab v2), section 4.1.
            "poly": (1 - share) ** self.power,
            # Loshchilov & Hutter 2017, eq. 5, without restarts.
            "cos": (1 + math.cos(math.pi * share)) / 2,
            # 1e-9: sums of steps reach the epoch of a drop only up to rounding
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
    """Weight decay of the optimizer."""
    encoder_rate: Annotated[float, Field(ge=0)] = 1.0
    """Learning rate of the encoder relative to the other weights; 0 freezes it."""
    gradual: bool = False
    """Interpolate linearly between the rates of a schedule instead of changing them in steps."""
    micro: Annotated[int, Field(gt=0)] | None = None
    """Images that each worker computes at once (gradients are accumulated); by default all of a step."""
    sync_batchnorm: bool = False
    """On several GPUs: compute batch norm statistics over the images of all workers."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; longer gradients are clipped."""
    freeze_batchnorm: Literal["none", "encoder", "all"] = "none"
    """Batch norms that keep their initial statistics; for few chips or small batches on pretrained weights."""
    recalibrate: Annotated[int, Field(ge=0)] = 0
    """Batches from which batch norm statistics are computed again before every evaluation; 0 keeps them."""
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which then is evaluated, relabels and is saved."""
    half: bool | None = None
    """Compute in bfloat16 where it is safe; by default on GPUs only."""
    keep_every: Annotated[int, Field(ge=0)] = added(default=0)
    """Epochs (of al-s4gan: checkpoints) between weights that are kept for `evaluate --checkpoints`; 0 keeps none."""
    seed: int = 1337
    """Of all random numbers."""
    memory: Annotated[int, Field(ge=0)] = 2 << 30
    """Bytes of chips that each worker keeps in memory; other chips are read again every epoch."""
    threads: Annotated[int, Field(gt=0)] = 2
    """Threads of each worker that read chips."""


@dataclass
class Learner:
    """A network in training with its optimizer, its averaged weights, and the images it computes at once."""

    settings: Learning
    net: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    micro: int | None = None
    """Images computed at once; halved when memory is short."""
    kept: str = "no epoch has been kept yet"
    """Where the last good checkpoint is, for messages."""

    @classmethod
    def start(cls, net: nn.Module, settings: Learning, device: torch.device, groups: Groups | None = None) -> "Learner":
        """A learner of `net`, the same on every worker.

        Args:
            net: its submodule `encoder` may have its own learning rate.
            settings: how it learns.
            device: to train on.
            groups: of its weights; by default the encoder and all others.
        """
        # Frozen weights get no gradient at all, which saves their memory and time.
        if not settings.encoder_rate:
            net.get_submodule("encoder").requires_grad_(False)
        if settings.sync_batchnorm and device.type == "cuda" and session.world() > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        net = session.broadcast_weights(net.to(device))
        # The average copies the network, so it starts from worker 0's weights, too.
        average = averaged(net, decay=settings.average) if settings.average else None
        if not groups:
            encoder = [weight for weight in net.get_submodule("encoder").parameters() if weight.requires_grad]
            inside = {id(weight) for weight in encoder}
            rest = [weight for weight in net.parameters() if weight.requires_grad and id(weight) not in inside]
            groups = [{"params": encoder, "factor": settings.encoder_rate}, {"params": rest, "factor": 1.0}]
        trained = [dict(group) for group in groups if group["params"]]
        # The rate is 0 until the first step sets it.
        kinds: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": partial(SGD, momentum=0.9)}
        optimizer = kinds[settings.optimizer](trained, lr=0.0, weight_decay=settings.weight_decay)
        return cls(settings, net, optimizer, average, settings.micro)

    @property
    def shown(self) -> nn.Module:
        """The network to evaluate and save: the average of the weights if there is one."""
        return self.average.module if self.average else self.net

    def train_mode(self) -> None:
        """Prepare the network for steps."""
        self.net.train()
        # `net.train()` switches all batch norms on, so frozen ones are switched off after it.
        frozen = {"none": None, "encoder": self.net.get_submodule("encoder"), "all": self.net}
        if (part := frozen[self.settings.freeze_batchnorm]) is not None:
            freeze_batchnorm(part)

    def step(
        self, loss_of: Callable[[slice], Tensor], count: int, rate: float, *, items: Callable[[], str], what: str
    ) -> float:
        """Change the weights by the gradient of a batch's loss; return the mean loss over all workers.

        The batch is computed in parts of `micro` images, or half as many where GPU memory is short.
        A loss or gradient that is not finite leaves the weights unchanged.

        Args:
            loss_of: part of this worker's images -> its share of the loss; the shares add up to the loss.
            count: number of this worker's images.
            rate: the learning rate.
            items: names the images, for the message.
            what: name and step of the training, for the message.

        Raises:
            DataError: on every worker, if the loss of any worker is not finite.
            ModelError: GPU memory does not hold the smallest part.
        """
        loss = self._backward(loss_of, count)
        # All workers take the same decision, so their weights stay equal.
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        mean, finite = session.average_gradients(loss, [weight.grad for weight in weights if weight.grad is not None])
        if not finite:
            session.raise_not_finite(loss, items, what=what, kept=self.kept)
        self.descend(rate)
        return mean

    def _backward(self, loss_of: Callable[[slice], Tensor], count: int) -> float:
        """Compute the gradients of the whole batch; return its loss."""
        self.micro = min(self.micro or count, count)
        while True:
            # A batch that ran out of memory begins again: half its gradients may be summed already.
            self.optimizer.zero_grad()
            total = torch.zeros(())
            try:
                for start in range(0, count, self.micro):
                    loss = loss_of(slice(start, min(start + self.micro, count)))
                    loss.backward()  # type: ignore[no-untyped-call]
                    total = total + loss.detach()
                return float(total)
            except torch.OutOfMemoryError:
                self.micro = _halved(self.micro, self.net)

    def descend(self, rate: float) -> None:
        """Change the weights by their gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.net)

    def keep(self, prefix: StorePath, key: str, state: State) -> None:
        """Write the checkpoint of an epoch: `state` (with `epoch`, the number done) and this learner's state."""
        if session.rank() == 0:
            session.save_checkpoint(prefix, key, state | {"learner": self.state()})
            if self.settings.keep_every and state["epoch"] % self.settings.keep_every == 0:
                session.keep_weights(prefix, int(state.get("step") or state["epoch"]), self.weights())
        self.note_kept(prefix, state["epoch"])

    def note_kept(self, prefix: StorePath, epochs: int) -> None:
        """Remember, for messages, which checkpoint is the last good one."""
        path = upath(prefix) / "checkpoint.pt"
        self.kept = f"the last good checkpoint is {path}, of {epochs} epoch{'s' * (epochs > 1)}"

    def show_mode(self, batches: Iterable[Tensor]) -> nn.Module:
        """`shown`, ready to predict and equal on all workers; `batches` recalibrate its batch norms if configured."""
        session.average_buffers(self.shown)
        if self.settings.recalibrate:
            recalibrate_batchnorm(self.shown, islice(batches, self.settings.recalibrate))
        return self.shown.eval()

    def rates(self, name: str = "learning_rate") -> dict[str, float]:
        """The learning rate of every group of weights at the last step, for TensorBoard."""
        return {f"{name}/{k}": float(group["lr"]) for k, group in enumerate(self.optimizer.param_groups)}

    def pictures(self, shown: Pictures | None, epoch: int, epochs: int) -> Mapping[str, Picture]:
        """Pictures of samples by the network, at some epochs; none in a sample of the training's time."""
        if shown is None or session.rank() or probe.is_taken() or not session.is_shown(epoch, epochs):
            return session.NO_PICTURES
        return shown(self.shown.eval())

    def state(self) -> State:
        """The state to resume from."""
        average = self.average.state_dict() if self.average else None
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "average": average}

    def resume(self, state: State) -> None:
        """Take over the `state()` of another learner with the same settings."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights of `shown` on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.shown.state_dict().items()}


def _halved(micro: int, net: nn.Module) -> int:
    """Half as many images per part as did not fit into GPU memory."""
    # Of one image, a feature map of 1 x 1 px has one value per channel, which has no variance.
    feeds_batchnorm = any(isinstance(module, _BatchNorm) and module.training for module in net.modules())
    if micro // 2 < (2 if feeds_batchnorm else 1):
        why = ", and batch norms need more than one; freeze them," if feeds_batchnorm else ";"
        raise ModelError(
            f"GPU memory does not hold {micro} image{'s' * (micro > 1)} in training{why} lower size, or choose a "
            "smaller network"
        )
    _log.warning("GPU memory is short: computing %d images at a time and accumulating gradients", micro // 2)
    torch.cuda.empty_cache()
    return micro // 2


def precision(settings: Learning, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a forward pass: by default bfloat16 on GPUs and float32 on CPUs."""
    wanted = device.type == "cuda" if settings.half is None else settings.half
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


# -- checks -----------------------------------------------------------------------------------------------------------


def expect_batch(settings: Learning, *, workers: int, what: str) -> None:
    """Refuse a batch that the workers cannot share, or that feeds batch norms one image at a time.

    Raises:
        ConfigError: `learning.batch` or `learning.micro` of the network called `what` is invalid.
    """
    share, rest = divmod(settings.batch, max(workers, 1))
    if rest or not share:
        raise ConfigError(
            f"the {what}'s learning.batch {settings.batch} cannot be shared by {workers} workers; "
            "make it a multiple of them"
        )
    # The last part of a batch is the rest of the division by `micro`, which must not be one image either.
    seen = min(settings.micro or share, share)
    if (seen == 1 or share % seen == 1) and settings.freeze_batchnorm != "all" and not settings.sync_batchnorm:
        raise ConfigError(
            f"the {what}'s batch norms would see one image at a time (learning.batch {settings.batch}, {workers or 1} "
            f"worker{'s' * (workers > 1)}, learning.micro {settings.micro}), which has no batch statistics; "
            "raise learning.batch, or set learning.freeze_batchnorm=all"
        )


def expect_size(size: int, *, reduce: int, what: str) -> None:
    """Refuse windows of `size` px that a network with `reduce` cannot halve five times.

    Raises:
        ConfigError: the size, called `what`, is invalid.
    """
    if size % (32 * reduce):
        raise ConfigError(f"{what} {size} is not a multiple of 32 x reduce = {32 * reduce} px; change it")


# -- the loop ---------------------------------------------------------------------------------------------------------


def resumed(
    state: State | None,
    build: Callable[[str | None], nn.Module],
    settings: Learning,
    config: State,
    *,
    seed: int | None = None,
) -> tuple[Learner, State]:
    """The learner and the state of a training at its last checkpoint, or at its start.

    Args:
        state: of the checkpoint; None to start.
        build: weights of the encoder (None for the configured ones) -> network.
        settings: how it learns.
        config: of the loop: `prefix` of the checkpoint and `use_gpu`.
        seed: of the network's random weights; by default that of `settings`.
    """
    torch.manual_seed(settings.seed if seed is None else seed)
    # A checkpoint holds all weights, so those of the encoder are not loaded once more.
    learner = Learner.start(build("none" if state else None), settings, session.device_of(config))
    if state:
        learner.resume(state["learner"])
        learner.note_kept(config["prefix"], state["epoch"])
    return learner, state or {"epoch": 0, "best": session.UNTRAINED}


class Epoch(NamedTuple):
    """What an epoch of training gives.

    Attributes:
        measures: for TensorBoard and Ray Train.
        order: decides which epoch is kept: the highest; None where the epoch is not evaluated.
        noted: more measures, which only the kept epoch has.
    """

    measures: dict[str, float]
    order: Sequence[float] | None
    noted: dict[str, float]


def run_epochs(
    one_epoch: Callable[[int], Epoch],
    learner: Learner,
    state: State,
    *,
    epochs: int,
    config: State,
    shown: Pictures | None = None,
) -> State:
    """Make the epochs from the checkpoint `state` to the last; return what is kept: `weights` and `measures`.

    Args:
        one_epoch: trains and evaluates the epoch with this number.
        learner: of the network.
        state: `epoch`, the number done, and `best`, the epoch kept so far.
        epochs: number of all epochs.
        config: of the loop: `prefix` and `key` of the checkpoint.
        shown: draws samples for TensorBoard.
    """
    with session.scalars(config["prefix"]) as write:
        for epoch in probe.epochs(range(state["epoch"], epochs)):
            measures, order, noted = one_epoch(epoch)
            best = state["best"]
            if order is not None:
                best = session.better(best, order, measures | noted, learner.weights)
            state = {"epoch": epoch + 1, "best": best}
            learner.keep(config["prefix"], config["key"], state)
            write(epoch, measures | learner.rates(), learner.pictures(shown, epoch, epochs))
            session.note(config, epoch + 1, epochs, measures)
            session.report(measures)  # workers wait for each other here, when the checkpoint is written
    return dict(state["best"])


def trained(net: nn.Module, prefix: StorePath) -> nn.Module:
    """The network with the weights that the training under `prefix` keeps, in evaluation mode.

    Raises:
        ModelError: no epoch is done, or the checkpoint is damaged.
    """
    net.load_state_dict(session.best_weights(prefix))
    return net.eval()
