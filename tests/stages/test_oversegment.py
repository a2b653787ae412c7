"""Superpixels of tiles made one: no segment is cut by a border, of a row or a column, that its neighbour agrees on."""

import numpy as np
import pytest

from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io import segments
from rayseg.io.tables import read_array, write_array
from rayseg.stages.oversegment import borders_path, features_path, grown, part_path, segments_path, unite
from rayseg.vision.region_merging import borders, summed
from rayseg.vision.segment_clusters import segment_sums

GRID = Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0))
SIDE, TILE, OVERLAP = 48, 24, 8
WHOLE = Window(0, 0, SIDE, SIDE)
TILES = [Tile(f"t{row}{col}", GRID, Window(col * TILE, row * TILE, TILE, TILE)) for row in (0, 1) for col in (0, 1)]
TRUTH_HW = (np.arange(SIDE)[:, None] // 16 * 3 + np.arange(SIDE) // 16 + 1).astype(np.uint32)  # 3 x 3 squares of 16 px
FEATURES_HWF = np.random.default_rng(0).random((SIDE, SIDE, 2))


def united(prefix, changed=()):
    """Segments of the scene after each tile has divided its own ground, numbered its own way.

    changed: tile -> what it takes for the truth.
    """
    found = []
    for tile in TILES:
        reach = grown(tile.window, OVERLAP)
        truth_HW = np.pad(dict(changed).get(tile.id, TRUTH_HW), OVERLAP)[reach.slices(grown(WHOLE, OVERLAP))]
        values, inverse = np.unique(truth_HW, return_inverse=True)
        numbers_HW = inverse.reshape(truth_HW.shape)  # 0 beyond the scene
        own_HW = np.where(numbers_HW > 0, len(values) - numbers_HW, 0).astype(np.uint32)
        part = part_path(prefix, tile.id)
        segments.write_segments(part, own_HW, GRID, reach)
        inner = tile.window.slices(reach)
        write_array(features_path(part), segment_sums(FEATURES_HWF[tile.window.slices(WHOLE)], own_HW[inner]))
        write_array(borders_path(part), borders(own_HW[inner]))
        found.append((tile, int(own_HW.max())))
    unite(str(prefix), found, OVERLAP, described=True)
    files = [(tile.window, segments_path(prefix, tile.id)) for tile in TILES]
    return segments.read_segments(files, WHOLE)


def pairs(one_HW, other_HW):
    return len(np.unique(np.stack([one_HW.ravel(), other_HW.ravel()]), axis=1).T)


def test_where_tiles_agree_no_segment_is_cut_by_a_border_and_none_runs_into_another(tmp_path):
    found_HW = united(tmp_path)
    assert sorted(np.unique(found_HW)) == list(range(1, 10))
    assert pairs(found_HW, TRUTH_HW) == 9


@pytest.mark.parametrize(("across", "name"), [((0, 16), "t01"), ((16, 0), "t10")])
def test_where_a_neighbour_sees_something_else_its_segment_ends_at_the_border(tmp_path, across, name):
    """The upper right (lower left) tile cuts the square that it shares with the first into strips."""
    row, col = across
    other_HW = TRUTH_HW.copy()
    other_HW[row : row + 16, col : col + 16] = 100 + np.arange(16) // 4
    found_HW = united(tmp_path, {name: other_HW})
    square_HW = found_HW[row : row + 16, col : col + 16]
    mine, others = (square_HW[:, :8], square_HW[:, 8:]) if col else (square_HW[:8], square_HW[8:])
    assert len(np.unique(mine)) == 1
    assert not set(np.unique(mine)) & set(np.unique(others))
    assert pairs(found_HW[16:, 16:], TRUTH_HW[16:, 16:]) == 4


@pytest.mark.parametrize("changed", [{}, {"t01": TRUTH_HW + 10 * (np.arange(SIDE, dtype=np.uint32) // 4)}])
def test_sums_and_borders_of_all_tiles_are_those_of_the_scene_as_a_whole(tmp_path, changed):
    found_HW = united(tmp_path, changed)
    paths = [segments_path(tmp_path, tile.id) for tile in TILES]
    rows = np.concatenate([read_array(features_path(path)) for path in paths])
    expected = segment_sums(FEATURES_HWF, found_HW)
    for number in range(1, int(found_HW.max()) + 1):
        np.testing.assert_allclose(rows[rows[:, 0] == number, 1:].sum(axis=0), expected[number])
    parts_M3 = np.concatenate([read_array(borders_path(path)) for path in paths])
    np.testing.assert_array_equal(summed(parts_M3), borders(found_HW))
