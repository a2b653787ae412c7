import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest

from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Lattice, Tile, Window, expect_ids, slug, tile_at
from rayseg.geo.region import Region

UTM = Grid("EPSG:32650", (0.5, 0.5), (0.25, 0.0))
PIXELS = Grid(None, (1.0, 1.0), (0.0, 0.0), "a b.png")


def test_windows_intersect_unite_and_slice():
    a, b = Window(-3, 2, 10, 5), Window(4, 4, 10, 10)
    assert a.intersect(b) == Window(4, 4, 3, 3)
    assert a.union(b) == Window(-3, 2, 17, 12)
    assert a.intersect(Window(100, 100, 5, 5)).empty
    array = np.arange(50).reshape(5, 10)
    assert array[a.intersect(b).slices(a)].tolist() == [[27, 28, 29], [37, 38, 39], [47, 48, 49]]


def test_a_window_and_its_bounds_are_the_same_place():
    window = Window(-7, -1001, 12, 9)
    for grid in (UTM, PIXELS):
        assert grid.window_of(grid.bounds(window)) == window
    left, bottom, right, top = UTM.bounds(Window(0, 0, 2, 4))
    assert (left, bottom, right, top) == (0.25, -2.0, 1.25, 0.0)


def test_bounds_are_covered_outward_but_not_by_rounding_noise():
    assert UTM.window_of((0.25 + 1e-5, -1.0, 1.25 - 1e-5, 0.0)) == Window(0, 0, 2, 2)
    assert UTM.window_of((0.30, -1.0, 1.30, 0.0)) == Window(0, 0, 3, 2)


def test_grids_have_names_that_are_safe_in_paths():
    assert UTM.name == "32650"
    assert PIXELS.name == "a-b.png_px"
    assert Grid("PROJCS[...]", (1, 1), (0, 0)).name.startswith("crs-")
    assert slug("../../etc/passwd") == "etc-passwd"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("北京 2024", "北京-2024"),
        ("Поле №7", "Поле-№7"),
        ("نخل/غرب", "نخل-غرب"),
        ("नई दिल्ली", "नई-दिल्ली"),
        ("🌾", "🌾"),
        ("Zu\u0308rich", "Zürich"),  # as macOS spells it
        ("50% #3?&c=d", "50-3-c-d"),
        ("\u200bzero\u202e width\u3000", "zero-width"),
        (" / ", "x"),
    ],
)
def test_names_of_every_script_stay_readable(text, name):
    assert slug(text) == name
    expect_ids([name])


def test_long_names_stay_different_and_short_enough_for_a_file():
    names = [slug("水" * 84 + end) for end in "ab"]
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 160 and name.startswith("水" * 50) for name in names)
    expect_ids([f"{name}_32650_-1234_-5678" for name in names])
    with pytest.raises(DataError, match="cannot be a file name"):
        expect_ids(["a/b"])


def test_tiles_keep_their_id_whatever_the_extent_and_are_cut_to_it():
    whole = tile_at(UTM, -3, 2, size=100, extent=Window(0, -1000, 1000, 1000))
    cut = tile_at(UTM, -3, 2, size=100, extent=Window(210, -290, 1000, 1000))
    assert whole.id == cut.id == "32650_2_-3"
    assert whole.window == Window(200, -300, 100, 100)
    assert cut.window == Window(210, -290, 90, 90)


def test_a_tile_survives_its_row_and_pickling():
    for grid in (UTM, PIXELS):
        tile = tile_at(grid, 0, 1, size=64, extent=Window(0, 0, 100, 50))
        assert Tile.from_row({**tile.to_row(), "sources": "[]"}) == tile
        assert pickle.loads(pickle.dumps(tile)) == tile


@pytest.mark.parametrize(("patch", "stride"), [(64, 48), (64, 64), (96, 32), (40, 26)])
def test_every_pixel_has_its_own_cell_and_full_weight(patch, stride):
    lattice = Lattice(patch, stride)
    window = Window(-70, 35, 131, 77)
    patches = lattice.patches(window)
    cells = np.zeros((77, 131), int)
    weights = np.zeros((77, 131))
    for one in patches:
        part = lattice.cell(one).intersect(window)
        cells[part.slices(window)] += 1
        part = one.intersect(window)
        weights[part.slices(window)] += lattice.weight()[part.slices(one)]
    assert (cells == 1).all()
    assert weights.min() > 0.99


def test_the_lattice_does_not_depend_on_the_window():
    lattice = Lattice(64, 48, offset=-8)
    small, large = set(lattice.patches(Window(90, 90, 10, 10))), set(lattice.patches(Window(-500, -500, 1500, 1500)))
    assert small < large
    assert all((p.col + 8) % 48 == 0 and (p.row + 8) % 48 == 0 for p in large)


def test_the_halo_covers_every_patch():
    lattice = Lattice(64, 48)
    window = Window(13, -7, 100, 60)
    reach = lattice.reach(window)
    assert all(p.intersect(reach) == p for p in lattice.patches(window))


def test_a_small_image_without_georeference_is_one_cell():
    lattice = Lattice.of(PIXELS, 64, 48)
    image = Window(0, 0, 48, 48)
    assert sum(not lattice.cell(p).intersect(image).empty for p in lattice.patches(image)) == 1


def test_a_grid_survives_json():
    for grid in (UTM, PIXELS):
        assert Grid.from_row(json.loads(json.dumps(asdict(grid)))) == grid


def test_a_collection_alone_is_in_the_regions_catalogue():
    placed, bare = Region("demo", catalog="/x/catalog.json"), Region("folder", images="/y")
    assert placed.located("#truth/gpc") == "/x/catalog.json#truth/gpc"
    for region in (placed, bare):
        assert region.located("/z/masks") == "/z/masks"
        assert region.located(None) is None
    with pytest.raises(ConfigError, match="#truth needs a catalogue, but region folder has none"):
        bare.located("#truth")
