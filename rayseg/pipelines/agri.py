"""agri: cultivated plots as labelled instances, by proposals in rounds (LiSegAgr, ICONIP).

    imagery --> [x4 larger] --> proposals in up to 4 rounds on the uncovered rest --> mixed masks again --> instances
    instances --> joined over patches --> plots --> classifier, if there is one --> polygons, label raster, items

Segment Anything proposes; or superpixels, which need no weights; or a network that learns boundaries from drawn plots
(rayseg.steps.boundaries). Plots do not depend on the tiling of the region: docs/decisions/0007.
`configs/agri/paper.yaml` has the published settings.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayseg.config import Config as Frozen
from rayseg.config import Workers, added
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row
from rayseg.engine.run import Run, Step
from rayseg.geo.grid import Lattice
from rayseg.geo.region import Region
from rayseg.io.labels import Chip
from rayseg.models.sam import SamConfig, checkpoint_state
from rayseg.models.super_resolution import EnlargeConfig, load_enlarger
from rayseg.stages.boundaries import BoundaryProposer
from rayseg.stages.enlarge import lattice_of
from rayseg.stages.propose import ProposePlots, ReadPlots, WritePieces, WritePlots
from rayseg.stages.to_rgb import ImageConfig, ReadGround, check_source
from rayseg.steps import (
    boundaries,
    chips,
    estimate,
    evaluate_plots,
    plots,
    report,
    simple_plots,
    super_resolution,
)
from rayseg.steps import map as mapping
from rayseg.steps.boundaries import BoundariesConfig
from rayseg.steps.chips import ChipsConfig
from rayseg.steps.map import MapConfig
from rayseg.steps.plots import LABELS
from rayseg.store import Location, split_location, upath
from rayseg.vision.proposals import SuperpixelProposer
from rayseg.vision.rounds import Round, RoundsConfig

Plan = mapping.Plan[list[Chip]]
Steps = Sequence[Callable[..., Any]]


class Config(Frozen):
    """Settings of the pipeline; the defaults are the published ones."""

    proposer: Literal["sam", "felzenszwalb", "boundaries"] = "sam"
    """Segment Anything; superpixels, without weights; or a network for boundaries that learns from drawn plots."""
    sam: SamConfig = SamConfig()
    superpixels: SuperpixelProposer = SuperpixelProposer()
    """felzenszwalb: settings that are not given are those of `plots.TILING`."""
    boundaries: BoundariesConfig = added(default=BoundariesConfig())
    """boundaries: the drawn plots and the network; `rounds` then only sets the fewest pixels of a plot."""
    rounds: RoundsConfig = RoundsConfig()
    image: ImageConfig = ImageConfig()
    enlarge: EnlargeConfig | None = None
    """Whether imagery is enlarged before plots are proposed, and how; later settings count the enlarged pixels."""
    patch: Annotated[int, Field(gt=0)] = 1152
    """Side in px of the window in which plots are proposed."""
    stride: Annotated[int, Field(gt=0)] = 1024
    """Distance of patches in px; plots are joined where patches overlap."""
    joined: Annotated[float, Field(ge=0.5, le=1)] = 0.5
    """IoU over the overlap of two patches above which their instances are one plot."""
    classifier: Location | None = None
    """Prefix of a trained classifier of plots; without one, and without chips, plots have no class."""
    chips: ChipsConfig | None = None
    """Labelled crops (field, nonfield) to train one from."""
    training: plots.PlotsClassifierConfig = plots.PlotsClassifierConfig()
    """Its network and training."""
    workers: Workers = 0
    """Processes of Ray Train. 0 or auto: on a cluster one per GPU, else one; locally the command's own process."""
    map: MapConfig = MapConfig()
    truth: Location | None = added(default=None)
    """Reference plots to measure the plots with: masks of ids (a folder or `catalog.json#collection`), or polygons."""
    baseline: bool = added(default=True)
    """With a truth: measure superpixels on parts of the map, and show them in the report."""

    @model_validator(mode="before")
    @classmethod
    def _tiling(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic passes any input
        """Without other settings, superpixels are those that tile the ground."""
        if not isinstance(values, dict) or values.get("proposer") != "felzenszwalb":
            return values
        chosen = values.get("superpixels", {})
        # Settings of a run are complete, but for `slivers` at 0, and stay as they are.
        complete = isinstance(chosen, dict) and chosen.keys() >= SuperpixelProposer.model_fields.keys() - {"slivers"}
        return values if complete or not isinstance(chosen, dict) else values | {"superpixels": plots.TILING | chosen}

    @model_validator(mode="after")
    def _whole_cells(self) -> "Config":
        if self.stride >= self.patch or (self.patch - self.stride) % 2:
            raise ValueError(f"patch {self.patch} must be above stride {self.stride} by an even number")
        if self.proposer == "boundaries" and self.enlarge:
            raise ValueError("enlarge is set, but proposer boundaries learns imagery as it is; leave enlarge out")
        if self.chips and self.chips.masks:
            raise ValueError("chips.masks is set, but a classifier of plots learns from labels alone; leave it out")
        if self.map.tile % self.stride:
            raise ValueError(f"map.tile {self.map.tile} must be a multiple of stride {self.stride}")
        return self


def propose(
    step: Step,
    larger: Step,
    region: Region,
    config: Config,
    network: Step | None = None,
    *,
    tiles: Sequence[Row] | None = None,
) -> dict[str, Any]:
    """Propose plots in every patch, `network` where it is given; tables of patches and pieces lie below the step."""
    bare = larger.value.get("items") == 0  # the imagery has no data, so nothing was enlarged
    plan = partial(mapping.tiles_of, region, config.map, partial(check_source, kind=config.image), halo=config.patch)
    rows = mapping.kept_manifest(step, lambda: [] if bare else tiles or plan())
    rounds, learnt, patches = config.rounds, None, Lattice.of_cells(config.patch, config.stride)
    if network:
        # The plots of a watershed cover what they can: there is nothing left for rounds or inside mixed masks.
        rounds = rounds.model_copy(update={"rounds": (Round(),), "refining": None})
        learnt = BoundaryProposer(
            network.value["bundle"],
            config.image,
            config.boundaries.slivers,
            background=config.boundaries.background,
        )
    look = ProposePlots(
        config.proposer,
        sam=config.sam,
        superpixels=config.superpixels,
        rounds=rounds,
        patches=patches,
        geometry=region.geometry,
        boundaries=learnt,
    )
    works = [
        Work(ReadGround(config.image, patches)),
        Work(look, cpus=1.0, gpus=0.0 if config.proposer == "felzenszwalb" else 1.0, model=True),
        Work(WritePieces(str(step.prefix))),
    ]
    return mapping.through(step, rows, works, patience=config.map.stall_seconds)


def join(step: Step, proposed: Step, config: Config) -> dict[str, Any]:
    """Join the instances of neighbouring patches to plots."""
    return plots.join_pieces(step, proposed, least=config.joined)


def fit_plots(step: Step, region: Region, config: Config, *, listed: Sequence[Chip] | None = None) -> dict[str, Any]:
    """The classifier of plots: a given one, or one trained on labelled crops; none without either."""
    if config.classifier:
        return mapping.load_model(step, config.classifier)
    if config.chips is None:
        return {}
    counts = chips.list_chips(step, region, LABELS, config.chips, listed=listed)
    described = plots.classifier_bundle(config.training, (split_location(counts["source"])[0],))
    sizes = {"size": config.chips.size, "workers": config.workers}
    return chips.fit_on_chips(step, step, config.training, described, **sizes) | {"chips": counts}


def classify(step: Step, proposed: Step, joined: Step, model: Step, config: Config) -> dict[str, Any]:
    """Classify every plot, if there is a classifier."""
    if "bundle" not in model.value:
        return {}
    rows = mapping.kept_manifest(step, lambda: plots.group_plots(proposed, joined))
    return plots.classify_groups(step, rows, model.value["bundle"], config.image, patience=config.map.stall_seconds)


def write_tiles(
    step: Step, region: Region, proposed: Step, joined: Step, classified: Step, model: Step, config: Config
) -> dict[str, Any]:
    """Write the plots of every tile as rasters with an item; tiles/<id>/ holds them, the step's ledger their fates."""
    rows = mapping.kept_manifest(step, lambda: plots.tile_rows(proposed))
    prefix = model.value.get("bundle")
    classes, table, unclassified = plots.legend(joined, classified, prefix)
    write = WritePlots(
        mapping.tiles_prefix(step),
        table,
        classes=classes,
        unclassified=unclassified,
        geometry=region.geometry,
        model=str(upath(prefix) / "item.json") if prefix else None,
    )
    read = ReadPlots(str(proposed.prefix), str(joined.prefix), config.image.bands, stride=config.stride)
    return mapping.through(step, rows, [Work(read), Work(write)], patience=config.map.stall_seconds)


def check(config: Config, region: Region) -> Plan:
    """Plan a run; refuse imagery and weights that it cannot use before it writes anything."""
    before, drawn = None, None
    if truth := region.located(config.truth):
        evaluate_plots.expect_reference(truth)
    if enlarge := config.enlarge:
        before, tiles = super_resolution.tiles_to_enlarge(region, enlarge, config.image, config.map, halo=config.patch)
        load_enlarger(enlarge, device="cpu")
    else:
        tiles = mapping.tiles_of(region, config.map, partial(check_source, kind=config.image), halo=config.patch)
    if config.proposer == "boundaries":
        drawn = boundaries.check(region, config.boundaries, config.image, workers=config.workers)
    if config.proposer == "sam" and config.sam.checkpoint != "random":
        checkpoint_state(config.sam)
    crops = plots.check_classes(region, config.classifier, config.chips, config.training, workers=config.workers)
    return Plan(tiles, crops, before, drawn)


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate."""
    before = None
    if config.enlarge and plan.before is not None:
        before = estimate.Forecast(plan.before, lattice_of(config.enlarge).patch)
    counts = {"enlarge": len(before.tiles)} if before else {}
    inline = config.model_copy(update={"workers": 0})
    trial = partial(run, inline, plan=Plan(labels=plan.labels, drawn=plan.drawn), learn=(estimate.training, fit_plots))
    trains = config.chips or (config.proposer == "boundaries" and not config.boundaries.model)
    unknown = estimate.by_workers(config.workers) if trains else ()
    return estimate.Forecast(plan.tiles or (), config.patch, unknown, counts, trial=trial, before=before)


def run(config: Config, run: Run, region: Region, plan: Plan | None = None, *, learn: Steps = (fit_plots,)) -> str:
    """Find the plots of `region`, after `learn` with region and config; return the report's path and its headline."""
    plan, image, halo = plan or Plan(), config.image, config.patch
    model = run.step("classifier", *learn, region, config, listed=plan.labels)
    enlarging = (region, config.enlarge, image, config.map, halo)
    larger = run.step("enlarge", super_resolution.enlarge, *enlarging, tiles=plan.before)
    drawn = plan.drawn
    if "imagery" in larger.value:  # from here on the enlarged imagery is mapped; it is planned when it is there
        enlarged = config.map.model_copy(update={"imagery": larger.value["imagery"]})
        config, plan = config.model_copy(update={"map": enlarged, "image": ImageConfig()}), Plan()
    network: tuple[Step, ...] = ()
    if config.proposer == "boundaries":
        steps, settings = (*learn[:-1], boundaries.learn), (region, config.boundaries, image, config.workers)
        network = (run.step("boundaries", *steps, *settings, listed=drawn),)
    proposed = run.step("propose", propose, larger, region, config, *network, tiles=plan.tiles)
    joined = run.step("join", join, proposed, config)
    classified = run.step("classify", classify, proposed, joined, model, config)
    tiles = run.step("predict", write_tiles, region, proposed, joined, classified, model, config)
    polygons = run.step("plots", plots.write_plots, joined, classified, model)
    run.step("publish", mapping.publish, tiles, f"Cultivated plots, {region.name}")
    run.step("qgis", mapping.save_project, tiles, polygons)
    measured, simple, truth = None, None, region.located(config.truth)
    if truth:
        measured = run.step("evaluate", evaluate_plots.evaluate_run, tiles, truth)
        if config.baseline:
            other = None if config.proposer == "felzenszwalb" else plots.tiling(config.superpixels)
            simple = run.step("baseline", simple_plots.measure_baselines, tiles, truth, config.image, other)
    results = (proposed, joined, tiles, polygons)
    return report.headline(run.step("report", plots.write_report, *results, measured=measured, simple=simple))
