"""Errors as clients receive them: problem details (RFC 9457), one sentence with the remedy, no stack trace."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi.responses import JSONResponse

from rayseg.errors import ConfigError, DataError, ModelError, RaysegError
from rayseg.io.untrusted import ImageTooLarge

MEDIA_TYPE = "application/problem+json"


class Unavailable(RaysegError):
    """A model that cannot be used now."""


# The first class that matches counts, so subclasses come first; other errors of rayseg are a 500.
STATUS_OF: Mapping[type[RaysegError], int] = {
    ImageTooLarge: 413,
    ConfigError: 422,
    DataError: 422,
    ModelError: 422,
    Unavailable: 503,
}


class Problem(RaysegError):
    """A request that is answered with a problem document.

    Args:
        status: HTTP status code.
        detail: one sentence: what, found, expected, what to do.
        headers: further headers of the response.
    """

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def busy(detail: str, *, seconds: int = 1) -> Problem:
    """A 503 with `Retry-After`."""
    return Problem(503, detail, headers={"Retry-After": str(seconds)})


def response(
    status: int, detail: str, *, request_id: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A problem document as a response."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if request_id:
        body["request_id"] = request_id
    return JSONResponse(body, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)
