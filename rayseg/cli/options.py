"""Options that several commands share."""

import re
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from rayseg.api.running import REGIONS
from rayseg.pipelines import PIPELINES

PipelineName = Annotated[str, typer.Argument(metavar="PIPELINE", help=f"One of: {', '.join(PIPELINES)}.")]
RegionName = Annotated[str, typer.Option("--region", help=f"{REGIONS}.")]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="YAML file with settings that differ from the defaults, or a name of `config list`.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, for example map.tile=1024; may be repeated.")
]
Out = Annotated[str, typer.Option("--out", help="Output folder, or a URL such as s3://bucket/run.")]
EngineName = Annotated[
    Literal["ray", "inline"], typer.Option("--engine", help="ray, or inline for this process alone.")
]
Tiles = Annotated[str | None, typer.Option("--tiles", help="Process only these tiles: comma-separated ids.")]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="LIMIT",
        help="Exit with code 5 unless a number of certificate.json or metrics.json keeps a limit, for example "
        "'certificate.shift<0.03'; may be repeated.",
    ),
]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; default: RAY_ADDRESS, else a private Ray.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _allow(names: list[str] | None) -> None:
    # Through the environment, because worker processes open files too.
    from rayseg.store import allow_drivers

    allow_drivers(names or ())


AllowDriver = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-driver",
        metavar="NAME",
        callback=_allow,
        help="GDAL driver that may open files too, for example netCDF; may be repeated.",
    ),
]

Bands = Annotated[
    str | None,
    typer.Option("--bands", metavar="NAMES", help="Names of all bands in their order, such as red,green,blue,nir."),
]
RunPrefix = Annotated[str, typer.Argument(help="The run's folder or URL.")]


class TakesRegion(TyperCommand):
    """A command whose argument is a region: -105,39,-104,40 is a region, not an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's context
        """Read the arguments; a blank in front marks a box, which is not an option."""
        return super().parse_args(ctx, [f" {arg}" if re.match(r"-\.?\d", arg) else arg for arg in args])
