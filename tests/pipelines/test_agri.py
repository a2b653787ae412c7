"""agri end to end on drawn fields: each field one plot, whatever the tiling, the engine and the kind of imagery."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
import torch
from PIL import Image
from small_world import GRID, chip_folder, damage, files, mosaic, naming, rayseg, refused, valid_stac, window_at

from rayseg.config import load
from rayseg.engine import flow
from rayseg.engine.ledger import Account
from rayseg.engine.run import Engine, Step, read
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Lattice, Tile, Window
from rayseg.geo.region import Region
from rayseg.io import cog, labels
from rayseg.io.maps import mapped_tiles
from rayseg.io.plot_joins import mask_of as plot_mask
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Scaling
from rayseg.models.plot_classifier import build_plot_classifier
from rayseg.models.sam import SamConfig
from rayseg.models.super_resolution import EnlargeConfig
from rayseg.pipelines import agri
from rayseg.pipelines.agri import Config
from rayseg.stages import classify_plots as stages
from rayseg.stages.propose import ProposePlots
from rayseg.stages.rows import TileRow
from rayseg.stages.to_rgb import ImageConfig
from rayseg.steps import models, super_resolution
from rayseg.steps.map import MapConfig
from rayseg.steps.plots import CLASSES, SCALING
from rayseg.train.classifier import NETWORKS, ClassifierConfig
from rayseg.vision import rle
from rayseg.vision.color import ClassTable
from rayseg.vision.proposals import Proposals, SuperpixelProposer
from rayseg.vision.rounds import RoundsConfig
from rayseg.vision.superpixels import felzenszwalb

pytestmark = pytest.mark.e2e

HEIGHT, WIDTH = 200, 180
SETTINGS = (
    *("--set", "proposer=felzenszwalb", "--set", "patch=96", "--set", "stride=64"),
    *("--set", "superpixels.least=60", "--set", "superpixels.reduce=1", "--engine", "inline"),
)


def fields(seed=1):
    """Fields 50 x 45 px of flat colours with a little noise, 3 px of grey road between them; (image_CHW, field_HW)."""
    rng = np.random.default_rng(seed)
    rows, cols = np.arange(HEIGHT) // 50, np.arange(WIDTH) // 45
    field_HW = rows[:, None] * 4 + cols[None] + 1
    field_HW[(np.arange(HEIGHT) % 50 < 3), :] = 0
    field_HW[:, np.arange(WIDTH) % 45 < 3] = 0
    colors = np.array([(130, 130, 130), *((rng.permutation([40, 110, 190]) + k * 3) for k in range(16))])
    image = colors[field_HW] + rng.normal(0, 3, (HEIGHT, WIDTH, 1))
    return np.clip(image, 1, 254).astype(np.uint8).transpose(2, 0, 1), field_HW


def imagery(folder, image_CHW, *, bands=("red", "green", "blue"), valid_HW=None):
    folder.mkdir(parents=True)
    window = window_at(0, 0, *image_CHW.shape[1:])
    cog.write_image(folder / "scene.tif", image_CHW, GRID, window, bands=bands, nodata=0, valid_HW=valid_HW)
    return f"{labels.ingest_rasters(folder / 'scene.tif', folder / 'cat')}#imagery"


def classifier(prefix, **different):
    """Save a classifier of plots that has learnt nothing; return its prefix."""
    options = {"encoder": "mobilenet_v2", "classes": 2}
    values = {
        "name": "plots",
        "task": "classification",
        "architecture": Architecture(factory="plots", options=options),
        "classes": CLASSES,
        "bands": ("red", "green", "blue"),
        "dtype": "uint8",
        "scaling": SCALING,
        "patch": 64,
        "stride": 64,
    }
    bundle.save(prefix, Bundle(**(values | different)), build_plot_classifier(**options, weights="none").eval())
    return prefix


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    return imagery(tmp_path_factory.mktemp("fields") / "in", fields()[0])


@pytest.fixture(scope="module")
def run(region, tmp_path_factory):
    """Runs by their tile size."""
    made = {}

    def of(tile, *more):
        key = (tile, more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            words = ("run", "pipeline", "agri", "--region", region, "--out", made[key], "--set", f"map.tile={tile}")
            found = rayseg(*words, *SETTINGS, *more)
            assert found.exit_code == 0, found.output
        return made[key]

    return of


def overlaps(table, field_HW):
    """Best IoU with a plot of every field, by pixels."""
    left, _, _, top = GRID.bounds(window_at(0, 0))
    plots = table.to_crs(GRID.crs).geometry
    found = {}
    for field in range(1, 17):
        rows, cols = np.nonzero(field_HW == field)
        box = shapely.box(left + cols.min(), top - rows.max() - 1, left + cols.max() + 1, top - rows.min())
        found[field] = max(p.intersection(box).area / p.union(box).area for p in plots)
    return found


def test_every_field_is_one_plot_with_one_id(run):
    table = geopandas.read_parquet(run(64) / "plots.parquet")
    found = overlaps(table, fields()[1])
    assert min(found.values()) > 0.75, found
    assert table["id"].is_unique
    assert table["number"].tolist() == list(range(1, len(table) + 1))
    assert table["class"].isna().all()
    assert {"id", "class", "score", "stability", "predicted_iou", "area_m2", "round", "refined"} <= set(table.columns)
    assert table["area_m2"].sum() <= 1.01 * HEIGHT * WIDTH


@pytest.mark.more  # engine/test_flow.py: both engines, the same bytes
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_gives_the_same_bytes(run, region, tmp_path):
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=64")
    found = rayseg(*words, *SETTINGS[:-2], "--engine", "ray")
    assert found.exit_code == 0, found.output
    one, other = (
        {name: data for name, (_, data) in files(root / "tiles").items()} for root in (tmp_path / "run", run(64))
    )
    assert one == other
    assert (tmp_path / "run/plots.parquet").read_bytes() == (run(64) / "plots.parquet").read_bytes()


def test_its_map_is_measured_and_made_polygons_like_any_other(run, tmp_path):
    truth_HW = (fields()[1] > 0).astype(np.uint8)
    (tmp_path / "truth").mkdir()
    table = ClassTable(((0, "background", (0, 0, 0)), (1, "plot", (230, 159, 0))))
    cog.write_classes(tmp_path / "truth/scene.tif", truth_HW, GRID, window_at(0, 0), table)
    said = rayseg("evaluate", run(64), tmp_path / "truth", "--json")
    assert said.exit_code == 0, said.output
    [measured] = [row for row in json.loads(said.stdout)["classes"] if row["name"] == "plot"]
    assert measured["iou"]["value"] > 0.8
    made = rayseg("polygonize", run(64), "--out", tmp_path / "plots.geojson")
    assert made.exit_code == 0, made.output
    found = geopandas.read_file(tmp_path / "plots.geojson")
    assert set(found["class"]) == {1}
    assert found["area_m2"].sum() == pytest.approx(
        geopandas.read_parquet(run(64) / "plots.parquet")["area_m2"].sum(),
        rel=1e-5,  # GeoJSON rounds coordinates
    )


ENLARGED = (
    *("--set", "proposer=felzenszwalb", "--set", "patch=384", "--set", "stride=256", "--set", "enlarge={}"),
    *("--set", "superpixels.least=960", "--engine", "inline"),
)


@pytest.mark.more  # plots whatever the tiling, and an enlarged image, each by itself in this file
def test_enlarged_imagery_keeps_its_place_and_gives_the_same_plots_whatever_the_tiling(region, tmp_path):
    for tile in (256, 512):
        words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / f"{tile}")
        found = rayseg(*words, "--set", f"map.tile={tile}", *ENLARGED)
        assert found.exit_code == 0, found.output
    one, other = (tmp_path / f"{tile}/plots.parquet" for tile in (256, 512))
    assert one.read_bytes() == other.read_bytes()
    is_foretold(tmp_path / "256", region, "map.tile=256")
    moved_goes_on(tmp_path / "256", tmp_path / "moved", region, "map.tile=256")
    one = tmp_path / "moved/plots.parquet"
    found = overlaps(geopandas.read_parquet(one), fields()[1])
    assert min(found.values()) > 0.75, found
    with rasterio.open(next((tmp_path / "512/tiles").glob("*/plots.tif"))) as file:
        assert file.res == (GRID.resolution[0] / 4, GRID.resolution[1] / 4)
    counts = [tile.counts for tile in mapped_tiles(tmp_path / "512")]
    assert sum(sum(one.values()) for one in counts) == 16 * HEIGHT * WIDTH
    for path in [*(tmp_path / "512/enlarged").glob("*.json")]:
        valid_stac(path)


def moved_goes_on(out, moved, region, *settings):
    """Check that a run of `ENLARGED` that is moved computes nothing again, and finds its enlarged imagery."""
    assert not naming(out, out)
    before, tiles = files(out), files(out / "tiles")
    out.rename(moved)
    words = ("run", "pipeline", "agri", "--region", region, "--out", moved, *ENLARGED)
    words += tuple(word for setting in settings for word in ("--set", setting))
    assert rayseg(*words).exit_code == 0
    changed = [name for name, found in files(moved).items() if before.get(name) != found and name != ".lock"]
    assert changed == ["run.json"]
    for name in ("steps/predict", "tiles"):
        shutil.rmtree(moved / name)
    found = rayseg(*words)
    assert found.exit_code == 0, found.output
    again = {name: content for name, (_, content) in files(moved / "tiles").items() if name.endswith(".tif")}
    assert again == {name: content for name, (_, content) in tiles.items() if name.endswith(".tif")}


def is_foretold(out, region, *settings):
    """Check the plan of a run of `ENLARGED` against what it did."""
    words = [word for setting in settings for word in ("--set", setting)]
    found = rayseg("plan", "pipeline", "agri", "--region", region, *ENLARGED[:-2], *words, "--json")
    assert found.exit_code == 0, found.output
    plan, status = json.loads(found.stdout), json.loads(rayseg("status", out, "--json").stdout)
    assert (plan["items"], plan["tiles"]) == (1, status["steps"]["predict"]["planned"])
    assert plan["pixels"] == 16 * HEIGHT * WIDTH
    assert plan["bytes_read"] > 0
    written = sum(len(content) for _, content in files(out).values())
    assert 0.5 < plan["bytes_written"] / written < 2
    assert {"EnlargeTiles", "ProposePlots"} <= set(plan["seconds"])


def test_of_tiles_of_the_larger_imagery_only_what_they_need_is_enlarged(region):
    config = MapConfig(imagery=region, tile=256)
    rows, tiles = super_resolution.tiles_to_enlarge(Region("r"), EnlargeConfig(), ImageConfig(), config, halo=384)
    assert len(rows) == len(tiles) > 9
    [corner] = [row for row in tiles if (row["col"], row["row"]) == (tiles[0]["col"], tiles[0]["row"])]
    some = Region("r", tiles=(corner["id"],))
    part, asked = super_resolution.tiles_to_enlarge(some, EnlargeConfig(), ImageConfig(), config, halo=64)
    assert asked[0]["id"] == corner["id"]
    assert len(part) == 4  # its own and its neighbours'
    with pytest.raises(ConfigError, match="has no tile elsewhere"):
        super_resolution.tiles_to_enlarge(
            Region("r", tiles=("elsewhere",)), EnlargeConfig(), ImageConfig(), config, halo=64
        )


def test_an_image_without_georeference_is_enlarged_whole(tmp_path):
    (tmp_path / "in").mkdir()
    image_CHW, field_HW = fields()
    Image.fromarray(image_CHW[:, :90, :90].transpose(1, 2, 0)).save(tmp_path / "in/my field.png")
    catalogue = labels.ingest_folder(tmp_path / "in", tmp_path / "cat")
    words = ("run", "pipeline", "agri", "--region", catalogue, "--out", tmp_path / "run", "--set", "map.tile=256")
    found = rayseg(*words, *ENLARGED)
    assert found.exit_code == 0, found.output
    table = geopandas.read_parquet(tmp_path / "run/plots.parquet")
    assert set(table["image"]) == {"my-field"}
    assert table["area_px"].sum() <= 16 * 90 * 90
    assert table["area_px"].max() > 16 * 0.7 * (field_HW == 1).sum()
    said = refused(3, "labels", "export", tmp_path / "run", tmp_path / "in", "--out", tmp_path / "json")
    assert "a plot extends beyond" in said
    found = rayseg("labels", "export", tmp_path / "run", tmp_path / "run/enlarged", "--out", tmp_path / "json")
    assert found.exit_code == 0, found.output


def test_a_network_that_cannot_enlarge_is_refused_before_anything_is_written(region, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"not weights")
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=256")
    said = refused(4, *words, *ENLARGED, "--set", f"enlarge.weights={tmp_path}/other.pth")
    assert "other.pth (11 bytes) are damaged" in said
    assert not (tmp_path / "run").exists()


def test_plots_do_not_depend_on_the_tiling(run):
    small, large = run(64), run(256)
    assert len(list((small / "tiles").iterdir())) > len(list((large / "tiles").iterdir()))
    assert (small / "plots.parquet").read_bytes() == (large / "plots.parquet").read_bytes()
    assert np.array_equal(mosaic(small, "classes"), mosaic(large, "classes"))


def test_plots_of_a_georeferenced_region_go_out_per_image_and_come_back(run, region, tmp_path):
    folder = Path(region).parent.parent
    found = rayseg("labels", "export", run(256), folder, "--out", tmp_path / "json")
    assert found.exit_code == 0, found.output
    shapes = json.loads((tmp_path / "json/scene.json").read_text())["shapes"]
    mask_HW = np.zeros((HEIGHT, WIDTH), bool)
    for shape in shapes:  # a hole comes after its outline
        mask_HW[plot_mask(shapely.Polygon(shape["points"]), Window(0, 0, WIDTH, HEIGHT))] = not shape["flags"]
    assert np.array_equal(mask_HW, mosaic(run(256), "classes")[0] == 1)
    found = rayseg("labels", "import", tmp_path / "json", folder, "--out", tmp_path / "crops", "--size", 32)
    assert found.exit_code == 0, found.output
    parts = geopandas.read_parquet(run(256) / "plots.parquet").explode()  # an outline for each part of a plot
    assert f"{len(parts)} field, 0 nonfield" in found.stdout


def test_the_label_raster_holds_the_numbers_of_the_table(run):
    table = geopandas.read_parquet(run(256) / "plots.parquet").to_crs(GRID.crs)
    checked = 0
    for path in (run(256) / "tiles").glob("*/plots.tif"):
        with rasterio.open(path) as file:
            numbers_HW, affine = file.read(1), file.transform
            assert file.overviews(1) == []
        for number in np.unique(numbers_HW[(numbers_HW > 0) & (numbers_HW < 2**32 - 1)])[::5]:
            row, col = np.argwhere(numbers_HW == number)[0]
            point = shapely.Point(affine @ (col + 0.5, row + 0.5))
            assert table.loc[table["number"] == number].geometry.iloc[0].buffer(0.01).contains(point)
            checked += 1
    assert checked > len(table) / 10


def test_the_same_command_again_does_nothing_and_items_are_valid(run, region):
    out = run(256)
    before = files(out / "tiles")
    found = rayseg(*("run", "pipeline", "agri", "--region", region, "--out", out, "--set", "map.tile=256"), *SETTINGS)
    assert found.exit_code == 0
    assert files(out / "tiles") == before
    assert read(str(out))["status"] == "done"
    for path in [out / "collection.json", *(out / "tiles").glob("*/*.json")]:
        valid_stac(path)
    page = (out / "report/index.html").read_text()
    assert "Coverage" in page
    assert "Sizes" in page


@pytest.mark.more  # io/test_remote.py, stages: a damaged block fails alone; here: through the whole pipeline
def test_a_damaged_block_costs_its_own_ground_alone_and_is_mended_by_a_retry(tmp_path):
    region = imagery(tmp_path / "in", fields()[0].repeat(5, axis=1).repeat(5, axis=2))
    whole = damage(tmp_path / "in/scene.tif")
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", *SETTINGS)
    sizes = ("map.tile=1024", "patch=768", "stride=512", "superpixels.reduce=8")
    found = rayseg(*words, *(word for size in sizes for word in ("--set", size)))
    assert found.exit_code == 3, found.output
    assert "a part of the tile cannot be read" in found.output
    ground = 25 * HEIGHT * WIDTH
    assert 0.3 * ground < mapped_pixels(tmp_path / "run") < 0.8 * ground
    (tmp_path / "in/scene.tif").write_bytes(whole)
    assert rayseg("retry", tmp_path / "run").exit_code == 0
    assert mapped_pixels(tmp_path / "run") == ground


def mapped_pixels(root):
    """How many pixels of the tiles of a run are not without data."""
    return sum(int((rasterio.open(path).read(1) != 255).sum()) for path in root.glob("tiles/*/classes.tif"))


def test_nodata_is_no_plot(tmp_path):
    valid_HW = np.ones((HEIGHT, WIDTH), bool)
    valid_HW[:70, :100] = False
    region = imagery(tmp_path / "in", fields()[0], valid_HW=valid_HW)
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=64")
    assert rayseg(*words, *SETTINGS).exit_code == 0
    assert np.array_equal(mosaic(tmp_path / "run", "classes")[0] != 255, valid_HW)


def test_coverage_is_of_the_valid_pixels_whatever_patches_see_of_nodata(tmp_path, monkeypatch):
    """An image that is half without data, slantwise, and covered wholly where it has some: 100 %."""
    valid_HW = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) < 190
    region = imagery(tmp_path / "in", fields()[0], valid_HW=valid_HW)
    shown = []
    monkeypatch.setattr(agri.plots.charts, "coverage_chart", lambda patches: shown.extend(patches) or b"")

    def everything(image_HWC, open_HW):
        return Proposals((rle.encode(open_HW),), np.ones(1), np.ones(1)) if open_HW.any() else Proposals.none()

    monkeypatch.setattr(ProposePlots, "_propose", staticmethod(everything))
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=128")
    assert rayseg(*words, *SETTINGS).exit_code == 0
    assert len(shown) > 4
    assert {shares[-1] for _, shares in shown} == {1.0}
    tables = [pq.read_table(path).to_pylist() for path in (tmp_path / "run/steps/propose").glob("*.patches.parquet")]
    windows = [Window(*(one[key] for key in ("col", "row", "width", "height"))) for rows in tables for one in rows]
    there = [int(valid_HW[window.intersect(window_at(0, 0)).slices(window_at(0, 0))].sum()) for window in windows]
    square_metres = GRID.resolution[0] * GRID.resolution[1]
    assert sorted(size for size, _ in shown) == pytest.approx(
        [count * square_metres for count in sorted(there)], rel=0.01
    )


@pytest.mark.parametrize("value", [1, 255, 128])
def test_flat_imagery_has_no_plots_or_one(value, tmp_path):
    region = imagery(tmp_path / "in", np.full((3, HEIGHT, WIDTH), value, np.uint8))
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=256")
    found = rayseg(*words, *SETTINGS)
    assert found.exit_code == 0, found.output
    assert len(geopandas.read_parquet(tmp_path / "run/plots.parquet")) == 0


def test_where_there_are_no_plots_there_is_nothing_to_classify(tmp_path):
    region = imagery(tmp_path / "in", np.full((3, HEIGHT, WIDTH), 128, np.uint8))
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=256")
    found = rayseg(*words, *SETTINGS, "--set", f"classifier={classifier(tmp_path / 'model')}")
    assert found.exit_code == 0, found.output
    assert len(geopandas.read_parquet(tmp_path / "run/plots.parquet")) == 0


def test_a_plot_that_cannot_be_read_is_left_unclassified_alone(region, tmp_path, monkeypatch):
    mask_of, asked = stages.plot_joins.mask_of, []

    def troubled(geometry, window):
        asked.append(window)
        if len(asked) == 3:
            raise DataError("the disk is scratched")
        return mask_of(geometry, window)

    monkeypatch.setattr(stages.plot_joins, "mask_of", troubled)
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=256")
    found = rayseg(*words, *SETTINGS, "--set", f"classifier={classifier(tmp_path / 'model')}")
    assert found.exit_code == 3, found.output
    assert "the disk is scratched" in found.stderr + json.dumps(read(str(tmp_path / "run")))
    table = geopandas.read_parquet(tmp_path / "run/plots.parquet")
    assert table.loc[table["class"].isna(), "number"].tolist() == [3]
    numbers_HW, classes_HW = (mosaic(tmp_path / "run", name)[0] for name in ("plots", "classes"))
    assert set(np.unique(classes_HW[numbers_HW == 3])) == {3}
    assert 3 not in classes_HW[numbers_HW != 3]


@pytest.mark.parametrize(
    "different",
    [
        {"classes": ((0, "nonfield", (0, 0, 0)), (1, "field", (0, 158, 115)))},
        {"dtype": "uint16"},
        {"bands": ("nir",), "scaling": Scaling(mean=(0.0,), std=(1.0,))},
    ],
)
def test_a_model_that_cannot_tell_plots_apart_is_refused(region, tmp_path, different):
    model = classifier(tmp_path / "model", **different)
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", *SETTINGS)
    said = refused(4, *words, "--set", "map.tile=256", "--set", f"classifier={model}")
    assert "plots need classification of 3 bands of uint8 into values above 0" in said
    assert not (tmp_path / "run").exists()


def test_models_are_kept_as_they_are_found_from_any_folder():
    config = Config(classifier="models/plots", sam={"checkpoint": "sam.pth"})
    assert Path(config.classifier) == Path("models/plots").absolute()
    assert Path(config.sam.checkpoint) == Path("sam.pth").absolute()
    for name in ("", "random", "https://example.org/sam.pth"):
        assert Config(sam={"checkpoint": name}).sam.checkpoint == name


def test_proposing_uses_the_threads_of_the_machine_whatever_the_process_was_told(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    seen, tile = [], Tile("a", Grid(None, (1.0, 1.0), (0.0, 0.0), "a"), Window(0, 0, 32, 32))
    look = ProposePlots(
        "felzenszwalb",
        sam=SamConfig(),
        superpixels=SuperpixelProposer(),
        rounds=RoundsConfig(),
        patches=Lattice.of_cells(32, 16),
        geometry=None,
    )

    def propose(image_HWC, _):
        seen.append(torch.get_num_threads())
        return Proposals.joined([])

    look._propose = propose
    first, *_, last = look.patches.cells(tile.window)
    reach = look.patches.around(first).union(look.patches.around(last))
    size = (reach.height, reach.width)
    look([TileRow(tile, "[]", image=np.full((*size, 3), 9, np.uint8), valid=np.ones(size, bool), reach=reach)])
    assert set(seen) == {3}


def test_imagery_without_any_data_is_settled_as_nodata(tmp_path):
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    region = imagery(tmp_path / "in", np.full((3, HEIGHT, WIDTH), 9, np.uint8), valid_HW=nothing)
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=256")
    found = rayseg(*words, *SETTINGS)
    assert found.exit_code == 0, found.output
    assert "Nothing was mapped" in found.stdout


def test_grey_and_16_bit_imagery_is_scaled_by_what_the_configuration_says(tmp_path):
    grey_1HW = fields()[0][:1].astype(np.uint16) * 10
    region = imagery(tmp_path / "in", grey_1HW, bands=("pan",))
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", "map.tile=256")
    said = refused(3, *words, *SETTINGS)
    assert "has the bands pan of uint16, expected red, green, blue of uint8" in said
    assert not (tmp_path / "run").exists()
    image = ("--set", "image.bands=[pan]", "--set", "image.dtype=uint16", "--set", "image.high=2550")
    assert rayseg(*words, *SETTINGS, *image).exit_code == 0
    assert len(geopandas.read_parquet(tmp_path / "run/plots.parquet")) >= 8


def test_what_cannot_be_meant_is_refused_before_anything_is_written(region, tmp_path):
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run")
    assert "must be a multiple of stride" in refused(2, *words, "--set", "map.tile=1000")
    assert "name one or three" in refused(2, *words, "--set", "image.bands=[red, green]")
    missing = refused(4, *words, "--set", f"sam.checkpoint={tmp_path}/none.pth")
    assert "none.pth does not exist; download https://" in missing
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("setting", "code", "said"), [
    ("workers=3", 2, "learning.batch 32 cannot be shared evenly"),
    ("training.encoder=resnet1000", 2, "resnet1000"),
    ("training.weights={}/none.pth", 4, "none.pth cannot be read"),
])  # fmt: skip
def test_a_classifier_that_cannot_be_trained_is_refused_before_plots_are_looked_for(
    region, tmp_path, setting, code, said
):
    folder = chip_folder(tmp_path / "crops")
    for old, new in (("gpc", "field"), ("nongpc", "nonfield")):
        (folder / old).rename(folder / new)
    crops = labels.ingest_folder(folder, tmp_path / "cat", labels="folder")
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", *SETTINGS)
    more = ("map.tile=256", f"chips.source={crops}#chips", "chips.size=64", "training.weights=none")
    settings = [word for one in (*more, setting.format(tmp_path)) for word in ("--set", one)]
    assert said in refused(code, *words, *settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "encoder"), [("chips", "mobilenet_v2"), ("plots", "mobilenet_v2"), ("over-imagenet", "mobilenetv2_035")]
)
def test_every_network_of_the_classifier_has_a_bundle_that_can_be_built(tmp_path, network, encoder):
    settings = ClassifierConfig(network=network, encoder=encoder, weights="none")
    made = NETWORKS[network](**settings.options(classes=2, channels=3), weights="none")
    described = models.classifier_bundle(settings, CLASSES, name="plots", scaling=SCALING)
    bundle.save(tmp_path / "model", described, made)
    assert type(bundle.build(tmp_path / "model")[1]) is type(made)


def test_one_setting_of_the_classifier_leaves_the_others_as_published():
    settings = load(Config, overrides=["training.encoder=mobilenet_v2"]).training
    assert settings == Config().training.model_copy(update={"encoder": "mobilenet_v2"})
    assert (settings.network, settings.size, settings.learning.batch) == ("plots", 224, 32)


def test_classifying_has_the_patience_of_the_map(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(flow, "run", lambda *_, **named: seen.append(named) or Account.of([], {}))
    monkeypatch.setattr(agri.plots, "group_plots", lambda *_: [])
    step = Step("classify", str(tmp_path), "", Engine("inline"))
    model = replace(step, value={"bundle": str(classifier(tmp_path / "model"))})
    agri.classify(step, step, step, model, Config(map={"stall_seconds": 7}))
    assert [named["stall_seconds"] for named in seen] == [7]


def test_plots_have_a_class_where_labelled_crops_are_given(region, tmp_path):
    rng = np.random.default_rng(0)
    for name, color in (("field", (40, 110, 190)), ("nonfield", (130, 130, 130))):
        (tmp_path / "crops" / name).mkdir(parents=True)
        for number in range(4):
            image = np.clip(np.array(color) + rng.normal(0, 5, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "crops" / name / f"{number}.png")
    catalogue = labels.ingest_folder(tmp_path / "crops", tmp_path / "cat", labels="folder")
    trained = (
        *(
            "--set",
            f"chips.source={catalogue}#chips",
            "--set",
            "chips.size=64",
            "--set",
            "training.encoder=mobilenet_v2",
        ),
        *("--set", "training.weights=none", "--set", "training.size=64", "--set", "training.epochs=1"),
        *("--set", "training.learning.batch=4", "--set", "map.tile=128"),
    )
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run")
    found = rayseg(*words, *SETTINGS, *trained)
    assert found.exit_code == 0, found.output
    assert next(iter(read(str(tmp_path / "run"))["steps"])) == "classifier"  # what may fail soonest
    table = geopandas.read_parquet(tmp_path / "run/plots.parquet")
    assert set(table["class"]) <= {"field", "nonfield"}
    assert table["score"].between(0.5, 1).all()
    named = {1: "field", 2: "nonfield"}
    values = set(np.unique(mosaic(tmp_path / "run", "classes"))) - {0, 255}
    assert {named[int(value)] for value in values} == set(table["class"])
    again = rayseg(*words[:-1], tmp_path / "again", *SETTINGS, "--set", f"classifier={tmp_path}/run/models/plots")
    assert again.exit_code == 0, again.output
    other = geopandas.read_parquet(tmp_path / "again/plots.parquet")
    assert other["class"].tolist() == table["class"].tolist()


def reference(folder, field_HW):
    """A mask of ids of the fields."""
    ids = {"bands": ("plot",), "nodata": None, "overviews": "MODE"}
    folder.mkdir()
    cog.write_image(folder / "scene.tif", field_HW.astype(np.uint16)[None], GRID, window_at(0, 0, HEIGHT, WIDTH), **ids)
    return folder


def baselines_of(tmp_path, region, *settings):
    """(step "evaluate", step "baseline", first sentence of the report) of a run with reference plots."""
    truth = reference(tmp_path / "truth", fields()[1])
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--set", f"truth={truth}")
    said = rayseg(*words, *SETTINGS, "--set", "map.tile=128", *settings)
    assert said.exit_code == 0, said.output
    steps = read(str(tmp_path / "run"))["steps"]
    return steps["evaluate"], steps.get("baseline"), steps["report"]["summary"]


def test_superpixels_are_measured_next_to_plots_on_the_same_pixels(region, tmp_path):
    measured, simple, summary = baselines_of(tmp_path, region)
    # The parts are whole tiles here, so that the plots have the measure of the whole run.
    assert simple["product"] == measured["objects"]["f1"]["value"] == 1
    (plain,) = simple["methods"]
    assert plain["name"] == "plain felzenszwalb superpixels"
    image_CHW, field_HW = fields()
    labels_HW = np.zeros((HEIGHT, WIDTH), int)
    for tile in mapped_tiles(tmp_path / "run"):
        part = tile.tile.window.intersect(window_at(0, 0, HEIGHT, WIDTH)).slices(window_at(0, 0, HEIGHT, WIDTH))
        own_HW = felzenszwalb(image_CHW[:, *part].transpose(1, 2, 0), scale=200, sigma=0.5, min_size=200)
        labels_HW[part] = own_HW + labels_HW.max() + 1
    pairs = [(field_HW == a, labels_HW == b) for a in range(1, 17) for b in range(1, labels_HW.max() + 1)]
    hits = sum((a_HW & b_HW).sum() > 0.5 * (a_HW | b_HW).sum() for a_HW, b_HW in pairs)
    assert 0 < hits < 16
    assert plain["value"] == pytest.approx(2 * hits / (16 + labels_HW.max()))
    assert not summary.startswith("This map of plots")
    page = (tmp_path / "run/report/index.html").read_text()
    assert "Against 16 reference plots" in page
    assert "plain felzenszwalb superpixels" in page


def test_a_report_says_first_that_its_plots_are_behind_superpixels(region, tmp_path):
    _, simple, summary = baselines_of(tmp_path, region, "--set", "superpixels.contrast=0.999")
    assert simple["product"] < simple["methods"][0]["value"]
    assert summary.startswith("This map of plots is behind its baseline")


def test_a_reference_that_cannot_be_read_is_refused_before_the_run(region, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", *SETTINGS)
    assert "holds no masks" in refused(3, *words, "--set", f"truth={tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists()
