"""What browsers and proxies of the web expect: requests from other sites' pages, compressed texts, a limit of rate."""

import asyncio
import gzip
import math
from collections import OrderedDict
from collections.abc import Mapping
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayseg.serve.problems import Problem

_MIN_BYTES = 1024
_TEXTS = ("application/json", "application/geo+json", "application/problem+json", "application/xml", "text/")
_PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, DELETE",
    "access-control-allow-headers": "Authorization, Content-Type, Accept, Range, If-None-Match, X-Request-ID",
    "access-control-max-age": "600",
}
_MAX_CLIENTS = 10_000


def cors(origin: str, allowed: tuple[str, ...], *, preflight: bool = False) -> dict[str, str]:
    """The headers for a page of another site, {} for one that is not allowed."""
    if not origin or not {"*", origin} & {*allowed}:
        return {}
    headers = {
        "access-control-allow-origin": "*" if "*" in allowed else origin,
        "access-control-expose-headers": "X-Request-ID, Retry-After, ETag, Content-Range, Location",
        "cross-origin-resource-policy": "cross-origin",
        "vary": "Origin",
    }
    return headers | (_PREFLIGHT if preflight else {})


class RateLimit:
    """Requests per minute of each client; a client may use those of ten seconds at once.

    Args:
        per_minute: the limit; None for none.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (credit, when)

    def expect(self, client: str) -> None:
        """Count a request.

        Raises:
            Problem: 429, the client has sent too many.
        """
        if self._per_minute is None:
            return
        rate, most = self._per_minute / 60, max(1.0, self._per_minute / 6)
        now = monotonic()
        credit, then = self._clients.pop(client, (most, now))
        credit = min(most, credit + (now - then) * rate)
        self._clients[client] = (max(0.0, credit - 1), now) if credit >= 1 else (credit, now)
        if len(self._clients) > _MAX_CLIENTS:
            self._clients.popitem(last=False)  # the one that was silent for the longest time
        if credit < 1:
            seconds = math.ceil((1 - credit) / rate)
            detail = f"the limit is {self._per_minute} requests per minute for each client; retry after {seconds} s"
            raise Problem(429, detail, headers={"Retry-After": str(seconds)})


class Compressed:
    """ASGI middleware that compresses texts in a thread, for clients that accept gzip."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] == "HEAD" or not _accepted(dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def compressed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is None:
                await send(message)
                return
            # The first part of the body: only a body in one part is compressed.
            headers = dict(start["headers"])
            body = message.get("body", b"")
            text = headers.get(b"content-type", b"").decode("latin-1").startswith(_TEXTS)
            plain = b"content-encoding" not in headers and b"content-range" not in headers
            if text and plain and len(body) >= _MIN_BYTES and not message.get("more_body"):
                body = await asyncio.to_thread(gzip.compress, body, 5, mtime=0)
                vary = b", ".join(filter(None, [headers.get(b"vary"), b"Accept-Encoding"]))
                headers |= {b"content-encoding": b"gzip", b"content-length": b"%d" % len(body), b"vary": vary}
                start = {**start, "headers": [*headers.items()]}
                message = {**message, "body": body}
            await send(start)
            start = None
            await send(message)

        await self.app(scope, receive, compressed)


def _accepted(headers: Mapping[bytes, bytes]) -> bool:
    codings = [part.replace(b" ", b"") for part in headers.get(b"accept-encoding", b"").lower().split(b",")]
    return any(coding.partition(b";")[0] in {b"gzip", b"*"} and not coding.endswith(b";q=0") for coding in codings)
