"""A map against its truth: matched by place and by name, counted per tile, summed up with intervals."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from fake_run import GPC, NODATA, UTM, blobs, make, picture, place
from small_world import segmenter

from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io import cog, masks, stac_write
from rayseg.io.maps import mapped_tiles, pixel_area_m2, seam_score, width_m
from rayseg.io.written_files import bands_of, write_file
from rayseg.metrics import Confusion
from rayseg.steps import evaluate
from rayseg.vision.color import ClassTable

TWO = ClassTable(((0, "land", (0, 0, 0)), (1, "water", (0, 0, 255))), ignore=((255, 255, 255),))
ROOFS = ClassTable(((3, "roof", (255, 0, 0)), (7, "field", (0, 255, 0))), ignore=((9, 9, 9),))


def run_of(tmp_path, classes_HW, **options):
    return make(tmp_path / "run", {"scene": (picture(classes_HW % 2), classes_HW, (-32, 64))}, **options)


def truth_at(path, classes_HW, *, row=-32, col=64, grid=UTM, table=GPC):
    cog.write_classes(path, classes_HW, grid, place(classes_HW, row, col), table)


def mask_png(folder, name, values_HW, *, palette=None):
    folder.mkdir(exist_ok=True)
    height, width = values_HW.shape
    shape = {"count": 1, "dtype": "uint8", "height": height, "width": width}
    with rasterio.open(folder / f"{name}.png", "w", driver="PNG", **shape) as file:
        file.write(values_HW.astype(np.uint8), 1)
        if palette:
            file.write_colormap(1, palette)


def mask_rgb(folder, name, values_HW, table):
    folder.mkdir(exist_ok=True)
    colors = np.zeros((256, 3), np.uint8)
    for value, _, color in table.classes:
        colors[value] = color
    colors[NODATA] = table.ignore[0]
    matplotlib.image.imsave(folder / f"{name}.png", colors[values_HW])


def table_file(tmp_path, table):
    rows = [{"name": name, "value": value, "color": list(color)} for value, name, color in table.classes]
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump({"classes": rows, "ignore": [list(color) for color in table.ignore]}))
    return str(path)


def counted(truth_HW, predicted_HW):
    return Confusion.from_arrays(truth_HW, predicted_HW, 2)


def test_a_run_meets_georeferenced_truth_by_place_and_every_pixel_is_counted_once(tmp_path):
    predicted, real = blobs(150, 200, seed=1), blobs(150, 200, seed=2)
    real[:20] = NODATA
    run_of(tmp_path, predicted)
    truth_at(tmp_path / "truth" / "west.tif", real[:, :90])
    truth_at(tmp_path / "truth" / "east.tif", real[:, 90:], col=64 + 90)
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    expected = counted(real, predicted)
    assert result["confusion"] == expected.matrix.tolist()
    assert result["pixels"] == 130 * 200
    assert result["overall"]["mean_iou"]["value"] == pytest.approx(expected.mean_iou)
    assert result["classes"][1]["iou"]["value"] == pytest.approx(expected.iou[1])
    assert result["classes"][1]["reference"] == int((real == 1).sum())
    assert result["units"] == 12
    assert result["unmatched"]["truth"]["count"] == 0
    assert result["seams"]["borders"] == 8 + 9
    json.dumps(result, allow_nan=False)


def test_the_truth_of_a_run_has_the_values_of_its_configured_classes(tmp_path):
    """Masks of 1 and 2 in which 0 means not labelled, next to a map of 0 and 1."""
    mask = blobs(96, 130)
    run_of(tmp_path, mask, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    content = json.loads((tmp_path / "run/run.json").read_text())
    rows = [{"name": name, "color": color, "value": value} for value, name, color in GPC.classes]
    content["config"]["classes"] = {"classes": [row | {"value": row["value"] + 1} for row in rows], "ignore": [0]}
    (tmp_path / "run/run.json").write_text(json.dumps(content))
    truth = mask + 1
    truth[:40] = 0
    mask_png(tmp_path / "truth", "scene", truth)
    found = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert found["pixels"] == mask[40:].size
    assert found["overall"]["mean_iou"]["value"] == 1


@pytest.mark.parametrize("derived", [False, True])
def test_the_truth_of_a_run_has_the_values_of_the_masks_that_its_model_learnt_from(tmp_path, monkeypatch, derived):
    mask = blobs(96, 130)
    run_of(tmp_path, mask, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    prefix = segmenter(tmp_path / "model")
    described = json.loads((tmp_path / "model/bundle.json").read_text()) | {"in_masks": [1, 2], "unlabelled": [0]}
    (tmp_path / "model/bundle.json").write_text(json.dumps(described))
    predicted = {"config": {}, "steps": {"predict": {"bundle": str(prefix)}}}
    remapped = {"config": {}, "steps": {"predict": {"run": "origin"}}}
    monkeypatch.setattr(evaluate.runs, "read", lambda root: remapped if derived and root != "origin" else predicted)
    truth = mask + 1
    truth[:40] = 0
    mask_png(tmp_path / "truth", "scene", truth)
    found = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert (found["pixels"], found["overall"]["mean_iou"]["value"]) == (mask[40:].size, 1)


def test_truth_on_another_grid_is_read_by_its_nearest_pixels(tmp_path):
    table = ClassTable((*GPC.classes, (2, "water", (0, 0, 255))))
    predicted = blobs(64, 64, seed=3) * 2
    run_of(tmp_path, predicted, table=table)
    finer = Grid("EPSG:32650", (0.5, 0.5), (0.0, 0.0))
    window = place(predicted, -32, 64)
    window = Window(4 * window.col + 1, 4 * window.row + 1, 256, 256)
    cog.write_classes(tmp_path / "truth" / "a.tif", predicted.repeat(4, 0).repeat(4, 1), finer, window, table)
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert result["classes"][1]["reference"] == 0  # a mixture of 0 and 2 would be 1
    fine = predicted.repeat(4, 0).repeat(4, 1)  # the truth is this, a quarter of a pixel lower and to the right
    assert result["overall"]["overall_accuracy"]["value"] == (fine[1:, 1:] == fine[:-1, :-1]).mean()
    assert result["pixels"] == round(255 * 255 / 4**2)  # of the map, each of 4 x 4 pixels of the truth


def test_of_two_truths_over_one_place_the_first_labelled_one_counts(tmp_path):
    predicted = np.ones((32, 32), np.uint8)
    run_of(tmp_path, predicted)
    first = np.ones((32, 32), np.uint8)
    first[:, 10:] = NODATA
    truth_at(tmp_path / "truth" / "a.tif", first)
    truth_at(tmp_path / "truth" / "b.tif", np.zeros((32, 32), np.uint8))
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert result["confusion"] == [[0, 32 * 22], [0, 32 * 10]]


def test_newer_truth_comes_before_older(tmp_path):
    run = run_of(tmp_path, np.ones((32, 32), np.uint8))
    truth_at(tmp_path / "truth" / "a.tif", np.ones((32, 32), np.uint8))
    [mask] = masks.masks_of(str(tmp_path / "truth"))
    dated = [
        replace(mask, item_id=name, datetime=f"{year}-01-01T00:00:00Z") for name, year in (("a", 2019), ("b", 2024))
    ]
    [matched, *_] = evaluate.match(masks.pieces_of_tiles(mapped_tiles(run.root)), dated)
    assert [one.item_id for one in matched.truth] == ["b", "a"]


def test_pixels_with_truth_but_without_prediction_are_reported_not_counted(tmp_path):
    predicted, real = blobs(64, 64, seed=4), blobs(64, 64, seed=5)
    predicted[:8] = NODATA
    real[:4] = NODATA
    run_of(tmp_path, predicted)
    truth_at(tmp_path / "truth" / "a.tif", real)
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert result["not_evaluated"] == 4 * 64
    assert result["pixels"] == 56 * 64
    assert "256 pixels with truth have no prediction" in evaluate.text(result)
    assert "alone" not in evaluate.text(result)
    truth_at(tmp_path / "truth" / "a.tif", np.where(real == 1, 1, NODATA).astype(np.uint8))
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert "the truth shows gpc alone: what it leaves unlabelled is not compared" in evaluate.text(result)


def test_a_run_over_images_meets_plain_masks_by_name_across_its_tiles(tmp_path):
    predicted = {name: blobs(70, 100, seed=seed) for seed, name in enumerate("abc")}
    images = {name: (picture(mask), mask, (0, 0)) for name, mask in predicted.items()}
    make(tmp_path / "run", images, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    real = blobs(70, 100, seed=9)
    for name in "abx":
        mask_png(tmp_path / "truth", name, real)
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    expected = counted(real, predicted["a"]) + counted(real, predicted["b"])
    assert result["confusion"] == expected.matrix.tolist()
    assert result["unmatched"]["truth"] == {"count": 1, "names": ["x"]}
    assert result["unmatched"]["prediction"]["count"] == 4
    assert (result["units"], result["unit"]) == (2, "image")
    kept = [counted(real, predicted[name]).overall_accuracy for name in "ab"]
    assert result["overall"]["overall_accuracy"]["low"] == pytest.approx(min(kept))


@pytest.mark.parametrize("kind", ["index", "palette", "rgb"])
def test_masks_may_be_class_values_palette_indices_or_colours(tmp_path, kind):
    real = np.where(blobs(40, 50, seed=6), 7, 3).astype(np.uint8)
    real[:5] = NODATA
    predicted = np.where(blobs(40, 50, seed=7), 7, 3).astype(np.uint8)
    mask_png(tmp_path / "map", "a", predicted)
    if kind == "index":
        mask_png(tmp_path / "truth", "a", real)
    elif kind == "palette":
        shuffled = np.select([real == 7, real == 3], [0, 1], 2)
        mask_png(tmp_path / "truth", "a", shuffled, palette={0: (0, 255, 0), 1: (255, 0, 0), 2: (9, 9, 9)})
    else:
        mask_rgb(tmp_path / "truth", "a", real, ROOFS)
    folders = str(tmp_path / "map"), str(tmp_path / "truth")
    result = evaluate.evaluate(*folders, classes=table_file(tmp_path, ROOFS))
    lut = np.full(256, NODATA, np.uint8)
    lut[[3, 7]] = 0, 1
    assert result["confusion"] == counted(lut[real], lut[predicted]).matrix.tolist()
    assert [row["name"] for row in result["classes"]] == ["roof", "field"]


def test_georeferenced_masks_in_folders_meet_by_place_whatever_their_names(tmp_path):
    predicted, real = blobs(60, 80, seed=1), blobs(60, 80, seed=2)
    truth_at(tmp_path / "map" / "one.tif", predicted, col=2000)
    truth_at(tmp_path / "truth" / "two.tif", real, col=2000)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"))
    assert result["confusion"] == counted(real, predicted).matrix.tolist()
    assert result["units"] == 4  # blocks of the grid: rows meet at the corner, columns 2048 px from it


def test_a_georeferenced_map_meets_plain_masks_by_name(tmp_path):
    predicted, real = blobs(60, 80, seed=1), blobs(60, 80, seed=2)
    truth_at(tmp_path / "map" / "one.tif", predicted, col=2000)
    mask_png(tmp_path / "truth", "one", real)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"))
    assert result["confusion"] == counted(real, predicted).matrix.tolist()


def test_nothing_in_common_names_both_sides(tmp_path):
    mask_png(tmp_path / "map", "left", blobs(9, 9))
    mask_png(tmp_path / "truth", "right", blobs(9, 9))
    with pytest.raises(DataError, match=r"left.*right"):
        evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file_gpc(tmp_path))


def test_sizes_that_differ_are_refused_with_both_named(tmp_path):
    mask_png(tmp_path / "map", "a", blobs(9, 12))
    mask_png(tmp_path / "truth", "a", blobs(12, 9))
    with pytest.raises(DataError, match=r"9 x 12 px.*12 x 9"):
        evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file_gpc(tmp_path))


def test_values_that_are_no_class_are_refused_by_file_value_and_count(tmp_path):
    mask_png(tmp_path / "map", "a", blobs(9, 9))
    mask_png(tmp_path / "truth", "a", np.where(np.arange(81).reshape(9, 9) < 7, 254, 0))
    with pytest.raises(DataError, match=r"truth/a.png: mask value 254 \(7 pixels"):
        evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file_gpc(tmp_path))


def test_without_stored_classes_a_table_is_asked_for(tmp_path):
    mask_png(tmp_path / "map", "a", blobs(9, 9))
    with pytest.raises(ConfigError, match="--classes"):
        evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "map"))


def test_a_folder_without_masks_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no masks"):
        evaluate.evaluate(str(tmp_path), str(tmp_path), classes=table_file_gpc(tmp_path))


def table_file_gpc(tmp_path):
    return table_file(tmp_path, ClassTable(GPC.classes, ignore=((9, 9, 9),)))


def test_intervals_hold_the_value_and_a_single_image_has_none(tmp_path):
    for seed, name in enumerate("abcdef"):
        real = blobs(40, 40, seed=seed)
        predicted = real.copy()
        predicted[: 3 * seed] ^= 1
        mask_png(tmp_path / "map", name, predicted)
        mask_png(tmp_path / "truth", name, real)
    accuracy = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file_gpc(tmp_path))[
        "overall"
    ]["overall_accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    for name in "bcdef":
        (tmp_path / "map" / f"{name}.png").unlink()
    single = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file_gpc(tmp_path))
    assert single["overall"]["overall_accuracy"] == {"value": 1.0, "low": None, "high": None}


def test_the_step_keeps_the_counts_of_every_tile(tmp_path):
    predicted, real = blobs(100, 100, seed=1), blobs(100, 100, seed=2)
    step = run_of(tmp_path, predicted)
    truth_at(tmp_path / "truth" / "a.tif", real)
    result = evaluate.evaluate_run(Step("evaluate", step.root, "key", Engine("inline")), step, str(tmp_path / "truth"))
    kept = json.loads((tmp_path / "run" / "steps" / "evaluate" / "confusions.json").read_text())
    assert np.sum(list(kept["tiles"].values()), axis=0).tolist() == result["confusion"]
    assert set(kept["tiles"]) == {tile.tile.id for tile in mapped_tiles(step.root)}


def test_the_table_is_aligned_and_says_what_is_there(tmp_path):
    run_of(tmp_path, blobs(128, 128, seed=1))
    truth_at(tmp_path / "truth" / "a.tif", blobs(128, 128, seed=2))
    lines = evaluate.text(evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))).splitlines()
    header, background, gpc = lines[6:9]
    assert len(header) == len(background) == len(gpc)
    assert header.split() == ["class", "iou", "f1", "precision", "recall", "truth", "px"]
    assert gpc.startswith("gpc")


def test_a_map_without_seams_scores_one_and_a_cut_one_more(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (256, 256)).astype(np.uint8)
    whole = make(tmp_path / "a" / "run", {"scene": (picture(noise), noise, (0, 0))})
    score = seam_score(mapped_tiles(whole.root))
    assert score["borders"] == 24
    assert score["pairs"] == 24 * 64
    assert score["ratio"] == pytest.approx(1, abs=0.1)
    blocks = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((64, 64))).astype(np.uint8)
    blocks[10:12, 10:12] ^= 1
    cut = make(tmp_path / "b" / "run", {"scene": (picture(blocks), blocks, (0, 0))})
    assert seam_score(mapped_tiles(cut.root))["across"] == 1.0
    assert seam_score(mapped_tiles(cut.root))["ratio"] > 1000
    assert seam_score(mapped_tiles(cut.root), most=5)["borders"] == 5


def test_a_seam_is_counted_between_the_two_pixels_at_a_border(tmp_path):
    mask = np.random.default_rng(1).integers(0, 2, (100, 150)).astype(np.uint8)
    mask[:, 70:75] = NODATA
    score = seam_score(mapped_tiles(make(tmp_path / "run", {"scene": (picture(mask % 2), mask, (0, 0))}).root))
    sides = [(mask[:, 63], mask[:, 64]), (mask[:, 127], mask[:, 128]), (mask[63], mask[64])]
    valid = [(one != NODATA) & (other != NODATA) for one, other in sides]
    assert score["pairs"] == sum(int(ok.sum()) for ok in valid)
    changed = [(one != other) & ok for (one, other), ok in zip(sides, valid, strict=True)]
    assert score["changes"] == sum(int(change.sum()) for change in changed)


def test_a_single_tile_and_images_without_neighbours_have_no_seam_score(tmp_path):
    run = run_of(tmp_path, blobs(30, 30))
    assert seam_score(mapped_tiles(run.root)) is None


def test_ground_area_is_geodesic_whatever_the_projection(tmp_path):
    run = run_of(tmp_path, blobs(64, 64))
    (tile, *_) = [mapped.tile for mapped in mapped_tiles(run.root)]
    assert pixel_area_m2(tile) == pytest.approx(4 / 0.9996**2, rel=1e-5)  # UTM's lengths at its meridian
    assert width_m(tile.grid, tile.window) == pytest.approx(2 * tile.window.width / 0.9996, rel=1e-5)


def catalogue(tmp_path, real):
    import pystac

    item = pystac.Item(
        "west", None, None, None, {"start_datetime": "2024-01-01T00:00:00Z", "end_datetime": "2024-02-01T00:00:00Z"}
    )
    other = ClassTable(((0, "water", (0, 0, 255)), (1, "land", (9, 9, 0))))
    for name, values, table in (("nets", real, GPC), ("cover", real * 0, other)):
        truth_at(tmp_path / "stac" / "truth" / "west" / f"{name}.tif", values, table=table)
        item.add_asset(name, pystac.Asset(f"./{name}.tif", media_type=pystac.MediaType.COG, roles=["labels"]))
    root = pystac.Catalog("c", "c")
    collection = pystac.Collection(
        "truth", "t", pystac.Extent(pystac.SpatialExtent([[0, 0, 1, 1]]), pystac.TemporalExtent([[None, None]]))
    )
    collection.add_item(item)
    root.add_child(collection)
    root.normalize_and_save(str(tmp_path / "stac"), pystac.CatalogType.SELF_CONTAINED)
    return str(tmp_path / "stac" / "catalog.json")


def test_of_an_items_masks_the_one_with_the_maps_classes_is_taken_or_the_one_named(tmp_path):
    real = blobs(64, 64, seed=2)
    run_of(tmp_path, blobs(64, 64, seed=1))
    uri = catalogue(tmp_path, real)
    chosen = evaluate.evaluate(str(tmp_path / "run"), f"{uri}#truth")
    assert chosen["classes"][1]["reference"] == int(real.sum())
    named = evaluate.evaluate(str(tmp_path / "run"), f"{uri}#truth/cover")
    assert named["classes"][0]["reference"] == 64 * 64
    with pytest.raises(DataError, match="nothing"):
        evaluate.evaluate(str(tmp_path / "run"), f"{uri}#truth/nothing")
    with pytest.raises(ConfigError, match="no collection 'lies'"):
        evaluate.evaluate(str(tmp_path / "run"), f"{uri}#lies")


def test_a_runs_collection_is_a_prediction_too(tmp_path):
    predicted, real = blobs(100, 100, seed=1), blobs(100, 100, seed=2)
    root = run_of(tmp_path, predicted).root
    truth_at(tmp_path / "truth" / "a.tif", real)
    hrefs = []
    for mapped in mapped_tiles(root):
        folder = tmp_path / "run" / "tiles" / mapped.tile.id
        one = (mapped.tile.grid, Window(0, 0, 1, 1))
        files = (
            write_file(mapped.href, Path(mapped.href).read_bytes(), bands_of(["class"], np.dtype("uint8"), 255)),
            cog.write_scores(folder / "scores.tif", predicted[None, :1, :1], *one, ["gpc"]),
        )
        stac_write.write_tile_item(folder, mapped.tile, GPC, files=files, sources=[], model="model.json")
        hrefs.append(str(folder / f"{mapped.tile.id}.json"))
    stac_write.write_collection(root, stac_write.read_items(hrefs), title="netting")
    as_collection = evaluate.evaluate(f"{root}/collection.json", str(tmp_path / "truth"))
    as_run = evaluate.evaluate(root, str(tmp_path / "truth"))
    assert as_collection["confusion"] == as_run["confusion"]


def test_an_unfinished_run_and_a_missing_table_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(DataError, match="no tiles of a step 'predict'"):
        evaluate.evaluate(str(tmp_path / "run"), str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        evaluate.evaluate(str(tmp_path), str(tmp_path), classes=str(tmp_path / "absent.yaml"))


def test_rotated_truth_is_placed_too(tmp_path):
    ones = np.ones((64, 64), np.uint8)
    run_of(tmp_path, ones)
    x, y = UTM.transform(place(ones, 0, 80)) @ (0, 0)
    turned = Affine.translation(x, y) @ Affine.rotation(30) @ Affine.scale(2, -2)
    shape = {"count": 1, "dtype": "uint8", "height": 20, "width": 20, "crs": "EPSG:32650", "transform": turned}
    (tmp_path / "truth").mkdir()
    with rasterio.open(tmp_path / "truth" / "a.tif", "w", driver="GTiff", **shape) as file:
        file.write(np.ones((20, 20), np.uint8), 1)
    result = evaluate.evaluate(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert result["pixels"] == pytest.approx(400, abs=25)
    assert result["overall"]["overall_accuracy"]["value"] == 1.0


@pytest.mark.real
def test_real_palette_masks_are_read_by_their_colours(shared):
    [mask, *_] = masks.masks_of(str(shared / "data" / "landcover" / "masks"))
    colors = [(0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    backwards = ClassTable(tuple((6 - k, f"class {k}", color) for k, color in enumerate(colors)))
    window = Window(0, 0, mask.width, mask.height)
    classes = masks.read_classes([mask], masks.pixels_of(mask), window, backwards)
    with rasterio.open(mask.assets[0][0]) as file:
        np.testing.assert_array_equal(classes, 6 - file.read(1))


@pytest.mark.real
def test_the_hand_drawn_masks_of_the_gpc_test_set_equal_themselves(shared, tmp_path):
    folder = str(shared / "data" / "gpc" / "test" / "masks")
    result = evaluate.evaluate(folder, folder, classes=table_file_gpc(tmp_path))
    assert result["units"] == 5
    assert result["overall"]["mean_iou"]["value"] == 1.0


# -- pixels of several sizes -------------------------------------------------------------------------------------------


def raster(path, values_HW, crs, x, y, step):
    path.parent.mkdir(exist_ok=True)
    place = {"crs": crs, "transform": Affine(step, 0, x, 0, -step, y)}
    with rasterio.open(path, "w", "GTiff", values_HW.shape[1], values_HW.shape[0], 1, dtype="uint8", **place) as file:
        file.write(values_HW.astype(np.uint8), 1)
    return file


@pytest.mark.parametrize(("crs", "x", "y"), [("EPSG:32718", 4e5, 8e6), ("EPSG:32633", 5e5, 5e6)])
@pytest.mark.parametrize("coarse", [5, 20])
def test_maps_of_several_resolutions_count_by_area(tmp_path, crs, x, y, coarse):
    """10 m with all right, and coarser or finer with all wrong: each has its share of the ground."""
    for name, value in (("map", 1), ("truth", 0)):
        raster(tmp_path / name / "a.tif", np.zeros((40, 40)), crs, x, y, 10)
        raster(tmp_path / name / "b.tif", np.full((40, 20), value), crs, x + 5000, y, coarse)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file(tmp_path, TWO))
    ground = [1600 * 100, 800 * coarse**2]
    assert result["counted"] == "m2"
    assert result["pixels"] == 2400
    assert result["overall"]["overall_accuracy"]["value"] == pytest.approx(ground[0] / sum(ground), rel=1e-3)
    assert result["confusion"][0] == pytest.approx(ground, rel=2e-3)
    assert "all measures are of areas" in evaluate.text(result)


def test_rows_in_degrees_count_by_the_area_that_they_have(tmp_path):
    right = np.zeros((60, 10))
    right[:30] = 1  # wrong between 60 N and 30 N, right from there to the equator
    raster(tmp_path / "map" / "a.tif", right, "EPSG:4326", 10, 60, 1)
    raster(tmp_path / "truth" / "a.tif", np.zeros((60, 10)), "EPSG:4326", 10, 60, 1)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file(tmp_path, TWO))
    share = np.sin(np.radians(30)) / np.sin(np.radians(60))  # of a sphere
    assert result["overall"]["overall_accuracy"]["value"] == pytest.approx(share, abs=3e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("here", "there", "cell", "x"), [(10, 2.5, 2.5, 4e5), (10, 4, 2, 5e5), (3, 2, 1, 3e5), (8, 1, 1, 6e5)]
)
def test_a_truth_finer_than_the_map_counts_every_one_of_its_pixels_by_area(tmp_path, here, there, cell, x, seed):
    """`cell` is a side of which both have whole numbers."""
    rng = np.random.default_rng(seed)
    predicted, truth = (rng.integers(0, 2, (int(24 * here / side), int(48 * here / side))) for side in (here, there))
    raster(tmp_path / "map" / "a.tif", predicted, "EPSG:32718", x, 8e6, here)
    raster(tmp_path / "truth" / "a.tif", truth, "EPSG:32718", x, 8e6, there)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file(tmp_path, TWO))
    both = [np.kron(one, np.ones((int(size / cell),) * 2)) for one, size in ((truth, there), (predicted, here))]
    expected = [[int(((both[0] == t) & (both[1] == p)).sum()) for p in (0, 1)] for t in (0, 1)]
    assert result["confusion"] == expected


def test_pixels_of_one_size_are_counted_as_before_and_a_finer_truth_is_named(tmp_path):
    raster(tmp_path / "map" / "a.tif", np.eye(40), "EPSG:32718", 4e5, 8e6, 10)
    raster(tmp_path / "truth" / "a.tif", np.kron(np.eye(40), np.ones((4, 4))), "EPSG:32718", 4e5, 8e6, 2.5)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file(tmp_path, TWO))
    assert "counted" not in result
    assert result["confusion"] == [[16 * 1560, 0], [0, 16 * 40]]
    assert result["pixels"] == 1600
    assert "1,600 pixels compared in 1 tile" in evaluate.text(result)
    assert "compared on pixels of 2.5 m; the pixels of the classes and of the confusion are these" in evaluate.text(
        result
    )
    assert "truth/a.tif has pixels of 2.5 m, the map of 10 m" in evaluate.text(result)


def test_pixels_are_those_of_the_map_also_where_the_truth_is_finer_and_the_map_has_gaps(tmp_path):
    predicted, truth = np.eye(40), np.kron(np.eye(40), np.ones((4, 4)))
    predicted[:5] = 255  # no prediction in 5 rows, of which the truth covers 4.5
    truth[:2] = 255
    raster(tmp_path / "map" / "a.tif", predicted, "EPSG:32718", 4e5, 8e6, 10)
    raster(tmp_path / "truth" / "a.tif", truth, "EPSG:32718", 4e5, 8e6, 2.5)
    result = evaluate.evaluate(str(tmp_path / "map"), str(tmp_path / "truth"), classes=table_file(tmp_path, TWO))
    assert (result["pixels"], result["not_evaluated"]) == (35 * 40, 180)
