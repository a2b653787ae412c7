"""Places of a map computed again: exact counts of what changes, by models whose answer is known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_world import BANDS, GRID, SCALING

from rayseg.geo.grid import Tile, Window
from rayseg.io import cog, labels, stac_read
from rayseg.models.bundle import Architecture, Bundle
from rayseg.models.input_statistics import InputStatistics
from rayseg.stages.certify import Certify, Place
from rayseg.vision.color import ClassTable

WINDOW = Window(6400, -6400, 128, 128)
CLASSES = ((0, "rest", (0, 0, 0)), (1, "bright", (255, 255, 255)))
OPTIONS = {"architecture": "unet", "encoder": "mobilenet_v2"}
BUNDLE = Bundle(
    name="fake",
    task="segmentation",
    architecture=Architecture(factory="segmenter", options=OPTIONS),
    classes=CLASSES,
    bands=BANDS,
    dtype="uint8",
    scaling=SCALING,
    patch=64,
    stride=32,
)


class Fake:
    """A model whose class of a pixel is `rule(image of the tile's window, tile)`."""

    def __init__(self, rule):
        self.rule, self.bundle = rule, BUNDLE

    def __call__(self, rows):
        done = []
        for row in rows:
            cut = row.tile.window.slices(row.reach)
            valid_HW = row.valid[cut]
            classes_HW = np.where(valid_HW, self.rule(row.image[:, *cut], row.tile), 255).astype(np.uint8)
            done.append(replace(row, classes=classes_HW, scores=np.where(valid_HW, classes_HW * 254, 255)[None]))
        return done


def bright(image_CHW, _tile):
    return image_CHW.mean(axis=0) > 100


def striped(image_CHW, tile):
    """Stripes of a stride that begin where the grid of the patches does."""
    cols = np.arange(tile.window.col, tile.window.col1)
    return np.broadcast_to((cols // 32) % 2, image_CHW.shape[1:])


@pytest.fixture
def world(tmp_path):
    """A scene whose upper quarter has 110, the rest 60; with its place and a map by a rule."""
    image_CHW = np.full((3, 128, 128), 60, np.uint8)
    image_CHW[:, :32] = 110
    cog.write_image(tmp_path / "scene.tif", image_CHW, GRID, WINDOW, bands=BANDS, nodata=0)
    catalog = labels.ingest_rasters([str(tmp_path / "scene.tif")], tmp_path / "cat")
    [item] = stac_read.open_items(catalog)
    sources = json.dumps([stac_read.source_of(item).to_row()])
    tile = Tile("t", GRID, WINDOW)

    def measured(rule, *, altered=0, statistics=None, monkeypatch=None):
        classes_HW = np.ascontiguousarray(rule(image_CHW, tile)).astype(np.uint8)
        scores_HW = classes_HW * 254
        scores_HW.ravel()[:altered] ^= 1
        cog.write_classes(tmp_path / "t" / "classes.tif", classes_HW, GRID, WINDOW, ClassTable(CLASSES))
        cog.write_scores(tmp_path / "t" / "scores.tif", scores_HW[None], GRID, WINDOW, ("bright",))
        stage = Certify("nowhere", str(tmp_path))
        stage.predict = Fake(rule)
        stage.described = SimpleNamespace(statistics=statistics, bands=BANDS)
        [settled] = stage([Place(replace(tile, id="p"), tile, sources, True)])
        assert settled.status == "done", settled.reason
        return settled.facts

    return measured


def test_brightness_and_contrast_change_the_pixels_that_they_move_over_the_threshold(world):
    facts = world(bright)
    quarter = 128 * 32
    assert facts["pixels"] == 128 * 128
    assert facts["changed"]["retiled"] == facts["changed"]["shift"] == [0]
    assert facts["changed"]["brightness"] == [quarter, 0]  # 110 x .8 < 100; 60 x 1.2 < 100
    # The mean is between 60 and 110, so .8 draws 110 to less than 100, and 1.2 moves both away from it.
    assert facts["changed"]["contrast"] == [0 if 0.8 * 110 + 0.2 * 72.5 > 100 else quarter, 0]
    assert facts["of_class"]["brightness"] == [(quarter, quarter), (0, quarter)]


def test_a_map_that_hangs_on_the_lattice_changes_when_it_is_shifted(world):
    facts = world(striped)
    assert facts["changed"]["retiled"] == [0]
    assert facts["changed"]["shift"] == [128 * 128 // 2]
    assert facts["of_class"]["shift"] == [(128 * 128 // 2, 128 * 128 * 3 // 4)]


def test_after_its_time_only_the_first_place_is_mapped_again(world, tmp_path):
    world(bright)
    stage = Certify("nowhere", str(tmp_path), seconds=1e-9)
    stage.predict, stage.described = Fake(bright), SimpleNamespace(statistics=None, bands=BANDS)
    [item] = stac_read.open_items(str(tmp_path / "cat" / "catalog.json"))
    sources, tile = json.dumps([stac_read.source_of(item).to_row()]), Tile("t", GRID, WINDOW)
    places = [Place(replace(tile, id=name), tile, sources, True) for name in "ab"]
    assert ["pixels" in settled.facts for settled in stage(places)] == [True, False]


def test_single_bits_of_scores_that_differ_are_counted(world):
    assert world(bright, altered=7)["changed"]["retiled"] == [7]


def test_the_imagery_s_distance_is_measured_where_the_model_has_statistics(world):
    rng = np.random.default_rng(0)
    like = [np.full((3, 64, 64), 60.0) + rng.normal(0, 3, (3, 1, 1)) + rng.normal(0, 3, (3, 64, 64)) for _ in range(30)]
    near = InputStatistics.of(like)
    far = InputStatistics.of([image + 150 for image in like])
    assert world(bright, statistics=far)["far"]
    assert world(bright, statistics=far)["distance"] > world(bright, statistics=near)["distance"]
    assert "far" not in world(bright)


def test_a_place_that_cannot_be_read_says_why_and_counts_for_nothing(tmp_path):
    stage = Certify("nowhere", str(tmp_path))
    stage.predict, stage.described = Fake(bright), SimpleNamespace(statistics=None, bands=BANDS)
    tile = Tile("t", GRID, WINDOW)
    [settled] = stage([Place(tile, tile, "[]", True)])
    assert (settled.status, settled.facts) == ("nodata", {})
    assert "classes.tif" in settled.reason
