"""Runs as jobs of a cluster: one job for one run, which any command can follow to its end."""

import asyncio
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import certifi
import pytest
import yaml
from small_world import catalogue, refused

from rayseg.config import load
from rayseg.engine import run as runs
from rayseg.engine import submit
from rayseg.errors import ConfigError, RunIncomplete
from rayseg.pipelines import gpc
from rayseg.store import ACCESS

LINE = "rayseg run pipeline gpc --region demo --out s3://b/r --address auto"


class Head:
    """A client of a head, with the methods of Ray's; a job ends when its log is read to the end.

    cuts: numbers of lines after which the stream of the log breaks off, one for each stream.
    """

    def __init__(self, *, lines=3, ends="SUCCEEDED", cuts=()):
        self.jobs, self.submitted, self.lines, self.ends, self.cuts = {}, [], lines, ends, list(cuts)
        self.streams = 0

    def submit_job(self, *, entrypoint, submission_id, runtime_env):
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.submitted.append((entrypoint, submission_id, runtime_env))
        self.jobs[submission_id] = "RUNNING"
        return submission_id

    def get_job_status(self, job_id):
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return SimpleNamespace(value=self.jobs[job_id])

    async def tail_job_logs(self, job_id):
        self.streams += 1
        stop = self.cuts.pop(0) if self.cuts else None
        for number in range(self.lines):
            if number == stop:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            await asyncio.sleep(0)
            yield f"tiles {number}\n"
        self.jobs[job_id] = self.ends

    def get_job_logs(self, job_id):
        return "".join(f"tiles {number}\n" for number in range(self.lines))

    def get_job_info(self, job_id):
        return SimpleNamespace(message="exit code 3")

    def delete_job(self, job_id):
        del self.jobs[job_id]
        return True


def followed(head, job="r-1"):
    said = []
    submit.carry_out(head, LINE, job, say=said.append, poll=0)
    return "".join(said)


def test_the_log_is_streamed_once_from_its_first_line_to_its_last():
    head = Head()
    assert followed(head) == "submitted r-1\ntiles 0\ntiles 1\ntiles 2\n"
    assert [entrypoint for entrypoint, _, _ in head.submitted] == [LINE]
    assert head.streams == 1  # each line travels once, however long the job runs


def test_a_stream_that_breaks_off_is_opened_again_and_no_line_is_printed_twice():
    head = Head(cuts=[2, 0, 1])
    assert followed(head) == "submitted r-1\ntiles 0\ntiles 1\ntiles 2\n"
    assert head.streams == 4


def test_a_connection_that_dies_in_silence_is_opened_again(monkeypatch):
    head, whole = Head(), Head.tail_job_logs

    async def dead(job_id):
        head.tail_job_logs = lambda job_id: whole(head, job_id)
        yield "tiles 0\n"
        await asyncio.sleep(3600)

    head.tail_job_logs = dead
    monkeypatch.setattr(submit, "SILENCE", 0.05)
    assert followed(head) == "submitted r-1\ntiles 0\ntiles 1\ntiles 2\n"


def test_where_no_stream_can_be_opened_the_log_comes_whole_when_the_job_has_ended():
    """As behind a proxy without WebSockets."""
    head = Head(cuts=[0, 0, 0])
    sleeps = iter(["RUNNING", "RUNNING", "SUCCEEDED"])
    head.get_job_status = lambda job_id: SimpleNamespace(value=next(sleeps))
    head.jobs["r-1"] = "RUNNING"
    assert followed(head) == "attached to r-1, which is running\ntiles 0\ntiles 1\ntiles 2\n"
    assert head.streams == 2


def test_an_error_of_the_terminal_is_not_taken_for_one_of_the_stream():
    def closed(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        submit.carry_out(Head(), LINE, "r-1", say=closed, poll=0)


def test_a_second_command_attaches_and_one_after_the_end_resumes():
    head = Head()
    head.submit_job(entrypoint=LINE, submission_id="r-1", runtime_env={})
    assert followed(head).startswith("attached to r-1, which is running\n")
    assert len(head.submitted) == 1
    assert followed(head).startswith("submitted r-1\n")
    assert len(head.submitted) == 2


def test_two_commands_at_once_make_one_job():
    head = Head()

    def none_yet(job_id):
        head.submit_job(entrypoint=LINE, submission_id=job_id, runtime_env={})  # somebody else, in between
        del head.get_job_status
        raise RuntimeError(f"Job {job_id} does not exist")

    head.get_job_status = none_yet
    followed(head)
    assert len(head.submitted) == 1


def test_a_failed_job_is_an_error_with_its_message():
    with pytest.raises(RunIncomplete, match="job r-1 failed: exit code 3"):
        followed(Head(ends="FAILED"))


def test_the_same_run_has_the_same_id_and_another_has_not():
    one = submit.submission_id("s3://b/runs/gpc", LINE)
    assert one == submit.submission_id("s3://b/runs/gpc", LINE)
    assert one.startswith("gpc-")
    assert one != submit.submission_id("s3://b/runs/other", LINE)
    assert one != submit.submission_id("s3://b/runs/gpc", f"{LINE} --set members=2")


@pytest.mark.parametrize(
    ("address", "mode", "allowed"),
    [
        ("http://127.0.0.1:8265", "", True),
        ("http://localhost:8265", "", True),
        ("http://[::1]:8265", "", True),
        ("http://10.0.0.1:8265", "", False),
        ("https://head.example.org", "disabled", False),
        ("http://10.0.0.1:8265", "token", True),
        ("10.0.0.1:6379", "token", False),
        ("auto", "token", False),
        (None, "token", False),
    ],
)
def test_heads_on_other_machines_need_a_token(monkeypatch, tmp_path, address, mode, allowed):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 32 if mode == "token" else "")
    if allowed:
        submit.expect_token(address)
    else:
        with pytest.raises(ConfigError, match=r"address|token"):
            submit.expect_token(address)


def test_a_file_of_settings_is_part_of_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "patch: 320\nstride: 256\nsegmenter: {negatives: 0.5, learning: {batch: 3}}\ncues: {scales: [1.0, 2.0]}\n"
    )
    words = submit.inlined(str(file))
    assert load(gpc.Config, None, words[1::2]) == load(gpc.Config, str(file))
    line = submit.entrypoint(["run", "pipeline", "gpc", *words])
    assert shlex.split(line)[-2:] == ["--address", "auto"]
    assert yaml.safe_load(shlex.split(line)[5].partition("=")[2]) == 320


def test_secrets_and_local_outputs_are_not_submitted(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 32)
    words = ("run", "pipeline", "gpc", "--submit", "--address", "http://10.0.0.1:8265", "--region")
    assert "is on this machine" in refused(2, *words, "demo", "--out", tmp_path)
    said = refused(2, *words, "https://h/c.json?sig=SECRET", "--out", "s3://b/r")
    assert "SECRET" not in said
    assert "no token" in _unset(monkeypatch, *words, "demo", "--out", "s3://b/r")


def _unset(monkeypatch, *words):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return refused(2, *words)


HEAD = """
import sys
import ray
from ray._private.worker import get_dashboard_url
from rayseg.engine import cluster
cluster.connect(None, dashboard=True)
print(f"http://{get_dashboard_url()}", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
VALUES = {"AWS_CA_BUNDLE": certifi.where(), "RAYSEG_ALLOW_DRIVER": "netCDF", "AWS_NO_SIGN_REQUEST": "NO"}


@contextmanager
def real_head(environment):
    """(address for jobs, address to join) of a private head with a dashboard."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HEAD], env=environment, stdin=pipe, stdout=pipe, text=True) as head:
        try:
            yield head.stdout.readline().split()
        finally:
            head.stdin.close()
            head.wait()


def said(words, environment):
    """(exit code, stderr) of the command line in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "rayseg", *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    return found.returncode, found.stderr


@pytest.mark.chaos  # a minute or two each
@pytest.mark.e2e
@pytest.mark.ray
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_real_head_runs_a_job_with_every_variable_of_the_stores(tmp_path, tiny_model, mode):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "RAYSEG_"))}
    plain |= {"PATH": path, "HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
    given = plain | ({"RAY_AUTH_TOKEN": "a" * 64} if mode == "token" else {})
    stores = {name: VALUES.get(name, "https://example.org") for name in ACCESS}
    words = ("--set", f"model={tiny_model}", "--set", "map.tile=256", "--region", catalogue(tmp_path, one={}))
    command = ("run", "pipeline", "predict", *words, "--out", tmp_path / "run")
    # Another Ray on the machine is not the job's.
    with real_head(plain | {"RAY_AUTH_MODE": "disabled"}), real_head(given) as (jobs, address):
        if mode == "token":
            for wrong in ({}, {"RAY_AUTH_TOKEN": "b" * 64}):
                code, text = said([*command, "--submit", "--address", jobs], plain | wrong)
                assert (code, "RAY_AUTH_TOKEN to the token of the head" in text) == (2, True), text
                code, text = said([*command, "--address", address], plain | wrong)
                assert (code, "RAY_AUTH_TOKEN to the token of the head" in text) == (2, True), text
                assert "Traceback" not in text
        code, text = said([*command, "--submit", "--address", jobs], given | stores)
        # Ray refuses a variable that job and driver both give.
        assert "Failed to merge the Job's runtime env" not in text
        assert code == 0, text
    assert runs.read(str(tmp_path / "run"))["status"] == "done"
