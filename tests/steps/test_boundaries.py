"""A network for boundaries, from drawn plots to plots of a region: by masks of ids, polygons and LabelMe's JSONs."""

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from PIL import Image
from small_world import rayseg, refused

from rayseg.geo.grid import Grid, Window
from rayseg.io.instances import Polygons
from rayseg.models import bundle
from rayseg.vision.boundaries import BACKGROUND, BOUNDARY, FIELD, classes_of, divided

SIDE = 96
SMALL = (
    *("--set", "proposer=boundaries", "--set", "boundaries.segmenter.encoder=mobilenet_v2"),
    *("--set", "boundaries.segmenter.weights=none", "--set", "boundaries.segmenter.enlarge=1"),
    *("--set", "boundaries.segmenter.epochs=6", "--set", "boundaries.segmenter.sampling.size=64"),
    *("--set", "boundaries.segmenter.sampling.windows=64", "--set", "boundaries.segmenter.schedule.rate=0.005"),
    *("--set", "boundaries.segmenter.augment.jitter=0", "--set", "boundaries.segmenter.augment.scale=[1,1]"),
    *("--set", "boundaries.patch=96", "--set", "boundaries.stride=64"),
    *("--set", "patch=160", "--set", "stride=128", "--set", "map.tile=128", "--engine", "inline"),
)


def fields(seed):
    """(image (SIDE, SIDE, 3), ids): plots 20 to 28 px wide of one green, with dark lines of 2 px between them."""
    rng = np.random.default_rng(seed)
    rows, cols = (np.searchsorted(np.cumsum(rng.integers(20, 29, 4)), np.arange(SIDE), side="right") for _ in range(2))
    ids_HW = rows[:, None] * 5 + cols[None] + 1
    line_HW = np.zeros((SIDE, SIDE), bool)
    line_HW[1:] |= ids_HW[1:] != ids_HW[:-1]
    line_HW[:, 1:] |= ids_HW[:, 1:] != ids_HW[:, :-1]
    image = np.where(line_HW[..., None], (60, 50, 40), (90, 160, 80)) + rng.normal(0, 4, (SIDE, SIDE, 1))
    return np.clip(image, 1, 254).astype(np.uint8), ids_HW.astype(np.uint16)


def drawn(folder, count, *, masks=True, first=0):
    (folder / "images").mkdir(parents=True)
    if masks:
        (folder / "masks").mkdir()
    for k in range(first, first + count):
        image_HWC, ids_HW = fields(k)
        Image.fromarray(image_HWC).save(folder / "images" / f"chip{k}.png")
        if masks:
            shape = {"driver": "PNG", "count": 1, "dtype": "uint16", "height": SIDE, "width": SIDE}
            with rasterio.open(folder / "masks" / f"chip{k}.png", "w", **shape) as file:
                file.write(ids_HW, 1)
    return folder


def test_boundaries_are_on_both_sides_of_a_border_and_what_is_not_labelled_stays_so():
    ids_HW = np.zeros((6, 8), np.int64)
    ids_HW[:, 2:5], ids_HW[:, 5:] = 7, 9
    ids_HW[0] = -1
    assert classes_of(ids_HW)[0].tolist() == [255] * 8
    b, f, e = BACKGROUND, FIELD, BOUNDARY
    assert classes_of(ids_HW)[3].tolist() == [b, e, e, f, e, e, f, f]


def ridges(height):
    """A map of three plots of 20 px in a row, with ridges of .8 and `height` between them, in a frame of background."""
    map_CHW = np.zeros((3, 40, 74), np.float32)
    map_CHW[0], map_CHW[0, 5:35, 5:69] = 1, 0
    map_CHW[1, 5:35, 5:69] = 0.95
    map_CHW[1, 5:35, 25:29], map_CHW[1, 5:35, 47:51] = 1 - 0.8, 1 - height
    map_CHW[2] = 1 - map_CHW[0] - map_CHW[1]
    return map_CHW


@pytest.mark.parametrize(("level", "count"), [(0.05, 3), (0.4, 2), (0.9, 1)])
def test_a_higher_level_merges_plots_along_their_weakest_boundary(level, count):
    labels_HW = divided(ridges(0.3), level=level, slivers=0)
    assert labels_HW.max() == count
    assert (labels_HW[:5] == 0).all()
    assert (labels_HW[10:30, 5:69] > 0).all()  # plots meet: what is between them belongs to one of them


def test_slivers_of_a_map_are_given_to_their_neighbours():
    map_CHW = ridges(0.3)
    map_CHW[1, 5:35, 5:9], map_CHW[2, 5:35, 5:9] = 0.95, 0.05
    map_CHW[1, 5:35, 9:11], map_CHW[2, 5:35, 9:11] = 0.1, 0.9
    assert divided(map_CHW, level=0.05, slivers=0).max() == 4
    assert divided(map_CHW, level=0.05, slivers=6).max() == 3


@pytest.mark.parametrize(("most", "count"), [(0.2, 2), (0.4, 3)])
def test_a_plot_that_is_background_on_average_is_none(most, count):
    map_CHW = ridges(0.9)
    map_CHW[1, 5:35, 29:47] -= 0.35  # the plot in the middle: background .35, below .5 in each pixel
    map_CHW[0, 5:35, 29:47] += 0.35
    labels_HW = divided(map_CHW, level=0.05, slivers=0, background=most)
    assert sorted(set(labels_HW[20].tolist())) == list(range(count + 1))
    left, middle, right = (int(labels_HW[20, column]) for column in (10, 38, 60))
    assert left > 0 < right != left
    assert (middle > 0) == (most > 0.35)


@pytest.mark.e2e
@pytest.mark.more
def test_plots_are_learnt_from_masks_and_found_in_new_images(tmp_path):
    source, new = drawn(tmp_path / "drawn", 8), drawn(tmp_path / "new", 2, first=20)
    words = ("run", "pipeline", "agri", "--region", new / "images", *SMALL, "--set", f"boundaries.source={source}")
    found = rayseg(*words, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    said = json.loads(rayseg("evaluate", tmp_path / "run", new / "masks", "--json").stdout)
    assert said["objects"]["f1"]["value"] > 0.8
    described = bundle.description(tmp_path / "run" / "models" / "boundaries")
    assert described.level
    assert described.metrics["f1"] > 0.8
    # the bundle maps its classes as any other, and proposes plots again without training
    assert (
        rayseg("predict", tmp_path / "run/models/boundaries", new / "images", "--out", tmp_path / "map").exit_code == 0
    )
    again = rayseg(
        *("run", "pipeline", "agri", "--region", new / "images", *SMALL, "--out", tmp_path / "again"),
        *("--set", f"boundaries.model={tmp_path / 'run/models/boundaries'}"),
    )
    assert again.exit_code == 0, again.output
    one, other = (geopandas.read_parquet(tmp_path / name / "plots.parquet") for name in ("run", "again"))
    assert one.geometry.equals(other.geometry)


def test_polygons_give_the_ids_that_masks_give(tmp_path):
    _, ids_HW = fields(3)
    boxes, shapes = [], []
    for number in range(1, int(ids_HW.max()) + 1):
        rows, cols = np.nonzero(ids_HW == number)
        if len(rows):
            boxes.append(shapely.box(cols.min(), rows.min(), cols.max() + 1, rows.max() + 1))
            points = [[float(x), float(y)] for x, y in boxes[-1].exterior.coords[:-1]]
            shapes.append({"label": "1", "points": points, "shape_type": "polygon", "group_id": number, "flags": {}})
    shapes.append({"label": "0", "points": [[0, 0], [50, 0], [50, 50]], "shape_type": "polygon", "flags": {}})
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "chip3.json").write_text(json.dumps({"shapes": shapes, "imagePath": "chip3.png"}))
    geopandas.GeoDataFrame({"image": ["chip3"] * len(boxes)}, geometry=boxes).to_parquet(tmp_path / "plots.parquet")
    grid, window = Grid(None, (1.0, 1.0), (0.0, 0.0), "chip3"), Window(0, 0, SIDE, SIDE)
    for path in (tmp_path / "json", tmp_path / "plots.parquet"):
        found_HW = Polygons.open(str(path)).ids(grid, window)
        assert np.array_equal(classes_of(found_HW), classes_of(ids_HW.astype(np.int64)))
    assert not Polygons.open(str(path)).on(Grid(None, (1.0, 1.0), (0.0, 0.0), "chip4"))


def test_what_cannot_be_learnt_from_is_refused(tmp_path):
    source = drawn(tmp_path / "drawn", 3, masks=False)
    words = ("run", "pipeline", "agri", "--region", source / "images", *SMALL, "--out", tmp_path / "run")
    said = refused(3, *words, "--set", f"boundaries.source={source}")
    assert "0 of the 3 images to learn boundaries from have masks, expected at least 2" in said
    assert not (tmp_path / "run").exists()
