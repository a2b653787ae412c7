"""Answers on the ground: areas and shares of a class map in degrees."""

import json

import numpy as np
import pytest

from rayseg.geo.grid import Grid, Tile, Window
from rayseg.serve.answers import NODATA, Result, instances_json, summary
from rayseg.vision import rle
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "land", (0, 0, 0)), (1, "ice", (255, 255, 255))))
NORTH = Tile("t", Grid("EPSG:4326", (0.5, 0.5), (0.0, 0.0)), Window(20, -160, 40, 80))
"""From 80 N to 40 N."""


def test_shares_and_areas_are_of_the_ground():
    classes_HW = np.zeros((80, 40), np.uint8)
    classes_HW[:40], classes_HW[:, :4] = 1, NODATA
    answer = json.loads(summary(Result("m", NORTH, TABLE, classes_HW, None, 0.0)))
    land, ice = answer["classes"]
    sines = [np.sin(np.radians(lat)) for lat in (40, 60, 80)]
    assert ice["share"] == pytest.approx((sines[2] - sines[1]) / (sines[2] - sines[0]), abs=2e-3)
    assert ice["share"] + land["share"] == pytest.approx(1)
    radius = 6_371_007
    assert land["area_m2"] == pytest.approx(np.radians(18) * radius**2 * (sines[1] - sines[0]), rel=5e-3)
    assert ice["pixels"] == land["pixels"]


def test_an_object_has_the_area_of_its_own_rows():
    masks = []
    for rows in (slice(0, 8), slice(72, 80)):
        mask_HW = np.zeros((80, 40), bool)
        mask_HW[rows, 5:15] = True
        masks.append({"runs": rle.encode(mask_HW), "iou": 1.0, "stability": 1.0})
    north, south = json.loads(instances_json(NORTH, masks))["things"]
    assert north["pixels"] == south["pixels"] == 80
    assert north["area_m2"] / south["area_m2"] == pytest.approx(
        np.cos(np.radians(78)) / np.cos(np.radians(42)), rel=0.02
    )


def test_a_warning_about_the_image_is_part_of_the_answer():
    classes_HW = np.zeros((80, 40), np.uint8)
    plain, warned = (
        json.loads(summary(Result("m", NORTH, TABLE, classes_HW, None, 0.0, warning=text))) for text in ("", "coarse")
    )
    assert "warning" not in plain
    assert warned["warning"] == "coarse"
