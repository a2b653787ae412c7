"""Jobs of clients: the command line that they may start."""

import io
import shlex
import time
from types import SimpleNamespace

import httpx
import mercantile
import numpy as np
import pytest
from PIL import Image
from ray.job_submission import JobStatus
from small_world import catalogue
from starlette.testclient import TestClient
from tiny_server import serving

from rayseg.serve.app import api
from rayseg.serve.jobs import Job, entrypoint
from rayseg.serve.models import LocalBackend, ModelIndex
from rayseg.serve.problems import Problem
from rayseg.serve.settings import ServeConfig

SMALL = """
network: {epochs: 2, patch: 64, stride: 48, labels: 8, reduce: 1}
superpixels: {min_size: 16, overlap: 16}
map: {tile: 128}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "gpc.yaml").write_text("members: 1\nchips: {source: chips.json#chips}\n")
    return ServeConfig(
        jobs=str(tmp_path / "runs"), jobs_catalog="cat.json#a", jobs_configs={"gpc": str(tmp_path / "gpc.yaml")}
    )


def test_the_command_line_is_one_a_person_would_type(config, tmp_path):
    line = shlex.split(entrypoint(Job(pipeline="gpc", region="1,2,3,4", config={"patch": 640}), config, "job-1"))
    assert line[1:6] == ["-m", "rayseg", "run", "pipeline", "gpc"]
    assert "--region=1.0,2.0,3.0,4.0" in line
    assert f"--out={tmp_path}/runs/job-1" in line
    assert f"--config={tmp_path}/gpc.yaml" in line
    assert "patch=640" in line
    assert any(word.startswith("map.imagery=") for word in line)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"region": "/etc/passwd"}, "region is '/etc/passwd'"),
        ({"region": "s3://bucket/catalog.json#x"}, "expected west,south,east,north"),
        ({"region": "9,2,3,4"}, "west < east"),
        ({"region": "nan,2,3,4"}, "west < east"),
        ({"config": {"truth": "masks"}}, "names a file"),
        ({"config": {"chips": {"source": "chips"}}}, "names a file"),
        ({"config": {"map": {"imagery": "x"}}}, "names a file"),
        ({"config": {"segmenter": {"weights": "secret"}}}, "expected none, imagenet or packaged"),
        ({"config": {"segmenter": {"encoder": "../../x.pth"}}}, "expected letters, digits"),
        ({"config": {"a b": 1}}, "is not a configuration key"),
        ({"config": {"nothing": 1}}, "config key nothing is unknown"),
        ({"config": {"patch": -1}}, "config key patch"),
    ],
)
def test_paths_and_invalid_values_are_refused(config, asked, words):
    job = Job(**{"pipeline": "gpc", "region": "1,2,3,4"} | asked)
    with pytest.raises(Problem, match=words):
        entrypoint(job, config, "job-1")


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}"), ('{"a":[', "]}")])
@pytest.mark.parametrize("depth", [12, 300, 600, 750, 900])
def test_what_is_nested_deeper_than_any_configuration_is_refused(config, depth, start, end):
    asked = TestClient(api(config, LocalBackend(), ModelIndex()), raise_server_exceptions=False)
    times = depth // len(end)
    values = f'{{"patch": {start * times}1{end * times}}}'
    body = f'{{"pipeline": "gpc", "region": "demo", "config": {values}}}'
    found = asked.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 422, found.text
    assert "nested deeper than 10 groups and lists" in found.json()["detail"]


def test_what_is_nested_too_deep_to_be_read_is_refused(config):
    asked = TestClient(api(config, LocalBackend(), ModelIndex()), raise_server_exceptions=False)
    body = f'{{"pipeline": "gpc", "region": "demo", "config": {{"patch": {"[" * 50_000}{"]" * 50_000}}}}}'
    assert asked.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.mark.parametrize(
    ("pipeline", "values"),
    [("landcover", {"segmenter": {"loss": {"weights": [1.0, 2.0]}}}), ("al-s4gan", {"segmenter": {"checkpoint": 50}})],
)
def test_numbers_under_names_that_elsewhere_are_files_are_taken(tmp_path, pipeline, values):
    (tmp_path / "base.yaml").write_text("classes: deepglobe\n")
    config = ServeConfig(
        jobs=str(tmp_path), jobs_catalog="cat.json#a", jobs_configs={pipeline: str(tmp_path / "base.yaml")}
    )
    line = shlex.split(entrypoint(Job(pipeline=pipeline, region="1,2,3,4", config=values), config, "job-1"))
    assert any("=50" in word or "=[1.0" in word for word in line)


def test_a_job_is_submitted_and_looked_up_by_its_id(config, monkeypatch):
    submitted = {}

    class Client:
        def __init__(self, address):
            assert address == config.jobs_address

        def submit_job(self, *, entrypoint, submission_id, runtime_env):
            submitted[submission_id] = entrypoint

        def list_jobs(self):
            return [SimpleNamespace(submission_id=name, status=JobStatus.RUNNING) for name in [None, *submitted]]

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    asked = TestClient(api(config.model_copy(update={"jobs_at_once": 1}), LocalBackend(), ModelIndex()))
    found = asked.post("/v1/jobs", json={"pipeline": "gpc", "region": "demo"})
    assert found.status_code == 202, found.text
    name = found.json()["id"]
    assert list(submitted) == [name]
    assert asked.get(f"/v1/jobs/{name}").json() == {"id": name, "status": "running", "steps": {}}
    refused = asked.post("/v1/jobs", json={"pipeline": "gpc", "region": "demo"})
    assert (refused.status_code, list(submitted)) == (429, [name])
    assert refused.headers["retry-after"] == "60"
    assert "1 jobs are active, 1 are allowed" in refused.json()["detail"]
    assert asked.get("/v1/jobs/job-000000000000").status_code == 404
    assert asked.get("/v1/jobs/..").status_code in {404, 422}
    assert asked.post("/v1/jobs", json={"pipeline": "rm", "region": "demo"}).status_code == 422
    assert asked.post("/v1/jobs", content=b"{" * 100).status_code == 422


def test_a_cluster_that_does_not_answer_is_a_503(config):
    away = config.model_copy(update={"jobs_address": "http://127.0.0.1:9"})
    asked = TestClient(api(away, LocalBackend(), ModelIndex()))
    for found in (
        asked.post("/v1/jobs", json={"pipeline": "gpc", "region": "demo"}),
        asked.get("/v1/jobs/job-0123456789ab"),
    ):
        assert (found.status_code, found.headers["retry-after"]) == (503, "30")
        assert "does not accept jobs now" in found.json()["detail"]


@pytest.mark.more  # requests here, jobs of a cluster in engine/test_submit.py, a server in test_deployment.py
@pytest.mark.e2e
@pytest.mark.ray
def test_a_job_runs_to_its_end_on_the_servers_own_cluster(tmp_path):
    """Started, followed, refused a second one meanwhile; then its map is there to be looked at."""
    catalogue(tmp_path, one={"seed": 1})
    (tmp_path / "small.yaml").write_text(SMALL)
    settings = [f"jobs={tmp_path}/runs", f"jobs_catalog={tmp_path}/cat/catalog.json#imagery", "jobs_at_once=1"]
    settings += [f"jobs_configs={{superpixel: {tmp_path}/small.yaml}}"]
    (tmp_path / "none").mkdir()
    server = serving(tmp_path / "none", *settings)
    with server as (_, address), httpx.Client(base_url=address, timeout=60) as asked:
        started = begun(asked, {"pipeline": "superpixel", "region": "116.9,-90,117.1,90"})
        assert started.status_code == 202, started.text
        assert asked.post("/v1/jobs", json={"pipeline": "superpixel", "region": "demo"}).status_code == 429
        said = ended(asked, started.json()["href"])
        assert (said["status"], said["run"]) == ("succeeded", "done"), said
        assert said["steps"]["predict"]["counts"]["done"] == said["steps"]["predict"]["planned"] > 0
        run = asked.get(f"/v1/runs/{said['id']}").json()
        west, south, east, north = run["bounds"]
        place = mercantile.tile((west + east) / 2, (south + north) / 2, 16)
        tile = asked.get(f"/v1/runs/{said['id']}/tiles/16/{place.x}/{place.y}.png")
        assert (np.array(Image.open(io.BytesIO(tile.content))) != 255).any()


def begun(asked, job):
    """The answer to a job, asked for again as long as the cluster, just started, has nobody to take it."""
    deadline = time.monotonic() + 120
    while (found := asked.post("/v1/jobs", json=job)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(2)
    return found


def ended(asked, href):
    """What a job says of itself when it has ended."""
    deadline = time.monotonic() + 300
    while (said := asked.get(href).json())["status"] in {"pending", "running"}:
        assert time.monotonic() < deadline, said
        time.sleep(1)
    return said
