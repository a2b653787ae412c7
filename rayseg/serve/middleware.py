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
from collections import Counter as Counts
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseg.serve import problems
from rayseg.serve.problems import Problem
from rayseg.serve.settings import ServeConfig
from rayseg.serve.web import RateLimit, cors

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy of all answers that have none of their own."""
HEADERS = {
    "content-security-policy": POLICY,
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
GRACE_SECONDS = 10.0
"""Before the minimum rate of an upload applies."""
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
    lane: str
    origin: str = ""
    preflight: bool = False  # a browser asks whether a page of another site may send a request
    began: float = field(default_factory=time.perf_counter)
    complete: bool = False  # the body has arrived
    running: bool = False  # it occupies a slot of its lane
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
        self.draining, self.bytes = False, 0
        self.busy: Counts[str] = Counts()  # running requests by lane
        self._rate = RateLimit(config.requests_per_minute)
        self.names_requests = True  # False under Ray Serve, whose proxy adds the id to the response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A client's own id is kept even if invalid: Ray Serve's proxy returns it unchanged.
        ids = (value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        exchange = _Exchange(scope, next(ids, uuid.uuid4().hex), _lane(scope), headers.get(b"origin", ""))
        asked = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        exchange.preflight = asked and bool(cors(exchange.origin, self.config.cors_origins))
        REQUEST_ID.set(exchange.id)
        try:
            await self._answer(exchange, receive, send)
        finally:
            self.bytes -= exchange.received
            self.busy[exchange.lane] -= exchange.running
            self.metrics.busy.set(self.busy.total())
            self._record(exchange)

    async def _answer(self, exchange: _Exchange, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            if exchange.complete:
                return await receive()  # waits for the client to disconnect
            message = await self._received(exchange, receive)
            exchange.complete = not message.get("more_body", False)
            if exchange.complete and message["type"] == "http.request":
                self._start(exchange)
            return message

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                added = HEADERS | {"cache-control": "no-store"}
                added |= {"x-request-id": exchange.id} if self.names_requests else {}
                added |= cors(exchange.origin, self.config.cors_origins, preflight=exchange.preflight)
                new = [(name.encode(), value.encode("latin-1")) for name, value in added.items()]
                headers = [*message["headers"], *(pair for pair in new if pair[0] not in present)]
                message = {**message, "headers": headers}
            if exchange.scope["method"] == "HEAD" and "body" in message:
                message = {**message, "body": b""}
            exchange.sent += len(message.get("body", b""))
            await send(message)

        # Outermost, so that errors of the admission are answered like those of the application.
        await ServerErrorMiddleware(partial(self._pass, exchange), handler=internal_error)(
            exchange.scope, counted, answered
        )

    async def _pass(self, exchange: _Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, if the request is admitted."""
        try:
            self._admit(exchange)
        except Problem as error:
            refusal = problems.response(error.status, error.detail, request_id=exchange.id, headers=error.headers)
            await refusal(scope, receive, send)
            return
        if exchange.preflight:
            await Response(status_code=204)(scope, receive, send)
            return
        # FastAPI has no routes for HEAD: it is a GET whose body is dropped.
        await self.app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, send)

    async def _received(self, exchange: _Exchange, receive: Receive) -> Message:
        """The next message of a body, within the limits of time, size and total memory."""
        spent = time.perf_counter() - exchange.began
        limit = min(self.config.timeout_seconds, GRACE_SECONDS + exchange.received / self.config.min_bytes_per_second)
        try:
            async with asyncio.timeout(limit - spent):
                message = await receive()
        except TimeoutError:
            raise Problem(
                408,
                f"the upload is incomplete after {limit:.3g} s with {exchange.received:,} bytes; send at least "
                f"{self.config.min_bytes_per_second:,} bytes/s and the whole within {self.config.timeout_seconds:g} s",
                headers={"Connection": "close"},
            ) from None
        size = len(message.get("body", b""))
        exchange.received += size
        self.bytes += size
        if exchange.received > self.config.max_bytes:
            raise self._too_many_bytes()
        if self.bytes > max(self.config.max_bytes_in_flight, exchange.received):  # a single upload always fits
            raise problems.busy(f"uploads of {self.config.max_bytes_in_flight:,} bytes are in progress; retry later")
        return message

    def _start(self, exchange: _Exchange) -> None:
        """Occupy a slot; only whole requests do, so that slow uploads do not block others."""
        if exchange.lane and not exchange.running:
            self._expect_slot(exchange.lane)
            exchange.running = True
            self.busy[exchange.lane] += 1
            self.metrics.busy.set(self.busy.total())

    def _expect_slot(self, lane: str) -> None:
        if self.draining:
            raise problems.busy("the server is shutting down; retry, another server will answer", seconds=5)
        if self.busy[lane] >= self.config.queue:
            raise problems.busy(f"{self.config.queue} requests for {lane} are already in progress; retry in a moment")

    def _admit(self, exchange: _Exchange) -> None:
        """Refuse by headers alone: host, origin, id, token, rate, size, load; in that order."""
        scope = exchange.scope
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # 1. other sites: DNS rebinding shows in Host, cross-site requests in Origin
        host, origin = headers.get("host", ""), headers.get("origin", "")
        name = _split("Host", f"//{host}").hostname or ""
        if self.config.hosts and name not in self.config.hosts:
            raise Problem(421, f"Host is {name or 'missing'}, expected {self.config.hosts[0]}; use that name")
        if origin and _split("Origin", origin).netloc != host and not cors(origin, self.config.cors_origins):
            raise Problem(403, "the request comes from a page of another site; use this server's own page")
        # 2. the request's id, which goes into the log
        if not _ID.fullmatch(REQUEST_ID.get()):
            raise Problem(
                400, "X-Request-ID is invalid, expected 1 to 128 printable ASCII characters without spaces; correct it"
            )
        # 3. the token
        if self._token and not _PUBLIC.match(scope["path"]) and not exchange.preflight:
            self._expect_token(headers)
        # 4. rate, size and load
        if exchange.lane and not exchange.preflight:
            self._rate.expect((scope.get("client") or ("",))[0])
        size = headers.get("content-length", "0")
        if not _SIZE.fullmatch(size):
            raise Problem(400, f"Content-Length is {size[:40]!r}, expected a number of bytes")
        if int(size) > self.config.max_bytes:
            raise self._too_many_bytes()
        if scope["method"] in {"GET", "HEAD"}:
            self._start(exchange)  # without a body
        elif exchange.lane:
            self._expect_slot(exchange.lane)  # before the client sends the body in vain

    def _expect_token(self, headers: Mapping[str, str]) -> None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode(), self._token)
        if kind.lower() != "bearer" or not same:
            state = "a wrong token" if "authorization" in headers else "no token"
            detail = f"the request has {state}; send the header Authorization: Bearer TOKEN"
            raise Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="rayseg"'})

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
        while self.busy.total():
            await asyncio.sleep(0.05)


def _lane(scope: Scope) -> str:
    """Requests with separate slots: one kind never waits for another; "" for requests that are never refused."""
    if not scope["path"].startswith("/v1/"):
        return ""
    if scope["method"] not in {"GET", "HEAD"}:
        return "predictions and jobs"
    if "/files/" in scope["path"]:
        return "files"
    return "map tiles" if "/tiles/" in scope["path"] else "metadata"


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


def configure_log(path: str | None, *, level: int = logging.INFO) -> None:
    """Write the log as lines of JSON to a file, or to stderr; at INFO there is a line per request."""
    if not any(isinstance(handler.formatter, JsonLines) for handler in _log.handlers):
        # sys.__stderr__, since Ray Serve replaces sys.stderr with its own logger.
        lines = logging.FileHandler(path) if path else logging.StreamHandler(sys.__stderr__)
        lines.setFormatter(JsonLines())
        _log.addHandler(lines)
    _log.setLevel(level)
    _log.propagate = False
