"""Training sessions: a plain loop on the workers of Ray Train or in this process, resumed from one file.

    <prefix>/checkpoint.pt    all that the loop needs to resume after the last whole epoch; worker 0 writes it
    <prefix>/tensorboard/     scalars per epoch, and pictures of a few samples at some epochs
    <prefix>/kept/<n>.pt      weights after epoch (or step) n, if every n-th is kept
    <prefix>/progress.json    how far it is, while it runs

A loop is a function of its configuration that calls the functions below; without workers it runs in this process and
Ray is not started. Random numbers are drawn for every epoch from (seed, epoch, worker), so a resumed training gives the
weights of an undisturbed one.
"""

import json
import logging
import math
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import pyarrow.fs
import ray
import ray.train
import torch
import torch.distributed
from pydantic import AfterValidator
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor, nn

from rayseg.engine import progress
from rayseg.engine.tuning import reused_memory
from rayseg.errors import ConfigError, DataError, ModelError, RaysegError
from rayseg.models.pretrained_weights import everywhere
from rayseg.store import STORE_ERRORS, StorePath, absolute, is_local, put, upath

State = dict[str, Any]
"""What a training keeps from epoch to epoch, or what its loop is called with."""
Loop = Callable[[State], State]


Write = Callable[..., None]
"""(epoch, name -> value, name -> picture (height, width, 3) uint8)."""
NO_PICTURES: Mapping[str, Any] = {}
Weights = Annotated[str, AfterValidator(everywhere)]
_EVERY = 0.5  # seconds between two looks at a training's progress
_MEASURES = 3  # shown of an epoch
SHOWN = 10
"""Epochs of a training with pictures, about."""
UNTRAINED: State = {"order": [], "measures": {}, "weights": {}}
"""The best epoch before the first one is done."""


@dataclass(frozen=True)
class Setup:
    """Where a training keeps its files and on what it runs: the same for every paradigm.

    Attributes:
        prefix: of the checkpoint, the scalars and Ray Train's own files; all workers reach it.
        workers: processes of Ray Train; 0 trains in this process, without Ray.
        use_gpu: one GPU per worker; without workers, this machine's first GPU if it has one.
        max_failures: how often lost workers are replaced; the loop then resumes from its checkpoint.
    """

    prefix: StorePath
    workers: int = 0
    use_gpu: bool = False
    max_failures: int = 2


def fit(loop: Loop, config: State, setup: Setup, *, name: str) -> State:
    """Run `loop` on the workers of `setup` and return what worker 0 returned.

    Args:
        loop: importable on the workers; called with `config`, the absolute `prefix` and `use_gpu`.
        config: picklable.
        setup: where the training runs.
        name: of the training, for messages.

    Raises:
        RaysegError: raised by the loop, with or without workers.
        ConfigError: Ray is not connected.
        ModelError: the workers failed more than `setup.max_failures` times, or the training's controller is gone.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if setup.workers and not ray.is_initialized():
        raise ConfigError(f"training {name} on {setup.workers} workers needs Ray; connect first, or set workers to 0")
    # Ray Train writes its own state next to the checkpoints; a store is passed on as an open filesystem.
    folder = upath(setup.prefix) / "ray"
    remote = None if is_local(folder) else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.fs))
    noted = f"{absolute(setup.prefix)}/progress.json"
    trainer = TorchTrainer(
        partial(_in_reused_memory, loop),
        train_loop_config={
            "prefix": absolute(setup.prefix),
            "use_gpu": setup.use_gpu,
            "progress": noted,
            "title": name,
            **config,
        },
        scaling_config=ScalingConfig(num_workers=setup.workers, use_gpu=setup.use_gpu and setup.workers > 0),
        run_config=RunConfig(
            name=name,
            storage_path=folder.path if remote else absolute(folder),
            storage_filesystem=remote,
            failure_config=FailureConfig(max_failures=setup.max_failures),
        ),
    )
    try:
        with _shown(noted), _interruptible(name):
            result: State = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error, name) from error
    return result


@contextmanager
def _interruptible(name: str) -> Iterator[None]:
    """Make Ctrl-C during a training a KeyboardInterrupt; Ray Train ends the process without a word, also afterwards.

    Raises:
        ModelError: the controller of the training `name` is gone, and no signal was received.
    """
    handler = signal.getsignal(signal.SIGINT)
    with _received() as signals:
        try:
            yield
        except SystemExit:  # raised by Ray Train's handler
            raise KeyboardInterrupt from None
        except RayActorError as error:  # the controller: aborted by that handler, or killed for lack of memory
            if signals() & {signal.SIGINT, signal.SIGTERM}:
                raise KeyboardInterrupt from None
            raise _cause(error, name) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)


@contextmanager
def _received() -> Iterator[Callable[[], set[int]]]:
    """A function that returns the signals that this process received meanwhile, whoever handled them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield set
        return
    # Ray Train replaces the handler while it runs, so a handler of one's own would see nothing.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            theirs.send(b"\0")  # never empty, as reading nothing would be an error
            yield lambda: set(ours.recv(4096))
        finally:
            signal.set_wakeup_fd(before)


@contextmanager
def _shown(path: str) -> Iterator[None]:
    """Show what worker 0 notes in a file, wherever it runs; the file is deleted at the end."""
    ended = threading.Event()

    def follow() -> None:
        # Workers of Ray Train may be on other machines, so the progress passes through a file.
        last, work, done = b"", "", 0
        with ExitStack() as bars:
            over = False
            while not over:
                over = ended.wait(_EVERY)
                with suppress(ValueError, *STORE_ERRORS):  # not written yet, or half, or the store is away
                    content = upath(path).read_bytes()
                    if content == last:
                        continue
                    last, row = content, json.loads(content)
                    # A training of several stages has one bar after the other.
                    if row["work"] != work:
                        bars.close()
                        work, done = row["work"], 0
                        advance = bars.enter_context(progress.shown(work, row["total"], unit=row["unit"]))
                    advance(row["done"] - done, row["text"])
                    done = row["done"]

    thread = threading.Thread(target=follow, daemon=True)
    with suppress(*STORE_ERRORS):  # of a training that was killed
        upath(path).unlink(missing_ok=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=20 * _EVERY)
        with suppress(*STORE_ERRORS):
            upath(path).unlink(missing_ok=True)


def note(config: State, done: int, total: int, measures: Mapping[str, float], *, unit: str = "epoch") -> None:
    """Note how far the training is, for the process that waits for it and shows it; worker 0 writes.

    Args:
        config: of the loop.
        done: epochs or steps.
        total: all of them.
        measures: of the last epoch; the first few are shown.
        unit: epoch or step.
    """
    if rank() or "progress" not in config:
        return
    work = " ".join(filter(None, [config["title"], config.get("stage", "").replace("_", " ")]))
    text = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in list(measures.items())[:_MEASURES])
    # Not by `put`, which lists what a finished step has to keep; a store that is away must not end the training.
    with suppress(*STORE_ERRORS):
        row = {"work": work, "unit": unit, "done": done, "total": total, "text": text}
        upath(config["progress"]).write_text(json.dumps(row))


def _in_reused_memory(loop: Loop, config: State) -> State:
    with reused_memory():
        return loop(config)


def _cause(error: Exception, name: str) -> RaysegError:
    """The RaysegError that a worker raised, or a ModelError that reports what happened to the workers."""
    # Ray wraps the error of a worker several times.
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        chain: BaseException | None = failure
        while chain is not None:
            if isinstance(chain, RaysegError):
                return chain
            chain = chain.__cause__ or getattr(chain, "_base_exc", None)
    reason = " ".join(str(error).split())[-400:]
    return ModelError(f"training {name} failed on its workers: {reason}; start it again to resume from its checkpoint")


# -- workers ----------------------------------------------------------------------------------------------------------


def rank() -> int:
    """Number of this worker; 0 in a single process."""
    return int(ray.train.get_context().get_world_rank() or 0)


def world() -> int:
    """Number of workers; 1 in a single process."""
    return int(ray.train.get_context().get_world_size() or 1)


def device_of(config: Mapping[str, Any]) -> torch.device:
    """Device of this worker."""
    gpu = config["use_gpu"] and torch.cuda.is_available()
    return torch.device(get_device()) if gpu else torch.device("cpu")


@torch.no_grad()
def broadcast_weights(net: nn.Module) -> nn.Module:
    """The network with the weights and buffers of worker 0."""
    for value in (*net.parameters(), *net.buffers()) if world() > 1 else ():
        torch.distributed.broadcast(value, 0)
    return net


@torch.no_grad()
def average_buffers(net: nn.Module) -> None:
    """Replace the network's buffers, such as batch norm statistics, by their mean over all workers."""
    for value in net.buffers() if world() > 1 else ():
        if value.is_floating_point():
            torch.distributed.all_reduce(value)
            value.div_(world())


@torch.no_grad()
def average_gradients(loss: float, gradients: Sequence[Tensor]) -> tuple[float, bool]:
    """Replace gradients by their mean over all workers; return the mean loss, and whether all values are finite.

    Gradients are averaged after the whole backward pass, not during it: a worker that runs out of memory can then
    begin the pass again without the others knowing, and networks may run any number of times in a step.
    """
    if world() == 1:
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        return loss, bool(torch.isfinite(norm)) and math.isfinite(loss)
    device = gradients[0].device
    # All gradients and the loss in one tensor: one exchange per step instead of one per weight.
    flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), torch.tensor([loss], device=device)])
    torch.distributed.all_reduce(flat)
    flat /= world()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return float(flat[-1]), bool(torch.isfinite(flat).all())


def raise_not_finite(loss: float, items: Callable[[], str], *, what: str, kept: str) -> NoReturn:
    """End the training on every worker because a loss, or its gradient, is not finite.

    Args:
        loss: of this worker.
        items: names the images of this worker's loss.
        what: name and step of the training.
        kept: where the last good checkpoint is.

    Raises:
        DataError: always; names the images of the first worker whose loss is not finite.
    """
    own = (not math.isfinite(loss), rank(), f"loss {loss} on {items()}")
    everywhere: list[Any] = [own]
    if world() > 1:
        everywhere = [None] * world()
        torch.distributed.all_gather_object(everywhere, own)
    bad = [failure for failure in everywhere if failure[0]]
    reason = min(bad)[2] if bad else f"a gradient that is not finite, {everywhere[0][2]}"
    raise DataError(f"{what}: {reason}; {kept}; check these images, or lower the learning rate")


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if world() > 1:
        torch.distributed.all_reduce(values)
    return values


def batch_share(mass: Tensor) -> Tensor:
    """Factor on a sum over this worker's pixels whose mean over all workers is the mean over the whole batch.

    Args:
        mass: number, or weight, of this worker's labelled pixels; where no worker has any, the sums are 0 anyway.
    """
    return world() / sum_over_workers(mass).clamp(min=1e-12)


# -- epochs -----------------------------------------------------------------------------------------------------------


def seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed this worker's random numbers for an epoch; return a separate generator on the CPU for augmentation."""
    # Two streams: augmentation must not depend on the number of random values that dropout draws.
    states = np.random.SeedSequence((seed, epoch, rank())).generate_state(2)
    torch.manual_seed(int(states[0]))
    return torch.Generator().manual_seed(int(states[1]))


def rate_at(schedule: Sequence[tuple[float, float]], epoch: float, *, gradual: bool = False) -> float:
    """The learning rate at a point in time.

    Args:
        schedule: (until_epoch, rate), ascending; the last rate stays.
        epoch: whole epochs done, plus the share of the current one.
        gradual: interpolate linearly between the rates, each reached at its epoch, instead of in steps.
    """
    ends, rates = zip(*schedule, strict=True)
    if gradual:
        return float(np.interp(epoch, ends, rates))
    return float(rates[min(int(np.searchsorted(ends, epoch, side="right")), len(rates) - 1)])


def better(
    best: State, order: Sequence[float], measures: Mapping[str, float], weights: Callable[[], dict[str, Tensor]]
) -> State:
    """The epoch to keep: `best`, or this one if its `order` is higher; `weights` is only called for the latter.

    NaN is below all numbers.
    """
    numbers = [-math.inf if math.isnan(value) else float(value) for value in order]
    if best["weights"] and numbers <= best["order"]:
        return best
    return {"order": numbers, "measures": dict(measures), "weights": weights()}


def is_shown(epoch: int, epochs: int) -> bool:
    """Whether pictures are drawn after an epoch: the first, the last and some in between."""
    return epoch + 1 == epochs or epoch % max(epochs // SHOWN, 1) == 0


@contextmanager
def scalars(prefix: StorePath) -> Iterator[Write]:
    """`tensorboard` of worker 0; the function of other workers writes nothing."""
    if rank():
        yield lambda epoch, values, pictures=NO_PICTURES: None
        return
    with tensorboard(prefix) as write:
        yield write


@contextmanager
def tensorboard(prefix: StorePath) -> Iterator[Write]:
    """A function that writes to `<prefix>/tensorboard`, also outside of a training session.

    Its arguments are the epoch, measures by name, and pictures (height, width, 3) uint8 by name.
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and workers start often

    target = upath(prefix) / "tensorboard"
    # TensorBoard writes local files only: for another store they are copied after every epoch.
    local = Path(str(target)).absolute() if is_local(target) else None
    with nullcontext(str(local)) if local else tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def write(epoch: int, values: Mapping[str, float], pictures: Mapping[str, Any] = NO_PICTURES) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, epoch)
            for name, picture in pictures.items():
                writer.add_image(f"samples/{name}", picture, epoch, dataformats="HWC")
            writer.flush()
            for path in () if local else Path(folder).iterdir():
                put(target / path.name, path.read_bytes())

        yield write


def report(values: Mapping[str, float]) -> None:
    """Report the measures of an epoch to Ray Train; every worker waits for the others here."""
    ray.train.report(dict(values))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(prefix: StorePath, settings: str, state: State) -> None:
    """Replace `<prefix>/checkpoint.pt` as a whole; of several workers only one may call this."""
    # Written to memory first: `put` replaces the file in one step, so a kill leaves the last one.
    content = BytesIO()
    torch.save({"settings": settings, **state}, content)
    put(upath(prefix) / "checkpoint.pt", content.getbuffer())


def keep_weights(prefix: StorePath, number: int, weights: Mapping[str, Tensor]) -> None:
    """Write `<prefix>/kept/<number>.pt`, the weights after so many epochs or steps."""
    content = BytesIO()
    torch.save({"number": number, "weights": dict(weights)}, content)
    put(upath(prefix) / "kept" / f"{number:06d}.pt", content.getbuffer())


def load_checkpoint(prefix: StorePath, settings: str | None) -> State | None:
    """The state after the last whole epoch, on the CPU, or None if there is none yet.

    Args:
        prefix: of the training.
        settings: of the training, as text; must equal those the checkpoint was written with. None accepts any.

    Raises:
        ModelError: the file is damaged or belongs to a training with other settings.
    """
    path = upath(prefix) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state: State = torch.load(BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ModelError(f"checkpoint {path} is damaged: {reason}; delete it to train from the start") from None
    # Weights of other settings may fit and be wrong.
    written = state.pop("settings", None)
    if settings is not None and written != settings:
        raise ModelError(f"checkpoint {path} belongs to a training with other settings; delete it or change the prefix")
    return state


def best_weights(prefix: StorePath) -> dict[str, Tensor]:
    """The weights that the training under `prefix` keeps.

    Raises:
        ModelError: there is no checkpoint, or it is damaged.
    """
    state = load_checkpoint(prefix, None)
    if not state or not state["best"]["weights"]:
        raise ModelError(f"no epoch of the training under {upath(prefix)} is done; train first")
    weights: dict[str, Tensor] = state["best"]["weights"]
    return weights
