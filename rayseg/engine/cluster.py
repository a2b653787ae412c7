"""Connect to Ray or start it, once per process; how many copies of each stage it holds."""

import atexit
import logging
import math
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from rayseg.config import quiet_ray, ray_address
from rayseg.engine.work import Work
from rayseg.errors import ConfigError, Stalled
from rayseg.store import access

Machine = Mapping[str, float]
"""What one machine has: CPU, GPU."""
_SHELLS: list["subprocess.Popen[bytes]"] = []


def expect_reachable(address: str | None) -> None:
    """Refuse an address at which nothing answers, as Ray itself would after a minute and a half.

    Raises:
        ConfigError: it is Ray Client's, there is no host and port in it, or nobody answers within five seconds.
    """
    if (chosen := ray_address(address)) in {"local", "auto"}:
        return
    if chosen.startswith("ray://"):
        raise ConfigError(
            f"{chosen} is an address of Ray Client, which cannot place stages; give the head's own, HOST:6379, or "
            "send the run there with --submit"
        )
    parts = urlsplit(chosen if "://" in chosen else f"ray://{chosen}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {chosen} ({error}), expected the host and port of its head, such as "
            "10.0.0.1:6379; correct --address or RAY_ADDRESS, or leave both out for a private one"
        ) from None


def connect(address: str | None, *, dashboard: bool = False) -> None:
    """Join the Ray cluster at `address`, or start a private one on this machine; once per process.

    The address is `address`, else RAY_ADDRESS; without either a stranger's cluster is never joined. With `dashboard`
    a private one takes jobs, on loopback.

    Raises:
        Stalled: a private one does not start on a machine that is too busy.
    """
    import ray

    if ray.is_initialized():
        return
    quiet_ray()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # blocks lost with a process: their rows come again
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (chosen := ray_address(address)) != "local":
        known = {"runtime_env": {"env_vars": access()}} if access() else {}  # where stores are; keys each node has
        ray.init(address=chosen, **known, **quiet)
        return
    _remove_afterwards(folder := tempfile.mkdtemp(prefix="rs-"))
    # An idle process is soon of use again, and a new one takes seconds to import what the stages need.
    quiet["_system_config"] = {"idle_worker_killing_time_threshold_ms": 30_000}
    try:
        with _agents_anywhere():
            ray.init(
                address="local", include_dashboard=dashboard, object_store_memory=2 << 30, _temp_dir=folder, **quiet
            )
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type for it
            raise
        raise Stalled(
            "Ray did not start within the 30 s it gives itself: other work keeps this machine busy; give the same "
            "command again later, or --engine inline"
        ) from None
    atexit.register(ray.shutdown)


@contextmanager
def _agents_anywhere() -> Iterator[None]:
    """Let agents of a Ray that is started meanwhile listen at any free port.

    At Ray's own, the same for every cluster, only the first cluster of a machine takes jobs; `ray start` has an option
    for it, `ray.init` has none.
    """
    from ray._private import parameter

    own = parameter.RayParams
    parameter.RayParams = partial(own, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = own


def _remove_afterwards(folder: str) -> None:
    """Let a shell remove the folder when this process is gone, however it ends: its end of the pipe closes then.

    Ray's own processes live on for a while, and some begin to write only then. Their command lines name the folder, or,
    once they call themselves something else, their open logs lie in it.
    """
    named = 'printf %s "$FOLDER" | grep -qsFf - /proc/[0-9]*/cmdline'
    logs = 'ls -l /proc/[0-9]*/fd | grep -qF "$FOLDER"'
    script = f'exec >/dev/null 2>&1; read -r _; while {named} || {logs}; do sleep 1; done; rm -rf "$FOLDER"'
    told = os.environ | {"FOLDER": folder}  # no argument: the shell would wait for itself
    shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True, env=told)
    _SHELLS.append(shell)


def connect_training(address: str | None, *, workers: int) -> bool:
    """Join Ray as `connect` does if there are workers to train on; return whether training has GPUs.

    They are the cluster's for workers, else this machine's.
    """
    if not workers:
        import torch  # as slow as Ray

        return torch.cuda.is_available()
    import ray

    connect(address)
    return bool(ray.cluster_resources().get("GPU"))


def machines() -> list[Machine]:
    """Those that are alive, with all that they have."""
    import ray

    return [_counted(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def available() -> list[Machine]:
    """Those that are alive, with what nobody holds of them."""
    import ray
    from ray._private.state import available_resources_per_node

    left = available_resources_per_node()
    return [_counted(left.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]


def _counted(resources: Machine) -> Machine:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


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
        return sizes(works, machines())
    began, told = time.monotonic(), False
    try:
        while True:
            whole, free = machines(), available()
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
