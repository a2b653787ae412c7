"""ASGI middleware in front of Ray Serve's proxy, named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

import json
from asyncio import Event
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTING = {
    b"serve_multiplexed_model_id",
    b"x_session_id",
    b"x_request_timeout_seconds",
    b"x_request_disconnect_disabled",
}


def _problem(status: HTTPStatus, detail: str) -> bytes:
    content = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
    return json.dumps(content).encode()


LOST = _problem(HTTPStatus.SERVICE_UNAVAILABLE, "no process of the API answers this request; retry in a moment")
_NOTHING = _problem(HTTPStatus.NOT_FOUND, "no application has this address; /docs lists the addresses of rayseg")


class ProxyHeaders:
    """Pass only headers that the proxy can decode: it answers non-UTF-8 values with a text 500, the API with a problem.

    Headers that choose a replica or change Serve's limits are dropped; they are not for clients. What the proxy itself
    answers, as text, when no replica of the API runs or one has died, becomes a problem document; the 404 of an address
    that no application has stays one.
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
    replaced, started = b"", Event()

    async def explained(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start":
            started.set()
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] >= 400 and not kind.startswith(b"application/problem+json"):
                status = 404 if message["status"] == 404 else 503
                replaced = _NOTHING if status == 404 else LOST
                headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(replaced))]
                headers += [(b"retry-after", b"1")] if status == 503 else []
                headers += [pair for pair in message["headers"] if pair[0] == b"x-request-id"]
                await send({**message, "status": status, "headers": headers})
                return
        elif replaced and message["type"] == "http.response.body":
            if not message.get("more_body"):
                await send({"type": "http.response.body", "body": replaced})
            return
        await send(message)

    return explained, started


def middlewares() -> list[Middleware]:
    """Called by Ray Serve's proxy when it starts."""
    return [Middleware(ProxyHeaders)]
