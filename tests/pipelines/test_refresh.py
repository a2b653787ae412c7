"""refresh from the command line: what has changed of a run's imagery is mapped again, to the bytes of a whole run."""

import time

import numpy as np
import pytest
import rasterio
from small_world import catalogue, files, rayseg, refused

from rayseg.engine.ledger import Ledger
from rayseg.engine.run import verify
from rayseg.models import bundle

KINDS = ("tiles/*/*", "polygons.parquet", "items.parquet")


def made(*words, code=0):
    found = rayseg(*words, "--engine", "inline")
    assert found.exit_code == code, found.output
    return found.output


def results(root):
    return {path.relative_to(root): path.read_bytes() for kind in KINDS for path in sorted(root.glob(kind))}


def mapped(root):
    """Tiles that a model has mapped, and those that were taken over."""
    records = Ledger(str(root / "steps/predict/ledger")).read()
    by = {name: set(record.seconds) for name, record in records.items() if record.facts}
    return {n for n, s in by.items() if "Predict" in s}, {n for n, s in by.items() if "CarryOver" in s}


@pytest.fixture
def world(tmp_path, tiny_model):
    """Two scenes one above the other, and their finished run in tiles of 128 px."""
    region = catalogue(tmp_path / "imagery", north={}, south={"row": 600, "seed": 3})
    made("predict", tiny_model, region, "--out", tmp_path / "run", "--set", "map.tile=128")
    return tmp_path, region


def replace_south(folder):
    time.sleep(0.01)  # the time of change tells versions apart
    with rasterio.open(folder / "imagery/south.tif", "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        pixels = file.read()
        file.write(np.where(pixels > 0, 255 - pixels, 0).clip(1).astype(np.uint8) * (pixels > 0))


def test_only_tiles_of_a_replaced_scene_are_mapped_and_the_result_is_that_of_a_whole_run(world, tiny_model):
    folder, region = world
    # 1. nothing has changed: everything is taken over
    made("refresh", folder / "run", "--out", folder / "same")
    again, carried = mapped(folder / "same")
    assert (again, len(carried)) == (set(), 15)
    assert results(folder / "same") == results(folder / "run")
    assert verify(str(folder / "same"), deep=True)["damaged"] == {}
    assert f"15 of 15 tiles are those of {folder}/run" in (folder / "same/report/index.html").read_text()
    # 2. one scene of two has
    replace_south(folder)
    made("refresh", folder / "run", "--out", folder / "new")
    again, carried = mapped(folder / "new")
    assert (len(again), len(carried)) == (6, 9)
    made("predict", tiny_model, region, "--out", folder / "whole", "--set", "map.tile=128")
    assert results(folder / "new") == results(folder / "whole")
    assert results(folder / "new") != results(folder / "run")
    # 3. a second call does nothing, and what was refreshed can be refreshed
    before = files(folder / "new/tiles")
    made("refresh", folder / "run", "--out", folder / "new")
    assert files(folder / "new/tiles") == before
    made("refresh", folder / "new", "--out", folder / "newer")
    assert mapped(folder / "newer")[0] == set()


@pytest.mark.more  # several runs
def test_another_model_maps_all_and_a_damaged_tile_is_not_taken_over(world, tiny_model):
    folder, _ = world
    described, model = bundle.build(tiny_model)
    bundle.save(folder / "model", described.model_copy(update={"threshold": 0.7}), model)
    made("refresh", folder / "run", "--set", f"model={folder}/model", "--out", folder / "other")
    again, carried = mapped(folder / "other")
    assert (len(again), carried) == (15, set())
    # a file that is not what the run wrote
    tile = next((folder / "run/tiles").glob("*/classes.tif"))
    content = tile.read_bytes()
    tile.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    output = made("refresh", folder / "run", "--out", folder / "new", code=3)
    assert "is not what its run wrote" in " ".join(output.split())
    made("retry", folder / "new")
    tile.write_bytes(content)
    assert results(folder / "new").keys() == results(folder / "run").keys()


def test_runs_without_a_map_by_one_model_are_refused(tmp_path):
    assert "is not a run" in refused(2, "refresh", tmp_path / "none", "--out", tmp_path / "new")
