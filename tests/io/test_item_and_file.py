"""Items that contradict their files: such a scene is lost alone and with both named, whatever the field is."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.warp import transform_bounds
from shapely.geometry import box, mapping
from small_world import rayseg, segmenter

from rayseg.errors import DataError
from rayseg.io.rasters import footprint, grids_of, read
from rayseg.io.sources import Source
from rayseg.io.stac_read import open_items, source_of

PLACES = {  # south, north, and in degrees
    "EPSG:32718": Affine(10, 0, 400_000, 0, -10, 8_000_000),
    "EPSG:32633": Affine(2.5, 0, 500_000, 0, -2.5, 5_000_000),
    "EPSG:4326": Affine(1e-4, 0, 25, 0, -1e-4, -30),
}


def image(path, crs="EPSG:32718", *, size=(24, 32), dtype="uint8", affine=None, count=3, **tags):
    height, width = size
    place = {"crs": crs, "transform": affine or PLACES[crs]}
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=dtype, **place) as file:
        file.write(np.random.default_rng(1).integers(1, 250, (count, height, width)).astype(dtype))
        if tags:
            file.scales, file.offsets = (tags["scale"],) * count, (tags["offset"],) * count
        return [*transform_bounds(file.crs, "EPSG:4326", *file.bounds)], list(file.bounds), list(file.transform)[:6]


def item(name, bbox, *, crs, fields, dtype="uint8", hrefs=("a.tif",), names=("red", "green", "blue"), **more):
    bands = [{"name": name, "data_type": dtype} for name in names]
    assets = {
        Path(href).stem: {"href": f"./{href}", "type": "image/tiff; application=geotiff", "roles": ["data"]}
        | ({"bands": bands} if len(hrefs) == 1 else {"data_type": dtype})
        for href in hrefs
    }
    properties = {"datetime": "2024-05-01T00:00:00Z", "proj:code": crs, **fields}
    return {
        "type": "Feature", "stac_version": "1.1.0", "id": name, "geometry": mapping(box(*bbox)), "bbox": bbox,
        "properties": properties, "links": [], "assets": assets, **more,
    }  # fmt: skip


def catalogue(folder, *rows):
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    return folder / "items.json"


def pixels(source, bands=None):
    [(grid, _)] = grids_of([source])
    return read([source], grid, footprint(source, grid), bands=bands or source.bands)[0]


def shifted(values, by):
    return [*values[:2], values[2] + by, *values[3:]]


@pytest.mark.parametrize("crs", list(PLACES))
@pytest.mark.parametrize("wrong", ["none", "code", "transform", "bbox", "shape", "resolution"])
def test_an_item_that_contradicts_its_file_is_refused_with_both(tmp_path, crs, wrong):
    bbox, bounds, affine = image(tmp_path / "a.tif", crs)
    step = affine[0]
    other = {"EPSG:32718": "EPSG:32719", "EPSG:32633": "EPSG:32733", "EPSG:4326": "EPSG:32735"}[crs]
    fields = {
        "none": {"proj:transform": affine, "proj:shape": [24, 32]},
        "code": {"proj:transform": affine, "proj:shape": [24, 32]},
        "transform": {"proj:transform": shifted(affine, 3 * step), "proj:shape": [24, 32]},
        "bbox": {"proj:bbox": [bounds[0], bounds[1], bounds[2], bounds[3] + 2 * 24 * step], "proj:shape": [24, 32]},
        "shape": {"proj:transform": affine, "proj:shape": [32, 24]},
        "resolution": {"proj:bbox": bounds, "proj:shape": [48, 64]},
    }[wrong]
    row = item("s", bbox, crs=other if wrong == "code" else crs, fields=fields)
    [found] = open_items(str(catalogue(tmp_path, row)))
    source = source_of(found)
    if wrong == "none":
        assert pixels(source).shape == (3, 24, 32)
    else:
        with pytest.raises(DataError, match=r"a\.tif has .*, its item s states .*; correct proj:code"):
            pixels(source)


def test_the_other_scenes_of_a_run_are_mapped_and_the_command_names_the_wrong_one(tmp_path):
    model = segmenter(tmp_path / "model")
    rows = []
    for number, name in enumerate(("good", "bad")):
        affine = PLACES["EPSG:32718"] @ Affine.translation(64 * number, 0)
        bbox, _, stored = image(tmp_path / f"{name}.tif", size=(64, 64), affine=affine)
        fields = {"proj:transform": shifted(stored, 5000.0 * number), "proj:shape": [64, 64]}
        rows.append(item(name, bbox, crs="EPSG:32718", fields=fields, hrefs=(f"{name}.tif",)))
    run = tmp_path / "run"
    found = rayseg("predict", model, catalogue(tmp_path, *rows), "--out", run, "--engine", "inline")
    assert found.exit_code == 3
    assert "bad.tif has 64 x 64 px in EPSG:32718 within [400640, 7999360, 401280, 8000000]" in found.output.replace(
        "\n", " "
    )
    [tile] = run.glob("tiles/*/classes.tif")
    with rasterio.open(tile) as file:
        assert file.bounds.left == 400_000
        mapped_HW = file.read(1) != 255
    assert mapped_HW[:, :64].all()
    assert not mapped_HW[:, 64:].any()


def test_files_of_an_item_are_compared_with_the_place_stated_of_each(tmp_path):
    bbox, _, fine = image(tmp_path / "fine.tif", count=1)
    _, _, wide = image(tmp_path / "wide.tif", count=1, size=(48, 64), affine=PLACES["EPSG:32718"] @ Affine.scale(2))
    row = item("s", bbox, crs="EPSG:32718", fields={}, hrefs=("fine.tif", "wide.tif"))
    row["assets"]["fine"] |= {"proj:transform": fine, "proj:shape": [24, 32]}
    row["assets"]["wide"] |= {"proj:transform": wide, "proj:shape": [48, 64]}
    [found] = open_items(str(catalogue(tmp_path, row)))
    source = source_of(found)
    assert Source.from_row(json.loads(json.dumps(source.to_row()))) == source
    assert pixels(source, ["fine", "wide"]).shape == (2, 24, 32)
    row["assets"]["wide"]["proj:transform"] = shifted(wide, -900)
    [found] = open_items(str(catalogue(tmp_path, row)))
    assert pixels(source_of(found), ["fine"]).shape == (1, 24, 32)
    with pytest.raises(DataError, match=r"wide\.tif has 48 x 64 px"):
        pixels(source_of(found), ["wide"])


def test_bands_of_several_resolutions_over_the_same_ground_keep_one_place(tmp_path):
    bbox, _, fine = image(tmp_path / "fine.tif", count=1)
    affine = PLACES["EPSG:32718"] @ Affine.scale(2)
    _, _, coarse = image(tmp_path / "coarse.tif", count=1, size=(12, 16), affine=affine)
    row = item("s", bbox, crs="EPSG:32718", fields={}, hrefs=("fine.tif", "coarse.tif"))
    row["assets"]["fine"] |= {"proj:transform": fine, "proj:shape": [24, 32]}
    row["assets"]["coarse"] |= {"proj:transform": coarse, "proj:shape": [12, 16]}
    source = source_of(open_items(str(catalogue(tmp_path, row)))[0])
    assert "frames" not in source.to_row()
    assert "frames" not in repr(source)  # checkpoints of trainings name their images by repr: they resume
    assert pixels(source, ["fine", "coarse"]).shape == (2, 24, 32)


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"), [("uint16", 1e-4, -0.1), ("int16", 0.01, 0.0), ("float32", 1.0, 273.0)]
)
def test_units_that_only_the_file_states_are_not_read_as_stored_values(tmp_path, dtype, scale, offset):
    bbox, _, affine = image(tmp_path / "a.tif", dtype=dtype, scale=scale, offset=offset)
    fields = {"proj:transform": affine, "proj:shape": [24, 32]}
    silent = item("s", bbox, crs="EPSG:32718", fields=fields, dtype=dtype)
    source = source_of(open_items(str(catalogue(tmp_path, silent)))[0])
    with pytest.raises(DataError, match=rf"a\.tif has values stored x {scale:g} \+ offset {offset:g}, its item s"):
        pixels(source)
    stated = item(
        "s", bbox, crs="EPSG:32718", fields={**fields, "raster:scale": scale, "raster:offset": offset}, dtype=dtype
    )
    source = source_of(open_items(str(catalogue(tmp_path, stated)))[0])
    assert source.units == ((scale, offset),) * 3
    assert pixels(source).dtype == dtype


def of_two_files(folder, *, first, crs="EPSG:32718", **stated):
    """An item that states nothing of its files' frames: `a` of 20 m or in degrees, `b` of 10 m."""
    if crs == "EPSG:4326":
        image(folder / "a.tif", crs, size=(12, 16), affine=Affine(0.001, 0, -75.95, 0, -0.001, -18.0), count=1)
    else:
        image(folder / "a.tif", crs, size=(12, 16), affine=PLACES[crs] @ Affine.scale(2), count=1)
    image(folder / "b.tif", "EPSG:32718", count=1)
    assets = {
        key: {"href": f"./{key}.tif", "type": "image/tiff", "roles": ["data"], "eo:bands": [{"name": key}], **more}
        for key, more in sorted({"a": stated.get("a", {}), "b": stated.get("b", {})}.items(), reverse=first == "b")
    }
    row = item("x", [-76, -18.1, -75.9, -18], crs=None, fields={}, assets=assets)
    [read] = open_items(str(catalogue(folder, row)))
    return source_of(read)


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize(
    "more", [{}, {"a": {"gsd": 20}, "b": {"gsd": 10}}, {"b": {"proj:code": "EPSG:32718"}}, {"crs": "EPSG:4326"}]
)
def test_the_finest_file_gives_the_grid_whatever_the_order_of_assets_that_state_no_frame(tmp_path, first, more):
    source = of_two_files(tmp_path, first=first, **more)
    assert (source.height, source.width, source.crs) == (24, 32, "EPSG:32718")
    assert source.transform[:6] == tuple(PLACES["EPSG:32718"])[:6]


@pytest.mark.parametrize("rows", [{}, {"bands": [{"name": "B04"}]}])
def test_a_single_band_may_have_its_name_on_the_asset(tmp_path, rows):
    source = of_two_files(tmp_path, first="a", a={"eo:bands": [], "eo:common_name": "red", **rows}, b={"eo:bands": []})
    assert source.bands == ("red", "b")
