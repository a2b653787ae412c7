import json

import numpy as np
import pytest
from PIL import Image
from small_world import catalogue, chip_folder

from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError, DataError, RunIncomplete
from rayseg.geo.grid import Grid, Window
from rayseg.geo.region import Region
from rayseg.io import annotation_requests, cog, labels
from rayseg.io.class_tables import Classes
from rayseg.pipelines.al_s4gan import annotation, chip_pixels, chip_pool
from rayseg.pipelines.al_s4gan.chip_pool import PoolConfig
from rayseg.vision.color import ClassTable, hex_of

REGION = Region("r")
TABLE = ClassTable(((0, "ground", (130, 100, 70)), (1, "wood", (50, 170, 80))))


@pytest.fixture
def folder(tmp_path):
    """Three scenes of 70 x 130 px; the left half is wood, the right ground, 255 at the bottom."""
    for name in ("a", "b", "c"):
        classes = np.zeros((70, 130), np.uint8)
        classes[:, :40], classes[60:] = 1, 255
        image = np.random.default_rng(ord(name)).integers(0, 255, (70, 130, 3)).astype(np.uint8)
        for part, pixels in (("images", image), ("masks", classes)):
            (tmp_path / name / part).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / name / part / "one.png")
    return tmp_path


def found(folder, **settings):
    config = PoolConfig(images=str(folder), size=64, **settings)
    return chips(config)


def chips(config, *, region=REGION, table=TABLE, seed=1):
    return chip_pool.divide(chip_pool.find_chips(region, config, table), config, table, seed=seed)


def test_chips_are_whole_cells_with_the_class_of_most_of_their_pixels(folder):
    rows = found(folder, validation=["c"], test=["b"])
    assert [(row["id"], row["part"], row["label"]) for row in rows] == [
        (f"{scene}-one_{cell}_0", part, label)
        for scene, part in (("a", "pool"), ("b", "test"), ("c", "validation"))
        for cell, label in ((0, "wood"), (1, "ground"))
    ]
    image = np.asarray(Image.open(folder / "a" / "images" / "one.png"))
    assert np.array_equal(chip_pixels.image_of(rows[1]), image[:64, 64:128])
    mask = np.asarray(Image.open(folder / "a" / "masks" / "one.png"))
    assert np.array_equal(chip_pixels.mask_of(rows[1], TABLE, ""), mask[:64, 64:128])
    chips = chip_pixels.masked_chips(rows, TABLE, "")
    assert (chips.count, len(chips), chips.read(0).shape) == (2, 6, (64, 64, 3))


def test_an_image_smaller_than_a_chip_is_one_chip_without_labels_beyond_its_edge(folder):
    rows = chips(PoolConfig(images=str(folder), size=96))
    assert [row["id"] for row in rows] == ["a-one_0_0", "b-one_0_0", "c-one_0_0"]
    image = np.asarray(Image.open(folder / "a" / "images" / "one.png"))
    shown, mask = chip_pixels.image_of(rows[0]), chip_pixels.mask_of(rows[0], TABLE, "")
    assert np.array_equal(shown[:70], image[:, :96])
    assert np.array_equal(shown[70:], image[68:42:-1, :96])
    assert (mask[60:] == 255).all()
    assert set(mask[:60].ravel()) == {0, 1}


def test_scenes_are_never_divided(folder):
    for seed in range(4):
        rows = chips(PoolConfig(images=str(folder), size=32), seed=seed)
        parts = {row["scene"]: set() for row in rows}
        for row in rows:
            parts[row["scene"]].add(row["part"])
        assert all(len(own) == 1 for own in parts.values())
        assert {part for own in parts.values() for part in own} == {"pool", "validation"}


def test_what_cannot_be_is_refused(folder):
    with pytest.raises(ConfigError, match=r"pool.test names z, the scenes are a, b, c"):
        found(folder, test=["z"])
    with pytest.raises(ConfigError, match="expected one or more for training"):
        found(folder, test=["a", "b", "c"])
    for name in ("a", "b", "c"):
        cut_away = np.zeros((70, 130, 4), np.uint8)  # transparent: no imagery
        Image.fromarray(cut_away).save(folder / name / "images" / "one.png")
    with pytest.raises(DataError, match="the pool has no chips of 64 px"):
        chips(PoolConfig(images=str(folder), size=64))
    three = ClassTable((*TABLE.classes, (2, "water", (0, 0, 255))))
    with pytest.raises(DataError, match="class water has no pixel in any mask"):
        chips(PoolConfig(images=str(folder), size=64), table=three)


def test_pixels_are_read_once_by_the_check_however_often_they_are_divided(folder, tmp_path, monkeypatch):
    read, windows = chip_pool.rasters.read, []
    monkeypatch.setattr(
        chip_pool.rasters, "read", lambda *given, **more: windows.append(given[2]) or read(*given, **more)
    )
    config = PoolConfig(images=str(folder), size=50)
    chip_list = chip_pool.find_chips(REGION, config, TABLE)
    rows = [chip_pool.divide(chip_list, config, TABLE, seed=seed) for seed in (1, 2)]
    assert [len({row["part"] for row in part}) for part in rows] == [2, 2]
    classes = [{"name": name, "color": hex_of(color)} for _, name, color in TABLE.classes]
    kinds = Classes.model_validate({"classes": classes})
    step = Step("pool", str(tmp_path / "run"), "key", Engine("inline"))
    chip_pool.list_pool(step, REGION, config, kinds, 1, None, chip_list=chip_list)
    assert [row["id"] for row in chip_pool.rows_of(step, "pool")] == [
        row["id"] for row in rows[0] if row["part"] == "pool"
    ]
    assert len(windows) == 3 * 2


def test_imagery_that_chips_cannot_be_cut_from_is_refused(tmp_path):
    deep = catalogue(tmp_path / "deep", one={"dtype": "uint16"}, two={"dtype": "uint16", "col": 400})
    with pytest.raises(DataError, match=r"one has red, green, blue of uint16, chips are red, green, blue of uint8"):
        chips(PoolConfig(size=96), region=Region("r", catalog=str(deep)))
    narrow = catalogue(
        tmp_path / "narrow", one={"bands": ("red", "green")}, two={"bands": ("red", "green"), "col": 400}
    )
    with pytest.raises(DataError, match="one has red, green of uint8"):
        chips(PoolConfig(size=96), region=Region("r", catalog=str(narrow)))


def test_no_class_of_labelled_images_is_held_out_as_a_whole(tmp_path):
    path = labels.ingest_folder(str(chip_folder(tmp_path / "chips", counts=(3, 1))), tmp_path / "cat", labels="folder")
    with pytest.raises(DataError, match=r"pool.share 0.2 keeps all 1 images labelled nongpc for validation"):
        chips(PoolConfig(chips=f"{path}#chips", size=64))


def test_a_map_of_other_classes_is_no_mask_of_labelled_images(tmp_path):
    path = labels.ingest_folder(str(chip_folder(tmp_path / "chips")), tmp_path / "cat", labels="folder")
    shape = Grid(None, (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 64, 64)
    for name in ("gpc", "nongpc"):
        for number in range(3):
            target = tmp_path / "masks" / f"{name}-{number}.tif"
            cog.write_classes(target, np.eye(64, dtype=np.uint8), *shape, TABLE)
    config = PoolConfig(chips=f"{path}#chips", size=64, masks=str(tmp_path / "masks"))
    assert {row["label"] for row in chips(config)} == {"gpc", "nongpc"}
    other = ClassTable(((0, "wood", (50, 170, 80)), (1, "soil", (130, 100, 70))))
    with pytest.raises(DataError, match=r"masks has the classes ground, wood, but ground is not among .* wood, soil"):
        chips(config, table=other)


def test_chips_of_placed_scenes_are_exported_where_they_lie_and_their_masks_come_back(tmp_path):
    path = catalogue(tmp_path / "world", one={"margin": 0}, two={"margin": 0, "col": 400})
    config = PoolConfig(size=96, validation=("two",))
    rows = chips(config, region=Region("r", catalog=str(path)))
    assert [row["id"] for row in rows] == ["one_0_0", "one_0_1"]
    run = tmp_path / "run"
    with pytest.raises(RunIncomplete, match="2 chips need masks"):
        annotation.expect_masks(str(run), rows, TABLE)
    first, second = json.loads((run / "to-label" / "chips.geojson").read_text())["features"]
    tops = [max(y for _, y in one["geometry"]["coordinates"][0]) for one in (first, second)]
    assert tops[0] - tops[1] == pytest.approx(96 / 111_000, rel=0.02)
    (tmp_path / "drawn").mkdir()
    for row in rows:
        Image.fromarray(np.full((96, 96), 1, np.uint8)).save(tmp_path / "drawn" / f"{row['id']}.png")
    other = tmp_path / "drawn" / "one_0_0.tif"
    Image.fromarray(np.full((96, 96), 0, np.uint8)).save(other)
    with pytest.raises(DataError, match="holds several masks named one_0_0; keep one of each name"):
        annotation_requests.load(tmp_path / "drawn", str(run))
    other.unlink()
    assert annotation_requests.load(tmp_path / "drawn", str(run)) == (2, [])
    assert annotation.known_labels(str(run), rows, TABLE) == ["wood", "wood"]
    annotation.expect_masks(str(run), rows, TABLE)
    assert np.array_equal(cog.read_bands(run / "masks" / "one_0_0.tif")[0], np.ones((96, 96)))
