"""What the commands share: their words, and what these name."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayseg.errors import ConfigError
from rayseg.pipelines import PIPELINES

if TYPE_CHECKING:
    from rayseg.geo.region import Region

REGIONS = (
    "demo, a name under stac/regions, a GeoJSON or GeoParquet file, west,south,east,north, catalog.json#collection, "
    "or a folder of images"
)
PipelineName = Annotated[str, typer.Argument(metavar="PIPELINE", help=f"One of: {', '.join(PIPELINES)}.")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with what differs from the defaults.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One value, for example map.tile=1024; may be repeated.")
]
Out = Annotated[str, typer.Option("--out", help="Where results go: a folder, or s3:// or another URL.")]
EngineName = Annotated[
    Literal["ray", "inline"], typer.Option("--engine", help="ray, or inline for this process alone.")
]
Tiles = Annotated[str | None, typer.Option("--tiles", help="Only these tiles: comma-separated ids.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster to join; default: RAY_ADDRESS, else none.")]


def region_of(text: str) -> "Region":
    """What --region names."""
    from rayseg.geo.region import Region, resolve_region

    if not text.strip():
        raise ConfigError(f"the region is empty, expected {REGIONS}")
    if text == "demo":
        from rayseg.demo import make

        return Region("demo", catalog=make.ensure())
    return resolve_region(text)


def images_or_region(text: str) -> "Region":
    """Folders and image files are images, everything else is a region; so is a folder with a region's name."""
    from rayseg.geo.region import Region, region_names
    from rayseg.io import labels

    named = text == "demo" or text in region_names()
    images = text.strip() and labels.is_images(text)
    return Region(text, images=text) if images and not named else region_of(text)


def only(region: "Region", tiles: str | None) -> "Region":
    """The region with the tiles that --tiles names, all of them without; as it is understood from any folder."""
    from rayseg.store import absolute

    return replace(
        region,
        catalog=region.catalog and absolute(region.catalog),
        images=region.images and absolute(region.images),
        tiles=tuple(filter(None, (tile.strip() for tile in (tiles or "").split(",")))),
    )
