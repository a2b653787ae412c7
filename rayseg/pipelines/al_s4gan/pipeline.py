"""al-s4gan: few masks, well chosen, and many images without (Desai & Ghose 2022, WACV; Mittal et al. 2019, TPAMI).

    all chips --> rounds of active learning with a classifier of chips --> the chips worth a mask
    those with masks + all others without --> S4GAN or consistency, best checkpoint by mean IoU --> segmenter
    simple methods on the same chips --> measured next to it
    segmenter + region --> class map --> polygons, items, report

Masks come from an oracle, where some exist already, or from people: the run exports the chips that need one and resumes
after `rayseg labels import`. The modules of the steps explain the rest; `configs/al-s4gan/paper.yaml` has the settings
of the paper.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

from rayseg.engine.run import Run, Step
from rayseg.geo.region import Region
from rayseg.io import masks
from rayseg.pipelines.al_s4gan import chip_pool, queries, segmenter
from rayseg.pipelines.al_s4gan.config import Config
from rayseg.steps import baseline, estimate, generalize, report
from rayseg.steps import evaluate as evaluation
from rayseg.steps import map as mapping
from rayseg.steps.certificate import certify
from rayseg.store import upath
from rayseg.vision.query_strategies import expect_enough

Plan = mapping.Plan[chip_pool.ChipList]
PRODUCT = "landcover"


def choose(
    config: Config, run: Run, region: Region, given: chip_pool.ChipList | None = None, *, plan: Plan | None = None
) -> tuple[Step, list[Step]]:
    """(the pool, the steps of active learning); without a segmenter the last step measures the classifier."""
    settings, common = config.active, config.common
    pool = (region, config.pool, config.classes, config.seed, given)
    listed = run.step("pool", chip_pool.list_pool, *pool, chip_list=plan.labels if plan else None)
    # The number of rounds follows from the size of the pool, so it is known before the first round.
    if settings.chosen is None:
        queried = settings.budget(listed.value["pool"]).queries
        steps = [run.step("round-0", queries.draw_first, listed, settings, config.seed)]
    else:
        queried, steps = 0, [run.step("round-0", queries.take_chosen, listed, settings)]
    frozen = settings.frozen and common.classifies
    seen = run.step("features", queries.see, listed, settings, common) if frozen else None
    for number in range(1, queried + 1):
        steps.append(run.step(f"round-{number}", queries.query, listed, seen, steps[-1], settings, common, number))
    if config.segmenter is None:
        steps.append(run.step("last", queries.measure_last, listed, seen, steps[-1], settings, common))
    return listed, steps


def learn(
    config: Config, run: Run, region: Region, given: chip_pool.ChipList | None = None, *, plan: Plan | None = None
) -> tuple[Step, list[Step], Step, Step]:
    """Run every step before the map: (the pool, the rounds, the segmenter, its measures)."""
    listed, rounds = choose(config, run, region, given, plan=plan)
    trained = run.step("segmenter", segmenter.fit, listed, rounds[-1], config)
    return listed, rounds, trained, run.step("measure", segmenter.measure, listed, trained, config)


def tried(config: Config, run: Run, region: Region, chip_list: chip_pool.ChipList) -> dict[str, Any]:
    """The result of a trial of a sweep: all measures and `curve`, points (labels, measure); nothing is mapped."""
    if config.segmenter is None:
        _, rounds = choose(config, run, region, chip_list)
        return {"curve": queries.accuracies(rounds), "part": "validation"}
    _, _, trained, measured = learn(config, run, region, chip_list)
    mean_iou = measured.value.get("mean_iou", float("nan"))
    return {"curve": [(trained.value["masks"], mean_iou)], **measured.value}


def write_report(
    step: Step,
    parts: Sequence[Step],
    predicted: Step,
    polygons: Step,
    evaluated: Step,
    config: Config,
    *,
    simple: Step | None = None,
    certified: Step | None = None,
) -> dict[str, Any]:
    """The report of a map: the training data, and how the chips were chosen."""
    listed, trained, measured, *rounds = parts
    value, part = measured.value, measured.value["part"]
    labels = _trained_from(config, masks=trained.value["masks"], chips=listed.value["pool"])
    if part != "none":
        chosen = ", by which the checkpoint was chosen too" if part == "validation" else ""
        labels += f" Mean IoU on the {value['chips']} {part} chips{chosen}: {value['mean_iou']:.3f}."
    extras = _extras(labels, rounds, rounds[-1], config)
    if simple and simple.value:
        iou = {name: of_class for name, of_class in value["iou"].items() if isfinite(of_class)}
        extras = replace(extras, baseline=baseline.comparison(simple.value, value["mean_iou"], parts=iou))
    return report.write_report(step, predicted, polygons, evaluated, extras, certified=certified)


def _trained_from(config: Config, *, masks: int, chips: int) -> str:
    unlabelled = f" and {chips - masks} chips without" if config.segmenter and config.segmenter.uses_unlabelled else ""
    how = "active.chosen" if config.active.chosen is not None else config.active.strategy
    return f"Trained on {masks} masks, chosen by {how},{unlabelled}.".replace(",.", ".")


def _extras(labels: str, rounds: Sequence[Step], last: Step, config: Config) -> report.Extras:
    picks = queries.picks(last, config.active.strategy)
    return report.Extras(labels=labels, pictures=queries.curve(rounds), tables=(picks,))


def write_choice(step: Step, listed: Step, rounds: Sequence[Step], config: Config) -> dict[str, Any]:
    """The report of active learning alone."""
    curve, (*_, last_query, last) = queries.accuracies(rounds), rounds
    summary = (
        f"{last_query.value['labelled']} of {listed.value['pool']} images labelled, chosen by {config.active.strategy}."
    )
    if curve:
        summary += f" Accuracy on {listed.value['validation']} other images: {last.value['accuracy']:.3f}."
    figures = [("labels", str(n), f"accuracy {accuracy:.3f}") for n, accuracy in curve]
    report.write_page(step.root, _extras(summary, rounds, last_query, config), figures=figures)
    return {"report": "report/index.html", "summary": summary, "curve": curve}


def check(config: Config, region: Region) -> Plan:
    """Refuse, before anything is written, chips, imagery, settings and weights that cannot be used."""
    config.expect_trainable()
    tiles = None
    if config.segmenter:
        tiles = mapping.tiles_for(region, segmenter.describe(config), config.map)
        generalize.expect_small(tiles, config.polygons)
    if truth := region.located(config.truth):
        masks.masks_of(truth, names=config.table.names)
    chip_list = chip_pool.find_chips(region, config.pool, config.table)
    expect_chips(config, chip_list)
    return Plan(tiles, chip_list)


def expect_chips(config: Config, chip_list: chip_pool.ChipList) -> int:
    """Refuse chips that cannot be divided as configured, or are too few; return how many are in the pool.

    Raises:
        ConfigError: fewer chips are requested than there are classes.
        RaysegError: see `chip_pool.divide`.
    """
    rows = chip_pool.divide(chip_list, config.pool, config.table, seed=config.seed)
    count = len([row for row in rows if row["part"] == "pool"])
    if config.active.chosen is None:
        expect_enough(count, config.active.ratio, len(set(chip_list.classes) - set(config.pool.absent)))
    return count


def forecast(config: Config, region: Region, plan: Plan) -> estimate.Forecast:
    """The forecast of a run, for its estimate; without the duration of active learning."""
    chip_list = plan.labels or chip_pool.find_chips(region, config.pool, config.table)
    count = expect_chips(config, chip_list)
    choosing = f"the selection among {count} chips; and training, as long as masks are missing"
    unknown = (choosing, *estimate.by_workers(config.workers))
    if not config.segmenter:
        return estimate.Forecast([], unknown=(*unknown, "nothing is mapped without a segmenter"))
    learn = partial(_learn, config.model_copy(update={"workers": 0}), region, chip_list)
    return estimate.by_untrained(segmenter.describe(config), plan, config.map, learn=learn, unknown=unknown)


def _learn(config: Config, region: Region, chip_list: chip_pool.ChipList, run: Run) -> Step | None:
    """A short training of the segmenter, on the chips that have masks already."""
    listed = run.step("pool", chip_pool.list_pool, region, config.pool, config.classes, config.seed, chip_list)
    # People still have to draw: blank weights stand for the segmenter.
    if not chip_pool.masked_rows(listed):
        return None
    return run.step("segmenter", estimate.training, segmenter.fit_drawn, listed, config)


def run(config: Config, run: Run, region: Region, plan: Plan | None = None) -> str:
    """Choose chips, train, map `region`; return the report's path and its headline."""
    if config.segmenter is None:
        listed, rounds = choose(config, run, region, plan=plan)
        written = run.step("report", write_choice, listed, rounds, config)
        return f"{upath(run.root) / written.value['report']}: {written.value['summary']}"
    # 1. choose chips, train and measure
    listed, rounds, trained, measured = learn(config, run, region, plan=plan)
    learnt = [listed, trained, measured, rounds[-1]]
    simple = run.step("baseline", segmenter.measure_baselines, learnt, config) if config.baseline else None
    # 2. map the region
    predicted = run.step("predict", mapping.predict_region, region, trained, config.map, tiles=plan and plan.tiles)
    shown = generalize.generalized(run, predicted, config.polygons, region)
    polygons = run.step("polygons", mapping.join_polygons, shown, PRODUCT)
    evaluated = run.step("evaluate", evaluation.compare_truth, predicted, region, config.truth)
    run.step("publish", mapping.publish, predicted, f"Land cover, {region.name}")
    run.step("qgis", mapping.save_project, predicted, polygons)
    certified = run.step("certificate", certify, predicted, region, config.truth) if config.certificate else None
    parts = [listed, trained, measured, *rounds]
    arguments = (parts, predicted, polygons, evaluated, config)
    return report.headline(run.step("report", write_report, *arguments, simple=simple, certified=certified))
