"""superpixel: a scene segmented without any label (Chen et al. 2022, IEEE GRSL 19; after Kanezaki 2018, ICASSP).

    scene --> superpixels --> clusters of their colour and texture --> label map             (`network: segments`)
    scene --> superpixels --> vote <--> small network, trained on this scene alone --> label map       (the paper)

Every scene has labels of its own, unless all are `shared`. The modules of the steps explain the rest;
`configs/superpixel/paper.yaml` has the settings of the paper.
"""

import json
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field

from rayseg.config import Bands, added
from rayseg.config import Config as Frozen
from rayseg.engine.flow import Work
from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Run, Step
from rayseg.geo.grid import Tile
from rayseg.geo.region import Region
from rayseg.io.masks import piece_of_row
from rayseg.models.bundle import Scaling
from rayseg.stages.band_statistics import BandPercentiles
from rayseg.stages.cluster import ClusterScene, Described, LabelSegments
from rayseg.stages.label import LabelTile
from rayseg.stages.oversegment import Divide, ReadAround, SuperpixelConfig, unite
from rayseg.stages.rows import SceneRow
from rayseg.stages.write import WriteTile
from rayseg.steps import agreement, estimate, generalize, report, scenes, simple_labels
from rayseg.steps import map as mapping
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.map import MapConfig
from rayseg.steps.scenes import Scenes
from rayseg.store import Location, put, upath
from rayseg.train.scene import SceneConfig, TrainScene, steps_of
from rayseg.vision.color import label_table

VOTING, CLUSTERED = 32.0, 100.0
"""Scale of the superpixels in which a network's labels are voted (the paper's), and of those that are clustered."""
MERGE = 1200.0
"""Default of `superpixels.merge`: roads and roofs of .3 to .5 m imagery stay regions of their own."""


class Config(Frozen):
    """Settings of the pipeline."""

    superpixels: SuperpixelConfig = SuperpixelConfig()
    network: SceneConfig = SceneConfig()
    """Clusters of superpixels, or the network of a scene and its training."""
    map: MapConfig = MapConfig()
    polygons: PolygonsConfig = added(default=PolygonsConfig())
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
    mean_colors: bool = added(default=False)
    """Write tiles/<id>/mean.tif, the first three bands with each label in its mean value over its scene."""
    baseline: bool = added(default=True)
    """With a truth: measure k-means of segments on parts of the map, and show it in the report."""

    @property
    def margin(self) -> int:
        """Pixels around a tile that are labelled too, so that small regions at its border have all their neighbours."""
        return 3 * self.sieve

    @property
    def halo(self) -> int:
        """Pixels around a tile that are read with it."""
        if self.network.clusters:
            return self.superpixels.overlap
        return self.network.patch + self.network.stride + self.margin

    @property
    def options(self) -> dict[str, float]:
        """Arguments of the superpixels' method: clusters need larger ones than a network that votes in them."""
        return self.superpixels.options(scale=CLUSTERED if self.network.clusters else VOTING)


def list_scenes(step: Step, region: Region, config: Config, *, plan: Scenes | None = None) -> dict[str, Any]:
    """List the scenes, and take the percentiles by which their values become 0..1."""
    if not step.manifest.exists():
        plan = plan or _find(region, config)
        put(step.prefix / "contract.json", json.dumps({"bands": plan.bands, "dtype": plan.dtype}).encode())
        write_rows(step.manifest, plan.rows)
    # Read again, because a resumed step does not search the scenes again.
    contract = json.loads((step.prefix / "contract.json").read_bytes())

    def readable(row: Row) -> SceneRow | Settled:
        return Settled("failed", row["refused"]) if row["refused"] else SceneRow.from_row(row)

    rows, works = mapping.read_manifest(step), [Work(BandPercentiles(contract["bands"]), cpus=0.5)]
    patience = config.map.stall_seconds
    return {**contract, **mapping.through(step, rows, works, record=readable, title="scenes", patience=patience)}


def _find(region: Region, config: Config) -> Scenes:
    bands, scaling = config.bands, config.scaling
    return scenes.find_scenes(region, config.map, halo=config.halo, bands=bands, scaling=scaling, shared=config.shared)


def divide(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """Divide all scenes into superpixels, `<step>/<tile>.tif`: tile by tile, then united where neighbours agree."""
    if not (config.network.votes or config.network.clusters):
        return {"segments": None}
    rows = [
        tile | {"scaling": scene["scaling"]}
        for scene in scenes.scaled_rows(listed, config.scaling)
        for tile in json.loads(scene["tiles"])
    ]
    write_rows(step.manifest, rows)
    overlap, prefix, bands = config.superpixels.overlap, str(step.prefix), listed.value["bands"]
    described = bands if config.network.clusters else ()  # only clusters need the segments' colour and texture
    stage = Divide(prefix, config.superpixels.method, config.options, described=described)
    works = [Work(ReadAround(bands, margin=overlap)), Work(stage, cpus=0.5)]
    done = mapping.through(step, rows, works, patience=config.map.stall_seconds)
    unite(prefix, scenes.divided_tiles(step), overlap, described=config.network.clusters)
    return {"segments": prefix, **done}


def train(step: Step, listed: Step, divided: Step, config: Config) -> dict[str, Any]:
    """Cluster the superpixels of every scene, or train a network for it; models/<scene> is its bundle."""
    needed = config.network.votes or config.network.clusters
    # Tiles that could not be divided take no part in training; the other tiles of their scene do.
    usable = {tile.id for tile, _ in scenes.divided_tiles(divided)} if needed else None

    def trainable(row: Row) -> SceneRow | Settled:
        scene = SceneRow.from_row(row)
        tiles = tuple(tile for tile in scene.tiles if usable is None or tile.tile.id in usable)
        return replace(scene, tiles=tiles) if tiles else Settled("failed", "none of its tiles could be read")

    rows = scenes.scaled_rows(listed, config.scaling)
    write_rows(step.manifest, [{"id": row["id"]} for row in rows])
    bands, dtype, models = listed.value["bands"], listed.value["dtype"], str(upath(step.root) / "models")
    prefix, superpixels, network = str(step.prefix), divided.value["segments"], config.network
    if network.clusters:
        cluster = ClusterScene(
            clusters=network.merge_to or network.labels,
            contrast=MERGE if config.superpixels.merge is None else config.superpixels.merge,
            seed=network.seed,
            labels=prefix,
            superpixels=superpixels,
            described=Described(models, config.superpixels.method, config.options, bands, dtype),
        )
        work = Work(cluster, cpus=0.5)  # fits next to a server that holds one of two CPUs
    else:
        stage = TrainScene(network, prefix=prefix, models=models, segments=superpixels, bands=bands, dtype=dtype)
        work = Work(stage, cpus=1.0, gpus=1.0, model=True)
    return mapping.through(step, rows, [work], record=trainable, title="scenes", patience=network.stall_seconds)


def label(
    step: Step, listed: Step, trained: Step, region: Region, config: Config, *, divided: Step | None = None
) -> dict[str, Any]:
    """Label every tile by its scene's network, or by the clusters of its superpixels; tiles/<id>/ has the results."""
    fates, models = mapping.ledger_of(listed).read() | mapping.ledger_of(trained).read(), upath(step.root) / "models"
    rows = [
        tile | {"scene": scene["id"]} for scene in mapping.read_manifest(listed) for tile in json.loads(scene["tiles"])
    ]
    write_rows(step.manifest, rows)
    networks = [record for record in fates.values() if "bundle" in record.facts]
    most = max(networks, key=lambda record: record.facts["labels"], default=None)
    table = label_table(most.facts["labels"] if most else 0)
    bands, prefix = listed.value["bands"], mapping.tiles_prefix(step)
    write = WriteTile(prefix, table, bands=("probability",), geometry=region.geometry, model="", imagery=bands)
    record = partial(scenes.with_network, fates, models)
    if config.network.clusters and divided:
        works = [Work(LabelSegments(divided.value["segments"], margin=config.margin, sieve=config.sieve))]
        near = scenes.neighbours(divided, config.map.tile)
        record = partial(scenes.with_clusters, record, mapping.ledger_of(divided).read(), near, str(trained.prefix))
    else:
        lattice = (config.network.patch, config.network.stride)
        stage = LabelTile(margin=config.margin, sieve=config.sieve, batch=config.map.batch)
        read = Work(ReadAround(bands, margin=config.margin, lattice=lattice))
        works = [read, Work(stage, cpus=1.0, gpus=1.0, model=True)]
    works.append(Work(write))
    done = mapping.through(step, rows, works, record=record, patience=config.map.stall_seconds)
    return {"bundle": str(models / most.id) if most else None, **done}


def join_polygons(step: Step, predicted: Step) -> dict[str, Any]:
    """Write labels.parquet; nothing when no scene has a map."""
    return mapping.join_polygons(step, predicted, "labels") if predicted.value["bundle"] else {"count": 0}


def measure(step: Step, predicted: Step, region: Region, config: Config) -> dict[str, Any]:
    """Compare the labels with the truth, if there is one."""
    truth = region.located(config.truth)
    if not truth or not predicted.value["bundle"]:
        return {}
    scores = agreement.agreement_of_run(predicted.root, truth, step=predicted.name, unlabelled=config.unlabelled)
    put(step.prefix / "agreement.json", json.dumps(scores, indent=1).encode())
    return scores


def check(config: Config, region: Region) -> Scenes:
    """List the scenes; refuse imagery and a truth that a run cannot use before it writes anything."""
    plan = _find(region, config)
    generalize.expect_small(chain.from_iterable(plan.tiles), config.polygons)
    if truth := region.located(config.truth):
        pieces = [piece_of_row(tile) for tile in chain.from_iterable(plan.tiles)]
        agreement.expect_truth(pieces, truth, unlabelled=config.unlabelled)
    return plan


def forecast(config: Config, region: Region, plan: Scenes) -> estimate.Forecast:
    """The forecast of a run, for its estimate; the probe trains networks as the run does."""
    tiles, network = plan.tiles, config.network

    def effort(rows: list[Row]) -> int:
        return len(rows) if network.clusters else steps_of([Tile.from_row(row) for row in rows], network)

    ends = "a training that has nothing left to learn ends early: other tiles may take more or fewer epochs"
    return estimate.Forecast(
        [*chain.from_iterable(tiles), *(row for row in plan.rows if row["refused"])],
        margin=config.halo,
        unknown=() if network.clusters else (ends,),
        counts={"networks": len(tiles)},
        efforts={"networks": sum(map(effort, tiles))},
        trial=partial(run, config),
    )


def run(config: Config, run: Run, region: Region, plan: Scenes | None = None) -> str:
    """Segment the scenes of `region`; return the report's path and its headline."""
    listed = run.step("scenes", list_scenes, region, config, plan=plan)
    divided = run.step("superpixels", divide, listed, config)
    trained = run.step("networks", train, listed, divided, config)
    predicted = run.step("predict", label, listed, trained, region, config, divided=divided)
    shown = generalize.generalized(run, predicted, config.polygons, region)
    polygons = run.step("polygons", join_polygons, shown)
    measured = run.step("evaluate", measure, predicted, region, config)
    run.step("publish", mapping.publish, predicted, f"Labels of {region.name}, found without any")
    run.step("qgis", mapping.save_project, predicted, polygons)
    drawn = run.step("pictures", scenes.draw, listed, divided, predicted)
    if config.mean_colors:
        run.step("colors", scenes.paint, listed, predicted)
    simple, truth = None, region.located(config.truth)
    if config.baseline and truth and predicted.value["bundle"]:
        simple = run.step("baseline", simple_labels.measure_baseline, predicted, truth, config.unlabelled)
    written = run.step("report", scenes.write_report, trained, drawn, predicted, polygons, measured, simple=simple)
    return report.headline(written)
