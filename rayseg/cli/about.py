"""`rayseg config`, `models`, `regions`, `env`: what there is."""

import json
import os
from typing import Annotated, Literal

import typer

from rayseg.cli.options import ConfigFile, Out, Overrides, PipelineName
from rayseg.pipelines import pipeline_of

app = typer.Typer()
models_app = typer.Typer(no_args_is_help=True, help="List and show trained models (bundles).")
config_app = typer.Typer(no_args_is_help=True, help="Show, describe and check a pipeline's configuration.")
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(name: PipelineName, *, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Print the resolved configuration as YAML: defaults, then --config, then --set."""
    import yaml

    from rayseg.config import load

    resolved = load(pipeline_of(name).Config, config, set_ or ())
    typer.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


@config_app.command("schema")
def config_schema(name: PipelineName) -> None:
    """Print the configuration's JSON schema: every key, its type, default and meaning."""
    typer.echo(json.dumps(pipeline_of(name).Config.model_json_schema(), indent=1))


@config_app.command("validate")
def config_validate(name: PipelineName, *, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Check a configuration's keys and values; exit code 2 and the key's path when something is wrong.

    Names of networks, weights and what has to fit the imagery are looked at by `plan` and `run`, before any work.
    """
    from rayseg.config import load

    load(pipeline_of(name).Config, config, set_ or ())
    typer.echo("valid")


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
        parts = (
            prefix,
            found.task,
            str(found.architecture.options.get("encoder", "")),
            "/".join(name for _, name, _ in found.classes),
            _measures(found.metrics),
        )
        typer.echo("  ".join(filter(None, parts)))


@models_app.command("show")
def models_show(prefix: Annotated[str, typer.Argument(help="Prefix of the bundle.")]) -> None:
    """Print a bundle: classes, bands, scaling, metrics, where it comes from."""
    from rayseg.models import bundle

    typer.echo(bundle.load(prefix).model_dump_json(indent=1))


@models_app.command("import-sam")
def models_import_sam(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of segment-anything, or random to try the path.")],
    *,
    out: Out,
    variant: Annotated[Literal["vit_b", "vit_l", "vit_h"], typer.Option(help="Which model it is.")] = "vit_h",
) -> None:
    """Write a checkpoint of Segment Anything as a bundle, for `rayseg serve`."""
    from rayseg.models.sam import SamConfig
    from rayseg.models.sam_bundle import save_sam

    typer.echo(f"{save_sam(SamConfig(variant=variant, checkpoint=checkpoint), out).name} in {out}")


def _measures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


@app.command()
def regions() -> None:
    """List what --region can name."""
    from rayseg.geo.region import named_regions

    typer.echo("demo  two drawn scenes of 2048 x 2048 px at 1 m with chips and truth")
    for name, described in named_regions().items():
        typer.echo(f"{name}  {described}")


@app.command()
def env() -> None:
    """Print versions, devices and where things are kept, for bug reports."""
    import platform

    import torch

    from rayseg.engine.run import versions
    from rayseg.store import cache_dir

    for name, version in versions().items():
        typer.echo(f"{name:28} {version}")
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    typer.echo(f"{'platform':28} {platform.platform()}")
    typer.echo(f"{'CPUs':28} {os.cpu_count()}")
    typer.echo(f"{'GPUs':28} {', '.join(gpus) or 'none'}")
    typer.echo(f"{'cache':28} {cache_dir()}")
