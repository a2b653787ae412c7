"""agri: cultivated plots as labelled instances, by proposals in rounds (LiSegAgr, ICONIP).

    imagery --> [x4 larger] --> proposals in up to 4 rounds on what is left --> mixed masks once more --> instances
    instances --> joined over patches --> plots --> classifier, if there is one --> polygons, label raster, items

Proposals come from Segment Anything, or from superpixels where there are no weights. What a plot is does not depend on
how the region is cut into tiles: docs/decisions/0007. The published settings are `configs/agri/paper.yaml`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayseg.config import Config as Frozen
from rayseg.config import Workers
from rayseg.engine import cluster
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Run, Step
from rayseg.geo.grid import Grid, Lattice, Tile
from rayseg.geo.region import Region
from rayseg.io import plot_joins, vectors
from rayseg.io.maps import mapped_tiles
from rayseg.io.pictures import coverage_chart, plots_over_imagery, size_chart
from rayseg.io.sources import Source, grids_of
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.encoders import NO_FILES, read_state
from rayseg.models.sam import SamConfig, checkpoint_state
from rayseg.models.super_resolution import EnlargeConfig, load_enlarger
from rayseg.stages.classify_plots import ClassifyPlots, CutPlots, WriteClasses, check_classifier
from rayseg.stages.enlarge import lattice_of
from rayseg.stages.propose import ProposePlots, ReadPlots, WritePieces, WritePlots, pieces_path
from rayseg.stages.rows import PlotsRow
from rayseg.stages.to_rgb import ImageConfig, ReadGround, check_source
from rayseg.steps import chips, estimate, report, super_resolution
from rayseg.steps import map as mapping
from rayseg.steps.chips import ChipsConfig
from rayseg.steps.map import MapConfig
from rayseg.steps.models import keep_model
from rayseg.store import Location, upath
from rayseg.train.classifier import ClassifierConfig, expect_trainable, fit_classifier
from rayseg.train.learning import Learning, Rates, trained
from rayseg.train.session import Setup
from rayseg.vision.color import ClassTable
from rayseg.vision.proposals import SuperpixelProposer
from rayseg.vision.rounds import RoundsConfig

BACKGROUND = (0, "background", (0, 0, 0))
PLOT = (1, "plot", (230, 159, 0))
UNCLASSIFIED = ("unclassified", (154, 160, 166))
"""Plots that the classifier could not be asked about."""
LABELS = ("field", "nonfield")
CLASSES = ((1, LABELS[0], (0, 158, 115)), (2, LABELS[1], (213, 94, 0)))
GROUP = 100
"""Plots classified as one row."""
SCALING = Scaling(scale=1 / 255, mean=(0.0,) * 3, std=(1.0,) * 3)
COLUMNS = ("id", "number", "class", "score", "stability", "predicted_iou", "round", "refined")


class PlotsClassifierConfig(ClassifierConfig):
    """A classifier of plots; the defaults are the published ones."""

    network: Literal["chips", "plots", "over-imagenet"] = "plots"
    """plots: features and two numbers about colour; for the others see gpc and al-s4gan."""
    encoder: str = "resnet50"
    """A name of segmentation_models_pytorch or of timm."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the features dropped before the head."""
    positive: int | None = None
    """None draws all crops alike."""
    size: Annotated[int, Field(gt=0)] = 224
    """Side in pixels of the windows cut out of the crops; a multiple of 32 times `reduce`."""
    epochs: Annotated[int, Field(gt=0)] = 10
    """One epoch is one pass over the crops."""
    rates: Rates = ((10, 1e-4),)
    """(until epoch, learning rate)."""
    learning: Learning = Learning(batch=32, optimizer="sgd", weight_decay=0.1)
    """How weights are changed."""


class Config(Frozen):
    """Settings of the pipeline; the defaults are the published ones."""

    proposer: Literal["sam", "felzenszwalb"] = "sam"
    """Segment Anything, or superpixels, which need no weights."""
    sam: SamConfig = SamConfig()
    superpixels: SuperpixelProposer = SuperpixelProposer()
    rounds: RoundsConfig = RoundsConfig()
    image: ImageConfig = ImageConfig()
    enlarge: EnlargeConfig | None = None
    """Whether imagery is made larger before anything is looked for, and how; what follows counts the small pixels."""
    patch: Annotated[int, Field(gt=0)] = 1152
    """Side in px of what is looked at at once."""
    stride: Annotated[int, Field(gt=0)] = 1024
    """Distance of patches; what they overlap is where plots are joined."""
    joined: Annotated[float, Field(ge=0.5, le=1)] = 0.5
    """IoU over what two patches both see above which their instances are one plot."""
    classifier: Location | None = None
    """Prefix of a trained classifier of plots; without one, and without chips, plots have no class."""
    chips: ChipsConfig | None = None
    """Labelled crops (field, nonfield) to train one from."""
    training: PlotsClassifierConfig = PlotsClassifierConfig()
    """How it is trained."""
    workers: Workers = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    map: MapConfig = MapConfig()

    @model_validator(mode="after")
    def _whole_cells(self) -> "Config":
        if self.stride >= self.patch or (self.patch - self.stride) % 2:
            raise ValueError(f"patch {self.patch} must be above stride {self.stride} by an even number")
        if self.map.tile % self.stride:
            raise ValueError(f"map.tile {self.map.tile} must be a multiple of stride {self.stride}")
        return self

    @property
    def patches(self) -> Lattice:
        """How a grid is cut."""
        return Lattice.of_cells(self.patch, self.stride)


def plan(region: Region, config: Config) -> Sequence[Row]:
    """The rows of all tiles; of the imagery only its description is read.

    Raises:
        RaysegError: there is no imagery, it is of another kind than configured, or a tile asked for is not there.
    """
    return mapping.tiles_of(region, config.map, partial(check_source, kind=config.image), halo=config.patch)


def on_larger(larger: Step, config: Config) -> Config:
    """What is asked of the larger imagery, if there is any."""
    if "imagery" not in larger.value:
        return config
    imagery = config.map.model_copy(update={"imagery": larger.value["imagery"]})
    return config.model_copy(update={"map": imagery, "image": ImageConfig()})


def propose(step: Step, larger: Step, region: Region, config: Config) -> dict[str, Any]:
    """What every patch finds; tables of patches and pieces lie below the step.

    It is planned anew when the `larger` imagery has become more.
    """
    bare = larger.value.get("items") == 0  # nothing but nodata was there to be enlarged
    rows = mapping.kept_manifest(step, lambda: [] if bare else plan(region, config))
    look = ProposePlots(
        config.proposer,
        sam=config.sam,
        superpixels=config.superpixels,
        rounds=config.rounds,
        patches=config.patches,
        geometry=region.geometry,
    )
    works = [
        Work(ReadGround(config.image, config.patches)),
        Work(look, cpus=1.0, gpus=1.0 if config.proposer == "sam" else 0.0, model=True),
        Work(WritePieces(str(step.prefix))),
    ]
    return mapping.through(step, rows, works, patience=config.map.stall_seconds)


def join(step: Step, proposed: Step, config: Config) -> dict[str, Any]:
    """Instances that patches agree on become plots: plots.parquet below the step, and numbers for every tile."""
    found: list[Row] = []
    members: dict[str, list[Row]] = defaultdict(list)
    grids = _by_grid(proposed)
    for at, (grid, rows) in enumerate(grids.items()):
        pieces = [piece | {"tile": row["id"]} for row in rows for piece in _table(proposed, row, "pieces")]
        tiles = {plot_joins.place_of(piece): piece["tile"] for piece in pieces}
        patches = [patch for row in rows for patch in _table(proposed, row, "patches")]
        for plot in plot_joins.join(patches, pieces, least=config.joined):
            number = len(found) + 1
            for cell_row, cell_col, label in plot.pop("members"):
                place = {"cell_row": cell_row, "cell_col": cell_col, "label": label, "number": number}
                members[tiles[cell_row, cell_col]].append(place)
            name = f"{grid.name}_{plot['first_col']}_{plot['first_row']}"
            found.append(plot | {"id": name, "number": number, "grid": at, "geometry": plot["geometry"].wkb})
    for row in mapping.read_manifest(proposed):
        write_rows(pieces_path(str(step.prefix), row["id"], "numbers"), members[row["id"]])
    write_rows(step.prefix / "plots.parquet", found)
    return {"plots": len(found), "grids": [asdict(grid) for grid in grids]}


def _table(proposed: Step, row: Row, name: Literal["patches", "pieces"]) -> list[Row]:
    return plot_joins.read_table(pieces_path(str(proposed.prefix), row["id"], name))


def _by_grid(proposed: Step) -> dict[Grid, list[Row]]:
    """The tiles that were looked at, by their grid, in the order of the grids' names."""
    by_grid: dict[Grid, list[Row]] = defaultdict(list)
    for row, _ in mapping.rows_with(proposed, "pieces"):
        by_grid[Tile.from_row(row).grid].append(row)
    return dict(sorted(by_grid.items(), key=lambda entry: (entry[0].name, entry[0].origin)))


def fit_plots(step: Step, region: Region, config: Config) -> dict[str, Any]:
    """The classifier of plots: the one that is given, or one trained from labelled crops; none is fine."""
    if config.classifier:
        return mapping.load_model(step, config.classifier)
    if config.chips is None:
        return {}
    listed = chips.list_chips(step, region, LABELS, config.chips)
    learnt, held = (
        chips.learnable(chips.rows_of(step, held_out=part), LABELS, config.chips.size) for part in (False, True)
    )
    measures = fit_classifier(
        config.training,
        learnt,
        Setup(
            step.prefix,
            workers=config.workers,
            use_gpu=cluster.connect_training(step.engine.address, workers=config.workers),
        ),
        scaling=SCALING,
        held_out=held if len(held) else None,
    )
    model = trained(config.training.build(classes=len(LABELS), weights="none"), step.prefix)
    prefix = keep_model(step, _described(config.training, measures), model)
    return {"bundle": prefix, "measures": measures, "chips": listed}


def _described(training: ClassifierConfig, measures: dict[str, float] | None = None) -> Bundle:
    return Bundle(
        name="plots",
        task="classification",
        architecture=Architecture(factory=training.factory, options=training.options(classes=len(LABELS), channels=3)),
        classes=CLASSES,
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=SCALING,
        patch=training.size,
        stride=training.size,
        metrics=measures or {},
        provenance=Provenance(config=training.model_dump(mode="json")),
    )


def classify(step: Step, proposed: Step, joined: Step, model: Step, config: Config) -> dict[str, Any]:
    """The class of every plot, if there is a classifier."""
    if "bundle" not in model.value:
        return {}
    rows = mapping.kept_manifest(step, lambda: _groups(proposed, joined))
    prefix = model.value["bundle"]
    cut = CutPlots(config.image, size=bundle.load(prefix).patch)
    works = [
        Work(cut),
        Work(ClassifyPlots(prefix), cpus=1.0, gpus=1.0, model=True),
        Work(WriteClasses(str(step.prefix))),
    ]
    groups = [row["id"] for row in rows]
    patience = config.map.stall_seconds
    done = mapping.through(step, rows, works, record=PlotsRow.from_row, title="plots", patience=patience)
    return {**done, "groups": groups}


def _groups(proposed: Step, joined: Step) -> list[Row]:
    """Plots of one grid, some at a time, with the imagery they may lie in."""
    found, rows = plot_joins.read_table(joined.prefix / "plots.parquet"), []
    grids = _by_grid(proposed)
    for at, (row, tiles) in enumerate(zip(joined.value["grids"], grids.values(), strict=True)):
        known = {json.dumps(one): Source.from_row(one) for tile in tiles for one in json.loads(tile["sources"])}
        sources = [one.to_row() for _, ordered in grids_of(list(known.values())) for one in ordered]
        mine = [plot for plot in found if plot["grid"] == at]
        for start in range(0, len(mine), GROUP):
            part = mine[start : start + GROUP]
            rows.append(
                {
                    "id": f"plots-{part[0]['number']}",
                    "grid": json.dumps(row),
                    "sources": json.dumps(sources),
                    "numbers": [plot["number"] for plot in part],
                    "plots": [plot["geometry"] for plot in part],
                }
            )
    return rows


def _classes(classified: Step) -> dict[int, Row]:
    """Class and score of every plot number that has them; in a group that failed, some may."""
    paths = (classified.prefix / f"{row}.classes.parquet" for row in classified.value.get("groups", []))
    tables = (plot_joins.read_table(path) for path in paths if path.exists())
    return {row["number"]: row for table in tables for row in table}


def write_tiles(
    step: Step, region: Region, proposed: Step, joined: Step, classified: Step, model: Step, config: Config
) -> dict[str, Any]:
    """The plots of every tile as rasters with an item; tiles/<id>/ holds them, the step's ledger their fates."""
    seen = {row["id"] for row, _ in mapping.rows_with(proposed, "pieces")}
    unseen = {row_id: why for row_id, why in proposed.value["troubles"].items() if row_id not in seen}
    told = {row_id: f"no plots were looked for, because: {why}" for row_id, why in unseen.items()}
    planned = mapping.read_manifest(proposed)
    rows = mapping.kept_manifest(step, lambda: [row | {"refused": told.get(row["id"], "")} for row in planned])
    prefix = model.value.get("bundle")
    classes = {number: row["class"] for number, row in _classes(classified).items()}
    known, unclassified = _legend(bundle.load(prefix) if prefix else None, whole=len(classes) == joined.value["plots"])
    write = WritePlots(
        mapping.tiles_prefix(step),
        known,
        classes=classes,
        unclassified=unclassified,
        geometry=region.geometry,
        model=str(upath(prefix) / "item.json") if prefix else None,
    )
    works = [
        Work(ReadPlots(str(proposed.prefix), str(joined.prefix), config.image.bands, stride=config.stride)),
        Work(write),
    ]
    return mapping.through(step, rows, works, patience=config.map.stall_seconds)


def _legend(described: Bundle | None, *, whole: bool) -> tuple[ClassTable, int]:
    """The classes of the map and the one of plots without any: a class of its own, if there are such (not `whole`)."""
    if described is None:
        return ClassTable((BACKGROUND, PLOT)), PLOT[0]
    value = max(value for value, _, _ in described.classes) + 1
    more = () if whole else ((value, *UNCLASSIFIED),)
    return ClassTable((BACKGROUND, *described.classes, *more)), value


def write_plots(step: Step, joined: Step, classified: Step, model: Step) -> dict[str, Any]:
    """All plots as `<run>/plots.parquet` (GeoParquet)."""
    found = plot_joins.read_table(joined.prefix / "plots.parquet")
    prefix, classes = model.value.get("bundle"), _classes(classified)
    names = {value: name for value, name, _ in bundle.load(prefix).classes} if prefix else {}
    for row in found:
        known = classes.get(row["number"], {})
        row |= {"class": names[known["class"]] if known else None, "score": known.get("score")}
    frames = [
        plot_joins.frame_of(Grid.from_row(grid), [row for row in found if row["grid"] == at], columns=COLUMNS)
        for at, grid in enumerate(joined.value["grids"])
    ]
    whole = plot_joins.one_frame(frames, columns=COLUMNS)
    vectors.write_geoparquet(whole, upath(step.root) / "plots.parquet")
    area = float(whole["area_m2"].sum()) if "area_m2" in whole else None
    return {"polygons": "plots.parquet", "count": len(whole), "area_m2": area}


def write_report(step: Step, proposed: Step, joined: Step, tiles: Step, polygons: Step) -> dict[str, Any]:
    """The report, with what every round added, how large plots are and what they look like."""
    found = plot_joins.read_table(joined.prefix / "plots.parquet")
    rows = [row for grid in _by_grid(proposed).values() for row in grid]
    patches = [patch for row in rows for patch in _table(proposed, row, "patches")]
    coverage = [(patch["pixels"], patch["coverage"]) for patch in patches]
    pictures = [
        (
            "Plots",
            plots_over_imagery(mapped_tiles(step.root, tiles.name)),
            "Outlines of the plots; red where there is none.",
        ),
        ("Coverage", coverage_chart(coverage), "Share of the imagery under plots after each round."),
        ("Sizes", size_chart([row["pixels"] for row in found]), "Plots by size, in pixels."),
    ]
    learnt = f"{len(found):,} plots, {sum(row['refined'] for row in found):,} of them found inside mixed ones."
    extras = report.Extras(labels=learnt, pictures=tuple(entry for entry in pictures if entry[1]), timed=proposed)
    return report.write_report(step, tiles, polygons, None, extras)


def check(config: Config, region: Region) -> None:
    """Refuse, before anything is written, imagery and weights that cannot be used."""
    _planned(region, config)
    if config.enlarge:
        load_enlarger(config.enlarge, device="cpu")
    if config.proposer == "sam" and config.sam.checkpoint != "random":
        checkpoint_state(config.sam)
    if config.classifier:
        check_classifier(bundle.build(config.classifier)[0])
    elif config.chips:
        chips.find_chips(region, LABELS, config.chips)
        expect_trainable(config.training, workers=config.workers)
        bundle.blank(_described(config.training))
        if config.training.weights not in NO_FILES:
            read_state(config.training.weights)


def _planned(region: Region, config: Config) -> tuple[estimate.Forecast | None, Sequence[Row]]:
    """(what is done to the imagery before, rows of the tiles in which plots are looked for)."""
    if config.enlarge is None:
        return None, plan(region, config)
    rows, tiles = super_resolution.tiles_to_enlarge(region, config.enlarge, config.image, config.map, halo=config.patch)
    return estimate.Forecast(rows, lattice_of(config.enlarge).patch), tiles


def forecast(config: Config, region: Region, plan: object = None) -> estimate.Forecast:
    """What is known of a run before it is begun."""
    before, tiles = _planned(region, config)
    counts = {"enlarge": len(before.tiles)} if before else {}
    trial = partial(run, config.model_copy(update={"workers": 0}), learn=(estimate.training, fit_plots))
    unknown = estimate.by_workers(config.workers) if config.chips else ()
    return estimate.Forecast(tiles, margin=config.patch, unknown=unknown, counts=counts, trial=trial, before=before)


def run(
    config: Config, run: Run, region: Region, plan: object = None, *, learn: Sequence[Callable[..., Any]] = (fit_plots,)
) -> str:
    """Find the plots of `region`, after `learn` with region and config; return where the report is and what it says."""
    model = run.step("classifier", *learn, region, config)
    larger = run.step(
        "enlarge", super_resolution.enlarge, region, config.enlarge, config.image, config.map, config.patch
    )
    config = on_larger(larger, config)
    proposed = run.step("propose", propose, larger, region, config)
    joined = run.step("join", join, proposed, config)
    classified = run.step("classify", classify, proposed, joined, model, config)
    tiles = run.step("predict", write_tiles, region, proposed, joined, classified, model, config)
    polygons = run.step("plots", write_plots, joined, classified, model)
    run.step("publish", mapping.publish, tiles, f"Cultivated plots, {region.name}")
    written = run.step("report", write_report, proposed, joined, tiles, polygons)
    return report.headline(written)
