import numpy as np
from coloured_squares import SCALING, pair

from rayseg.steps.simple_maps import compare, learnt, panels
from rayseg.train.supervised import SupervisedConfig
from rayseg.vision.color import ClassTable, label_table

TABLE = label_table(3)


def test_both_methods_map_distinct_colours_at_any_size():
    network = SupervisedConfig(encoder="mobilenet_v2", weights="none")
    methods = learnt(network, SCALING, map(pair, range(3)), 3, classes=3, rgb8=True)
    assert [method.name.split()[1] for method in methods] == ["linear", "random"]
    image_CHW, classes_HW = pair(7)
    odd = (image_CHW[:, :90, :101], classes_HW[:90, :101])
    for method in methods:
        before = method.seconds
        [pixels] = compare([method], lambda: [odd], TABLE, measure=lambda c: c.pixels)
        assert pixels.value == 90 * 101
        [measured] = compare([method], lambda: [odd], TABLE, measure=lambda c: c.overall_accuracy)
        assert measured.value > 0.9
        assert measured.seconds == method.seconds
        assert method.seconds > before > 0
    assert len(learnt(network, SCALING, [pair(0)], 1, classes=3, rgb8=True, linear=False)) == 1


def test_panels_stand_side_by_side_and_unlabelled_pixels_are_grey():
    table = ClassTable(((0, "a", (9, 8, 7)), (1, "b", (1, 2, 3))))
    classes_HW = np.array([[0, 255], [1, 1]], np.uint8)
    picture = panels(np.full((2, 2, 3), 50, np.uint8), [classes_HW], table)
    assert picture.shape == (2, 2 + 6 + 2, 3)
    assert picture[0, 0].tolist() == [50] * 3
    assert picture[:, 8:].tolist() == [[[9, 8, 7], [110] * 3], [[1, 2, 3], [1, 2, 3]]]
    assert panels(np.zeros((1000, 500, 3), np.uint8), [], table, side=420).shape == (334, 167, 3)
