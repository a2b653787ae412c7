import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rayseg.errors import ConfigError, DataError
from rayseg.vision import color
from rayseg.vision.color import ClassTable, decode

TABLE = ClassTable(((0, "land", (132, 41, 246)), (1, "water", (226, 169, 41)), (4, "road", (1, 2, 3))), ((0, 0, 0),))
VALUES = np.array([[0, 1, 4], [255, 1, 0]], np.uint8)
RGB = np.array(
    [[(132, 41, 246), (226, 169, 41), (1, 2, 3)], [(0, 0, 0), (226, 169, 41), (132, 41, 246)]], dtype=np.uint8
)


def test_values_and_colours_decode_to_the_same_classes():
    np.testing.assert_array_equal(decode(VALUES, TABLE), VALUES)
    np.testing.assert_array_equal(decode(RGB, TABLE), VALUES)


def test_the_fourth_channel_is_not_looked_at():
    rgba = np.dstack([RGB, np.arange(6, dtype=np.uint8).reshape(2, 3)])
    np.testing.assert_array_equal(decode(rgba, TABLE), VALUES)


def test_a_palette_mask_is_read_by_its_colours_not_its_indices():
    palette = {9: (132, 41, 246, 255), 0: (226, 169, 41), 1: (1, 2, 3), 3: (0, 0, 0), 77: (9, 9, 9)}
    indices = np.array([[9, 0, 1], [3, 0, 9]], np.uint8)
    np.testing.assert_array_equal(decode(indices, TABLE, palette=palette), VALUES)


ONE_TO_TWO = {
    "classes": [{"name": "tree", "color": "#1E7B1E", "value": 1}, {"name": "water", "color": "#2060C0", "value": 523}],
    "ignore": [0, "#FFFFFF", 7],
}


def test_masks_may_have_any_values_and_some_that_mean_not_labelled():
    table = ClassTable.from_config(ONE_TO_TWO)
    assert (table.values, table.in_masks, table.ignore) == ((0, 1), (1, 523), ((255, 255, 255),))
    np.testing.assert_array_equal(
        decode(np.array([[0, 1, 523], [7, 255, 1]], np.uint16), table), [[255, 0, 1], [255, 255, 0]]
    )
    # an index that is ignored may have any colour
    palette = {0: (9, 9, 9), 5: (0x20, 0x60, 0xC0), 7: (0x1E, 0x7B, 0x1E), 8: (0x1E, 0x7B, 0x1E)}
    np.testing.assert_array_equal(
        decode(np.array([[0, 5], [7, 8]], np.uint8), table, palette=palette), [[255, 1], [255, 0]]
    )
    with pytest.raises(DataError, match=r"mask value 3 .* nearest is 1 \(tree\).* to ignore if it means not labelled"):
        decode(np.array([[3]], np.uint8), table)


@pytest.mark.parametrize("ignore", [[1], [255], [-1]])
def test_a_value_is_a_class_or_ignored(ignore):
    with pytest.raises(ConfigError, match=r"classes have the values \[1, 523\] in masks"):
        ClassTable.from_config(ONE_TO_TWO | {"ignore": ignore})


def test_an_index_outside_the_palette_is_named():
    with pytest.raises(DataError, match=r"indices \[5\]"):
        decode(np.array([[5]], np.uint8), TABLE, palette={0: (1, 2, 3)})


def test_an_unknown_colour_is_named_with_its_count_and_the_nearest_class():
    off = RGB.copy()
    off[0, :2] = (225, 169, 40)
    with pytest.raises(DataError, match=r"#E1A928 \(2 pixels; 1 unknown.*#E2A929 \(1 water\)"):
        decode(off, TABLE)


def test_a_colour_above_all_known_ones_is_unknown_too():
    with pytest.raises(DataError, match="#FFFFFF"):
        decode(np.full((1, 1, 3), 255, np.uint8), TABLE)


def test_an_unknown_value_is_named_with_its_count_and_the_nearest_class():
    with pytest.raises(DataError, match=r"value 3 \(2 pixels; 2 unknown.*4 \(road\)"):
        decode(np.array([[3, 3, 9]], np.uint8), TABLE)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"\(2, 3, 2\)"):
        decode(RGB[..., :2], TABLE)


def test_a_table_reads_from_yaml():
    text = """
    classes:
      - {name: land, color: "#8429F6"}
      - {name: water, color: e2a929}
      - {name: road, color: [1, 2, 3], value: 4}
    ignore: ["#000000"]
    """
    table = ClassTable.from_config(yaml.safe_load(text))
    assert (table.values, table.in_masks, table.names) == ((0, 1, 2), (0, 1, 4), TABLE.names)
    assert (table.colors, table.ignore) == (TABLE.colors, TABLE.ignore)
    assert pickle.loads(pickle.dumps(table)) == table


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes": []}, "at least one"),
        ({"classes": [{"name": "a"}]}, "class 0 has only"),
        ({"classes": [{"name": "a", "color": "#12345"}]}, "#12345"),
        ({"classes": [{"name": "a", "color": [0, 0, 256]}]}, "256"),
        ({"classes": [{"name": "a", "color": "#123456", "colour": 1}]}, "colour"),
        ({"classes": [{"name": "a", "color": "#123456"}], "ignore": ["#123456"]}, "#123456"),
        ({"classes": [{"name": "a", "color": "#123456", "value": 255}]}, "255"),
        ({"klasses": []}, "klasses"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        ClassTable.from_config(config)


def test_mean_colour_paints_each_label_with_its_mean():
    image = np.array([[[0, 10], [3, 20]], [[100, 0], [200, 255]]], np.uint8)
    painted = color.mean_color(image, np.array([[4, 4], [0, 1]]))
    np.testing.assert_array_equal(painted, [[[2, 15], [2, 15]], [[100, 0], [200, 255]]])


def test_overlay_mixes_only_the_classes_that_have_a_colour():
    image = np.full((1, 3, 3), 100, np.uint8)
    mask = np.array([[0, 1, 255]], np.uint8)
    painted = color.overlay(image, mask, {1: (200, 0, 100)}, 0.25)
    np.testing.assert_array_equal(painted[0], [(100, 100, 100), (125, 75, 100), (100, 100, 100)])


@pytest.mark.real
def test_real_masks_decode_whether_stored_as_colours_or_palette(shared: Path):
    hexes = {"building": "3C1098", "land": "8429F6", "road": "6EC1E4", "vegetation": "FEDD3A", "water": "E2A929"}
    rows = [{"name": name, "color": code} for name, code in hexes.items()]
    table = ClassTable.from_config({"classes": rows, "ignore": ["9B9B9B", "000000"]})
    modes = set()
    for path in sorted((shared / "data/dubai").glob("tile*/masks/*.png"))[::6]:
        with Image.open(path) as image:
            modes.add(image.mode)
            colors = np.asarray(image.convert("RGB"))
            indexed = None
            if image.mode == "P":
                flat = image.getpalette() or []
                palette = {i: flat[3 * i : 3 * i + 3] for i in range(len(flat) // 3)}
                indexed = decode(np.asarray(image), table, palette=palette)
        decoded = decode(colors, table)
        assert set(np.unique(decoded)) <= {0, 1, 2, 3, 4, 255}
        if indexed is not None:
            np.testing.assert_array_equal(indexed, decoded)
    assert "P" in modes
