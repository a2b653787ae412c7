"""ASGI middleware in front of Ray Serve's proxy, named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

_ROUTING = {b"serve_multiplexed_model_id", b"x_session_id"}  # by which Serve chooses replicas


class ProxyHeaders:
    """Pass only headers that the proxy can decode: it answers non-UTF-8 values with a text 500, the API with a problem.

    Headers that choose a replica are dropped; they are not for clients.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http":
            kept = [pair for pair in scope["headers"] if pair[0].lower().replace(b"-", b"_") not in _ROUTING]
            # Bytes that are not UTF-8 become two that are; ASCII, all that the API accepts, stays as it is.
            scope = {**scope, "headers": [(name, value.decode("latin-1").encode()) for name, value in kept]}
        await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Called by Ray Serve's proxy when it starts."""
    return [Middleware(ProxyHeaders)]
