"""The certificate's numbers: lights, shares over places, calibration, and the whole of it on a run."""

import json
from itertools import pairwise

import numpy as np
import pytest
from small_world import catalogue, files, rayseg, refused

from rayseg.engine.ledger import Record
from rayseg.steps import certificate
from rayseg.steps.certificate import LIMITS, MOST, PLACES, calibration_error, judged, lead, rows_of, stability, worst


def place(pixels, shift, brightness, either):
    changed = {"retiled": [0], "shift": [shift], "brightness": list(brightness), "contrast": [0, 0]}
    of_class = {
        "shift": [(shift, either)],
        "brightness": [(n, either) for n in brightness],
        "contrast": [(0, either)] * 2,
    }
    return Record("p", "done", facts={"pixels": pixels, "changed": changed, "of_class": of_class})


def test_shares_are_of_all_places_and_of_two_changes_the_worse_counts():
    measures, unknown = stability([place(100, 5, (2, 30), 40), place(300, 7, (20, 6), 10), Record("q", "nodata")])
    assert unknown == {}
    assert measures["shift"] == 12 / 400
    assert measures["brightness"] == 36 / 400
    assert (measures["shift_of_class"], measures["brightness_of_class"]) == (12 / 50, 36 / 50)
    assert measures["retiled"] == measures["contrast"] == measures["contrast_of_class"] == 0


def test_without_a_place_the_reason_is_given():
    measures, unknown = stability([Record("q", "nodata", reason="scene.tif is gone")])
    assert (measures, set(unknown)) == ({}, {"retiled", "brightness", "contrast", "shift"})
    assert "scene.tif is gone" in unknown["shift"]


@pytest.mark.parametrize(
    ("measures", "light"),
    [
        ({"retiled": 0.0, "shift": 0.03, "seams": 1.25}, "green"),
        ({"retiled": 0.0, "shift": 0.031}, "amber"),
        ({"retiled": 0.0, "shift": 0.1}, "amber"),
        ({"retiled": 0.0, "shift": 0.1001}, "red"),
        ({"retiled": 1e-9}, "red"),
        ({"seams": 1.0}, "unknown"),
        ({"seams": 9.0}, "red"),
        ({}, "unknown"),
    ],
)
def test_the_light_is_that_of_the_worst_measure(measures, light):
    assert judged(measures)["light"] == light
    assert judged(measures)["lights"].keys() == measures.keys()


def test_the_worst_measures_are_named_unless_the_light_is_green():
    assert worst(judged({"retiled": 0.0, "shift": 0.05})) == "shift"
    assert worst(judged({"shift": 0.05, "brightness": 0.2, "shift_of_class": 0.6})) == "brightness, shift of class"
    assert worst(judged({"retiled": 0.0})) == worst(judged({"seams": 1.0})) == worst(judged({})) == ""


def test_the_calibration_error_is_the_mean_gap_of_confidence_and_accuracy_over_bins():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 5000)
    right = rng.random(5000) < confidence**2
    edges = np.linspace(0, 1, 16)
    gaps = [
        abs(right[within].mean() - confidence[within].mean()) * within.mean()
        for low, high in pairwise(edges)
        if (within := (confidence >= low) & (confidence < high)).any()
    ]
    assert calibration_error(confidence, right) == pytest.approx(sum(gaps))
    assert calibration_error(np.ones(10), np.arange(10) < 4) == pytest.approx(0.6)


def test_the_report_names_each_measure_with_its_light_or_why_it_is_not_known():
    content = judged({"retiled": 0.0, "shift": 0.2}) | {"unknown": {"far": "no statistics"}}
    rows = {row["title"]: row for row in rows_of(content)}
    assert rows["shift by half a stride"] == {
        "title": "shift by half a stride",
        "light": "red",
        "value": "20.0% of the pixels change their class",
        "limits": "0.03, 0.1",
    }
    assert (rows["unlike the training imagery"]["light"], rows["unlike the training imagery"]["value"]) == (
        "not known",
        "no statistics",
    )
    assert "shift, of the class" not in rows
    said = lead(content | {"again": 2, "pixels": 5000, "places": 64, "seconds": 3.14, "share_of_run": 0.021})
    assert "red" in said
    assert "5,000 pixels" in said
    assert "2.1% of the run's time" in said


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A scene, a model, and certificates of as many places as the product takes, however busy the machine is."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "PLACES", PLACES)
        patch.setattr(certificate, "MOST", MOST)
        patch.setattr(certificate, "SECONDS", 600.0)
        yield {"imagery": catalogue(root / "imagery", scene={}), "model": tiny_model, "root": root}


def predict(world, name, *words):
    options = ("--engine", "inline", "--set", "map.tile=128")
    return rayseg("predict", world["model"], world["imagery"], "--out", world["root"] / name, *options, *words)


def test_a_run_has_a_certificate_and_keeps_what_is_required_of_it(world):
    met = ("--require", "certificate.retiled<=0", "--require", "metrics.shares.gpc>0")
    result = predict(world, "run", *met, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads((world["root"] / "run/certificate.json").read_text())
    assert json.loads(result.stdout)["certificate"] == content
    assert content["retiled"] == 0.0
    assert content["places"] == PLACES
    assert MOST / 2 < content["again"] <= MOST  # those with imagery
    assert content["limits"] == {name: list(limits) for name, limits in LIMITS.items()}
    assert "fewer than 20 windows" in content["unknown"]["far"]
    assert content["unknown"]["calibration"] == "no truth was given for the map"
    page = (world["root"] / "run/report/index.html").read_text()
    assert f'Certificate: <a class="light {content["light"]}" href="#certificate">' in page
    # The same run again computes nothing and is judged by the same numbers.
    before = files(world["root"] / "run")
    missed = predict(world, "run", "--require", "metrics.shares.gpc>2")
    assert missed.exit_code == 5
    share = json.loads((world["root"] / "run/metrics.json").read_text())["shares"]["gpc"]
    assert missed.stderr.splitlines()[-1].startswith(f"rayseg: metrics.shares.gpc is {share:.6g}, required > 2;")
    after = files(world["root"] / "run")
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"run.json", ".lock"}
    # What is not known is not met.
    assert predict(world, "run", "--require", "certificate.far<1").exit_code == 5
    assert predict(world, "run", "--require", "metrics.iou.gpc>0").exit_code == 5


def test_a_run_without_one_measures_nothing(world):
    assert predict(world, "bare", "--set", "certificate=false").exit_code == 0
    assert not (world["root"] / "bare/certificate.json").exists()
    assert "Certificate" not in (world["root"] / "bare/report/index.html").read_text()


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ("certificate.shift", "is not of the form"),
        ("shift<0.03", "is not of the form"),
        ("certificate.shift<much", "is not of the form"),
        ("certificate.shft<0.03", "a certificate has no shft"),
    ],
)
def test_a_requirement_that_cannot_be_meant_is_refused_before_the_run(world, tmp_path, limit, why):
    command = ("predict", world["model"], world["imagery"], "--out", tmp_path / "run")
    assert why in refused(2, *command, "--require", limit)
    assert not (tmp_path / "run").exists()


def test_pipelines_without_a_certificate_say_so(tmp_path):
    said = refused(
        2, "run", "pipeline", "agri", "--region", "demo", "--out", tmp_path / "r", "--require", "certificate.shift<1"
    )
    assert "agri has no certificate" in said
    off = ("predict", "/m", "0,0,1,1", "--out", tmp_path / "r", "--set", "certificate=false")
    assert "certificate is false" in refused(2, *off, "--require", "certificate.shift<1")
