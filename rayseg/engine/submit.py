"""A run as a Ray job: submitted once, watched from any terminal, going on without one.

The submission's id is told by what the run is, so that the same line finds the job it began before.
"""

import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import yaml

from rayseg.config import read_values
from rayseg.errors import ConfigError, RunIncomplete
from rayseg.geo.grid import slug
from rayseg.store import access, is_local, public

POLL = 2.0
"""Seconds between two looks at a job."""
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


class Jobs(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str: ...  # noqa: D102
    def get_job_status(self, job_id: str) -> Any: ...  # noqa: ANN401, D102
    def get_job_info(self, job_id: str) -> Any: ...  # noqa: ANN401, D102
    def get_job_logs(self, job_id: str) -> str: ...  # noqa: D102
    def delete_job(self, job_id: str) -> bool: ...  # noqa: D102


def submit(words: Sequence[str], out: str, address: str | None) -> None:
    """Begin the run as a job of the cluster, or attach to the one that is at it; return when it has ended well.

    Args:
        words: of the command line, without the program and the address.
        out: prefix of the run, the same for everybody who asks for it.
        address: http(s) address of the cluster's head.

    Raises:
        ConfigError: the address is no head, cannot be trusted, does not answer, or `out` is on this machine's disk.
        RunIncomplete: the job failed, or was stopped.
    """
    expect_closed(address)
    if is_local(out) and not is_loopback(urlsplit(address or "").hostname or ""):
        raise ConfigError(
            f"output {out} is on this machine, the cluster is not; give --out a URL such as s3://bucket/run"
        )
    line = entrypoint(words)
    carry_out(_client(str(address)), line, submission_id(out, line), say=sys.stderr.write)


def entrypoint(words: Sequence[str]) -> str:
    """The line that the head carries out.

    Raises:
        ConfigError: it has a secret in it, which the cluster's dashboard would show.
    """
    line = shlex.join(["rayseg", *words, "--address", "auto"])
    if public(line) != line:
        raise ConfigError(
            f"the job {public(line)} has a secret in it; sign with RAYSEG_SIGN, or give keys to the cluster"
        )
    return line


def inlined(path: str) -> list[str]:
    """`--set` words that say what a YAML file says: the head does not have the file.

    Raises:
        ConfigError: it cannot be read.
    """
    values = read_values(path)
    written = {key: yaml.safe_dump(value, default_flow_style=True, width=math.inf) for key, value in values.items()}
    plain = {key: text.removesuffix("...\n").strip() for key, text in written.items()}
    return [word for key, text in plain.items() for word in ("--set", f"{key}={text}")]


def submission_id(out: str, line: str) -> str:
    """Of the job that carries `line` out for the run at `out`."""
    return (
        f"{slug(out.rstrip('/').rpartition('/')[2])[:40]}-{hashlib.sha256(f'{out} {line}'.encode()).hexdigest()[:12]}"
    )


def expect_closed(address: str | None) -> None:
    """Refuse a head that runs whatever anybody sends it.

    Raises:
        ConfigError: the address is none of http(s), or not of this machine and there is no token to show.
    """
    parts = urlsplit(address or "")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"--address {address} takes no jobs; expected a head's dashboard, such as http://10.0.0.1:8265"
        )
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    stored = token or (Path.home() / ".ray" / "auth_token").exists()
    if not is_loopback(parts.hostname) and not (os.environ.get("RAY_AUTH_MODE") == "token" and stored):
        raise ConfigError(
            f"the head at {public(str(address))} is not on this machine, and no token is set: a head without one runs "
            "whatever it is sent; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or forward its port to this machine)"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def carry_out(jobs: Jobs, line: str, job: str, *, say: Callable[[str], object], poll: float = POLL) -> None:
    """Submit `line` as `job` unless it is there already, and follow it to its end.

    A job of this id that ended is put aside for a new one: the run goes on from its ledger.

    Raises:
        RunIncomplete: it failed, or was stopped.
    """
    status = _status(jobs, job)
    if status in ENDED:
        jobs.delete_job(job)
    if status is None or status in ENDED:
        _begin(jobs, line, job)
        say(f"submitted {job}\n")
    else:
        say(f"attached to {job}, which is {status.lower()}\n")
    ended = _follow(jobs, job, say, poll)
    if ended != "SUCCEEDED":
        why = " ".join(str(getattr(jobs.get_job_info(job), "message", "") or "").split())[-300:]
        raise RunIncomplete(
            f"job {job} {ended.lower()}: {public(why)}; mend the cause, then give the same command again"
        )


def _begin(jobs: Jobs, line: str, job: str) -> None:
    try:
        jobs.submit_job(entrypoint=line, submission_id=job, runtime_env={"env_vars": access()})
    except (RuntimeError, ValueError):
        if _status(jobs, job) is None:  # else somebody else was faster
            raise


def _status(jobs: Jobs, job: str) -> str | None:
    """The job's status; None if there is no such job."""
    try:
        return str(getattr(found := jobs.get_job_status(job), "value", found))
    except RuntimeError as error:
        if "does not exist" not in str(error) and "404" not in str(error):
            raise
        return None


def _follow(jobs: Jobs, job: str, say: Callable[[str], object], poll: float) -> str:
    told = ""
    while True:
        status = _status(jobs, job) or "STOPPED"
        said = jobs.get_job_logs(job)
        fresh = said[len(told) :] if said.startswith(told) else said
        if fresh:
            say(fresh)
        told = said
        if status in ENDED:
            return status
        time.sleep(poll)


def _client(address: str) -> Jobs:
    from ray.job_submission import JobSubmissionClient

    try:
        client: Jobs = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = public(" ".join(str(error).split()))
        raise ConfigError(f"no head answers at {public(address)} ({reason}); correct --address") from None
    return client
