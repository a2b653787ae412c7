"""Runs that clients start: each is a Ray job on the server's own cluster, below one prefix, over one catalogue.

A request names a pipeline, a region by name or bounds, and numbers and short texts of the configuration. It can never
name a file: paths come from the administrator's base configuration.
"""

import asyncio
import json
import logging
import math
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from fastapi import APIRouter, Body, Path
from pydantic import Field

from rayseg.config import Config, load
from rayseg.engine import run as runs
from rayseg.engine import submit as ray_jobs
from rayseg.errors import ConfigError
from rayseg.geo.region import named_regions
from rayseg.pipelines import PIPELINES, pipeline_of
from rayseg.serve.openapi import problems_of
from rayseg.serve.problems import Problem, busy
from rayseg.serve.settings import ServeConfig
from rayseg.store import STORE_ERRORS, Location, upath

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_LOCATED = get_args(Location)[1]
_WORDS = re.compile(r"[A-Za-z0-9_ -]*")
_KEY = re.compile(r"[a-z_0-9]{1,40}")
_ID = r"^job-[0-9a-f]{12}$"
_log = logging.getLogger("rayseg.serve")
_MAX_DEPTH = 10  # nested groups and lists
_ACTIVE = {"PENDING", "RUNNING"}


class Job(Config):
    """A run that a client requests."""

    pipeline: Literal[*PIPELINES]  # type: ignore[valid-type] # mypy cannot read the names of a dict
    """Name of the pipeline."""
    region: Annotated[str, Field(max_length=200)]
    """A name that `rayseg regions` lists, or west,south,east,north in degrees."""
    config: dict[str, Any] = Field(default_factory=dict, max_length=100)
    """Differences from the server's configuration, `{"segmenter": {"learning": {"batch": 4}}}`."""


def entrypoint(job: Job, config: ServeConfig, name: str) -> str:
    """The command line of a job, as a person would type it.

    Raises:
        Problem: 422, the region or a value of the configuration is not allowed.
    """
    # 1. what a client may choose
    area = region(job.region)
    _expect_shallow(job.config)
    module = pipeline_of(job.pipeline)
    settings = [f"{key}={json.dumps(value)}" for key, value in _settings(job.config)]
    _expect_no_files(module.Config, job.config)
    # 2. what only the administrator may
    if config.jobs_catalog:
        settings.append(f"map.imagery={json.dumps(config.jobs_catalog)}")
    base = config.jobs_configs.get(job.pipeline)
    try:
        load(module.Config, base, settings)
    except ConfigError as error:
        raise Problem(422, f"config: {error}") from None
    # 3. the command line; lists of words, never text for a shell
    arguments = ["run", "pipeline", job.pipeline, f"--region={area}", f"--out={upath(str(config.jobs)) / name}"]
    arguments += [f"--config={base}"] if base else []
    arguments += [part for setting in settings for part in ("--set", setting)]
    return ray_jobs.entrypoint(arguments, program=(sys.executable, "-m", "rayseg"))


def region(text: str) -> str:
    """The region of a job, validated as a name or bounds.

    Raises:
        Problem: 422, it is neither.
    """
    if text == "demo" or text in named_regions():
        return text
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(["demo", *named_regions()])
        raise Problem(422, f"region is {text[:60]!r}, expected west,south,east,north or one of: {names}") from None
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90) or not math.isfinite(west + east):
        raise Problem(422, f"region is {text[:60]!r}, expected west < east and south < north in degrees")
    return f"{west!r},{south!r},{east!r},{north!r}"


def _items(value: object) -> list[object]:
    """The values in a group or list, [] for anything else."""
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


def _expect_shallow(values: dict[str, Any]) -> None:
    """Refuse deep nesting before any function recurses into it."""
    # Iterative: a request can be nested deeper than Python's recursion limit.
    level: list[object] = [values]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
    if any(isinstance(value, (dict, list)) for value in level):
        raise Problem(422, f"config is nested deeper than {_MAX_DEPTH} groups and lists; see rayseg config show")


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested configuration, without any text that could be a path."""
    for key, value in values.items():
        if not _KEY.fullmatch(key):
            raise Problem(422, f"config key {(prefix + key)[:60]!r} is not a configuration key; see rayseg config show")
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
            continue
        for text in _texts(value):
            if not _WORDS.fullmatch(text):
                raise Problem(422, f"config key {prefix}{key} is {text[:40]!r}, expected letters, digits, _ and - only")
        yield prefix + key, value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in _items(value):
        yield from _texts(item)


def _expect_no_files(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values for keys that hold file paths, and pretrained weights other than known names."""
    for key, value in values.items():
        field = kind.model_fields.get(key)
        if field is None:
            continue  # `load` refuses unknown keys
        located = _LOCATED in (*field.metadata, *_metadata(field.annotation))
        if located or (key == "checkpoint" and isinstance(value, str)):
            raise Problem(422, f"config key {prefix}{key} names a file, only the administrator may; leave it out")
        if key == "weights" and isinstance(value, str) and value not in {"none", "imagenet", "packaged"}:
            raise Problem(422, f"config key {prefix}{key} is {str(value)[:40]!r}, expected none, imagenet or packaged")
        # A group can be optional: its class is then in a union.
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Config) and isinstance(value, dict):
                _expect_no_files(inner, value, f"{prefix}{key}.")


def _metadata(annotation: object) -> Iterator[object]:
    """All metadata in an annotation, at any depth."""
    for part in get_args(annotation):
        yield part
        yield from _metadata(part)


def router(config: ServeConfig) -> APIRouter:
    """Routes of the jobs."""
    routes = APIRouter(tags=["jobs"])
    submitting = asyncio.Lock()  # so that two requests do not both see one free place

    @routes.post("/v1/jobs", status_code=202, responses=problems_of(400, 401, 413, 422, 429, 503))
    async def start(job: Annotated[Job, Body()]) -> dict[str, str]:
        """Start a run of a pipeline over a region as a Ray job."""
        name = f"job-{uuid.uuid4().hex[:12]}"
        line = await asyncio.to_thread(entrypoint, job, config, name)
        async with submitting:
            await asyncio.to_thread(submit, config, line, name)
        return {"id": name, "status": "pending", "href": f"/v1/jobs/{name}"}

    @routes.get("/v1/jobs/{name}", responses=problems_of(404))
    async def look(name: Annotated[str, Path(pattern=_ID)]) -> dict[str, Any]:
        """A job's progress, from the ledgers of its run."""
        return await asyncio.to_thread(summary, config, name)

    return routes


@contextmanager
def _cluster(config: ServeConfig) -> Iterator["JobSubmissionClient"]:
    try:
        yield ray_jobs.connect(config.jobs_address)
    except (ConfigError, OSError, RuntimeError) as error:  # the head does not answer, or has no job agent yet
        _log.warning("the cluster does not accept jobs: %s", " ".join(str(error).split())[:500])
        raise busy("the cluster does not accept jobs now; retry later", seconds=30) from error


def submit(config: ServeConfig, line: str, name: str) -> None:
    """Submit a command line to the cluster as job `name`.

    Raises:
        Problem: 429, the maximum number of jobs is active; 503, the cluster does not answer.
    """
    with _cluster(config) as cluster:
        states = ray_jobs.statuses(cluster)
        active = [job for job, state in states.items() if state in _ACTIVE and re.fullmatch(_ID, job)]
        if len(active) >= config.jobs_at_once:
            detail = f"{len(active)} jobs are active, {config.jobs_at_once} are allowed; retry when one has ended"
            raise Problem(429, detail, headers={"Retry-After": "60"})
        ray_jobs.begin(cluster, line, name)


def summary(config: ServeConfig, name: str) -> dict[str, Any]:
    """A job's state on the cluster, and the ledgers of its run.

    Raises:
        Problem: 404, there is no such job; 503, the cluster does not answer.
    """
    with _cluster(config) as cluster:
        states = ray_jobs.statuses(cluster)
    # The dashboard forgets jobs when the cluster restarts, the store does not.
    root = upath(str(config.jobs)) / name
    try:
        begun = root.is_dir()
    except STORE_ERRORS:
        begun = False
    if name not in states and not begun:
        raise Problem(404, f"there is no job {name!r}; POST /v1/jobs returns the id of a job")
    state = states.get(name, "unknown").lower()
    if not begun or not (root / "run.json").exists():
        return {"id": name, "status": state, "steps": {}}
    run = runs.status(str(root))
    steps = {step: {"planned": ledger["planned"], "counts": ledger["counts"]} for step, ledger in run["steps"].items()}
    return {"id": name, "status": state, "run": run["status"], "reason": run["reason"], "steps": steps}
