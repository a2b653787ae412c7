"""Masks of two values: 0 and 255 are two classes unless the table or the file says that 255 is not labelled."""

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from affine import Affine
from fake_run import make, picture
from PIL import Image
from small_world import damage
from typer.testing import CliRunner

from rayseg.cli import app
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io import annotation_requests, class_tables, cog, labels, scenes
from rayseg.io.label_names import assign
from rayseg.io.masks import masks_of, only_0_and_255, pixels_of, read_classes, two_classes
from rayseg.io.output_grids import footprint
from rayseg.io.rasters import source_of_file
from rayseg.steps import evaluate
from rayseg.vision.color import ClassTable, label_table

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
TABLE = ClassTable(((0, "land", (9, 9, 9)), (1, "water", (0, 0, 255))))
SHAPE_HW = np.add.outer(np.arange(20), np.arange(30)) > 24


def mask_file(path, values_HW, *, dtype="uint8", nodata=None):
    path.parent.mkdir(exist_ok=True)
    place = {"crs": "EPSG:32719", "transform": Affine(20, 0, 400_000, 0, -20, 6_000_000)}
    shape = {"count": 1, "height": values_HW.shape[0], "width": values_HW.shape[1]}
    with rasterio.open(path, "w", driver="GTiff", dtype=dtype, nodata=nodata, **shape, **place) as file:
        file.write(values_HW.astype(dtype), 1)


def classes_of(folder, table):
    found = two_classes(masks_of(str(folder)), table, str(folder))
    return [read_classes([one], pixels_of(one), Window(0, 0, one.width, one.height), table) for one in found]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_0_and_255_are_two_classes_and_the_log_says_so(tmp_path, dtype, caplog):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * 255, dtype=dtype)
    mask_file(tmp_path / "m" / "b.tif", np.full((8, 8), 255), dtype=dtype)
    with caplog.at_level(logging.WARNING):
        one, other = classes_of(tmp_path / "m", TABLE)
    assert (one == SHAPE_HW).all()
    assert (other == 1).all()
    assert "hold only 0 and 255: 0 is read as land, 255 as water; if 255 means not labelled" in caplog.text


def test_black_and_white_of_the_table_name_their_classes(tmp_path):
    Image.fromarray(SHAPE_HW.astype(np.uint8) * 255).save(tmp_path / "a.png")
    [one] = classes_of(tmp_path, ClassTable(((0, "roof", WHITE), (1, "rest", BLACK))))
    assert (one == ~SHAPE_HW).all()
    [one] = classes_of(tmp_path, ClassTable(((4, "rest", BLACK), (7, "roof", WHITE))))
    assert (one == np.where(SHAPE_HW, 7, 4)).all()


@pytest.mark.parametrize("kind", ["third value", "in another file", "ignored", "nodata", "three classes"])
def test_255_stays_not_labelled_where_something_tells_so(tmp_path, kind):
    values_HW, table = SHAPE_HW * 255, TABLE
    if kind == "third value":
        values_HW[0, 0] = 1
    elif kind == "in another file":
        mask_file(tmp_path / "m" / "z.tif", np.array([[0, 1], [255, 1]]))
    elif kind == "ignored":
        table = ClassTable(TABLE.classes, ignore=(WHITE,))
    elif kind == "three classes":
        table = ClassTable((*TABLE.classes, (2, "wood", (0, 255, 0))))
    mask_file(tmp_path / "m" / "a.tif", values_HW, nodata=255 if kind == "nodata" else None)
    found = classes_of(tmp_path / "m", table)[0]
    assert (found[SHAPE_HW & (values_HW != 1)] == 255).all()
    assert (found[~SHAPE_HW] == values_HW[~SHAPE_HW]).all()


def test_masks_with_stored_class_names_are_read_as_they_are(tmp_path):

    grid = Grid("EPSG:32719", (20.0, 20.0), (0.0, 0.0))
    values_HW = np.where(SHAPE_HW, 255, 0).astype(np.uint8)
    cog.write_classes(tmp_path / "a.tif", values_HW, grid, Window(0, 0, 30, 20), TABLE)
    assert not only_0_and_255(masks_of(str(tmp_path)))


def test_masks_that_name_their_classes_are_read_by_name(tmp_path):
    values = np.array([[0, 3, 255]], np.uint8)
    own = ClassTable(((0, "soil", (9, 9, 9)), (3, "wood", (50, 170, 80))))
    cog.write_classes(tmp_path / "a.tif", values, Grid(None, (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 3, 1), own)
    rows = [
        {"name": name, "color": color} for name, color in (("wood", "#32AA50"), ("soil", "#090909"), ("x", "#010101"))
    ]
    table = ClassTable.from_config({"classes": rows, "ignore": [7]})
    np.testing.assert_array_equal(classes_of(tmp_path, table), [[[1, 0, 255]]])
    # another table that has not all of the names: by value
    np.testing.assert_array_equal(
        classes_of(tmp_path, replace(own, classes=((0, "a", (9, 9, 9)), (3, "b", (1, 1, 1))))), [values]
    )


def test_masks_of_other_values_are_numbered_as_the_map_is_and_compared_with_it(tmp_path):
    """A map of 0 and 1 against masks of 1 and 4 in which 0 means not labelled."""
    (tmp_path / "map").mkdir(), (tmp_path / "masks").mkdir()
    rows = [{"name": "tree", "color": "#1E7B1E", "value": 1}, {"name": "water", "color": "#2060C0", "value": 4}]
    (tmp_path / "classes.yaml").write_text(json.dumps({"classes": rows, "ignore": [0]}))
    truth = np.repeat(np.array([0, 1, 4, 4], np.uint8), 20).reshape(8, 10)
    mapped = np.where(truth == 4, 1, 0).astype(np.uint8)
    mapped[7, :5] = 0  # 5 of 40 px of water
    mask_file(tmp_path / "masks/a.tif", truth)
    table = class_tables.read_table(str(tmp_path / "classes.yaml"))
    cog.write_classes(tmp_path / "map/a.tif", mapped, Grid(None, (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 10, 8), table)
    found = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "masks"), classes=str(tmp_path / "classes.yaml"))
    assert found["confusion"] == [[20, 0], [5, 35]]


def test_labelled_scenes_learn_both_classes_of_0_255_masks(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for seed in (1, 2):
        image = np.random.default_rng(seed).integers(1, 255, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{seed}.png")
        Image.fromarray(SHAPE_HW.astype(np.uint8) * 255).save(tmp_path / "masks" / f"{seed}.png")
    found = scenes.labelled_images(str(tmp_path), table=TABLE)
    stored = [scenes.LabelledImage.from_row(json.loads(json.dumps(one.to_row()))) for one in found]
    assert stored == found
    for one in stored:
        _, classes_HW = scenes.read_window(one, one.window, bands=("red", "green", "blue"), table=TABLE)
        assert (classes_HW == SHAPE_HW).all()
        assert scenes.count_classes(one, TABLE, cell=64).tolist() == [[[int((~SHAPE_HW).sum()), int(SHAPE_HW.sum())]]]


def test_evaluate_counts_a_wrong_eighth_of_0_255_masks(tmp_path):
    wrong_HW = SHAPE_HW.copy()
    wrong_HW[:5] ^= True
    for name, values_HW in (("truth", SHAPE_HW * 255), ("map", wrong_HW * 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(values_HW.astype(np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "classes.yaml").write_text("classes: [{name: land, color: '#090909'}, {name: water, color: '#0000FF'}]")
    found = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=str(tmp_path / "classes.yaml"))
    assert found["pixels"] == 600
    assert found["overall"]["overall_accuracy"]["value"] == pytest.approx(0.75)


def test_drawn_masks_of_0_and_255_alone_are_not_imported(tmp_path):
    run = tmp_path / "run" / "to-label"
    run.mkdir(parents=True)
    classes = [{"value": value, "name": name, "color": list(color)} for value, name, color in TABLE.classes]
    masks = {"classes": classes, "ignore": [], "threshold": None}
    (run / "request.json").write_text(json.dumps({"chips": {"c": [20, 30]}, "masks": masks, "rows": [{"id": "c"}]}))
    (tmp_path / "drawn").mkdir()
    Image.fromarray(SHAPE_HW.astype(np.uint8) * 255).save(tmp_path / "drawn" / "c.png")
    with pytest.raises(DataError, match=r"hold only 0 and 255, which leaves pixels open; .* \(0 land, 1 water\)"):
        annotation_requests.load(tmp_path / "drawn", str(tmp_path / "run"))


# -- parts of images without georeference ------------------------------------------------------------------------------

PHOTO_HW = np.random.default_rng(3).integers(0, 3, (150, 200)).astype(np.uint8)


@pytest.fixture
def labelled_run(tmp_path):
    """A run of unnamed labels on two photos, in tiles of 64 px; label 2 of photo a is never written in one tile."""
    images = {
        "a": (picture(PHOTO_HW % 2), PHOTO_HW, (0, 0)),
        "b": (picture(PHOTO_HW.T % 2, seed=2), PHOTO_HW.T.copy(), (0, 0)),
    }
    make(tmp_path / "run", images, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)), table=label_table(3))
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    described["config"]["shared"] = True
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    (tmp_path / "names.csv").write_text("label,class\n0,land\n1,water\n2,land\n")
    assign(str(tmp_path / "run"), str(tmp_path / "names.csv"), str(tmp_path / "named"))
    return tmp_path


def test_tiles_of_photos_lie_where_they_are_and_make_one_mosaic(labelled_run):
    files = sorted((labelled_run / "run" / "tiles").glob("a_px_*/classes.tif"))
    assert len(files) == 12
    mosaic_HW = np.full((150, 200), 255, np.uint8)
    for path in files:
        with rasterio.open(path) as tile:
            col, row = (round(value) for value in ~Affine(1, 0, 0, 0, -1, 0) @ (tile.transform.c, tile.transform.f))
            mosaic_HW[row : row + tile.height, col : col + tile.width] = tile.read(1)
    assert (mosaic_HW == PHOTO_HW).all()


def test_masks_made_from_photos_are_the_truth_of_maps_of_them(labelled_run):
    named = f"{labelled_run / 'named' / 'catalog.json'}#classes"
    wrong_HW = (PHOTO_HW == 1).astype(np.uint8)
    wrong_HW[:15] ^= 1
    folder = labelled_run / "map"
    folder.mkdir()
    Image.fromarray(wrong_HW).save(folder / "a.png")
    found = evaluate.evaluate(named, named)
    assert found["pixels"] == 2 * PHOTO_HW.size
    assert found["overall"]["mean_iou"]["value"] == 1
    assert found["units"] == 2
    (labelled_run / "classes.yaml").write_text(
        "classes: [{name: land, color: '#090909'}, {name: water, color: '#0000FF'}]"
    )
    for map_, truth in ((str(folder), named), (named, str(folder))):
        found = evaluate.evaluate(map_, truth, classes=str(labelled_run / "classes.yaml"))
        assert found["pixels"] == PHOTO_HW.size
        assert found["overall"]["overall_accuracy"]["value"] == pytest.approx(0.9)
        assert found["units"] == 1


@pytest.mark.parametrize("kind", ["folder", "catalogue"])
def test_landcover_learns_from_masks_made_from_photos(labelled_run, kind):
    photos = labelled_run / "photos"
    photos.mkdir()
    for name in "ab":
        (labelled_run / f"{name}.tif").rename(photos / f"{name}.tif")
    images = str(photos) if kind == "folder" else f"{labels.ingest_folder(photos, labelled_run / 'cat')}#imagery"
    table = ClassTable(((0, "land", BLACK), (1, "water", (0, 0, 255))))
    found = scenes.labelled_images(images, f"{labelled_run / 'named' / 'catalog.json'}#classes", table=table)
    assert [one.id for one in found] == ["a", "b"]
    for one, values_HW in zip(found, (PHOTO_HW, PHOTO_HW.T), strict=True):
        stored = scenes.LabelledImage.from_row(one.to_row())
        window = Window(30, 40, 90, 70)
        _, classes_HW = scenes.read_window(stored, window, bands=("red", "green", "blue"), table=table)
        assert (classes_HW == (values_HW == 1)[window.slices(Window(0, 0, 0, 0))]).all()
        assert scenes.count_classes(stored, table, cell=512).sum() == PHOTO_HW.size


def test_masks_that_fit_no_image_are_refused_in_one_sentence(labelled_run):
    named, folder = f"{labelled_run / 'named' / 'catalog.json'}#classes", labelled_run / "small"
    folder.mkdir()
    Image.fromarray(PHOTO_HW[:100, :120] % 2).save(folder / "a.png")
    table = ClassTable(((0, "land", BLACK), (1, "water", (0, 0, 255))))
    with pytest.raises(DataError, match=r"image .*a\.png has 100 x 120 px, its mask .* reaches .*; give both the same"):
        scenes.labelled_images(str(folder), named, table=table)
    Image.fromarray(PHOTO_HW % 2).save(folder / "other.png")
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match="no mask has the name or place of an image: the images are other, the masks a"):
        scenes.labelled_images(str(folder), named, table=table)


def test_names_of_masks_are_compared_as_ids_are(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray((SHAPE_HW * 1).astype(np.uint8)).save(tmp_path / name / "part 1.png")
    (tmp_path / "classes.yaml").write_text("classes: [{name: land, color: '#090909'}, {name: water, color: '#0000FF'}]")
    for name in ("part-1", "part 1"):
        (tmp_path / name).mkdir()
        Image.fromarray((SHAPE_HW * 1).astype(np.uint8)).save(tmp_path / name / f"{name}.png")
    found = evaluate.evaluate(
        str(tmp_path / "part-1"), str(tmp_path / "part 1"), classes=str(tmp_path / "classes.yaml")
    )
    assert found["pixels"] == SHAPE_HW.size


# -- nodata that is a class --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [1, 255])
def test_nodata_that_is_a_class_is_read_as_this_class(tmp_path, high, caplog):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * high, nodata=0)
    with caplog.at_level(logging.WARNING):
        [one] = classes_of(tmp_path / "m", TABLE)
    assert (one == SHAPE_HW).all()
    assert "1 of 1 masks in " in caplog.text
    assert "a.tif: land): these pixels are read as this class" in caplog.text


def test_nodata_that_is_a_class_is_read_on_another_grid_and_not_beyond_the_file(tmp_path):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * 1, nodata=0)
    [mask] = two_classes(masks_of(str(tmp_path / "m")), TABLE, "m")
    fine = Grid("EPSG:32719", (10.0, 10.0), (5.0, 5.0))
    whole = footprint(mask, fine)
    found = read_classes([mask], fine, Window(whole.col - 3, whole.row - 3, whole.width + 6, whole.height + 6), TABLE)
    assert (found[:2] == 255).all()
    assert [int((found == value).sum()) for value in (0, 1)] == pytest.approx(
        [4 * (~SHAPE_HW).sum(), 4 * SHAPE_HW.sum()], rel=0.06
    )


@pytest.mark.parametrize(("high", "dtype", "said"), [(255, "uint8", 1), (255, "int16", 1), (1, "uint8", 0)])
def test_masks_that_nodata_leaves_with_one_class_are_named(tmp_path, high, dtype, said, caplog):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * high, nodata=255, dtype=dtype)
    mask_file(tmp_path / "m" / "b.tif", np.zeros((8, 8)), nodata=255, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        [one, other] = classes_of(tmp_path / "m", TABLE)
    assert (one == np.where(SHAPE_HW, high, 0)).all()
    assert (other == 0).all()
    assert caplog.text.count("hold only 0, and declare 255 as nodata: 255 is read as not labelled") == said


def test_nodata_that_is_no_class_stays_not_labelled(tmp_path, caplog):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * 1 + 1, nodata=2)
    [one] = classes_of(tmp_path / "m", TABLE)
    assert (one == np.where(SHAPE_HW, 255, 1)).all()
    assert not caplog.records


def test_evaluate_counts_the_class_that_is_nodata(tmp_path):
    wrong_HW = SHAPE_HW.copy()
    wrong_HW[:, :10] = True
    mask_file(tmp_path / "map" / "a.tif", wrong_HW * 1)
    mask_file(tmp_path / "truth" / "a.tif", SHAPE_HW * 1, nodata=0)
    (tmp_path / "classes.yaml").write_text("classes: [{name: land, color: '#090909'}, {name: water, color: '#0000FF'}]")
    found = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=str(tmp_path / "classes.yaml"))
    assert found["pixels"] == SHAPE_HW.size
    assert found["overall"]["overall_accuracy"]["value"] == pytest.approx((wrong_HW == SHAPE_HW).mean())


def test_nodata_within_the_colours_of_classes_is_refused(tmp_path):
    kind = {"driver": "GTiff", "width": 30, "height": 20, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    for nodata in (0, 255):
        with rasterio.open(tmp_path / "a.tif", "w", nodata=nodata, **kind) as file:
            file.write(np.array([[9, 9, 9], [0, 0, 255]], np.uint8)[SHAPE_HW * 1].transpose(2, 0, 1))
        if nodata == 0:  # it is the value of some bands only, so no pixel is lost
            assert (classes_of(tmp_path, TABLE)[0] == SHAPE_HW).all()
    with pytest.raises(DataError, match=r"has nodata 255, which is in the colour \(0, 0, 255\) of water"):
        classes_of(tmp_path, TABLE)


@pytest.mark.parametrize("colors", [((9, 9, 9), (0, 0, 255)), (WHITE, BLACK)])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_masks_of_one_bit_hold_class_values_in_each_format(tmp_path, kind, colors):
    compression = {"compression": "group4"} if kind == "tif" else {}
    Image.fromarray(SHAPE_HW).save(tmp_path / f"a.{kind}", **compression)
    [one] = classes_of(tmp_path, ClassTable(((0, "land", colors[0]), (1, "water", colors[1]))))
    assert (one == SHAPE_HW).all()


# -- folders with masks of several kinds -------------------------------------------------------------------------------


def test_masks_of_0_255_beside_masks_of_0_1_are_refused_with_both(tmp_path):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * 255)
    mask_file(tmp_path / "m" / "b.tif", SHAPE_HW * 1)
    with pytest.raises(DataError, match=r"two kinds of masks: \S+a.tif has only 0 and 255, \S+b.tif has class values"):
        classes_of(tmp_path / "m", TABLE)
    plain = ClassTable(TABLE.classes, ignore=((255, 255, 255),))
    assert (classes_of(tmp_path / "m", plain)[0] == np.where(SHAPE_HW, 255, 0)).all()


def test_255_beside_class_values_in_one_file_is_not_labelled_without_a_warning(tmp_path, caplog):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * 255)
    mask_file(tmp_path / "m" / "b.tif", SHAPE_HW * 1)
    mask_file(tmp_path / "m" / "c.tif", np.array([[0, 1], [255, 0]]))
    assert (classes_of(tmp_path / "m", TABLE)[0] == np.where(SHAPE_HW, 255, 0)).all()
    assert not caplog.records


# -- folders with other files ------------------------------------------------------------------------------------------


def test_hidden_files_are_no_masks_and_other_formats_are_named(tmp_path, caplog):
    mask_file(tmp_path / "m" / "a.tif", SHAPE_HW * 1)
    for name in ("._a.tif", "b.jp2", "a.tif.aux.xml"):
        (tmp_path / "m" / name).write_bytes(b"<PAMDataset/>")
    assert [mask.item_id for mask in masks_of(str(tmp_path / "m"))] == ["a"]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 2 entries of {tmp_path / 'm'} are left out: b.jp2 (masks are png, tif, tiff)"
    ]


def test_a_damaged_mask_fails_alone_and_the_command_exits_with_3(tmp_path):
    for name in ("map", "truth"):
        for mask in "ab":
            mask_file(tmp_path / name / f"{mask}.tif", SHAPE_HW * 1)
    (tmp_path / "truth" / "b.tif").write_bytes(b"junk")
    (tmp_path / "classes.yaml").write_text("classes: [{name: land, color: '#090909'}, {name: water, color: '#0000FF'}]")
    words = ["evaluate", str(tmp_path / "map"), str(tmp_path / "truth"), "--classes", str(tmp_path / "classes.yaml")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 3
    assert "truth/b.tif cannot be read" in found.output.replace("\n", "")
    assert re.search(r"overall accuracy +1\.000", found.output)
    (tmp_path / "truth" / "a.tif").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"[ab]\.tif cannot be read"):
        evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=str(tmp_path / "classes.yaml"))


CLASSES = "classes: [{name: land, color: '#090909'}, {name: water, color: '#0000FF'}]"


def plain(path, values_HW):
    """A mask without georeference."""
    path.parent.mkdir(exist_ok=True)
    options = {"compression": "tiff_deflate"} if path.suffix == ".tif" else {}
    Image.fromarray(values_HW.astype(np.uint8)).save(path, **options)


def broken(path, how):
    """A mask of 0 and 1 whose header is right."""
    values_HW = np.random.default_rng(3).integers(0, 2, (400, 300))
    if how == "unknown value":
        values_HW[350, 20] = 7
    plain(path, values_HW)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if how == "damaged":
        damage(path)


@pytest.mark.parametrize("how", ["unknown value", "truncated", "damaged"])
@pytest.mark.parametrize("side", ["map", "truth"])
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_a_mask_that_cannot_be_compared_fails_alone(tmp_path, how, side, suffix):
    if (how, suffix) == ("damaged", "png"):
        how = "truncated"
    for name in ("map", "truth"):
        for number, mask in enumerate("abc"):
            plain(tmp_path / name / f"{mask}.{suffix}", np.arange(120_000).reshape(400, 300) % (number + 2) == 0)
    broken(tmp_path / side / f"b.{suffix}", how)
    (tmp_path / "classes.yaml").write_text(CLASSES)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=str(tmp_path / "classes.yaml"))
    assert list(result["failed"]) == [str(tmp_path / side / f"b.{suffix}")]
    assert (result["units"], result["pixels"]) == (2, 240_000)
    assert result["overall"]["overall_accuracy"]["value"] == 1
    words = ["evaluate", str(tmp_path / "map"), str(tmp_path / "truth"), "--classes", str(tmp_path / "classes.yaml")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 3
    assert f"{side}/b.{suffix}" in found.output.replace("\n", "")


@pytest.mark.parametrize("kind", ["0 and 255", "mixed"])
def test_a_damaged_mask_of_0_and_255_costs_no_other(tmp_path, kind):
    for name in ("map", "truth"):
        for mask in "abc":
            plain(tmp_path / name / f"{mask}.tif", np.arange(120_000).reshape(400, 300) % 3 // 2 * 255)
    damage(tmp_path / "truth" / "b.tif")
    if kind == "mixed":
        plain(tmp_path / "map" / "c.tif", np.ones((400, 300)))
    (tmp_path / "classes.yaml").write_text(CLASSES)
    words = (str(tmp_path / "map"), str(tmp_path / "truth"))
    if kind == "mixed":
        with pytest.raises(DataError, match="mixes two kinds of masks"):
            evaluate.evaluate(*words, classes=str(tmp_path / "classes.yaml"))
        return
    result = evaluate.evaluate(*words, classes=str(tmp_path / "classes.yaml"))
    assert list(result["failed"]) == [str(tmp_path / "truth" / "b.tif")]
    assert [row["reference"] for row in result["classes"]] == [160_000, 80_000]


@pytest.mark.parametrize("values", [(0, 1), (1, 0), (0, 2), (0, 2, 3), (3, 0, 2)])
@pytest.mark.parametrize("more", [0, 4])
def test_only_sure_pixels_are_read_whatever_further_classes_the_table_has(tmp_path, values, more):
    rng, window = np.random.default_rng(1), Window(0, 0, 30, 20)
    grid = Grid("EPSG:32719", (2.0, 2.0), (0.0, 0.0))
    rows = tuple((value, f"class {value}", (value, 0, 9)) for value in range(4))
    own = ClassTable(tuple(rows[value] for value in values))
    positions_HW = rng.integers(0, len(values), (20, 30))
    classes_HW = np.array(values, np.uint8)[positions_HW]
    bands = len(values) if len(values) > 2 or 2 in values else 1
    scores_CHW = rng.integers(0, 255, (bands, 20, 30)).astype(np.uint8)
    cog.write_classes(tmp_path / "c.tif", classes_HW, grid, window, own)
    cog.write_scores(tmp_path / "s.tif", scores_CHW, grid, window, [f"s{band}" for band in range(bands)])
    mask = replace(source_of_file(str(tmp_path / "c.tif"), "c"), sure=(str(tmp_path / "s.tif"), 0.5))
    table = ClassTable(rows) if more else own
    # by hand: a band per class in the order of the map's own table, or that of its second class
    per_class = scores_CHW if bands > 1 else np.concatenate([254 - scores_CHW, scores_CHW])
    sure_HW = np.choose(positions_HW, per_class) >= 127
    assert 0.2 < sure_HW.mean() < 0.8
    assert (read_classes([mask], grid, window, table) == np.where(sure_HW, classes_HW, 255)).all()


CLASSES_HW = (np.add.outer(np.arange(40), np.arange(50)) % 3 > 0).astype(np.int64)
KNOWN_HW = np.repeat(np.arange(40) >= 5, 50).reshape(40, 50)  # the first rows are not labelled


def write_integers(path, dtype, fill, nodata):
    values_HW = np.where(KNOWN_HW, CLASSES_HW, fill).astype(dtype)
    with rasterio.open(path, "w", "GTiff", 50, 40, 1, dtype=dtype, nodata=nodata) as file:
        file.write(values_HW, 1)


FILLS = [("int16", -9999, -9999), ("uint16", 65535, 65535), ("int32", -1, -1), ("int8", -1, None), ("uint8", 255, None)]


@pytest.mark.parametrize(("dtype", "fill", "nodata"), FILLS)
def test_integers_of_any_type_are_classes_where_they_are_not_nodata(tmp_path, dtype, fill, nodata):
    write_integers(tmp_path / "a.tif", dtype, fill, nodata)
    [mask] = two_classes(masks_of(str(tmp_path)), TABLE, str(tmp_path))
    if dtype == "int8":
        with pytest.raises(DataError, match="mask value -1 "):
            read_classes([mask], pixels_of(mask), Window(0, 0, 50, 40), TABLE)
        return
    found_HW = read_classes([mask], pixels_of(mask), Window(0, 0, 50, 40), TABLE)
    assert np.array_equal(found_HW, np.where(KNOWN_HW, CLASSES_HW, 255))


@pytest.mark.parametrize("value", [257, 300, 511, -9999])
def test_a_value_that_is_a_class_only_in_8_bits_is_refused(tmp_path, value):
    write_integers(tmp_path / "a.tif", "int16", value, None)
    [mask] = masks_of(str(tmp_path))
    with pytest.raises(DataError, match=f"mask value {value} .250 pixels"):
        read_classes([mask], pixels_of(mask), Window(0, 0, 50, 40), TABLE)


@pytest.mark.parametrize("kind", ["grey and alpha", "transparent index", "one bit"])
def test_pixels_that_a_png_hides_are_not_labelled(tmp_path, kind):
    values_HW = CLASSES_HW.astype(np.uint8)
    if kind == "one bit":
        Image.fromarray(values_HW.astype(bool)).save(tmp_path / "a.png")
    elif kind == "grey and alpha":
        Image.fromarray(np.dstack([values_HW * 255, KNOWN_HW * np.uint8(255)]), "LA").save(tmp_path / "a.png")
    else:
        image = Image.fromarray(np.where(KNOWN_HW, values_HW, 2).astype(np.uint8), "P")
        image.putpalette([*TABLE.colors[0], *TABLE.colors[1], 70, 1, 2])
        image.save(tmp_path / "a.png", transparency=2)
    [mask] = two_classes(masks_of(str(tmp_path)), TABLE, str(tmp_path))
    found_HW = read_classes([mask], pixels_of(mask), Window(0, 0, 50, 40), TABLE)
    assert np.array_equal(found_HW, CLASSES_HW if kind == "one bit" else np.where(KNOWN_HW, CLASSES_HW, 255))
