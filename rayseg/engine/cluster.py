"""Connect to Ray or start it, once per process; decide how many copies of each stage it runs."""

import atexit
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from rayseg.config import quiet_ray, ray_address
from rayseg.engine.work import Work
from rayseg.errors import ConfigError, RunIncomplete, Stalled
from rayseg.store import access

Machine = Mapping[str, float]
"""CPU and GPU of one machine."""
MOST_CPUS = 4.0
"""CPUs of one copy of a model that computes on CPUs; on a GPU, the most that a stage with a model requests."""
LEAST_CPUS = 0.1
GROWTH = 16
"""Times its first size that a stage on GPUs of a shared cluster may grow to."""
RELEASE_SECONDS = 2.0
"""Resources that are held for longer belong to other jobs: Ray releases those of the previous step within this time."""
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the token of the head, which `ray get-auth-token` prints there"
"""Remedy for a head that requires a token."""
_LEAVE_SECONDS = 1.5
_LEAVING = Event()  # this process ends its private Ray itself
_SHELLS: list["subprocess.Popen[bytes]"] = []
_log = logging.getLogger(__name__)


def expect_reachable(address: str | None) -> None:
    """Check that something answers at an address; Ray itself would give up after a minute and a half.

    Raises:
        ConfigError: it is an address of Ray Client, has no host and port, or nothing answers within five seconds.
    """
    if (chosen := ray_address(address)) in {"local", "auto"}:
        return
    if chosen.startswith("ray://"):
        raise ConfigError(
            f"{chosen} is an address of Ray Client, which cannot place stages; give the address of the head, "
            "HOST:6379, or submit the run with --submit"
        )
    # urlsplit takes host and port apart only behind a scheme.
    parts = urlsplit(chosen if "://" in chosen else f"ray://{chosen}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {chosen} ({error}), expected the host and port of its head, such as "
            "10.0.0.1:6379; correct --address or RAY_ADDRESS, or leave both out to start a private Ray"
        ) from None


@contextmanager
def _own_handler() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray's own handler ends it without a word, and with code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, handler)


@_own_handler()
def connect(address: str | None, *, dashboard: bool = False) -> None:
    """Connect to the Ray cluster at `address`, or start a private Ray on this machine; once per process.

    The address is `address`, else RAY_ADDRESS. Without either the process never joins the cluster of another user.

    Args:
        address: of the cluster's head.
        dashboard: whether a private Ray accepts jobs, on loopback.

    Raises:
        ConfigError: the cluster refuses the token, or does not answer.
        Stalled: a private Ray does not start because the machine is too busy.
    """
    import ray
    from ray._private import worker
    from ray._private.utils import write_ray_address
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return
    quiet_ray()
    # Whatever its log level, Ray prints on stdout that a worker died: results stand there, which programs read.
    worker._worker_logs_enabled = False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (chosen := ray_address(address)) != "local":
        # Workers need to know where the stores are; every machine has its own keys. Ray refuses a variable that the
        # job of this process, if it is one, was submitted with: workers have that one from the job.
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        inherited = (job.get("runtime_env") or {}).get("env_vars") or {}
        stores = {name: value for name, value in access().items() if name not in inherited}
        try:
            with _without_stderr():
                ray.init(address=chosen, **({"runtime_env": {"env_vars": stores}} if stores else {}), **quiet)
        except (AuthenticationError, ConnectionError) as error:
            # Ray reports a wrong token as a failed connection.
            reason = str(error).partition(". ")[0]
            raise ConfigError(
                f"the Ray cluster at {chosen} cannot be joined ({reason}); if it requires a token, {TOKEN}"
            ) from None
        return
    # The shell is started before Ray, so that the folder is removed even if Ray does not start.
    remove_afterwards(folder := tempfile.mkdtemp(prefix="rs-"))
    # The next step uses idle processes again; new ones take seconds to import what the stages need.
    quiet["_system_config"] = {"idle_worker_killing_time_threshold_ms": 30_000}
    with _Start(), _without_stderr():
        ray.init(address="local", include_dashboard=dashboard, object_store_memory=2 << 30, _temp_dir=folder, **quiet)
    # As `ray start` does: else a job's RAY_ADDRESS is that of any Ray on this machine.
    write_ray_address(ray.get_runtime_context().gcs_address, folder)
    atexit.register(ray.shutdown)
    Thread(target=_end_with_ray, daemon=True).start()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what this process writes to stderr: Ray's C++ part reports its log level there, whatever the level."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _end_with_ray() -> None:
    """End this process if a process of its private Ray dies: the driver would hang, or end without a word.

    Raylet and agent die together.
    """
    import ray

    # Ray offers no public way to the processes that it started.
    started = ray._private.worker._global_node.all_processes
    servers = {name: started[name][0].process for name in ("gcs_server", "raylet") if name in started}
    while ray.is_initialized():  # false before `ray.shutdown` ends the servers
        time.sleep(0.2)
        dead = [name for name, process in servers.items() if process.poll() is not None]
        if dead and ray.is_initialized() and not _LEAVING.is_set():
            sys.stderr.write(
                f"rayseg: {' and '.join(dead)} of this command's private Ray died (killed, or out of memory); finished "
                "tiles are kept, run the same command to resume\n"
            )
            sys.stderr.flush()
            os._exit(RunIncomplete.exit_code)  # Ray's threads do not let Python end


def leave() -> NoReturn:
    """End this process and its private Ray, all at once.

    `ray.shutdown` ends Ray's processes one after the other, for up to 9 s on a busy machine.
    """
    import ray

    _LEAVING.set()
    started = ray._private.worker._global_node.all_processes.values()
    processes = [info.process for infos in started for info in infos]
    for process in processes:
        process.terminate()
    until = time.monotonic() + _LEAVE_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):  # it ends with this process
            process.wait(max(0.0, until - time.monotonic()))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


class _Start:
    """A context in which a private Ray starts: its agents listen at any free port, and a timeout becomes `Stalled`.

    With Ray's default port, which is the same for every cluster, only the first cluster of a machine accepts jobs;
    `ray start` has an option for it, `ray.init` has none.
    """

    def __enter__(self) -> None:
        from ray._private import parameter

        self.parameter, self.own = parameter, parameter.RayParams
        parameter.RayParams = partial(self.own, dashboard_agent_listen_port=0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.parameter.RayParams = self.own
        if kind is Exception and "timed out during startup" in str(error):  # Ray has no error type for it
            raise Stalled(
                "Ray did not start within 30 s because other processes keep this machine busy; run the same command "
                "again later, or use --engine inline"
            ) from None


def remove_afterwards(folder: str) -> None:
    """Start a shell that removes the folder when this process ends, however it ends: its end of the pipe closes then.

    Ray's own processes outlive the driver for a while, and some write into the folder only then. The shell waits for
    all whose command lines name the folder or whose open logs are in it.
    """
    named = 'printf %s "$FOLDER" | grep -qsFf - /proc/[0-9]*/cmdline'
    logs = 'ls -l /proc/[0-9]*/fd | grep -qF "$FOLDER"'
    script = f'exec >/dev/null 2>&1; read -r _; while {named} || {logs}; do sleep 1; done; rm -rf "$FOLDER"'
    environment = os.environ | {"FOLDER": folder}  # not an argument: the shell would wait for itself
    shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True, env=environment)
    _SHELLS.append(shell)


@dataclass(frozen=True)
class Size:
    """Resources of a stage: `copies`, each with `cpus` and `gpus`.

    `most` are the copies that it may grow to when machines join, or other jobs release theirs; as a rule `copies`.
    """

    copies: int
    cpus: float
    gpus: float
    most: int


def sizes_now(works: Sequence[Work], *, shared: bool, patience: float) -> list[Size]:
    """Copies and resources of every stage on the Ray cluster that this process is connected to.

    On a shared cluster the stages get the resources that are free. As long as these are too few, the function
    requests what they need, in addition to what is held, from the autoscaler, and waits: `patience` seconds if the
    whole cluster is too small, four times as long if other jobs hold what is needed.

    Args:
        works: the stages, in order.
        shared: whether others may use the cluster.
        patience: seconds.

    Raises:
        ConfigError: a private Ray cannot hold one copy of each stage.
        Stalled: the cluster is too small and did not grow, or other jobs did not release its resources.
    """
    if not shared:
        return sizes(works, _machines())
    from ray.autoscaler.sdk import request_resources

    began, waiting = time.monotonic(), False
    try:
        while True:
            whole, free = _machines(), _machines(free=True)
            gpus = any(machine["GPU"] for machine in whole)
            waited = time.monotonic() - began
            # Resources of the previous step may still be held for a moment, so they are not counted yet.
            if free == whole or waited > RELEASE_SECONDS:
                try:
                    # GPUs bound the copies, so each new GPU takes one. On CPUs a larger pool would fill the space that
                    # `_of_models` keeps for the copies of a machine that dies.
                    found = sizes(works, free, gpus=gpus)
                    return [replace(size, most=size.copies * GROWTH) if size.gpus else size for size in found]
                except ConfigError as error:
                    fits = []
                    with suppress(ConfigError):
                        fits = sizes(works, whole, gpus=gpus)
                    if waited > patience * (4 if fits else 1):
                        why = "other jobs still hold the cluster's resources" if fits else "the cluster did not grow"
                        raise Stalled(f"{error}; {why}; run the same command again when resources are free") from None
                    if not waiting:
                        _log.warning("waiting for free resources on the cluster: %s", error)
                    request_resources(bundles=_bundles(works, whole, free, gpus=gpus))
                    waiting = True
            time.sleep(1.0 if waiting else 0.1)
    finally:
        if waiting:
            request_resources(bundles=[])  # ends the request


def _machines(*, free: bool = False) -> list[Machine]:
    """CPUs and GPUs of every machine that is alive: all that it has, or with `free` what no job holds."""
    import ray
    from ray._private.state import available_resources_per_node

    # A machine that has just joined may not be among the free ones yet.
    left = available_resources_per_node() if free else {}
    machines = [left.get(node["NodeID"], {}) if free else node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [{name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")} for resources in machines]


def _bundles(
    works: Sequence[Work], whole: Sequence[Machine], free: Sequence[Machine], *, gpus: bool
) -> list[dict[str, float]]:
    """The request to an autoscaler, which counts all that a cluster has: what the stages need, and what jobs hold."""
    needed = [{"CPU": max(work.cpus, LEAST_CPUS), "GPU": work.gpus if gpus else 0.0} for work in works]
    # A machine that came or left between the two lists is counted with the next request.
    held = [{name: all_[name] - left[name] for name in all_} for all_, left in zip(whole, free, strict=False)]
    requests = ({name: amount for name, amount in bundle.items() if amount > 0} for bundle in needed + held)
    return [bundle for bundle in requests if bundle]


def sizes(works: Sequence[Work], machines: Sequence[Machine], *, gpus: bool | None = None) -> list[Size]:
    """Copies and resources of every stage: model stages share what the other stages leave of each machine.

    A copy fits on a machine together with one copy of every other stage, so that a cluster that loses machines
    continues with one.

    Args:
        works: the stages, in order.
        machines: those that are alive, with their free resources.
        gpus: whether stages that request GPUs get them; None: if a machine has one.

    Raises:
        ConfigError: the machines cannot hold one copy of each stage; Ray would wait without end.
    """
    on_gpus = any(machine.get("GPU") for machine in machines) if gpus is None else gpus
    models = [work for work in works if work.model or (work.gpus and on_gpus)]
    small = [work for work in works if work not in models]
    others = source_cpus(works[0]) + sum(work.cpus for work in small)
    wanted = sum(work.gpus for work in models) if on_gpus else 0.0
    copies, share = _of_models(models, others, [m for m in machines if m.get("CPU")], wanted)
    cpus = sum(machine.get("CPU", 0.0) for machine in machines)
    rest = cpus - others
    # Rounded down to hundredths, with 1e-6 against 0.29999: the sum of the shares may not exceed what is there.
    share = min(share, math.floor(100 * rest / (max(copies, 1) * max(len(models), 1)) + 1e-6) / 100)
    # A stage cannot be spread over machines: one machine must hold a whole copy.
    widest = max((machine.get("CPU", 0.0) for machine in machines), default=0.0)
    if rest < 0 or any(work.cpus > widest for work in small) or (models and (share < LEAST_CPUS or not copies)):
        # One copy of everything, the least that a run needs.
        needed = others + sum(work.cpus for work in models)
        and_gpus = f" and {wanted:g} GPUs of one machine" if wanted else ""
        raise ConfigError(
            f"the stages need {needed:g} CPUs{and_gpus} at once, Ray has {cpus:g} free CPUs; give it more, or use "
            "--engine inline"
        )
    return [
        Size(copies, share, work.gpus if on_gpus else 0.0, copies) if work in models else Size(1, work.cpus, 0.0, 1)
        for work in works
    ]


def source_cpus(first: Work) -> float:
    """CPUs of the tasks that create the rows: Ray fuses them with the first stage unless that runs in actors."""
    return LEAST_CPUS if first.model else first.cpus


def _of_models(models: Sequence[Work], others: float, machines: Sequence[Machine], gpus: float) -> tuple[int, float]:
    """(copies of every model stage, CPUs of one): without GPUs as wide as the machine with the most free CPUs allows.

    Args:
        models: the stages.
        others: CPUs that the other stages need.
        machines: those with CPUs.
        gpus: GPUs that one copy of all models needs; 0 without.
    """
    stages = max(len(models), 1)
    # CPUs of each machine for models: the rest after the other stages, or all of a machine that they fill.
    room = [m["CPU"] - others if m["CPU"] - others >= LEAST_CPUS else m["CPU"] for m in machines]
    if gpus:
        most = [int(cpus / (stages * LEAST_CPUS) + 1e-6) for cpus in room]
        counts = [min(int(m.get("GPU", 0.0) / gpus + 1e-6), n) for m, n in zip(machines, most, strict=True)]
        requested = max(LEAST_CPUS, *(work.cpus for work in models))
        shares = [cpus / (count * stages) for cpus, count in zip(room, counts, strict=True) if count]
        return sum(counts), min([requested, *shares])
    width = min(MOST_CPUS, max(room, default=0.0) / stages)
    fitting = sum(int(cpus / (width * stages) + 1e-6) for cpus in room) if width else 0
    # Each of several machines keeps space for the copies of another one: those of a machine that dies start again
    # there, and their rows do not wait for a new machine.
    requested = max(LEAST_CPUS, width / 2) if len(machines) > 1 else width
    return max(1, fitting), math.floor(100 * requested + 1e-6) / 100
