"""Segment Anything and labels without a model, over HTTP."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tiny_server import client, encoded, form, sam_picture, untrained_sam

from rayseg.models import bundle
from rayseg.models.unsupervised import segment
from rayseg.vision import rle
from rayseg.vision.fill import filled
from rayseg.vision.superpixels import halved


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A server with a tiny SAM of no training."""
    with untrained_sam(tmp_path_factory.mktemp("sam") / "sam") as prefix:
        assert bundle.description(prefix).task == "instances"
        yield client(prefix)


def ask(asked, path, accept="application/json", **fields):
    return asked.post(path, data=fields, headers={"Accept": accept}, **form(encoded(sam_picture())))


def test_points_and_boxes_give_one_thing_each(asked):
    fields = {"points": "[[40, 30], [50, 35]]", "labels": "[1, 0]", "boxes": "[[10, 10, 80, 60]]"}
    found = ask(asked, "/v1/sam/prompt", **fields)
    assert found.status_code == 200, found.text
    said = found.json()
    assert (said["width"], said["height"]) == (160, 120)
    assert len(said["things"]) == 2
    for one in said["things"]:
        inside = rle.decode(np.array(one["runs"]), (120, 160))
        assert inside.sum() == one["pixels"]
    painted = np.array(Image.open(io.BytesIO(ask(asked, "/v1/sam/prompt", "image/png", **fields).content)))
    shown = sum(rle.decode(np.array(one["runs"]), (120, 160)) for one in said["things"]) > 0
    np.testing.assert_array_equal(painted[..., 3] > 0, shown)


def test_everything_is_what_the_proposer_finds(asked):
    fields = {"points": "8", "iou": "0", "stability": "0"}
    said = ask(asked, "/v1/sam/auto", **fields).json()
    assert said["things"]
    shapes = json.loads(ask(asked, "/v1/sam/auto", "application/geo+json", **fields).content)
    assert {row["properties"]["id"] for row in shapes["features"]} == set(range(1, len(said["things"]) + 1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "neither points nor boxes"),
        ({"points": "[[500, 3]]"}, "is outside the image"),
        ({"points": "[[5, 3]]", "labels": "[1, 1]"}, "1 points have 2 labels"),
        ({"points": "[5, 3]"}, "config key points"),
        ({"points": "rm -rf"}, "expected JSON"),
        ({"points": "[" * 5000}, "expected JSON"),
        ({"boxes": "[[9, 9, 3, 3]]"}, "is empty"),
        ({"points": "[[NaN, 3]]"}, "should be a finite number"),
        ({"depth": "1"}, "unknown field 'depth'"),
    ],
)
def test_invalid_prompts_are_refused(asked, fields, words):
    found = ask(asked, "/v1/sam/prompt", **fields)
    assert found.status_code == 422, found.text
    assert words in found.json()["detail"]


def test_without_a_sam_bundle_there_is_no_sam():
    found = ask(client(), "/v1/sam/auto")
    assert found.status_code == 404
    assert "no Segment Anything" in found.json()["detail"]


def test_an_image_is_labelled_without_a_model(asked):
    fields = {"network": "v1", "iterations": "3"}
    said = ask(asked, "/v1/unsupervised", **fields).json()
    assert sum(row["pixels"] for row in said["classes"]) == 160 * 120
    assert all(row["score_mean"] is None for row in said["classes"])
    labels = np.array(Image.open(io.BytesIO(ask(asked, "/v1/unsupervised", "image/png", **fields).content)))
    counts = {row["value"]: row["pixels"] for row in said["classes"] if row["pixels"]}
    assert counts == dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))
    shapes = json.loads(ask(asked, "/v1/unsupervised", "application/geo+json", **fields).content)
    assert sum(row["properties"]["pixels"] for row in shapes["features"]) == 160 * 120
    assert ask(asked, "/v1/unsupervised", iterations="100000").status_code == 422


@pytest.mark.parametrize("network", ["v1", "v2", "deepnet"])
def test_images_of_any_sides_are_labelled_and_tiny_ones_refused(asked, network):
    fields = {"network": network, "iterations": "1"}
    odd = asked.post("/v1/unsupervised", data=fields, **form(encoded(sam_picture()[:33, :41])))
    assert odd.status_code == 200, odd.text
    assert (odd.json()["width"], odd.json()["height"]) == (41, 33)
    tiny = asked.post("/v1/unsupervised", data=fields, **form(encoded(sam_picture()[:1, :1])))
    assert tiny.status_code == 422
    assert "16 on each side" in tiny.json()["detail"]


@pytest.mark.parametrize("network", ["v1", "v2", "deepnet"])
def test_labels_do_not_depend_on_what_has_no_data(asked, network):
    """They are those that training gives which leaves it out, over the mirror image of what there is."""
    fields = {"network": network, "iterations": "4", "min_labels": "2"}
    picture_HWC = sam_picture()[:64, :80]
    valid_HW = np.zeros((64, 160), bool)
    valid_HW[:, :80] = True
    image_HWA = np.dstack([np.pad(picture_HWC, ((0, 0), (0, 80), (0, 0))), valid_HW * np.uint8(255)])
    said = asked.post("/v1/unsupervised", data=fields, **form(encoded(image_HWA)))
    assert said.status_code == 200, said.text
    assert all(row["pixels"] for row in said.json()["classes"])
    assert sum(row["pixels"] for row in said.json()["classes"]) == valid_HW.sum()
    mask = asked.post("/v1/unsupervised", data=fields, headers={"Accept": "image/png"}, **form(encoded(image_HWA)))
    labels_HW = np.array(Image.open(io.BytesIO(mask.content)))
    assert (labels_HW[~valid_HW] == 255).all()
    whole_HWC = filled(image_HWA[..., :3], valid_HW)
    superpixels_HW = np.where(valid_HW, halved(whole_HWC), -1)
    expected_HW = segment(whole_HWC, superpixels_HW, network=network, iterations=4, min_labels=2)
    np.testing.assert_array_equal(labels_HW[valid_HW], expected_HW[valid_HW])


def test_labels_of_an_image_without_any_data_are_refused(asked):
    empty = encoded(np.zeros((40, 40, 4), np.uint8))
    found = asked.post("/v1/unsupervised", **form(empty))
    assert found.status_code == 422
    assert "no valid pixel" in found.json()["detail"]


def test_labels_of_an_image_that_is_too_large_to_train_on_are_refused(asked):
    found = asked.post("/v1/unsupervised", **form(encoded(np.zeros((1025, 1025, 3), np.uint8))))
    assert found.status_code == 413
