"""Plots against reference plots: objects matched over tiles, by masks of ids and by polygons."""

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from fake_run import GPC, UTM, make, picture, place
from small_world import rayseg, refused

from rayseg.errors import DataError
from rayseg.geo.grid import Window
from rayseg.io import cog
from rayseg.io.maps import mapped_tiles
from rayseg.metrics import Objects, object_intervals, object_measures
from rayseg.stages.propose import UNNUMBERED
from rayseg.steps.evaluate_plots import evaluate_plots, text


def squares(side=40, count=4, gap=0):
    """count x count squares with ids 1.. row by row, (count * side)^2 px; `gap` px of each are no plot."""
    rows, cols = np.indices((count * side, count * side))
    ids_HW = rows // side * count + cols // side + 1
    return np.where((rows % side < gap) | (cols % side < gap), 0, ids_HW).astype(np.int64)


def ids_png(folder, name, ids_HW, dtype="uint16"):
    folder.mkdir(exist_ok=True)
    shape = {"count": 1, "dtype": dtype, "height": ids_HW.shape[0], "width": ids_HW.shape[1]}
    with rasterio.open(folder / f"{name}.png", "w", driver="PNG", **shape) as file:
        file.write(ids_HW.astype(dtype), 1)


def run_of(tmp_path, ids_HW, *, row=-32, col=64):
    """A run whose tiles of 64 px hold these plots."""
    classes_HW = (ids_HW > 0).astype(np.uint8)
    make(tmp_path / "run", {"scene": (picture(classes_HW), classes_HW, (row, col))})
    whole = place(ids_HW, row, col)
    for mapped in mapped_tiles(tmp_path / "run"):
        window = mapped.tile.window
        part = whole.intersect(window)
        numbers_HW = np.full((window.height, window.width), UNNUMBERED, np.uint32)
        numbers_HW[part.slices(window)] = ids_HW[part.slices(whole)]
        folder = tmp_path / "run" / "tiles" / mapped.tile.id
        cog.write_image(
            folder / "plots.tif", numbers_HW[None], UTM, window, bands=("plot",), nodata=UNNUMBERED, overviews="MODE"
        )
    return str(tmp_path / "run")


def polygons_of(ids_HW, window):
    """The plots as polygons in the grid's CRS."""
    left, _, _, top = UTM.bounds(Window(window.col, window.row, 1, 1))
    boxes = []
    for number in range(1, int(ids_HW.max()) + 1):
        rows, cols = np.nonzero(ids_HW == number)
        x, y = (left + 2 * cols.min(), left + 2 * (cols.max() + 1)), (top - 2 * (rows.max() + 1), top - 2 * rows.min())
        boxes.append(shapely.box(x[0], y[0], x[1], y[1]))
    return geopandas.GeoDataFrame(geometry=boxes, crs=UTM.crs)


def value(result, name):
    return result["objects"][name]["value"]


def test_measures_are_those_of_a_case_counted_by_hand():
    # reference a 100 px, b 100, c 50; predicted x = 80 of a, y = 20 of a and all of b, z 30 of nothing
    objects = Objects(
        np.array([100, 100, 50]), np.array([80, 120, 30]), np.array([[0, 0], [0, 1], [1, 1]]), np.array([80, 20, 100])
    )
    sums = objects.sums((np.zeros(3, int), np.zeros(3, int)), 1)
    found = {name: float(values[0]) for name, values in object_measures(sums).items()}
    assert found["recall"] == found["precision"] == found["f1"] == pytest.approx(2 / 3)
    assert found["best_iou"] == pytest.approx((0.8 + 100 / 120 + 0) / 3)
    assert found["pq"] == pytest.approx((0.8 + 100 / 120) / 3)
    assert found["over_segmentation"] == pytest.approx((0.2 + 0) / 2)
    assert found["under_segmentation"] == pytest.approx((0 + 20 / 120) / 2)
    assert [float(sums[f"{size} reference"][0]) for size in ("small", "medium", "large")] == [1, 2, 0]
    assert object_intervals({name: values for name, values in sums.items() if " " not in name})["f1"]["low"] is None


def test_a_plot_that_tiles_share_is_one_object(tmp_path):
    ids_HW = squares()
    root = run_of(tmp_path, ids_HW)
    ids_png(tmp_path / "masks", "truth", ids_HW)
    with rasterio.open(tmp_path / "masks" / "truth.tif", "w", **profile(ids_HW)) as file:
        file.write(ids_HW.astype(np.uint16), 1)
    (tmp_path / "masks" / "truth.png").unlink()
    result = evaluate_plots(root, str(tmp_path / "masks"))
    assert result["counts"] == {"reference": 16, "predicted": 16, "matched": 16}
    assert [value(result, name) for name in ("f1", "best_iou", "pq", "boundary_f1", "covered_iou")] == [1] * 5
    assert value(result, "over_segmentation") == value(result, "under_segmentation") == 0
    assert result["pixels"] == ids_HW.size
    assert sum(row["reference"] for row in result["sizes"]) == 16


def profile(ids_HW, row=-32, col=64):
    height, width = ids_HW.shape
    affine = UTM.transform(place(ids_HW, row, col))
    return {
        "driver": "GTiff", "count": 1, "dtype": "uint16", "height": height, "width": width, "nodata": 0,
        "crs": UTM.crs, "transform": affine,
    }  # fmt: skip


def test_merged_and_split_plots_are_counted_against_polygons(tmp_path):
    truth_HW = squares()
    predicted_HW = truth_HW.copy()
    predicted_HW[predicted_HW == 2] = 1  # two plots as one: neither matches, IoU is .5
    predicted_HW[20:40, 80:120] = 17  # the lower half of plot 3: IoU .5 twice
    predicted_HW[predicted_HW == 16] = 0  # one is missed
    polygons_of(truth_HW, place(truth_HW, -32, 64)).to_parquet(tmp_path / "truth.parquet")
    result = evaluate_plots(run_of(tmp_path, predicted_HW), str(tmp_path / "truth.parquet"))
    assert result["counts"] == {"reference": 16, "predicted": 15, "matched": 12}
    assert value(result, "recall") == 12 / 16
    assert value(result, "precision") == 12 / 15
    assert value(result, "f1") == pytest.approx(2 * 12 / 31)
    assert value(result, "best_iou") == pytest.approx((12 + 3 * 0.5) / 16)
    assert value(result, "covered_iou") == pytest.approx(15 / 16)
    assert value(result, "over_segmentation") == pytest.approx(0.5 / 15)
    assert value(result, "under_segmentation") == pytest.approx(2 * 0.5 / 15)
    assert 0.8 < value(result, "boundary_f1") < 1


def test_images_meet_their_masks_by_name_and_the_interval_is_over_images(tmp_path):
    for k in range(4):
        ids_HW = squares(gap=4)
        ids_png(tmp_path / "truth", f"chip{k}", ids_HW)
        ids_png(tmp_path / "found", f"chip{k}", ids_HW if k else np.minimum(ids_HW, 1))
    result = evaluate_plots(str(tmp_path / "found"), str(tmp_path / "truth"))
    assert result["unit"] == "image"
    assert result["units"] == 4
    assert result["counts"] == {"reference": 64, "predicted": 49, "matched": 48}
    f1 = result["objects"]["f1"]
    assert f1["value"] == pytest.approx(2 * 48 / 113)
    assert f1["low"] < f1["value"] < f1["high"] == 1
    assert "F1 of objects at IoU .5" in text(result)


def test_pixels_that_nobody_looked_at_do_not_count_and_background_of_nodata_0_does(tmp_path):
    predicted_HW, truth_HW = squares(), squares()
    predicted_HW[:40] = np.where(predicted_HW[:40] > 2, predicted_HW[:40], 0)
    truth_HW[:40] = 0
    root = run_of(tmp_path, predicted_HW)
    (tmp_path / "masks").mkdir()
    for name, nodata, values_HW in (("none", 0, truth_HW), ("unseen", 999, np.where(truth_HW, truth_HW, 999))):
        with rasterio.open(tmp_path / "masks" / "truth.tif", "w", **(profile(truth_HW) | {"nodata": nodata})) as file:
            file.write(values_HW.astype(np.uint16), 1)
        result = evaluate_plots(root, str(tmp_path / "masks"))
        assert result["counts"]["predicted"] == (14 if name == "none" else 12)
        assert result["pixels"] == (160 * 160 if name == "none" else 120 * 160)


def test_the_command_chooses_plots_for_a_run_of_plots(tmp_path):
    ids_HW = squares()
    root = run_of(tmp_path, ids_HW)
    polygons_of(ids_HW, place(ids_HW, -32, 64)).to_file(tmp_path / "truth.geojson")
    found = rayseg("evaluate", root, tmp_path / "truth.geojson", "--json")
    assert json.loads(found.stdout)["objects"]["f1"]["value"] == 1
    assert "panoptic quality" in rayseg("evaluate", root, tmp_path / "truth.geojson").stdout
    cog.write_classes(tmp_path / "truth" / "a.tif", (ids_HW > 0).astype(np.uint8), UTM, place(ids_HW, -32, 64), GPC)
    assert "confusion" in json.loads(rayseg("evaluate", root, tmp_path / "truth", "--json").stdout)


def test_what_cannot_be_compared_is_refused(tmp_path):
    root = run_of(tmp_path, squares())
    frame = polygons_of(squares(), place(squares(), -32, 64))
    frame.set_crs(None, allow_override=True).to_parquet(tmp_path / "pixels.parquet")
    assert "has no CRS and no column image" in refused(3, "evaluate", root, tmp_path / "pixels.parquet")
    frame.set_crs(None, allow_override=True).assign(image="scene").to_parquet(tmp_path / "image.parquet")
    with pytest.raises(DataError, match="no plots match the polygons"):
        evaluate_plots(root, str(tmp_path / "image.parquet"))
    (tmp_path / "masks").mkdir()
    with rasterio.open(tmp_path / "masks" / "a.tif", "w", **(profile(squares()) | {"dtype": "float32"})) as file:
        file.write(squares().astype(np.float32), 1)
    with pytest.raises(DataError, match="expected one band of whole numbers"):
        evaluate_plots(root, str(tmp_path / "masks"))


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_mask_fails_alone_and_is_named(tmp_path, kept):
    for k in range(3):
        ids_png(tmp_path / "truth", f"chip{k}", squares(gap=4))
        ids_png(tmp_path / "found", f"chip{k}", squares(gap=4))
    broken = tmp_path / "truth" / "chip1.png"
    data = broken.read_bytes()
    broken.write_bytes(data[: int(kept * len(data))])
    result = evaluate_plots(str(tmp_path / "found"), str(tmp_path / "truth"))
    assert (result["units"], result["counts"]["matched"]) == (2, 32)
    [reason] = result["failed"].values()
    assert "chip1.png" in reason
    assert "not compared" in text(result)
    ended = rayseg("evaluate", tmp_path / "found", tmp_path / "truth", "--plots")
    assert ended.exit_code == 3
    assert "chip1.png" in ended.stdout
