"""Plans: what is counted from descriptions is exact, what is told from a few tiles is near what a run takes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from small_world import HEIGHT, WIDTH, catalogue, files, rayseg, refused

from rayseg.cli import run
from rayseg.engine import run as runs
from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.manifest import write_rows
from rayseg.geo.region import Region
from rayseg.io.labels import ingest_rasters
from rayseg.steps import estimate
from rayseg.steps.estimate import bytes_written


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("world")
    scenes = {"one": {}, "two": {"row": 0, "col": WIDTH, "seed": 1}}
    return {"catalogue": catalogue(root / "imagery", **scenes), "model": tiny_model, "root": root}


def planned(world, *more):
    words = ("--set", f"model={world['model']}", "--set", "map.tile=64", *more)
    found = rayseg("plan", "pipeline", "predict", "--region", world["catalogue"], *words, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_a_plan_is_near_the_run_and_leaves_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 9.0, 9.0))
    before = files(world["root"])
    plan = planned(world, "--workers", "1", "--cpu-hour", "3600")
    assert files(world["root"]) == before
    assert (plan["items"], plan["pixels"]) == (2, 2 * HEIGHT * WIDTH)
    found = rayseg(
        "predict", world["model"], world["catalogue"], "--out", tmp_path / "run", "--engine", "inline",
        "--set", "map.tile=64",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    status = json.loads(rayseg("status", tmp_path / "run", "--json").stdout)
    assert plan["tiles"] == status["steps"]["predict"]["planned"]
    written = sum(len(content) for _, content in files(tmp_path / "run").values())
    assert 0.5 < plan["bytes_written"] / written < 2
    assert plan["price"] == pytest.approx(plan["wall_seconds"] * plan["probe"]["cpus"])
    assert set(plan["seconds"]) == {"ReadTile", "Predict", "WriteTile"}
    assert plan["gpu_seconds"] is None
    assert plan["probe"]["on_gpu"] == ["Predict"]
    assert plan["unknown"] == []


def test_a_plan_made_on_a_busy_machine_says_so(world, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    [said] = planned(world)["unknown"]
    assert "during timing (load 100.0 on" in said


def test_bytes_to_read_are_those_of_the_files_and_of_what_is_around_tiles(world):
    sizes = sum(path.stat().st_size for path in (world["root"] / "imagery").glob("*.tif"))
    plan = planned(world, "--set", "map.tile=2048")
    assert sizes <= plan["bytes_read"] <= 2.5 * sizes  # tiles of the grid's lattice cut the scene in two or four
    assert planned(world)["bytes_read"] > plan["bytes_read"]


def test_more_workers_share_only_what_can_be_shared():
    rates = [estimate.Rates(workers=count, cpu_hour=1.0) for count in (1, 10)]
    probe = estimate.Probe(("a",), {"Predict": 1000.0}, 1000.0, 100.0, 10, 2, 0)
    one, ten = (estimate._costs(probe, rate) for rate in rates)
    assert (one["wall_seconds"], ten["wall_seconds"]) == (1100, 200)
    assert (one["price"], ten["price"]) == (pytest.approx(1100 * 2 / 3600), pytest.approx(2000 * 2 / 3600))


def test_seconds_of_stages_that_ask_for_a_gpu_are_the_gpus():
    seconds = {"TrainScene": 30.0, "ReadAround": 2.0}
    probe = estimate.Probe(("a",), seconds, 32.0, 1.0, 10, 2, 1, on_gpu=("Predict", "TrainScene"))
    assert (probe.gpu_seconds, probe.cpu_seconds) == (30, 2)
    assert replace(probe, gpus=0).gpu_seconds is None


def test_seconds_grow_with_pixels_and_the_first_tile_warms_up():
    records = [
        Record("a", "done", seconds={"Read": 1.0, "Predict": 9.0}),
        Record("b", "done", seconds={"Read": 0.5, "Predict": 2.0}),
        Record("c", "done", seconds={"Read": 0.5, "Predict": 2.0}),
    ]
    seconds, rest = estimate._scaled(records, 13.5, {"a": 100, "b": 100, "c": 100}, 1000, None)
    assert seconds == {"Read": 5.0, "Predict": 20.0}
    assert rest == pytest.approx(13.5 - 6.0)
    assert estimate._scaled([], 3.0, {}, 1000, None) == ({}, 3.0)
    by_rows, _ = estimate._scaled(records, 13.5, {}, 1000, 30)
    assert by_rows["Predict"] == 60.0
    told = [replace(record, facts={"effort": effort}) for record, effort in zip(records, (1, 10, 30), strict=True)]
    by_effort, rest = estimate._scaled(told, 13.5, {}, 1000, 400)
    assert by_effort["Predict"] == 40.0
    assert rest == pytest.approx(13.5 - 4.1)


def test_a_stage_that_only_the_first_tile_came_to_is_timed_on_it():
    """Where the others show nothing, or could not be read."""
    records = [
        Record("a", "done", seconds={"Read": 1.0, "Predict": 9.0}),
        Record("b", "nodata", seconds={"Read": 0.5}),
        Record("c", "failed", seconds={"Read": 0.5}),
    ]
    seconds, _ = estimate._scaled(records, 13.5, {"a": 100, "b": 100, "c": 100}, 900, None)
    assert seconds == {"Read": 4.5, "Predict": 27.0}


def test_rows_that_do_not_say_their_effort_have_the_usual_one():
    """Of a network that could not be trained no effort is known."""
    facts = {"a": {"effort": 10}, "b": {"effort": 20}, "c": {}}
    records = [Record(name, "done", facts=one, seconds={"Train": 3.0}) for name, one in facts.items()]
    by_effort, _ = estimate._scaled(records, 9.0, {}, 1000, 200)
    assert by_effort["Train"] == pytest.approx(6.0 * 200 / (20 + 15))


def test_folders_grow_by_the_rows_that_fill_them(tmp_path):
    for name, size in (("tiles/a.tif", 100), ("steps/networks/b.pt", 100), ("steps/c.json", 100), ("report/d", 100)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert bytes_written(tmp_path, 10.0, {"models": 3.0, "steps/networks": 3.0}) == 1000 + 300 + 100 + 100


class Dawdling:
    """A training that was cut short, a stage of tiles, and gathering what they left."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(runs.time, "perf_counter", lambda: self.now)

    def learn(self, step):
        self.now += 10.0
        return {"left_out": 90.0}

    def tiles(self, step, region):
        rows = [{"id": name} for name in region.tiles]
        write_rows(step.prefix / "manifest.parquet", rows)
        ledger = Ledger(str(step.prefix / "ledger"))
        for row in rows:
            ledger.write(Record(row["id"], "done", seconds={"Predict": 2.0}))
        self.now += 2.0 * len(rows) + 1.0
        return {"on_gpu": ["Predict"]}

    def gather(self, step):
        self.now += 3.0
        return {}

    def __call__(self, run, region):
        run.step("segmenter", self.learn)
        run.step("predict", self.tiles, region)
        run.step("polygons", self.gather)


def test_a_training_counts_once_however_many_tiles_and_workers(monkeypatch):
    sides = {"col": 0, "row": 0, "width": 100, "height": 100, "grid": "", "sources": "[]"}
    rows = [{"id": f"t{number}", **sides} for number in range(40)]
    monkeypatch.setattr(estimate, "_effort", lambda row, *, margin: 1)
    forecast = estimate.Forecast(rows, trial=Dawdling(monkeypatch))
    probe = estimate.timed_on(forecast, Region("r"), rows, count=3)
    assert probe.seconds == {"segmenter": 100.0, "Predict": 80.0}
    assert probe.spread == 80.0
    assert probe.alone == pytest.approx(100.0 + 1.0 + 3.0 * 40 / 4)
    assert probe.on_gpu == ("Predict", "segmenter")


def test_trainings_by_several_processes_are_not_timed_as_such():
    assert estimate.by_workers(1) == ()
    [note] = estimate.by_workers(0)
    assert note.startswith("training on a cluster (--address): there each GPU has a worker of Ray Train")
    assert estimate.by_workers(2) == ("trainings were timed in one process, not in 2",)


def test_probes_are_spread_over_all_pixels():
    def row(number, side):
        window = dict(zip(("col", "row", "width", "height"), (0, 0, side, side), strict=True))
        return {"id": str(number)} | window

    rows = [row(number, 10) for number in range(100)]
    assert [row["id"] for row in estimate.spread(rows, 4)] == ["12", "37", "62", "87"]
    assert estimate.spread(rows[:3], 4) == rows[:3]
    rows = [row(number, 100 if number % 2 else 1) for number in range(8)]  # every other one is a sliver
    assert [row["id"] for row in estimate.spread(rows, 4)] == ["1", "3", "5", "7"]
    assert [row["id"] for row in estimate.spread([row(0, 1), row(1, 1), row(2, 100)], 2)] == ["2"]


def test_a_plan_refuses_what_a_run_would_refuse(world, tmp_path):
    words = ("plan", "pipeline", "predict", "--region", world["catalogue"], "--set", f"model={tmp_path}")
    assert str(tmp_path) in refused(4, *words)
    assert "no-such" in refused(2, "plan", "pipeline", "no-such", "--region", world["catalogue"])
    words = ("plan", "pipeline", "agri", "--region", world["catalogue"], "--set", f"sam.checkpoint={tmp_path / 'x.pt'}")
    assert "x.pt" in refused(4, *words)


def test_what_is_unknown_before_training_is_said():
    found = {
        "region": "demo", "items": 2, "tiles": 6, "pixels": 10**7, "bytes_read": None, "bytes_written": None,
        "refused": 1, "probe": None, "unknown": ["training: 80 epochs"],
    }  # fmt: skip
    said = run._plan_text(found)
    probe = {"tiles": ["a", "b"], "cpus": 2, "gpus": 0, "troubles": {"b": "b.tif is cut short"}}
    costs = dict.fromkeys(("cpu_seconds", "wall_seconds", "price"), 1.0) | {"seconds": {}, "gpu_seconds": None}
    assert "failed in the probe: b: b.tif is cut short" in run._plan_text(
        found | costs | {"workers": 1, "probe": probe}
    )
    assert "read     unknown" in said
    assert "not included: training: 80 epochs" in said
    assert "1 scenes cannot be mapped" in said


@pytest.mark.parametrize("rate", ["-1", "nan", "inf"])
def test_rates_are_numbers(world, rate):
    words = ("--set", f"model={world['model']}", "--cpu-hour", rate)
    assert rayseg("plan", "pipeline", "predict", "--region", world["catalogue"], *words).exit_code == 2


@pytest.mark.parametrize(
    ("amount", "shown"), [(0.0, "0.00"), (0.00266, "0.0027"), (0.25, "0.25"), (1234.5, "1,234.50")]
)
def test_prices_below_a_hundredth_are_shown(amount, shown):
    plan = {
        "region": "demo", "items": 2, "tiles": 6, "pixels": 10**7, "bytes_read": None, "bytes_written": None,
        "refused": 0, "unknown": [], "seconds": {}, "gpu_seconds": None, "workers": 1, "price": amount,
        "cpu_seconds": 1.0, "wall_seconds": 1.0, "probe": {"tiles": ["a"], "cpus": 2, "gpus": 0, "troubles": {}},
    }  # fmt: skip
    assert f"price    {shown}" in run._plan_text(plan).splitlines()[-1]


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    """Six scenes of 200 x 200 km on four continents, each in its own zone."""
    root = tmp_path_factory.mktemp("scattered")
    (root / "scenes").mkdir()
    corners = [("32644", 3_000_000), ("32748", 9_600_000), ("32614", 5_000_000), ("32618", 1_200_000)]
    for code, north in [*corners, ("32734", 7_000_000), ("32760", 8_000_000)]:
        profile = {"crs": f"EPSG:{code}", "transform": from_origin(400_000, north, 10_000, 10_000), "dtype": "uint8"}
        with rasterio.open(root / "scenes" / f"{code}.tif", "w", "GTiff", 20, 20, 3, **profile) as file:
            file.write(np.full((3, 20, 20), 90, np.uint8))
    return ingest_rasters(root / "scenes", root / "catalogue")


@pytest.mark.parametrize(("region", "count"), [("60,-10,150,55", 2), ("-170,5,-50,75", 2), ("-180,-90,180,90", 6)])
def test_continents_and_the_world_are_planned_by_the_command(scattered, tiny_model, region, count):
    words = ("--set", f"model={tiny_model}", "--set", f"map.imagery={scattered}#imagery", "--json")
    found = rayseg("plan", "pipeline", "predict", "--region", region, *words)
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert plan["tiles"] == count
    assert plan["pixels"] == pytest.approx(count * 400, rel=0.2)
