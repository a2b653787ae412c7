"""Training a network on one scene."""

import numpy as np
import pytest
import torch

from rayseg.train.scene import NetworkConfig, fit

COLOURS = torch.tensor([[0.1, 0.8, 0.3], [0.9, 0.2, 0.1], [0.2, 0.2, 0.9]])


class Fields:
    """Two patches of 64 x 64 px: squares of three colours, each square a superpixel."""

    bands = ("red", "green", "blue")

    def __len__(self):
        return 2

    def read(self, number):
        segments_HW = np.arange(16).reshape(4, 4).repeat(16, axis=0).repeat(16, axis=1)
        colours = torch.from_numpy((segments_HW + number) % 3)
        noise = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(number)) / 20
        return (COLOURS[colours].permute(2, 0, 1) + noise)[None], torch.from_numpy(segments_HW.ravel()), None


@pytest.mark.parametrize("start", [2, 3])
def test_the_first_epoch_learns_the_clusters_of_colours_it_is_told_to_start_from(tmp_path, start):
    config = NetworkConfig(epochs=1, patch=64, stride=64, reduce=1, start=start)
    _, history = fit(Fields(), config, prefix=str(tmp_path), seed=1, device=torch.device("cpu"))
    assert history[0]["labels"] == start


def test_without_clusters_it_starts_from_its_own_labels_and_few_labels_mean_few_clusters(tmp_path):
    own = NetworkConfig(epochs=1, patch=64, stride=64, reduce=1, start=None)
    _, history = fit(Fields(), own, prefix=str(tmp_path / "own"), seed=1, device=torch.device("cpu"))
    assert history[0]["labels"] > 3
    few = NetworkConfig(epochs=1, patch=64, stride=64, reduce=1, labels=2)
    _, history = fit(Fields(), few, prefix=str(tmp_path / "few"), seed=1, device=torch.device("cpu"))
    assert history[0]["labels"] == 2
