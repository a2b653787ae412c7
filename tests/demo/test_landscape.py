"""The drawn landscape: its content, its layout, and the same pixels from the same seed."""

import numpy as np
import pytest

from rayseg.demo import landscape, shapes
from rayseg.demo.landscape import KINDS, World, draw, plan


@pytest.fixture(scope="module")
def world() -> World:
    return plan(size=512, seed=7)


@pytest.fixture(scope="module")
def scenes(world: World) -> list[landscape.Scene]:
    return [draw(world, half) for half in (0, 1)]


def test_the_same_seed_draws_the_same_pixels(scenes):
    again = draw(plan(size=512, seed=7), 1)
    assert all(np.array_equal(a, b) for a, b in zip(again, scenes[1], strict=True))


def test_another_seed_draws_another_landscape(scenes):
    other = draw(plan(size=512, seed=8), 0)
    assert np.mean(other.cover_HW != scenes[0].cover_HW) > 0.3


def test_a_small_world_has_every_kind_of_block_in_both_halves(world):
    for left, right in ((0, 512), (512, 1024)):
        columns = [(block.kind, block.shape.points_N2[:, 1].mean()) for block in world.blocks]
        assert {kind for kind, col in columns if left <= col < right} == set(KINDS)


def test_scenes_have_every_land_cover_and_a_few_percent_of_netting(scenes):
    for scene in scenes:
        assert set(np.unique(scene.cover_HW)) == set(range(7))
        assert scene.image_HWC.shape == (512, 512, 3)
        assert scene.image_HWC.max(axis=2).min() >= 1
        assert set(np.unique(scene.netting_HW)) == {0, 1}
    assert 0.02 < np.mean([scene.netting_HW.mean() for scene in scenes]) < 0.09


def test_netting_is_ragged_and_has_holes_with_soil_in_them(scenes):
    from skimage.measure import euler_number, label

    netting_HW = np.concatenate([scene.netting_HW for scene in scenes], axis=1)
    pieces = label(netting_HW).max()
    assert pieces - euler_number(netting_HW, connectivity=2) > 3


def test_netting_goes_on_across_the_line_between_the_scenes():
    world = plan(size=512, seed=7)
    ring = [(100, 400), (100, 620), (220, 620), (220, 400)]
    block = landscape.Block(shapes.convex(ring, 4.0), "nets", ())
    crossing = landscape.World(world.size, world.seed, world.bend, (block,), world.river_W + 1e4, world.noise)
    left, right = (draw(crossing, half).netting_HW for half in (0, 1))
    assert left[:, -1].any()
    assert np.mean(left[:, -1] != right[:, 0]) < 0.02


def test_no_colour_threshold_finds_the_netting(scenes):
    image_HWC = np.concatenate([scene.image_HWC for scene in scenes], axis=1).astype(int)
    netting = np.concatenate([scene.netting_HW for scene in scenes], axis=1).ravel() > 0
    red, green, blue = image_HWC.reshape(-1, 3).T
    for index in (2 * green - red - blue, green - red, green + blue - 2 * red, blue - red):
        ious = []
        for threshold in range(-60, 120, 2):
            found = index > threshold
            ious.append(np.sum(found & netting) / np.sum(found | netting))
        assert max(ious) < 0.5


def test_scenes_differ_in_light(scenes):
    means = [scene.image_HWC[scene.cover_HW == 0].mean(axis=0) for scene in scenes]
    assert np.ptp(means[0] - means[1]) > 4


def test_parcels_are_convex_plots_of_a_sensible_size_with_known_crops(world):
    parcels = [parcel for block in world.blocks for parcel in block.parcels]
    sides = np.array([shapes.frame(shape)[2:] for shape, _ in parcels])
    assert len(parcels) >= 8
    assert np.percentile(sides, 5) > 20
    assert sides.max() < 145
    for shape, crop in parcels:
        center = shape.points_N2.mean(axis=0)
        assert (shapes.normals(shape) @ center < np.sum(shapes.normals(shape) * shape.points_N2, axis=1)).all()
        assert crop in landscape.CROPS


def test_the_outline_of_a_parcel_lies_on_its_painted_edge(world, scenes):
    from skimage.draw import polygon2mask

    cover_HW = np.concatenate([scene.cover_HW for scene in scenes], axis=1)
    agreement = []
    for block in world.blocks:
        for shape, crop in block.parcels:
            inside_HW = polygon2mask(cover_HW.shape, world.bend.outline(shape))
            if inside_HW.sum() > 300 and landscape.CROPS[crop][4]:
                agreement.append(np.mean(cover_HW[inside_HW] == landscape.CROPS[crop][1]))
    assert np.median(agreement) > 0.97


def test_the_pieces_of_a_split_cover_the_polygon_once():
    whole = shapes.convex([(0, 0), (0, 300), (200, 310), (190, -10)])
    pieces = shapes.split(whole, np.random.default_rng(1), 2000, (3.0, 1.0))
    assert sum(shapes.area(piece) for piece in pieces) == pytest.approx(shapes.area(whole))
    assert max(shapes.area(piece) for piece in pieces) < 2000


def test_a_shrunk_polygon_keeps_its_margins():
    square = shapes.Convex(np.array([(0, 0), (0, 100), (100, 100), (100, 0)], dtype=float), np.array([5.0, 0, 0, 10]))
    inner = shapes.shrink(square, 1)
    assert inner is not None
    assert inner.points_N2.min(axis=0).tolist() == [6, 11]
    assert inner.points_N2.max(axis=0).tolist() == [99, 99]
    assert shapes.shrink(square, 60) is None


def test_pixels_and_plan_coordinates_are_inverse(world):
    points_N2 = np.random.default_rng(0).uniform(0, [511, 1023], (50, 2))
    pixels_N2 = world.bend.to_pixels(points_N2)
    row, col = np.rint(pixels_N2.T).astype(int) + shapes.MARGIN
    back_N2 = pixels_N2 + np.stack([world.bend.bow_rows[col], world.bend.bow_cols[row]], axis=1)
    assert np.abs(back_N2 - points_N2).max() < 0.3
    assert np.abs(pixels_N2 - points_N2).max() > 2
