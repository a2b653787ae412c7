"""Plots exported to LabelMe and imported again: a round trip keeps them, and invalid labels are refused by name."""

import json

import geopandas
import numpy as np
import pytest
import shapely
from PIL import Image

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.lonlat import normalised
from rayseg.io import cog, labelme


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((60, 80, 3), 150, np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def exported(tmp_path, images):
    """The folder of JSONs of a table of three plots: one with a hole, one in two parts."""
    holed = shapely.box(5, 5, 45, 45).difference(shapely.box(15, 15, 25, 25))
    parts = shapely.MultiPolygon([shapely.box(50, 5, 60, 15), shapely.box(50, 20, 60, 30)])
    columns = {"class": ["field", "nonfield", None], "image": ["a", "a", "b"]}
    table = geopandas.GeoDataFrame(columns, geometry=[holed, parts, shapely.box(0, 0, 80, 60)])
    table.to_parquet(tmp_path / "plots.parquet")
    assert labelme.export(str(tmp_path), str(images), str(tmp_path / "json")) == 2
    return tmp_path / "json"


def change(path, **values):
    content = json.loads(path.read_text())
    content["shapes"][0] |= values
    path.write_text(json.dumps(content))


def test_the_json_is_what_annotation_tools_expect(exported):
    content = json.loads((exported / "a.json").read_text())
    assert {key: content[key] for key in ("imagePath", "imageData", "imageHeight", "imageWidth")} == {
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": 60,
        "imageWidth": 80,
    }
    shapes = content["shapes"]
    assert [one["label"] for one in shapes] == ["1", "1", "0", "0"]
    assert [one["flags"] for one in shapes] == [{}, {"hole": True}, {}, {}]
    assert [one["group_id"] for one in shapes] == [0, 0, 1, 1]
    assert len(shapes[0]["points"]) == 4


def test_what_goes_out_comes_back_as_crops_by_class(exported, images, tmp_path):
    counts = labelme.load(str(exported), str(images), str(tmp_path / "crops"), size=40)
    assert counts == {"field": 2, "nonfield": 2}
    with Image.open(tmp_path / "crops/field/a-0000.png") as opened:
        crop = np.asarray(opened)
    assert crop.shape == (40, 40, 3)
    assert (crop[1:8, 1:39] == 150).all()
    assert (crop[13:18, 13:18] == 0).all()  # the hole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": [[5, 5], [95, 5], [5, 40]]}, "spans 5, 5, 95, 40, beyond the image of 80 x 60"),
        ({"label": "maybe"}, "has the label 'maybe', expected one of 1, 0, field, nonfield"),
        ({"points": [[5, 5], [9, 9]]}, "polygon of 2 points"),
        ({"shape_type": "circle"}, "is a circle"),
        ({"label": None}, "has the label 'None', expected one of"),
    ],
)
def test_invalid_shapes_are_refused_with_their_place(exported, images, tmp_path, values, message):
    change(exported / "b.json", **values)
    with pytest.raises(DataError, match=message) as refused:
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    assert "b.json: shape 0" in str(refused.value)
    assert not (tmp_path / "crops").exists()


def test_a_ring_that_crosses_itself_becomes_its_parts(exported, images, tmp_path):
    change(exported / "b.json", points=[[10, 10], [40, 40], [40, 10], [10, 40]])
    assert labelme.load(str(exported), str(images), str(tmp_path / "crops")) == {"field": 2, "nonfield": 2}
    [path] = (tmp_path / "crops").glob("*/b-0000.png")
    crop = np.asarray(Image.open(path))
    # Both triangles of the bow tie, left and right, and nothing above and below.
    middle = crop.shape[0] // 2
    assert (crop[middle, [5, -6]] > 0).all()
    assert (crop[[2, -3], middle] == 0).all()


def test_a_shape_without_an_area_is_left_out_and_named(exported, images, tmp_path, caplog):
    change(exported / "b.json", points=[[5, 5], [40, 40], [20, 20]])
    before = labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    assert sum(before.values()) == 3
    assert "b.json: shape 0 has no area, expected a polygon: it is left out" in caplog.text


def test_points_of_a_resized_image_are_scaled_to_the_image(exported, images, tmp_path, caplog):
    content = json.loads((exported / "b.json").read_text())
    whole = labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    for shape in content["shapes"]:
        shape["points"] = [[x * 1000 / 80, y * 1000 / 60] for x, y in shape["points"]]
    (exported / "b.json").write_text(json.dumps(content | {"imageHeight": 1000, "imageWidth": 1000}))
    assert labelme.load(str(exported), str(images), str(tmp_path / "scaled")) == whole
    for path in (tmp_path / "crops").glob("*/b-*.png"):
        same = tmp_path / "scaled" / path.relative_to(tmp_path / "crops")
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(same)))
    assert "b.json is of an image of 1000 x 1000 px" in caplog.text


def test_invalid_files_are_refused(exported, images, tmp_path):
    (exported / "c.json").write_text((exported / "b.json").read_text())
    with pytest.raises(DataError, match=r"b\.json and .*c\.json both belong to the image b"):
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    (exported / "c.json").write_text("{}")
    with pytest.raises(DataError, match="not a LabelMe annotation"):
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    (exported / "c.json").unlink()
    (images / "b.png").unlink()
    with pytest.raises(DataError, match="which is not in"):
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))


def test_images_are_found_by_the_names_that_plots_have_of_them(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("my field.jpg", "other.tif"):
        Image.fromarray(np.full((60, 80, 3), 150, np.uint8)).save(tmp_path / "images" / name)
    columns = {"class": ["field", "field"], "image": ["my-field", "other"]}
    geopandas.GeoDataFrame(columns, geometry=[shapely.box(5, 5, 45, 45)] * 2).to_parquet(tmp_path / "plots.parquet")
    assert labelme.export(str(tmp_path), str(tmp_path / "images"), str(tmp_path / "json")) == 2
    assert json.loads((tmp_path / "json/my-field.json").read_text())["imagePath"] == "my field.jpg"
    counts = labelme.load(str(tmp_path / "json"), str(tmp_path / "images"), str(tmp_path / "crops"))
    assert counts == {"field": 2, "nonfield": 0}
    (tmp_path / "images/other.tif").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 2 images \(other\)"):
        labelme.export(str(tmp_path), str(tmp_path / "images"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    Image.fromarray(np.full((60, 80, 3), 150, np.uint8)).save(tmp_path / "images/my-field.png")
    with pytest.raises(DataError, match="have the same name my-field"):
        labelme.export(str(tmp_path), str(tmp_path / "images"), str(tmp_path / "again"))


def test_only_crops_that_are_written_are_counted(exported, images, tmp_path):
    content = json.loads((exported / "b.json").read_text())
    cut_out = {"flags": {"hole": True}, "group_id": 0}
    content["shapes"] = [content["shapes"][0], content["shapes"][0] | cut_out]
    (exported / "b.json").write_text(json.dumps(content))
    counts = labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    assert counts == {"field": 1, "nonfield": 2}
    assert len(list((tmp_path / "crops").rglob("*.png"))) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": [["left", 5], [9, 9], [5, 9]]}, r"shapes 0 points 0 0, input should be a valid number"),
        ({"points": [[float("nan"), 5], [9, 9], [5, 9]]}, r"shapes 0 points 0 0, input should be a finite number"),
        ({"points": None}, r"shapes 0 points, input should be a valid list"),
        ({"group_id": [1]}, r"shapes 0 group_id"),
        ({"flags": ["hole"]}, r"shapes 0 flags"),
    ],
)
def test_values_of_another_kind_are_refused_with_their_place(exported, images, tmp_path, values, message):
    change(exported / "b.json", **values)
    with pytest.raises(DataError, match=message) as refused:
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    assert "b.json is not a LabelMe annotation" in str(refused.value)


def test_a_json_may_leave_out_how_large_its_image_is_but_not_be_wrong(exported, images, tmp_path):
    content = json.loads((exported / "b.json").read_text())
    (exported / "b.json").write_text(json.dumps(content | {"imageHeight": None, "imageWidth": None}))
    assert labelme.load(str(exported), str(images), str(tmp_path / "crops")) == {"field": 2, "nonfield": 2}
    (exported / "b.json").write_text(json.dumps(content | {"imageHeight": 30}))
    with pytest.raises(DataError, match=r"expects an image of 80 x 30 px, .*b\.png has 80 x 60"):
        labelme.load(str(exported), str(images), str(tmp_path / "more"))


def test_a_later_image_that_is_damaged_leaves_no_crops_of_the_others(exported, images, tmp_path):
    whole = (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    assert not (tmp_path / "crops").exists()
    Image.fromarray(np.full((60, 80), 3000, np.uint16)).save(images / "b.png")
    with pytest.raises(DataError, match=r"b\.png has pixels of mode I;16, expected 8 bits"):
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))


def test_labels_that_a_person_set_are_not_written_over(exported, images, tmp_path):
    words = (str(tmp_path), str(images), str(exported))
    assert labelme.export(*words) == 2  # the same again
    change(exported / "b.json", label="0")
    before = {path.name: path.read_text() for path in exported.iterdir()}
    with pytest.raises(DataError, match=r"b\.json exists and may hold labels"):
        labelme.export(*words)
    assert {path.name: path.read_text() for path in exported.iterdir()} == before


def test_crops_of_earlier_labels_are_not_mixed_with_new_ones(exported, images, tmp_path):
    labelme.load(str(exported), str(images), str(tmp_path / "crops"))
    change(exported / "b.json", label="0")
    with pytest.raises(DataError, match=r"a-0000\.png already exists and may hold other labels"):
        labelme.load(str(exported), str(images), str(tmp_path / "crops"))


def test_a_crop_holds_exactly_the_pixels_of_its_plot(images, tmp_path):
    image = np.random.default_rng(0).integers(1, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(image).save(images / "a.png")
    for left in (10, 11):
        table = geopandas.GeoDataFrame(
            {"class": ["field"], "image": ["a"]}, geometry=[shapely.box(left, 7, left + 20, 27)]
        )
        table.to_parquet(tmp_path / "plots.parquet")
        labelme.export(str(tmp_path), str(images), str(tmp_path / f"json{left}"))
        labelme.load(str(tmp_path / f"json{left}"), str(images), str(tmp_path / f"crops{left}"), size=20)
        with Image.open(tmp_path / f"crops{left}/field/a-0000.png") as opened:
            assert np.array_equal(np.asarray(opened), image[7:27, left : left + 20])


@pytest.fixture
def ground(tmp_path):
    """Two georeferenced images side by side, 60 x 80 px of half a metre, and a table of two plots, one in both."""
    grid = Grid("EPSG:32650", (0.5, 0.5), (0.0, 0.0))
    (tmp_path / "ground").mkdir()
    image = np.random.default_rng(0).integers(1, 256, (3, 60, 160)).astype(np.uint8)
    for name, col in (("west", 0), ("east", 80)):
        where = Window(1_000_000 + col, -8_000_000, 80, 60)
        path = tmp_path / "ground" / f"{name}.tif"
        cog.write_image(path, image[:, :, col : col + 80], grid, where, bands=("red", "green", "blue"))
    corner = (1_000_000 / 2, 8_000_000 / 2)
    boxes = [shapely.box(10, 5, 40, 45).difference(shapely.box(20, 15, 30, 25)), shapely.box(60, 10, 100, 30)]
    placed = [shapely.transform(one, lambda xy: xy * (0.5, -0.5) + corner) for one in boxes]
    columns = {"id": ["a", "b"], "class": ["field", None]}
    table = geopandas.GeoDataFrame(columns, geometry=placed, crs=grid.crs).to_crs("EPSG:4326")
    table.to_parquet(tmp_path / "plots.parquet")
    return tmp_path / "ground", image


def test_plots_on_the_ground_go_out_in_the_pixels_of_each_image_and_come_back(ground, tmp_path):
    images, image_CHW = ground
    assert labelme.export(str(tmp_path), str(images), str(tmp_path / "json")) == 2
    west, east = (json.loads((tmp_path / f"json/{name}.json").read_text()) for name in ("west", "east"))
    boxes = [shapely.Polygon(one["points"]).bounds for one in west["shapes"]]
    assert boxes == [(10, 5, 40, 45), (20, 15, 30, 25), (60, 10, 80, 30)]
    assert [one["flags"] for one in west["shapes"]] == [{}, {"hole": True}, {}]
    assert [shapely.Polygon(one["points"]).bounds for one in east["shapes"]] == [(0, 10, 20, 30)]
    change(tmp_path / "json/east.json", label="0")
    counts = labelme.load(str(tmp_path / "json"), str(images), str(tmp_path / "crops"), size=20)
    assert counts == {"field": 2, "nonfield": 1}
    with Image.open(tmp_path / "crops/nonfield/east-0000.png") as opened:
        assert np.array_equal(np.asarray(opened), image_CHW[:, 10:30, 80:100].transpose(1, 2, 0))


@pytest.mark.parametrize("west", [179.9998, -180.0002, 200.0, -10.0])
def test_plots_go_out_to_images_in_degrees_that_count_on_beyond_180(tmp_path, west):
    grid = Grid("EPSG:4326", (1e-5, 1e-5), (west, -16.0))
    (tmp_path / "images").mkdir()
    image = np.random.default_rng(0).integers(1, 256, (3, 40, 60)).astype(np.uint8)
    cog.write_image(tmp_path / "images/a.tif", image, grid, Window(0, 0, 60, 40), bands=("red", "green", "blue"))
    plot = shapely.box(west + 10e-5, -16 - 30e-5, west + 35e-5, -16 - 5e-5)
    table = geopandas.GeoDataFrame({"class": ["field"]}, geometry=[normalised(plot)], crs="EPSG:4326")
    table.to_parquet(tmp_path / "plots.parquet")
    labelme.export(str(tmp_path), str(tmp_path / "images"), str(tmp_path / "json"))
    shapes = json.loads((tmp_path / "json/a.json").read_text())["shapes"]
    outline = shapely.union_all([shapely.Polygon(one["points"]) for one in shapes])
    assert outline.symmetric_difference(shapely.box(10, 5, 35, 30)).area < 0.1


def test_plots_outside_all_images_are_refused(ground, images, tmp_path):
    folder, _ = ground
    for given, message in ((images, "2 of the 2 plots are outside all images"), (folder, "1 of the 2 plots")):
        (folder / "west.tif").unlink(missing_ok=True)
        with pytest.raises(DataError, match=message):
            labelme.export(str(tmp_path), str(given), str(tmp_path / "json"))
    assert not (tmp_path / "json").exists()


@pytest.mark.parametrize("path", ["..\\images\\b.png", "C:\\fields\\b.png", "../images/b.png"])
def test_images_are_named_as_any_system_writes_paths(exported, images, tmp_path, path):
    content = json.loads((exported / "b.json").read_text())
    (exported / "b.json").write_text(json.dumps(content | {"imagePath": path}))
    assert labelme.load(str(exported), str(images), str(tmp_path / "crops")) == {"field": 2, "nonfield": 2}
