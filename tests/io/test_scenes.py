import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image

from rayseg.config import load
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.lonlat import transformer
from rayseg.io import class_tables, cog, labels, scenes
from rayseg.io.scenes import LabelledImage, Pairs
from rayseg.vision.color import ClassTable, decode

TABLE = ClassTable(((0, "land", (132, 41, 246)), (1, "water", (226, 169, 41))), ignore=((155, 155, 155),))
BANDS = ("red", "green", "blue")


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3)).astype(np.uint8)


def classes(height, width, seed=0):
    found = np.random.default_rng(seed + 100).choice([0, 1, 255], (height, width), p=[0.5, 0.4, 0.1]).astype(np.uint8)
    found[:4] = 255
    return found


def colored(classes_HW):
    lut = np.full((256, 3), 155, np.uint8)
    lut[:2] = TABLE.colors
    return lut[classes_HW]


def write_scene(folder, names, *, size=(50, 70), kind="rgb"):
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True)
    for seed, name in enumerate(names):
        Image.fromarray(pixels(*size, seed)).save(folder / "images" / f"{name}.png")
        mask = classes(*size, seed)
        if kind == "rgb":
            Image.fromarray(colored(mask)).save(folder / "masks" / f"{name}.png")
        elif kind == "index":
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
        else:
            shuffled = np.select([mask == 0, mask == 1], [np.uint8(7), np.uint8(3)], np.uint8(9))
            image = Image.fromarray(shuffled, mode="P")
            palette = np.zeros((256, 3), np.uint8)
            palette[[7, 3, 9]] = [*TABLE.colors, (155, 155, 155)]
            image.putpalette(palette.ravel().tolist())
            image.save(folder / "masks" / f"{name}.png")


def test_images_of_many_scenes_keep_names_and_scenes_apart(tmp_path):
    for scene in ("east", "west"):
        write_scene(tmp_path / scene, ["part 1", "part 2"])
    found = scenes.labelled_images(str(tmp_path))
    assert [(one.id, one.scene) for one in found] == [
        ("east-part-1", "east"), ("east-part-2", "east"), ("west-part-1", "west"), ("west-part-2", "west"),
    ]  # fmt: skip
    assert [LabelledImage.from_row(one.to_row()) for one in found] == found
    assert sorted(source.item_id for source in labels.sources_of_images(tmp_path)[0]) == [one.id for one in found]


def test_without_scenes_every_image_is_one_and_masks_may_be_missing(tmp_path):
    write_scene(tmp_path, ["a", "b"])
    (tmp_path / "masks" / "b.png").unlink()
    found = scenes.labelled_images(str(tmp_path))
    assert [(one.id, one.scene, len(one.masks)) for one in found] == [("a", "a", 1), ("b", "b", 0)]
    image, mask = scenes.read_window(found[1], Window(0, 0, 70, 50), bands=BANDS, table=TABLE)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), pixels(50, 70, 1))
    assert (mask == 255).all()


@pytest.mark.parametrize("kind", ["rgb", "index", "palette"])
def test_a_window_is_the_image_and_its_mask_and_unlabelled_beyond(tmp_path, kind):
    write_scene(tmp_path, ["a"], kind=kind)
    [one] = scenes.labelled_images(str(tmp_path))
    image, mask = scenes.read_window(one, Window(60, 40, 30, 20), bands=BANDS, table=TABLE)
    np.testing.assert_array_equal(image[:, :10, :10].transpose(1, 2, 0), pixels(50, 70)[40:, 60:])
    np.testing.assert_array_equal(mask[:10, :10], classes(50, 70)[40:, 60:])
    assert (mask[10:] == 255).all()
    assert (mask[:, 10:] == 255).all()
    np.testing.assert_array_equal(image[:, 10:18, :10], image[:, 8:0:-1, :10])  # mirrored at the edge


def test_cells_count_every_labelled_pixel_once(tmp_path, monkeypatch):
    write_scene(tmp_path, ["a"])
    [one] = scenes.labelled_images(str(tmp_path))
    truth = classes(50, 70)
    for rows in (4096, 16):
        monkeypatch.setattr(scenes, "_ROWS", rows)
        counts = scenes.count_classes(one, TABLE, cell=16)
        assert counts.shape == (4, 5, 2)
        assert counts[1, 4].tolist() == [(truth[16:32, 64:] == k).sum() for k in (0, 1)]
        assert counts.sum(axis=(0, 1)).tolist() == [(truth == k).sum() for k in (0, 1)]


def test_scenes_of_a_catalogue_meet_their_masks_by_place(tmp_path):
    grid = Grid("EPSG:32650", (1.0, 1.0), (500_000.0, 4_400_000.0))
    truth = classes(40, 80)
    for number in (0, 1):
        window = Window(40 * number, 0, 40, 40)
        part = pixels(40, 80)[:, 40 * number :][:, :40]
        (tmp_path / "in").mkdir(exist_ok=True)
        cog.write_image(
            tmp_path / "in" / f"part{number}.tif", part.transpose(2, 0, 1), grid, window, bands=BANDS, nodata=0,
            valid_HW=np.ones((40, 40), bool),
        )  # fmt: skip
    (tmp_path / "masks").mkdir()
    cog.write_classes(tmp_path / "masks" / "all.tif", truth, grid, Window(0, 0, 80, 40), TABLE)
    catalogue = labels.ingest_rasters(tmp_path / "in", tmp_path / "cat")
    found = scenes.labelled_images(f"{catalogue}#imagery", str(tmp_path / "masks"))
    assert [(one.id, one.scene, len(one.masks)) for one in found] == [("part0", "part0", 1), ("part1", "part1", 1)]
    image, mask = scenes.read_window(found[1], found[1].window, bands=BANDS, table=TABLE)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), pixels(40, 80)[:, 40:])
    np.testing.assert_array_equal(mask, truth[:, 40:])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
    write_scene(tmp_path, ["a"])
    Image.fromarray(colored(classes(50, 69))).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"a.png has 50 x 70 px, its mask .*a.png has 50 x 69 px; give both the same"):
        scenes.labelled_images(str(tmp_path))


def test_a_colour_of_no_class_is_named_with_its_count(tmp_path):
    write_scene(tmp_path, ["a"])
    mask = colored(classes(50, 70))
    mask[5:7, 5:10] = (255, 0, 0)
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    [one] = scenes.labelled_images(str(tmp_path))
    with pytest.raises(DataError, match=r"a.png: mask colour #FF0000 \(10 pixels; 1 unknown colours in all\)"):
        scenes.count_classes(one, TABLE, cell=64)


def test_folders_without_images_and_masks_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no folder called images"):
        scenes.labelled_images(str(tmp_path))
    write_scene(tmp_path, ["a"])
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "b.png")
    with pytest.raises(DataError, match=r"masks a in .* match no image"):
        scenes.labelled_images(str(tmp_path))


# -- split ------------------------------------------------------------------------------------------------------------


def image_of(scene, name):
    return LabelledImage(f"{scene}-{name}", scene, None, (), Grid(None, (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 1, 1))


IMAGES = [image_of(scene, name) for scene in "abcde" for name in "12"]


@pytest.mark.parametrize(("crs", "east"), [("EPSG:32722", 70), ("EPSG:32622", 0), ("EPSG:4326", 90)])
def test_a_mask_that_lies_elsewhere_than_its_image_is_refused_by_name(tmp_path, crs, east):
    place = Affine(10, 0, 300_000, 0, -10, 7_000_000)
    other = Affine(1e-4, 0, east, 0, -1e-4, 9) if crs == "EPSG:4326" else place @ Affine.translation(east, 0)
    for sub, where, code in (("images", place, "EPSG:32722"), ("masks", other, crs)):
        (tmp_path / sub).mkdir()
        values = pixels(50, 70).transpose(2, 0, 1) if sub == "images" else classes(50, 70)[None]
        profile = {"driver": "GTiff", "count": len(values), "height": 50, "width": 70, "dtype": "uint8"}
        with rasterio.open(tmp_path / sub / "a.tif", "w", crs=code, transform=where, **profile) as file:
            file.write(values)
    with pytest.raises(DataError, match=r"masks/a.tif lies elsewhere on Earth than its image .*images/a.tif"):
        scenes.labelled_images(str(tmp_path), table=TABLE)


GRIDS = {  # of a mask whose left half of the image's 700 m is class 1
    "pixels twice as large": ("EPSG:32633", Affine(20, 0, 400_000, 0, -20, 4_400_000), (25, 35)),
    "a part, shifted": ("EPSG:32633", Affine(10, 0, 400_100, 0, -10, 4_399_900), (30, 40)),
    "south-up": ("EPSG:32633", Affine(10, 0, 400_000, 0, 10, 4_399_500), (50, 70)),
    "degrees": ("EPSG:4326", Affine(2e-5, 0, 13.83, 0, -2e-5, 39.745), (500, 1000)),
    "another zone": ("EPSG:32632", Affine(10, 0, 914_000, 0, -10, 4_410_700), (100, 120)),
    "a flipped grid of the south": ("EPSG:32733", Affine(5, 0, 400_000, 0, -5, 14_400_000), (100, 140)),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_a_mask_next_to_its_image_lies_where_its_georeference_says(tmp_path, kind):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    image_CHW = pixels(50, 70).transpose(2, 0, 1)
    profile = {"driver": "GTiff", "dtype": "uint8"}
    place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 400_000, 0, -10, 4_400_000)}
    with rasterio.open(tmp_path / "images/a.tif", "w", count=3, height=50, width=70, **place, **profile) as file:
        file.write(image_CHW)
        file.descriptions = BANDS
    crs, affine, (height, width) = GRIDS[kind]
    rows, cols = np.mgrid[:height, :width]
    xs, ys = affine @ (cols + 0.5, rows + 0.5)
    xs = np.array(transformer(crs, "EPSG:32633").transform(xs.ravel(), ys.ravel())[0]).reshape(xs.shape)
    with rasterio.open(
        tmp_path / "masks/a.tif", "w", count=1, height=height, width=width, crs=crs, transform=affine, **profile
    ) as file:
        file.write((xs < 400_340).astype(np.uint8), 1)
    [image] = scenes.labelled_images(str(tmp_path), table=TABLE)
    read_CHW, classes_HW = scenes.read_window(image, image.window, bands=BANDS, table=TABLE)
    assert np.array_equal(read_CHW, image_CHW)
    known_HW = classes_HW != 255
    assert known_HW.mean() == (pytest.approx(30 * 40 / 3500) if "part" in kind else pytest.approx(1, abs=0.05))
    expected_HW = np.broadcast_to(np.arange(70) < 34, (50, 70))
    assert (classes_HW == expected_HW)[known_HW].mean() > (0.98 if image.masks[0].crs != "EPSG:32633" else 0.999)


def test_a_split_never_divides_a_scene():
    for seed in range(5):
        learn, choose = scenes.split(IMAGES, share=0.4, seed=seed)
        assert len(learn) == 6
        assert not {one.scene for one in learn} & {one.scene for one in choose}
        assert (learn, choose) == scenes.split(IMAGES, share=0.4, seed=seed)
    assert {one.scene for one in scenes.split(IMAGES, validation=["d", "a"])[1]} == {"a", "d"}
    assert len({tuple(one.id for one in scenes.split(IMAGES, seed=seed)[1]) for seed in range(20)}) == 5


def test_a_split_that_cannot_be_meant_is_refused():
    with pytest.raises(DataError, match="there is no scene x, the scenes are a, b, c, d, e"):
        scenes.split(IMAGES, validation=["a", "x"])
    with pytest.raises(DataError, match=r"all 5 scenes .* expected one or more for training"):
        scenes.split(IMAGES, validation=["a", "b", "c", "d", "e"])


def test_classes_without_pixels_and_splits_that_leave_one_out_are_refused():
    named = {"training": ["a"], "validation": ["b"]}

    def expect(training, validation, absent=()):
        counts = {"training": np.array(training), "validation": np.array(validation)}
        scenes.expect_classes(counts, TABLE, named, absent)

    with pytest.raises(DataError, match=r"the validation scenes \(b\) have no labelled pixel"):
        expect([1, 1], [0, 0])
    expect([1, 1], [1, 0])
    with pytest.raises(DataError, match="class water has no pixel in any mask"):
        expect([1, 0], [1, 0])
    with pytest.raises(DataError, match=r"leaves class water out: none of its 7 pixels .*\(a\), all are in b"):
        expect([1, 0], [1, 7])
    expect([1, 0], [1, 0], absent=["water"])
    with pytest.raises(ConfigError, match="absent names mud, the classes are land, water"):
        expect([1, 1], [1, 1], absent=["mud"])


# -- tables -----------------------------------------------------------------------------------------------------------


def test_class_tables_are_found_by_name_by_path_or_given_whole(tmp_path):
    assert class_tables.read_table("dubai").names == ("building", "land", "road", "vegetation", "water")
    assert len(class_tables.read_table("ucm").classes) == 18
    assert class_tables.Classes.model_validate("dubai").table == class_tables.read_table("dubai")
    (tmp_path / "t.yaml").write_text("classes: [{name: a, color: '#010203'}, {name: b, color: [4, 5, 6]}]")
    given = class_tables.Classes.model_validate(str(tmp_path / "t.yaml"))
    assert given.table.classes == ((0, "a", (1, 2, 3)), (1, "b", (4, 5, 6)))
    assert class_tables.Classes.model_validate(given.model_dump(mode="json")) == given
    with pytest.raises(ConfigError, match=r"class table nowhere cannot be read: .*or one of deepglobe, .*, ucm"):
        class_tables.read_table("nowhere")
    (tmp_path / "t.yaml").write_text("classes:\n- name: field\n  color: #010203\n")
    said = r"class table .*t.yaml: class field: colour is None.*put the colour in quotes"
    for read in (class_tables.read_table, class_tables.Classes.model_validate):
        with pytest.raises(ConfigError, match=said):
            read(str(tmp_path / "t.yaml"))
    (tmp_path / "t.yaml").write_text("classes: [{name: a, color: '#010203'}, {name: a, color: '#010204'}]")
    with pytest.raises(ConfigError, match="class names are a, a, expected all different; rename a class"):
        class_tables.read_table(str(tmp_path / "t.yaml"))


def test_impure_colours_are_taken_as_the_nearest_corner():
    table = class_tables.read_table("deepglobe")
    mask = np.array([[[3, 250, 130], [127, 127, 127], [128, 255, 200]]], np.uint8)
    assert decode(mask, table).tolist() == [[0, 6, 5]]
    with pytest.raises(DataError, match=r"mask colour #FF0000 \(1 pixels"):
        decode(np.array([[[200, 1, 1]]], np.uint8), table)


@pytest.mark.real
def test_coloured_masks_are_read_as_the_prototype_reads_them(shared):
    golden = np.load(shared / "golden" / "landcover" / "rgb2anno.npz", allow_pickle=False)
    red_HW = (golden["rgb"] >= 128) @ np.array([4, 2, 1]) == 4  # of no class; the prototype takes it for urban
    found = decode(np.where(red_HW[..., None], np.uint8(0), golden["rgb"]), class_tables.read_table("deepglobe"))
    assert red_HW.any()
    np.testing.assert_array_equal(found[~red_HW], golden["label"][~red_HW])


@pytest.mark.real
def test_masks_of_a_palette_are_read_by_its_colours(shared):
    found = scenes.labelled_images(str(shared / "data" / "landcover"))
    indices = np.asarray(Image.open(shared / "data" / "landcover" / "masks" / "3.png"))
    counts = scenes.count_classes(found[1], class_tables.read_table("deepglobe"), cell=4096)
    assert counts[0, 0].tolist() == np.bincount(indices.ravel(), minlength=7).tolist()


@pytest.mark.parametrize(
    ("image", "mask"), [("{}_sat.jpg", "{}_mask.png"), ("{}.png", "{}_label.png"), ("sat-{}.png", "{}.tif")]
)
def test_images_and_masks_of_one_folder_are_paired_by_their_names(tmp_path, image, mask):
    for seed, name in enumerate(("11", "12", "13")):
        Image.fromarray(pixels(20, 30, seed)).save(tmp_path / image.format(name))
        if name != "13":
            Image.fromarray(classes(20, 30, seed)).save(tmp_path / mask.format(name))
    found = scenes.labelled_images(str(tmp_path), table=TABLE, pairs=Pairs(image=image, mask=mask))
    assert [(one.id, one.scene, len(one.masks)) for one in found] == [("11", "11", 1), ("12", "12", 1), ("13", "13", 0)]
    _, classes_HW = scenes.read_window(found[1], found[1].window, bands=BANDS, table=TABLE)
    assert np.array_equal(classes_HW, classes(20, 30, 1))


def test_pairs_that_match_nothing_name_the_pattern(tmp_path):
    Image.fromarray(classes(20, 30)).save(tmp_path / "1_mask.png")
    with pytest.raises(DataError, match=r"holds no file called \{\}_sat.jpg"):
        scenes.labelled_images(str(tmp_path), table=TABLE, pairs=Pairs())
    Image.fromarray(pixels(20, 30)).save(tmp_path / "2_sat.jpg")
    with pytest.raises(DataError, match=r"masks of 1 in .* match no image"):
        scenes.labelled_images(str(tmp_path), table=TABLE, pairs=Pairs())
    with pytest.raises(ConfigError, match=r"config key image = 'sat.jpg'"):
        load(Pairs, None, ["image=sat.jpg"])
