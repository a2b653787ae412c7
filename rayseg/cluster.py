"""Ray joined, or started: once per process, quietly, and gone with it."""

import atexit
import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from rayseg.config import quiet_ray, ray_address
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


def free() -> list[Machine]:
    """Those that are alive, with what nobody holds of them."""
    import ray
    from ray._private.state import available_resources_per_node

    left = available_resources_per_node()
    return [_counted(left.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]


def _counted(resources: Machine) -> Machine:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}
