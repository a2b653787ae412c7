"""Plots of a region as tables: join the pieces of tiles, group plots for a classifier, add the classes."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Step
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.geo.region import Region
from rayseg.io import plot_joins, vectors
from rayseg.io.labels import Chip
from rayseg.io.maps import mapped_tiles, pixel_area_m2
from rayseg.io.pictures import plots_over_imagery
from rayseg.io.seams import at_begin, begins_of
from rayseg.io.sources import Source, newest_first
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Scaling
from rayseg.stages.classify_plots import ClassifyPlots, CutPlots, WriteClasses, check_classifier
from rayseg.stages.propose import pieces_path
from rayseg.stages.rows import PlotsRow
from rayseg.stages.to_rgb import ImageConfig
from rayseg.steps import baseline, charts, chips, evaluate_plots, models, report, simple_plots
from rayseg.steps import map as mapping
from rayseg.steps.chips import ChipsConfig
from rayseg.store import upath
from rayseg.train.classifier import ClassifierConfig, expect_trainable
from rayseg.train.learning import Learning, Rates
from rayseg.vision.color import ClassTable
from rayseg.vision.proposals import SuperpixelProposer

BACKGROUND = (0, "background", (0, 0, 0))
PLOT = (1, "plot", (230, 159, 0))
UNCLASSIFIED = ("unclassified", (154, 160, 166))
"""The class of plots that could not be classified."""
LABELS = ("field", "nonfield")
CLASSES = ((1, LABELS[0], (0, 158, 115)), (2, LABELS[1], (213, 94, 0)))
SCALING = Scaling(scale=1 / 255, mean=(0.0,) * 3, std=(1.0,) * 3)
COLUMNS = ("id", "number", "class", "score", "stability", "predicted_iou", "round", "refined")
TILING = {"scales": [150.0, 300.0], "reduce": 1, "least": 100, "slivers": 6.0}
"""Settings of superpixels as plots: on 15 chips of 10 m imagery their F1 is .55, that of the class's defaults .44."""
GROUP = 100
"""Number of plots that are classified as one row."""


class PlotsClassifierConfig(ClassifierConfig):
    """A classifier of plots; the defaults are the published values."""

    network: Literal["chips", "plots", "over-imagenet"] = "plots"
    """plots: features and two colour statistics; for the others see gpc and al-s4gan."""
    encoder: str = "resnet50"
    """A name of segmentation_models_pytorch or of timm."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the features dropped before the head."""
    positive: int | None = None
    """None samples all crops with equal probability."""
    size: Annotated[int, Field(gt=0)] = 224
    """Side in pixels of the windows cut out of the crops; a multiple of 32 times `reduce`."""
    epochs: Annotated[int, Field(gt=0)] = 10
    """One epoch is one pass over the crops."""
    rates: Rates = ((10, 1e-4),)
    """(until epoch, learning rate)."""
    learning: Learning = Learning(batch=32, optimizer="sgd", weight_decay=0.1)
    """Optimizer and batch."""


def classifier_bundle(settings: PlotsClassifierConfig, parents: tuple[str, ...] = ()) -> Bundle:
    """Bundle metadata of a classifier of plots that is trained here, on the data at the URIs `parents`."""
    return models.classifier_bundle(settings, CLASSES, name="plots", scaling=SCALING, parents=parents)


def tiling(given: SuperpixelProposer) -> SuperpixelProposer:
    """Superpixels that tile the ground, with the settings that are given."""
    return SuperpixelProposer.model_validate(TILING | given.model_dump(exclude_unset=True))


def check_classes(
    region: Region,
    classifier: str | None,
    crops: ChipsConfig | None,
    training: PlotsClassifierConfig,
    *,
    workers: int,
) -> list[Chip] | None:
    """Refuse a classifier, or crops and a network to train one from, that cannot be used; return the crops."""
    if classifier:
        check_classifier(bundle.build(classifier)[0])
    if classifier or not crops:
        return None
    labelled = chips.find_chips(region, LABELS, crops)
    expect_trainable(training, workers=workers)
    bundle.blank(classifier_bundle(training))
    models.expect_weights(training)
    return labelled


def proposed_tiles(proposed: Step) -> dict[Grid, list[Row]]:
    """Rows of the tiles that have proposals, by their grid, in the order of the grids' names."""
    by_grid: dict[Grid, list[Row]] = defaultdict(list)
    for row, _ in mapping.rows_with(proposed, "pieces"):
        by_grid[Tile.from_row(row).grid].append(row)
    return dict(sorted(by_grid.items(), key=lambda entry: (entry[0].name, entry[0].origin)))


def read_proposals(proposed: Step, row: Row, name: Literal["patches", "pieces"]) -> list[Row]:
    """The patches of a tile, or the pieces of plots in them."""
    return plot_joins.read_table(pieces_path(str(proposed.prefix), row["id"], name))


def join_pieces(step: Step, proposed: Step, *, least: float) -> dict[str, Any]:
    """Join the instances of overlapping patches to plots; write plots.parquet and the plot numbers of every tile.

    Args:
        step: the current step.
        proposed: the step that proposed pieces tile by tile.
        least: instances of two patches are one plot if their IoU in the overlap of the patches exceeds this value.

    Returns:
        `plots`: number of plots; `grids`: rows of the plots' grids, indexed by a plot's `grid`; `begins`: of some of
        them, see `seams.begins_of`.
    """
    plots: list[Row] = []
    # Tile -> its pieces with the number of their plot: what the writer of the tile needs.
    members: dict[str, list[Row]] = defaultdict(list)
    grids = proposed_tiles(proposed)
    for at, (grid, rows) in enumerate(grids.items()):
        pieces = [piece | {"tile": row["id"]} for row in rows for piece in read_proposals(proposed, row, "pieces")]
        tiles = {plot_joins.cell_of(piece): piece["tile"] for piece in pieces}
        patches = [patch for row in rows for patch in read_proposals(proposed, row, "patches")]
        for plot in plot_joins.join_pieces(patches, pieces, least=least):
            number = len(plots) + 1
            for cell_row, cell_col, label in plot.pop("members"):
                place = {"cell_row": cell_row, "cell_col": cell_col, "label": label, "number": number}
                members[tiles[cell_row, cell_col]].append(place)
            name = f"{grid.name}_{plot['first_col']}_{plot['first_row']}"
            plots.append(plot | {"id": name, "number": number, "grid": at, "geometry": plot["geometry"].wkb})
    # Grids were joined one by one, so a plot on a seam has two numbers until now.
    begins = begins_of(Tile.from_row(row) for rows in grids.values() for row in rows)
    first = plot_joins.across_seams(list(grids), plots, least=least, begins=begins)
    names = {plot["number"]: plot["id"] for plot in plots}
    for row in (*plots, *(piece for pieces in members.values() for piece in pieces)):
        row["number"] = first.get(row["number"], row["number"])
    for plot in plots:
        plot["id"] = names[plot["number"]]
    # A file for every tile, empty ones too: a reader does not have to ask which exist.
    for row in mapping.read_manifest(proposed):
        write_rows(pieces_path(str(step.prefix), row["id"], "numbers"), members[row["id"]])
    write_rows(step.prefix / "plots.parquet", plots)
    own = {"begins": {str(at): begins[grid] for at, grid in enumerate(grids) if grid in begins}} if begins else {}
    return {"plots": len({plot["number"] for plot in plots}), "grids": [grid.to_row() for grid in grids], **own}


def read_plots(joined: Step) -> list[Row]:
    """The rows of all plots, by number."""
    return plot_joins.read_table(joined.prefix / "plots.parquet")


def group_plots(proposed: Step, joined: Step) -> list[Row]:
    """Rows of groups of plots; a group belongs to one grid and lists the imagery of the grid's tiles."""
    plots, rows = read_plots(joined), []
    for at, (grid, tiles) in enumerate(zip(joined.value["grids"], proposed_tiles(proposed).values(), strict=True)):
        shown = [source for row in tiles for source in json.loads(row["sources"])]
        # Tiles of a grid share most sources; a group reads each once, the newest first as tiles do.
        distinct = {json.dumps(source): Source.from_row(source) for source in shown}
        sources = [source.to_row() for source in newest_first(list(distinct.values()))]
        of_grid = [plot for plot in plots if plot["grid"] == at]
        for start in range(0, len(of_grid), GROUP):
            group = of_grid[start : start + GROUP]
            rows.append(
                {
                    "id": f"plots-{group[0]['number']}",
                    "grid": json.dumps(grid),
                    "sources": json.dumps(sources),
                    "numbers": [plot["number"] for plot in group],
                    "plots": [plot["geometry"] for plot in group],
                }
            )
    return rows


def classify_groups(
    step: Step, rows: Sequence[Row], classifier: str, image: ImageConfig, *, patience: float
) -> dict[str, Any]:
    """Classify groups of plots.

    Args:
        step: the current step; the classes are written under its prefix.
        rows: of `group_plots`.
        classifier: prefix of the bundle.
        image: how the imagery becomes 8-bit RGB.
        patience: timeout in seconds of one stage on one group.

    Returns:
        See `map.through`; and `groups`: ids of the rows, for `classes_of`.
    """
    works = [
        Work(CutPlots(image, size=bundle.description(classifier).patch)),
        Work(ClassifyPlots(classifier), cpus=1.0, gpus=1.0, model=True),
        Work(WriteClasses(str(step.prefix))),
    ]
    account = mapping.through(step, rows, works, record=PlotsRow.from_row, title="plots", patience=patience)
    return {**account, "groups": [row["id"] for row in rows]}


def tile_rows(proposed: Step) -> list[Row]:
    """Rows of all tiles to write; a tile without proposals fails for the reason that its proposals have."""
    seen = {row["id"] for row, _ in mapping.rows_with(proposed, "pieces")}
    reasons = {tile: why for tile, why in proposed.value["troubles"].items() if tile not in seen}
    refused = {tile: f"no plots were proposed, because: {why}" for tile, why in reasons.items()}
    return [row | {"refused": refused.get(row["id"], "")} for row in mapping.read_manifest(proposed)]


def classes_of(classified: Step) -> dict[int, Row]:
    """Plot number -> row with class and score; a failed group may contribute some rows."""
    paths = (classified.prefix / f"{group}.classes.parquet" for group in classified.value.get("groups", []))
    tables = (plot_joins.read_table(path) for path in paths if path.exists())
    return {row["number"]: row for table in tables for row in table}


def legend(joined: Step, classified: Step, classifier: str | None) -> tuple[dict[int, int], ClassTable, int]:
    """(plot number -> value of its class, the classes of the map, the value of plots without a class).

    Args:
        joined: the step that joined the plots.
        classified: the step that classified them.
        classifier: prefix of the bundle; if None, every plot has the class `plot`.
    """
    values = {number: row["class"] for number, row in classes_of(classified).items()}
    if classifier is None:
        return values, ClassTable((BACKGROUND, PLOT)), PLOT[0]
    classes = bundle.description(classifier).classes
    value = max(value for value, _, _ in classes) + 1
    # Plots that the classifier could not see get a class of their own.
    own = () if len(values) == joined.value["plots"] else ((value, *UNCLASSIFIED),)
    return values, ClassTable((BACKGROUND, *classes, *own)), value


def write_plots(step: Step, joined: Step, classified: Step, model: Step) -> dict[str, Any]:
    """Write all plots as `<run>/plots.parquet` (GeoParquet)."""
    rows, classes = read_plots(joined), classes_of(classified)
    prefix = model.value.get("bundle")
    names = {value: name for value, name, _ in bundle.description(prefix).classes} if prefix else {}
    for row in rows:
        known = classes.get(row["number"], {})
        row |= {"class": names[known["class"]] if known else None, "score": known.get("score")}
    frames = [
        plot_joins.frame_of(Grid.from_row(grid), [row for row in rows if row["grid"] == at], columns=COLUMNS)
        for at, grid in enumerate(joined.value["grids"])
    ]
    # Plots over the turn of a grid in degrees are cut there, as polygons of maps are.
    for at, begin in joined.value.get("begins", {}).items():
        frames[int(at)].geometry = at_begin(frames[int(at)].geometry.to_numpy(), begin)
    frame = plot_joins.united(plot_joins.one_frame(frames, columns=COLUMNS))
    vectors.write_geoparquet(frame, upath(step.root) / "plots.parquet")
    area = float(frame["area_m2"].sum()) if "area_m2" in frame else None
    return {"polygons": "plots.parquet", "count": len(frame), "area_m2": area}


def _patch(tile: Row, patch: Row) -> Tile:
    """The ground of a patch: in degrees, pixels of one tile differ in area from row to row."""
    return replace(Tile.from_row(tile), window=Window(patch["col"], patch["row"], patch["width"], patch["height"]))


def write_report(
    step: Step,
    proposed: Step,
    joined: Step,
    tiles: Step,
    polygons: Step,
    *,
    measured: Step | None = None,
    simple: Step | None = None,
) -> dict[str, Any]:
    """The report: coverage after every round, sizes and outlines of plots, and measures where there is a truth."""
    rows = read_plots(joined)
    # Coverage by area, because scenes of one run may differ in pixel size.
    tiled = [tile for of_grid in proposed_tiles(proposed).values() for tile in of_grid]
    patches = [
        (patch["pixels"] * (pixel_area_m2(_patch(tile, patch)) or 1.0), patch["coverage"])
        for tile in tiled
        for patch in read_proposals(proposed, tile, "patches")
    ]
    outlines = plots_over_imagery(mapped_tiles(step.root, tiles.name))
    coverage = charts.coverage_chart(patches)
    pictures = (
        ("Plots", outlines, "Outlines of the plots; pixels without a plot are red."),
        ("Coverage", coverage, "Share of the imagery under plots after each round."),
        ("Sizes", charts.size_chart([row["pixels"] for row in rows]), "Plots by size, in pixels."),
    )
    rows = list({row["number"]: row for row in reversed(rows)}.values())  # a seam between zones may cut a plot
    labels = f"{len(rows):,} plots, {sum(row['refined'] for row in rows):,} of them found inside mixed masks."
    # Charts of no plots are empty.
    shown = tuple(picture for picture in pictures if picture[1])
    extras = report.Extras(labels=labels, pictures=shown, timed=proposed, plots=True)
    if measured:
        extras = replace(extras, tables=(evaluate_plots.table(measured.value),))
    if simple:
        value = simple.value
        compared = baseline.comparison(value, value["product"], parts=value["parts"], name=simple_plots.PRODUCT)
        extras = replace(extras, baseline=compared)
    return report.write_report(step, tiles, polygons, None, extras)
