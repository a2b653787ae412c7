"""The command line. Results go to stdout, everything else to stderr; heavy imports happen inside the commands."""

import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rayseg import __version__
from rayseg.errors import ConfigError, RaysegError, RunIncomplete

if TYPE_CHECKING:
    from types import ModuleType

    from rayseg.geo import Region
    from rayseg.run import Run

PIPELINES = {"gpc": "rayseg.pipelines.gpc"}


class _Door(TyperGroup):
    """Where errors leave: one sentence and the error's exit code; the traceback only with -v."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RaysegError as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            typer.echo(f"rayseg: {error}", err=True)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(cls=_Door, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
run_app = typer.Typer(no_args_is_help=True, help="Run a pipeline over a region.")
ingest_app = typer.Typer(no_args_is_help=True, help="Describe images as a STAC catalogue.")
models_app = typer.Typer(no_args_is_help=True, help="List and show trained models (bundles).")
config_app = typer.Typer(no_args_is_help=True, help="Show, describe and check a pipeline's configuration.")
app.add_typer(run_app, name="run")
app.add_typer(ingest_app, name="ingest")
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")

PipelineName = Annotated[str, typer.Argument(help=f"One of: {', '.join(PIPELINES)}.")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with what differs from the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One value, for example segmenter.batch=4; may be repeated.")
]
Out = Annotated[str, typer.Option("--out", help="Where results go: a folder, or s3:// or another URL.")]
EngineName = Annotated[str, typer.Option("--engine", help="ray, or inline for this process alone.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster to join; default: RAY_ADDRESS, else none.")]


@app.callback()
def _root(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where an error came from.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Map a land-cover class over a whole region from little or no labelled data."""
    if version:
        typer.echo(f"rayseg {__version__}")
        raise typer.Exit


@run_app.callback()
def _run() -> None:
    """Run a pipeline over a region."""


@run_app.command("pipeline")
def run_pipeline(
    name: PipelineName,
    *,
    region: Annotated[
        str,
        typer.Option(
            help="demo, a name under stac/regions, a GeoJSON or GeoParquet file, west,south,east,north, or catalog.json#collection."
        ),
    ],
    config: ConfigFile = None,
    set_: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", help="Where results go; default: runs/PIPELINE-REGION.")] = None,
    engine: EngineName = "ray",
    address: Address = None,
    tiles: Annotated[str | None, typer.Option(help="Only these tiles: comma-separated ids.")] = None,
) -> None:
    """Run a pipeline over a region; given again, it goes on where it stopped."""
    from rayseg.config import load
    from rayseg.geo import slug

    module = _pipeline(name)
    resolved = load(module.Config, config, set_ or ())
    area = replace(_region(region), tiles=tuple(tiles.split(",")) if tiles else ())
    with _run_at(out or f"runs/{name}-{slug(region)}", name, resolved, area, engine, address) as run:
        typer.echo(module.run(resolved, run, area))


@app.command()
def retry(
    run: Annotated[str, typer.Argument(help="The run's folder or URL.")],
    *,
    engine: EngineName = "ray",
    address: Address = None,
) -> None:
    """Try the failed and quarantined tiles of a run again, then what depends on them."""
    from rayseg import run as runs
    from rayseg.config import load_values
    from rayseg.geo import Region

    found = runs.read(run)
    module = _pipeline(found["pipeline"])
    resolved = load_values(module.Config, found["config"])
    area = Region(**found["region"] | {"tiles": tuple(found["region"]["tiles"])})
    with _run_at(run, found["pipeline"], resolved, area, engine, address, retry=True) as again:
        typer.echo(module.run(resolved, again, area))


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The run's folder or URL.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say how far a run is, from its ledgers; exit code 3 when something failed."""
    from rayseg import run as runs

    report = runs.status(run)
    typer.echo(json.dumps(report, indent=1) if as_json else runs.status_text(report))
    if any(step["troubles"] for step in report["steps"].values()):
        raise typer.Exit(RunIncomplete.exit_code)


@contextmanager
def _run_at(
    out: str, pipeline: str, config: Any, region: "Region", engine: str, address: str | None, *, retry: bool = False
) -> "Iterator[Run]":
    """An open run; when some of its tiles failed, an error that names them ends the command."""
    from rayseg.run import Engine, Run

    if engine not in {"ray", "inline"}:
        raise ConfigError(f"engine {engine!r} is unknown, expected ray or inline")
    where = Engine(engine, address, retry)
    with Run.open(out, pipeline=pipeline, config=config, region=region, engine=where) as run:
        yield run
    if run.troubles:
        named = [f"{step} {row} ({why})" for step, rows in run.troubles.items() for row, why in rows.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise RunIncomplete(
            f"{len(named)} tiles failed: {'; '.join(named[:5])}{more}; mend the cause, then: rayseg retry {out}"
        )


def _pipeline(name: str) -> "ModuleType":
    if name not in PIPELINES:
        raise ConfigError(f"pipeline {name!r} is unknown, expected one of: {', '.join(PIPELINES)}")
    return importlib.import_module(PIPELINES[name])


def _region(text: str) -> "Region":
    from rayseg.geo import Region
    from rayseg.io import catalog

    if text == "demo":
        from rayseg import demo

        return Region("demo", catalog=demo.ensure())
    return catalog.resolve_region(text)


@config_app.command("show")
def config_show(name: PipelineName, *, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Print the resolved configuration as YAML: defaults, then --config, then --set."""
    import yaml

    from rayseg.config import load

    resolved = load(_pipeline(name).Config, config, set_ or ())
    typer.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


@config_app.command("schema")
def config_schema(name: PipelineName) -> None:
    """Print the configuration's JSON schema: every key, its type, default and meaning."""
    typer.echo(json.dumps(_pipeline(name).Config.model_json_schema(), indent=1))


@config_app.command("validate")
def config_validate(name: PipelineName, *, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Check a configuration; exit code 2 and the key's path when something is wrong."""
    from rayseg.config import load

    load(_pipeline(name).Config, config, set_ or ())
    typer.echo("valid")
