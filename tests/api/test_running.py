"""rayseg.run: the run of the command, resumed by the command and the other way round."""

import pytest
from small_world import catalogue, files, rayseg

import rayseg as public
from rayseg.api import running
from rayseg.errors import ConfigError, RunIncomplete
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
