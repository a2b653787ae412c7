"""Training sessions: one plain loop on Ray Train's workers or in this process, resumed from one file.

    <prefix>/checkpoint.pt    everything the loop needs to go on after the last whole epoch, written by worker 0
    <prefix>/tensorboard/     scalars per epoch

A loop is a function of its configuration that calls the functions below; with no workers it runs in this process
without Ray being started. Random numbers are drawn anew for every epoch from (seed, epoch, worker), so a resumed
training goes on exactly as the undisturbed one would have.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor, nn

from rayseg.engine.tuning import reused_memory
from rayseg.errors import ConfigError, DataError, ModelError, RaysegError
from rayseg.models.encoders import NO_FILES
from rayseg.store import StorePath, absolute, is_local, put, upath

Loop = Callable[[dict[str, Any]], dict[str, Any]]
State = dict[str, Any]


def weights_everywhere(weights: str) -> str:
    """The name of weights, or their file as every worker understands it, whatever folder it works in."""
    return weights if weights in NO_FILES else absolute(weights)


Weights = Annotated[str, AfterValidator(weights_everywhere)]
NOTHING: State = {"order": [], "measures": {}, "weights": {}}
"""What is kept before the first epoch is done."""


def fit(
    loop: Loop,
    config: dict[str, Any],
    *,
    storage: StorePath,
    name: str,
    workers: int = 0,
    use_gpu: bool = False,
    max_failures: int = 2,
) -> dict[str, Any]:
    """Run `loop(config)` on `workers` processes of Ray Train and return what worker 0 returned.

    Args:
        loop: importable on the workers; everything it keeps, it keeps through this module.
        config: picklable; prefixes in it must be absolute and reach the same store from every worker.
        storage: prefix below which Ray Train keeps its own notes.
        name: of the training, for messages.
        workers: 0 runs the loop in this process and needs no Ray.
        use_gpu: one GPU per worker; without workers, this machine's first GPU if it has one.
        max_failures: how often lost workers are replaced; the loop then goes on from its checkpoint.

    Raises:
        RaysegError: raised by the loop, with or without workers.
        ConfigError: Ray is not connected.
        ModelError: the workers failed more than `max_failures` times.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if workers and not ray.is_initialized():
        raise ConfigError(f"training {name} on {workers} workers needs Ray: connect first, or set workers to 0")
    place, files = _ray_storage(upath(storage) / "ray")
    trainer = TorchTrainer(
        partial(_in_reused_memory, loop),
        train_loop_config={**config, "use_gpu": use_gpu},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu and workers > 0),
        run_config=RunConfig(
            name=name,
            storage_path=place,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        result: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error, name) from error
    return result


def _in_reused_memory(loop: Loop, config: dict[str, Any]) -> dict[str, Any]:
    with reused_memory():
        return loop(config)


def _ray_storage(place: Any) -> tuple[str, pyarrow.fs.FileSystem | None]:  # noqa: ANN401 - a UPath of any store
    if is_local(place):
        return absolute(place), None
    return place.path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(place.fs))


def _cause(error: Exception, name: str) -> RaysegError:
    """The error of ours that a worker raised, or one that says what happened to the workers."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        chain: BaseException | None = failure
        while chain is not None:
            if isinstance(chain, RaysegError):
                return chain
            chain = chain.__cause__ or getattr(chain, "_base_exc", None)
    reason = " ".join(str(error).split())[-400:]
    return ModelError(f"training {name} failed on its workers: {reason}; start it again to go on from its checkpoint")


def rank() -> int:
    """This worker's number; 0 where there is one process."""
    return int(ray.train.get_context().get_world_rank() or 0)


def world() -> int:
    """Number of workers; 1 where there is one process."""
    return int(ray.train.get_context().get_world_size() or 1)


def spare_cpus(workers: int) -> float:
    """CPUs of the connected Ray that training on `workers` processes leaves to others; 0 without Ray."""
    return float(ray.cluster_resources().get("CPU", 0)) - workers if ray.is_initialized() else 0.0


def device_of(config: Mapping[str, Any]) -> torch.device:
    """Where this worker computes."""
    gpu = config["use_gpu"] and torch.cuda.is_available()
    return torch.device(get_device()) if gpu else torch.device("cpu")


@torch.no_grad()
def alike(net: nn.Module) -> nn.Module:
    """The network with the weights and buffers of worker 0."""
    for value in (*net.parameters(), *net.buffers()) if world() > 1 else ():
        torch.distributed.broadcast(value, 0)
    return net


@torch.no_grad()
def alike_buffers(net: nn.Module) -> None:
    """Give every worker's network the mean of their buffers, such as the statistics of batch norms."""
    for value in net.buffers() if world() > 1 else ():
        if value.is_floating_point():
            torch.distributed.all_reduce(value)
            value.div_(world())


@torch.no_grad()
def together(loss: float, gradients: Sequence[Tensor]) -> tuple[float, bool]:
    """Replace gradients by their mean over all workers; return the mean loss, and whether all of it are numbers.

    Gradients are averaged after the whole backward pass, not during it: a worker that runs out of memory on the way
    can begin again without the others knowing, and networks may be run any number of times in a step.
    """
    if world() == 1:
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        return loss, bool(torch.isfinite(norm)) and math.isfinite(loss)
    device = gradients[0].device
    flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), torch.tensor([loss], device=device)])
    torch.distributed.all_reduce(flat)
    flat /= world()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return float(flat[-1]), bool(torch.isfinite(flat).all())


def refuse_loss(loss: float, items: Callable[[], str], *, what: str, kept: str) -> NoReturn:
    """End the training on every worker because a loss, or its gradient, is no number.

    Args:
        loss: this worker's.
        items: names what this worker computed it of.
        what: the training and how far it is.
        kept: where the last good checkpoint is.

    Raises:
        DataError: always; names the first worker's items whose loss is no number.
    """
    found = (not math.isfinite(loss), rank(), f"loss {loss} on {items()}")
    everywhere: list[Any] = [found]
    if world() > 1:
        everywhere = [None] * world()
        torch.distributed.all_gather_object(everywhere, found)
    bad = [trouble for trouble in everywhere if trouble[0]]
    said = min(bad)[2] if bad else f"a gradient that is no number, {everywhere[0][2]}"
    raise DataError(f"{what}: {said}; {kept}; look at these, or lower the learning rate")


def seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed this worker's random numbers for an epoch; return a generator of its own on the CPU for augmentation."""
    states = np.random.SeedSequence((seed, epoch, rank())).generate_state(2)
    torch.manual_seed(int(states[0]))
    return torch.Generator().manual_seed(int(states[1]))


def rate_at(schedule: Sequence[tuple[float, float]], epoch: float, *, gradual: bool = False) -> float:
    """The learning rate at a point in time.

    Args:
        schedule: (until_epoch, rate), ascending; the last rate stays.
        epoch: whole epochs done, plus the share of the one in work.
        gradual: go from rate to rate in straight lines that meet each rate at its epoch, instead of in steps.
    """
    ends, rates = zip(*schedule, strict=True)
    if gradual:
        return float(np.interp(epoch, ends, rates))
    return float(rates[min(int(np.searchsorted(ends, epoch, side="right")), len(rates) - 1)])


def summed(values: Tensor) -> Tensor:
    """The sum over all workers."""
    if world() > 1:
        torch.distributed.all_reduce(values)
    return values


def share_of(mass: Tensor) -> Tensor:
    """What sums over this worker's pixels are multiplied by, so that the workers' mean is that of the whole batch.

    Args:
        mass: number, or weight, of this worker's labelled pixels; where no worker has any, sums are 0 anyway.
    """
    return world() / summed(mass).clamp(min=1e-12)


def save_checkpoint(prefix: StorePath, settings: str, state: State) -> None:
    """Worker 0 writes the checkpoint of a training."""
    if rank() == 0:
        write_checkpoint(prefix, settings, state)


def write_checkpoint(prefix: StorePath, settings: str, state: State) -> None:
    """`<prefix>/checkpoint.pt`, whole or not at all, in place of the one before."""
    content = BytesIO()
    torch.save({"settings": settings, **state}, content)
    put(upath(prefix) / "checkpoint.pt", content.getbuffer())


def load_checkpoint(prefix: StorePath, settings: str | None) -> State | None:
    """The state after the last whole epoch, on the CPU, or None where there is none yet.

    Args:
        prefix: of the training.
        settings: what the training was asked for, as text; must be what the checkpoint was written for. None takes any.

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
    found = state.pop("settings", None)
    if settings is not None and found != settings:
        raise ModelError(f"checkpoint {path} is of a training with other settings; delete it or use another prefix")
    return state


def best_weights(prefix: StorePath) -> dict[str, Tensor]:
    """The weights kept by the training under `prefix`.

    Raises:
        ModelError: there is no checkpoint, or it is damaged.
    """
    state = load_checkpoint(prefix, None)
    if not state or not state["best"]["weights"]:
        raise ModelError(f"no epoch of the training under {upath(prefix)} is done; train first")
    weights: dict[str, Tensor] = state["best"]["weights"]
    return weights


def better(
    best: State, order: Sequence[float], measures: Mapping[str, float], weights: Callable[[], dict[str, Tensor]]
) -> State:
    """What to keep: `best`, or this epoch if its `order` is above; weights are only asked for if they are kept.

    What is no number is below all numbers.
    """
    numbers = [-math.inf if math.isnan(value) else float(value) for value in order]
    if best["weights"] and numbers <= best["order"]:
        return best
    return {"order": numbers, "measures": dict(measures), "weights": weights()}


@contextmanager
def scalars(prefix: StorePath) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function (epoch, name -> value) by which worker 0 writes to `<prefix>/tensorboard`; others write nothing."""
    if rank():
        yield lambda epoch, values: None
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and workers start often

    target = upath(prefix) / "tensorboard"
    here = Path(str(target)).absolute() if is_local(target) else None
    with nullcontext(str(here)) if here else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with SummaryWriter(str(folder)) as writer:

            def write(epoch: int, values: Mapping[str, float]) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, epoch)
                writer.flush()
                for path in () if here else folder.iterdir():
                    put(target / path.name, path.read_bytes())

            yield write


def report(values: Mapping[str, float]) -> None:
    """Tell Ray Train the measures of an epoch; every worker waits for the others here."""
    ray.train.report(dict(values))
