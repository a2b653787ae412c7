"""Estimate data volume, run time and price of a run before it starts, from metadata and a few timed tiles.

A probe runs the pipeline itself on some tiles, inline, in a temporary folder. If the pipeline trains a model first, the
probe shortens the training and maps with the resulting network or with a network of zeros. Times from the ledgers scale
with the size of the tiles and their margins, or with the effort of rows that are not tiles; times of steps without a
ledger scale with the pixels. The first row of a step is a warm-up and is excluded. A worker is a machine like the one
that ran the probe.
"""

import json
import os
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.manifest import Row, read_rows
from rayseg.engine.run import Engine, Run, Step
from rayseg.geo.grid import Tile, Window
from rayseg.geo.region import Region
from rayseg.io import rasters
from rayseg.io.output_grids import utm_of
from rayseg.io.sources import Source
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.steps import map as mapping
from rayseg.steps import report
from rayseg.steps.map import MapConfig, Plan
from rayseg.store import STORE_ERRORS, upath
from rayseg.train import probe

FRAME = 64 << 10
"""Assumed fixed size in bytes of each file outside the tiles, independent of the number of tiles."""
MOST_SIZES = 32
"""Approximate number of files whose size is queried."""


def bytes_read(tiles: Sequence[Row], *, margin: int) -> int | None:
    """Estimate the bytes that are read for the tiles and `margin` px around them, from the sizes of some files.

    A pixel covered by several scenes counts once per scene, because the scene that is read is known only at run time.
    """
    pixels: Counter[Source] = Counter()
    known: dict[str, Source] = {}
    for row in tiles:
        tile = Tile.from_row(row)
        own, side = tile.window, 2 * margin
        around = Window(own.col - margin, own.row - margin, own.width + side, own.height + side)
        for text in map(json.dumps, json.loads(row["sources"])):
            source = known.setdefault(text, Source.from_row(json.loads(text)))
            part = rasters.footprint(source, tile.grid)
            # The footprint on a divided grid is a part of the source only.
            scale = tile.grid.resolution[0] / utm_of(source)[1] if tile.grid.divided else 0.0
            share = scale**2 or source.height * source.width / max(_area(part), 1)
            pixels[source] += round(share * _area(part.intersect(around)))
    # A few files stand for all: a store answers one request per file.
    every = max(1, len(pixels) // MOST_SIZES)
    few = [source for at, source in enumerate(pixels) if at % every == 0]
    try:
        size = sum(int(upath(href).stat().st_size) for source in few for href, _ in source.assets)
    except UNSIZED:
        return None
    return round(size / sum(source.height * source.width for source in few) * pixels.total()) if few else None


UNSIZED: tuple[type[Exception], ...] = (ValueError, TypeError, *STORE_ERRORS)
"""Errors raised where the size of a file is not available."""


def _area(window: Window) -> int:
    return 0 if window.empty else window.width * window.height


def bytes_written(root: Path, growth: float, growths: Mapping[str, float]) -> int:
    """Estimate the bytes of the whole run from a probe; the report and the fixed part of other files do not grow.

    Args:
        root: folder of the probe.
        growth: pixels of all tiles divided by pixels of the probe's tiles.
        growths: folder -> factor, for folders that grow by another factor.
    """
    total = 0.0
    for path in root.rglob("*"):
        size = path.stat().st_size if path.is_file() else 0
        part = path.relative_to(root)
        folder = next((folder for folder in growths if part.is_relative_to(folder)), part.parts[0])
        fixed = 0 if folder in {"tiles", *growths} else size if folder == "report" else min(size, FRAME)
        total += fixed + (size - fixed) * growths.get(folder, growth)
    return round(total)


MADE = {"enlarge": ("enlarged",), "networks": ("models",)}
"""Step whose rows are not tiles -> the folders that it writes in addition to its own."""
TIMED = 3
"""Tiles that a probe times, plus one for warm-up."""


@dataclass(frozen=True)
class Forecast:
    """What a pipeline knows about a run before it starts.

    Attributes:
        tiles: rows of all tiles, with their sources as JSON.
        margin: px around a tile that are read with the tile.
        unknown: what the estimate does not include, as sentences.
        counts: step -> number of rows, for steps whose rows are not tiles.
        efforts: step -> total effort of these rows, in the unit of the fact `effort` that each row records; without
            it, all rows are assumed to take the same time.
        trial: runs a probe, given an open run and the region of the probe's tiles; None without a model.
        before: forecast of the step that derives the mapped imagery (for example enlarging); else None.
    """

    tiles: Sequence[Row]
    margin: int = 0
    unknown: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    efforts: Mapping[str, int] = field(default_factory=dict)
    trial: Callable[[Run, Region], object] | None = None
    before: "Forecast | None" = None


@dataclass(frozen=True)
class Rates:
    """Number of workers, and price per hour of a GPU and of a CPU."""

    workers: int = 1
    gpu_hour: float = 0.0
    cpu_hour: float = 0.0


@dataclass(frozen=True)
class Probe:
    """Seconds of the whole run on one worker, estimated from a few tiles.

    Attributes:
        tiles: ids of the tiles that were timed.
        seconds: stage -> total seconds over all tiles.
        spread: seconds that are divided by the number of workers: the slowest stage of each step.
        alone: seconds that do not depend on the number of workers: startup, joins, report.
        bytes_written: bytes of the whole run.
        cpus: number of CPUs of the machine.
        gpus: number of GPUs of the machine.
        on_gpu: names of the stages that request a GPU.
        troubles: row -> why it failed in the probe; its tiles count as zero seconds.
    """

    tiles: tuple[str, ...]
    seconds: dict[str, float]
    spread: float
    alone: float
    bytes_written: int
    cpus: int
    gpus: int
    on_gpu: tuple[str, ...] = ()
    troubles: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpu_seconds(self) -> float | None:
        """GPU seconds; None if the machine has no GPU."""
        return sum(self.seconds.get(stage, 0.0) for stage in self.on_gpu) if self.gpus else None

    @property
    def cpu_seconds(self) -> float:
        """Seconds in which stages use a CPU (or all CPUs, if a model runs without a GPU)."""
        return sum(self.seconds.values()) - (self.gpu_seconds or 0.0)


def estimate_run(forecast: Forecast, region: Region, *, rates: Rates) -> dict[str, Any]:
    """Return the estimate as JSON values.

    Args:
        forecast: of the pipeline.
        region: what is mapped.
        rates: workers and prices.

    Returns:
        `items`, `tiles`, `pixels`, `bytes_read` (None if file sizes are not available); from a probe `bytes_written`,
        `seconds` by stage, `cpu_seconds`, `gpu_seconds`, `wall_seconds` with `workers`, `price` (None without a
        probe); `unknown`: what these figures do not include.
    """
    first = forecast.before or forecast
    tiles, read = ([row for row in rows if not row.get("refused")] for rows in (forecast.tiles, first.tiles))
    volume: dict[str, Any] = {
        "region": region.name,
        "items": len({source["item_id"] for row in read for source in json.loads(row["sources"])}),
        "tiles": len(tiles),
        "refused": len(first.tiles) - len(read),
        "pixels": sum(_pixels(row) for row in tiles),
        "bytes_read": bytes_read(read, margin=first.margin),
    }
    # The load before the probe, which is itself work on this machine.
    unknown, load, cpus = list(forecast.unknown), os.getloadavg()[0], os.cpu_count() or 1
    if forecast.trial and load > 0.75 * cpus:
        unknown.append(
            f"other work on this machine during timing (load {load:.1f} on {cpus} CPUs): an idle machine is faster"
        )
    timed = timed_on(forecast, region, tiles, count=TIMED) if forecast.trial else None
    return volume | _costs(timed, rates) | {"unknown": unknown}


def _costs(timed: Probe | None, rates: Rates) -> dict[str, Any]:
    if timed is None:
        none = ("bytes_written", "seconds", "cpu_seconds", "gpu_seconds", "wall_seconds", "price", "probe")
        return dict.fromkeys(none) | {"workers": rates.workers}
    # Only work on tiles is shared among workers; training and joining take as long as on one.
    wall = timed.alone + timed.spread / rates.workers
    hours = wall * rates.workers / 3600
    return {
        "bytes_written": timed.bytes_written,
        "seconds": timed.seconds,
        "cpu_seconds": timed.cpu_seconds,
        "gpu_seconds": timed.gpu_seconds,
        "workers": rates.workers,
        "wall_seconds": wall,
        "price": hours * (timed.gpus * rates.gpu_hour + timed.cpus * rates.cpu_hour),
        "probe": asdict(timed),
    }


# -- models ------------------------------------------------------------------------------------------------------------


def by_model(prefix: str, plan: Plan[Any], config: MapConfig) -> Forecast:
    """Forecast of mapping the tiles of a plan with a trained model."""
    return Forecast(plan.tiles or (), bundle.description(prefix).patch, trial=partial(_map, config, prefix))


def by_untrained(
    described: Bundle,
    plan: Plan[Any],
    config: MapConfig,
    *,
    learn: Callable[[Run], Step | None],
    counts: Mapping[str, int] | None = None,
    unknown: Sequence[str] = (),
) -> Forecast:
    """Forecast of mapping a region with a model that is not trained yet.

    Args:
        described: the model.
        plan: contains the tiles.
        config: settings of the map.
        learn: runs the steps before the map, with trainings wrapped in `training`; returns the step with the model, or
            None to use the same network with blank weights.
        counts: see `Forecast`.
        unknown: see `Forecast`.
    """
    shapes = "the number of shapes of the final map: the network that was timed is barely trained"
    trial = partial(_learn_and_map, learn, config, described)
    return Forecast(plan.tiles or (), described.patch, (*unknown, shapes), counts=counts or {}, trial=trial)


def by_workers(workers: int) -> tuple[str, ...]:
    """Notes for the estimate: where trainings run, as far as it differs from the probe."""
    if not workers:
        return ("training on a cluster (--address): there each GPU has a worker of Ray Train, or one its CPUs",)
    return (f"trainings were timed in one process, not in {workers}",) if workers > 1 else ()


def _learn_and_map(
    learn: Callable[[Run], Step | None], config: MapConfig, described: Bundle, run: Run, region: Region
) -> None:
    model = learn(run)
    if model is not None:
        _map(config, model.value["bundle"], run, region)
        return
    # A threshold of 1 marks nothing: the shapes of random weights would take longer than those of a trained network.
    with tempfile.TemporaryDirectory(prefix="rayseg-plan-") as folder:
        bundle.save(folder, described.model_copy(update={"threshold": 1.0}), bundle.blank(described))
        _map(config, folder, run, region)


def training(step: Step, fit: Callable[..., dict[str, Any]], *arguments: object, **planned: object) -> dict[str, Any]:
    """Run `fit(step, *arguments)` with a shortened training; add `left_out`, the seconds that were skipped."""
    with probe.taken() as taken:
        value = fit(step, *arguments, **planned)
    return {**value, "left_out": taken.left_out} if taken.epochs else value


def _map(config: MapConfig, prefix: str, run: Run, region: Region) -> None:
    """Run the steps that every pipeline ends with."""
    model = run.step("model", mapping.load_model, prefix)
    predicted = run.step("predict", mapping.predict_region, region, model, config)
    polygons = run.step("polygons", mapping.join_polygons, predicted, "polygons")
    run.step("publish", mapping.publish, predicted, region.name)
    run.step("report", report.write_report, predicted, polygons)


def _effort(row: Row, *, margin: int) -> int:
    """Effort of a tile in px, including the margin, because patches that only touch the tile are predicted whole."""
    window = Tile.from_row(row).window
    return (window.width + margin) * (window.height + margin)


def _pixels(row: Row) -> int:
    return int(row["width"] * row["height"])


# -- seconds -----------------------------------------------------------------------------------------------------------


def timed_on(forecast: Forecast, region: Region, tiles: Sequence[Row], *, count: int) -> Probe:
    """Run the trial on some of the tiles and extrapolate to all tiles."""
    import torch  # slow, and only a probe needs it

    # 1. run the pipeline on a few tiles; the extra one warms up models and caches
    chosen = spread(tiles, count + 1)
    part = replace(region, tiles=tuple(row["id"] for row in chosen))
    trial = forecast.trial
    assert trial is not None
    with tempfile.TemporaryDirectory(prefix="rayseg-plan-") as folder:
        run = Run(folder, {"pipeline": "plan", "region": asdict(part), "config": {}}, Engine("inline"))
        run.save("running", 0.0)
        trial(run, part)
        steps = {step.name: _timed(step) for step in run.steps}
        # 2. growth of each folder; a model has the same size however many tiles it maps
        growth = sum(map(_pixels, tiles)) / sum(map(_pixels, chosen))
        counts = {
            prefix: (rows, name)
            for name, rows in forecast.counts.items()
            for prefix in (f"steps/{name}", *MADE.get(name, ()))
        }
        trained = {step.name: step.seconds + step.value["left_out"] for step in run.steps if "left_out" in step.value}
        growths = {prefix: rows / max(len(steps[name][0]), 1) for prefix, (rows, name) in counts.items()}
        growths |= dict.fromkeys([*(f"steps/{name}" for name in trained), "models"] if trained else (), 1.0)
        written = bytes_written(Path(folder), growth, growths)
    # 3. seconds per unit of effort, scaled to all rows; trainings are extrapolated by epochs, not by tiles
    effort = partial(_effort, margin=forecast.margin)
    sizes, whole = {row["id"]: effort(row) for row in chosen}, sum(map(effort, tiles))
    others = {**forecast.counts, **forecast.efforts}
    scaled = {
        name: _scaled(rows, seconds, sizes, whole, others.get(name))
        for name, (rows, seconds) in steps.items()
        if name not in trained
    }
    stages: Counter[str] = Counter({name: seconds for name, seconds in trained.items() if seconds > 0})
    for by_stage, _ in scaled.values():
        stages.update(by_stage)
    return Probe(
        tiles=part.tiles,
        seconds={stage: round(seconds, 3) for stage, seconds in stages.items()},
        spread=sum(max(by_stage.values(), default=0.0) for by_stage, _ in scaled.values()),
        alone=_alone(scaled, growth, others) + sum(trained.values()),
        bytes_written=written,
        cpus=len(os.sched_getaffinity(0)),
        gpus=torch.cuda.device_count(),
        on_gpu=tuple(sorted({*trained, *(stage for step in run.steps for stage in step.value.get("on_gpu", ()))})),
        troubles={row: why for step in run.steps for row, why in step.value.get("troubles", {}).items()},
    )


def spread(tiles: Sequence[Row], count: int) -> list[Row]:
    """Select at most `count` tiles at equal distances in cumulative pixels.

    Large tiles are selected more often than slivers at a border, which take longer per pixel.
    """
    if len(tiles) <= count:
        return list(tiles)
    ends = list(accumulate(map(_pixels, tiles)))
    places = [bisect_right(ends, (2 * at + 1) * ends[-1] // (2 * count)) for at in range(count)]
    return [tiles[place] for place in dict.fromkeys(places)]


def _timed(step: Step) -> tuple[list[Record], float]:
    """(records in manifest order, seconds) of a step; no records if the step does not work row by row."""
    manifest = step.manifest
    records = Ledger(str(step.prefix / "ledger")).read() if manifest.exists() else {}
    if not records:
        return [], step.seconds
    ids = read_rows(manifest, columns=["id"]).ids.to_pylist()
    return [records[row] for row in ids if row in records], step.seconds


def _scaled(
    records: Sequence[Record], seconds: float, sizes: Mapping[str, int], whole: int, other: int | None
) -> tuple[dict[str, float], float]:
    """(stage -> seconds of the whole run, seconds of the probe outside any stage).

    Args:
        records: of the probe's step, in order.
        seconds: duration of the step.
        sizes: tile -> its effort.
        whole: effort of all tiles.
        other: effort of all rows, if they are not tiles.
    """
    if not records:
        return {}, seconds
    # 1. effort of every row: of its tile, as its record states it, or the same for all
    stated = {record.id: record.facts["effort"] for record in records if "effort" in record.facts}
    efforts = sizes if other is None else stated or {record.id: 1 for record in records}
    mean = sum(efforts.values()) / len(efforts)
    effort = {record.id: efforts.get(record.id, mean) for record in records}
    # 2. seconds per unit of effort of every stage, without the warm-up row unless it alone reached the stage
    pace = {}
    for stage in dict.fromkeys(stage for record in records for stage in record.seconds):
        warm = [record for record in records[1:] if stage in record.seconds]
        timed = records[1:] if warm else records
        total = sum(effort[record.id] for record in timed)
        pace[stage] = sum(record.seconds.get(stage, 0.0) for record in timed) / max(total, 1)
    # 3. the slowest stage sets the pace of the probe; the remainder is start-up and collection of results
    rest = max(0.0, seconds - max(pace.values(), default=0.0) * sum(effort.values()))
    return {stage: value * (whole if other is None else other) for stage, value in pace.items()}, rest


def _alone(scaled: Mapping[str, tuple[dict[str, float], float]], growth: float, others: Mapping[str, int]) -> float:
    """Seconds outside stages; steps that collect the results of tiles (not of `others`) grow with the tiles."""
    seconds, gathers = 0.0, False
    for name, (by_stage, rest) in scaled.items():
        gathers = gathers or bool(by_stage and name not in others)
        grows = gathers and not by_stage and name != "report"
        seconds += rest * (growth if grows else 1.0)
    return seconds
