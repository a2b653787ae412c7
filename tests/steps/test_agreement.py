"""Labels without names against masks: which pixels of a mask count, whatever its values or colours."""

import json

import numpy as np
import pytest
import rasterio
from fake_run import UTM, make, picture, place
from sklearn.metrics import adjusted_mutual_info_score, fowlkes_mallows_score
from small_world import BANDS, rayseg

from rayseg.geo.grid import Grid, Window
from rayseg.io import cog
from rayseg.steps.agreement import agreement_of_rasters, agreement_of_run, agreement_text

KINDS_HW = np.repeat([[0, 1, 2]], 48, axis=0).repeat(16, axis=1)


@pytest.fixture
def run(tmp_path):
    """A run whose labels are three stripes of 16 px on a scene of 48 x 48 px."""
    make(tmp_path / "run", {"scene": (picture(KINDS_HW % 2), KINDS_HW.astype(np.uint8), (0, 0))})
    return str(tmp_path / "run")


def measured(run, tmp_path, values, **options):
    """The scene's agreement with a mask in which the stripes have these values or colours."""
    folder = tmp_path / "truth"
    folder.mkdir()
    values_HW = np.array(values, np.uint8)[KINDS_HW]
    bands_CHW, bands = (values_HW.transpose(2, 0, 1), BANDS) if values_HW.ndim == 3 else (values_HW[None], ("kind",))
    cog.write_image(folder / "scene.tif", bands_CHW, UTM, place(KINDS_HW, 0, 0), bands=bands)
    [found] = agreement_of_run(run, str(folder), **options)["scenes"].values()
    return found


def test_pure_blue_is_a_colour_like_any_other(run, tmp_path):
    found = measured(run, tmp_path, [(0, 0, 255), (0, 255, 255), (0, 0, 0)])
    assert found["pixels"] == KINDS_HW.size
    assert found["ami"] == pytest.approx(1)


def test_255_in_a_mask_of_one_band_does_not_count(run, tmp_path):
    assert measured(run, tmp_path, [255, 0, 1])["pixels"] == KINDS_HW.size * 2 // 3


@pytest.mark.parametrize(("values", "unlabelled"), [([(0, 0, 255), (0, 255, 0), (9, 9, 9)], "#0000FF"), ([7, 0, 1], 7)])
def test_what_is_said_to_be_unlabelled_does_not_count(run, tmp_path, values, unlabelled):
    assert measured(run, tmp_path, values, unlabelled=[unlabelled])["pixels"] == KINDS_HW.size * 2 // 3


def test_nodata_of_a_mask_does_not_count(run, tmp_path):
    folder = tmp_path / "truth"
    folder.mkdir()
    with rasterio.open(
        folder / "scene.tif", "w", driver="GTiff", dtype="uint8", count=1, height=48, width=48, nodata=2,
        crs=UTM.crs, transform=UTM.transform(place(KINDS_HW, 0, 0)),
    ) as file:  # fmt: skip
        file.write(KINDS_HW.astype(np.uint8), 1)
    [found] = agreement_of_run(run, str(folder))["scenes"].values()
    assert found["pixels"] == KINDS_HW.size * 2 // 3


def test_0_and_255_alone_are_two_kinds_unless_255_is_unlabelled(run, tmp_path):
    assert measured(run, tmp_path, [0, 255, 0])["pixels"] == KINDS_HW.size
    [found] = agreement_of_run(run, str(tmp_path / "truth"), unlabelled=[255])["scenes"].values()
    assert found["pixels"] == KINDS_HW.size * 2 // 3


def test_any_two_label_rasters_are_compared_whatever_their_values_and_names(tmp_path):
    def written(name, values, dtype, *, placed=False):
        where = {"crs": UTM.crs, "transform": UTM.transform(place(KINDS_HW, 0, 0))} if placed else {}
        path = tmp_path / f"{name}.tif"
        with rasterio.open(path, "w", driver="GTiff", dtype=dtype, count=1, height=48, width=48, **where) as file:
            file.write(np.array(values, dtype)[KINDS_HW], 1)
        return path

    one, other = written("one", [70_000, 5, 300], "uint32"), written("other", [0, 9, 9], "uint16")
    found = json.loads(rayseg("evaluate", one, other, "--agreement", "--json").stdout)
    [scene] = found["scenes"].values()
    assert scene["pixels"] == KINDS_HW.size
    truth, predicted = (np.array(values)[KINDS_HW].ravel() for values in ([0, 9, 9], [70_000, 5, 300]))
    assert scene["ami"] == pytest.approx(adjusted_mutual_info_score(truth, predicted))
    assert scene["fmi"] == pytest.approx(fowlkes_mallows_score(truth, predicted))
    assert rayseg("evaluate", one, other, "--agreement").stdout.startswith("Against the truth: AMI 0.")
    mapped = [written(name, [4, 5, 6], "uint8", placed=True) for name in ("p", "q")]
    [scene] = agreement_of_rasters(*map(str, mapped))["scenes"].values()
    assert (scene["pixels"], scene["ami"]) == (KINDS_HW.size, pytest.approx(1))


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_mask_fails_alone_and_is_named(tmp_path, kept):
    scenes = {name: (picture(KINDS_HW % 2), KINDS_HW.astype(np.uint8), (0, 200 * k)) for k, name in enumerate("ab")}
    make(tmp_path / "run", scenes)
    (tmp_path / "truth").mkdir()
    for k, name in enumerate("ab"):
        values_CHW = np.random.default_rng(k).integers(0, 3, (1, 48, 48)).astype(np.uint8)
        cog.write_image(
            tmp_path / "truth" / f"{name}.tif", values_CHW, UTM, place(KINDS_HW, 0, 200 * k), bands=("kind",)
        )
    broken = tmp_path / "truth" / "b.tif"
    data = broken.read_bytes()
    broken.write_bytes(data[: int(kept * len(data))])
    result = agreement_of_run(str(tmp_path / "run"), str(tmp_path / "truth"))
    assert sum(scene["pixels"] for scene in result["scenes"].values()) == KINDS_HW.size
    assert result["troubles"] == result["failed"]
    assert all("b.tif" in reason for reason in result["failed"].values())
    assert "Not compared" in agreement_text(result)
    assert rayseg("evaluate", tmp_path / "run", tmp_path / "truth", "--agreement").exit_code == 3


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_damaged_raster_of_two_folders_fails_alone(tmp_path, side):
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
        for name in "abc":
            grid, whole = Grid(None, (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 48, 48)
            cog.write_image(tmp_path / folder / f"{name}.tif", KINDS_HW[None].astype(np.uint8), grid, whole, bands="k")
    for name, content in (("b", (tmp_path / side / "b.tif").read_bytes()[:-400]), ("c", b"no raster")):
        (tmp_path / side / f"{name}.tif").write_bytes(content)
    found = rayseg("evaluate", tmp_path / "ours", tmp_path / "theirs", "--agreement", "--json")
    assert found.exit_code == 3, found.output
    result = json.loads(found.stdout)
    assert (list(result["scenes"]), result["mean"]["ami"]) == (["a"], pytest.approx(1))
    assert sorted(result["failed"]) == [f"{tmp_path}/{side}/{name}.tif" for name in "bc"]
