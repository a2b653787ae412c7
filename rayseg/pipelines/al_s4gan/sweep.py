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

import numpy as np
from scipy.stats import t as student

from rayseg.config import load_values
from rayseg.engine import cluster
from rayseg.engine.run import Engine, Run, versions
from rayseg.errors import ConfigError, DataError, ModelError, RaysegError, RunIncomplete
from rayseg.geo.region import Region
from rayseg.pipelines.al_s4gan import chip_pool, pipeline
from rayseg.pipelines.al_s4gan.config import Config
from rayseg.steps import report
from rayseg.store import absolute, put, upath
from rayseg.vision.query_strategies import STRATEGIES

LEARNERS = ("s4gan", "consistency", "supervised")
"""s4gan and consistency learn from all chips; supervised from those with masks alone."""
Point = tuple[float, ...]


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
        values = base.model_dump(mode="json")
        values["active"] |= {"strategy": self.strategy, "ratio": self.ratio}
        values["seed"] = base.seed + self.seed
        if self.learner == "supervised":
            values["segmenter"] |= {"learner": "s4gan", "discriminator": None}
        elif base.segmenter:
            values["segmenter"]["learner"] = self.learner
        return load_values(Config, values)


def list_trials(
    base: Config,
    *,
    ratios: Sequence[float],
    strategies: Sequence[str],
    learners: Sequence[str],
    seeds: int,
) -> list[Trial]:
    """All trials, each once; those without a segmenter need no learners, and the largest ratio shows the others.

    Raises:
        ConfigError: a name is unknown, or there is nothing to try.
    """
    if not (ratios and strategies and learners and seeds > 0):
        raise ConfigError("a sweep needs one or more ratios, strategies, learners and seeds; name some")
    for kind, found, known in (("strategy", strategies, tuple(STRATEGIES)), ("learner", learners, LEARNERS)):
        if unknown := sorted(set(found) - set(known)):
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
    _expect_same(out, base, region)
    if engine.kind == "ray" and base.workers:
        raise ConfigError(
            f"trials run in parallel and cannot also start {base.workers} workers each; set workers=0 or use "
            "--engine inline"
        )
    chip_list = _checked(base, region, trials)
    put(upath(out) / "sweep.json", json.dumps(_asked(base, region)).encode())
    found: dict[Trial, dict[str, Any]] = {}
    for trial, value in _carried_out(base, region, trials, out, engine, chip_list):
        done = found | {trial: value}
        found = {one: done[one] for one in trials if one in done}
        _write(out, base, region, found)
    wrong = {trial.name: value["failed"] for trial, value in found.items() if "failed" in value}
    if wrong:
        name, why = next(iter(wrong.items()))
        raise RunIncomplete(
            f"{len(wrong)} of {len(trials)} trials failed, first {name}: {why}; the others are in {out}/table.csv; "
            "fix the cause, then run the same command to resume"
        )
    return f"{_text(*_table(found))}\n{out}/report/index.html"


def _checked(base: Config, region: Region, trials: Sequence[Trial]) -> chip_pool.ChipList:
    """Check the chips and the settings of all trials; return the chips."""
    fewest_last = sorted(trials, key=lambda trial: -trial.ratio)
    for trial in {(trial.strategy == "random", trial.learner): trial for trial in trials}.values():
        trial.config(base).expect_trainable()
    chip_list = chip_pool.find_chips(region, base.pool, base.table)
    for trial in {trial.seed: trial for trial in fewest_last}.values():
        pipeline.expect_chips(trial.config(base), chip_list)
    return chip_list


def _asked(base: Config, region: Region) -> dict[str, Any]:
    return {"config": base.model_dump(mode="json"), "region": json.loads(json.dumps(asdict(region)))}


def _expect_same(out: str, base: Config, region: Region) -> None:
    path = upath(out) / "sweep.json"
    if path.exists() and json.loads(path.read_bytes()) != _asked(base, region):
        raise ConfigError(f"{out} belongs to a sweep with other settings; choose another --out or delete it")


def _carried_out(
    base: Config,
    region: Region,
    trials: Sequence[Trial],
    out: str,
    engine: Engine,
    chip_list: chip_pool.ChipList,
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """(trial, what it found) as they are finished."""
    if engine.kind == "inline":
        yield from ((trial, carry_out(trial, base, region, out, chip_list)) for trial in trials)
        return
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    cluster.connect(engine.address)
    gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(carry_out)
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
    """What a trial found: `curve`, points (labels, measure), and its measures; or why it `failed`."""
    config = trial.config(base)
    try:
        with Run.open(
            f"{out}/trials/{trial.name}", pipeline="al-s4gan", config=config, region=region, engine=Engine("inline")
        ) as opened:
            return pipeline.tried(config, opened, region, chip_list)
    except (ConfigError, DataError, ModelError, RunIncomplete) as error:
        return {"failed": _said(error)}


def _said(error: RaysegError) -> str:
    return " ".join(str(error).split())


# -- tables ------------------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> Point:
    """(mean, low, high): 95 % interval of the mean by Student's t; the mean alone of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return (mean,)
    reach = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def lines(found: Mapping[Trial, dict[str, Any]]) -> dict[str, list[Point]]:
    """Strategy (and learner) -> (labels, mean, low, high) over the seeds, for each number of labels."""
    points: dict[str, dict[float, list[float]]] = {}
    for trial, value in found.items():
        for labels, measure in value.get("curve", ()):
            points.setdefault(_line_of(trial), {}).setdefault(float(labels), []).append(float(measure))
    return {name: [(at, *mean_interval(values)) for at, values in sorted(by.items())] for name, by in points.items()}


def _line_of(trial: Trial) -> str:
    return trial.strategy if trial.learner == "classifier" else f"{trial.strategy}, {trial.learner}"


def _table(found: Mapping[Trial, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): a row per number of labels, a column per strategy and learner."""
    by_line = lines(found)
    counts = sorted({point[0] for points in by_line.values() for point in points})
    rows: list[tuple[str, ...]] = []
    for labels in counts:
        cells = [next((point for point in points if point[0] == labels), None) for points in by_line.values()]
        rows.append((f"{labels:g}", *(_cell(point) for point in cells)))
    return ("labels", *by_line), rows


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{point[1]:.3f}" + (f" ({point[2]:.3f}–{point[3]:.3f})" if len(point) > 2 else "")


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def _write(out: str, base: Config, region: Region, found: Mapping[Trial, dict[str, Any]]) -> None:
    header, rows = _table(found)
    put(upath(out) / "table.csv", _csv(header, rows))
    names = ("ratio", "strategy", "learner", "seed")
    each = [
        (*(str(asdict(trial)[name]) for name in names), f"{labels:g}", f"{measure:.6f}", value.get("failed", ""))
        for trial, value in found.items()
        for labels, measure in value.get("curve") or [(float("nan"), float("nan"))]
    ]
    put(upath(out) / "trials.csv", _csv((*names, "labels", "measure", "failed"), each))
    put(upath(out) / "trials.json", json.dumps([asdict(t) | v for t, v in found.items()], indent=1).encode())
    _report(out, base, region, found)


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([header, *rows])
    return sink.getvalue().encode()


def _report(out: str, base: Config, region: Region, found: Mapping[Trial, dict[str, Any]]) -> None:
    header, rows = _table(found)
    measure = "accuracy" if base.segmenter is None else "mean IoU"
    drawn = report.learning_curves({k: v for k, v in lines(found).items() if v}, across="labels", up=measure)
    where = next((value["part"] for value in found.values() if "part" in value), "validation")
    seeds = len({trial.seed for trial in found})
    said = (
        f"{measure[0].upper()}{measure[1:]} on the {where} chips; means over {seeds} seeds, in brackets 95 % "
        "intervals by Student's t."
    )
    if where == "validation" and base.segmenter is not None:
        said += " Checkpoints were chosen by the same chips, so all figures are a little too high."
    extras = report.Extras(
        title=f"al-s4gan, sweep: {region.name}",
        labels=said,
        pictures=(("Learning curves", drawn, f"{measure} over the number of labels; bands are 95 % intervals."),),
        tables=((measure, header, rows),),
    )
    asked = _asked(base, region) | {"pipeline": "al-s4gan"}
    report.write_page(out, extras, asked=asked | {"command": "", "versions": versions()})
