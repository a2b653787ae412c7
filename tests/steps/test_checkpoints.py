"""Weights that trainings keep on request: measured as the training measured them, on the same pixels."""

import csv
import json

import numpy as np
import pytest
import torch
from coloured_squares import pair
from mortal import Command, until
from PIL import Image
from small_world import SMALL_GPC, rayseg, refused, segmenter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayseg.engine.manifest import write_rows
from rayseg.io.scenes import Pairs, labelled_images
from rayseg.models import bundle
from rayseg.steps import checkpoints

LANDCOVER = """
labelled: {masks: "#truth/landcover", validation: [demo-east], absent: [unknown]}
segmenter:
  architecture: linknet
  encoder: test_resnet
  weights: none
  epochs: 3
  sampling: {size: 128, windows: 8}
  learning: {batch: 4, optimizer: adamw, keep_every: 1}
patch: 128
stride: 128
map: {tile: 512}
baseline: false
"""


def logged(prefix, tag):
    events = EventAccumulator(str(prefix / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(tag)]


def run(tmp_path, pipeline, settings, region):
    (tmp_path / "small.yaml").write_text(settings)
    words = ("run", "pipeline", pipeline, "--region", region, "--config", tmp_path / "small.yaml")
    found = rayseg(*words, "--engine", "inline", "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    return tmp_path / "run"


@pytest.mark.more
def test_kept_segmenters_are_measured_as_in_training(tmp_path, demo_region):
    out = run(tmp_path, "landcover", LANDCOVER, demo_region)
    found = rayseg("evaluate", out, "--checkpoints", "--json")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert [(row["training"], row["number"]) for row in rows] == [("segmenter", number) for number in (1, 2, 3)]
    assert [row["accuracy"] for row in rows] == pytest.approx(logged(out / "steps" / "segmenter", "accuracy"), abs=1e-6)
    with (out / "checkpoints" / "table.csv").open() as table:
        assert [row["number"] for row in csv.DictReader(table)] == ["1", "2", "3"]
    assert b"mean IoU" in (out / "checkpoints" / "curve.svg").read_bytes()
    # other masks: the whole imagery, also that which taught
    both = json.loads(rayseg("evaluate", out, f"{demo_region}#truth/landcover", "--checkpoints", "--json").stdout)
    assert len(both) == 3
    assert both[0]["accuracy"] != rows[0]["accuracy"]
    assert "nothing is named to compare" in refused(2, "evaluate", out)
    torch.save({"number": 9, "weights": {"a": torch.ones(1)}}, out / "steps" / "segmenter" / "kept" / "000009.pt")
    assert "000009.pt do not fit the run's model" in refused(4, "evaluate", out, "--checkpoints")


@pytest.mark.more
def test_kept_classifiers_are_measured_on_the_chips_set_apart(tmp_path, demo_region):
    settings = SMALL_GPC.replace("learning: {batch: 6}\ncues", "learning: {batch: 6, keep_every: 1}\ncues")
    out = run(tmp_path, "gpc", settings.replace("epochs: 1\n  rates: [[1,", "epochs: 2\n  rates: [[2,"), demo_region)
    rows = json.loads(rayseg("evaluate", out, "--checkpoints", "--json").stdout)
    assert [(row["training"], row["number"]) for row in rows] == [("classifier", 1), ("classifier", 2)]
    assert [row["accuracy"] for row in rows] == pytest.approx(logged(out / "steps" / "classifier", "accuracy"))
    assert {"f1 gpc", "f1 nongpc"} <= rows[0].keys()


def test_a_run_without_kept_weights_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"pipeline": "gpc", "steps": {}, "status": "done"}')
    assert "has no kept weights, expected some; train with" in refused(3, "evaluate", tmp_path, "--checkpoints")


def kept(tmp_path, steps):
    """A run of which one training kept its weights."""
    model = segmenter(tmp_path / "model", classes=2)
    content = {"pipeline": "al-s4gan", "steps": {name: {"bundle": model} for name in steps}, "status": "running"}
    (tmp_path / "run" / "steps" / "segmenter" / "kept").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    described, net = bundle.build(model)
    file = tmp_path / "run" / "steps" / "segmenter" / "kept" / "000001.pt"
    torch.save({"number": 1, "weights": net.state_dict()}, file)
    return described, net


def test_weights_of_a_training_that_has_not_finished_are_refused(tmp_path):
    kept(tmp_path, steps=())
    said = refused(3, "evaluate", tmp_path / "run", "--checkpoints")
    assert "step segmenter of" in said
    assert "has not finished, expected its model; finish the run with its own command" in said


@pytest.mark.more
def test_weights_of_a_killed_training_are_measured(tmp_path, demo_region):
    (tmp_path / "small.yaml").write_text(LANDCOVER)
    words = ("run", "pipeline", "landcover", "--region", demo_region, "--config", tmp_path / "small.yaml")
    words += ("--set", "segmenter.epochs=400", "--engine", "inline", "--out", tmp_path / "run")
    kept = tmp_path / "run" / "steps" / "segmenter" / "kept"
    with Command(*words) as command:
        until(lambda: len(list(kept.glob("*.pt"))) > 1)
        command.kill()
    (kept / ".000099.pt.01234567.part").write_bytes(b"half")
    rows = json.loads(rayseg("evaluate", tmp_path / "run", "--checkpoints", "--json").stdout)
    assert [row["number"] for row in rows][:2] == [1, 2]
    logs = logged(tmp_path / "run" / "steps" / "segmenter", "accuracy")
    assert rows[0]["accuracy"] == pytest.approx(logs[0], abs=1e-6)


def test_chips_of_any_size_are_padded_as_in_training(tmp_path):
    described, net = kept(tmp_path, steps=("segmenter",))
    image_CHW, truth_HW = pair(0)
    image_CHW, truth_HW = image_CHW[:, :50, :70], truth_HW[:50, :70] % 2
    (tmp_path / "images").mkdir()
    Image.fromarray(image_CHW.transpose(1, 2, 0)).save(tmp_path / "images" / "a_sat.png")
    Image.fromarray(truth_HW).save(tmp_path / "images" / "a_mask.png")
    [chip] = labelled_images(str(tmp_path / "images"), pairs=Pairs(image="{}_sat.png", mask="{}_mask.png"))
    place = {"of": chip.id, "part": "test", "label": "", "col": 0, "row": 0, "width": 70, "height": 50}
    write_rows(tmp_path / "run" / "steps" / "pool" / "pool.parquet", [chip.to_row() | place])
    [row] = checkpoints.measure(str(tmp_path / "run"))
    whole = np.pad(described.normalize(image_CHW), ((0, 0), (0, 14), (0, 26)), mode="reflect")
    found_HW = net(torch.from_numpy(whole)[None])[0, :, :50, :70].argmax(dim=0).numpy()
    assert row["accuracy"] == pytest.approx((found_HW == truth_HW).mean())
