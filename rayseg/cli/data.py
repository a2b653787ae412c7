"""`rayseg ingest`, `labels`, `evaluate`, `polygonize`: imagery and labels in, maps measured and turned into shapes."""

import json
from typing import Annotated

import typer

from rayseg.cli.options import REGIONS, Out, region_of

app = typer.Typer()
ingest_app = typer.Typer(no_args_is_help=True, help="Describe images as a STAC catalogue.")
labels_app = typer.Typer(no_args_is_help=True, help="Plots out to annotation tools and back; names for labels.")
app.add_typer(ingest_app, name="ingest")
app.add_typer(labels_app, name="labels")


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
        geometry=region_of(region).geometry if region else None,
        chips=chips,
        label=label,
        resolution=resolution,
        attribution=attribution,
        fetching=load(webmap.Fetching, None, set_ or ()),
    )
    typer.echo(catalogue)


@labels_app.command("export")
def labels_export(
    run: Annotated[str, typer.Argument(help="A run of agri, or its plots.parquet.")],
    images: Annotated[str, typer.Argument(help="The folder of the images it was run on.")],
    *,
    out: Out,
) -> None:
    """Write the plots of every image as a LabelMe JSON: label 1 (cultivated) or 0; holes are shapes flagged so."""
    from rayseg.io import labelme

    typer.echo(f"{labelme.export(run, images, out)} images in {out}")


@labels_app.command("import")
def labels_import(
    folder: Annotated[str, typer.Argument(help="Folder of LabelMe or X-AnyLabeling JSONs, or of masks for a run.")],
    images: Annotated[
        str, typer.Argument(help="The folder of the JSONs' images, or the run of al-s4gan that waits for the masks.")
    ],
    *,
    out: Annotated[str | None, typer.Option("--out", help="Where the plots of JSONs go.")] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of a plot's crop in px.")] = 224,
) -> None:
    """Take labels back: masks into the run that asked for them, or labelled plots cut out of their images."""
    from rayseg.errors import ConfigError
    from rayseg.io import annotation_requests, labelme
    from rayseg.store import upath

    if (upath(images) / "run.json").exists():
        taken, waiting = annotation_requests.load(folder, images)
        more = f", {len(waiting)} chips still wait: {', '.join(waiting[:5])}" if waiting else ", none is missing"
        typer.echo(f"{taken} masks taken into {images}{more}")
        return
    if out is None:
        raise ConfigError(f"{images} is no run, so these are labelled plots: say with --out where they go")
    counts = labelme.load(folder, images, out, size=size)
    typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {out}")


@labels_app.command("assign")
def labels_assign(
    run: Annotated[str, typer.Argument(help="A run of the pipeline superpixel.")],
    *,
    csv: Annotated[str, typer.Option("--csv", help="Table with the columns label,class (and scene, color).")],
    out: Annotated[str | None, typer.Option("--out", help="Where the masks go; default: RUN/assigned.")] = None,
) -> None:
    """Write a class map from a run's labels: masks to look at, to measure with, or to train on."""
    from rayseg.io import label_names

    found = label_names.assign(run, csv, out or f"{run}/assigned")
    said = ", ".join(f"{name} {pixels:,} px" for name, pixels in found["classes"].items())
    typer.echo(f"{found['catalog']}#classes: {said}; {found['unassigned']:,} px without a class")


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
    from rayseg.steps import evaluate

    result = evaluate.evaluate(prediction, truth, classes=classes)
    typer.echo(json.dumps(result, indent=1) if as_json else evaluate.text(result))


@app.command()
def polygonize(
    raster: Annotated[str, typer.Argument(help="A class raster (one band of uint8), or a run.")],
    *,
    out: Annotated[str, typer.Option("--out", help="A .parquet or .geojson file.")],
) -> None:
    """Turn a class raster or a run's tiles into polygons in EPSG:4326 with areas in m2."""
    from rayseg.io import vectors

    typer.echo(f"{vectors.polygonize(raster, out)} polygons in {out}")
