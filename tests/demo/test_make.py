"""The demo region: its layout, labels that agree with its reference data, and no partial demo in the cache."""

import os
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from rasterio.features import geometry_mask
from rasterio.windows import from_bounds

from rayseg.demo import make
from rayseg.errors import ConfigError
from rayseg.io.masks import masks_of
from rayseg.io.rasters import footprint, grids_of, read
from rayseg.io.stac_read import open_items, source_of

CHIPS = (7, 6)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make.ensure(size=512, chips=CHIPS)


def pixels(item, key="image"):
    with rasterio.open(item.assets[key].get_absolute_href()) as dataset:
        return dataset.read(), dataset.bounds


def test_the_same_seed_writes_the_same_bytes(catalog, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSEG_CACHE", str(tmp_path))
    first, second = Path(catalog).parent, Path(make.ensure(size=512, chips=CHIPS)).parent
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_second_call_draws_nothing(catalog, monkeypatch):
    monkeypatch.setenv("RAYSEG_CACHE", str(Path(catalog).parents[1]))
    monkeypatch.setattr(make, "plan", lambda **_: pytest.fail("drawn again"))
    assert make.ensure(size=512, chips=CHIPS) == catalog


def test_scenes_abut_on_one_grid_and_share_the_rows_where_they_meet(catalog):
    sources = [source_of(item) for item in open_items(catalog, "imagery")]
    [(grid, both)] = grids_of(sources)
    west, east = sorted((footprint(source, grid) for source in both), key=lambda window: window.col)
    assert (west.col1, west.row, west.height, west.width) == (east.col, east.row, 512, 512)
    _, valid_HW = read(both, grid, west.union(east), bands=["red", "green", "blue"])
    assert np.array_equal(valid_HW[:, 511], valid_HW[:, 512])
    assert valid_HW[100:400, 500:524].all()


def test_the_margin_is_nodata_and_nothing_else_is(catalog):
    truth = {item.id: item for item in open_items(catalog, "truth")}
    scenes = open_items(catalog, "imagery")
    assert {item.id for item in scenes} == {"demo-west", "demo-east"}
    for item in scenes:
        image_CHW, _ = pixels(item)
        seen_HW = image_CHW.any(axis=0)
        outer = seen_HW[:, 0] if item.id == "demo-west" else seen_HW[:, -1]
        assert not outer.any()
        assert not seen_HW[0].any()
        assert not seen_HW[-1].any()
        assert 0.9 < seen_HW.mean() < 0.97
        for key in ("gpc", "landcover"):
            assert np.array_equal(pixels(truth[item.id.replace("demo", "truth")], key)[0][0] == 255, ~seen_HW)


def test_chips_are_balanced_over_both_scenes_and_whole(catalog):
    chips = open_items(catalog, "chips")
    labels = [(chip.properties["rayseg:label"], chip.id.split("-")[1]) for chip in chips]
    counts = {key: labels.count(key) for key in set(labels)}
    assert counts == {("gpc", "west"): 4, ("gpc", "east"): 3, ("nongpc", "west"): 3, ("nongpc", "east"): 3}
    for chip in chips:
        image_CHW, _ = pixels(chip)
        assert image_CHW.shape == (3, 128, 128)
        assert image_CHW.any(axis=0).all()


def test_a_chip_is_cut_from_its_scene_and_its_label_agrees_with_the_truth(catalog):
    items = {item.id: item for name in ("imagery", "truth") for item in open_items(catalog, name)}
    chips = open_items(catalog, "chips")
    assert len(chips) == 13
    for chip in chips:
        image_CHW, bounds = pixels(chip)
        name = chip.id.split("-")[1]
        for item, key in ((items[f"demo-{name}"], "image"), (items[f"truth-{name}"], "gpc")):
            with rasterio.open(item.assets[key].get_absolute_href()) as dataset:
                part_CHW = dataset.read(window=from_bounds(*bounds, transform=dataset.transform))
            if key == "image":
                assert np.array_equal(part_CHW, image_CHW)
        share = np.mean(part_CHW == 1)
        assert 0.05 <= share <= 0.6 if chip.properties["rayseg:label"] == "gpc" else share == 0


def test_chips_without_netting_hold_its_colours(catalog):
    shares = {"gpc": [], "nongpc": []}
    for chip in open_items(catalog, "chips"):
        red, green, blue = pixels(chip)[0].astype(int)
        shares[chip.properties["rayseg:label"]].append(np.mean((green + blue - 2 * red > 40) & (green > blue - 12)))
    assert np.mean(np.array(shares["nongpc"]) > 0.01) >= 1 / 3
    assert max(shares["nongpc"]) > np.median(shares["gpc"])


def test_masks_name_their_classes(catalog):
    for key, values in (("gpc", {0, 1}), ("landcover", set(range(7)))):
        masks = masks_of(f"{catalog}#truth/{key}")
        assert len(masks) == 2
        for mask in masks:
            with rasterio.open(mask.assets[0][0]) as dataset:
                assert set(np.unique(dataset.read())) == values | {255}
    names = [
        row["name"] for row in open_items(catalog, "truth")[0].assets["gpc"].extra_fields["classification:classes"]
    ]
    assert names == ["background", "gpc", "nodata"]


def test_farm_plots_lie_on_farmland(catalog):
    truth = {item.id: item for item in open_items(catalog, "truth")}
    plots = gpd.read_parquet(truth["truth-plots"].assets["plots"].get_absolute_href())
    assert plots.crs.to_epsg() == 32650
    assert plots["plot"].is_unique
    assert plots["cultivated"].any()
    again = gpd.read_file(truth["truth-plots"].assets["plots_geojson"].get_absolute_href())
    assert again.crs.to_epsg() == 4326
    assert list(again["plot"]) == list(plots["plot"])
    shares = []
    with rasterio.open(truth["truth-west"].assets["landcover"].get_absolute_href()) as dataset:
        cover_HW = dataset.read(1)
        for polygon in plots.geometry[plots["cultivated"]]:
            inside_HW = geometry_mask([polygon], cover_HW.shape, dataset.transform, invert=True)
            if inside_HW.sum() > 500:
                shares.append(np.mean(cover_HW[inside_HW] == 1))
    assert len(shares) >= 2
    assert np.median(shares) > 0.95


def test_a_broken_generation_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSEG_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(make, "_farm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make.ensure(size=512, chips=(2, 2))
    assert list(tmp_path.iterdir()) == []
    killed = tmp_path / ".demo-v1-512-7-2x2.abc"
    killed.mkdir()
    os.utime(killed, (0, 0))
    assert Path(make.ensure(size=512, chips=(2, 2))).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["demo-v1-512-7-2x2"]


def test_the_slower_of_two_processes_keeps_the_faster_ones_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSEG_CACHE", str(tmp_path))

    def build_while_another_finishes(folder, **_):
        for place, name in ((folder, "slow"), (tmp_path / "demo-v1-512-7-2x2", "fast")):
            place.mkdir()
            (place / "catalog.json").write_text(name)

    monkeypatch.setattr(make, "_build", build_while_another_finishes)
    assert Path(make.ensure(size=512, chips=(2, 2))).read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["demo-v1-512-7-2x2"]


@pytest.mark.parametrize(("size", "chips"), [(256, (4, 4)), (512, (4000, 4))])
def test_what_has_no_room_is_refused(tmp_path, monkeypatch, size, chips):
    monkeypatch.setenv("RAYSEG_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"512|room for"):
        make.ensure(size=size, chips=chips)
