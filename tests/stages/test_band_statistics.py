"""Values become 0..1 in one way for all of a scene: by its own percentiles, or as given, and never patch by patch."""

from dataclasses import replace

import numpy as np
import pytest

from rayseg.geo.grid import Grid, Window
from rayseg.io import cog
from rayseg.io.rasters import source_of_file
from rayseg.models.bundle import Scaling
from rayseg.stages import oversegment
from rayseg.stages.band_statistics import BandPercentiles
from rayseg.stages.oversegment import Divide, ReadAround
from rayseg.stages.read import tile_rows
from rayseg.stages.rows import SceneRow, TileRow
from rayseg.steps.scenes import scaling_of
from rayseg.train.scene import Patches, SceneConfig

GRID = Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0))
BANDS = ("red", "nir")
SIDE = 256
GIVEN = Scaling(mean=(100.0, -50.0), std=(4000.0, 9000.0))


@pytest.fixture
def scene(tmp_path):
    """(pixels, rows of its four tiles) of a scene of 16 bits: dark in the west, bright in the east, one wild pixel."""
    image_CHW = np.random.default_rng(0).integers(500, 900, (2, SIDE, SIDE)).astype(np.uint16)
    image_CHW[:, :, SIDE // 2 :] += np.array([5000, 11000], np.uint16)[:, None, None]
    image_CHW[:, 7, 7] = 65535
    cog.write_image(tmp_path / "scene.tif", image_CHW, GRID, Window(0, 0, SIDE, SIDE), bands=BANDS)
    source = source_of_file(str(tmp_path / "scene.tif"), "scene")
    return image_CHW, [TileRow.from_row(row) for row in tile_rows([source], None, size=SIDE // 2, halo=0)]


def surveyed(rows):
    [found] = BandPercentiles(BANDS)([SceneRow("scene", tuple(rows))])
    return found.facts


def test_the_survey_gives_the_percentiles_of_the_scene_whatever_its_tiles(scene):
    image_CHW, rows = scene
    low_C, high_C = np.percentile(image_CHW.reshape(2, -1), (1, 99), axis=1)
    facts = surveyed(rows)
    assert (facts["low"], facts["high"]) == (low_C.tolist(), high_C.tolist())
    assert high_C.max() < 13000  # not the wild pixel
    assert surveyed(rows[::-1]) == facts


def test_the_scaling_is_the_surveyed_one_or_as_given(scene):
    facts = surveyed(scene[1])
    found = scaling_of("auto", facts, "uint16", 2)
    scaled_C2 = [found.normalize(np.array(facts[edge])[:, None, None]).ravel() for edge in ("low", "high")]
    np.testing.assert_allclose(scaled_C2, [[0, 0], [1, 1]], atol=1e-6)
    assert scaling_of(GIVEN, facts, "uint16", 2) == GIVEN
    assert scaling_of("auto", facts, "uint8", 2).std == (255.0, 255.0)
    assert scaling_of("percentiles", facts, "uint8", 2) == found


@pytest.mark.parametrize("scaling", [GIVEN, None])
def test_patches_and_tiles_are_scaled_alike_and_none_by_itself(scene, tmp_path, monkeypatch, scaling):
    image_CHW, rows = scene
    scaling = scaling or scaling_of("auto", surveyed(rows), "uint16", 2)
    expected_CHW = (image_CHW - np.array(scaling.mean)[:, None, None]) / np.array(scaling.std)[:, None, None]
    whole = Window(0, 0, SIDE, SIDE)

    patches = Patches(rows, {}, BANDS, scaling, SceneConfig(patch=64, stride=64, reduce=1))
    assert len(patches) == 16
    for number, (_, window) in enumerate(patches.windows):
        image_1CHW, _, _ = patches.read(number)
        np.testing.assert_allclose(image_1CHW[0].numpy(), expected_CHW[:, *window.slices(whole)], rtol=1e-5, atol=1e-5)

    shown = []
    monkeypatch.setitem(
        oversegment.METHODS, "seen", lambda image_HWC: shown.append(image_HWC) or np.zeros((128, 128), int)
    )
    divide = Divide(str(tmp_path / "parts"), "seen", {})
    divide([replace(row, scaling=scaling.model_dump_json()) for row in ReadAround(BANDS, margin=0)(rows)])
    for row, image_HWC in zip(rows, shown, strict=True):
        cut = row.tile.window.slices(whole)
        clipped_CHW = np.clip(expected_CHW, 0, 1)[:, *cut]
        np.testing.assert_allclose(image_HWC.transpose(2, 0, 1), clipped_CHW, rtol=1e-5, atol=1e-5)
