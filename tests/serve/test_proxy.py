"""What Ray Serve's proxy itself answers, as clients receive it."""

import pytest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.testclient import TestClient

from rayseg.serve.problems import MEDIA_TYPE
from rayseg.serve.proxy import ProxyHeaders


def answered(response):
    return TestClient(ProxyHeaders(response)).get("/v1/models")


@pytest.mark.parametrize("status", [408, 500, 503])
@pytest.mark.parametrize("kind", [PlainTextResponse, StreamingResponse])
def test_errors_as_text_become_a_problem(kind, status):
    """A replica has died, or none runs: the API itself answers errors as problems only."""
    found = answered(kind("Internal Server Error", status, {"X-Request-ID": "mine"}))
    assert (found.status_code, found.headers["content-type"], found.headers["retry-after"]) == (503, MEDIA_TYPE, "1")
    assert found.headers["x-request-id"] == "mine"
    assert found.json()["status"] == 503
    assert "retry" in found.json()["detail"]


def test_an_address_that_no_application_has_stays_a_404():
    found = answered(PlainTextResponse("Path '/v1/models' not found.", 404))
    assert (found.status_code, found.headers["content-type"]) == (404, MEDIA_TYPE)
    assert "retry-after" not in found.headers
    assert found.json()["status"] == 404


def test_headers_that_steer_serve_are_dropped():
    seen = []

    async def app(scope, receive, send):
        seen.extend(name for name, _ in scope["headers"])
        await Response()(scope, receive, send)

    steering = ("serve_multiplexed_model_id", "x-session-id", "X-Request-Timeout-Seconds")
    TestClient(ProxyHeaders(app)).get("/", headers=dict.fromkeys((*steering, "x-mine"), "1"))
    assert b"x-mine" in seen
    assert {name.lower().encode() for name in steering}.isdisjoint(seen)


@pytest.mark.parametrize("error", [RuntimeError("the replica died"), None])
def test_an_exception_of_the_proxy_and_no_answer_at_all_become_a_problem(error):
    async def broken(scope, receive, send):
        if error:
            raise error

    found = TestClient(ProxyHeaders(broken), raise_server_exceptions=False).get("/v1/models")
    assert (found.status_code, found.headers["content-type"], found.headers["retry-after"]) == (503, MEDIA_TYPE, "1")


@pytest.mark.parametrize(
    "response",
    [Response("{}", 404, media_type=MEDIA_TYPE), PlainTextResponse("metrics"), StreamingResponse(iter(["a", "b"]))],
)
def test_answers_of_the_api_pass(response):
    found = answered(response)
    assert found.status_code == response.status_code
    assert found.text in {"{}", "metrics", "ab"}
