"""`rayseg ingest`, `labels`, `evaluate`, `polygonize`: read imagery and labels, evaluate maps, write polygons."""

import json
from contextlib import suppress
from typing import Annotated, Any

import typer

from rayseg.api.running import REGIONS, region_of
from rayseg.cli.options import AllowDriver, AsJson, Bands, Out, RunPrefix
from rayseg.errors import ConfigError, DataError, listed

app = typer.Typer()
ingest_app = typer.Typer(no_args_is_help=True, help="Describe images as a STAC catalogue.")
labels_app = typer.Typer(no_args_is_help=True, help="Export plots to annotation tools, import and name labels.")
app.add_typer(ingest_app, name="ingest")
app.add_typer(labels_app, name="labels")
area_app = typer.Typer(no_args_is_help=True, help="Estimate areas and accuracies of a map from a labelled sample.")
app.add_typer(area_app, name="area")


@ingest_app.command("folder")
def ingest_folder(
    folder: Annotated[str, typer.Argument(help="Folder of images; with --labels folder, one folder per class.")],
    *,
    out: Out,
    labels: Annotated[str | None, typer.Option(help="folder: the class of an image is the name of its folder.")] = None,
    bands: Bands = None,
    as_json: AsJson = False,
    allow_driver: AllowDriver = None,
) -> None:
    """Describe a folder of images, georeferenced or not, as a STAC catalogue; nothing is copied."""
    from rayseg.io import labels as io_labels

    _ingested(io_labels.ingest_folder(folder, out, labels=labels, bands=_names(bands)), as_json=as_json)


@ingest_app.command("rasters")
def ingest_rasters(
    paths: Annotated[list[str], typer.Argument(help="Georeferenced rasters, or folders of them.")],
    *,
    out: Out,
    bands: Bands = None,
    as_json: AsJson = False,
    allow_driver: AllowDriver = None,
) -> None:
    """Describe georeferenced rasters as the imagery of a STAC catalogue; nothing is copied."""
    from rayseg.io import labels as io_labels

    _ingested(io_labels.ingest_rasters(paths, out, bands=_names(bands)), as_json=as_json)


@ingest_app.command("xyz")
def ingest_xyz(
    url: Annotated[str, typer.Option("--url", help="Template such as https://host/{z}/{x}/{y}.png.")],
    *,
    region: Annotated[str | None, typer.Option(help=f"{REGIONS}.")] = None,
    chips: Annotated[str | None, typer.Option(help="Polygons (GeoJSON or GeoParquet): one chip per polygon.")] = None,
    resolution: Annotated[float, typer.Option(help="Pixel size in metres of EPSG:3857.")] = 1.0,
    label: Annotated[
        str | None, typer.Option(help="Column with the labels of the chips; default: label, if it exists.")
    ] = None,
    attribution: Annotated[str | None, typer.Option(help="Attribution text of the imagery.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting of the requests, for example tile_size=512; may be repeated."),
    ] = None,
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Fetch web-map tiles as GeoTIFF scenes or chips with STAC items; finished files are not fetched again."""
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
        # The same reader as for pipelines, so that errors name the key.
        fetching=load(webmap.Fetching, None, set_ or ()),
    )
    _ingested(catalogue, as_json=as_json)


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _ingested(catalog: str, *, as_json: bool) -> None:
    """Print the catalogue's path, and on stderr what the next command needs of each collection; or all as JSON."""
    from rayseg.io import stac_catalog, stac_read
    from rayseg.io.output_grids import overlap_note
    from rayseg.io.sources import name_of_crs

    if not as_json:
        typer.echo(catalog)
    collections: dict[str, dict[str, Any]] = {}
    for name in stac_catalog.collections_of(catalog)[0]:
        sources = []
        for item in stac_read.open_items(catalog, name):
            with suppress(DataError):  # one that cannot be read has been named when it was described
                sources.append(stac_read.source_of(item))
        if not sources:
            continue
        collections[name] = {
            "images": len(sources),
            "crs": sorted({name_of_crs(source.crs or "no CRS") for source in sources}),
            "pixel": sorted({float(f"{abs(source.transform[0]):.6g}") for source in sources}),
            "bands": sorted({", ".join(source.bands) for source in sources}),
            "dtype": sorted({source.dtype for source in sources}),
            "overlap": overlap_note(sources) if name != "chips" else "",
        }
    if as_json:
        typer.echo(json.dumps({"catalog": catalog, "collections": collections}, indent=1))
        return
    for name, facts in collections.items():
        use = "chips.source=" if name == "chips" else "--region "
        crs, bands, dtype = (" and ".join(facts[key]) for key in ("crs", "bands", "dtype"))
        pixels = " to ".join(f"{size:g}" for size in dict.fromkeys([facts["pixel"][0], facts["pixel"][-1]]))
        line = f"{use}{catalog}#{name}: {facts['images']} images, {crs}, pixels of {pixels}, bands {bands} ({dtype})"
        typer.echo(f"{line}\n{facts['overlap']}".rstrip(), err=True)


@labels_app.command("export")
def labels_export(
    run: Annotated[str, typer.Argument(help="A run of agri, or its plots.parquet.")],
    images: Annotated[
        str | None, typer.Argument(help="Folder of the images that the run mapped; default: those of the run.")
    ] = None,
    *,
    out: Out,
) -> None:
    """Write the plots of every image as a LabelMe JSON: label 1 (cultivated) or 0; holes have the flag hole."""
    from rayseg.io import labelme

    typer.echo(f"{labelme.export(run, images or run, out)} images in {out}")


@labels_app.command("import")
def labels_import(
    folder: Annotated[str, typer.Argument(help="Folder of LabelMe or X-AnyLabeling JSONs, or of masks for a run.")],
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of the images of the JSONs; or the run of agri that the plots are from, or of al-s4gan that "
            "requested the masks."
        ),
    ],
    *,
    out: Annotated[str | None, typer.Option("--out", help="Output folder for the plots of JSONs.")] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the crop of a plot in pixels.")] = 224,
) -> None:
    """Import labels: masks into the run that requested them, or labelled plots as crops of their images."""
    from rayseg.engine.run import read
    from rayseg.io import annotation_requests, labelme
    from rayseg.io.labels import ingest_folder
    from rayseg.store import upath

    # The second argument distinguishes labels of the plots of a run, masks that a run requested, and JSONs alone.
    if (upath(images) / "run.json").exists() and read(images)["pipeline"] == "agri":
        counts = labelme.load(folder, images, f"{images}/labelled/crops", size=size)
        ingest_folder(f"{images}/labelled/crops", f"{images}/labelled", labels="folder")
        typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()) + f": chips.source={images}#plots")
        return
    if (upath(images) / "run.json").exists():
        count, missing = annotation_requests.load(folder, images)
        more = f", {len(missing)} chips without a mask: {listed(missing)}" if missing else ", none is missing"
        typer.echo(f"{count} masks imported into {images}{more}")
        return
    if out is None:
        raise ConfigError(f"{images} is not a run, so the JSONs are labelled plots; give --out for their crops")
    # Plots have no run: their crops are a data set of their own.
    counts = labelme.load(folder, images, out, size=size)
    typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {out}")


@labels_app.command("masks")
def labels_masks(
    drawn: Annotated[str, typer.Argument(help="Folder of LabelMe or X-AnyLabeling JSONs, or a COCO JSON file.")],
    images: Annotated[str, typer.Argument(help="Folder of the images.")],
    *,
    out: Out,
    classes: Annotated[
        str | None, typer.Option(help="YAML class table or its name; default: background, and the labels by name.")
    ] = None,
) -> None:
    """Draw labelled polygons into class masks, which training and evaluation take."""
    from rayseg.io import drawn_masks
    from rayseg.io.class_tables import read_table

    counts = drawn_masks.write_masks(drawn, images, out, table=read_table(classes) if classes else None)
    typer.echo(f"{out}: " + ", ".join(f"{name} {pixels:,} px" for name, pixels in counts.items()))


@labels_app.command("assign")
def labels_assign(
    run: Annotated[str, typer.Argument(help="A run of the pipeline superpixel.")],
    *,
    csv: Annotated[str, typer.Option("--csv", help="Table with the columns label,class (and scene, color).")],
    out: Annotated[str | None, typer.Option("--out", help="Output folder or URL; default: RUN/assigned.")] = None,
) -> None:
    """Write class masks from the unsupervised labels of a run: for viewing, evaluation or training."""
    from rayseg.io import label_names
    from rayseg.steps.numbers import area

    result = label_names.assign(run, csv, out or f"{run}/assigned")
    if result["areas"] is not None:
        sizes, rest = {name: area(m2) for name, m2 in result["areas"].items()}, area(result["unassigned_m2"])
    else:
        sizes, rest = ({name: f"{px:,} px" for name, px in result["classes"].items()}, f"{result['unassigned']:,} px")
    listing = ", ".join(f"{name} {size}" for name, size in sizes.items())
    typer.echo(f"{result['catalog']}#classes: {listing}; {rest} without a class")


@app.command()
def evaluate(
    prediction: Annotated[
        str, typer.Argument(help="A run, a folder of masks, catalog.json#collection, or a classes.csv.")
    ],
    truth: Annotated[
        str | None,
        typer.Argument(
            help="A folder of masks (classes, or ids of plots), catalog.json#collection, or a file of polygons. Of a "
            "classifier: labelled chips, a folder per class, or a CSV with the columns id and label. Left out only "
            "with --checkpoints."
        ),
    ] = None,
    *,
    classes: Annotated[str | None, typer.Option(help="YAML class table; default: the classes of the run.")] = None,
    plots: Annotated[
        bool | None,
        typer.Option(
            "--plots/--classes-only",
            help="Compare plots one by one. Default: if a run of agri meets polygons, or masks without classes.",
        ),
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Compare labels without names: AMI, FMI and ARE of two rasters.")
    ] = False,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="Measure all weights that the run's trainings kept (learning.keep_every), on the masks, or on what "
            "the run set apart: RUN/checkpoints/table.csv and curve.svg.",
        ),
    ] = False,
    as_json: AsJson = False,
    allow_driver: AllowDriver = None,
) -> None:
    """Compare a map with masks, plots with plots, or classes with labels: accuracy, IoU and F1 with 95 % intervals."""
    from rayseg.steps import classify, evaluate, evaluate_plots
    from rayseg.steps.agreement import agreement_of_rasters, agreement_text

    if checkpoints:
        _evaluate_checkpoints(prediction, truth, as_json=as_json)
        return
    if truth is None:
        raise ConfigError(f"nothing is named to compare {prediction} with; give masks, or --checkpoints")
    if agreement:
        scores = agreement_of_rasters(prediction, truth)
        typer.echo(json.dumps(scores, indent=1) if as_json else agreement_text(scores))
        if scores.get("failed"):
            raise typer.Exit(DataError.exit_code)
        return
    if classify.has_classes(prediction):
        result = classify.evaluate_classes(prediction, truth)
        typer.echo(json.dumps(result, indent=1) if as_json else evaluate.text(result))
        return
    # Plots are objects with ids; everything else is compared by classes.
    if plots or (plots is None and not classes and evaluate_plots.are_plots(prediction, truth)):
        compared = evaluate_plots.evaluate_plots(prediction, truth)
        typer.echo(json.dumps(compared, indent=1) if as_json else evaluate_plots.text(compared))
        if compared.get("failed"):
            raise typer.Exit(DataError.exit_code)
        return
    result = evaluate.evaluate(prediction, truth, classes=classes)
    typer.echo(json.dumps(result, indent=1) if as_json else evaluate.text(result))
    if result["failed"]:
        raise typer.Exit(DataError.exit_code)


def _evaluate_checkpoints(run: str, truth: str | None, *, as_json: bool) -> None:
    from rayseg.steps import checkpoints

    rows = checkpoints.measure(run, truth)
    typer.echo(json.dumps(rows, indent=1) if as_json else checkpoints.text(rows))


@app.command()
def polygonize(
    raster: Annotated[str, typer.Argument(help="A class raster (one band of uint8), or a run.")],
    *,
    out: Annotated[str, typer.Option("--out", help="Output file: .parquet, .geojson, .gpkg, .fgb or .shp.")],
) -> None:
    """Convert a class raster or the tiles of a run to polygons in EPSG:4326 with areas in m2."""
    from rayseg.io.polygonize import polygonize as write_polygons

    typer.echo(f"{write_polygons(raster, out)} polygons in {out}")


@app.command()
def export(
    run: RunPrefix,
    *,
    kind: Annotated[str, typer.Option("--format", help="gpkg, shp, fgb, geojson, parquet, cog, or qgis (a project).")],
    out: Annotated[str | None, typer.Option("--out", help="Output folder or URL; default: RUN/export.")] = None,
) -> None:
    """Export a run's polygons, plots or rasters to a GIS format."""
    from rayseg.io import export as exports
    from rayseg.io import qgis

    for path in qgis.save(run) if kind == "qgis" else exports.export(run, kind, out):
        typer.echo(path)


@area_app.command("sample")
def area_sample(
    run: RunPrefix,
    *,
    per_stratum: Annotated[int | None, typer.Option(min=2, help="Points of each class and score band.")] = None,
    half_width: Annotated[
        float | None,
        typer.Option(help="Half-width of the 95 % interval of a class's share, instead."),
    ] = None,
    band: Annotated[float, typer.Option(help="Score that divides each class into two strata.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the random sample.")] = 0,
    out: Annotated[str | None, typer.Option("--out", help="Output folder or URL; default: RUN/to-check.")] = None,
) -> None:
    """Draw a stratified random sample of a run's map: points with pictures, to be labelled on a page or in QGIS."""
    from rayseg.steps import area

    folder = out or f"{run}/to-check"
    content = area.sample(run, folder, per_stratum=per_stratum, half_width=half_width, band=band, seed=seed)
    typer.echo(f"{len(content['points'])} points to label: {folder}/index.html")


@area_app.command("estimate")
def area_estimate(
    run: RunPrefix,
    *,
    answers: Annotated[str, typer.Option(help="CSV with the columns id,class.")],
    sample: Annotated[str | None, typer.Option(help="Folder of the sample; default: RUN/to-check.")] = None,
    regions: Annotated[
        str | None, typer.Option(help="File of polygons: estimate the areas within each of them, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate areas, user's, producer's and overall accuracy with 95 % intervals from the answers to a sample."""
    from rayseg.steps import area

    estimate = area.estimate(run, sample or f"{run}/to-check", answers, regions=regions)
    typer.echo(json.dumps(estimate, indent=1) if as_json else area.text(estimate))
