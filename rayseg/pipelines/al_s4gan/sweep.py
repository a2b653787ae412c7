"""Many runs of al-s4gan that differ in share of masks, strategy, learner and seed: the paper's table on one's own data.

    <out>/trials/<trial>/    a run each, but for its map
    <out>/trials.csv         one line per trial     <out>/table.csv   means over seeds with 95 % intervals
    <out>/report/index.html  table and learning curves

Trials run in parallel on a Ray cluster; finished trials are skipped.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayseg.config import load_values
from rayseg.engine import cluster
from rayseg.engine.run import Engine, Run, versions
from rayseg.errors import ConfigError, DataError, ModelError, RunIncomplete
from rayseg.geo.region import Region
from rayseg.metrics import mean_interval
from rayseg.pipelines.al_s4gan import chip_pool, pipeline
from rayseg.pipelines.al_s4gan.config import Config
from rayseg.steps import charts, report
from rayseg.store import absolute, put, upath
from rayseg.vision.query_strategies import STRATEGIES

LEARNERS = ("s4gan", "consistency", "supervised", "linear", "frozen")
"""s4gan and consistency learn from all chips, the others from those with masks alone; the last two are heads on the
frozen encoder."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        ratio: share of the pool that gets masks, 0..1.
        strategy: by which chips are chosen, one of `STRATEGIES`.
        learner: one of `LEARNERS`; "classifier" where there is no segmenter.
        seed: from 0, added to that of the configuration.
    """

    ratio: float
    strategy: str
    learner: str
    seed: int

    @property
    def name(self) -> str:
        """Folder name of the trial."""
        return f"{self.ratio:g}-{self.strategy}-{self.learner}-{self.seed}"

    def config(self, base: Config) -> Config:
        """The configuration of the trial.

        Raises:
            ConfigError: a value is invalid.
        """
        # Through JSON and validation, because a copy with other values would not be checked.
        values = base.model_dump(mode="json")
        values["active"] |= {"strategy": self.strategy, "ratio": self.ratio}
        values["seed"] = base.seed + self.seed
        if self.learner == "supervised":
            values["segmenter"] |= {"learner": "s4gan", "discriminator": None}
        elif self.learner in {"s4gan", "consistency"}:
            values["segmenter"] |= {"learner": self.learner}
        if base.segmenter:
            values["segmenter"]["network"] = self.learner if self.learner in {"linear", "frozen"} else "decoder"
        return load_values(Config, values)


def list_trials(
    base: Config, *, ratios: Sequence[float], strategies: Sequence[str], learners: Sequence[str], seeds: int
) -> list[Trial]:
    """All trials, each once; those without a segmenter need no learners, and the largest ratio shows the others.

    Raises:
        ConfigError: a name is unknown, or there is nothing to try.
    """
    if not (ratios and strategies and learners and seeds > 0):
        raise ConfigError("a sweep needs one or more ratios, strategies, learners and seeds; name some")
    for kind, names, known in (("strategy", strategies, tuple(STRATEGIES)), ("learner", learners, LEARNERS)):
        if unknown := sorted(set(names) - set(known)):
            raise ConfigError(f"{kind} {', '.join(unknown)} is unknown, expected some of: {', '.join(known)}")
    if base.segmenter is None:
        ratios, learners = [max(ratios)], ["classifier"]
    trials = [
        Trial(ratio, strategy, learner, seed)
        for seed in range(seeds)
        for ratio in ratios
        for strategy in strategies
        for learner in learners
    ]
    # For its errors: what one trial refuses is refused before the first trial runs.
    for trial in trials:
        trial.config(base)
    return list({trial.name: trial for trial in trials}.values())


def run(base: Config, region: Region, trials: Sequence[Trial], out: str, engine: Engine) -> str:
    """Carry out all trials; return the table as text.

    Raises:
        ConfigError: chips or settings cannot be used, or `out` belongs to another sweep.
        RunIncomplete: some trials failed; the table has the results of the others.
    """
    out = absolute(out).rstrip("/")
    settings = {"config": base.model_dump(mode="json"), "region": json.loads(json.dumps(asdict(region)))}
    kept = upath(out) / "sweep.json"
    if kept.exists() and json.loads(kept.read_bytes()) != settings:
        raise ConfigError(f"{out} belongs to a sweep with other settings; choose another --out or delete it")
    if engine.kind == "ray" and base.workers:
        raise ConfigError(
            f"trials run in parallel and cannot also start {base.workers} workers each; set workers=0 or use "
            "--engine inline"
        )
    chip_list = _checked(base, region, trials)
    put(kept, json.dumps(settings).encode())
    results: dict[Trial, dict[str, Any]] = {}
    for trial, value in _carried_out(base, region, trials, out, engine, chip_list):
        done = results | {trial: value}
        # In the order of the list, so that the tables do not depend on which trial ends first.
        results = {listed: done[listed] for listed in trials if listed in done}
        _write(out, settings, results, measure="accuracy" if base.segmenter is None else "mean IoU")
    wrong = {trial.name: value["failed"] for trial, value in results.items() if "failed" in value}
    if wrong:
        name, why = next(iter(wrong.items()))
        raise RunIncomplete(
            f"{len(wrong)} of {len(trials)} trials failed, first {name}: {why}; the others are in {out}/table.csv; "
            "fix the cause, then run the same command to resume"
        )
    header, rows = _table(results)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = [map(str.ljust, row, widths) for row in (header, *rows)]
    return "\n".join([*("  ".join(row).rstrip() for row in aligned), f"{out}/report/index.html"])


def _checked(base: Config, region: Region, trials: Sequence[Trial]) -> chip_pool.ChipList:
    """Check the chips and the settings of all trials; return the chips."""
    for trial in {(trial.strategy == "random", trial.learner): trial for trial in trials}.values():
        trial.config(base).expect_trainable()
    chip_list = chip_pool.find_chips(region, base.pool, base.table)
    # Of each seed the trial with the fewest masks, the last of its key.
    for trial in {trial.seed: trial for trial in sorted(trials, key=lambda trial: -trial.ratio)}.values():
        pipeline.expect_chips(trial.config(base), chip_list)
    return chip_list


def _carried_out(
    base: Config, region: Region, trials: Sequence[Trial], out: str, engine: Engine, chip_list: chip_pool.ChipList
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """(trial, its result) as they are finished."""
    if engine.kind == "inline":
        yield from ((trial, carry_out(trial, base, region, out, chip_list)) for trial in trials)
        return
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    cluster.connect(engine.address)
    # One GPU per trial, so that as many trials run as the cluster has GPUs.
    gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(carry_out)
    # Once for all trials: the list of chips is large.
    chips = ray.put(chip_list)
    waiting = {remote.remote(trial, base, region, out, chips): trial for trial in trials}
    while waiting:
        [done], _ = ray.wait(list(waiting), num_returns=1)
        trial = waiting.pop(done)
        try:
            yield trial, ray.get(done)
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            yield trial, {"failed": f"its process was lost ({type(error).__name__})"}


def carry_out(trial: Trial, base: Config, region: Region, out: str, chip_list: chip_pool.ChipList) -> dict[str, Any]:
    """The result of a trial: `curve`, points (labels, measure), and its measures; or why it `failed`."""
    config = trial.config(base)
    try:
        with Run.open(
            f"{out}/trials/{trial.name}", pipeline="al-s4gan", config=config, region=region, engine=Engine("inline")
        ) as opened:
            return pipeline.tried(config, opened, region, chip_list)
    except (ConfigError, DataError, ModelError, RunIncomplete) as error:
        return {"failed": " ".join(str(error).split())}


# -- tables ------------------------------------------------------------------------------------------------------------


def lines(results: Mapping[Trial, dict[str, Any]]) -> dict[str, list[tuple[float, ...]]]:
    """Strategy (and learner) -> (labels, mean, low, high) over the seeds, for each number of labels."""
    points: dict[str, dict[float, list[float]]] = {}
    for trial, value in results.items():
        name = trial.strategy if trial.learner == "classifier" else f"{trial.strategy}, {trial.learner}"
        for labels, measure in value.get("curve", ()):
            points.setdefault(name, {}).setdefault(float(labels), []).append(float(measure))
    return {name: [(at, *mean_interval(values)) for at, values in sorted(by.items())] for name, by in points.items()}


def _table(results: Mapping[Trial, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): a row per number of labels, a column per strategy and learner."""
    by_line = lines(results)
    cells: dict[float, dict[str, str]] = {}
    for name, points in by_line.items():
        for labels, mean, *interval in points:
            bounds = f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else ""
            cells.setdefault(labels, {})[name] = f"{mean:.3f}{bounds}"
    rows = [(f"{labels:g}", *(row.get(name, "") for name in by_line)) for labels, row in sorted(cells.items())]
    return ("labels", *by_line), rows


def _write(out: str, settings: dict[str, Any], results: Mapping[Trial, dict[str, Any]], *, measure: str) -> None:
    """Write the tables and the report of the trials that have ended so far."""
    # 1. one line per trial and number of labels, and the means over seeds
    names, missing = ("ratio", "strategy", "learner", "seed"), [(math.nan, math.nan)]
    each = [
        (*(str(asdict(trial)[name]) for name in names), f"{labels:g}", f"{value_at:.6f}", value.get("failed", ""))
        for trial, value in results.items()
        for labels, value_at in value.get("curve") or missing
    ]
    header, rows = _table(results)
    columns = (*names, "labels", "measure", "failed")
    for file, table in (("table.csv", [header, *rows]), ("trials.csv", [columns, *each])):
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows(table)
        put(upath(out) / file, sink.getvalue().encode())
    put(upath(out) / "trials.json", json.dumps([asdict(t) | v for t, v in results.items()], indent=1).encode())
    # 2. the report
    curves = {name: points for name, points in lines(results).items() if points}
    drawn = charts.learning_curves(curves, across="labels", up=measure)
    part = next((value["part"] for value in results.values() if "part" in value), "validation")
    seeds = len({trial.seed for trial in results})
    lead = (
        f"{measure[0].upper()}{measure[1:]} on the {part} chips; means over {seeds} seeds, in brackets 95 % "
        "intervals by Student's t."
    )
    if part == "validation" and measure == "mean IoU":
        lead += " Checkpoints were chosen by the same chips, so all figures are a little too high."
    extras = report.Extras(
        title=f"al-s4gan, sweep: {settings['region']['name']}",
        labels=lead,
        pictures=(("Learning curves", drawn, f"{measure} over the number of labels; bands are 95 % intervals."),),
        tables=((measure, header, rows),),
    )
    request = settings | {"pipeline": "al-s4gan", "command": "", "versions": versions()}
    report.write_page(out, extras, request=request)
