"""`rayseg config`, `models`, `regions`, `env`: configurations, bundles, regions and the environment."""

import json
import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayseg.cli.options import AsJson, ConfigFile, Out, Overrides
from rayseg.pipelines import COMMANDS, PIPELINES, pipeline_of

if TYPE_CHECKING:
    from rayseg.config import Config

ConfigName = Annotated[
    str, typer.Argument(metavar="PIPELINE", help=f"One of: {', '.join((*PIPELINES, *COMMANDS, 'refresh'))}.")
]

app = typer.Typer()
models_app = typer.Typer(no_args_is_help=True, help="List, show and import trained models (bundles).")
config_app = typer.Typer(no_args_is_help=True, help="Show, describe and check a pipeline's configuration.")
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")


@config_app.command("list")
def config_list() -> None:
    """List the configurations that --config knows by name, each with the first line of its file."""
    from rayseg.config import named_configs

    named = named_configs()
    for name, file in named.items():
        first = file.read_text().partition("\n")[0]
        typer.echo(f"{name:{max(map(len, named))}}  {first.removeprefix('#').strip()}")


@config_app.command("show")
def config_show(name: ConfigName, *, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Print the resolved configuration as YAML with a comment for each key: defaults, then --config, then --set."""
    from rayseg.config import commented, load, read_values

    kind = _config_of(name)
    # What only a command line can know is shown as an empty value.
    given = {*(read_values(config) if config else ()), *(text.partition("=")[0] for text in set_ or ())}
    empty = [f"{key}=''" for key, field in kind.model_fields.items() if field.is_required() and key not in given]
    typer.echo(commented(load(kind, config, [*empty, *(set_ or ())])), nl=False)


@config_app.command("schema")
def config_schema(name: ConfigName) -> None:
    """Print the configuration's JSON schema: every key with its type, default and meaning."""
    typer.echo(json.dumps(_config_of(name).model_json_schema(), indent=1))


@config_app.command("validate")
def config_validate(name: ConfigName, *, config: ConfigFile = None, set_: Overrides = None) -> None:
    """Check a configuration's keys and values; exit code 2 and the key's path if one is wrong.

    `plan` and `run` check the names of networks and weights, and the settings that have to fit the imagery.
    """
    from rayseg.config import load

    load(_config_of(name), config, set_ or ())
    typer.echo("valid")


def _config_of(name: str) -> type["Config"]:
    kind: type[Config] = pipeline_of("predict" if name == "refresh" else name).Config  # refresh is a run of predict
    return kind


@models_app.command("list")
def models_list(
    prefixes: Annotated[list[str] | None, typer.Argument(help="Folders or URLs to search; default: runs.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """List the bundles below folders or URLs."""
    from rayseg.models import bundle

    models = list(bundle.find(prefixes or ["runs"]))
    if as_json:
        rows = [{"prefix": prefix, **model.model_dump(mode="json", exclude={"statistics"})} for prefix, model in models]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not models:
        typer.echo(f"no models below {', '.join(prefixes or ['runs'])}", err=True)
    for prefix, model in models:
        # Empty columns are left out: not every bundle has an encoder or metrics.
        columns = (
            prefix,
            model.task,
            str(model.architecture.options.get("encoder", "")),
            "/".join(name for _, name, _ in model.classes),
            ", ".join(f"{name} {value:.3f}" for name, value in model.metrics.items()),
        )
        typer.echo("  ".join(filter(None, columns)))


@models_app.command("show")
def models_show(prefix: Annotated[str, typer.Argument(help="Prefix of the bundle.")]) -> None:
    """Print a bundle: classes, bands, scaling, metrics, origin."""
    from rayseg.models import bundle

    # Hundreds of windows would push everything else off the screen.
    hidden = {"statistics": {"features"}}
    typer.echo(bundle.description(prefix).model_dump_json(indent=1, exclude=hidden))


@models_app.command("weights")
def models_weights() -> None:
    """List pretrained weights of encoders: for which, from where, their size, licence and expected input.

    The first two columns are values of the keys `weights` and `encoder` of a network.
    """
    from rayseg.models.pretrained_weights import HEADER, listed

    rows = [HEADER, *listed()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@models_app.command("import")
def models_import(
    kind: Annotated[
        str,
        typer.Argument(
            help="gpc-classifier, gpc-segmenter, landcover, al-classifier, s4gan, plots; or segmenter, classifier for "
            "state dicts of segmentation_models_pytorch, timm and torchvision."
        ),
    ],
    checkpoint: Annotated[str, typer.Argument(metavar="FILE", help="Checkpoint or state dict; a path or URL.")],
    *,
    out: Out,
    set_: Overrides = None,
) -> None:
    """Write weights that another code trained as a bundle; prints what was loaded, what was dropped, and why.

    --set segmenter.encoder=NAME, classes=TABLE, scaling=... describe a network that differs from its kind's.
    """
    from rayseg.steps.imports import import_model

    for line in import_model(kind, checkpoint, out, set_ or ()):
        typer.echo(line)


@models_app.command("import-sam")
def models_import_sam(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of segment-anything, or random for a test.")],
    *,
    out: Out,
    variant: Annotated[Literal["vit_b", "vit_l", "vit_h"], typer.Option(help="Size of its encoder.")] = "vit_h",
) -> None:
    """Write a checkpoint of Segment Anything as a bundle, for `rayseg serve`."""
    from rayseg.models.sam import SamConfig
    from rayseg.models.sam_bundle import save_sam

    typer.echo(f"{save_sam(SamConfig(variant=variant, checkpoint=checkpoint), out).name} in {out}")


@app.command()
def regions() -> None:
    """List the regions that --region knows by name."""
    from rayseg.geo.region import named_regions

    typer.echo("demo  two synthetic scenes of 2048 x 2048 px at 1 m with chips and reference masks")
    for name, described in named_regions().items():
        typer.echo(f"{name}  {described}")


@app.command()
def env() -> None:
    """Print versions, devices and the cache folder, for bug reports."""
    import platform

    import torch

    from rayseg.engine.run import versions
    from rayseg.store import cache_dir

    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    rows = versions() | {
        "platform": platform.platform(),
        "CPUs": os.cpu_count(),
        "GPUs": ", ".join(gpus) or "none",
        "cache": cache_dir(),
    }
    for name, value in rows.items():
        typer.echo(f"{name:28} {value}")
