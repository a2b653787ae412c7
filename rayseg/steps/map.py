"""The final steps of every pipeline: predict all tiles of a region, join polygons, publish items.

Each function is a step of a `Run`: it takes the step and its inputs, and returns JSON values.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from pydantic import Field

from rayseg import __version__
from rayseg.config import Config, added
from rayseg.engine import flow
from rayseg.engine import run as runs
from rayseg.engine.flow import Work
from rayseg.engine.ledger import SETTLED, Ledger, Record, with_fact
from rayseg.engine.manifest import Manifest, Row, read_rows, write_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, ModelError, RaysegError, listed
from rayseg.geo.grid import Grid, Tile, Window, slug
from rayseg.geo.region import Region
from rayseg.io import labels, qgis, stac_read, stac_write, vectors
from rayseg.io.maps import mean_metres, recorded_rows
from rayseg.io.output_grids import beyond_utm, expect_mappable, out_of_scale
from rayseg.io.seams import begins_of
from rayseg.io.sources import Source, from_json
from rayseg.io.tables import attempted, concurrently, content
from rayseg.io.units import converted, expect_one_dtype, expect_one_unit, with_dtype_of
from rayseg.models import bundle
from rayseg.models.bundle import Precision
from rayseg.stages.carry import Carried, CarryOver
from rayseg.stages.gather import GatherParts
from rayseg.stages.predict import Predict
from rayseg.stages.read import ReadTile, inputs_of, rows_by_grid
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile
from rayseg.store import Location, absolute, put, split_location, upath
from rayseg.vision.color import ClassTable

if TYPE_CHECKING:
    import pyarrow as pa

SMALL_TILE = 128
"""Side in px of a tile, below which its files and its halo cost more than its pixels."""
SEEN = 64
"""Tiles whose imagery is compared with the resolution that a model learnt from."""
MOST_FILES = 4096
"""Files with parts of polygons that the joining process opens; more are gathered first, `GATHERED` at a time."""
GATHERED = 128
FIRST = "first.json"
"""File of a step: the seconds after which its first row was finished."""
_log = logging.getLogger(__name__)
Refused = dict[str, RaysegError]
Labels = TypeVar("Labels")


class MapConfig(Config):
    """Settings for mapping a region."""

    imagery: Location | None = None
    """Catalogue of the imagery (`catalog.json#collection`); by default that of the region."""
    tile: Annotated[int, Field(gt=0)] = 2048
    """Side of a tile in px."""
    batch: Annotated[int, Field(gt=0)] | None = None
    """Patches per batch; by default the number of processors, at most 4, and 16 on a GPU."""
    precision: Precision = added(default="auto")
    """Of a CPU: fp32; bf16, bfloat16; auto, bfloat16 where the CPU multiplies it natively and the model's maps hardly
    change (measured after its training). A GPU computes in bfloat16."""
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Timeout for reading, predicting or writing one tile; the tile is then recorded as failed."""
    bands: dict[str, str] = added(default={})
    """Names of the model's bands -> names of the imagery's, where they differ: `{red: b1, green: b2, blue: b3}`."""


SCORED = "predict"
"""The step of a run whose tiles have classes and scores."""


@dataclass(frozen=True)
class Plan(Generic[Labels]):
    """Results of the check of a run, reused by `forecast` and `run`.

    A resumed run has an empty plan: its steps read their stored rows or plan again.

    Attributes:
        tiles: rows of all tiles of the map.
        labels: the labelled training data, in the form the pipeline's steps expect.
        before: rows of the tiles that are enlarged first, if the pipeline enlarges its imagery.
        drawn: labelled images that a second network learns from.
    """

    tiles: Sequence[Row] | None = None
    labels: Labels | None = None
    before: Sequence[Row] | None = None
    drawn: Any = None


def threshold_of(root: str) -> float | None:
    """The threshold of a run's binary map: its own setting, else that of its model; None if that is gone or unknown."""
    content = runs.read(root)
    if (own := content["config"].get("threshold")) is not None:
        return float(own)
    mapped = content.get("steps", {}).get(SCORED, {})  # nothing while the map is made
    with suppress(ConfigError, ModelError, KeyError):
        if origin := mapped.get("run"):  # made from another run with its threshold
            return threshold_of(origin)
        return bundle.description(mapped["bundle"]).threshold
    return None


def load_model(step: Step, prefix: str) -> dict[str, Any]:
    """Load a trained model as a step, so that later steps depend on its weights and not only on its name."""
    described = bundle.description(prefix)
    # Maps of segmenters keep the keys that their steps had before classifiers could predict.
    task = {} if described.task != "classification" else {"task": described.task}
    return {"bundle": absolute(prefix), "sha256": described.sha256, **task}


def predict_region(
    step: Step,
    region: Region,
    model: Step,
    config: MapConfig,
    *,
    tiles: Sequence[Row] | None = None,
    earlier: str | None = None,
) -> dict[str, Any]:
    """Map every tile of the region; results are in tiles/<id>/, the status of each tile is in the step's ledger.

    Args:
        step: the current step.
        region: the region to map.
        model: the step that provides the model.
        config: settings of the map.
        tiles: rows of the tiles, if they are already planned.
        earlier: prefix of a run whose tiles are taken over where nothing that they are made from has changed.
    """
    described = bundle.description(model.value["bundle"])
    rows = manifest(step, region, described, config, tiles=tiles)
    seen = [source for row in islice(rows, SEEN) for source in from_json(row["sources"])]
    if warning := described.scale_warning(mean_metres(seen)):
        _log.warning("%s", warning)
    table = ClassTable(described.classes)
    # A model of one output has the score of its last class alone.
    names = table.names if described.outputs > 1 else (table.names[-1],)
    item = str(upath(model.value["bundle"]) / "item.json")
    asked = [] if config.precision == "auto" else [config.precision]
    made_by = json.dumps([__version__, described.model_dump(mode="json"), region.geometry, *asked])
    carried: Sequence[Row] = ()
    if earlier:
        carried = unchanged_tiles(earlier, rows, made_by)
        stage = Work(CarryOver(earlier, step.root, table, model=item))
        # All others are mapped below; one whose files are damaged fails, and a retry maps it.
        through(step, carried, [stage], patience=config.stall_seconds, record=itemgetter("carried"), title="unchanged")
    works = [
        Work(ReadTile(described.bands, patch=described.patch, stride=described.stride, made_by=made_by)),
        Work(predictor(model, config), cpus=1.0, gpus=1.0, model=True),
        Work(WriteTile(tiles_prefix(step), table, bands=names, geometry=region.geometry, model=item)),
    ]
    done = through(step, rows, works, patience=config.stall_seconds)
    return {"bundle": model.value["bundle"], **done, **({"carried": len(carried)} if earlier else {})}


def predictor(model: Step, config: MapConfig) -> Predict:
    """The stage that predicts with a step's model as a map is configured."""
    return Predict(model.value["bundle"], batch=config.batch, precision=config.precision)


def unchanged_tiles(earlier: str, rows: Manifest, made_by: str) -> list[Row]:
    """`id` and `carried` of the tiles that an earlier run has made from what they would be made from now.

    Args:
        earlier: prefix of the run.
        rows: of the tiles of this one.
        made_by: key of what makes the map.
    """
    found = (record for _, part in recorded_rows(earlier) for record in part)
    known = {one.id: one for one in found if one and one.status in SETTLED and "counts" in one.facts}

    def carried(row: Row) -> Row | None:
        record = known.get(row["id"])
        # Earlier versions did not record what a tile was made from.
        if not record or record.facts.get("unread") or not (inputs := record.facts.get("inputs")):
            return None
        if inputs_of(TileRow.from_row(row), made_by) != inputs:
            return None
        return {"id": row["id"], "carried": Carried(Tile.from_row(row), tuple(from_json(row["sources"])), record)}

    # At once, as the version of a remote file is a request.
    return [row for row in concurrently(carried, rows) if row]


def through(
    step: Step,
    rows: Sequence[Row],
    works: Sequence[Work],
    *,
    patience: float,
    record: Callable[[Row], Any] = TileRow.from_row,
    title: str = "tiles",
) -> dict[str, Any]:
    """Run rows through stages and record them in the step's ledger.

    Args:
        step: the step whose manifest contains the rows.
        rows: see `flow.run`.
        works: the stages.
        patience: timeout in seconds of one stage on one row.
        record: see `flow.run`.
        title: name of the rows, for example "tiles".

    Returns:
        `account`: status -> rows; `troubles`: row -> reason; `on_gpu`: names of the stages that request GPUs.
    """
    began = time.monotonic()

    def first() -> None:
        put(step.prefix / FIRST, json.dumps({"seconds": time.monotonic() - began}).encode())

    account = flow.run(
        rows, works, ledger_of(step), step.engine, record=record, title=title, stall_seconds=patience, first=first
    )
    on_gpu = [work.name for work in works if work.gpus]
    return {"account": account.counts, "troubles": account.troubles, "on_gpu": on_gpu}


def manifest(
    step: Step,
    region: Region,
    described: bundle.Bundle,
    config: MapConfig,
    *,
    tiles: Sequence[Row] | None = None,
) -> Manifest:
    """The step's rows, planned once: later executions use the same items and tiles, even if the catalogue changes.

    Raises:
        RaysegError: see `tiles_for`.
    """
    return kept_manifest(step, lambda: tiles_for(region, described, config) if tiles is None else tiles)


def kept_manifest(step: Step, planned: Callable[[], Sequence[Row]]) -> Manifest:
    """The step's rows, planned by the first execution and read by later ones; the manifest may be empty."""
    path = step.manifest
    if not path.exists():
        rows = planned()
        rows = rows if isinstance(rows, Manifest) else Manifest.of([rows])
        if refused := rows.refused():
            scenes = f"{len(refused)} scene{'s' * (len(refused) > 1)}"
            _log.warning("%s cannot be mapped (reasons in the ledger): %s", scenes, listed(refused))
        write_rows(path, rows, root=step.root)
        return rows
    return read_manifest(step)


def tiles_for(region: Region, described: bundle.Bundle, config: MapConfig) -> Manifest:
    """Plan the rows of all tiles to map with a model; only the metadata of the imagery is read.

    Raises:
        RaysegError: see `tiles_of`.
        ModelError: the model is not a segmentation model, or no imagery meets its input contract.
    """
    if described.task != "segmentation":
        raise ModelError(f"model {described.name} is for {described.task}, a map needs segmentation; give a segmenter")

    def check(source: Source) -> None:
        expect_one_dtype(source, described.bands, model=described.name)
        described.check_contract(source.bands, source.dtype, units=source.units, source=source.item_id)

    # A patch that touches a tile reaches at most a patch and a stride beyond it.
    halo, units = described.patch + described.stride, described.band_units
    return tiles_of(region, config, check, halo=halo, bands=described.bands, units=units)


def tiles_of(
    region: Region,
    config: MapConfig,
    check: Callable[[Source], None],
    *,
    halo: int,
    bands: Sequence[str] = (),
    units: Mapping[str, tuple[float, float]] | None = None,
) -> Manifest:
    """Plan the rows of all tiles of a region, or of the requested tiles.

    If only some scenes can be mapped, each of the others becomes one row that fails; its column `refused` contains the
    reason.

    Args:
        region: the region to map.
        config: location of the imagery and tile size.
        check: raises an error if a source cannot be used.
        halo: px around a tile within which a source still affects the tile.
        bands: those that are read; () for all.
        units: band -> (scale, offset) that the model expects; imagery that states others is converted.

    Raises:
        ConfigError: a requested tile does not exist.
        DataError: the region has no imagery, no imagery that can be read and georeferenced, or imagery of several
            units (see `units.expect_one_unit`).
        RaysegError: from `check`, if it rejects all of the imagery.
    """
    sources, unread = imagery(region, config, halo=halo)
    sources = [converted(with_dtype_of(source, bands), units or {}) for source in sources]
    sources, refused = mappable(region, (sources, unread), check, size=config.tile)
    # After the unusable scenes are out: their units do not matter.
    expect_one_unit(sources, bands)
    rows = Manifest.of(_parts(sources, refused, region, size=config.tile, halo=halo))
    # Only rows of refused scenes are left.
    if len(rows) == len(refused):
        raise DataError(f"region {region.name} has no tile with imagery; choose another --region")
    return requested_tiles(rows, region, size=config.tile)


def requested_tiles(rows: Manifest, region: Region, *, size: int) -> Manifest:
    """Select the rows of the tiles that the region names, or all rows if it names none.

    Args:
        rows: of all tiles.
        region: names tiles by their ids.
        size: side of a tile in px.

    Raises:
        ConfigError: a requested tile does not exist.
        DataError: an id is not a valid file name, or two ids are equal.
    """
    # Before ids become folders: two tiles of one id would overwrite each other.
    rows.expect_ids()
    if unknown := sorted(set(region.tiles) - set(rows.only(region.tiles).ids.to_pylist())):
        raise ConfigError(
            f"region {region.name} has no tile {listed(unknown)}, its tiles of {size} px are "
            f"{listed(rows.ids)}; correct --tiles"
        )
    return rows.only(region.tiles) if region.tiles else rows


def _parts(sources: Sequence[Source], refused: Refused, region: Region, *, size: int, halo: int) -> Iterator[list[Row]]:
    """Yield the rows of the tiles grid by grid, then the rows of the scenes that cannot be mapped."""
    for rows in rows_by_grid(sources, region.geometry, size=size, halo=halo):
        yield [row | {"refused": ""} for row in rows]
    yield [refused_row(*entry) for entry in sorted(refused.items())]


def mappable(
    region: Region, scenes: tuple[Sequence[Source], Refused], check: Callable[[Source], None], *, size: int
) -> tuple[list[Source], Refused]:
    """The sources that can be mapped together, and the errors of the others by id.

    Args:
        region: the region to map.
        scenes: its `imagery`.
        check: raises an error if a source cannot be used.
        size: side of a tile in px.

    Raises:
        RaysegError: no source can be mapped; the error comes from `check`, `imagery` or the source.
    """
    if size < SMALL_TILE:
        _log.warning("map.tile is %d px: each tile has files and a halo of its own; use 512 or more", size)
    sources, unread = scenes
    refused = dict(unread)
    for source in sources:
        try:
            expect_mappable(source, tile=size)
            check(source)
        except RaysegError as error:
            refused[source.item_id] = error
    # Only scenes that can be read decide whether all lie in UTM zones.
    left = [source for source in sources if source.item_id not in refused]
    refused |= beyond_utm(left)
    left = [source for source in left if source.item_id not in refused]
    refused |= out_of_scale(left, region.geometry, tile=size)
    if not (kept := [source for source in left if source.item_id not in refused]):
        first = next(iter(refused.values()))
        if len(refused) == 1:
            raise first
        count = len(refused)
        raise type(first)(f"none of the {count} scenes of {region.name} can be mapped, the first because: {first}")
    return kept, refused


def refused_row(item_id: str, error: RaysegError) -> Row:
    """The row of a scene that cannot be used: it fails with the reason."""
    # An empty tile on a grid of its own: the row reaches the ledger without being read.
    tile = Tile(slug(item_id), Grid(None, (1.0, 1.0), (0.0, 0.0), item_id), Window(0, 0, 0, 0))
    return tile.to_row() | {"sources": "[]", "refused": refusal(error)}


def refusal(error: RaysegError) -> str:
    """Reason stored with a refused scene; it is permanent, because the plan is fixed at the start."""
    return f"{error}; recorded when the run was planned: fix the scene and use another --out"


def read_manifest(step: Step) -> Manifest:
    """The rows that `manifest` planned."""
    return read_rows(step.manifest, root=step.root)


def imagery(region: Region, config: MapConfig, *, halo: int = 0) -> tuple[list[Source], Refused]:
    """Sources of the region from `config.imagery`, else its images, else its catalogue; and errors of unreadable items.

    Scenes within `halo` px of the region are included, because patches extend beyond its border.

    Raises:
        DataError: the region names no imagery.
    """
    if config.imagery:
        uri, collection = split_location(config.imagery)
        items = stac_read.open_items(uri, collection or None, geometry=region.geometry, halo=halo)
    elif region.images:
        images, wrong = labels.sources_of_images(region.images)
        return _named(images, dict(wrong), config)
    elif region.catalog:
        chosen = region.collection or stac_read.imagery_collection(region.catalog)
        items = stac_read.open_items(region.catalog, chosen, geometry=region.geometry, halo=halo)
    else:
        raise DataError(
            f"region {region.name} names no imagery; give it with --set map.imagery=catalog.json#collection"
        )
    # An item that cannot be read fails alone, unless it is the only one.
    read, unread = attempted(stac_read.source_of, items)
    return _named([source for _, source in read], {item.id: error for item, error in unread}, config)


def _named(sources: Sequence[Source], refused: Refused, config: MapConfig) -> tuple[list[Source], Refused]:
    """Sources with the configured names of their bands; one that lacks a band is added to `refused`."""
    named = []
    for source in sources:
        try:
            named.append(with_names(source, config.bands))
        except DataError as error:
            refused = {**refused, source.item_id: error}
    return named, refused


def with_names(source: Source, names: Mapping[str, str]) -> Source:
    """The source with its bands called by other names (new -> own); the file's own order and bands stay.

    An own name is that of a band, or in a single file `b1`, `b2`, ... or 1, 2, ... by position. Another band that has
    one of the new names loses it: `{red: nir}` shows near infrared as red.

    Raises:
        DataError: the source has no such band, or two bands would have one name.
    """
    if not names:
        return source
    # Positions name bands of a single file only: several files have no order that a user sees.
    own = [name for _, bands in source.assets for name in bands]
    places = {name: at for at, name in enumerate(own)}
    if len(source.assets) == 1:
        places |= {f"{letter}{at + 1}": at for at in range(len(own)) for letter in ("b", "") if f"b{at + 1}" not in own}
    if missing := [f"{new}: {name}" for new, name in names.items() if name not in places]:
        raise DataError(
            f"map.bands says {', '.join(missing)}, but {source.item_id} has the bands {', '.join(own)}; name some of "
            "them"
        )
    called = {places[name]: new for new, name in names.items()}
    renamed = [called.get(at, f"own {name}" if name in names else name) for at, name in enumerate(own)]
    if len(set(renamed)) < len(renamed) or len(called) < len(names):
        raise DataError(f"map.bands gives bands of {source.item_id} one name ({', '.join(renamed)}); correct it")
    left = iter(renamed)
    return replace(source, assets=tuple((href, tuple(next(left) for _ in bands)) for href, bands in source.assets))


def tiles_prefix(step: Step) -> str:
    """Prefix of finished tiles, the same for every step of a run."""
    return str(upath(step.root) / "tiles")


def ledger_of(step: Step) -> Ledger:
    """The step's ledger."""
    return Ledger(str(step.prefix / "ledger"))


def rows_with(step: Step, fact: str) -> list[tuple[Row, Record]]:
    """(manifest row, record) of every row of a step whose ledger record contains `fact`."""
    return with_fact(read_manifest(step), ledger_of(step).read(), fact)


def done_tiles(predicted: Step) -> Iterator[tuple[Row, Record]]:
    """Yield the manifest row and record of every tile with files; one part of the manifest is in memory at a time."""
    for rows, records in recorded_rows(predicted.root, predicted.name):
        for row, record in zip(Manifest(rows), records, strict=True):
            if record and "counts" in record.facts:
                yield row, record


def table_of(predicted: Step) -> ClassTable:
    """The classes of a map: those that its step names, else those of its model."""
    if rows := predicted.value.get("classes"):
        return ClassTable(tuple((value, name, (red, green, blue)) for value, name, (red, green, blue) in rows))
    return ClassTable(bundle.description(predicted.value["bundle"]).classes)


def join_polygons(step: Step, predicted: Step, product: str) -> dict[str, Any]:
    """Join the polygons of all tiles, or blocks, across their edges and write `<run>/<product>.parquet`.

    Raises:
        DataError: a tile has no parts where its record says so.
    """
    table, folder, skip = table_of(predicted), tiles_prefix(step), predicted.value.get("skip", ())
    pieces, grids, extents = [], dict[Grid, Grid](), dict[Grid, Window]()
    for row, record in done_tiles(predicted):
        tile = Tile.from_row(row)
        grid = grids.setdefault(tile.grid, tile.grid)  # one object for all tiles of a grid
        extents[grid] = extents.get(grid, tile.window).union(tile.window)
        if "blocks" in record.facts:  # of `generalize`, which draws by blocks instead of tiles
            for name, (top, left, count) in record.facts["blocks"].items():
                path = f"{predicted.prefix}/blocks/{name}.parquet"
                pieces.append((vectors.tile_order(grid, top, left), path if count else "", grid))
        else:
            order = vectors.tile_order(grid, tile.window.row, tile.window.col)
            path = f"{folder}/{tile.id}/parts.parquet"
            pieces.append((order, "" if record.facts.get("parts") == 0 else path, grid))
    pieces.sort(key=itemgetter(0))
    # A file without parts is not read, which saves a request.
    files = [(path, grid) for _, path, grid in pieces if path]
    if len(files) > MOST_FILES:
        files, skip = _gathered(step, files, skip), ()
    with_parts = {grid for _, grid in files}
    files += [("", grid) for grid in extents if grid not in with_parts]

    def parts_of(file: tuple[str, Grid]) -> "pa.Table":
        path, grid = file
        return vectors.read_parts(path, skip=skip) if path else vectors.no_parts(grid)

    # In reading order, so that memory holds two rows of tiles at a time, or some gathered files.
    target = upath(step.root) / f"{product}.parquet"
    begins = begins_of(Tile("", grid, extent) for grid, extent in extents.items())
    parts = concurrently(parts_of, files, ahead=16)
    count, area = vectors.write_joined(parts, table, target, begins)
    return {"polygons": target.name, "count": count, "area_m2": area}


def _gathered(step: Step, files: Sequence[tuple[str, Grid]], skip: Sequence[int]) -> list[tuple[str, Grid]]:
    """(path, grid) of few files with the parts of many, in the same order, which the engine's processes write."""
    rows, grids = list[Row](), list[Grid]()
    for grid, some in groupby(files, key=itemgetter(1)):
        paths = [path.removeprefix(f"{step.root}/") for path, _ in some]
        for start in range(0, len(paths), GATHERED):
            rows.append({"id": f"parts-{len(rows):06d}", "paths": json.dumps(paths[start : start + GATHERED])})
            grids.append(grid)
    target = f"{step.prefix}/parts"
    # A part that was missing before may be there now.
    again = replace(step, engine=replace(step.engine, retry=True))
    works = [Work(GatherParts(step.root, target, skip=skip))]
    kept = kept_manifest(step, lambda: rows)
    done = through(again, kept, works, patience=1800.0, record=dict, title="files of polygons")
    if troubles := done["troubles"]:
        raise DataError(f"the polygons cannot be joined: {next(iter(troubles.values()))}")
    return [(f"{target}/{row['id']}.parquet", grid) for row, grid in zip(rows, grids, strict=True)]


def publish(step: Step, predicted: Step, title: str) -> dict[str, Any]:
    """Write collection.json and items.parquet from the items of all tiles, which the ledger stores."""
    folder = tiles_prefix(step)

    def item_of(tile: tuple[Row, Record]) -> tuple[str, dict[str, Any]]:
        row, record = tile
        href = f"{folder}/{row['id']}/{row['id']}.json"
        if "item" in record.facts:
            return href, stac_write.unpacked(record.facts["item"])
        return href, json.loads(content(href))  # earlier versions wrote the item next to the tile only

    count = stac_write.write_collection(step.root, concurrently(item_of, done_tiles(predicted)), title=title)
    return {"items": count}


def save_project(step: Step, predicted: Step, polygons: Step) -> dict[str, Any]:
    """Write the QGIS project of a map with a CRS; the run continues without one that cannot be written.

    Args:
        step: the current step.
        predicted: the step that mapped the region.
        polygons: the step that wrote the polygons or plots; the project has a copy of them.
    """
    if any(Tile.from_row(row).grid.crs for row, _ in islice(done_tiles(predicted), 1)):
        try:
            qgis.save(step.root)
        except DataError as error:  # the map itself is whole
            _log.warning(
                "%s has no QGIS project: %s; then: rayseg export %s --format qgis", step.root, error, step.root
            )
    return {}
