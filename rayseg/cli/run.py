"""`rayseg run`, `plan`, `status`, `retry`, `predict`: commands that begin, estimate, inspect and resume runs."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayseg.api.require import Requirement, expect_met, requirements
from rayseg.api.running import MOST_NAMED, REGIONS, area_of, default_out, derived, execute, expect_complete
from rayseg.cli.options import (
    Address,
    AllowDriver,
    AsJson,
    ConfigFile,
    EngineName,
    Out,
    Overrides,
    PipelineName,
    RegionName,
    Require,
    RunPrefix,
    TakesRegion,
    Tiles,
)
from rayseg.errors import ConfigError, RunIncomplete
from rayseg.pipelines import pipeline_of

if TYPE_CHECKING:
    from rayseg.config import Config
    from rayseg.engine.run import Engine
    from rayseg.geo.region import Region

app = typer.Typer()
run_app = typer.Typer(no_args_is_help=True, help="Run a pipeline over a region.")
app.add_typer(run_app, name="run")
plan_app = typer.Typer(no_args_is_help=True, help="Estimate data volume, run time and price before a run.")
app.add_typer(plan_app, name="plan")


@run_app.command("pipeline")
def run_pipeline(
    name: PipelineName,
    *,
    region: RegionName,
    config: ConfigFile = None,
    set_: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Output folder or URL; default: runs/PIPELINE-REGION.")
    ] = None,
    engine: EngineName = "ray",
    address: Address = None,
    tiles: Tiles = None,
    submit: Annotated[
        bool,
        typer.Option("--submit", help="Run as a job of the cluster whose dashboard is --address, http://HEAD:8265."),
    ] = False,
    require: Require = None,
    as_json: AsJson = False,
    allow_driver: AllowDriver = None,
) -> None:
    """Run a pipeline over a region; the same command resumes a run that was interrupted."""
    from rayseg.config import load
    from rayseg.engine.run import Engine
    from rayseg.store import absolute

    resolved = load(pipeline_of(name).Config, config, set_ or ())
    where = out or default_out(name, region)
    required = requirements(require or (), name, resolved)
    if not submit:
        at = Engine(engine, address)
        _execute(where, name, resolved, area_of(region, tiles), at, as_json=as_json, required=required)
        return
    from rayseg.engine import submit as jobs

    # The order is part of the submission's id: with another one the command would not find its running job.
    arguments = ["run", "pipeline", name, "--region", region, *(jobs.inlined(config) if config else ())]
    arguments += [part for value in set_ or () for part in ("--set", value)]
    arguments += ["--tiles", tiles] if tiles else []
    arguments += [part for limit in require or () for part in ("--require", limit)]
    jobs.submit([*arguments, "--out", absolute(where)], absolute(where), address)


@run_app.command("sweep")
def run_sweep(
    name: Annotated[str, typer.Argument(metavar="PIPELINE", help="al-s4gan.")],
    *,
    region: RegionName,
    ratios: Annotated[str, typer.Option(help="Shares of the pool that get masks.")] = ".02,.05,.125",
    strategies: Annotated[str, typer.Option(help="Query strategies.")] = "entropy,margin,random",
    learners: Annotated[str, typer.Option(help="s4gan, consistency, supervised, linear, frozen.")] = "s4gan",
    seeds: Annotated[int, typer.Option(help="Repetitions of each combination.")] = 3,
    config: ConfigFile = None,
    set_: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Output folder or URL; default: runs/sweep-al-s4gan-REGION.")
    ] = None,
    engine: EngineName = "ray",
    address: Address = None,
) -> None:
    """Compare mask shares, query strategies and seeds in parallel; the same command resumes an interrupted sweep."""
    from rayseg.config import load
    from rayseg.engine.run import Engine
    from rayseg.pipelines.al_s4gan import sweep

    if name != "al-s4gan":
        raise ConfigError(f"pipeline {name!r} has no sweep, expected al-s4gan; use `rayseg run pipeline {name}`")
    resolved = load(pipeline_of(name).Config, config, set_ or ())
    try:
        shares = [float(text) for text in _listed(ratios)]
    except ValueError:
        raise ConfigError(f"--ratios is {ratios!r}, expected numbers such as .02,.05,.125; correct it") from None
    trials = sweep.list_trials(
        resolved, ratios=shares, strategies=_listed(strategies), learners=_listed(learners), seeds=seeds
    )
    where = out or default_out(f"sweep-{name}", region)
    typer.echo(sweep.run(resolved, area_of(region), trials, where, Engine(engine, address)))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@plan_app.callback()
def _plan() -> None:  # without a callback Typer makes a group of one command that command
    """Estimate data volume, run time and price before a run."""


@plan_app.command("pipeline")
def plan_pipeline(
    name: PipelineName,
    *,
    region: RegionName,
    config: ConfigFile = None,
    set_: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of machines like this one.")] = 1,
    gpu_hour: Annotated[float, typer.Option(min=0, max=1e9, help="Price of a GPU for an hour.")] = 0.0,
    cpu_hour: Annotated[float, typer.Option(min=0, max=1e9, help="Price of a CPU for an hour.")] = 0.0,
    as_json: AsJson = False,
    allow_driver: AllowDriver = None,
) -> None:
    """Estimate data volume, run time and price from the imagery's metadata and a few tiles; nothing is kept.

    For a trained model: `rayseg plan pipeline predict --set model=PREFIX --region ...`.
    """
    from rayseg.config import load
    from rayseg.steps import estimate

    # The same check as a run: a plan fails where the run would.
    module, area = pipeline_of(name), area_of(region)
    settings = load(module.Config, config, set_ or ())
    forecast = module.forecast(settings, area, module.check(settings, area))
    plan = estimate.estimate_run(forecast, area, rates=estimate.Rates(workers, gpu_hour, cpu_hour))
    typer.echo(json.dumps(plan, indent=1) if as_json else _plan_text(plan))


@app.command()
def retry(
    run: RunPrefix, *, engine: EngineName = "ray", address: Address = None, allow_driver: AllowDriver = None
) -> None:
    """Process the failed and quarantined tiles of a run again, then the steps that depend on them."""
    from rayseg.config import load_values
    from rayseg.engine import run as runs
    from rayseg.geo.region import Region

    # The settings of run.json, not the current defaults: the keys of finished steps depend on them.
    content = runs.read(run)
    resolved = load_values(pipeline_of(content["pipeline"]).Config, content["config"])
    area = Region(**content["region"] | {"tiles": tuple(content["region"]["tiles"])})
    _execute(run, content["pipeline"], resolved, area, runs.Engine(engine, address, retry=True))


@app.command()
def status(run: RunPrefix, *, as_json: AsJson = False) -> None:
    """Show a run's progress from its ledgers; exit code 3 if rows failed or the run ended early."""
    from rayseg.engine import run as runs

    report = runs.status(run)
    typer.echo(json.dumps(report, indent=1) if as_json else runs.status_text(report))
    # A running run is not an error, even if some of its rows have failed.
    failed = any(step["troubles"] for step in report["steps"].values())
    if report["status"] != "running" and (report["status"] != "done" or failed or report["damaged"]):
        raise typer.Exit(RunIncomplete.exit_code)


@app.command()
def verify(
    run: RunPrefix,
    *,
    deep: Annotated[bool, typer.Option("--deep", help="Compare checksums too, which reads every file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the files of a run with those that it wrote; exit code 3 if some are missing or damaged."""
    from rayseg.engine import run as runs

    report = runs.verify(run, deep=deep)
    damage = report["damaged"]
    how = "existence, size and checksum" if deep else "existence and size (--deep: checksums too)"
    how += f"; not compared: {report['unknown']:,} rows of an earlier version" if report["unknown"] else ""
    headline = f"{report['run']}: {report['files']:,} files, {len(damage):,} missing or damaged; compared: {how}"
    typer.echo(json.dumps(report, indent=1) if as_json else "\n".join([headline, *runs.named_lines(damage)]))
    if damage:
        raise RunIncomplete(f"{len(damage):,} files are missing or damaged; compute them again: rayseg retry {run}")


@app.command(cls=TakesRegion)
def predict(
    model: Annotated[str, typer.Argument(help="Prefix of a bundle, for example runs/demo/models/segmenter.")],
    source: Annotated[str, typer.Argument(help=f"An image, or a region: {REGIONS}.")],
    *,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    tiles: Tiles = None,
    bands: Annotated[
        str | None,
        typer.Option(
            "--bands",
            metavar="NAMES",
            help="Bands of the imagery in the order of the model's, such as b3,b2,b1; default: by name.",
        ),
    ] = None,
    require: Require = None,
    as_json: AsJson = False,
    allow_driver: AllowDriver = None,
) -> None:
    """Predict with a trained model over images, a catalogue or a region.

    A segmenter gives a map. A classifier gives class and score of each image, tile or polygon: classes.csv, .json and
    .parquet. --set units.of=tiles, units.polygons=FILE and units.pictures=true (Grad-CAM++) choose what.
    """
    region = area_of(source, tiles)
    settings = {"model": model} | ({"map.bands": _bands_of(model, _listed(bands))} if bands else {})
    _run_with("predict", settings, region, set_, out, at=(engine, address), as_json=as_json, require=require)


def _bands_of(model: str, names: list[str]) -> dict[str, str]:
    """Name of each of the model's bands -> that of the imagery's."""
    from rayseg.models import bundle

    own = bundle.description(model).bands
    if len(names) != len(own):
        raise ConfigError(
            f"--bands names {len(names)} bands, {model} expects {len(own)} ({', '.join(own)}); name one for each"
        )
    return dict(zip(own, names, strict=True))


@app.command()
def remap(
    run: RunPrefix,
    *,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    r"""Make a new map from the scores of a finished run: another threshold, other classes, another area. No model runs.

    --set threshold=.7, classes.merge.built=\[building,road], classes.drop=\[water], inside=FILE, polygons.min_area=50.
    """
    _run_with(*derived("remap", out, run), set_, out, at=(engine, address), as_json=as_json)


@app.command()
def refresh(
    run: RunPrefix,
    *,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Map a run's region again; tiles whose imagery and model have not changed are copied from the run.

    --set model=PREFIX maps all of it with another model, --set map.imagery=CATALOGUE from another catalogue.
    """
    _run_with(*derived("refresh", out, run), set_, out, at=(engine, address), as_json=as_json)


@app.command()
def correct(
    run: RunPrefix,
    *,
    clicks: Annotated[
        str | None,
        typer.Option(
            help="Points and short lines with a property class, in degrees or with a CRS; default: those of the page."
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Fine-tune the model on the corrected map, too, in a run OUT-trained.")
    ] = False,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Correct a finished map by clicks where it is wrong; the classes of what resembles the clicks follow.

    A light head is fitted to the clicks, on the frozen features of the run's own model; all else stays as it is.
    """
    pipeline, settings, region = derived("correct", out, run)
    settings |= {"clicks": clicks} if clicks else {}
    _run_with(pipeline, settings, region, set_, out, at=(engine, address), as_json=as_json)
    if train:
        trained = f"{out.rstrip('/')}-trained"
        _run_with(*derived("train", trained, out), None, trained, at=(engine, address), as_json=as_json)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="RUN1", help="Folder or URL of the earlier run.")],
    after: Annotated[str, typer.Argument(metavar="RUN2", help="Folder or URL of the run that it is compared with.")],
    *,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compare the maps of two runs: which class became which, in hectares, as a map and as polygons."""
    _run_with(*derived("diff", out, before, after), set_, out, at=(engine, address), as_json=as_json)


def _run_with(
    pipeline: str,
    settings: Mapping[str, Any],
    region: "Region",
    set_: list[str] | None,
    out: str,
    *,
    at: tuple[str, str | None],
    as_json: bool,
    require: list[str] | None = None,
) -> None:
    """Run a pipeline with the settings that a command derives; --set takes precedence; `at` is engine and address."""
    from rayseg.config import load
    from rayseg.engine.run import Engine

    derived = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    resolved = load(pipeline_of(pipeline).Config, None, [*derived, *(set_ or ())])
    required = requirements(require or (), pipeline, resolved)
    _execute(out, pipeline, resolved, region, Engine(*at), as_json=as_json, required=required)


def _execute(
    out: str,
    pipeline: str,
    config: "Config",
    region: "Region",
    engine: "Engine",
    *,
    as_json: bool = False,
    required: Sequence[Requirement] = (),
) -> None:
    """Run a pipeline and print its headline, or its result as JSON, before an error names what failed."""
    headline, finished = execute(out, pipeline, config, region, engine)
    result = {"out": finished.root, "headline": headline, "failed": finished.troubles, **finished.steps[-1].value}
    typer.echo(json.dumps(result, indent=1) if as_json else headline)
    expect_complete(finished, out)
    expect_met(required, out)


def _plan_text(plan: Mapping[str, Any]) -> str:
    """A plan as text lines."""
    # What is read and written is known from metadata; times and prices only from a probe.
    lines = [
        f"{plan['region']}: {plan['items']:,} items, {plan['tiles']:,} tiles, {plan['pixels'] / 1e6:,.1f} Mpx",
        f"  read     {_bytes(plan['bytes_read'])}",
        f"  written  {_bytes(plan['bytes_written'])}",
    ]
    if plan["refused"]:
        lines.append(f"  {plan['refused']} scenes cannot be mapped; the run reports each with the reason")
    if plan["probe"]:
        probe, price = plan["probe"], plan["price"]
        gpu = "not measured: this machine has none" if plan["gpu_seconds"] is None else f"{plan['gpu_seconds']:,.0f} s"
        stages = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in plan["seconds"].items())
        lines += [
            f"  CPU      {plan['cpu_seconds']:,.0f} s     GPU  {gpu}     ({stages})",
            f"  wall     {plan['wall_seconds']:,.0f} s with {plan['workers']} x {probe['cpus']} CPUs and "
            f"{probe['gpus']} GPUs, estimated from {len(probe['tiles'])} tiles",
            f"  price    {price:,.2f}" if price >= 0.1 or not price else f"  price    {price:.2g}",
        ]
        lines += [f"  failed in the probe: {row}: {why}" for row, why in list(probe["troubles"].items())[:MOST_NAMED]]
    return "\n".join(lines + [f"  not included: {line}" for line in plan["unknown"]])


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    # Decimal units, as clouds bill them.
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
