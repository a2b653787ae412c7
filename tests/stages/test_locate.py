"""From labelled chips to coarse masks, stage by stage."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from fake_run import blobs, picture
from small_world import chip_folder, classifier, scene

from rayseg.errors import DataError
from rayseg.io import labels, stac_read
from rayseg.stages.decide_cues import (
    CamCue,
    ConceptCue,
    ReadChip,
    Superpixels,
    WriteCue,
    WriteDensity,
    cue_path,
    density_path,
)
from rayseg.stages.locate import Cam, Segment
from rayseg.stages.rows import ChipRow
from rayseg.vision import concept

SIZE = 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Chips as rows: three with green shapes, three without."""
    root = tmp_path_factory.mktemp("chips")
    uri = labels.ingest_folder(chip_folder(root / "chips", size=SIZE), root / "cat", labels="folder")
    found = labels.chips_of(stac_read.open_items(uri, "chips"))
    return [ChipRow.from_row(chip.to_row()) for chip in found]


@pytest.fixture(scope="module")
def seen(rows, tmp_path_factory):
    """The same after reading and class activation maps."""
    stage = Cam(classifier(tmp_path_factory.mktemp("model")), target=0)
    return pickle.loads(pickle.dumps(stage))(ReadChip(SIZE)(rows))


def test_a_chip_is_its_middle_in_colour(rows):
    [row] = pickle.loads(pickle.dumps(ReadChip(40)))(rows[:1])
    whole = picture(blobs(SIZE, SIZE, seed=0, share=0.3), seed=0).transpose(1, 2, 0)
    assert (row.image == whole[12:52, 12:52]).all()
    assert row.valid.all()


def test_beyond_a_chip_is_its_mirror_image_and_not_valid(rows):
    [row] = ReadChip(72)(rows[:1])
    inner = row.image[4:68, 4:68]
    assert row.valid.sum() == SIZE * SIZE
    assert (row.image[3, 4:68] == inner[1]).all()
    assert row.image.min() > 0


def test_a_chip_without_data_is_an_error_of_the_data(tmp_path):
    scene(tmp_path / "bare.tif", margin=10_000)
    [item] = stac_read.open_items(labels.ingest_rasters(tmp_path / "bare.tif", tmp_path / "cat"))
    [chip] = labels.chips_of([item])
    with pytest.raises(DataError, match="no valid pixel"):
        ReadChip(SIZE)([ChipRow.from_row(chip.to_row())])


def test_activation_maps_do_not_depend_on_the_batch(seen, rows, tmp_path):
    stage = Cam(classifier(tmp_path / "model"), target=0)
    together = stage(ReadChip(SIZE)(rows))
    for row in together:
        assert row.cam.shape == (SIZE, SIZE)
        assert row.cam.dtype == np.float32
        assert 0 <= row.cam.min() <= row.cam.max() <= 1
        assert 0 <= row.certainty <= 1
    [alone] = stage(ReadChip(SIZE)(rows[2:3]))
    np.testing.assert_allclose(alone.cam, together[2].cam, atol=1e-4)


def test_objects_are_labels_and_the_same_each_time(seen):
    stage = Segment("v1", iterations=4, min_labels=4, precision="float32", seed=1943)
    [first] = stage(seen[:1])
    [second] = pickle.loads(pickle.dumps(stage))(seen[:1])
    assert first.objects.shape == (SIZE, SIZE)
    assert (first.objects == second.objects).all()
    assert len(np.unique(first.objects)) > 1


def test_superpixels_may_be_found_on_a_coarser_picture(rows):
    [row] = ReadChip(63)(rows[:1])
    [found] = Superpixels(reduce=2, min_size=8)([row])
    labels_HW = found.superpixels
    assert labels_HW.shape == (63, 63)
    assert (labels_HW[:62:2, :62:2] == labels_HW[1:62:2, 1:62:2]).all()
    assert set(np.unique(labels_HW)) == set(range(labels_HW.max() + 1))


def test_a_cue_is_the_objects_with_a_high_activation():
    objects = np.repeat([0, 1, 2], 20)[None].repeat(10, axis=0)
    cam = np.choose(objects, [0.1, 0.9, 0.2]).astype(np.float32)
    [row] = CamCue(objects="labels")([ChipRow("a", {}, cam=cam, objects=objects)])
    assert (row.mask == (objects == 1)).all()


def test_a_concept_is_what_positive_chips_share(seen, tmp_path):
    divided = Superpixels(min_size=8)(seen)
    settled = WriteDensity(str(tmp_path))(divided)
    assert {row.status for row in settled} == {"done"}
    planes = {row.id: np.load(density_path(str(tmp_path), row.id)) for row in divided}
    of = {kind: [planes[row.id] for row in divided if row.listed["label"] == kind] for kind in ("gpc", "nongpc")}
    cue = ConceptCue(concept.evidence(of["gpc"], of["nongpc"]), doubtful=1.0)
    positive = [row for row in divided if row.listed["label"] == "gpc"]
    for number, row in enumerate(pickle.loads(pickle.dumps(cue))(positive)):
        truth = blobs(SIZE, SIZE, seed=number, share=0.3)
        sure = row.mask != 255
        assert set(np.unique(row.mask)) <= {0, 1, 255}
        assert (row.mask[sure] == truth[sure]).mean() > 0.9
        assert sure.mean() > 0.9


def test_a_cue_is_kept_on_the_grid_of_its_chip(seen, tmp_path):
    mask = blobs(SIZE, SIZE)
    valid = np.ones((SIZE, SIZE), bool)
    valid[:4] = False
    [row] = WriteCue(str(tmp_path))([replace(seen[0], mask=mask, valid=valid)])
    assert row.facts["share"] == pytest.approx((mask[4:] == 1).sum() / SIZE**2)
    with rasterio.open(cue_path(str(tmp_path), seen[0].id)) as file:
        assert file.descriptions == ("mask", "cam")
        assert (file.read(1)[4:] == mask[4:]).all()
        assert (file.read(1)[:4] == 255).all()
        np.testing.assert_allclose(file.read(2) / 254, seen[0].cam, atol=1 / 254)


def test_a_cue_of_a_placed_chip_lies_on_it(seen, tmp_path):
    scene(tmp_path / "s.tif", margin=0)
    [item] = stac_read.open_items(labels.ingest_rasters(tmp_path / "s.tif", tmp_path / "cat"))
    [chip] = labels.chips_of([item])
    [shown] = ReadChip(SIZE)([replace(ChipRow.from_row(chip.to_row()), certainty=1.0, cam=seen[0].cam)])
    WriteCue(str(tmp_path / "cues"))([replace(shown, mask=blobs(SIZE, SIZE))])
    with rasterio.open(tmp_path / "s.tif") as image, rasterio.open(cue_path(str(tmp_path / "cues"), shown.id)) as cue:
        assert cue.crs == image.crs
        there = rasterio.windows.from_bounds(*cue.bounds, transform=image.transform)
        assert (there.col_off, there.row_off, there.width, there.height) == (58, 68, SIZE, SIZE)
        assert (image.read(window=there).transpose(1, 2, 0) == shown.image).all()
