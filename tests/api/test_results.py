"""An opened run: rasters equal to its files wherever they are cut, tables equal to what its files hold."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - registers `.rio`
from fake_run import UTM, blobs, make, picture
from rasterio.merge import merge
from small_world import catalogue, rayseg

import rayseg as public
from rayseg.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, tiny_model):
    """A finished run of several tiles."""
    root = tmp_path_factory.mktemp("opened")
    imagery = catalogue(root / "imagery", scene={})
    words = ("--out", root / "run", "--engine", "inline", "--set", "map.tile=64")
    found = rayseg("predict", tiny_model, imagery, *words)
    assert found.exit_code == 0, found.output
    return root / "run"


@pytest.mark.parametrize("name", ["classes", "scores"])
def test_a_raster_is_the_mosaic_of_the_tiles(predicted, name):
    array = getattr(public.open(predicted), name)
    files = sorted(predicted.glob(f"tiles/*/{name}.tif"))
    assert len(files) > 4
    expected, transform = merge(files)
    assert (array.rio.transform(), array.rio.crs.to_epsg(), array.rio.nodata) == (transform, 32650, 255)
    assert np.array_equal(array.values.reshape(expected.shape), expected)
    with rasterio.open(files[0]) as file:
        left, bottom, right, top = file.bounds
        part = array.sel(x=slice(left, right), y=slice(top, bottom))
        assert np.array_equal(part.values.reshape(file.count, *file.shape), file.read())


def test_any_selection_equals_that_of_the_whole(predicted):
    array = public.open(predicted).scores
    whole = array.values
    assert array.dims == ("band", "y", "x")
    for cut in ((0, slice(None), slice(3, 90, 7)), (slice(None), slice(80, 20, -5), 11), (0, 5, 6)):
        assert np.array_equal(public.open(predicted).scores[cut].values, whole[cut])
    assert public.open(predicted).scores[:, 9:9].values.shape == (1, 0, whole.shape[2])


def test_a_selection_reads_only_the_tiles_that_it_meets(predicted, monkeypatch):
    seen = []

    def read(sources, *arguments, **options):
        seen.extend(source.item_id for source in sources)
        return real(sources, *arguments, **options)

    real = public.api.results.rasters.read
    monkeypatch.setattr(public.api.results.rasters, "read", read)
    run = public.open(predicted)
    tile = run.tiles[-1]
    left, bottom, right, top = tile.tile.grid.bounds(tile.tile.window)
    assert seen == []
    assert run.classes.sel(x=slice(left, right), y=slice(top, bottom)).values.any()
    assert seen == [tile.tile.id]


def test_attributes_name_the_classes(predicted):
    found = public.open(predicted).classes.attrs
    assert (list(found["flag_values"]), found["flag_meanings"]) == ([0, 1], "background gpc")
    assert found["flag_colors"] == "#000000 #009E73"


def test_tables_are_those_of_the_run(predicted):
    run = public.open(predicted)
    assert (run.status, run.pipeline) == ("done", "predict")
    assert run.polygons.crs.to_epsg() == 4326
    cover = run.polygons[run.polygons["name"] == "gpc"]
    assert cover["pixels"].sum() == (run.sieved.values == 1).sum()
    assert cover["area_m2"].sum() == pytest.approx(cover["pixels"].sum(), rel=0.15)  # of 1 m2 each; outlines are simple
    assert (run.polygons["pixels"] >= 25).all()
    share = (run.classes.values == 1).sum() / run.report["area_m2"]
    assert run.report["shares"]["gpc"] == pytest.approx(share, rel=0.01)
    assert set(run.ledger["status"]) == {"done", "empty"}
    ids = run.ledger.loc[run.ledger["step"] == "predict", "id"]
    assert sorted(ids) == sorted(path.name for path in predicted.glob("tiles/*"))
    assert run.metrics["shares"] == run.report["shares"]  # there is no truth
    with pytest.raises(DataError, match="has no plots; it is a run of predict and done"):
        run.plots  # noqa: B018
    assert "predict" in run._repr_html_()


def test_plots_are_the_table_of_a_run_of_agri(predicted, tmp_path):
    shutil.copytree(predicted, tmp_path / "run")
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    # As agri leaves it: the step plots names its table.
    content["pipeline"], content["steps"] = "agri", {"plots": content["steps"]["polygons"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    assert len(public.open(tmp_path / "run").plots) == len(public.open(predicted).polygons)


def test_images_without_georeference_have_a_grid_each(tmp_path):
    masks = {name: blobs(90, 140, seed=seed) for seed, name in enumerate(("one", "two"))}
    images = {name: (picture(mask), mask, (0, 0)) for name, mask in masks.items()}
    make(tmp_path / "run", images, grid=UTM.__class__(None, (1.0, 1.0), (0.0, 0.0)))
    run = public.open(tmp_path / "run")
    with pytest.raises(DataError, match="has 2 grids"):
        run.classes  # noqa: B018
    for grid in run.grids:
        assert np.array_equal(run.raster("classes", grid).values, masks[grid.image])


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.json"):
        public.open(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'ruin'"):
        public.ruin  # noqa: B018


def test_opening_needs_neither_torch_nor_ray(predicted):
    code = (
        "import sys, rayseg; run = rayseg.open(sys.argv[1]); run.classes.values; run.polygons; run.ledger; "
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code, predicted], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
