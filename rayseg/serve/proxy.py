"""ASGI middleware in front of Ray Serve's proxy, named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

import json
from asyncio import Event

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTING = {b"serve_multiplexed_model_id", b"x_session_id"}  # by which Serve chooses replicas
_PROBLEM = {
    "type": "about:blank",
    "title": "Service Unavailable",
    "status": 503,
    "detail": "no process of the API answers this request; retry in a moment",
}
_BODY = json.dumps(_PROBLEM).encode()


class ProxyHeaders:
    """Pass only headers that the proxy can decode: it answers non-UTF-8 values with a text 500, the API with a problem.

    Headers that choose a replica are dropped; they are not for clients. What the proxy itself answers, as text, when no
    replica of the API runs or one has died, becomes a problem document.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kept = [pair for pair in scope["headers"] if pair[0].lower().replace(b"-", b"_") not in _ROUTING]
        # Bytes that are not UTF-8 become two that are; ASCII, all that the API accepts, stays as it is.
        scope = {**scope, "headers": [(name, value.decode("latin-1").encode()) for name, value in kept]}
        explained, started = _explained(send)
        try:
            await self.app(scope, receive, explained)
        finally:
            # Of a replica that died in between nothing may come: uvicorn would answer with a text 500.
            if not started.is_set():
                await explained({"type": "http.response.start", "status": 503, "headers": []})
                await explained({"type": "http.response.body"})


def _explained(send: Send) -> tuple[Send, Event]:
    """(`send` with a problem in place of an error that is text, whether an answer has begun).

    The API answers errors as problems only.
    """
    replaced, started = False, Event()

    async def explained(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start":
            started.set()
            kind = dict(message["headers"]).get(b"content-type", b"")
            replaced = message["status"] >= 400 and not kind.startswith(b"application/problem+json")
            if replaced:
                headers = [(b"content-type", b"application/problem+json"), (b"retry-after", b"1")]
                headers += [pair for pair in message["headers"] if pair[0] == b"x-request-id"]
                await send({**message, "status": 503, "headers": [*headers, (b"content-length", b"%d" % len(_BODY))]})
                return
        elif replaced and message["type"] == "http.response.body":
            if not message.get("more_body"):
                await send({"type": "http.response.body", "body": _BODY})
            return
        await send(message)

    return explained, started


def middlewares() -> list[Middleware]:
    """Called by Ray Serve's proxy when it starts."""
    return [Middleware(ProxyHeaders)]
