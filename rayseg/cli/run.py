"""`rayseg run`, `retry`, `status`, `predict`: commands that work on a run."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayseg.cli.options import (
    REGIONS,
    Address,
    ConfigFile,
    EngineName,
    Out,
    Overrides,
    PipelineName,
    Tiles,
    images_or_region,
    only,
)
from rayseg.errors import ConfigError, RunIncomplete
from rayseg.pipelines import pipeline_of

if TYPE_CHECKING:
    from rayseg.config import Config
    from rayseg.engine.run import Run
    from rayseg.geo.region import Region

MOST_FAILED = 5
"""Rows that failed in a probe which a plan names."""

app = typer.Typer()
run_app = typer.Typer(no_args_is_help=True, help="Run a pipeline over a region.")
app.add_typer(run_app, name="run")
plan_app = typer.Typer(no_args_is_help=True, help="Say what a run would do and cost, before it is begun.")
app.add_typer(plan_app, name="plan")


@run_app.callback()
def _run() -> None:
    """Run a pipeline over a region."""


@run_app.command("pipeline")
def run_pipeline(  # noqa: PLR0913 - the options of the command
    name: PipelineName,
    *,
    region: Annotated[
        str,
        typer.Option(help=f"{REGIONS}."),
    ],
    config: ConfigFile = None,
    set_: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", help="Where results go; default: runs/PIPELINE-REGION.")] = None,
    engine: EngineName = "ray",
    address: Address = None,
    tiles: Tiles = None,
    submit: Annotated[
        bool,
        typer.Option("--submit", help="As a job of the cluster whose dashboard --address names, http://HEAD:8265."),
    ] = False,
) -> None:
    """Run a pipeline over a region; given again, it goes on where it stopped."""
    from rayseg.config import load
    from rayseg.geo.grid import slug

    module = pipeline_of(name)
    resolved = load(module.Config, config, set_ or ())
    if submit:
        from rayseg.engine import submit as jobs
        from rayseg.store import absolute

        where = absolute(out or f"runs/{name}-{slug(region)}")
        jobs.submit(_words(name, region, config, set_, tiles, where), where, address)
        return
    area = only(images_or_region(region), tiles)
    with _run_at(out or f"runs/{name}-{slug(region)}", name, resolved, area, engine, address) as run:
        typer.echo(module.run(resolved, run, area, run.plan))


def _words(
    name: str, region: str, config: str | None, set_: list[str] | None, tiles: str | None, out: str
) -> list[str]:
    """The command line of a run, as it is understood on any machine."""
    from rayseg.engine import submit as jobs

    words = ["run", "pipeline", name, "--region", region, *(jobs.inlined(config) if config else ())]
    words += [word for value in set_ or () for word in ("--set", value)]
    return [*words, *(("--tiles", tiles) if tiles else ()), "--out", out]


@run_app.command("sweep")
def run_sweep(  # noqa: PLR0913 - the options of a command line
    name: Annotated[str, typer.Argument(metavar="PIPELINE", help="al-s4gan.")],
    *,
    region: Annotated[str, typer.Option(help=f"{REGIONS}.")],
    ratios: Annotated[str, typer.Option(help="Shares of the pool that get masks.")] = ".02,.05,.125",
    strategies: Annotated[str, typer.Option(help="Ways to choose them.")] = "entropy,margin,random",
    learners: Annotated[str, typer.Option(help="s4gan, supervised, or both.")] = "s4gan",
    seeds: Annotated[int, typer.Option(help="Repetitions of each.")] = 3,
    config: ConfigFile = None,
    set_: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", help="Default: runs/sweep-al-s4gan-REGION.")] = None,
    engine: EngineName = "ray",
    address: Address = None,
) -> None:
    """Try shares of masks, strategies and seeds beside each other; given again, it goes on where it stopped."""
    from rayseg.config import load
    from rayseg.engine.run import Engine
    from rayseg.geo.grid import slug
    from rayseg.pipelines.al_s4gan import sweep

    if name != "al-s4gan":
        raise ConfigError(f"there is no sweep of {name!r}, expected al-s4gan; use `rayseg run pipeline {name}`")
    resolved = load(pipeline_of(name).Config, config, set_ or ())
    shares = [_share(text) for text in _listed(ratios)]
    trials = sweep.list_trials(
        resolved, ratios=shares, strategies=_listed(strategies), learners=_listed(learners), seeds=seeds
    )
    where = out or f"runs/sweep-{name}-{slug(region)}"
    typer.echo(sweep.run(resolved, only(images_or_region(region), None), trials, where, Engine(engine, address)))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _share(text: str) -> float:

    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--ratios holds {text!r}, expected shares such as .02,.05,.125") from None


@plan_app.callback()
def _plan() -> None:
    """Say what a run would do and cost, before it is begun."""


@plan_app.command("pipeline")
def plan_pipeline(
    name: PipelineName,
    *,
    region: Annotated[str, typer.Option(help=f"{REGIONS}.")],
    config: ConfigFile = None,
    set_: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Machines like this one.")] = 1,
    gpu_hour: Annotated[float, typer.Option(min=0, max=1e9, help="Price of a GPU for an hour.")] = 0.0,
    cpu_hour: Annotated[float, typer.Option(min=0, max=1e9, help="Price of a CPU for an hour.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what a run would do and cost, from the imagery's description and a few tiles; nothing is kept.

    With a model that is there: `rayseg plan pipeline predict --set model=PREFIX --region ...`.
    """
    from rayseg.config import load
    from rayseg.steps import estimate

    module = pipeline_of(name)
    area = only(images_or_region(region), None)
    settings = load(module.Config, config, set_ or ())
    forecast = module.forecast(settings, area, module.check(settings, area))
    found = estimate.estimate_run(forecast, area, rates=estimate.Rates(workers, gpu_hour, cpu_hour))
    typer.echo(json.dumps(found, indent=1) if as_json else _plan_text(found))


@app.command()
def retry(
    run: Annotated[str, typer.Argument(help="The run's folder or URL.")],
    *,
    engine: EngineName = "ray",
    address: Address = None,
) -> None:
    """Try the failed and quarantined tiles of a run again, then what depends on them."""
    from rayseg.config import load_values
    from rayseg.engine import run as runs
    from rayseg.geo.region import Region

    found = runs.read(run)
    module = pipeline_of(found["pipeline"])
    resolved = load_values(module.Config, found["config"])
    area = Region(**found["region"] | {"tiles": tuple(found["region"]["tiles"])})
    with _run_at(run, found["pipeline"], resolved, area, engine, address, retry=True) as again:
        typer.echo(module.run(resolved, again, area, again.plan))


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The run's folder or URL.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say how far a run is, from its ledgers; exit code 3 when something failed, or it ended before it was done."""
    from rayseg.engine import run as runs

    report = runs.status(run)
    typer.echo(json.dumps(report, indent=1) if as_json else runs.status_text(report))
    troubled = any(step["troubles"] for step in report["steps"].values())
    if report["status"] != "running" and (report["status"] != "done" or troubled):
        raise typer.Exit(RunIncomplete.exit_code)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Prefix of a bundle, for example runs/demo/models/segmenter.")],
    source: Annotated[str, typer.Argument(help=f"An image, or what --region can name: {REGIONS}.")],
    *,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    tiles: Tiles = None,
) -> None:
    """Predict with a trained model over images, a catalogue or a region."""
    from rayseg.config import load

    module = pipeline_of("predict")
    resolved = load(module.Config, None, [f"model={model}", *(set_ or ())])
    area = only(images_or_region(source), tiles)
    with _run_at(out, "predict", resolved, area, engine, address) as run:
        typer.echo(module.run(resolved, run, area, run.plan))


@contextmanager
def _run_at(
    out: str,
    pipeline: str,
    config: "Config",
    region: "Region",
    engine: str,
    address: str | None,
    *,
    retry: bool = False,
) -> "Iterator[Run]":
    """An open run; when some of its tiles failed, an error that names them ends the command."""
    from rayseg.engine import cluster
    from rayseg.engine.run import Engine, Run

    if engine == "ray":
        cluster.expect_reachable(address)
    where = Engine(engine, address, retry)
    check = partial(pipeline_of(pipeline).check, config, region)
    with Run.open(out, pipeline=pipeline, config=config, region=region, engine=where, check=check) as run:
        yield run
    if run.troubles:
        named = [f"{step} {row} ({why})" for step, rows in run.troubles.items() for row, why in rows.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        kind = "row" if len(run.troubles) > 1 else "tile"  # scenes and tiles, or the tiles of two steps
        counted = f"{len(named)} {kind}{'s' * (len(named) > 1)} failed"
        raise RunIncomplete(f"{counted}: {'; '.join(named[:5])}{more}; mend the cause, then: rayseg retry {out}")


def _plan_text(found: Mapping[str, Any]) -> str:
    """A plan in lines for people."""
    lines = [
        f"{found['region']}: {found['items']:,} items, {found['tiles']:,} tiles, {found['pixels'] / 1e6:,.1f} Mpx",
        f"  read     {_bytes(found['bytes_read'])}",
        f"  written  {_bytes(found['bytes_written'])}",
    ]
    if found["refused"]:
        lines.append(f"  {found['refused']} scenes cannot be mapped; the run names them and why")
    if found["probe"]:
        probe = found["probe"]
        gpu = "no GPU here to time" if found["gpu_seconds"] is None else f"{found['gpu_seconds']:,.0f} s"
        stages = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in found["seconds"].items())
        lines += [
            f"  CPU      {found['cpu_seconds']:,.0f} s     GPU  {gpu}     ({stages})",
            f"  wall     {found['wall_seconds']:,.0f} s with {found['workers']} x {probe['cpus']} CPUs and "
            f"{probe['gpus']} GPUs, told from {len(probe['tiles'])} tiles",
            f"  price    {_price(found['price'])}",
        ]
        lines += [f"  failed when tried: {row}: {why}" for row, why in list(probe["troubles"].items())[:MOST_FAILED]]
    return "\n".join(lines + [f"  not in these figures: {line}" for line in found["unknown"]])


def _price(amount: float) -> str:
    """To the hundredth, and small ones to two digits."""
    return f"{amount:,.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
