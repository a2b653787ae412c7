"""Chips with drawn masks: held out from training, and read for the choice of an epoch."""

import numpy as np
import pytest
from PIL import Image

from rayseg.engine.run import Engine, Step
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.region import Region
from rayseg.io import cog, labels
from rayseg.pipelines.gpc import CLASSES
from rayseg.steps import chips
from rayseg.steps.chips import ChipsConfig
from rayseg.vision.color import ClassTable

LABELS, TABLE = ("gpc", "nongpc"), ClassTable(CLASSES)
MASK = np.zeros((40, 50), np.uint8)
MASK[5:20, 10:30] = 255


@pytest.fixture
def world(tmp_path):
    """Four chips of 40 x 50 px of each label, and masks of two: one by the chip's id, one by its file's stem."""
    rng = np.random.default_rng(1)
    for label in LABELS:
        (tmp_path / "chips" / label).mkdir(parents=True)
        for name in "abcd":
            image = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "chips" / label / f"{name}{label[0]}.png")
    labels.ingest_folder(tmp_path / "chips", tmp_path / "cat", labels="folder")
    draw(tmp_path, "gpc-ag")
    draw(tmp_path, "bg")
    return tmp_path


def draw(world, name, mask=MASK):
    (world / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask).save(world / "masks" / f"{name}.png")


def config(world, **more):
    return ChipsConfig(source=f"{world}/cat/catalog.json#chips", size=32, masks=str(world / "masks"), **more)


def listed(world, **more):
    step = Step("chips", str(world / "run"), "", Engine())
    return Step(
        "chips", str(world / "run"), "", Engine(), chips.list_chips(step, Region("r"), LABELS, config(world, **more))
    )


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_chips_with_masks_are_held_out_first_and_keep_the_share(world, share):
    step = listed(world, held_out=share)
    held = [row["id"] for row in chips.rows_of(step, held_out=True)]
    assert {"gpc-ag", "gpc-bg"} <= set(held)
    assert len(held) == (2 if share == 0 else 4)
    assert step.value["masks"] == 2
    known = chips.masked(step, TABLE, LABELS, config(world))
    assert known.ids == ("gpc-ag", "gpc-bg")
    # 255 beside 0 alone is the second class; the middle of 40 x 50 px begins at (4, 9).
    assert np.array_equal(known.read_mask(1), (MASK == 255)[4:36, 9:41])
    image = np.asarray(Image.open(world / "chips" / "gpc" / "bg.png"))
    assert np.array_equal(known.read(1), image[4:36, 9:41])


def test_without_masks_the_split_is_as_it_was_and_no_epoch_is_chosen(world):
    before = listed(world, held_out=0.5)
    plain = ChipsConfig(source=config(world).source, size=32, held_out=0.5)
    step = Step("plain", str(world / "run"), "", Engine())
    assert "masks" not in chips.list_chips(step, Region("r"), LABELS, plain)
    assert chips.masked(step, TABLE, LABELS, plain) is None
    assert "masks" not in plain.model_dump()
    assert len(chips.rows_of(step, held_out=True)) == len(chips.rows_of(before, held_out=True))


def test_masks_that_fit_no_chip_are_refused(world):
    def check(name, mask=MASK):
        draw(world, name, mask)
        try:
            found = chips.find_chips(Region("r"), LABELS, config(world))
            chips.drawn_masks(found, TABLE, config(world))
        finally:
            (world / "masks" / f"{name}.png").unlink()

    with pytest.raises(DataError, match=r"nowhere.png is called like no chip, expected the id of one of the 8 chips"):
        check("nowhere")
    with pytest.raises(DataError, match=r"image gpc-cg has 40 x 50 px, its mask .* has 30 x 50 px"):
        check("cg", MASK[:30])
    with pytest.raises(DataError, match=r"mixes two kinds of masks: .*bg.png has only 0 and 255, .*cg.png"):
        check("cg", np.full((40, 50), 7, np.uint8))
    other = ClassTable(((0, "other", (0, 0, 0)), (1, "greenhouse", (1, 1, 1))))
    shape = Grid(None, (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 50, 40)
    cog.write_classes(world / "masks" / "cg.tif", MASK // 255, *shape, other)
    with pytest.raises(DataError, match=r"masks has the classes other, greenhouse, but other is not among"):
        chips.drawn_masks(chips.find_chips(Region("r"), LABELS, config(world)), TABLE, config(world))
    (world / "masks" / "cg.tif").unlink()
    for name in ("cg", "dg"):
        draw(world, name)
    with pytest.raises(DataError, match=r"all 4 chips of .* labelled gpc have a mask in chips.masks"):
        chips.find_chips(Region("r"), LABELS, config(world))


def test_a_list_names_the_chips_that_are_held_out(world, tmp_path):
    plain = ChipsConfig(source=f"{world}/cat/catalog.json#chips", size=32)
    # as in Cao & Huang's lists: a path of the class folder, and the class
    lines = (".\\data\\gpc\\img\\ag.png,0", "nongpc/bn.png,1", "gpc-cg")
    (tmp_path / "test.txt").write_text("\n".join(lines))
    named = ChipsConfig.model_validate(plain.model_dump() | {"test": str(tmp_path / "test.txt")})
    step = Step("chips", str(world / "run"), "", Engine())
    chips.list_chips(step, Region("r"), LABELS, named)
    assert [row["id"] for row in chips.rows_of(step, held_out=True)] == ["gpc-ag", "gpc-cg", "nongpc-bn"]
    assert len(chips.find_chips(Region("r"), LABELS, named)) == 8
    for names, why in ((["zz"], "zz, which is no chip"), ([f"gpc-{k}g" for k in "abcd"], "labelled gpc are held")):
        with pytest.raises(DataError, match=why):
            chips.find_chips(Region("r"), LABELS, plain.model_copy(update={"test": tuple(names)}))


def test_folders_called_train_and_test_divide_the_chips(tmp_path):
    rng = np.random.default_rng(2)
    for part, names in (("train", "ab"), ("test", "a")):
        for label in LABELS:
            inner = tmp_path / "set" / part / label / ("img" if label == "gpc" else "")
            inner.mkdir(parents=True)
            for name in names:
                Image.fromarray(rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(inner / f"{name}.png")
    (tmp_path / "set" / "val").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "set" / "val" / "unlabelled.png")
    catalog = labels.ingest_folder(tmp_path / "set", tmp_path / "cat", labels="folder")
    config = ChipsConfig(source=f"{catalog}#chips", size=32, held_out=0.0)
    step = Step("chips", str(tmp_path / "run"), "", Engine())
    chips.list_chips(step, Region("r"), LABELS, config)
    held, kept = ([row["id"] for row in chips.rows_of(step, held_out=part)] for part in (True, False))
    assert held == ["test-gpc-a", "test-nongpc-a"]
    assert kept == ["train-gpc-a", "train-gpc-b", "train-nongpc-a", "train-nongpc-b"]


@pytest.mark.parametrize("damage", ["cut", "not an image"])
def test_a_damaged_mask_fails_alone(world, damage, caplog):
    draw(world, "cg")
    path = world / "masks" / "cg.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3] if damage == "cut" else b"<html>not found</html>")
    step = listed(world, held_out=0.0)
    assert list(step.value["troubles"]) == [str(path)]
    assert "cg.png cannot be read" in step.value["troubles"][str(path)]
    assert step.value["masks"] == 2
    assert [row["id"] for row in chips.rows_of(step, held_out=True)] == ["gpc-ag", "gpc-bg"]
    assert chips.masked(step, TABLE, LABELS, config(world)).ids == ("gpc-ag", "gpc-bg")
    for name in ("gpc-ag", "bg"):
        (world / "masks" / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        listed(world)
