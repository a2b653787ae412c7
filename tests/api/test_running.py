"""rayseg.run: the run of the command, resumed by the command and the other way round."""

from pathlib import Path

import numpy as np
import pytest
from small_world import catalogue, files, rayseg

import rayseg as public
from rayseg.api import running
from rayseg.errors import ConfigError, ModelError, RunIncomplete
from rayseg.geo.region import Region


def test_the_function_and_the_command_leave_one_run(tmp_path, tiny_model):
    imagery = catalogue(tmp_path / "imagery", scene={})
    run = public.run(
        "predict", imagery, set={"model": tiny_model, "map.tile": 128}, out=str(tmp_path / "run"), engine="inline"
    )
    assert run.report["summary"].startswith("0.0")
    before = files(tmp_path / "run" / "tiles")
    words = ("--set", "map.tile=128", "--out", tmp_path / "run", "--engine", "inline")
    found = rayseg("predict", tiny_model, imagery, *words)
    assert (found.exit_code, files(tmp_path / "run" / "tiles")) == (0, before)
    with pytest.raises(ConfigError, match="pipeline 'gpz' is unknown"):
        public.run("gpz", imagery)


def test_a_run_with_failed_tiles_raises_after_all_others(tmp_path, tiny_model):
    imagery = catalogue(tmp_path / "imagery", one={}, two={"col": 400})
    (tmp_path / "imagery" / "two.tif").unlink()
    values = {"model": tiny_model, "map": {"tile": 128}}
    with pytest.raises(RunIncomplete, match=r"failed: predict .*two.*rayseg retry"):
        public.run("predict", imagery, config=values, out=str(tmp_path / "run"), engine="inline")
    assert public.open(tmp_path / "run").classes.values.min() == 0


def test_the_demo_is_a_region(monkeypatch):
    monkeypatch.setattr("rayseg.demo.make.ensure", lambda: "/demo/catalog.json")
    assert running.region_of("demo") == Region("demo", catalog="/demo/catalog.json")


def test_the_commands_on_runs_are_functions(tmp_path, tiny_model):
    imagery = catalogue(tmp_path / "imagery", scene={})
    out = {name: str(tmp_path / name) for name in ("run", "sure", "again", "changes")}
    run = public.run("predict", imagery, set={"model": tiny_model}, out=out["run"], engine="inline")
    marked, scores = run.classes.values == 1, run.scores.values[0]
    limit = int(np.median(scores[marked]))
    sure = public.remap(run, set={"threshold": limit / 254}, out=out["sure"], engine="inline")
    assert 0 < (sure.classes.values == 1).sum() < marked.sum()
    assert np.array_equal(sure.classes.values == 1, (scores > limit) & (scores != 255))
    again = public.refresh(tmp_path / "run", out=out["again"], engine="inline")
    assert np.array_equal(again.classes.values, run.classes.values)
    assert set(again.ledger["status"]) <= {"done", "empty"}
    changes = public.diff(out["run"], sure, out=out["changes"], engine="inline")
    lost = marked & (sure.classes.values == 0)
    assert changes.polygons["pixels"].sum() <= lost.sum()
    assert np.array_equal(changes.classes.values == 3, lost)  # gpc_to_background
    # the model that a map is made with, and the runs that have none
    assert run.load_model().prefix == again.load_model().prefix == str(tiny_model)
    for made, origin in ((sure, "run"), (changes, "sure")):
        with pytest.raises(ModelError, match=f"it is made from the run {out[origin]}, open that one"):
            made.load_model()
    with pytest.raises(ConfigError, match=r"is, or lies in, .*run, which is only read"):
        public.remap(run, set={"threshold": 0.9}, out=f"{out['run']}/sure")


def test_all_public_names_are_documented_with_an_example():
    assert set(dir(public)) == set(public.__all__) >= {"diff", "load_model", "open", "refresh", "remap", "run"}
    for name in ("correct", "diff", "load_model", "open", "refresh", "remap", "run"):
        assert "# doctest: +SKIP" in getattr(public, name).__doc__
        for page in ("docs/python.md", "docs/site.py"):
            assert name in (Path(__file__).parents[2] / page).read_text()
