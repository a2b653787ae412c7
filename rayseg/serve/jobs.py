"""Runs that clients start: each a Ray job on the server's own cluster, below one prefix, over one catalogue.

A request names a pipeline, a region by name or bounds, and numbers and words of the configuration; nothing in it can
name a file, for that the configuration of the server's keeper is there.
"""

import asyncio
import json
import logging
import math
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
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
from rayseg.serve.forms import problems_of
from rayseg.serve.problems import Refused, busy
from rayseg.serve.settings import ServeConfig
from rayseg.store import STORE_ERRORS, Location, upath

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_LOCATED = get_args(Location)[1]
_WORDS = re.compile(r"[A-Za-z0-9_ -]*")
_ID = r"^job-[0-9a-f]{12}$"
_log = logging.getLogger("rayseg.serve")
_DEEPEST = 10  # groups and lists inside one another
_GOING = {"PENDING", "RUNNING"}


class Job(Config):
    """What is to be run."""

    pipeline: Literal[*PIPELINES]  # type: ignore[valid-type] # the one list of names, and no copy of it
    """Which pipeline."""
    region: Annotated[str, Field(max_length=200)]
    """A name that `rayseg regions` lists, or west,south,east,north in degrees."""
    config: dict[str, Any] = Field(default_factory=dict, max_length=100)
    """What differs from the server's configuration, `{"segmenter": {"learning": {"batch": 4}}}`."""


def entrypoint(job: Job, config: ServeConfig, name: str) -> str:
    """The command line of a job, as a person would type it.

    Raises:
        Refused: 422, the region or a value of the configuration is not allowed.
    """
    area = region(job.region)
    _expect_shallow(job.config)
    module = pipeline_of(job.pipeline)
    words = [f"{key}={json.dumps(value)}" for key, value in _settings(job.config)]
    _expect_no_files(module.Config, job.config)
    if config.jobs_catalog:
        words.append(f"map.imagery={json.dumps(config.jobs_catalog)}")
    base = config.jobs_configs.get(job.pipeline)
    try:
        load(module.Config, base, words)
    except ConfigError as error:
        raise Refused(422, f"config: {error}") from None
    arguments = ["run", "pipeline", job.pipeline, f"--region={area}", f"--out={upath(str(config.jobs)) / name}"]
    arguments += [f"--config={base}"] if base else []
    arguments += [part for word in words for part in ("--set", word)]
    return ray_jobs.entrypoint(arguments, program=(sys.executable, "-m", "rayseg"))


def region(text: str) -> str:
    """The region of a job, once it is known to be a name or bounds.

    Raises:
        Refused: 422, it is neither.
    """
    if text == "demo" or text in named_regions():
        return text
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(["demo", *named_regions()])
        raise Refused(422, f"region is {text[:60]!r}, expected west,south,east,north or one of: {names}") from None
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90) or not math.isfinite(west + east):
        raise Refused(422, f"region is {text[:60]!r}, expected west < east and south < north in degrees")
    return f"{west!r},{south!r},{east!r},{north!r}"


def _expect_shallow(values: dict[str, Any]) -> None:
    """Refuse what is nested deeper than any configuration; what follows goes down into it."""
    level: list[object] = [values]
    for _ in range(_DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
    if any(isinstance(one, (dict, list)) for one in level):
        raise Refused(422, f"config is nested deeper than {_DEEPEST} groups and lists; see rayseg config show")


def _inside(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a nested configuration, checked for words that could name files."""
    for key, value in values.items():
        if not re.fullmatch(r"[a-z_0-9]{1,40}", key):
            raise Refused(
                422, f"config key {(prefix + key)[:60]!r} is no key of a configuration; see rayseg config show"
            )
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
            continue
        for text in _texts(value):
            if not _WORDS.fullmatch(text):
                raise Refused(
                    422, f"config key {prefix}{key} is {text[:40]!r}; words here are letters, digits, _ and -"
                )
        yield prefix + key, value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in _inside(value):
        yield from _texts(inner)


def _expect_no_files(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values for keys that name files, and weights that are no name."""
    for key, value in values.items():
        field = kind.model_fields.get(key)
        if field is None:
            continue  # unknown keys are refused with the whole configuration
        located = _LOCATED in (*field.metadata, *_metadata(field.annotation))
        if located or (key == "checkpoint" and isinstance(value, str)):
            raise Refused(
                422, f"config key {prefix}{key} names a file, which only the server's keeper can; leave it out"
            )
        if key == "weights" and isinstance(value, str) and value not in {"none", "imagenet"}:
            raise Refused(422, f"config key {prefix}{key} is {str(value)[:40]!r}, expected none or imagenet")
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        for one in inner:
            if issubclass(one, Config) and isinstance(value, dict):
                _expect_no_files(one, value, f"{prefix}{key}.")


def _metadata(annotation: object) -> Iterator[object]:
    """Everything that an annotation carries, however deep."""
    for part in get_args(annotation):
        yield part
        yield from _metadata(part)


def router(config: ServeConfig) -> APIRouter:
    """Routes of the jobs."""
    routes = APIRouter(tags=["jobs"])

    one_by_one = asyncio.Lock()

    @routes.post("/v1/jobs", status_code=202, responses=problems_of(400, 401, 413, 422, 429, 503))
    async def start(job: Annotated[Job, Body()]) -> dict[str, str]:
        """Start a run of a pipeline over a region, as a Ray job."""
        name = f"job-{uuid.uuid4().hex[:12]}"
        line = await asyncio.to_thread(entrypoint, job, config, name)
        async with one_by_one:
            await asyncio.to_thread(submit, config, line, name)
        return {"id": name, "status": "pending", "href": f"/v1/jobs/{name}"}

    @routes.get("/v1/jobs/{name}", responses=problems_of(404))
    async def look(name: Annotated[str, Path(pattern=_ID)]) -> dict[str, Any]:
        """How far a job is, from the ledgers of its run."""
        return await asyncio.to_thread(summary, config, name)

    return routes


@contextmanager
def _cluster(config: ServeConfig) -> Iterator["JobSubmissionClient"]:
    try:
        yield ray_jobs.connect(config.jobs_address)
    except (ConfigError, OSError, RuntimeError) as error:  # for a head that does not answer, and one without agents yet
        _log.warning("the cluster takes no jobs: %s", " ".join(str(error).split())[:500])
        raise busy("the cluster takes no jobs now; ask again later", seconds=30) from error


def submit(config: ServeConfig, line: str, name: str) -> None:
    """Have the cluster carry a line out.

    Raises:
        Refused: 429, as many jobs are under way as may be; 503, the cluster does not answer.
    """
    with _cluster(config) as cluster:
        states = ray_jobs.statuses(cluster)
        going = [job for job, state in states.items() if state in _GOING and re.fullmatch(_ID, job)]
        if len(going) >= config.jobs_at_once:
            detail = f"{len(going)} jobs are under way, {config.jobs_at_once} may be; ask again when one has ended"
            raise Refused(429, detail, headers={"Retry-After": "60"})
        ray_jobs.begin(cluster, line, name)


def summary(config: ServeConfig, name: str) -> dict[str, Any]:
    """A job's state as Ray has it, and its run's ledgers.

    Raises:
        Refused: 404, there is no such job; 503, the cluster does not answer.
    """
    with _cluster(config) as cluster:
        states = ray_jobs.statuses(cluster)
    try:
        begun = {path.name for path in upath(str(config.jobs)).iterdir()}
    except STORE_ERRORS:
        begun = set()
    if name not in states and name not in begun:
        raise Refused(404, f"there is no job {name!r}; those that were started say their id")
    state = states.get(name, "unknown").lower()
    if name not in begun or not (upath(str(config.jobs)) / name / "run.json").exists():
        return {"id": name, "status": state, "steps": {}}
    found = runs.status(str(upath(str(config.jobs)) / name))
    steps = {step: {"planned": one["planned"], "counts": one["counts"]} for step, one in found["steps"].items()}
    return {"id": name, "status": state, "run": found["status"], "reason": found["reason"], "steps": steps}
