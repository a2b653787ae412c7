"""al-s4gan: few masks, well chosen, and many images without (Desai & Ghose 2022, WACV; Mittal et al. 2019, TPAMI).

    all chips --> rounds of active learning with a classifier of chips --> the chips that are worth a mask
    those with masks + all others without --> S4GAN, best checkpoint by mean IoU --> segmenter
    segmenter + region --> class map --> polygons, items, report

Masks come from an oracle, where there are some already, or from people: the run exports the chips that wait for one and
goes on when `rayseg labels import` has brought them. What is not said here is in the modules named by the steps; the
settings of the paper are `configs/al-s4gan/paper.yaml`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from rayseg.config import Config as Frozen
from rayseg.config import Workers
from rayseg.engine import cluster
from rayseg.engine.manifest import Row
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError
from rayseg.geo.region import Region
from rayseg.io import masks
from rayseg.io.class_tables import Classes
from rayseg.metrics import Confusion, bootstrap
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.crf import Kernels, Refined
from rayseg.pipelines.al_s4gan import chip_pool, queries
from rayseg.pipelines.al_s4gan.chip_pool import PoolConfig
from rayseg.pipelines.al_s4gan.queries import ActiveConfig, Common
from rayseg.steps import estimate, models, report
from rayseg.steps import evaluate as evaluation
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.store import Location, upath
from rayseg.train.batches import Chips
from rayseg.train.classifier import expect_trainable as expect_classifier
from rayseg.train.learning import trained
from rayseg.train.s4gan import Data, S4ganConfig, confusions, expect_trainable, fit_s4gan, measures_of
from rayseg.train.session import Setup
from rayseg.vision.color import ClassTable
from rayseg.vision.query_strategies import expect_enough

Plan = mapping.Plan[chip_pool.Surveyed]
PRODUCT = "landcover"


class Config(Frozen):
    """Settings of the pipeline; the defaults are the paper's where the machine allows."""

    pool: PoolConfig = PoolConfig()
    classes: Classes = Classes.model_validate("deepglobe")
    """The classes of the masks: a YAML file, its name under configs/classes, or its content."""
    active: ActiveConfig = ActiveConfig()
    segmenter: S4ganConfig | None = S4ganConfig()
    """None ends after active learning, with the accuracy of the classifier at each number of labels."""
    crf: Kernels | None = None
    """A random field over the segmenter's answer, in measures and map."""
    map: MapConfig = MapConfig()
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 640
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance of these windows; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train; 0 trains in the command's own process."""
    seed: int = 1234
    """Of everything random; it takes the place of `active.classifier.learning.seed` and `segmenter.learning.seed`."""
    scaling: Scaling = Field(default_factory=models.scaling_of)
    """From the imagery's values to the networks' input; by default what the segmenter's encoder expects of uint8."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if len(self.scaling.mean) != len(chip_pool.BANDS):
            raise ValueError(f"scaling is of {len(self.scaling.mean)} bands, chips have {', '.join(chip_pool.BANDS)}")
        if self.segmenter:
            reduce = self.segmenter.reduce
            models.expect_windows(chip_pool.BANDS, self.scaling, patch=self.patch, stride=self.stride, reduce=reduce)
        return self

    @property
    def table(self) -> ClassTable:
        """Classes of the masks; without a segmenter the chips' own labels are all there is."""
        return self.classes.table

    @property
    def common(self) -> Common:
        """What all rounds share."""
        return Common(
            kinds=self.classes,
            scaling=self.scaling,
            seed=self.seed,
            workers=self.workers,
            patience=self.map.stall_seconds,
            classifies=self.active.strategy != "random" or self.segmenter is None,
        )


# -- steps -------------------------------------------------------------------------------------------------------------


def choose(
    config: Config, run: Run, region: Region, given: chip_pool.Surveyed | None = None, *, plan: Plan | None = None
) -> tuple[Step, list[Step]]:
    """(the pool, the steps of active learning); without a segmenter the last one measures what was reached."""
    settings, common = config.active, config.common
    pool = (region, config.pool, config.classes, config.seed, given)
    listed = run.step("pool", chip_pool.list_pool, *pool, surveyed=plan.labels if plan else None)
    budget = settings.budget(listed.value["pool"])
    steps = [run.step("round-0", queries.draw_first, listed, settings, config.seed)]
    frozen = settings.frozen and common.classifies
    seen = run.step("features", queries.see, listed, settings, common) if frozen else None
    for number in range(1, budget.queries + 1):
        steps.append(run.step(f"round-{number}", queries.query, listed, seen, steps[-1], settings, common, number))
    if config.segmenter is None:
        steps.append(run.step("last", queries.measure_last, listed, seen, steps[-1], settings, common))
    return listed, steps


def fit(step: Step, listed: Step, chosen: Step, config: Config) -> dict[str, Any]:
    """Train the segmenter on the chips chosen and all others; models/segmenter is its bundle."""
    return _fit(step, _data(step.root, listed, chosen, config), config)


def _fit(step: Step, data: Data, config: Config) -> dict[str, Any]:
    assert config.segmenter is not None
    settings = _seeded(config.segmenter, config.seed)
    measures = fit_s4gan(
        settings,
        data,
        Setup(
            step.prefix,
            workers=config.workers,
            use_gpu=cluster.connect_training(step.engine.address, workers=config.workers),
        ),
        scaling=config.scaling,
    )
    net = settings.build(classes=len(config.table.classes), channels=len(chip_pool.BANDS), weights="none")
    model: Any = trained(net, step.prefix)
    if config.crf:
        model = Refined(model, channels=len(chip_pool.BANDS), kernels=config.crf)
        model.std.copy_(model.std.new_tensor(config.scaling.std) / config.scaling.scale)
    described = _described(config, measures)
    prefix = str(upath(step.root) / "models" / described.name)
    bundle.save(prefix, described, model)
    return {"bundle": prefix, "measures": measures, "masks": len(data.labelled)}


def _seeded(settings: S4ganConfig, seed: int) -> S4ganConfig:
    return settings.model_copy(update={"learning": settings.learning.model_copy(update={"seed": seed})})


def _data(root: str, listed: Step, chosen: Step, config: Config) -> Data:
    """Chips with masks, without, and to choose by.

    Raises:
        RunIncomplete: masks of chips that were chosen are still to be drawn.
    """
    asked = [row["id"] for row in queries.labelled(chosen)]
    if not config.active.count_pool:
        asked = asked[config.active.budget(listed.value["pool"]).initial :]
    rows = {row["id"]: row for row in chip_pool.rows_of(listed, "pool")}
    labelled = [rows[chip] for chip in asked]
    queries.expect_masks(root, labelled, config.common.classes)
    return _divided(root, listed, labelled, config)


def _divided(root: str, listed: Step, labelled: Sequence[Row], config: Config) -> Data:
    """Chips whose masks are shown, all others of the pool, and those to choose by."""
    shown = {row["id"] for row in labelled}
    rest = [row for row in chip_pool.rows_of(listed, "pool") if row["id"] not in shown]
    held = chip_pool.rows_of(listed, "validation")
    return Data(
        _masked(root, labelled, config),
        _masked(root, rest, config) if rest else None,
        _masked(root, held, config) if held else None,
    )


def _masked(root: str, rows: Sequence[Row], config: Config) -> Chips:
    return chip_pool.masked_chips(rows, config.table, queries.drawn_prefix(root))


def _described(config: Config, measures: dict[str, float] | None = None) -> Bundle:
    table = config.table
    if table.values != tuple(range(len(table.values))):
        raise ConfigError(f"class values are {list(table.values)}, a segmenter's are 0, 1, 2, ...; number them so")
    assert config.segmenter is not None
    options = config.segmenter.options(classes=len(table.classes), channels=len(chip_pool.BANDS))
    if config.crf:
        options |= config.crf.model_dump()
    return Bundle(
        name="segmenter",
        task="segmentation",
        architecture=Architecture(factory="refined" if config.crf else "segmenter", options=options),
        classes=table.classes,
        bands=chip_pool.BANDS,
        dtype="uint8",
        scaling=config.scaling,
        patch=config.patch,
        stride=config.stride,
        metrics=measures or {},
        provenance=Provenance(config=config.segmenter.model_dump(mode="json")),
    )


def measure(step: Step, listed: Step, segmenter: Step, config: Config) -> dict[str, Any]:
    """The segmenter on the test chips, or on those it was chosen by where there are none; none without masks."""
    assert config.segmenter is not None
    part: chip_pool.Part = "test" if listed.value["test"] else "validation"
    rows = chip_pool.rows_of(listed, part)
    if not rows:
        return {"part": "none"}
    _, model = bundle.build(segmenter.value["bundle"])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chips = _masked(step.root, rows, config)
    found = confusions(model, chips, range(len(chips)), config.scaling, unit=32 * config.segmenter.reduce)
    total = sum(found[1:], found[0])
    scenes = [sum(own[1:], own[0]) for own in _by_scene(rows, found)]
    low, high = bootstrap(scenes, lambda c: c.mean_iou_of_reference) if len(scenes) > 1 else (None, None)
    per_class = dict(zip(config.table.names, map(float, total.iou), strict=True))
    return {"part": part, "chips": len(rows), **measures_of(total), "low": low, "high": high, "iou": per_class}


def _by_scene(rows: Sequence[Row], found: Sequence[Confusion]) -> list[list[Confusion]]:
    names = sorted({row["scene"] for row in rows})
    return [[one for row, one in zip(rows, found, strict=True) if row["scene"] == name] for name in names]


def learn(
    config: Config, run: Run, region: Region, given: chip_pool.Surveyed | None = None, *, plan: Plan | None = None
) -> tuple[Step, list[Step], Step, Step]:
    """All but the map: (the pool, the rounds, the segmenter, its measures)."""
    listed, rounds = choose(config, run, region, given, plan=plan)
    segmenter = run.step("segmenter", fit, listed, rounds[-1], config)
    return listed, rounds, segmenter, run.step("measure", measure, listed, segmenter, config)


def tried(config: Config, run: Run, region: Region, surveyed: chip_pool.Surveyed) -> dict[str, Any]:
    """What a trial of a sweep finds: `curve`, points (labels, measure), and all measures; nothing is mapped."""
    if config.segmenter is None:
        _, rounds = choose(config, run, region, surveyed)
        return {"curve": queries.accuracies(rounds), "part": "validation"}
    _, _, segmenter, measured = learn(config, run, region, surveyed)
    found = measured.value["mean_iou"] if "mean_iou" in measured.value else float("nan")
    return {"curve": [(segmenter.value["masks"], found)], **measured.value}


# -- reports -----------------------------------------------------------------------------------------------------------


def write_report(
    step: Step, parts: Sequence[Step], predicted: Step, polygons: Step, evaluated: Step, config: Config
) -> dict[str, Any]:
    """The report of a map: what it was learnt from, and how the chips were chosen."""
    listed, segmenter, measured, *rounds = parts
    value, where = measured.value, measured.value["part"]
    said = _learnt_from(config, masks=segmenter.value["masks"], chips=listed.value["pool"])
    if where != "none":
        chosen = ", by which the checkpoint was chosen too" if where == "validation" else ""
        said += f" Mean IoU on the {value['chips']} {where} chips{chosen}: {value['mean_iou']:.3f}."
    extras = report.Extras(
        labels=said, pictures=queries.curve(rounds), tables=(queries.picks(rounds[-1], config.active.strategy),)
    )
    return report.write_report(step, predicted, polygons, evaluated, extras)


def _learnt_from(config: Config, *, masks: int, chips: int) -> str:
    assert config.segmenter is not None
    without = f", and {chips - masks} chips without" if config.segmenter.discriminator else ""
    return f"Learnt from {masks} masks, chosen by {config.active.strategy}{without}."


def write_choice(step: Step, listed: Step, rounds: Sequence[Step], config: Config) -> dict[str, Any]:
    """The report of active learning alone."""
    curve, last = queries.accuracies(rounds), rounds[-1].value
    said = (
        f"{rounds[-2].value['labelled']} of {listed.value['pool']} images labelled, chosen by {config.active.strategy}."
    )
    if curve:
        said += f" Accuracy on {listed.value['validation']} other images: {last['accuracy']:.3f}."
    figures = [("labels", str(n), f"accuracy {accuracy:.3f}") for n, accuracy in curve]
    page = report.Extras(
        labels=said, pictures=queries.curve(rounds), tables=(queries.picks(rounds[-2], config.active.strategy),)
    )
    report.write_page(step.root, page, figures=figures)
    return {"report": "report/index.html", "summary": said, "curve": curve}


# -- the pipeline ------------------------------------------------------------------------------------------------------


def check(config: Config, region: Region) -> Plan:
    """Refuse, before anything is written, chips, imagery, settings and weights that cannot be used."""
    expect_settings(config)
    tiles = None
    if config.segmenter:
        tiles = mapping.tiles_for(region, _described(config), config.map)
    if truth := region.located(config.truth):
        masks.masks_of(truth, names=config.table.names)
    surveyed = chip_pool.survey(region, config.pool, config.table)
    expect_chips(config, surveyed)
    return Plan(tiles, surveyed)


def expect_settings(config: Config) -> None:
    """Refuse settings and weights that cannot be learnt with: all networks are built once.

    Raises:
        ConfigError: a setting is invalid.
        ModelError: weights cannot be had, or do not fit.
    """
    settings, segmenter = config.active.classifier, config.segmenter
    if segmenter:
        if config.pool.chips:
            raise ConfigError("labelled images have no masks to learn a segmenter from; set segmenter to null")
        _described(config)
        expect_trainable(segmenter, workers=config.workers)
    if config.common.classifies:
        expect_classifier(settings, workers=config.workers)
    _expect_sizes(config)
    classes, channels = len(config.table.classes), len(chip_pool.BANDS)
    for network in (settings if config.common.classifies else None, segmenter):
        if network:
            models.expect_weights(network, config.scaling)
    if config.common.classifies:
        settings.build(classes=classes, channels=channels)
    if segmenter:
        segmenter.build(classes=classes, channels=channels)


def _expect_sizes(config: Config) -> None:
    sizes = {"active.classifier.size": config.active.classifier.size} if config.common.classifies else {}
    if config.segmenter:
        sizes["segmenter.size"] = config.segmenter.size
    for name, size in sizes.items():
        if size > config.pool.size:
            raise ConfigError(f"{name} {size} exceeds the chips' {config.pool.size} px; lower it, or raise pool.size")


def expect_chips(config: Config, surveyed: chip_pool.Surveyed) -> int:
    """Refuse chips that cannot be divided as asked for, or are too few; return how many are in the pool.

    Raises:
        ConfigError: fewer chips are asked for than there are classes.
        RaysegError: see `chip_pool.divide`.
    """
    rows = chip_pool.divide(surveyed, config.pool, config.table, seed=config.seed)
    count = len([row for row in rows if row["part"] == "pool"])
    expect_enough(count, config.active.ratio, len(set(surveyed.classes) - set(config.pool.absent)))
    return count


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """What is known of a run before it is begun; what choosing takes shows only while it is done."""
    surveyed = plan.labels or chip_pool.survey(region, config.pool, config.table)
    count = expect_chips(config, surveyed)
    said = f"choosing from {count} chips in rounds, and training if their masks are still to be drawn"
    unknown = (said, *estimate.by_workers(config.workers))
    if not config.segmenter:
        return estimate.Forecast([], unknown=(*unknown, "nothing is mapped without a segmenter"))
    learn = partial(_learn, config.model_copy(update={"workers": 0}), region, surveyed)
    return estimate.by_untrained(_described(config), plan, config.map, learn=learn, unknown=unknown)


def _learn(config: Config, region: Region, surveyed: chip_pool.Surveyed, run: Run) -> Step | None:
    """The segmenter's training, cut short, on chips that are drawn."""
    listed = run.step("pool", chip_pool.list_pool, region, config.pool, config.classes, config.seed, surveyed)
    if not _masked_rows(listed):
        return None
    return run.step("segmenter", estimate.training, _fit_drawn, listed, config)


def _fit_drawn(step: Step, listed: Step, config: Config) -> dict[str, Any]:
    """The segmenter, from as many masks as will be shown to it."""
    count = config.active.budget(listed.value["pool"]).target
    return _fit(step, _divided(step.root, listed, _masked_rows(listed)[:count], config), config)


def _masked_rows(listed: Step) -> list[Row]:
    return [row for row in chip_pool.rows_of(listed, "pool") if row["masks"] != "[]"]


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Choose chips, learn, map `region`; return where the report is and what it says."""
    if config.segmenter is None:
        listed, rounds = choose(config, run, region, plan=plan)
        told = run.step("report", write_choice, listed, rounds, config)
        return f"{upath(run.root) / told.value['report']}: {told.value['summary']}"
    listed, rounds, segmenter, measured = learn(config, run, region, plan=plan)
    predicted = run.step("predict", mapping.predict_region, region, segmenter, config.map, tiles=plan and plan.tiles)
    polygons = run.step("polygons", mapping.join_polygons, predicted, PRODUCT)
    evaluated = run.step("evaluate", evaluation.compare_truth, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Land cover, {region.name}")
    parts = [listed, segmenter, measured, *rounds]
    return report.headline(run.step("report", write_report, parts, predicted, polygons, evaluated, config))
