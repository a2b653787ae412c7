"""A trained classifier over images, tiles or polygons: class and score of each as CSV, GeoParquet and JSON.

    model + imagery --> units --> classes.csv, classes.parquet, classes.json, report

A unit is an image (its centre, as in training), a tile of the model's input size, or a polygon.
"""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely

from rayseg.config import Config
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import Tile, Window, expect_ids, slug
from rayseg.geo.region import Region
from rayseg.io import labels, stac_read, vectors
from rayseg.io.drivers import kind_of
from rayseg.io.instances import Polygons
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.sources import Source
from rayseg.io.units import expect_one_dtype, with_dtype_of
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.stages.classify import Classify, ReadUnit, expect_explainable
from rayseg.stages.rows import ChipRow
from rayseg.steps import evaluate, report
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.store import Location, StorePath, put, split_location, suffix_of, upath
from rayseg.vision.color import ClassTable, label_table

if TYPE_CHECKING:
    import geopandas

_log = logging.getLogger(__name__)
AT_ONCE = 8
"""Units per batch of the classifier."""
LISTED = 200
"""Units that the report lists."""


class UnitsConfig(Config):
    """What a classifier is applied to."""

    of: Literal["images", "tiles"] | None = None
    """images: the centre of each image, as in training; tiles: each square of the model's input size. By default tiles
    of georeferenced imagery, else images."""
    polygons: Location | None = None
    """GeoParquet or GeoJSON: one unit per polygon instead."""
    pictures: bool = False
    """Write Grad-CAM++ of each unit's class, `pictures/<id>.webp`."""


def plan_units(region: Region, described: Bundle, units: UnitsConfig, config: MapConfig) -> Sequence[Row]:
    """Rows of all units, with their sources as JSON; only the metadata of the imagery is read.

    Raises:
        ModelError: no imagery meets the model's input contract, or it has no place for Grad-CAM++.
        DataError: the region has no imagery, or no polygon lies on it.
    """
    if units.pictures:
        expect_explainable(described)

    def check(source: Source) -> None:
        source = with_dtype_of(source, described.bands)
        expect_one_dtype(source, described.bands, model=described.name)
        described.check_contract(source.bands, source.dtype, units=source.units, source=source.item_id)

    # A unit is one input window of the model, so that each is seen whole.
    config = config.model_copy(update={"tile": described.patch})
    sources, refused = mapping.mappable(region, mapping.imagery(region, config), check, size=config.tile)
    whole = units.of == "images" or (units.of is None and not any(source.crs for source in sources))
    if not units.polygons and not whole:
        return mapping.tiles_of(region, config, check, halo=0, bands=described.bands, units=described.band_units)
    rows = _polygon_rows(Polygons.open(units.polygons), sources) if units.polygons else _image_rows(sources)
    expect_ids([row["id"] for row in rows])
    if region.tiles:
        raise ConfigError("--tiles selects tiles, but images or polygons are classified here; leave it out")
    return [*rows, *(mapping.refused_row(*entry) | {"polygon": ""} for entry in sorted(refused.items()))]


def _image_rows(sources: Sequence[Source]) -> list[Row]:
    rows = []
    for source in sources:
        [(grid, _)] = grids_of([source])
        rows.append(_row(Tile(slug(source.item_id), grid, footprint(source, grid)), [source]))
    return rows


def _polygon_rows(polygons: Polygons, sources: Sequence[Source]) -> list[Row]:
    names = polygons.frame["id"].astype(str).tolist() if "id" in polygons.frame else None
    rows: dict[int, Row] = {}
    for grid, members in grids_of(sources):
        extents = [footprint(source, grid) for source in members]
        for geometry, number in zip(*polygons.placed(grid), strict=True):
            # `placed` gives pixel coordinates, in which y grows downward.
            left, top, right, bottom = geometry.bounds
            # The window holds all of the polygon, and one pixel at least.
            col, row = int(np.floor(left)), int(np.floor(top))
            window = Window(col, row, max(1, int(np.ceil(right)) - col), max(1, int(np.ceil(bottom)) - row))
            pairs = zip(members, extents, strict=True)
            near = [source for source, extent in pairs if not extent.intersect(window).empty]
            if near and number not in rows:
                name = slug(names[number - 1]) if names else str(number)
                rows[number] = _row(Tile(name, grid, window), near) | {"polygon": shapely.to_wkb(geometry).hex()}
    if not rows:
        raise DataError(
            f"none of the {len(polygons.frame)} polygons of {polygons.where} lies on the imagery; check both"
        )
    if len(rows) < len(polygons.frame):
        lost = [number for number in range(1, len(polygons.frame) + 1) if number not in rows]
        _log.warning(
            "%d of the %d polygons of %s do not lie on the imagery and get no class: %s",
            len(lost), len(polygons.frame), polygons.where, listed([names[k - 1] if names else k for k in lost]),
        )  # fmt: skip
    return [rows[number] for number in sorted(rows)]


def _row(tile: Tile, sources: Sequence[Source]) -> Row:
    texts = json.dumps([source.to_row() for source in sources])
    return tile.to_row() | {"sources": texts, "refused": "", "polygon": ""}


def classify_units(
    step: Step, region: Region, model: Step, units: UnitsConfig, config: MapConfig, *, rows: Sequence[Row] | None = None
) -> dict[str, Any]:
    """Classify every unit; class and probabilities of each are in the step's ledger."""
    prefix = model.value["bundle"]
    described = bundle.description(prefix)
    manifest = mapping.kept_manifest(
        step, lambda: plan_units(region, described, units, config) if rows is None else rows
    )
    pictures = str(upath(step.root) / "pictures") if units.pictures else None
    works = [
        Work(ReadUnit(described.bands, described.patch, described.architecture.factory == "plots"), batch=AT_ONCE),
        Work(Classify(prefix, pictures=pictures), batch=AT_ONCE, cpus=1.0, gpus=1.0, model=True),
    ]
    patience = config.stall_seconds
    done = mapping.through(step, manifest, works, patience=patience, record=ChipRow.from_row, title="units")
    return {"bundle": prefix, **done}


def write_classes(step: Step, classified: Step) -> dict[str, Any]:
    """Write `<run>/classes.csv`, `classes.json` and `classes.parquet`: class, score and probabilities of each unit."""
    described = bundle.description(classified.value["bundle"])
    values = [value for value, _, _ in described.classes]
    names = [name for _, name, _ in described.classes]
    records = mapping.rows_with(classified, "p")
    if not records:
        raise DataError(f"no unit of {step.root} was classified; to see why, run rayseg status {step.root}")
    units, outlines = [], []
    for row, record in records:
        p_K, at = record.facts["p"], values.index(record.facts["class"])
        unit = {"id": row["id"], "class": values[at], "name": names[at], "score": round(p_K[at], 6)}
        units.append(unit | {f"p_{name}": round(p, 6) for name, p in zip(names, p_K, strict=True)})
        outlines.append(_outline(row))
    root, text = upath(step.root), io.StringIO()
    # CSV for tables and the report, JSON for programs, GeoParquet for maps: the same rows.
    writer = csv.DictWriter(text, units[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(units)
    put(root / "classes.csv", text.getvalue().encode())
    put(root / "classes.json", json.dumps({"model": described.name, "units": units}, indent=1).encode())
    vectors.write_geoparquet(_frame(units, outlines), root / "classes.parquet")
    counts = Counter(unit["name"] for unit in units)
    return {"units": len(units), "counts": {name: counts[name] for name in names}, "table": "classes.csv"}


def _outline(row: Row) -> tuple[bool, Any]:
    """(whether it is in EPSG:4326, the unit's outline; in pixels if not)."""
    tile, outline = Tile.from_row(row), row.get("polygon")
    window = tile.window
    box = shapely.box(window.col, window.row, window.col1, window.row1)
    shape = shapely.from_wkb(bytes.fromhex(outline)) if outline else box
    if tile.grid.crs is None:
        return False, shape
    return True, vectors.lonlat_of(tile.grid, np.array([shape], object))[0]


def _frame(units: Sequence[Row], outlines: Sequence[tuple[bool, Any]]) -> "geopandas.GeoDataFrame":
    import geopandas

    placed = any(on_earth for on_earth, _ in outlines)
    # Next to georeferenced units those without have no geometry; alone they are in pixels of their images.
    shapes = [shape if on_earth == placed else None for on_earth, shape in outlines]
    return geopandas.GeoDataFrame(units, geometry=shapes, crs="EPSG:4326" if placed else None)


def write_report(step: Step, classified: Step, written: Step, units: UnitsConfig) -> dict[str, Any]:
    """The report: units by class, the first ones, and some of their pictures."""
    counts, total = written.value["counts"], written.value["units"]
    summary = f"{total:,} units: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())
    first = _csv_rows(upath(step.root) / "classes.csv")[:LISTED]
    lines: list[tuple[str, ...]] = [(unit["id"], unit["name"], unit["score"]) for unit in first]
    table: report.Table = (f"The first {len(first)} units", ("unit", "class", "score"), lines)
    pictures = tuple(
        (u["id"], f"pictures/{u['id']}.webp", f"Grad-CAM++ of {u['name']}, score {u['score']}.") for u in first[:6]
    )
    extras = report.Extras(labels=summary, tables=(table,), pictures=pictures if units.pictures else ())
    figures = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in counts.items()]
    report.write_page(step.root, extras, figures=figures)
    return {"report": "report/index.html", "summary": summary}


# -- evaluation --------------------------------------------------------------------------------------------------------


def has_classes(prediction: str) -> bool:
    """Whether a prediction is a run of a classifier, or its table."""
    return (upath(prediction) / "classes.csv").exists() or suffix_of(prediction) == ".csv"


def evaluate_classes(prediction: str, truth: str) -> dict[str, Any]:
    """Compare the classes of units with their labels, by id.

    Args:
        prediction: a run of a classifier, or its classes.csv.
        truth: `catalog.json#chips` or a folder with a folder per class (`ingest folder --labels folder`); polygons with
            the columns id and label; or a CSV with these columns.

    Returns:
        As `evaluate.evaluate`, counted in units: accuracy, F1, precision and recall with 95 % intervals, `confusion`.

    Raises:
        DataError: no unit has a label, or a label is not a class of the model.
    """
    # The table alone has all that is needed: the run may no longer exist.
    path = upath(prediction) if suffix_of(prediction) == ".csv" else upath(prediction) / "classes.csv"
    predicted = {row["id"]: row for row in _csv_rows(path)}
    first = next(iter(predicted.values()))
    names = [column.removeprefix("p_") for column in first if column.startswith("p_")]
    known = _labels_of(truth)
    if unknown := sorted(set(known.values()) - set(names)):
        raise DataError(
            f"{truth} has the labels {', '.join(unknown)}, the model's are {', '.join(names)}; correct them"
        )
    both = [name for name in predicted if name in known]
    if not both:
        raise DataError(
            f"no unit of {prediction} has a label in {truth}: units are {listed(predicted)}, labelled are "
            f"{listed(known)}; use the same names"
        )
    compared = []
    for name in both:
        pair = (names.index(known[name]), names.index(predicted[name]["name"]))
        confusion = Confusion.from_arrays(np.array([pair[0]]), np.array([pair[1]]), len(names))
        compared.append(evaluate.Compared(name, name, confusion, 0))
    colors = label_table(len(names)).colors
    table = ClassTable(tuple((at, name, colors[at]) for at, name in enumerate(names)))
    # Named on both sides: a wrong spelling of ids would otherwise only make the sample smaller.
    left = {"prediction": [n for n in predicted if n not in known], "truth": [n for n in known if n not in predicted]}
    unmatched = {side: {"count": len(ids), "names": ids[: evaluate.NAMED]} for side, ids in left.items()}
    result = {"prediction": prediction, "truth": truth} | evaluate.summary(compared, table) | {"unmatched": unmatched}
    return result | {"failed": {}, "counted": "units"}


def _csv_rows(path: StorePath) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(upath(path).read_text())))


def _labels_of(truth: str) -> dict[str, str]:
    """Id -> label; images in folders of classes have the ids `<class>-<stem>` and `<stem>`, where it is unique."""
    uri, collection = split_location(truth)
    if suffix_of(uri) == ".json" or collection:
        chips = labels.chips_of(stac_read.open_items(uri, collection or None))
        return {chip.id: chip.label for chip in chips if chip.label}
    if upath(truth).is_dir():
        files = [(folder.name, path) for folder in sorted(upath(truth).iterdir()) if folder.is_dir()
                 for path in sorted(folder.iterdir()) if kind_of(str(path))]  # fmt: skip
        # A stem that occurs in two classes names neither image.
        stems = Counter(slug(path.stem) for _, path in files)
        alone = {slug(path.stem): label for label, path in files if stems[slug(path.stem)] == 1}
        return alone | {slug(f"{label}-{path.stem}"): label for label, path in files}
    if suffix_of(truth) == ".csv":
        rows: Sequence[Any] = _csv_rows(truth)
        columns = set(rows[0]) if rows else set()
    else:
        frame = Polygons.open(truth).frame
        rows, columns = frame.to_dict("records"), set(frame.columns)
        rows = rows if "id" in columns else [row | {"id": at} for at, row in enumerate(rows, 1)]
    if "label" not in columns:
        raise DataError(
            f"{truth} has the columns {', '.join(sorted(columns)) or 'none'}, expected id and label; add them"
        )
    return {slug(str(row["id"])): str(row["label"]) for row in rows}
