"""What `rayseg serve` and `rayseg view` do: start a server, say where it is, end it in good order."""

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
from rayseg.serve.models import Here, Shelf
from rayseg.serve.runs import found
from rayseg.serve.settings import ServeConfig, expect_closed

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RAY = {
    "RAY_worker_niceness": "0",  # by default Ray's workers give way to everything else
    "RAY_max_direct_call_object_size": str(1 << 20),  # pixels of a patch go with the message, not beside it
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def named(config: ServeConfig, host: str) -> ServeConfig:
    """The configuration with the names that a server on loopback is called by."""
    closed = not config.hosts and is_loopback(host)
    return config.model_copy(update={"hosts": tuple(dict.fromkeys([host, *LOOPBACK]))}) if closed else config


def serve_models(config: ServeConfig, *, host: str, port: int, address: str | None, say: Callable[[str], None]) -> None:
    """Serve on Ray until a signal comes; then finish what was accepted.

    Args:
        config: what is served.
        host: to listen on.
        port: to listen on.
        address: of a Ray cluster; None starts a private one.
        say: tells where the server is, once it answers.

    Raises:
        ConfigError: the host can be reached by others and there is no token, or the port is taken.
        ModelError: a prefix of models is not there.
    """
    expect_closed(host, config.token_file)
    config.token()
    shelf = Shelf.of(config.models)
    _expect_free(host, port)
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)
    cluster.connect(address, dashboard=config.jobs is not None)

    from ray import serve
    from ray._private.worker import get_dashboard_url  # Ray says it in no other way after it was joined

    if config.jobs and not config.jobs_address:
        config = config.model_copy(update={"jobs_address": f"http://{get_dashboard_url()}"})

    from rayseg.serve.deployment import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = {"host": host, "port": port, "request_timeout_s": config.timeout_seconds + 60}
    serve.start(http_options=http, logging_config={"log_level": "WARNING", "enable_access_log": False})
    app = application(named(config, host))
    serve.run(app, name=NAME, route_prefix="/")
    stop = threading.Event()
    for what in (signal.SIGTERM, signal.SIGINT):  # after Ray's start, which puts handlers of its own
        signal.signal(what, lambda *_: stop.set())
    say(f"http://{_shown(host)}:{port}/ with {_counted(shelf)}; stop with Ctrl-C")
    stop.wait()
    say("stopping: what was accepted is finished first")
    _drain(config, host)
    serve.shutdown()


def _drain(config: ServeConfig, host: str) -> None:
    """Have every replica of the API take nothing more, and wait until they are idle."""
    from ray import serve

    from rayseg.serve.deployment import NAME, application

    serve.run(application(named(config, host), draining=True), name=NAME, route_prefix="/")


def _counted(shelf: Shelf) -> str:
    names = list(shelf.entries)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} model{'s' * (len(names) != 1)}{': ' * bool(names)}{shown}"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _expect_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror}; choose another --port") from None


def view(run: str, *, port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Show a run from this process alone, without Ray and models, until a signal comes.

    Raises:
        ConfigError: there is no run, or the port is taken.
    """
    import uvicorn

    from rayseg.engine.run import read
    from rayseg.serve.app import api
    from rayseg.serve.middleware import keep_log

    read(run)
    config = named(ServeConfig(runs=(run,)), "127.0.0.1")
    name = next(name for name, root in found([*config.runs]).items() if root.rstrip("/") == config.runs[0].rstrip("/"))
    _expect_free("127.0.0.1", port)
    address = f"http://127.0.0.1:{port}/runs/{name}"
    say(f"{address}; stop with Ctrl-C")
    if browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    keep_log(config.log_file)
    app = api(config, Here(Shelf({})), Shelf({}))
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=30)
