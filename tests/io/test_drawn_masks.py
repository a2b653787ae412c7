"""Shapes drawn by people become the masks that training and evaluation read."""

import json

import numpy as np
import pytest
from PIL import Image
from small_world import rayseg, refused

from rayseg.errors import DataError
from rayseg.io import drawn_masks, masks
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((3, "water", (0, 0, 255)), (5, "road", (90, 90, 90))))


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (20, 10), (60, 90, 40)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def box(label, left, top, right, bottom, **more):
    points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"label": label, "points": points, "shape_type": "polygon", **more}


def labelme(folder, name, *shapes):
    folder.mkdir(exist_ok=True)
    content = {"shapes": shapes, "imagePath": f"..\\images\\{name}.png", "imageHeight": 10, "imageWidth": 20}
    (folder / f"{name}.json").write_text(json.dumps(content))


def read(path):
    return np.array(Image.open(path))


def test_later_shapes_lie_over_earlier_ones_and_holes_are_left_out(tmp_path, images):
    hole = box("water", 2, 2, 4, 4, group_id=1, flags={"hole": True})
    labelme(tmp_path / "json", "a", hole, box("water", 0, 0, 10, 10, group_id=1), box("road", 8, 0, 12, 10))
    said = rayseg("labels", "masks", tmp_path / "json", images, "--out", tmp_path / "masks")
    assert said.stdout.strip() == f"{tmp_path}/masks: background 84 px, road 40 px, water 76 px"
    expected = np.zeros((10, 20), np.uint8)
    expected[:, :10] = 2
    expected[2:4, 2:4] = 0
    expected[:, 8:12] = 1
    np.testing.assert_array_equal(read(tmp_path / "masks/a.tif"), expected)
    assert not (tmp_path / "masks/b.tif").exists()  # nobody drew on it
    [mask] = masks.masks_of(str(tmp_path / "masks"))
    assert masks.table_of(mask.assets[0][0]).names == ("background", "road", "water")


def test_coco_gives_the_same_masks_and_pixels_outside_are_not_labelled_without_a_background(tmp_path, images):
    mask_HW = np.zeros((10, 20), bool)
    mask_HW[1:3, 5:9] = True
    flat = mask_HW.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    counts = np.diff([0, *edges, flat.size]).tolist()
    content = {
        "images": [{"id": 7, "file_name": "images/a.png"}],
        "categories": [{"id": 1, "name": "water"}, {"id": 2, "name": "road"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 10, 0, 10], [6, 6, 8, 6, 8, 8, 6, 8]]},
            {"image_id": 7, "category_id": 2, "segmentation": {"size": [10, 20], "counts": counts}},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    drawn_masks.write_masks(str(tmp_path / "coco.json"), str(images), str(tmp_path / "masks"), table=TABLE)
    expected = np.full((10, 20), 255, np.uint8)
    expected[:, :4], expected[6:8, 6:8], expected[mask_HW] = 3, 3, 5
    np.testing.assert_array_equal(read(tmp_path / "masks/a.tif"), expected)
    content["annotations"][1]["segmentation"]["counts"] = "eg1"
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="compressed RLE"):
        drawn_masks.write_masks(str(tmp_path / "coco.json"), str(images), str(tmp_path / "masks"))


def test_shapes_that_fit_nothing_are_refused_before_anything_is_written(tmp_path, images):
    labelme(tmp_path / "json", "c", box("water", 0, 0, 1, 1))
    assert "has shapes of c" in refused(3, "labels", "masks", tmp_path / "json", images, "--out", tmp_path / "masks")
    (tmp_path / "json/c.json").unlink()
    labelme(tmp_path / "json", "a", box("tree", 0, 0, 1, 1))
    with pytest.raises(DataError, match="has the labels tree, the classes are water, road"):
        drawn_masks.write_masks(str(tmp_path / "json"), str(images), str(tmp_path / "masks"), table=TABLE)
    labelme(tmp_path / "json", "a", {"label": "water", "points": [[1, 1], [2, 2]], "shape_type": "rectangle"})
    with pytest.raises(DataError, match="expected polygons"):
        drawn_masks.write_masks(str(tmp_path / "json"), str(images), str(tmp_path / "masks"))
    assert not (tmp_path / "masks").exists()


def test_no_shape_and_no_image_is_lost(tmp_path, images):
    labelme(tmp_path / "json", "a", box("water", 0, 0, 1, 1))
    (tmp_path / "json/again.json").write_bytes((tmp_path / "json/a.json").read_bytes())
    assert "several JSONs or images called a;" in refused(
        3, "labels", "masks", tmp_path / "json", images, "--out", tmp_path / "masks"
    )
    (tmp_path / "json/again.json").unlink()
    content = {"images": [{"id": 1, "file_name": "x/a.png"}, {"id": 2, "file_name": "y/a.png"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content | {"categories": [], "annotations": []}))
    with pytest.raises(DataError, match="several JSONs or images called a;"):
        drawn_masks.write_masks(str(tmp_path / "coco.json"), str(images), str(tmp_path / "masks"))
    (images / "a.png").unlink()
    Image.new("RGB", (20, 10)).save(images / "a.tif")
    before = (images / "a.tif").read_bytes()
    assert "would replace the image" in refused(3, "labels", "masks", tmp_path / "json", images, "--out", images)
    assert (images / "a.tif").read_bytes() == before


def test_points_of_a_resized_image_are_scaled_and_a_shape_outside_is_named(tmp_path, images, caplog):
    labelme(tmp_path / "json", "a", box("water", 0, 0, 50, 50), box("road", 300, 0, 310, 10))
    path = tmp_path / "json/a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imageHeight": 100, "imageWidth": 200}))
    counts = drawn_masks.write_masks(str(tmp_path / "json"), str(images), str(tmp_path / "masks"))
    assert counts == {"background": 175, "road": 0, "water": 25}
    assert (read(tmp_path / "masks/a.tif")[:5, :5] == 2).all()
    scaled, outside = (record.getMessage() for record in caplog.records)
    assert "a.json is of an image of 200 x 100 px" in scaled
    assert "a.json: shape 1 (road) covers nothing of" in outside
    labelme(tmp_path / "json", "b", box("road", 0, 0, 1, 1))
    path = tmp_path / "json/b.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imageWidth": 99}))
    with pytest.raises(DataError, match="another shape"):
        drawn_masks.write_masks(str(tmp_path / "json"), str(images), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()  # not even the mask of a


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"category_id": 9}, "annotation 4 has the unknown category id 9, expected one of 1;"),
        ({"image_id": 8}, "annotation 4 has the unknown image id 8, expected one of 7;"),
        ({"segmentation": []}, "annotation 4 has no segmentation, a box alone is no outline;"),
        ({"segmentation": [[0, 0, 4, 0, 4, 10, 0]]}, "annotation 4 has a segmentation that is neither polygons"),
        ({"segmentation": {"size": [10, 20], "counts": [3, 4]}}, "an RLE of 7 px, its size is 10 x 20;"),
        ({"segmentation": {"size": [5, 1], "counts": [1, 4]}}, "annotation 4: its mask has"),
    ],
)
def test_what_a_coco_file_lacks_is_one_sentence(tmp_path, images, changed, said):
    row = {"id": 4, "image_id": 7, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 10]], "bbox": [0, 0, 4, 10]}
    content = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "water"}],
        "annotations": [row | changed],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        drawn_masks.write_masks(str(tmp_path / "coco.json"), str(images), str(tmp_path / "masks"))
    assert not (tmp_path / "masks").exists()


def test_a_folder_of_jsons_where_masks_are_expected_names_the_command(tmp_path):
    labelme(tmp_path / "json", "a")
    with pytest.raises(DataError, match="rayseg labels masks"):
        masks.masks_of(str(tmp_path / "json"))
