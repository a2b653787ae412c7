import numpy as np
import torch
from torch import nn

from rayseg.models.bundle import Scaling
from rayseg.train import pictures

SCALING = Scaling(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
COLORS = ((10, 0, 0), (0, 20, 0))


class Bright(nn.Module):
    """Class 1 where the first band exceeds 100; of one output or two."""

    def __init__(self, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs = outputs

    def forward(self, x):
        logit = x[:, :1] - 100
        return logit if self.outputs == 1 else torch.cat([-logit, logit], dim=1)


def test_image_mask_and_map_stand_side_by_side():
    image_CHW = np.zeros((3, 5, 7), np.uint8)
    image_CHW[0, :, 4:] = 200
    mask_HW = np.zeros((5, 7), np.uint8)
    mask_HW[0, 0] = 255
    for outputs in (1, 2):
        samples = [("a", image_CHW, mask_HW), ("b", image_CHW, None)]
        shown = pictures.of_segments(lambda samples=samples: samples, SCALING, unit=4, colors=COLORS)(Bright(outputs))
        assert [picture.shape for picture in shown.values()] == [(5, 21, 3), (5, 14, 3)]
        np.testing.assert_array_equal(shown["a"][:, :7], image_CHW.transpose(1, 2, 0))
        assert shown["a"][0, 7].tolist() == [128, 128, 128]
        assert shown["a"][1, 7].tolist() == [10, 0, 0]
        assert (shown["a"][:, 14:18] == COLORS[0]).all()
        assert (shown["a"][:, 18:] == COLORS[1]).all()


def test_a_bar_is_as_long_as_the_labels_probability():
    image_CHW = np.zeros((3, 10, 20), np.uint8)
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(2, bias=False))
    seen = torch.ones(1, 1)
    net(seen)
    net[1].weight.data = torch.tensor([[0.0], [float(np.log(3))]])  # probabilities 1/4 and 3/4
    shown = pictures.of_classes(lambda: [("a", image_CHW, seen, 1)])(net)["a"]
    assert (shown[10:, :15] == (0, 158, 115)).all()
    assert (shown[10:, 15:] == 60).all()


def test_other_types_are_stretched_and_few_samples_are_shown():
    grey = pictures.visible(np.array([[[0, 500], [1000, 250]]], np.uint16))
    assert grey[..., 0].tolist() == [[0, 127], [255, 63]]
    image_CHW = np.zeros((3, 4, 4), np.uint8)
    samples = [(str(k), image_CHW, None) for k in range(9)]
    assert len(pictures.of_segments(lambda: samples, SCALING, unit=4)(Bright(2))) == pictures.MOST


def test_a_chip_smaller_than_the_networks_unit_is_shown():
    image_CHW = np.zeros((3, 4, 4), np.uint8)
    image_CHW[0, :, 2:] = 200
    shown = pictures.of_segments(lambda: [("a", image_CHW, None)], SCALING, unit=8, colors=COLORS)(Bright(2))["a"]
    assert (shown[:, 4:6] == COLORS[0]).all()
    assert (shown[:, 6:] == COLORS[1]).all()
