"""The command line. Results go to stdout, everything else to stderr; heavy imports happen inside the commands."""

import importlib
import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from rayseg import __version__
from rayseg.errors import ConfigError, RaysegError, RunIncomplete, Stalled

if TYPE_CHECKING:
    from types import ModuleType

    from rayseg.config import Config
    from rayseg.geo import Region
    from rayseg.run import Run

PIPELINES = {"gpc": "rayseg.pipelines.gpc", "superpixel": "rayseg.pipelines.superpixel"}
ORDER = (
    "run", "status", "retry", "predict", "evaluate", "polygonize", "ingest", "models", "labels", "regions",
    "config", "env",
)  # fmt: skip
MODULES = PIPELINES | {"predict": "rayseg.pipelines.predict"}


class _Door(TyperGroup):
    """Where errors leave: one sentence and the error's exit code; the traceback only with -v."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        except _errors() as error:
            from rayseg.store import sentence

            if ctx.params.get("verbose"):
                traceback.print_exc()
            typer.echo(f"rayseg: {' '.join(sentence(error).split())}", err=True)
            if isinstance(error, Stalled):
                os._exit(error.exit_code)  # a thread hangs; Python would wait for it for ever
            raise typer.Exit(getattr(error, "exit_code", 1)) from None

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The commands in the order they are needed."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def _errors() -> tuple[type[Exception], ...]:
    from rayseg.store import STORE_ERRORS  # asked for when there is an error: it takes time to import

    return RaysegError, *STORE_ERRORS


app = typer.Typer(cls=_Door, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
run_app = typer.Typer(no_args_is_help=True, help="Run a pipeline over a region.")
ingest_app = typer.Typer(no_args_is_help=True, help="Describe images as a STAC catalogue.")
models_app = typer.Typer(no_args_is_help=True, help="List and show trained models (bundles).")
labels_app = typer.Typer(no_args_is_help=True, help="Give the labels of an unsupervised run a meaning.")
config_app = typer.Typer(no_args_is_help=True, help="Show, describe and check a pipeline's configuration.")
app.add_typer(run_app, name="run")
app.add_typer(ingest_app, name="ingest")
app.add_typer(models_app, name="models")
app.add_typer(labels_app, name="labels")
app.add_typer(config_app, name="config")

REGIONS = (
    "demo, a name under stac/regions, a GeoJSON or GeoParquet file, west,south,east,north, or catalog.json#collection"
)
PipelineName = Annotated[str, typer.Argument(metavar="PIPELINE", help=f"One of: {', '.join(PIPELINES)}.")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with what differs from the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One value, for example segmenter.batch=4; may be repeated.")
]
Out = Annotated[str, typer.Option("--out", help="Where results go: a folder, or s3:// or another URL.")]
EngineName = Annotated[
    Literal["ray", "inline"], typer.Option("--engine", help="ray, or inline for this process alone.")
]
Tiles = Annotated[str | None, typer.Option("--tiles", help="Only these tiles: comma-separated ids.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster to join; default: RAY_ADDRESS, else none.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rayseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Map a land-cover class over a whole region from little or no labelled data."""


@run_app.callback()
def _run() -> None:
    """Run a pipeline over a region."""


@run_app.command("pipeline")
def run_pipeline(
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
) -> None:
    """Run a pipeline over a region; given again, it goes on where it stopped."""
    from rayseg.config import load
    from rayseg.geo import slug

    module = _pipeline(name)
    resolved = load(module.Config, config, set_ or ())
    area = _only(_region(region), tiles)
    with _run_at(out or f"runs/{name}-{slug(region)}", name, resolved, area, engine, address) as run:
        typer.echo(module.run(resolved, run, area))


def _only(region: "Region", tiles: str | None) -> "Region":
    """The region with the tiles that --tiles names, all of them without; as it is understood from any folder."""
    from rayseg.store import absolute

    return replace(
        region,
        catalog=region.catalog and absolute(region.catalog),
        images=region.images and absolute(region.images),
        tiles=tuple(filter(None, (tile.strip() for tile in (tiles or "").split(",")))),
    )


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
    if report["status"] != "running" and any(step["troubles"] for step in report["steps"].values()):
        raise typer.Exit(RunIncomplete.exit_code)


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
    from rayseg.run import Engine, Run

    where = Engine(engine, address, retry)
    refuse = getattr(_pipeline(pipeline), "check", None)
    check = partial(refuse, config, region) if refuse else None
    with Run.open(out, pipeline=pipeline, config=config, region=region, engine=where, check=check) as run:
        yield run
    if run.troubles:
        named = [f"{step} {row} ({why})" for step, rows in run.troubles.items() for row, why in rows.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        counted = f"{len(named)} tile{'s' * (len(named) > 1)} failed"
        raise RunIncomplete(f"{counted}: {'; '.join(named[:5])}{more}; mend the cause, then: rayseg retry {out}")


def _pipeline(name: str) -> "ModuleType":
    if name not in MODULES:
        raise ConfigError(f"pipeline {name!r} is unknown, expected one of: {', '.join(PIPELINES)}")
    return importlib.import_module(MODULES[name])


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


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Prefix of a bundle, for example runs/demo/models/segmenter.")],
    source: Annotated[str, typer.Argument(help=f"An image, a folder of images, or a region: {REGIONS}.")],
    *,
    out: Out,
    set_: Overrides = None,
    engine: EngineName = "ray",
    address: Address = None,
    tiles: Tiles = None,
) -> None:
    """Predict with a trained model over images, a catalogue or a region."""
    from rayseg.config import load

    module = _pipeline("predict")
    resolved = load(module.Config, None, [f"model={model}", *(set_ or ())])
    area = _only(_images_or_region(source), tiles)
    with _run_at(out, "predict", resolved, area, engine, address) as run:
        typer.echo(module.run(resolved, run, area))


def _images_or_region(text: str) -> "Region":
    """Folders and image files are images, everything else is a region."""
    from rayseg.geo import Region
    from rayseg.io import labels

    return Region(text, images=text) if labels.is_images(text) else _region(text)


@app.command()
def evaluate(
    prediction: Annotated[str, typer.Argument(help="A run, a folder of masks, or catalog.json#collection.")],
    truth: Annotated[
        str, typer.Argument(help="A folder of masks (index, palette or RGB), or catalog.json#collection.")
    ],
    *,
    classes: Annotated[str | None, typer.Option(help="YAML class table; default: the classes of the run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Compare a prediction with reference masks: accuracy, IoU and F1 with 95 % intervals."""
    from rayseg import evaluation

    result = evaluation.evaluate(prediction, truth, classes=classes)
    typer.echo(json.dumps(result, indent=1) if as_json else evaluation.text(result))


@app.command()
def polygonize(
    raster: Annotated[str, typer.Argument(help="A class raster (one band of uint8), or a run.")],
    *,
    out: Annotated[str, typer.Option("--out", help="A .parquet or .geojson file.")],
) -> None:
    """Turn a class raster or a run's tiles into polygons in EPSG:4326 with areas in m2."""
    from rayseg.io import vectors

    typer.echo(f"{vectors.polygonize(raster, out)} polygons in {out}")


@ingest_app.command("folder")
def ingest_folder(
    folder: Annotated[str, typer.Argument(help="Folder of images; with --labels folder, one folder per class.")],
    *,
    out: Out,
    labels: Annotated[str | None, typer.Option(help="folder: the class is the name of the folder.")] = None,
) -> None:
    """Describe a folder of images, georeferenced or not, as a STAC catalogue; nothing is copied."""
    from rayseg.io import labels as io_labels

    typer.echo(io_labels.ingest_folder(folder, out, labels=labels))


@ingest_app.command("rasters")
def ingest_rasters(
    paths: Annotated[list[str], typer.Argument(help="Georeferenced rasters, or folders of them.")],
    *,
    out: Out,
) -> None:
    """Describe georeferenced rasters as the imagery of a STAC catalogue; nothing is copied."""
    from rayseg.io import labels as io_labels

    typer.echo(io_labels.ingest_rasters(paths, out))


@ingest_app.command("xyz")
def ingest_xyz(
    url: Annotated[str, typer.Option("--url", help="Template such as https://host/{z}/{x}/{y}.png.")],
    *,
    region: Annotated[str | None, typer.Option(help=f"{REGIONS}.")] = None,
    chips: Annotated[str | None, typer.Option(help="Polygons (GeoJSON, GeoParquet): one chip for each.")] = None,
    resolution: Annotated[float, typer.Option(help="Pixel size in metres of EPSG:3857.")] = 1.0,
    label: Annotated[
        str | None, typer.Option(help="Column with the chips' labels; default: label, where there is one.")
    ] = None,
    attribution: Annotated[str | None, typer.Option(help="Whom the imagery is owed to.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="How tiles are asked for, for example concurrency=4 or tile_size=512."),
    ] = None,
    out: Out,
) -> None:
    """Fetch web-map tiles as GeoTIFF scenes or chips with STAC items; what is there already is not fetched again."""
    from rayseg.config import load
    from rayseg.io import webmap, xyz

    catalogue = xyz.ingest_xyz(
        url,
        out,
        geometry=_region(region).geometry if region else None,
        chips=chips,
        label=label,
        resolution=resolution,
        attribution=attribution,
        fetching=load(webmap.Fetching, None, set_ or ()),
    )
    typer.echo(catalogue)


@labels_app.callback()
def _labels() -> None:
    """Give the labels of an unsupervised run a meaning."""


@labels_app.command("assign")
def labels_assign(
    run: Annotated[str, typer.Argument(help="A run of the pipeline superpixel.")],
    *,
    csv: Annotated[str, typer.Option("--csv", help="Table with the columns label,class (and scene, color).")],
    out: Annotated[str | None, typer.Option("--out", help="Where the masks go; default: RUN/assigned.")] = None,
) -> None:
    """Write a class map from a run's labels: masks to look at, to measure with, or to train on."""
    from rayseg.io import assigned

    found = assigned.assign(run, csv, out or f"{run}/assigned")
    said = ", ".join(f"{name} {pixels:,} px" for name, pixels in found["classes"].items())
    typer.echo(f"{found['catalog']}#classes: {said}; {found['unassigned']:,} px without a class")


@models_app.command("list")
def models_list(
    prefixes: Annotated[list[str] | None, typer.Argument(help="Where to look; default: runs.")] = None,
) -> None:
    """List the bundles under some folders or URLs."""
    from rayseg.models import bundle

    models = list(bundle.find(prefixes or ["runs"]))
    if not models:
        typer.echo(f"no models below {', '.join(prefixes or ['runs'])}", err=True)
    for prefix, found in models:
        typer.echo(
            f"{prefix}  {found.task}  {found.architecture.options.get('encoder', '')}  {_measures(found.metrics)}"
        )


@models_app.command("show")
def models_show(prefix: Annotated[str, typer.Argument(help="Prefix of the bundle.")]) -> None:
    """Print a bundle: classes, bands, scaling, metrics, where it comes from."""
    from rayseg.models import bundle

    typer.echo(bundle.load(prefix).model_dump_json(indent=1))


def _measures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


@app.command()
def regions() -> None:
    """List what --region can name."""
    from rayseg.io import catalog

    typer.echo("demo  two drawn scenes of 2048 x 2048 px at 1 m with chips and truth")
    for name, described in catalog.named_regions().items():
        typer.echo(f"{name}  {described}")


@app.command()
def env() -> None:
    """Print versions, devices and where things are kept, for bug reports."""
    import platform

    import torch

    from rayseg.run import versions
    from rayseg.store import cache_dir

    for name, version in versions().items():
        typer.echo(f"{name:28} {version}")
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    typer.echo(f"{'platform':28} {platform.platform()}")
    typer.echo(f"{'CPUs':28} {os.cpu_count()}")
    typer.echo(f"{'GPUs':28} {', '.join(gpus) or 'none'}")
    typer.echo(f"{'cache':28} {cache_dir()}")
