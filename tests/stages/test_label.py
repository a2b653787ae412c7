"""Labels of tiles: row by row of patches the same as all at once, and the same however the scene is cut."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage

from rayseg.geo.grid import Grid, Lattice, Tile, Window
from rayseg.io.segments import without_specks
from rayseg.models import bundle, unsupervised
from rayseg.models.bundle import Architecture, Bundle, Scaling
from rayseg.pipelines.superpixel import Config as SuperpixelConfig
from rayseg.stages import label
from rayseg.stages.label import LabelTile
from rayseg.stages.oversegment import grown
from rayseg.stages.predict import Predict
from rayseg.stages.rows import TileRow
from rayseg.vision.blend import Blend
from rayseg.vision.color import label_table

GRID = Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0))
LATTICE = Lattice(32, 24)


def shares(patches):
    for patch in patches:
        generator = torch.Generator().manual_seed(patch.row * 1000 + patch.col + 500000)
        yield patch, torch.rand(5, 32, 32, generator=generator).softmax(0)


@pytest.mark.parametrize("window", [Window(-7, 13, 70, 90), Window(24, 24, 24, 24), Window(5, 5, 1, 1)])
def test_row_by_row_gives_what_blending_all_patches_gives(window):
    patches = LATTICE.patches(window)
    whole = Blend(window, 5, LATTICE)
    for patch, probabilities in shares(patches):
        whole.add(patch, probabilities.numpy())
    expected = whole.result()
    classes = np.full((window.height, window.width), 255, np.uint8)
    tops = classes.copy()
    for part, labels, scores in label.blended(shares, patches, window, LATTICE, classes=5, device="cpu"):
        classes[part.slices(window)], tops[part.slices(window)] = labels, scores
    np.testing.assert_array_equal(classes, expected.argmax(0))
    assert np.abs(tops - np.rint(expected.max(0) * 254)).max() <= 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that has learnt nothing, with 5 labels in 4 groups."""
    prefix = tmp_path_factory.mktemp("model") / "labels"
    recipe = unsupervised.RECIPES["deepnet"]
    net = recipe.build(3, 5)
    torch.manual_seed(0)
    for part in net.parameters():
        torch.nn.init.normal_(part, std=0.3)
    described = Bundle(
        name="labels",
        task="segmentation",
        architecture=Architecture(
            factory="unsupervised",
            options={
                "network": "deepnet",
                "channels": 3,
                "labels": 5,
                "classes": 4,
                "groups": "0,1,2,3,1",
                "reduce": 2,
            },
        ),
        classes=label_table(4).classes,
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=Scaling(mean=(0.0,) * 3, std=(255.0,) * 3),
        patch=32,
        stride=24,
    )
    bundle.save(prefix, described, unsupervised.Labeller(net.eval(), [0, 1, 2, 3, 1], reduce=2))
    return str(prefix)


def labelled(model, windows, *, sieve):
    """Labels of a scene of 80 x 70 px cut into windows; a corner has no data."""
    rng = np.random.default_rng(1)
    image = rng.integers(1, 255, (3, 9, 10)).repeat(10, axis=1).repeat(10, axis=2)[:, :80, :70].astype(np.uint8)
    there = np.add.outer(np.arange(80), np.arange(70)) > 25
    result = np.zeros((80, 70), np.uint8)
    stage = label.LabelTile(margin=sieve, sieve=sieve)
    for number, window in enumerate(windows):
        wide = Window(window.col - sieve, window.row - sieve, window.width + 2 * sieve, window.height + 2 * sieve)
        reach = LATTICE.reach(wide)
        part = reach.intersect(Window(0, 0, 70, 80))
        padded, valid = np.zeros((3, reach.height, reach.width), np.uint8), np.zeros((reach.height, reach.width), bool)
        inside = part.slices(Window(0, 0, 70, 80))
        padded[:, *part.slices(reach)] = image[:, *inside] * there[inside]
        valid[part.slices(reach)] = there[inside]
        row = TileRow(Tile(f"t{number}", GRID, window), "[]", bundle=model, image=padded, valid=valid, reach=reach)
        [done] = stage([row])
        assert done.scores.shape == (1, window.height, window.width)
        assert ((done.scores[0] == 255) == (done.classes == 255)).all()
        result[window.slices(Window(0, 0, 70, 80))] = done.classes
    return result, there


def test_labels_do_not_depend_on_how_the_scene_is_cut_and_nodata_gets_none(model):
    cut = partial(labelled, model, sieve=0)
    whole, there = cut([Window(0, 0, 70, 80)])
    assert ((whole == 255) == ~there).all()
    assert len(np.unique(whole)) > 2
    tiles = [Window(col, row, 35, 40) for row in (0, 40) for col in (0, 35)]
    np.testing.assert_array_equal(cut(tiles)[0], whole)


def test_too_little_memory_halves_the_batch_and_changes_no_label(model, monkeypatch):
    whole = labelled(model, [Window(0, 0, 70, 80)], sieve=0)[0]
    forward, sizes = Predict.forward, []

    def small(stage, patches):
        sizes.append(stage.batch)
        if stage.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(stage, patches)

    monkeypatch.setattr(Predict, "forward", small)
    monkeypatch.setattr(label, "LabelTile", partial(LabelTile, batch=4))
    np.testing.assert_array_equal(labelled(model, [Window(0, 0, 70, 80)], sieve=0)[0], whole)
    assert sizes[:2] == [4, 2]
    assert set(sizes[1:]) == {2}


def test_specks_go_and_nodata_stays(model):
    from skimage.measure import label as components

    rough, there = labelled(model, [Window(0, 0, 70, 80)], sieve=0)
    clean, _ = labelled(model, [Window(0, 0, 70, 80)], sieve=20)
    assert ((clean == 255) == ~there).all()
    sizes = [np.bincount(components(found, background=255, connectivity=1).ravel())[1:] for found in (rough, clean)]
    assert sizes[0].min() < 20
    assert sizes[1].min() >= 20


def test_specks_go_as_they_do_from_the_whole_map_however_it_is_cut():
    margin, size, side = SuperpixelConfig().margin, SuperpixelConfig().sieve, 256
    whole = Window(0, 0, side, side)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        waves = [ndimage.gaussian_filter(rng.normal(size=(side, side)), 3) for _ in range(6)]
        rough_HW = np.argmax(waves, axis=0).astype(np.uint8)
        found_HW = np.zeros_like(rough_HW)
        for tile in (Window(col, row, 64, 64) for row in range(0, side, 64) for col in range(0, side, 64)):
            reach = grown(tile, margin).intersect(whole)
            cut_HW = np.ascontiguousarray(rough_HW[reach.slices(whole)])
            clean_HW = without_specks(cut_HW, np.ones(cut_HW.shape, bool), size=size)
            found_HW[tile.slices(whole)] = clean_HW[tile.slices(reach)]
        np.testing.assert_array_equal(found_HW, without_specks(rough_HW, np.ones(rough_HW.shape, bool), size=size))
