"""The door that every request goes through: who may enter, how much, how many at once; and what is written down."""

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
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseg.serve import problems
from rayseg.serve.problems import Refused
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
_OPEN = re.compile(r"/(?:$|healthz$|docs$|page/|runs/[^/]+$)")
_SIZE = re.compile(r"[0-9]{1,18}")
_ID = re.compile(r"[!-~]{1,128}")
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_log = logging.getLogger("rayseg.serve")


class Metrics:
    """Counts of one replica in the words of Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        words = {"registry": self.registry, "namespace": "rayseg"}
        self.requests = Counter("requests", "Requests answered.", ["route", "method", "status"], **words)  # type: ignore[arg-type]
        self.seconds = Histogram("request_seconds", "Time to answer.", ["route"], buckets=_BUCKETS, **words)  # type: ignore[arg-type]
        self.busy = Gauge("requests_in_progress", "Requests that are worked on.", **words)  # type: ignore[arg-type]
        self.pixels = Counter("pixels", "Pixels predicted.", ["model"], **words)  # type: ignore[arg-type]

    def text(self) -> bytes:
        """All of them."""
        found: bytes = generate_latest(self.registry)
        return found


@dataclass
class _Visit:
    """One request."""

    scope: Scope
    id: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    received: int = 0
    sent: int = 0

    @property
    def route(self) -> str:
        """The template of its path, so that labels are few."""
        return getattr(self.scope.get("route"), "path", "unknown")


class Door:
    """ASGI around an application: ids, tokens, limits, headers, logs, counts.

    Args:
        app: the application.
        config: limits and hosts.
        token: that requests must carry; "" for none.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, *, token: str, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self._token = token.encode()
        self.draining, self.busy = False, 0
        self.names_requests = True  # Serve's proxy says the id by itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(scope, _request_id(scope))
        REQUEST_ID.set(visit.id)
        works = scope["path"].startswith("/v1/")  # reads of runs and map tiles, too
        self.busy += works
        self.metrics.busy.set(self.busy)
        try:
            await self._inside(visit, receive, send, works=works)
        finally:
            self.busy -= works
            self.metrics.busy.set(self.busy)
            self._note(visit)

    async def _inside(self, visit: _Visit, receive: Receive, send: Send, *, works: bool) -> None:
        async def counted() -> Message:
            message = await receive()
            visit.received += len(message.get("body", b""))
            if visit.received > self.config.max_bytes:
                raise self._too_many_bytes()
            return message

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                added = self._headers(visit, message["headers"])
                message = {**message, "headers": [*message["headers"], *added]}
            visit.sent += len(message.get("body", b""))
            await send(message)

        async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                self._admit(scope, works=works)
            except Refused as error:
                refusal = problems.response(error.status, error.detail, request_id=visit.id, headers=error.headers)
                await refusal(scope, receive, send)
            else:
                await self.app(scope, receive, send)

        await ServerErrorMiddleware(admitted, handler=explain)(visit.scope, counted, answered)

    def _admit(self, scope: Scope, *, works: bool) -> None:
        """Refuse what can be refused by its headers."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._expect_host(headers)
        if not _ID.fullmatch(REQUEST_ID.get()):
            raise Refused(
                400, "X-Request-ID is no name for a request, expected 1 to 128 printable ASCII characters, no space"
            )
        if not _OPEN.match(scope["path"]):
            self._expect_token(headers.get("authorization", ""))
        size = headers.get("content-length", "0")
        if not _SIZE.fullmatch(size):
            raise Refused(400, f"Content-Length is {size[:40]!r}, expected a number of bytes")
        if int(size) > self.config.max_bytes:
            raise self._too_many_bytes()
        if works and self.draining:
            raise problems.busy("the server is about to stop; ask again, another will answer", seconds=5)
        if works and self.busy > self.config.queue:
            raise problems.busy(f"{self.config.queue} requests are being worked on already; ask again in a moment")

    def _expect_host(self, headers: dict[str, str]) -> None:
        """Stop pages of other sites: by the name they call the server, and by where they come from."""
        host = headers.get("host", "")
        name = _split("Host", f"//{host}").hostname or ""
        if self.config.hosts and name not in self.config.hosts:
            raise Refused(421, f"the server is not called {name or 'nothing'}; call it {self.config.hosts[0]}")
        origin = headers.get("origin", "")
        if origin and _split("Origin", origin).netloc != host:
            raise Refused(403, "requests from pages of other sites are not answered; ask from the server's own page")

    def _expect_token(self, authorization: str) -> None:
        if not self._token:
            return
        kind, _, found = authorization.partition(" ")
        same = hmac.compare_digest(found.strip().encode(), self._token)
        if kind.lower() != "bearer" or not same:
            said = "a token is needed" if not authorization else "the token is not the server's"
            detail = f"{said}; send the header Authorization: Bearer TOKEN"
            raise Refused(401, detail, headers={"WWW-Authenticate": 'Bearer realm="rayseg"'})

    def _too_many_bytes(self) -> Refused:
        detail = f"the request has more than {self.config.max_bytes:,} bytes; send a smaller image"
        return Refused(413, f"{detail}, or start the server with a higher --max-bytes", headers={"Connection": "close"})

    def _headers(self, visit: _Visit, present: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name.lower() for name, _ in present}
        own = (
            HEADERS
            | ({"x-request-id": visit.id} if self.names_requests else {})
            | ({} if b"cache-control" in names else {"cache-control": "no-store"})
        )
        return [(name.encode(), value.encode("latin-1")) for name, value in own.items() if name.encode() not in names]

    def _note(self, visit: _Visit) -> None:
        """Write a request down; 499 is one whose client left."""
        seconds = time.perf_counter() - visit.began
        status = visit.status or 499
        self.metrics.requests.labels(visit.route, visit.scope["method"], status).inc()
        self.metrics.seconds.labels(visit.route).observe(seconds)
        facts = {"method": visit.scope["method"], "path": visit.scope["path"][:200], "status": status}
        facts |= {"ms": round(seconds * 1000, 1), "received": visit.received, "sent": visit.sent}
        _log.info("request", extra={"facts": facts | {"client": (visit.scope.get("client") or ("",))[0]}})

    async def drained(self) -> None:
        """Take no more work, and wait until what was taken is done."""
        self.draining = True
        while self.busy:
            await asyncio.sleep(0.05)


def _split(name: str, address: str) -> SplitResult:
    """The parts of the address in a header of that name.

    Raises:
        Refused: 400, it is none.
    """
    try:
        return urlsplit(address)
    except ValueError:
        raise Refused(400, f"{name} is {address[:60]!r}, expected the address of a server") from None


def _request_id(scope: Scope) -> str:
    """The client's own id as it came, for Serve's proxy returns it whatever it is; else a new one."""
    return next(
        (value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), uuid.uuid4().hex
    )


async def explain(request: Request, error: Exception) -> Any:  # noqa: ANN401 - a response
    """Anything that was not foreseen: written down with its trace here, one sentence for the client."""
    _log.error("unforeseen", exc_info=error, extra={"facts": {"path": request.scope["path"][:200]}})
    detail = "the server failed, and has written down why under this request's id; ask its keeper"
    return problems.response(500, detail, request_id=REQUEST_ID.get())


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with the id of the request it belongs to."""

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


def keep_log(path: str | None) -> None:
    """Send what the server says, as lines of JSON, to a file or to stderr."""
    if not any(isinstance(one.formatter, JsonLines) for one in _log.handlers):
        # Serve puts a logger of its own in place of sys.stderr.
        lines = logging.FileHandler(path) if path else logging.StreamHandler(sys.__stderr__)
        lines.setFormatter(JsonLines())
        _log.addHandler(lines)
    _log.setLevel(logging.INFO)
    _log.propagate = False
