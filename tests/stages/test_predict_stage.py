"""Patches through a network: the same pixels in whatever tile, batch or trouble."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_run import blobs, picture
from small_world import GRID

from rayseg.engine import flow
from rayseg.engine.flow import Work
from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Engine
from rayseg.geo.grid import Lattice, Tile, Window
from rayseg.stages.predict import Predict, decide, patches_of
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile
from rayseg.vision.color import ClassTable

NODATA = 255
INLINE = Engine("inline")


@pytest.fixture
def prefix(tiny_model):
    return tiny_model


def row_of(window):
    """A tile's row as ReadTile leaves it, cut from one picture of the plane; imagery is in [0, 150) x [0, 170)."""
    reach = Lattice.of(GRID, 64, 48).reach(window)
    plane = picture(blobs(800, 800, seed=3), seed=3)
    image_CHW = plane[:, reach.row + 300 : reach.row1 + 300, reach.col + 300 : reach.col1 + 300].copy()
    inside = Window(0, 0, 170, 150).intersect(reach)
    valid_HW = np.zeros(image_CHW.shape[1:], bool)
    valid_HW[inside.slices(reach)] = True
    hole = Window(50, 40, 40, 20).intersect(reach)
    valid_HW[hole.slices(reach)] = False
    image_CHW[:, ~valid_HW] = 0
    return TileRow(Tile("t", GRID, window), "[]", image=image_CHW, valid=valid_HW, reach=reach)


def predicted(prefix, window, **options):
    [row] = Predict(prefix, device="cpu", **options)([row_of(window)])
    return row.classes, row.scores


def test_a_pixel_does_not_depend_on_its_tile(prefix):
    classes, scores = predicted(prefix, Window(0, 0, 170, 150))
    for part in (Window(0, 0, 70, 80), Window(70, 0, 100, 80), Window(33, 80, 91, 70), Window(100, 100, 1, 1)):
        place = part.slices(Window(0, 0, 170, 150))
        some, their = predicted(prefix, part)
        assert (some == classes[place]).all()
        assert (their == scores[(slice(None), *place)]).all()


def test_nodata_stays_nodata_and_nothing_else_becomes_it(prefix):
    classes, scores = predicted(prefix, Window(-10, -10, 190, 170))
    valid = np.zeros((170, 190), bool)
    valid[10:160, 10:180] = True
    valid[50:70, 60:100] = False
    assert ((classes == NODATA) == ~valid).all()
    assert ((scores[0] == NODATA) == ~valid).all()
    assert set(np.unique(classes[valid])) == {0, 1}


def test_the_batch_and_the_number_of_threads_change_no_bit(prefix):
    stages = [Predict(prefix, device="cpu", batch=batch) for batch in (1, 5, None)]
    assert all(stage.bundle.patch == 64 for stage in stages)
    row = row_of(Window(0, 0, 170, 150))
    cuts = [(slice(None), *p.slices(row.reach)) for p in patches_of(stages[0].bundle, row.tile, row.valid, row.reach)]
    found = [torch.cat([*stage.probabilities(row.image, row.valid, cuts)]) for stage in stages]
    stages[0].help_one()
    found += [torch.cat([*stages[0].probabilities(row.image, row.valid, cuts)])]
    assert all((one == found[0]).all() for one in found)


def test_too_little_memory_halves_the_batch_and_goes_on(prefix, monkeypatch):
    stage, sizes = Predict(prefix, batch=4, device="cpu"), []
    forward = stage.forward

    def small(patches):
        sizes.append(stage.batch)
        if stage.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(patches)

    monkeypatch.setattr(stage, "forward", small)
    [row] = stage([row_of(Window(0, 0, 170, 150))])
    assert row.batch == 2
    assert sizes[:2] == [4, 2]
    assert set(sizes[1:]) == {2}
    assert (row.classes == predicted(prefix, Window(0, 0, 170, 150), batch=2)[0]).all()


def test_a_batch_that_lack_of_memory_halved_is_a_fact_of_the_tiles_it_predicted(prefix, monkeypatch, tmp_path):
    stage, calls = Predict(prefix, batch=4, device="cpu"), []
    forward = stage.forward

    def second_is_too_much(patches):
        calls.append(len(patches))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(patches)

    monkeypatch.setattr(stage, "forward", second_is_too_much)
    windows = {"small": Window(0, 0, 1, 1), "large": Window(0, 0, 170, 150), "next": Window(0, 0, 2, 2)}
    table = ClassTable(stage.bundle.classes)
    write = WriteTile(str(tmp_path / "tiles"), table, bands=(table.names[-1],), geometry=None, model="m.json")

    def record(row):
        return replace(row_of(windows[row["id"]]), tile=Tile(row["id"], GRID, windows[row["id"]]))

    ledger = Ledger(str(tmp_path / "ledger"))
    rows, works = [{"id": name} for name in windows], [Work(stage), Work(write)]
    assert not flow.run(rows, works, ledger, INLINE, record=record).troubles
    batches = {name: found.facts.get("batch") for name, found in ledger.read().items()}
    assert batches == {"small": None, "large": 2, "next": 2}
    assert calls[:3] == [4, 4, 2]


def test_patches_far_from_imagery_are_not_computed(prefix, monkeypatch):
    stage, count = Predict(prefix, batch=1, device="cpu"), []
    forward = stage.forward
    monkeypatch.setattr(stage, "forward", lambda patches: count.append(1) or forward(patches))
    window = Window(-90, -90, 100, 100)
    stage([row_of(window)])
    assert len(Lattice.of(GRID, 64, 48).patches(window)) == 16
    assert len(count) == 4  # those whose cells, [-40, 8) and [8, 56) either way, hold the corner of the imagery


def test_the_stage_pickles_without_its_model(prefix):
    stage = Predict(prefix, device="cpu")
    assert len(pickle.dumps(stage)) < 1000
    assert (pickle.loads(pickle.dumps(stage))([row_of(Window(0, 0, 9, 9))])[0].classes != NODATA).all()


def test_a_class_is_what_is_above_the_threshold_or_largest():
    valid = np.array([[True, True, False]])
    binary = np.array([[[0.5, 0.51, 0.9]]], np.float32)
    classes, scores = decide(binary, valid, 0.5)
    assert classes.tolist() == [[0, 1, 255]]
    assert scores.tolist() == [[[127, 130, 255]]]
    assert decide(binary, valid, 0.6)[0].tolist() == [[0, 0, 255]]
    several = np.array([[[0.2, 0.5, 0.1]], [[0.3, 0.2, 0.8]], [[0.5, 0.3, 0.1]]], np.float32)
    classes, scores = decide(several, valid, 0.5)
    assert classes.tolist() == [[2, 0, 255]]
    assert scores[:, 0, 0].tolist() == [51, 76, 127]


def test_bfloat16_changes_little_does_not_depend_on_the_tile_and_is_recorded(prefix):
    exact, quick = (Predict(prefix, device="cpu", precision=name) for name in ("fp32", "bf16"))
    [one], [other] = (stage([row_of(Window(0, 0, 170, 150))]) for stage in (exact, quick))
    assert (one.bf16, other.bf16) == (False, True)
    assert other.settled(facts={}).facts == {"bf16": True}
    assert not (one.scores == other.scores).all()
    assert (np.abs(one.scores.astype(int) - other.scores) <= 6).all()
    part = Window(33, 80, 91, 70)
    [cut] = quick([row_of(part)])
    assert (cut.scores == other.scores[(slice(None), *part.slices(Window(0, 0, 170, 150)))]).all()
