"""The commands `rayseg serve` and `rayseg view`: start a server, print its address, shut it down gracefully."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress

from rayseg.config import load_values, ray_address
from rayseg.engine import cluster
from rayseg.engine.submit import is_loopback
from rayseg.errors import ConfigError, RaysegError
from rayseg.serve import haproxy
from rayseg.serve.models import ChildBackend, ModelIndex
from rayseg.serve.runs import runs_below
from rayseg.serve.settings import ServeConfig, require_room, require_token
from rayseg.store import absolute, is_local, upath

_FLUSH_SECONDS = 0.5  # in which the proxy sends the last responses to their clients
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RAY = {
    "RAY_worker_niceness": "0",  # by default Ray's workers have a lower priority than other processes
    "RAY_max_direct_call_object_size": str(1 << 20),  # bytes: pixels of a patch travel in the message itself
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayseg.serve.proxy:middlewares",
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
        RaysegError: Ray Serve does not start within a minute.
    """
    # 1. everything that can be wrong, before Ray starts
    require_token(host, config.token_file)
    config.token()
    index = ModelIndex(config.models)
    require_room(config, len(index.entries))
    lock = reserve(host, port)
    # 2. Ray
    local = ray_address(address) == "local"
    settings = {**_RAY}
    if local:  # HAProxy of a cluster is configured on its nodes
        cluster.remove_afterwards(folder := tempfile.mkdtemp(prefix="rs-"))
        settings |= haproxy.settings(folder)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    say("starting Ray" if local else f"connecting to Ray at {ray_address(address)}")
    cluster.connect(address, dashboard=config.jobs is not None)

    import ray
    from ray import serve
    from ray._private.worker import get_dashboard_url  # Ray has no public way to get it after connecting

    if config.jobs and not config.jobs_address:
        config = config.model_copy(update={"jobs_address": f"http://{get_dashboard_url()}"})

    from rayseg.serve.deployment import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = {"host": host, "port": port, "request_timeout_s": config.timeout_seconds + 60}
    try:
        serve.start(http_options=http, logging_config={"log_level": "WARNING", "enable_access_log": False})
    except TimeoutError:  # of Ray Serve's own minute
        raise RaysegError(
            "Ray Serve's proxy is not ready after 60 s, expected seconds; give the machine less to do and run the same "
            "command again, or set RAY_SERVE_ENABLE_HA_PROXY=0"
        ) from None
    config = with_hosts(config, host)
    names = list(index.entries)
    listed = f"{': ' * bool(names)}{', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    counted = f"{len(names)} model{'s' * (len(names) != 1)}{listed}"
    say(f"loading {counted}" if config.preload and names else "starting the server's processes")
    api = serve.run(application(config), name=NAME, route_prefix="/")
    # 3. wait for a signal
    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):  # after Ray's start, which sets its own handlers
        signal.signal(signal_number, lambda *_: stop.set())
    shown_host = f"[{host}]" if ":" in host else host
    say(f"http://{shown_host}:{port}/ with {counted}; stop with Ctrl-C")
    stop.wait()
    # 4. drain
    say("shutting down: accepted requests are answered first")
    api.broadcast("drain").results()
    time.sleep(_FLUSH_SECONDS)
    if not local:
        serve.shutdown()
    elif config.jobs:
        ray.shutdown()  # gives the jobs' processes a second to end by themselves
    else:
        cluster.leave()  # Serve's own shutdown keeps clients waiting for half a minute
    lock.close()


def reserve(host: str, port: int) -> socket.socket:
    """Reserve a port until the returned socket is closed, or this process ends.

    Ray Serve binds the port seconds later and with SO_REUSEPORT, so that two servers would share it. An abstract Unix
    socket (Linux) is a lock without a file.

    Raises:
        ConfigError: the port is taken.
    """
    lock = socket.socket(socket.AF_UNIX)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if sys.platform == "linux":
            lock.bind(f"\0rayseg-serve-{port}")
        with socket.socket(family) as probe:
            # As servers do: connections of a server that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        lock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return lock


def view(run: str, *, port: int, browser: bool, basemap: str, say: Callable[[str], None]) -> None:
    """Show a run from this process alone, without Ray and models, until SIGTERM or SIGINT.

    Args:
        run: folder or URL.
        port: port to listen on.
        browser: open a browser.
        basemap: URL template of map tiles under the imagery; "" for none.
        say: receives the page's address.

    Raises:
        ConfigError: there is no run, or the port is taken.
    """
    import uvicorn

    from rayseg.engine.run import read
    from rayseg.serve.app import api
    from rayseg.serve.middleware import configure_log

    read(run)
    # Next to the run, whose own files stay as they are.
    clicks = str(upath(absolute(run)).parent) if is_local(run) else None
    given = {"runs": (run,), "clicks": clicks, "basemap": basemap, "paths": True}
    config = with_hosts(load_values(ServeConfig, given), "127.0.0.1")
    [root] = config.runs
    name = next(name for name, prefix in runs_below([root]).items() if prefix.rstrip("/") == root.rstrip("/"))
    # The port is reserved before its address is printed.
    lock = reserve("127.0.0.1", port)
    address = f"http://127.0.0.1:{port}/runs/{name}"
    say(f"{address}; stop with Ctrl-C")
    if browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    configure_log(config.log_file, level=logging.WARNING)  # not a line per map tile
    app = api(config, ChildBackend(), ModelIndex())
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal that ended it again
        uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=30)
    lock.close()
