"""Scenes for per-scene training: select those that can be mapped together, scale values, find the model of a tile."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from upath import UPath

from rayseg.engine.ledger import MISSING, SETTLED, Ledger, Record, Settled
from rayseg.engine.manifest import Row
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import NODATA, Tile, expect_ids, slug
from rayseg.geo.region import Region
from rayseg.io import cog, maps, pictures, rasters, segments
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.sources import Source, from_json
from rayseg.io.units import common_units, converted, expect_one_dtype, expect_one_unit, with_dtype_of
from rayseg.models.bundle import Scaling
from rayseg.stages.cluster import labels_path
from rayseg.stages.oversegment import segments_path
from rayseg.stages.read import tile_rows
from rayseg.stages.rows import TileRow
from rayseg.steps import agreement, report, simple_labels
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.steps.numbers import counted
from rayseg.store import put, upath
from rayseg.vision.color import mean_color
from rayseg.vision.crops import middle
from rayseg.vision.superpixels import outlined

How = Literal["auto", "range", "percentiles"] | Scaling
ALL_SCENES = "all-scenes"
"""Id of the row of the network that all scenes share."""
MOST_CURVES = 6
"""Networks whose training the report draws."""
Near = tuple[tuple[str, int, int, int, int], ...]
"""See `TileRow.near`."""


@dataclass(frozen=True)
class Scenes:
    """The scenes of a region.

    Attributes:
        rows: one per network: `id`, `tiles` (rows of its tiles as JSON) and `refused`, the reason why the scene cannot
            be mapped with the others; such a scene has no tiles.
        bands: names of the bands, in order.
        dtype: of the values.
    """

    rows: Sequence[Row]
    bands: tuple[str, ...]
    dtype: str

    @property
    def tiles(self) -> list[list[Row]]:
        """Rows of the tiles of every network."""
        return [tiles for row in self.rows if (tiles := json.loads(row["tiles"]))]


def find_scenes(
    region: Region,
    config: MapConfig,
    *,
    halo: int,
    bands: tuple[str, ...],
    scaling: How,
    shared: bool,
) -> Scenes:
    """Find the scenes of a region with their tiles; only the metadata of the imagery is read.

    Args:
        region: the region to map.
        config: location of the imagery and tile size.
        halo: px around a tile within which a scene still affects the tile.
        bands: of the imagery; () selects all but alpha, and every scene must then have the same bands.
        scaling: of the values, if it is configured.
        shared: one network for all scenes, on their common grid; else each scene has its own tiles.

    Raises:
        DataError: there is no imagery, or no imagery that can be mapped.
        ConfigError: a tile or band does not exist, or the scaling has another number of bands.
    """
    # 1. scenes of the most frequent kind can be mapped together
    sources, unread = mapping.imagery(region, config, halo=halo if shared else 0)
    sources = [with_dtype_of(source, bands) for source in sources]
    real = [source for source in sources if not source.dtype.startswith("complex")]
    usable = [source for source in real if set(bands) <= set(source.bands)]
    # The most frequent kind wins; scenes of other kinds are refused one by one, not the whole run.
    kinds = Counter(_kind(source, bands) for source in usable)
    ordered = sorted(usable, key=lambda source: source.item_id) or sources
    first = max(ordered, key=lambda source: kinds[_kind(source, bands)], default=None)
    sources, refused = mapping.mappable(
        region, (sources, unread), partial(_expect_alike, first, bands), size=config.tile
    )
    if shared:
        # One network sees values of all scenes, so they need one unit; separate networks do not.
        units = common_units(sources, bands)
        sources = [converted(source, units) for source in sources]
        expect_one_unit(sources, bands)
    # 2. the tiles of every network
    # Tiles chosen by name count all of their ground: the scenes over them may not be mapped there.
    rows, over = [], {} if shared or region.tiles else _overlaps(sources)
    for group in [sources] if shared else [[source] for source in sources]:
        name, scene = (ALL_SCENES, "") if shared else (slug(group[0].item_id), group[0].item_id)
        tiles = _counted_before(
            list(tile_rows(group, region.geometry, size=config.tile, halo=halo)), over.get(group[0].item_id, [])
        )
        if not shared and tiles and tiles[0]["crs"] is not None:
            # A grid of its own, so that each scene keeps its labels where scenes overlap; images without georeference
            # have one already.
            tiles = [row | {"grid_image": scene, "id": f"{slug(scene)}_{row['id']}"} for row in tiles]
        tiles = [row for row in tiles if not region.tiles or row["id"] in region.tiles]
        rows += [{"id": name, "tiles": json.dumps(tiles), "refused": ""}] if tiles else []
    ids = [tile["id"] for row in rows for tile in json.loads(row["tiles"])]
    if unknown := sorted(set(region.tiles) - set(ids)):
        raise ConfigError(f"region {region.name} has no tile {listed(unknown)}; correct --tiles")
    if not ids:
        raise DataError(f"region {region.name} has no tile with imagery; choose another --region")
    if not region.tiles:
        wrong = sorted(refused.items())
        rows += [{"id": slug(name), "tiles": "[]", "refused": mapping.refusal(why)} for name, why in wrong]
    expect_ids([row["id"] for row in rows])
    expect_ids(ids)
    # 3. the bands that the networks see
    named = min(sources, key=lambda source: source.item_id)
    bands = bands or _all_bands(named)
    if isinstance(scaling, Scaling) and len(scaling.mean) != len(bands):
        raise ConfigError(
            f"scaling is of {len(scaling.mean)} bands, the imagery has {', '.join(bands)}; give one mean and std for "
            "each, or choose with --set bands=[...]"
        )
    return Scenes(rows, bands, named.dtype)


def _overlaps(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """For each scene, by id, the newer ones (then by id) that its ground may share."""
    over = defaultdict[str, list[Source]](list)
    for grid, members in grids_of(sources):
        # 1. boxes on a common grid: scenes are many, pairs that meet are few
        windows = [footprint(source, grid) for source in members]
        boxes = [shapely.box(window.col, window.row, window.col1, window.row1) for window in windows]
        for later, earlier in shapely.STRtree(boxes).query(boxes, predicate="intersects").T:
            # 2. the same pair may meet in two zones
            if earlier < later and members[earlier] not in over[members[later].item_id]:
                over[members[later].item_id].append(members[earlier])
    return over


def _counted_before(tiles: list[Row], over: Sequence[Source]) -> list[Row]:
    """Tiles of one scene, each with the scenes over it whose ground counts first as JSON in `before`."""
    grid = Tile.from_row(tiles[0]).grid if tiles else None
    windows = [footprint(source, grid) for source in over] if grid else []
    counted = []
    for row in tiles:
        met = [not window.intersect(Tile.from_row(row).window).empty for window in windows]
        before = [source.to_row() for source, meets in zip(over, met, strict=True) if meets]
        counted.append(row | {"before": json.dumps(before)})
    return counted


def _kind(source: Source, bands: tuple[str, ...]) -> tuple[frozenset[str], str]:
    return frozenset(bands or _all_bands(source)), source.dtype


def _all_bands(source: Source) -> tuple[str, ...]:
    return tuple(name for name in source.bands if name != "alpha")


def _expect_alike(first: Source | None, bands: tuple[str, ...], source: Source) -> None:
    """Check that a scene has bands of one dtype, the same as the first."""
    expect_one_dtype(source, bands or _all_bands(source))
    if first is None or (set(bands) <= set(source.bands) and _kind(source, bands) == _kind(first, bands)):
        return
    raise DataError(
        f"{source.item_id} has {', '.join(_all_bands(source))} of {source.dtype}, expected "
        f"{', '.join(bands or _all_bands(first))} of {first.dtype} as {first.item_id} has; name common bands with "
        "--set bands=[...], or map them in two runs"
    )


def scaled_rows(listed: Step, how: How) -> list[Row]:
    """Rows of the scenes with data, each with its scaling to 0..1 as JSON.

    Args:
        listed: the step that listed the scenes and computed the percentiles of their values.
        how: see `scaling_of`.
    """
    bands, dtype = len(listed.value["bands"]), listed.value["dtype"]
    return [
        row | {"scaling": scaling_of(how, record.facts, dtype, bands).model_dump_json()}
        for row, record in mapping.rows_with(listed, "low")
    ]


def scaling_of(how: How, percentiles: Mapping[str, Any], dtype: str, bands: int) -> Scaling:
    """The scaling of a scene's values to 0..1: (value - low) / (high - low).

    Args:
        how: "range" of the dtype, "percentiles" of the scene, or a given scaling; "auto" uses the range for uint8 and
            percentiles for any other dtype.
        percentiles: `low` and `high` of every band.
        dtype: of the values.
        bands: number of bands.
    """
    if isinstance(how, Scaling):
        return how
    if how == "percentiles" or (how == "auto" and dtype != "uint8"):
        # The network takes (value - mean) / std, so this maps low..high to 0..1.
        low, high = percentiles["low"], percentiles["high"]
        return Scaling(mean=tuple(low), std=tuple(b - a for a, b in zip(low, high, strict=True)))
    top = float(np.iinfo(dtype).max) if np.dtype(dtype).kind in "ui" else 1.0
    return Scaling(mean=(0.0,) * bands, std=(top,) * bands)


def divided_tiles(step: Step) -> list[tuple[Tile, int]]:
    """Tiles with superpixels, and the number of superpixels of each."""
    return [(Tile.from_row(row), record.facts["segments"]) for row, record in mapping.rows_with(step, "segments")]


def with_network(fates: Mapping[str, Record], models: UPath, row: Row) -> TileRow | Settled:
    """The tile with its scene's network, `<models>/<scene>`; without a network it shares the scene's fate.

    The ledger has the prefix of the network too, but as it was when the network was trained: the run may have moved.
    """
    scene = row["scene"]
    fate = fates.get(scene)
    if fate is None or (fate.status == "done" and "bundle" not in fate.facts):
        return Settled("failed", f"scene {scene}: {MISSING}")
    if "bundle" in fate.facts:
        tile = TileRow.from_row(row)
        return replace(tile, bundle=str(models / scene), before=mapped_before(fates, tile.before))
    return Settled(fate.status if fate.status in SETTLED else "failed", f"scene {scene}: {fate.reason}")


def mapped_before(fates: Mapping[str, Record], before: str) -> str:
    """The scenes in `TileRow.before` that count ground: of those without a map, failed ones will, after a retry."""
    known = [(source, fates.get(slug(source.item_id))) for source in from_json(before)]
    return json.dumps([source.to_row() for source, its in known if not its or its.status in {"done", "failed"}])


def neighbours(divided: Step, size: int) -> dict[str, Near]:
    """For each tile with superpixels, itself and its neighbours that have some: see `TileRow.near`."""
    tiles = [tile for tile, _ in divided_tiles(divided)]
    # Superpixels at a border are cut there, so a tile needs those of its eight neighbours.
    places = {(tile.grid, tile.window.row // size, tile.window.col // size): tile for tile in tiles}
    around = list(product((-1, 0, 1), repeat=2))
    return {
        tile.id: tuple(
            (near.id, *astuple(near.window))
            for down, right in around
            if (near := places.get((grid, row + down, col + right))) is not None
        )
        for (grid, row, col), tile in places.items()
    }


def with_clusters(
    record: Callable[[Row], TileRow | Settled],
    divided: Mapping[str, Record],
    near: Mapping[str, Near],
    labels: str,
    row: Row,
) -> TileRow | Settled:
    """The tile with the labels of its superpixels; without superpixels it has the fate of their step."""
    tile, fate = record(row), divided.get(row["id"])
    # The scene has no network, which explains more than the state of the superpixels.
    if isinstance(tile, Settled):
        return tile
    if row["id"] in near:
        return replace(tile, labels=labels_path(labels, row["scene"]), near=near[row["id"]])
    reason = fate.reason if fate else f"its superpixels: {MISSING}"
    return Settled(fate.status if fate and fate.status in SETTLED else "failed", reason)


def draw(step: Step, listed: Step, divided: Step, predicted: Step) -> dict[str, Any]:
    """Draw the map in the mean colour of each label, and the superpixels over the centre of one tile."""
    tiles, drawn = maps.mapped_tiles(predicted.root, predicted.name), []
    for number, picture in enumerate(pictures.pictures_of(tiles, most=2)):
        # 254 stands for pixels without a label, which are drawn transparent.
        seen = picture.classes_HW != NODATA
        mean_HWC = mean_color(picture.image_HWC, np.where(seen, picture.classes_HW, 254))
        mean_HWA = np.dstack([mean_HWC, np.where(seen, 255, 0)]).astype(np.uint8)
        put(step.prefix / (name := f"mean-{number}.png"), pictures.encoded(mean_HWA))
        caption = "Every label in its mean colour."
        drawn.append([f"Mean colours, {picture.title}", f"steps/{step.name}/{name}", caption])
    prefix = divided.value["segments"]
    usable = {tile.id for tile, _ in divided_tiles(divided)} if prefix else set()
    for mapped in [mapped for mapped in tiles if mapped.tile.id in usable][:1]:
        window = mapped.tile.window
        part = middle(window, 512).intersect(window)
        image_HWC = pictures.shown(mapped.sources, mapped.tile.grid, part)
        numbers_HW = segments.read_segments([(window, segments_path(prefix, mapped.tile.id))], part)
        put(step.prefix / "superpixels.png", pictures.encoded(outlined(image_HWC, numbers_HW)))
        caption = f"The middle of tile {mapped.tile.id}: pixels vote for one label in each superpixel."
        drawn.append(["Superpixels", f"steps/{step.name}/superpixels.png", caption])
    return {"pictures": drawn}


def paint(step: Step, listed: Step, predicted: Step) -> dict[str, Any]:
    """Write `tiles/<id>/mean.tif`: the first three bands, each label in its mean value over its scene."""
    tiles, bands = maps.mapped_tiles(predicted.root, predicted.name), tuple(listed.value["bands"][:3])

    def pixels(tile: maps.MappedTile) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        image_CHW, _ = rasters.read(tile.sources, tile.tile.grid, tile.tile.window, bands=bands)
        return image_CHW, maps.read_tile(tile, "classes")[0]

    # Two passes, a tile in memory at a time: a label has one colour in all tiles of its scene.
    sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros((len(bands) + 1, NODATA + 1)))
    for tile in tiles:
        image_CHW, labels_HW = pixels(tile)
        flat = labels_HW.ravel()
        for band, values in enumerate((np.ones_like(flat), *(band_HW.ravel() for band_HW in image_CHW))):
            sums[tile.tile.grid.image or ""][band] += np.bincount(flat, values, minlength=NODATA + 1)
    for tile in tiles:
        image_CHW, labels_HW = pixels(tile)
        count_K, *of_bands = sums[tile.tile.grid.image or ""]
        means_CK = np.rint(np.stack(of_bands) / np.maximum(count_K, 1))
        painted_CHW = means_CK[:, labels_HW].astype(image_CHW.dtype)
        path = upath(tile.href).parent / "mean.tif"
        valid_HW = labels_HW != NODATA
        cog.write_image(path, painted_CHW, tile.tile.grid, tile.tile.window, bands=bands, nodata=0, valid_HW=valid_HW)
    return {"tiles": len(tiles)}


def write_report(
    step: Step,
    trained: Step,
    drawn: Step,
    predicted: Step,
    polygons: Step,
    measured: Step,
    *,
    simple: Step | None = None,
) -> dict[str, Any]:
    """The report, with the trainings of the networks, the agreement with the truth and the baseline."""
    records = mapping.ledger_of(trained).read().values()
    histories = {
        f"network of {record.id}": record.facts["history"] for record in records if record.facts.get("history")
    }
    scenes = Ledger(str(upath(step.root) / "steps" / "scenes" / "ledger")).read().values()
    left = [f"{record.id}: {record.reason}" for record in scenes if record.status in {"empty", "nodata"}]
    named = listed(left, separator="; ")
    without = f"{counted(len(left), 'scene')} without labels ({named})." if left else ""
    labels = "Learnt from the imagery alone: labels have no meaning yet; `rayseg labels assign` gives them one."
    labels = f"{without} {labels}".lstrip()
    if "mean" in measured.value:
        labels += f" {agreement.agreement_text(measured.value)}"
    shown = tuple((title, image, caption) for title, image, caption in drawn.value["pictures"])
    curves = dict(list(histories.items())[:MOST_CURVES])
    baseline = simple_labels.comparison_of(simple.value) if simple else None
    extras = report.Extras(labels=labels, pictures=shown, histories=curves, baseline=baseline)
    value = report.write_report(step, predicted, polygons, extras=extras)
    return value | ({"summary": f"{value['summary']} {without}"} if left else {})
