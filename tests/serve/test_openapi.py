"""Whatever the OpenAPI allows, and what it does not, is answered without a 5xx."""

from unittest.mock import Mock, patch

import pytest
import schemathesis
from fake_run import blobs, make, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from small_world import segmenter
from tiny_server import served, untrained_sam

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
NAMES = ["cover", "sam-vit-b", "map", "segmenter"]


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    """Of a server with a model, Segment Anything, a run, and jobs that a cluster takes but does not carry out."""
    root = tmp_path_factory.mktemp("world")
    segmenter(root / "cover")
    mask = blobs(128, 192)
    make(root / "map", {"scene": (picture(mask), mask, (0, 0))})
    cluster = Mock(**{"list_jobs.return_value": []})
    with untrained_sam(root / "sam") as sam, patch("ray.job_submission.JobSubmissionClient", return_value=cluster):
        app = served(root / "cover", sam, runs=(str(root / "map"),), jobs=str(root / "jobs"))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        yield [found.ok() for found in schema.get_all_operations()]


@pytest.mark.more  # the other files of this folder ask by hand
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_that_is_asked_makes_the_server_fail(operations, mode, data):
    operation = data.draw(st.sampled_from(operations), label="operation")
    case = data.draw(operation.as_strategy(generation_mode=mode))
    if "name" in case.path_parameters and data.draw(st.booleans()):
        case.path_parameters["name"] = data.draw(st.sampled_from(NAMES))
    answer = case.call()
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    assert str(answer.status_code) in operation.definition.raw["responses"], (operation.label, answer.status_code)
    if answer.status_code >= 400:
        assert answer.headers["content-type"][0] == "application/problem+json"
