"""superpixel: a scene segmented without any label (Chen et al. 2022, IEEE GRSL 19; after Kanezaki 2018, ICASSP).

    scene --> superpixels --> vote <--> small network, trained on this scene alone --> label map

Every scene has labels of its own, unless all `shared` one network. The modules of the steps explain the rest;
`configs/superpixel/paper.yaml` has the settings of the paper.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field
from upath import UPath

from rayseg.config import Bands
from rayseg.config import Config as Frozen
from rayseg.engine.flow import Work
from rayseg.engine.ledger import MISSING, SETTLED, Record, Settled
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Run, Step
from rayseg.geo.grid import Tile
from rayseg.geo.region import Region
from rayseg.io.masks import piece_of_row
from rayseg.models.bundle import Scaling
from rayseg.stages.band_statistics import Survey
from rayseg.stages.label import LabelTile
from rayseg.stages.oversegment import Divide, ReadAround, SuperpixelConfig, unite
from rayseg.stages.rows import SceneRow, TileRow
from rayseg.stages.write import WriteTile
from rayseg.steps import estimate, evaluate, report, scenes
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.steps.scenes import Scenes
from rayseg.store import Location, put, upath
from rayseg.train.scene import SceneConfig, TrainScene, patches_of_epoch
from rayseg.vision.color import label_table

MOST_CURVES = 6
"""Networks whose training the report draws."""


class Config(Frozen):
    """Settings of the pipeline."""

    superpixels: SuperpixelConfig = SuperpixelConfig()
    network: SceneConfig = SceneConfig()
    map: MapConfig = MapConfig()
    shared: bool = False
    """One network for all scenes, so that a label means the same everywhere; else one for each, with its own labels."""
    bands: Bands = ()
    """Names of the bands that the network sees; by default all, which then must be those of every scene."""
    scaling: Literal["auto", "range", "percentiles"] | Scaling = "auto"
    """From values to 0..1: by the range of their type, by the scene's 1st and 99th percentile, or as given; auto takes
    the range for 8-bit imagery and percentiles for any other."""
    sieve: Annotated[int, Field(ge=0)] = 20
    """Connected regions of fewer px become part of their largest neighbour."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection[/asset]`, or `#collection` of the region."""
    unlabelled: tuple[str | int, ...] = ()
    """Values or colours of the masks that the measures ignore."""

    @property
    def margin(self) -> int:
        """Pixels around a tile that are labelled too, so that small regions at its border have all their neighbours."""
        return 3 * self.sieve


def list_scenes(step: Step, region: Region, config: Config, *, found: Scenes | None = None) -> dict[str, Any]:
    """List the scenes, and take the percentiles by which their values become 0..1."""
    if not step.manifest.exists():
        found = found or _find(region, config)
        contract = {"bands": found.bands, "dtype": found.dtype}
        put(step.prefix / "contract.json", json.dumps(contract).encode())
        write_rows(step.manifest, found.rows)
    contract = json.loads((step.prefix / "contract.json").read_bytes())

    def readable(row: Row) -> SceneRow | Settled:
        return Settled("failed", row["refused"]) if row["refused"] else SceneRow.from_row(row)

    rows, works = mapping.read_manifest(step), [Work(Survey(contract["bands"]), cpus=0.5)]
    patience = config.map.stall_seconds
    return {**contract, **mapping.through(step, rows, works, record=readable, title="scenes", patience=patience)}


def _find(region: Region, config: Config) -> Scenes:
    halo = config.network.patch + config.network.stride + config.margin
    bands, scaling = config.bands, config.scaling
    return scenes.find_scenes(region, config.map, halo=halo, bands=bands, scaling=scaling, shared=config.shared)


def divide(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Divide all scenes into superpixels, `<step>/<tile>.tif`: tile by tile, then united where neighbours agree."""
    if not config.network.votes:
        return {"segments": None}
    rows = [
        tile | {"scaling": scene["scaling"]}
        for scene in scenes.scaled_rows(listed, config.scaling)
        for tile in json.loads(scene["tiles"])
    ]
    write_rows(step.manifest, rows)
    overlap, prefix = config.superpixels.overlap, str(step.prefix)
    works = [
        Work(ReadAround(listed.value["bands"], margin=overlap)),
        Work(Divide(prefix, config.superpixels.method, config.superpixels.options), cpus=0.5),
    ]
    done = mapping.through(step, rows, works, patience=config.map.stall_seconds)
    unite(prefix, scenes.divided_tiles(step), overlap)
    return {"segments": prefix, **done}


def train(step: Step, listed: Step, divided: Step, config: Config) -> dict[str, Any]:
    """Train a network for every scene, each on an actor of its own; models/<scene> is its bundle."""
    usable = {tile.id for tile, _ in scenes.divided_tiles(divided)} if config.network.votes else None

    def trainable(row: Row) -> SceneRow | Settled:
        scene = SceneRow.from_row(row)
        tiles = tuple(tile for tile in scene.tiles if usable is None or tile.tile.id in usable)
        return replace(scene, tiles=tiles) if tiles else Settled("failed", "none of its tiles could be read")

    rows = scenes.scaled_rows(listed, config.scaling)
    write_rows(step.manifest, [{"id": row["id"]} for row in rows])
    stage = TrainScene(
        config.network,
        prefix=str(step.prefix),
        models=str(upath(step.root) / "models"),
        segments=divided.value["segments"],
        bands=listed.value["bands"],
        dtype=listed.value["dtype"],
    )
    works, patience = [Work(stage, cpus=1.0, gpus=1.0, model=True)], config.network.stall_seconds
    return mapping.through(step, rows, works, record=trainable, title="scenes", patience=patience)


def label(step: Step, listed: Step, trained: Step, region: Region, config: Config) -> dict[str, Any]:
    """Map every tile by its scene's network; tiles/<id>/ holds the results, the step's ledger their fates."""
    fates, models = mapping.ledger_of(listed).read() | mapping.ledger_of(trained).read(), upath(step.root) / "models"
    rows = [
        tile | {"scene": scene["id"]} for scene in mapping.read_manifest(listed) for tile in json.loads(scene["tiles"])
    ]
    write_rows(step.manifest, rows)
    networks = [record for record in fates.values() if "bundle" in record.facts]
    most = max(networks, key=lambda record: record.facts["labels"], default=None)
    table = label_table(most.facts["labels"] if most else 0)
    lattice = (config.network.patch, config.network.stride)
    stage = LabelTile(margin=config.margin, sieve=config.sieve, batch=config.map.batch)
    works = [
        Work(ReadAround(listed.value["bands"], margin=config.margin, lattice=lattice)),
        Work(stage, cpus=1.0, gpus=1.0, model=True),
        Work(WriteTile(mapping.tiles_prefix(step), table, bands=("probability",), geometry=region.geometry, model="")),
    ]
    record, patience = partial(_with_network, fates, models), config.map.stall_seconds
    done = mapping.through(step, rows, works, record=record, patience=patience)
    return {"bundle": str(models / most.id) if most else None, **done}


def _with_network(fates: Mapping[str, Record], models: UPath, row: Row) -> TileRow | Settled:
    """The tile with its scene's network, `<models>/<scene>`; without a network it shares the scene's fate.

    The ledger has the prefix of the network too, but as it was when the network was trained: the run may have moved.
    """
    scene = row["scene"]
    fate = fates.get(scene)
    if fate is None or (fate.status == "done" and "bundle" not in fate.facts):
        return Settled("failed", f"scene {scene}: {MISSING}")
    if "bundle" in fate.facts:
        return replace(TileRow.from_row(row), bundle=str(models / scene))
    return Settled(fate.status if fate.status in SETTLED else "failed", f"scene {scene}: {fate.reason}")


def join_polygons(step: Step, predicted: Step) -> dict[str, Any]:
    """Write labels.parquet; nothing when no scene has a map."""
    return mapping.join_polygons(step, predicted, "labels") if predicted.value["bundle"] else {"count": 0}


def measure(step: Step, predicted: Step, region: Region, config: Config) -> dict[str, Any]:
    """Compare the labels with the truth, if there is one."""
    truth = region.located(config.truth)
    if not truth or not predicted.value["bundle"]:
        return {}
    scores = evaluate.agreement_of_run(predicted.root, truth, step=predicted.name, unlabelled=config.unlabelled)
    put(step.prefix / "agreement.json", json.dumps(scores, indent=1).encode())
    return scores


def write_report(
    step: Step, trained: Step, drawn: Step, predicted: Step, polygons: Step, measured: Step
) -> dict[str, Any]:
    """The report, with the trainings of the networks and the agreement with the truth."""
    records = mapping.ledger_of(trained).read().values()
    histories = {f"network of {one.id}": one.facts["history"] for one in records if one.facts.get("history")}
    labels = "Learnt from the imagery alone: labels have no meaning yet; `rayseg labels assign` gives them one."
    if "mean" in measured.value:
        labels += f" {evaluate.agreement_text(measured.value)}"
    shown = tuple((title, image, caption) for title, image, caption in drawn.value["pictures"])
    curves = dict(list(histories.items())[:MOST_CURVES])
    extras = report.Extras(labels=labels, pictures=shown, histories=curves)
    return report.write_report(step, predicted, polygons, extras=extras)


def check(config: Config, region: Region) -> Scenes:
    """List the scenes; refuse imagery and a truth that a run cannot use before it writes anything."""
    plan = _find(region, config)
    if truth := region.located(config.truth):
        pieces = [piece_of_row(tile) for tile in chain.from_iterable(plan.tiles)]
        evaluate.expect_truth(pieces, truth, unlabelled=config.unlabelled)
    return plan


def forecast(config: Config, region: Region, plan: Scenes) -> estimate.Forecast:
    """What is known of a run before it begins; the probe trains networks as the run does."""
    tiles = plan.tiles
    patches = [patches_of_epoch([Tile.from_row(row) for row in rows], config.network) for rows in tiles]
    return estimate.Forecast(
        [*chain.from_iterable(tiles), *(row for row in plan.rows if row["refused"])],
        margin=config.network.patch + config.network.stride + config.margin,
        unknown=("a training that has nothing left to learn ends early: other tiles may take more or fewer epochs",),
        counts={"networks": len(tiles)},
        efforts={"networks": sum(patches)},
        trial=partial(run, config),
    )


def run(config: Config, run: Run, region: Region, plan: Scenes | None = None) -> str:
    """Segment the scenes of `region`; return the report's path and its headline."""
    listed = run.step("scenes", list_scenes, region, config, found=plan)
    divided = run.step("superpixels", divide, listed, config)
    trained = run.step("networks", train, listed, divided, config)
    predicted = run.step("predict", label, listed, trained, region, config)
    polygons = run.step("polygons", join_polygons, predicted)
    measured = run.step("evaluate", measure, predicted, region, config)
    run.step("publish", mapping.publish, predicted, f"Labels of {region.name}, found without any")
    drawn = run.step("pictures", scenes.draw, listed, divided, predicted)
    written = run.step("report", write_report, trained, drawn, predicted, polygons, measured)
    return report.headline(written)
