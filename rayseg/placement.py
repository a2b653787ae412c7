"""How many copies of a stage a machine or cluster holds, and what each is given."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayseg.errors import ConfigError, Stalled
from rayseg.guard import Work

MOST_CPUS = 4.0
"""CPUs of one copy of a model without need of more."""
LEAST_CPUS = 0.1
Machine = Mapping[str, float]
"""What one machine has: CPU, GPU, ..."""
SETTLED = 2.0
"""Seconds after which what is held of a cluster is held by others, not by the step before."""


@dataclass(frozen=True)
class Size:
    """What a stage gets: `copies`, each with so many `cpus` and `gpus`."""

    copies: int
    cpus: float
    gpus: float


def sizes_now(works: Sequence[Work], patience: float) -> list[Size]:
    """Copies and resources of every stage in what others leave of the cluster; waits while that is too little.

    Args:
        works: the stages, in order.
        patience: seconds that others may hold what is needed.

    Raises:
        ConfigError: the cluster cannot hold one copy of each, even if nobody else is at work.
        Stalled: others hold too much of it for longer.
    """
    sizes(works, whole := _machines())
    for _ in range(round(SETTLED / 0.1)):
        if _free() == whole:
            break
        time.sleep(0.1)
    given_up = time.monotonic() + patience
    while True:
        try:
            return sizes(works, _free())
        except ConfigError as error:
            if time.monotonic() > given_up:
                raise Stalled(f"{error}; others hold the rest of it: give the same command again later") from None
        time.sleep(0.5)


def _machines() -> list[Machine]:
    """Those that are alive, with all that they have."""
    import ray

    return [_counted(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _free() -> list[Machine]:
    """Those that are alive, with what nobody holds of them."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [_counted(free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]


def _counted(resources: Machine) -> Machine:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


def sizes(works: Sequence[Work], machines: Sequence[Machine]) -> list[Size]:
    """Copies and resources of every stage: model stages share what the others leave of each machine.

    A copy fits on a machine beside one of every other stage, so that a cluster that loses machines goes on with one.

    Args:
        works: the stages, in order.
        machines: those that are alive.

    Raises:
        ConfigError: they cannot hold one copy of each; started anyway, it would wait for ever.
    """
    gpus = sum(machine.get("GPU", 0.0) for machine in machines)
    models = [work for work in works if work.model or (work.gpus and gpus)]
    others = handing_out(works) + sum(work.cpus for work in works if work not in models)
    copies, share = _of_models(models, others, [m for m in machines if m.get("CPU")], gpus > 0)
    cpus = sum(machine.get("CPU", 0.0) for machine in machines)
    rest = cpus - others
    share = min(share, math.floor(100 * rest / (copies * max(len(models), 1)) + 1e-6) / 100)
    if rest < 0 or (models and share < LEAST_CPUS):
        needed = handing_out(works) + sum(work.cpus for work in works)
        raise ConfigError(
            f"the stages need {needed:g} CPUs at once, Ray has {cpus:g}; give it more, or --engine inline"
        )
    return [
        Size(copies, share, work.gpus if gpus else 0.0)
        if work in models
        else Size(1, work.cpus, work.gpus if gpus else 0.0)
        for work in works
    ]


def handing_out(works: Sequence[Work]) -> float:
    """CPUs of the tasks that hand out rows: as the first stage, which they are fused with unless it lives in actors."""
    return LEAST_CPUS if works[0].model else works[0].cpus


def _of_models(models: Sequence[Work], others: float, machines: Sequence[Machine], on_gpus: bool) -> tuple[int, float]:
    """(copies of every model stage, CPUs of one), as wide as the machine with the most room allows."""
    wanted = sum(work.gpus for work in models) if on_gpus else 0.0
    hosts = [machine for machine in machines if not wanted or machine.get("GPU", 0.0) >= wanted] or list(machines)
    stages = max(len(models), 1)
    if wanted:
        counts = [max(1, int(machine.get("GPU", 0.0) / wanted)) for machine in hosts]
        widths = [_room(machine, others) / (count * stages) for machine, count in zip(hosts, counts, strict=True)]
        return max(1, sum(counts)), min([MOST_CPUS, *widths])
    width = min(MOST_CPUS, max((_room(machine, others) / stages for machine in hosts), default=0.0))
    fitting = sum(int(_room(machine, others) / (width * stages) + 1e-6) for machine in hosts) if width else 0
    # Of several machines each has room for the copies of another one: those of a machine that dies start again there,
    # and what they were given is not held back until a new machine comes.
    asked = max(LEAST_CPUS, width / 2) if len(hosts) > 1 else width
    return max(1, fitting), math.floor(100 * asked + 1e-6) / 100


def _room(machine: Machine, others: float) -> float:
    """CPUs of a machine for models: what is left beside the other stages, or all of it where that is nothing."""
    cpus = machine["CPU"]
    return cpus - others if cpus - others >= LEAST_CPUS else cpus
