"""superpixel: a scene segmented without any label (Chen et al. 2022, IEEE GRSL 19; after Kanezaki 2018, ICASSP).

    scene --> superpixels --> vote <--> small network, trained on this scene alone --> label map

Every scene has labels of its own, unless one network is `shared` by all. What is not said here is in the modules named
by the steps; the settings of the paper are `configs/superpixel/paper.yaml`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from rayseg.config import Bands
from rayseg.config import Config as Frozen
from rayseg.engine.flow import Work
from rayseg.engine.ledger import MISSING, SETTLED, Record, Settled
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import NODATA, Tile, expect_ids, slug
from rayseg.geo.region import Region
from rayseg.io import maps, pictures, segments
from rayseg.io.masks import piece_of_row
from rayseg.io.sources import Source
from rayseg.models.bundle import Scaling
from rayseg.stages.band_statistics import Survey
from rayseg.stages.label import LabelTile
from rayseg.stages.oversegment import Divide, ReadAround, segments_path, unite
from rayseg.stages.read import tile_rows
from rayseg.stages.rows import SceneRow, TileRow
from rayseg.stages.write import WriteTile
from rayseg.steps import estimate, evaluate, report
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.store import Location, put, upath
from rayseg.train.scene import SceneConfig, TrainScene, patches_of_epoch
from rayseg.vision.color import label_table, mean_color
from rayseg.vision.crops import middle
from rayseg.vision.superpixels import outlined

SHARED = "all-scenes"
MOST_CURVES = 6


class SuperpixelConfig(Frozen):
    """How the scene is divided before anything is learnt."""

    method: Literal["felzenszwalb", "halved", "slic", "watershed"] = "halved"
    """felzenszwalb is the paper's; halved is the same at half the resolution, in a fraction of the time; slic and
    watershed give superpixels of about one size."""
    scale: Annotated[float, Field(gt=0)] = 32.0
    """felzenszwalb, halved: larger means larger superpixels."""
    sigma: Annotated[float, Field(ge=0)] = 0.5
    """felzenszwalb, halved: width in px of the Gaussian that smooths the scene first."""
    min_size: Annotated[int, Field(gt=0)] = 64
    """felzenszwalb, halved: least pixels of a superpixel."""
    spacing: Annotated[int, Field(gt=1)] = 14
    """slic, watershed: distance of superpixels in px."""
    overlap: Annotated[int, Field(ge=2)] = 64
    """Pixels around a tile in which it is compared with its neighbours."""

    @property
    def options(self) -> dict[str, float]:
        """Arguments of the method."""
        if self.method in {"felzenszwalb", "halved"}:
            return {"scale": self.scale, "sigma": self.sigma, "min_size": self.min_size}
        return {"spacing": self.spacing}


class Config(Frozen):
    """Settings of the pipeline."""

    superpixels: SuperpixelConfig = SuperpixelConfig()
    network: SceneConfig = SceneConfig()
    map: MapConfig = MapConfig()
    shared: bool = False
    """One network over all scenes, so that a label means the same everywhere; else one each, with its own labels."""
    bands: Bands = ()
    """Names of the bands to look at; by default all, which then must be those of every scene."""
    scaling: Literal["auto", "range", "percentiles"] | Scaling = "auto"
    """From values to 0..1: by the range of their type, by the scene's 1st and 99th percentile, or as given; auto takes
    the range of 8-bit imagery and percentiles of any other."""
    sieve: Annotated[int, Field(ge=0)] = 20
    """Patches of a label of fewer px become part of their largest neighbour."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection[/asset]`, or `#collection` of the region."""
    unlabelled: tuple[str | int, ...] = ()
    """Values or colours of the masks that are not counted."""

    @property
    def margin(self) -> int:
        """Pixels around a tile that are labelled too, so that specks at its border find the neighbours they go to."""
        return 3 * self.sieve


# -- scenes ------------------------------------------------------------------------------------------------------------


def plan(region: Region, config: Config) -> tuple[list[Row], tuple[str, ...], str]:
    """(a row per network with its tiles as JSON, names of the bands, type of the values).

    A scene that cannot be mapped beside others that can is a row without tiles; its column `refused` says why.

    Raises:
        DataError: there is no imagery, or none that can be mapped.
        ConfigError: a tile or band that was asked for is not there, or the scaling is of other bands.
    """
    halo = config.network.patch + config.network.stride + config.margin
    found = mapping.imagery(region, config.map, halo=halo if config.shared else 0)
    first = _commonest(found[0], config)
    sources, refused = mapping.mappable(region, found, partial(_expect_alike, first, config), size=config.map.tile)
    groups = [sources] if config.shared else [[source] for source in sources]
    rows = []
    for group in groups:
        tiles = tile_rows(group, region.geometry, size=config.map.tile, halo=halo)
        if not config.shared:
            tiles = [_of_scene(row, group[0].item_id) for row in tiles]
        tiles = [row for row in tiles if not region.tiles or row["id"] in region.tiles]
        name = SHARED if config.shared else slug(group[0].item_id)
        rows += [{"id": name, "tiles": json.dumps(tiles), "refused": ""}] if tiles else []
    ids = [row["id"] for one in rows for row in json.loads(one["tiles"])]
    if unknown := sorted(set(region.tiles) - set(ids)):
        raise ConfigError(f"region {region.name} has no tile {', '.join(unknown[:5])}; correct --tiles")
    if not ids:
        raise DataError(f"region {region.name} has no tile with imagery; choose another --region")
    if not region.tiles:
        rows += [
            {"id": slug(name), "tiles": "[]", "refused": mapping.refusal(why)} for name, why in sorted(refused.items())
        ]
    expect_ids([row["id"] for row in rows])
    expect_ids(ids)
    named = min(sources, key=lambda source: source.item_id)
    bands = config.bands or _bands(named)
    if isinstance(config.scaling, Scaling) and len(config.scaling.mean) != len(bands):
        raise ConfigError(
            f"scaling is of {len(config.scaling.mean)} bands, the imagery has {', '.join(bands)}; give one mean and "
            "std for each, or choose with --set bands=[...]"
        )
    return rows, bands, named.dtype


def _commonest(sources: Sequence[Source], config: Config) -> Source | None:
    """The first of the scenes of the most frequent kind."""
    usable = [one for one in sources if not one.dtype.startswith("complex") and set(config.bands) <= set(one.bands)]
    kinds = Counter(_kind(source, config) for source in usable)
    ordered = sorted(usable, key=lambda source: source.item_id)
    return max(ordered or sources, key=lambda source: kinds[_kind(source, config)], default=None)


def _kind(source: Source, config: Config) -> tuple[frozenset[str], str]:
    return frozenset(config.bands or _bands(source)), source.dtype


def _expect_alike(first: Source | None, config: Config, source: Source) -> None:
    """Refuse a scene of other bands or another type than the first has."""
    fits = set(config.bands) <= set(source.bands)
    if first is not None and not (fits and _kind(source, config) == _kind(first, config)):
        bands = config.bands or _bands(first)
        raise DataError(
            f"{source.item_id} has {', '.join(_bands(source))} of {source.dtype}, expected {', '.join(bands)} of "
            f"{first.dtype} as {first.item_id} has: name common bands with --set bands=[...], or map them in two runs"
        )


def _bands(source: Source) -> tuple[str, ...]:
    return tuple(name for name in source.bands if name != "alpha")


def _of_scene(row: Row, scene: str) -> Row:
    """A tile on a grid that is this scene's alone: where scenes overlap, each keeps its own labels."""
    if row["crs"] is None:
        return row
    return row | {"grid_image": scene, "id": f"{slug(scene)}_{row['id']}"}


def list_scenes(step: Step, region: Region, config: Config) -> dict[str, Any]:
    """Which scenes there are, and how their values become 0..1."""
    path = step.prefix / "manifest.parquet"
    if not path.exists():
        planned, bands, dtype = plan(region, config)
        put(step.prefix / "contract.json", json.dumps({"bands": bands, "dtype": dtype}).encode())
        write_rows(path, planned)
    contract = json.loads((step.prefix / "contract.json").read_bytes())
    rows, works = mapping.read_manifest(step), [Work(Survey(contract["bands"]), cpus=0.5)]
    patience = config.map.stall_seconds
    return {**contract, **mapping.through(step, rows, works, record=_surveyable, title="scenes", patience=patience)}


def _surveyable(row: Row) -> SceneRow | Settled:
    return Settled("failed", row["refused"]) if row["refused"] else SceneRow.from_row(row)


def _scaling(config: Config, facts: dict[str, Any], dtype: str, bands: int) -> Scaling:
    """To 0..1: (value - low) / (high - low)."""
    if isinstance(config.scaling, Scaling):
        return config.scaling
    if config.scaling == "percentiles" or (config.scaling == "auto" and dtype != "uint8"):
        low, high = facts["low"], facts["high"]
        return Scaling(mean=tuple(low), std=tuple(b - a for a, b in zip(low, high, strict=True)))
    whole = np.dtype(dtype).kind in "ui"
    return Scaling(mean=(0.0,) * bands, std=(float(np.iinfo(dtype).max) if whole else 1.0,) * bands)


def _scenes(listed: Step, config: Config) -> list[Row]:
    """Rows of the scenes that show something, with their scaling as JSON."""
    bands, dtype = len(listed.value["bands"]), listed.value["dtype"]
    return [
        row | {"scaling": _scaling(config, record.facts, dtype, bands).model_dump_json()}
        for row, record in mapping.rows_with(listed, "low")
    ]


# -- superpixels -------------------------------------------------------------------------------------------------------


def divide(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Superpixels of all scenes, `<step>/<tile>.tif`: found tile by tile, made one where neighbours agree."""
    if not config.network.votes:
        return {"segments": None}
    rows = [
        tile | {"scaling": scene["scaling"]} for scene in _scenes(listed, config) for tile in json.loads(scene["tiles"])
    ]
    write_rows(step.prefix / "manifest.parquet", rows)
    overlap, prefix = config.superpixels.overlap, str(step.prefix)
    works = [
        Work(ReadAround(listed.value["bands"], margin=overlap)),
        Work(Divide(prefix, config.superpixels.method, config.superpixels.options), cpus=0.5),
    ]
    found = mapping.through(step, rows, works, patience=config.map.stall_seconds)
    unite(prefix, _divided(step), overlap)
    return {"segments": prefix, **found}


def _divided(step: Step) -> list[tuple[Tile, int]]:
    """Tiles that have superpixels, and how many."""
    return [(Tile.from_row(row), record.facts["segments"]) for row, record in mapping.rows_with(step, "segments")]


# -- networks and maps -------------------------------------------------------------------------------------------------


def train(step: Step, listed: Step, divided: Step, config: Config) -> dict[str, Any]:
    """A network for every scene, each on an actor of its own; models/<scene> is its bundle."""
    known = {tile.id for tile, _ in _divided(divided)} if config.network.votes else None
    rows = _scenes(listed, config)
    write_rows(step.prefix / "manifest.parquet", [{"id": row["id"]} for row in rows])
    stage = TrainScene(
        config.network,
        prefix=str(step.prefix),
        models=str(upath(step.root) / "models"),
        segments=divided.value["segments"],
        bands=listed.value["bands"],
        dtype=listed.value["dtype"],
    )
    works = [Work(stage, cpus=1.0, gpus=1.0, model=True)]
    record, patience = partial(_trainable, known), config.network.stall_seconds
    return mapping.through(step, rows, works, record=record, title="scenes", patience=patience)


def _trainable(known: set[str] | None, row: Row) -> SceneRow | Settled:
    """The scene with the tiles that have superpixels; a scene without such tiles fails."""
    scene = SceneRow.from_row(row)
    tiles = tuple(tile for tile in scene.tiles if known is None or tile.tile.id in known)
    return replace(scene, tiles=tiles) if tiles else Settled("failed", "none of its tiles could be read")


def label(step: Step, listed: Step, trained: Step, region: Region, config: Config) -> dict[str, Any]:
    """Map every tile by its scene's network; tiles/<id>/ holds the results, the step's ledger their fates."""
    fates = mapping.ledger_of(listed).read() | mapping.ledger_of(trained).read()
    rows = [
        tile | {"scene": scene["id"]} for scene in mapping.read_manifest(listed) for tile in json.loads(scene["tiles"])
    ]
    write_rows(step.prefix / "manifest.parquet", rows)
    bundles = [record.facts for record in fates.values() if "bundle" in record.facts]
    most = max(bundles, key=lambda facts: facts["labels"], default=None)
    table = label_table(most["labels"] if most else 0)
    settings = config.network
    works = [
        Work(ReadAround(listed.value["bands"], margin=config.margin, lattice=(settings.patch, settings.stride))),
        Work(
            LabelTile(margin=config.margin, sieve=config.sieve, batch=config.map.batch), cpus=1.0, gpus=1.0, model=True
        ),
        Work(WriteTile(mapping.tiles_prefix(step), table, bands=("probability",), geometry=region.geometry, model="")),
    ]
    patience = config.map.stall_seconds
    found = mapping.through(step, rows, works, record=partial(_with_network, fates), patience=patience)
    return {"bundle": most["bundle"] if most else None, **found}


def _with_network(fates: Mapping[str, Record], row: Row) -> TileRow | Settled:
    """The tile with its scene's network; without a network it shares the scene's fate."""
    scene = row["scene"]
    fate = fates.get(scene)
    if fate is None or (fate.status == "done" and "bundle" not in fate.facts):
        return Settled("failed", f"scene {scene}: {MISSING}")
    if "bundle" in fate.facts:
        return replace(TileRow.from_row(row), bundle=fate.facts["bundle"])
    return Settled(fate.status if fate.status in SETTLED else "failed", f"scene {scene}: {fate.reason}")


# -- for people --------------------------------------------------------------------------------------------------------


def join_polygons(step: Step, predicted: Step) -> dict[str, Any]:
    """labels.parquet; nothing when no scene has a map."""
    return mapping.join_polygons(step, predicted, "labels") if predicted.value["bundle"] else {"count": 0}


def measure(step: Step, predicted: Step, region: Region, config: Config) -> dict[str, Any]:
    """Compare the labels with the truth, if there is one."""
    truth = region.located(config.truth)
    if not truth or not predicted.value["bundle"]:
        return {}
    found = evaluate.agreement_of_run(predicted.root, truth, step=predicted.name, unlabelled=config.unlabelled)
    put(step.prefix / "agreement.json", json.dumps(found, indent=1).encode())
    return found


def draw(step: Step, listed: Step, divided: Step, predicted: Step) -> dict[str, Any]:
    """Pictures: the map in the mean colour of each label, and superpixels over a part of the first tile with both."""
    tiles = maps.mapped_tiles(predicted.root, predicted.name)
    found = []
    for number, picture in enumerate(pictures.pictures_of(tiles, most=2)):
        seen = picture.classes_HW != NODATA
        mean_HWC = mean_color(picture.image_HWC, np.where(seen, picture.classes_HW, 254))
        mean_HWA = np.dstack([mean_HWC, np.where(seen, 255, 0)]).astype(np.uint8)
        put(step.prefix / (name := f"mean-{number}.png"), pictures.encoded(mean_HWA))
        caption = "Every label in its mean colour."
        found.append([f"Mean colours, {picture.title}", f"steps/{step.name}/{name}", caption])
    known = {tile.id for tile, _ in _divided(divided)} if divided.value["segments"] else set()
    if both := [mapped for mapped in tiles if mapped.tile.id in known][:1]:
        put(step.prefix / "superpixels.png", pictures.encoded(_overlay(both[0], divided.value["segments"])))
        caption = f"The middle of tile {both[0].tile.id}: labels are voted inside these."
        found.append(["Superpixels", f"steps/{step.name}/superpixels.png", caption])
    return {"pictures": found}


def _overlay(mapped: maps.MappedTile, prefix: str, *, side: int = 512) -> np.ndarray:
    window = mapped.tile.window
    part = middle(window, side).intersect(window)
    image_HWC = pictures.shown(mapped.sources, mapped.tile.grid, part)
    return outlined(image_HWC, segments.read_segments([(window, segments_path(prefix, mapped.tile.id))], part))


def write_report(
    step: Step, trained: Step, drawn: Step, predicted: Step, polygons: Step, measured: Step
) -> dict[str, Any]:
    """The report: with what became of the networks, and the agreement with the truth."""
    records = mapping.ledger_of(trained).read().values()
    histories = {f"network of {one.id}": one.facts["history"] for one in records if one.facts.get("history")}
    said = "Learnt from the imagery alone: labels have no meaning yet; `rayseg labels assign` gives them one."
    if "mean" in measured.value:
        said += f" {evaluate.agreement_text(measured.value)}"
    extras = report.Extras(
        labels=said,
        pictures=tuple((title, image, caption) for title, image, caption in drawn.value["pictures"]),
        histories=dict(list(histories.items())[:MOST_CURVES]),
    )
    return report.write_report(step, predicted, polygons, extras=extras)


def check(config: Config, region: Region) -> None:
    """Refuse, before anything is written, imagery that cannot be segmented and a truth that cannot be compared."""
    rows, _, _ = plan(region, config)
    if truth := region.located(config.truth):
        tiles = [tile for row in rows for tile in json.loads(row["tiles"])]
        evaluate.expect_truth([piece_of_row(tile) for tile in tiles], truth, unlabelled=config.unlabelled)


def forecast(config: Config, region: Region, _: object = None) -> estimate.Forecast:
    """What is known of a run before it is begun; networks are trained in the probe, as they are in the run."""
    rows, _, _ = plan(region, config)
    scenes = [tiles for row in rows if (tiles := json.loads(row["tiles"]))]
    return estimate.Forecast(
        [*chain.from_iterable(scenes), *(row for row in rows if row["refused"])],
        margin=config.network.patch + config.network.stride + config.margin,
        unknown=("a network with nothing left to learn ends early: on all tiles it may take more or fewer epochs",),
        counts={"networks": len(scenes)},
        efforts={
            "networks": sum(patches_of_epoch([Tile.from_row(row) for row in tiles], config.network) for tiles in scenes)
        },
        trial=partial(run, config),
    )


def run(config: Config, run: Run, region: Region, _: object = None) -> str:
    """Segment the scenes of `region`; return where the report is and what it says."""
    listed = run.step("scenes", list_scenes, region, config)
    divided = run.step("superpixels", divide, listed, config)
    trained = run.step("networks", train, listed, divided, config)
    predicted = run.step("predict", label, listed, trained, region, config)
    polygons = run.step("polygons", join_polygons, predicted)
    measured = run.step("evaluate", measure, predicted, region, config)
    run.step("publish", mapping.publish, predicted, f"Labels of {region.name}, found without any")
    drawn = run.step("pictures", draw, listed, divided, predicted)
    written = run.step("report", write_report, trained, drawn, predicted, polygons, measured)
    return report.headline(written)
