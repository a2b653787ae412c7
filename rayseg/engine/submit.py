"""Runs as Ray jobs: submit a command line to a cluster, follow the job's log, read the states of jobs.

The id of a submission is a hash of the output prefix and the command line, so that the same command attaches to the
job that it submitted before. The job continues when the terminal that follows it closes.
"""

import asyncio
import hashlib
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from rayseg.config import read_values
from rayseg.engine.cluster import TOKEN
from rayseg.errors import ConfigError, RunIncomplete
from rayseg.geo.grid import slug
from rayseg.store import access, is_local, public

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL = 2.0
"""Seconds between two requests for the state of a job whose log stream has ended."""
SILENCE = 600.0
"""Seconds without a line after which the log stream is opened again: a connection can die without an error."""
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


def submit(arguments: Sequence[str], out: str, address: str | None) -> None:
    """Submit a run as a job of the cluster, or attach to it if it exists; return when the job has succeeded.

    Args:
        arguments: of the command line, without the program and `--address`.
        out: prefix of the run, the same for everybody who submits it.
        address: http(s) address of the cluster's head.

    Raises:
        ConfigError: the address is not a head, needs a token or does not answer, `out` is on this machine's disk, or
            the command line holds a secret, which the cluster's dashboard would show.
        RunIncomplete: the job failed or was stopped.
    """
    expect_token(address)
    if is_local(out) and not is_loopback(urlsplit(address or "").hostname or ""):
        raise ConfigError(
            f"output {out} is on this machine, the cluster is not; give --out a URL such as s3://bucket/run"
        )
    # The dashboard shows the command line to everybody who can reach it.
    line = entrypoint(arguments)
    if public(line) != line:
        raise ConfigError(
            f"the command line {public(line)} holds a secret; sign URLs with RAYSEG_SIGN, or give the keys to the "
            "machines of the cluster"
        )
    carry_out(connect(str(address)), line, submission_id(out, line), say=sys.stderr.write)


def entrypoint(arguments: Sequence[str], *, program: Sequence[str] = ("rayseg",)) -> str:
    """The shell line of a job, which connects to the cluster that runs it."""
    return shlex.join([*program, *arguments, "--address", "auto"])


def inlined(path: str) -> list[str]:
    """The content of a YAML file as `--set` arguments, because the head does not have the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    arguments = []
    for key, value in read_values(path).items():
        # An infinite width keeps the value on one line; "..." ends a YAML document of one scalar.
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
        arguments += ["--set", f"{key}={text}"]
    return arguments


def submission_id(out: str, line: str) -> str:
    """Id of the job that runs `line` for the output `out`: the last part of `out` and 12 digits of a SHA-256."""
    digest = hashlib.sha256(f"{out} {line}".encode()).hexdigest()[:12]
    name = out.rstrip("/").rpartition("/")[2].encode("ascii", "ignore").decode()  # Ray takes ASCII
    return f"{slug(name)[:40]}-{digest}"


def expect_token(address: str | None) -> None:
    """Check that a token is set for a head on another machine: without one the head runs any job that it receives.

    Raises:
        ConfigError: the address is not http(s), or is on another machine and no token is set.
    """
    parts = urlsplit(address or "")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"--address {address} takes no jobs, expected the dashboard of a head, such as http://10.0.0.1:8265"
        )
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    # Ray also reads the token from this file.
    stored = token or (Path.home() / ".ray" / "auth_token").exists()
    if not is_loopback(parts.hostname) and not (os.environ.get("RAY_AUTH_MODE") == "token" and stored):
        raise ConfigError(
            f"the head at {public(str(address))} is on another machine and no token is set: a head without one runs "
            "whatever it receives; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or forward its port to this machine)"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an IP address, IPv6 with or without brackets) is this machine's loopback interface."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def connect(address: str | None) -> "JobSubmissionClient":
    """A client of the cluster whose dashboard is at `address`.

    Raises:
        ConfigError: the dashboard does not answer, or refuses the token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports every closed stream
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the head at {public(str(address))} refuses this command ({reason}); {TOKEN}") from None
    except (ConnectionError, RuntimeError) as error:
        reason = public(" ".join(str(error).split()))
        raise ConfigError(f"no head answers at {public(str(address))} ({reason}); correct --address") from None


def begin(jobs: "JobSubmissionClient", line: str, job: str) -> None:
    """Submit `line` under the id `job`; a job of this id that another process submitted meanwhile is kept."""
    try:
        jobs.submit_job(entrypoint=line, submission_id=job, runtime_env={"env_vars": access()})
    except (RuntimeError, ValueError):
        if status(jobs, job) is None:
            raise


def status(jobs: "JobSubmissionClient", job: str) -> str | None:
    """PENDING, RUNNING or one of `ENDED`; None if the cluster does not know the job."""
    try:
        return str(jobs.get_job_status(job).value)
    except RuntimeError as error:  # Ray has no error type for an unknown job
        if "does not exist" not in str(error) and "404" not in str(error):
            raise
        return None


def statuses(jobs: "JobSubmissionClient") -> dict[str, str]:
    """Submission id -> status, as `status` returns it, of all jobs that were submitted to the cluster."""
    return {job.submission_id: str(job.status.value) for job in jobs.list_jobs() if job.submission_id}


def carry_out(
    jobs: "JobSubmissionClient", line: str, job: str, *, say: Callable[[str], object], poll: float = POLL
) -> None:
    """Submit `line` as `job` unless it is running already, and pass its log to `say` until it ends.

    A job of this id that has ended is deleted and submitted again: the run resumes from its ledger.

    Raises:
        RunIncomplete: the job failed or was stopped.
    """
    state = status(jobs, job)
    if state in ENDED:
        # Ray refuses a second submission under the id of an ended job.
        jobs.delete_job(job)
    if state is None or state in ENDED:
        begin(jobs, line, job)
        say(f"submitted {job}\n")
    else:
        say(f"attached to {job}, which is {state.lower()}\n")
    state = asyncio.run(_follow(jobs, job, say, poll))
    if state != "SUCCEEDED":
        reason = " ".join(str(getattr(jobs.get_job_info(job), "message", "") or "").split())[-300:]
        raise RunIncomplete(
            f"job {job} {state.lower()}: {public(reason)}; fix the cause, then run the same command to resume"
        )


async def _follow(jobs: "JobSubmissionClient", job: str, say: Callable[[str], object], poll: float) -> str:
    """Pass the job's log to `say` as it grows; return the status with which the job ends."""
    import aiohttp

    printed = 0  # characters of the log that were passed to `say`
    while True:
        # Ray streams from the first line on: after a reconnection the lines that were printed are skipped.
        stream, received, complete = jobs.tail_job_logs(job), 0, False
        while not complete:
            try:
                async with asyncio.timeout(SILENCE):
                    chunk = await anext(stream, "")
            except (TimeoutError, OSError, RuntimeError, aiohttp.ClientError):  # the connection is lost
                break
            received += len(chunk)
            if received > printed:
                say(chunk[printed - received :])
                printed = received
            complete = not chunk
        state = status(jobs, job) or "STOPPED"
        if state in ENDED:
            if not complete:  # a proxy without WebSockets, for example: the rest comes in one request
                with suppress(RuntimeError):
                    say(jobs.get_job_logs(job)[printed:])
            return state
        await asyncio.sleep(poll)
