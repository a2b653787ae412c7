"""Options that several commands share, and the regions that they name."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from rayseg.errors import ConfigError
from rayseg.pipelines import PIPELINES

if TYPE_CHECKING:
    from rayseg.geo.region import Region

REGIONS = (
    "demo, a name under stac/regions, a GeoJSON or GeoParquet file, west,south,east,north, catalog.json#collection, "
    "or a folder of images"
)
PipelineName = Annotated[str, typer.Argument(metavar="PIPELINE", help=f"One of: {', '.join(PIPELINES)}.")]
RegionName = Annotated[str, typer.Option("--region", help=f"{REGIONS}.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="YAML file with the settings that differ from the defaults.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, for example map.tile=1024; may be repeated.")
]
Out = Annotated[str, typer.Option("--out", help="Output folder, or a URL such as s3://bucket/run.")]
EngineName = Annotated[
    Literal["ray", "inline"], typer.Option("--engine", help="ray, or inline for this process alone.")
]
Tiles = Annotated[str | None, typer.Option("--tiles", help="Process only these tiles: comma-separated ids.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; default: RAY_ADDRESS, else a private Ray.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _allow(names: list[str] | None) -> None:
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
RunPrefix = Annotated[str, typer.Argument(help="The run's folder or URL.")]


class TakesRegion(TyperCommand):
    """A command whose argument is a region: -105,39,-104,40 is one, and no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's context
        """Read the arguments; a blank tells a box from an option."""
        return super().parse_args(ctx, [f" {arg}" if re.match(r"-\.?\d", arg) else arg for arg in args])


def region_of(text: str) -> "Region":
    """The region that --region names.

    Raises:
        ConfigError: the text names no region.
        DataError: a file that it names has no area.
    """
    from rayseg.geo.region import Region, resolve_region

    text = text.strip()
    if not text:
        raise ConfigError(f"the region is empty, expected {REGIONS}")
    if text == "demo":  # drawn on its first use, into the cache folder
        from rayseg.demo import make

        return Region("demo", catalog=make.ensure())
    return resolve_region(text)


def area_of(text: str, tiles: str | None = None) -> "Region":
    """A region or images, restricted to the tiles that --tiles names, with absolute paths.

    Folders and image files are images, everything else is a region; so is a folder with the name of a region.
    """
    from rayseg.geo.region import Region, region_names
    from rayseg.io import labels
    from rayseg.store import absolute

    text = text.strip()
    # A folder named like a region, for example ./demo, must not hide the region.
    named = text == "demo" or text in region_names()
    images = text and labels.is_images(text)
    area = Region(text, images=text) if images and not named else region_of(text)
    # run.json stores the area: it has to be valid when another folder is the working folder.
    return replace(
        area,
        catalog=area.catalog and absolute(area.catalog),
        images=area.images and absolute(area.images),
        tiles=tuple(filter(None, (tile.strip() for tile in (tiles or "").split(",")))),
    )
