"""The commands `rayseg serve` and `rayseg view`: start a server, print its address, shut it down gracefully."""

import logging
import os
import signal
import socket
import threading
import webbrowser
from collections.abc import Callable

from rayseg.engine import cluster
from rayseg.engine.submit import is_loopback
from rayseg.errors import ConfigError
from rayseg.serve.models import LocalBackend, ModelIndex
from rayseg.serve.runs import runs_below
from rayseg.serve.settings import ServeConfig, require_token

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RAY = {
    "RAY_worker_niceness": "0",  # by default Ray's workers have a lower priority than other processes
    "RAY_max_direct_call_object_size": str(1 << 20),  # bytes: pixels of a patch travel in the message itself
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def with_hosts(config: ServeConfig, host: str) -> ServeConfig:
    """The configuration with the Host headers that a server on loopback accepts, unless it sets its own."""
    if config.hosts or not is_loopback(host):
        return config
    return config.model_copy(update={"hosts": tuple(dict.fromkeys([host, *LOOPBACK]))})


def serve_models(config: ServeConfig, *, host: str, port: int, address: str | None, say: Callable[[str], None]) -> None:
    """Serve on Ray until SIGTERM or SIGINT; then answer the accepted requests.

    Args:
        config: what is served.
        host: address to listen on.
        port: port to listen on.
        address: of a Ray cluster; None starts a private one.
        say: receives the server's address once it answers.

    Raises:
        ConfigError: the host is reachable from other machines and no token is set, or the port is taken.
        ModelError: a prefix of models does not exist.
    """
    # 1. everything that can be wrong, before Ray starts
    require_token(host, config.token_file)
    config.token()
    index = ModelIndex.of(config.models)
    _expect_free(host, port)
    # 2. Ray
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)
    cluster.connect(address, dashboard=config.jobs is not None)

    from ray import serve
    from ray._private.worker import get_dashboard_url  # Ray has no public way to get it after connecting

    if config.jobs and not config.jobs_address:
        config = config.model_copy(update={"jobs_address": f"http://{get_dashboard_url()}"})

    from rayseg.serve.deployment import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = {"host": host, "port": port, "request_timeout_s": config.timeout_seconds + 60}
    serve.start(http_options=http, logging_config={"log_level": "WARNING", "enable_access_log": False})
    config = with_hosts(config, host)
    serve.run(application(config), name=NAME, route_prefix="/")
    # 3. wait for a signal
    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):  # after Ray's start, which sets its own handlers
        signal.signal(signal_number, lambda *_: stop.set())
    names = list(index.entries)
    listed = f"{': ' * bool(names)}{', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    shown_host = f"[{host}]" if ":" in host else host
    say(f"http://{shown_host}:{port}/ with {len(names)} model{'s' * (len(names) != 1)}{listed}; stop with Ctrl-C")
    stop.wait()
    # 4. drain
    say("shutting down: accepted requests are answered first")
    serve.run(application(config, draining=True), name=NAME, route_prefix="/")
    serve.shutdown()


def _expect_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None


def view(run: str, *, port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Show a run from this process alone, without Ray and models, until SIGTERM or SIGINT.

    Raises:
        ConfigError: there is no run, or the port is taken.
    """
    import uvicorn

    from rayseg.engine.run import read
    from rayseg.serve.app import api
    from rayseg.serve.middleware import configure_log

    read(run)
    config = with_hosts(ServeConfig(runs=(run,)), "127.0.0.1")
    [root] = config.runs
    name = next(name for name, prefix in runs_below([root]).items() if prefix.rstrip("/") == root.rstrip("/"))
    _expect_free("127.0.0.1", port)
    address = f"http://127.0.0.1:{port}/runs/{name}"
    say(f"{address}; stop with Ctrl-C")
    if browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    configure_log(config.log_file)
    no_models = ModelIndex({})
    app = api(config, LocalBackend(no_models), no_models)
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=30)
