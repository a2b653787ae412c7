"""Request middleware: request ids, access control, limits, security headers, metrics and the access log."""

import asyncio
import contextvars
import hmac
import json
import logging
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseg.serve import problems
from rayseg.serve.problems import Problem
from rayseg.serve.settings import ServeConfig

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_PUBLIC = re.compile(r"/(?:$|healthz$|docs$|page/|runs/[^/]+$)")
_SIZE = re.compile(r"[0-9]{1,18}")
_ID = re.compile(r"[!-~]{1,128}")
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_log = logging.getLogger("rayseg.serve")


class Metrics:
    """Prometheus metrics of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options = {"registry": self.registry, "namespace": "rayseg"}
        self.requests = Counter("requests", "Requests answered.", ["route", "method", "status"], **options)  # type: ignore[arg-type]
        self.seconds = Histogram("request_seconds", "Time to answer.", ["route"], buckets=_BUCKETS, **options)  # type: ignore[arg-type]
        self.busy = Gauge("requests_in_progress", "Requests in progress.", **options)  # type: ignore[arg-type]
        self.pixels = Counter("pixels", "Pixels predicted.", ["model"], **options)  # type: ignore[arg-type]


@dataclass
class _Exchange:
    """One request and the facts of its response."""

    scope: Scope
    id: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    received: int = 0
    sent: int = 0


class RequestMiddleware:
    """ASGI middleware around an application.

    Args:
        app: the application.
        config: limits and hosts.
        token: that requests must carry; "" for none.
        metrics: counts the requests.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, *, token: str, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self._token = token.encode()
        self.draining, self.busy = False, 0
        self.names_requests = True  # False under Ray Serve, whose proxy adds the id to the response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A client's own id is kept even if invalid: Ray Serve's proxy returns it as it came.
        ids = (value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id")
        exchange = _Exchange(scope, next(ids, uuid.uuid4().hex))
        REQUEST_ID.set(exchange.id)
        limited = scope["path"].startswith("/v1/")  # reads of runs and map tiles included
        self.busy += limited
        self.metrics.busy.set(self.busy)
        try:
            await self._answer(exchange, receive, send, limited=limited)
        finally:
            self.busy -= limited
            self.metrics.busy.set(self.busy)
            self._record(exchange)

    async def _answer(self, exchange: _Exchange, receive: Receive, send: Send, *, limited: bool) -> None:
        async def counted() -> Message:
            message = await receive()
            exchange.received += len(message.get("body", b""))
            if exchange.received > self.config.max_bytes:
                raise self._too_many_bytes()
            return message

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                added = HEADERS | {"cache-control": "no-store"}
                added |= {"x-request-id": exchange.id} if self.names_requests else {}
                new = [(name.encode(), value.encode("latin-1")) for name, value in added.items()]
                headers = [*message["headers"], *(pair for pair in new if pair[0] not in present)]
                message = {**message, "headers": headers}
            exchange.sent += len(message.get("body", b""))
            await send(message)

        async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                self._admit(scope, limited=limited)
            except Problem as error:
                refusal = problems.response(error.status, error.detail, request_id=exchange.id, headers=error.headers)
                await refusal(scope, receive, send)
            else:
                await self.app(scope, receive, send)

        # Outermost, so that errors of the admission are answered like those of the application.
        await ServerErrorMiddleware(admitted, handler=internal_error)(exchange.scope, counted, answered)

    def _admit(self, scope: Scope, *, limited: bool) -> None:
        """Refuse by headers alone: host, origin, id, token, size, load; in that order."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # 1. other sites: DNS rebinding shows in Host, cross-site requests in Origin
        host, origin = headers.get("host", ""), headers.get("origin", "")
        name = _split("Host", f"//{host}").hostname or ""
        if self.config.hosts and name not in self.config.hosts:
            raise Problem(421, f"Host is {name or 'missing'}, expected {self.config.hosts[0]}; use that name")
        if origin and _split("Origin", origin).netloc != host:
            raise Problem(403, "the request comes from a page of another site; use this server's own page")
        # 2. the request's id, which goes into the log
        if not _ID.fullmatch(REQUEST_ID.get()):
            raise Problem(
                400, "X-Request-ID is invalid, expected 1 to 128 printable ASCII characters without spaces; correct it"
            )
        # 3. the token
        if self._token and not _PUBLIC.match(scope["path"]):
            kind, _, token = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(token.strip().encode(), self._token)
            if kind.lower() != "bearer" or not same:
                state = "a wrong token" if "authorization" in headers else "no token"
                detail = f"the request has {state}; send the header Authorization: Bearer TOKEN"
                raise Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="rayseg"'})
        # 4. size and load
        size = headers.get("content-length", "0")
        if not _SIZE.fullmatch(size):
            raise Problem(400, f"Content-Length is {size[:40]!r}, expected a number of bytes")
        if int(size) > self.config.max_bytes:
            raise self._too_many_bytes()
        if limited and self.draining:
            raise problems.busy("the server is shutting down; retry, another server will answer", seconds=5)
        if limited and self.busy > self.config.queue:
            raise problems.busy(f"{self.config.queue} requests are already in progress; retry in a moment")

    def _too_many_bytes(self) -> Problem:
        detail = f"the request has more than {self.config.max_bytes:,} bytes; send a smaller image"
        return Problem(413, f"{detail}, or start the server with a higher --max-bytes", headers={"Connection": "close"})

    def _record(self, exchange: _Exchange) -> None:
        """Count and log a request."""
        seconds = time.perf_counter() - exchange.began
        status = exchange.status or 499  # nginx's code for a client that disconnected
        scope = exchange.scope
        route = getattr(scope.get("route"), "path", "unknown")  # the template, so that labels stay few
        self.metrics.requests.labels(route, scope["method"], status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        facts = {"method": scope["method"], "path": scope["path"][:200], "status": status}
        facts |= {"ms": round(seconds * 1000, 1), "received": exchange.received, "sent": exchange.sent}
        _log.info("request", extra={"facts": facts | {"client": (scope.get("client") or ("",))[0]}})

    async def drain(self) -> None:
        """Refuse new requests, and wait until the accepted ones are answered."""
        self.draining = True
        while self.busy:
            await asyncio.sleep(0.05)


def _split(header: str, address: str) -> SplitResult:
    """The parts of a header's address.

    Raises:
        Problem: 400, it is not an address.
    """
    try:
        return urlsplit(address)
    except ValueError:
        raise Problem(400, f"{header} is {address[:60]!r}, expected the address of a server") from None


async def internal_error(request: Request, error: Exception) -> Any:  # noqa: ANN401 - a response
    """Log an unexpected error with its traceback; the client gets one sentence."""
    _log.error("internal error", exc_info=error, extra={"facts": {"path": request.scope["path"][:200]}})
    detail = "the server failed and logged the cause under this request's id; send the id to the administrator"
    return problems.response(500, detail, request_id=REQUEST_ID.get())


class JsonLines(logging.Formatter):
    """Format a record as one line of JSON with the id of its request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "request_id": REQUEST_ID.get(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_log(path: str | None) -> None:
    """Write the log as lines of JSON to a file, or to stderr."""
    if not any(isinstance(handler.formatter, JsonLines) for handler in _log.handlers):
        # sys.__stderr__, since Ray Serve replaces sys.stderr with its own logger.
        lines = logging.FileHandler(path) if path else logging.StreamHandler(sys.__stderr__)
        lines.setFormatter(JsonLines())
        _log.addHandler(lines)
    _log.setLevel(logging.INFO)
    _log.propagate = False
