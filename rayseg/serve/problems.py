"""What goes wrong, as a client is told: problem details (RFC 9457), one sentence with the remedy, no stack trace."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

from rayseg.errors import ConfigError, DataError, ModelError, RaysegError
from rayseg.io.untrusted import TooLarge

MEDIA_TYPE = "application/problem+json"
STATUS_OF: Mapping[type[RaysegError], int] = {TooLarge: 413, ConfigError: 422, DataError: 422, ModelError: 422}
"""Error -> status; the first class that fits counts."""


class Refused(RaysegError):
    """A request that is answered with a problem.

    Args:
        status: of the answer.
        detail: one sentence: what, found, expected, what to do.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def busy(detail: str, *, seconds: int = 1) -> Refused:
    """A 503 that says when to come again."""
    return Refused(503, detail, headers={"Retry-After": str(seconds)})


def content(status: int, detail: str, *, request_id: str = "", **more: object) -> dict[str, Any]:
    """The members of a problem."""
    named = {"request_id": request_id} if request_id else {}
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **named,
    } | more


def response(
    status: int, detail: str, *, request_id: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A problem as a response."""
    body = content(status, detail, request_id=request_id)
    return JSONResponse(body, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def of_error(error: RaysegError) -> Refused:
    """The refusal that one of rayseg's own errors is for a client."""
    if isinstance(error, Refused):
        return error
    status = next((status for kind, status in STATUS_OF.items() if isinstance(error, kind)), 500)
    return Refused(status, " ".join(str(error).split()))
