"""How many copies of a stage a machine or cluster holds, and what each is given."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rayseg import cluster
from rayseg.cluster import Machine
from rayseg.errors import ConfigError, Stalled
from rayseg.guard import Work

MOST_CPUS = 4.0
"""CPUs of one copy of a model that computes on them; on a GPU, the most that any stage with a model asks for."""
LEAST_CPUS = 0.1
LETTING_GO = 2.0
"""Seconds after which what is held of a cluster is held by others, not by the step before."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """What a stage gets: `copies`, each with so many `cpus` and `gpus`."""

    copies: int
    cpus: float
    gpus: float


def sizes_now(works: Sequence[Work], *, shared: bool, patience: float) -> list[Size]:
    """Copies and resources of every stage on the Ray that this process has joined.

    Of a shared cluster they are what others leave. While that is too little, an autoscaler is asked for what is needed
    beside what is held, and it is waited for: `patience` seconds where the cluster itself is too small, four times as
    long where others hold what is needed.

    Args:
        works: the stages, in order.
        shared: whether others may be at work there.
        patience: seconds.

    Raises:
        ConfigError: a Ray of one's own cannot hold one copy of each.
        Stalled: the cluster cannot, and did not grow; or others did not let go of it.
    """
    if not shared:
        return sizes(works, cluster.machines())
    began, told = time.monotonic(), False
    try:
        while True:
            whole, free = cluster.machines(), cluster.free()
            gpus = any(machine["GPU"] for machine in whole)
            waited = time.monotonic() - began
            if free == whole or waited > LETTING_GO:
                try:
                    return sizes(works, free, gpus=gpus)
                except ConfigError as error:
                    held = _hold(works, whole, gpus=gpus)
                    if waited > patience * (4 if held else 1):
                        why = "others did not let go of it" if held else "the cluster did not grow"
                        raise Stalled(f"{error}; {why}: then give the same command again") from None
                    if not told:
                        _log.warning("waiting for room on the cluster: %s", error)
                    _ask_for(_needs(works, gpus=gpus) + _held(whole, free))
                    told = True
            time.sleep(1.0 if told else 0.1)
    finally:
        if told:
            _ask_for(())


def _hold(works: Sequence[Work], machines: Sequence[Machine], *, gpus: bool) -> bool:
    with suppress(ConfigError):
        return bool(sizes(works, machines, gpus=gpus))
    return False


def _needs(works: Sequence[Work], *, gpus: bool) -> list[dict[str, float]]:
    return [{"CPU": max(work.cpus, LEAST_CPUS)} | ({"GPU": work.gpus} if gpus and work.gpus else {}) for work in works]


def _held(whole: Sequence[Machine], free: Sequence[Machine]) -> list[dict[str, float]]:
    """What others have of each machine; one that came or went between the two questions counts when next asked."""
    held = ({name: all_[name] - left[name] for name in all_} for all_, left in zip(whole, free, strict=False))
    some = ({name: amount for name, amount in one.items() if amount > 0} for one in held)
    return [one for one in some if one]


def _ask_for(bundles: Sequence[Mapping[str, float]]) -> None:
    """Have an autoscaler, if there is one, bring the cluster to where it holds these in all; none ends that."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(one) for one in bundles])


def sizes(works: Sequence[Work], machines: Sequence[Machine], *, gpus: bool | None = None) -> list[Size]:
    """Copies and resources of every stage: model stages share what the others leave of each machine.

    A copy fits on a machine beside one of every other stage, so that a cluster that loses machines goes on with one.

    Args:
        works: the stages, in order.
        machines: those that are alive, with what can be had of them.
        gpus: whether stages that ask for GPUs get them; None where a machine has one.

    Raises:
        ConfigError: they cannot hold one copy of each; started anyway, it would wait for ever.
    """
    on_gpus = any(machine.get("GPU") for machine in machines) if gpus is None else gpus
    models = [work for work in works if work.model or (work.gpus and on_gpus)]
    small = [work for work in works if work not in models]
    others = handing_out(works[0]) + sum(work.cpus for work in small)
    wanted = sum(work.gpus for work in models) if on_gpus else 0.0
    copies, share = _of_models(models, others, [m for m in machines if m.get("CPU")], wanted)
    cpus = sum(machine.get("CPU", 0.0) for machine in machines)
    rest = cpus - others
    share = min(share, math.floor(100 * rest / (max(copies, 1) * max(len(models), 1)) + 1e-6) / 100)
    widest = max((machine.get("CPU", 0.0) for machine in machines), default=0.0)
    if rest < 0 or any(work.cpus > widest for work in small) or (models and (share < LEAST_CPUS or not copies)):
        needed = others + sum(work.cpus for work in models)
        with_gpus = f" beside {wanted:g} GPUs of one machine" if wanted else ""
        raise ConfigError(
            f"the stages need {needed:g} CPUs at once{with_gpus}, Ray has {cpus:g} free; give it more, or "
            "--engine inline"
        )
    return [
        Size(copies, share, work.gpus if on_gpus else 0.0) if work in models else Size(1, work.cpus, 0.0)
        for work in works
    ]


def handing_out(first: Work) -> float:
    """CPUs of the tasks that hand out rows: as the first stage, which they are fused with unless it lives in actors."""
    return LEAST_CPUS if first.model else first.cpus


def _of_models(models: Sequence[Work], others: float, machines: Sequence[Machine], gpus: float) -> tuple[int, float]:
    """(copies of every model stage, CPUs of one): without GPUs as wide as the machine with the most room allows.

    Args:
        models: the stages.
        others: CPUs that the other stages need.
        machines: those with CPUs.
        gpus: what one copy of all models needs; 0 without.
    """
    stages = max(len(models), 1)
    if gpus:
        widest = [int(_room(machine, others) / (stages * LEAST_CPUS) + 1e-6) for machine in machines]
        counts = [min(int(m.get("GPU", 0.0) / gpus + 1e-6), most) for m, most in zip(machines, widest, strict=True)]
        hosts = [(machine, count) for machine, count in zip(machines, counts, strict=True) if count]
        asked = max(LEAST_CPUS, *(work.cpus for work in models))
        return sum(counts), min([asked, *(_room(m, others) / (count * stages) for m, count in hosts)])
    width = min(MOST_CPUS, max((_room(machine, others) / stages for machine in machines), default=0.0))
    fitting = sum(int(_room(machine, others) / (width * stages) + 1e-6) for machine in machines) if width else 0
    # Of several machines each has room for the copies of another one: those of a machine that dies start again there,
    # and what they were given is not held back until a new machine comes.
    asked = max(LEAST_CPUS, width / 2) if len(machines) > 1 else width
    return max(1, fitting), math.floor(100 * asked + 1e-6) / 100


def _room(machine: Machine, others: float) -> float:
    """CPUs of a machine for models: what is left beside the other stages, or all of it where that is nothing."""
    cpus = machine["CPU"]
    return cpus - others if cpus - others >= LEAST_CPUS else cpus
