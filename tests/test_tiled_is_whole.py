"""The map of a scene is the same pixels and polygons however it is cut: into tiles, into files, or not at all."""

import json

import numpy as np
import pytest
import rasterio
from fake_run import blobs, picture
from small_world import BANDS, GRID, window_at
from tiny_maps import described, mapped

from rayseg.geo.grid import Grid, Window
from rayseg.io import cog
from rayseg.io.rasters import footprint, grids_of, read, source_of_file
from rayseg.stages.read import tile_rows


def same(one, other):
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for grid in one[1]:
        assert np.array_equal(one[1][grid], other[1][grid])
        assert (one[1][grid] != 255).any()
    assert one[2].equals(other[2])


def scene(path, height, width, *, row=0, col=0, crs=True, seed=0, margin=0):
    """Write a scene, or a cut of one: (row, col) is its place in the landscape of this seed."""
    image_CHW = picture(blobs(600, 600, seed=seed), seed=seed)[:, row : row + height, col : col + width]
    valid_HW = np.add.outer(np.arange(row, row + height), np.arange(col, col + width)) >= margin
    grid, where = (GRID, window_at(row, col, height, width)) if crs else (Grid(None, (1.0, 1.0), (0.0, 0.0), "x"), None)
    nodata = {"nodata": 0, "valid_HW": valid_HW} if crs else {}
    cog.write_image(path, image_CHW, grid, where or Window(0, 0, width, height), bands=BANDS, **nodata)
    return source_of_file(str(path), path.stem)


def size_for(sources, count):
    """A side of tiles that cuts the sources into `count` tiles."""
    return next(size for size in range(8, 700) if len(tile_rows(sources, None, size=size, halo=0)) == count)


@pytest.fixture(scope="module")
def strip(tmp_path_factory):
    """A scene of 61 x 397 px whose upper left corner has no data, and its map in one tile."""
    root = tmp_path_factory.mktemp("strip")
    source = scene(root / "strip.tif", 61, 397, margin=30)
    return source, mapped(root / "whole", [source], size=4096)


def test_a_whole_map_is_worth_comparing(strip):
    tiles, found, polygons = strip[1]
    [(classes_HW, scores_HW)] = found.values()
    assert tiles == 1
    assert (classes_HW == 255).sum() == (scores_HW == 255).sum() == 30 * 31 / 2
    assert 0.1 < (classes_HW == 1).mean() < 0.9
    assert len(np.unique(scores_HW)) > 100
    assert len(polygons) > 5


@pytest.mark.parametrize("count", [2, 5])
def test_so_many_tiles_are_one(strip, tmp_path, count):
    source, whole = strip
    cut = mapped(tmp_path, [source], size=size_for([source], count))
    assert cut[0] == count
    same(cut, whole)


def test_forty_tiles_are_one(tmp_path):
    source = scene(tmp_path / "x.tif", 97, 239, margin=40)
    cut = mapped(tmp_path / "cut", [source], size=size_for([source], 40))
    assert cut[0] == 40
    same(cut, mapped(tmp_path / "whole", [source], size=4096))


@pytest.mark.parametrize("patch_stride", [(64, 64), (64, 33), (64, 16)])
def test_patches_that_do_not_overlap_or_overlap_a_lot(strip, tmp_path, patch_stride):
    bundle = described(patch=patch_stride[0], stride=patch_stride[1])
    source, _ = strip
    whole = mapped(tmp_path / "whole", [source], size=4096, bundle=bundle)
    same(mapped(tmp_path / "cut", [source], size=90, bundle=bundle), whole)


@pytest.mark.parametrize("crs", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 131), (131, 1), (23, 37), (64, 64), (97, 101)])
def test_extents_that_nothing_divides_or_smaller_than_a_patch(tmp_path, shape, crs):
    source = scene(tmp_path / "x.tif", *shape, row=5, col=7, crs=crs)
    whole = mapped(tmp_path / "whole", [source], size=4096)
    [(classes_HW, _)] = whole[1].values()
    assert classes_HW.shape == shape
    assert (classes_HW != 255).all()
    for size in (29, 50):
        same(mapped(tmp_path / str(size), [source], size=size), whole)


def test_scenes_that_abut_are_their_mosaic(tmp_path):
    whole = scene(tmp_path / "whole.tif", 150, 170, margin=60)
    cuts = {"a": (0, 0, 80, 90), "b": (0, 90, 80, 80), "c": (80, 0, 70, 90), "d": (80, 90, 70, 80)}
    parts = [
        scene(tmp_path / f"{name}.tif", height, width, row=row, col=col, margin=60)
        for name, (row, col, height, width) in cuts.items()
    ]
    one = mapped(tmp_path / "one", [whole], size=4096)
    for size in (4096, 60):
        same(mapped(tmp_path / f"parts-{size}", parts, size=size), one)
    blind = mapped(tmp_path / "blind", parts, size=60, halo=0)
    with pytest.raises(AssertionError):
        same(blind, one)


@pytest.mark.more  # test_scenes_that_abut_are_their_mosaic, with drawn ones
@pytest.mark.real
def test_four_real_scenes_are_their_mosaic(shared, tmp_path):
    paths = [str(shared / "data" / "rasters" / "rasterio" / f"rgb{i}.tif") for i in range(1, 5)]
    sources = [source_of_file(path, f"rgb{i}") for i, path in enumerate(paths, 1)]
    [(grid, its)] = grids_of(sources)
    window = footprint(its[0], grid)
    for source in its[1:]:
        window = window.union(footprint(source, grid))
    pixels_CHW, valid_HW = read(its, grid, window, bands=BANDS)
    cog.write_image(tmp_path / "mosaic.tif", pixels_CHW, grid, window, bands=BANDS, nodata=0, valid_HW=valid_HW)
    with rasterio.open(shared / "data" / "rasters" / "rasterio" / "RGB.byte.tif") as scene_file:
        assert np.array_equal(scene_file.read(), pixels_CHW)
    bundle = described(patch=128, stride=96)
    one = mapped(tmp_path / "one", [source_of_file(str(tmp_path / "mosaic.tif"), "m")], size=4096, bundle=bundle)
    assert len(one[2]) > 20
    for size in (4096, 300):
        four = mapped(tmp_path / f"four-{size}", sources, size=size, bundle=bundle)
        same(four, one)
        item = json.loads(next((tmp_path / f"four-{size}").glob("*/*.json")).read_text())
        assert {link["rel"] for link in item["links"]} >= {"derived_from"}
