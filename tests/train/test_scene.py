"""Training a network on one scene."""

import numpy as np
import pytest
import torch

from rayseg.train import scene as training
from rayseg.train.scene import MOST_MEASURED, SceneConfig, fit, measured, nearest

COLOURS = torch.tensor([[0.1, 0.8, 0.3], [0.9, 0.2, 0.1], [0.2, 0.2, 0.9]])


class Fields:
    """Patches of 64 x 64 px: squares of three colours, each square a superpixel; `held` alone have data."""

    bands = ("red", "green", "blue")

    def __init__(self, count=2, held=None):
        self.count, self.held, self.asked = count, held, []

    def __len__(self):
        return self.count

    def read(self, number):
        if self.held is not None and number not in self.held:
            return None
        self.asked.append(number)
        segments_HW = np.arange(16).reshape(4, 4).repeat(16, axis=0).repeat(16, axis=1)
        colours = torch.from_numpy((segments_HW + number) % 3)
        noise = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(number)) / 20
        return (COLOURS[colours].permute(2, 0, 1) + noise)[None], torch.from_numpy(segments_HW.ravel()), None


@pytest.mark.parametrize("start", [2, 3])
def test_the_first_epoch_learns_the_clusters_of_colours_it_is_told_to_start_from(tmp_path, start):
    config = SceneConfig(network="deepnet", epochs=1, patch=64, stride=64, reduce=1, start=start)
    _, history = fit(Fields(), config, prefix=str(tmp_path), seed=1, device=torch.device("cpu"))
    assert history[0]["labels"] == start


def test_without_clusters_it_starts_from_its_own_labels_and_few_labels_mean_few_clusters(tmp_path):
    own = SceneConfig(network="deepnet", epochs=1, patch=64, stride=64, reduce=1, start=None)
    _, history = fit(Fields(), own, prefix=str(tmp_path / "own"), seed=1, device=torch.device("cpu"))
    assert history[0]["labels"] > 3
    few = SceneConfig(network="deepnet", epochs=1, patch=64, stride=64, reduce=1, labels=2)
    _, history = fit(Fields(), few, prefix=str(tmp_path / "few"), seed=1, device=torch.device("cpu"))
    assert history[0]["labels"] == 2


CPU = torch.device("cpu")


def test_patches_without_data_are_neither_measured_nor_clustered_nor_learnt_from():
    held = (3, 77, 78, 410)  # none of the 32 that lie evenly among 500
    patches = Fields(500, held)
    net = nearest(patches, 3, seed=1)
    assert sorted(patches.asked) == list(held)
    patches.asked.clear()
    _, sizes_K = measured(net, patches, CPU)
    assert sizes_K.sum() == len(held) * 64 * 64
    assert (sizes_K > 0).all()


def test_the_same_patches_are_looked_at_as_ever_where_all_have_data():
    patches = Fields(500)
    nearest(patches, 3, seed=1)
    assert patches.asked == sorted({round(at) for at in np.linspace(0, 499, MOST_MEASURED)})


def test_an_epoch_takes_as_many_patches_with_data_as_it_is_told_to(tmp_path):
    patches = Fields(500, range(100, 120))
    config = SceneConfig(
        network="deepnet", epochs=1, patch=64, stride=64, reduce=1, patches=5, start=None, recalibrate=False
    )
    _, [said] = fit(patches, config, prefix=str(tmp_path), seed=1, device=CPU)
    assert len(patches.asked) in {5, 6}  # one is read ahead
    assert np.isfinite(said["loss"])


def test_a_small_scene_is_trained_for_as_many_steps_as_a_large_one(tmp_path, monkeypatch):
    config = SceneConfig(network="deepnet", patch=64, stride=64, reduce=1)
    assert [config.passes(count) for count in (1, 4, 100, 1000)] == [128, 32, 4, 4]
    assert config.steps(1000) == 4 * 256
    assert config.model_copy(update={"epochs": 2}).passes(1) == 2
    monkeypatch.setattr(training, "STEPS", 11)
    _, history = fit(Fields(2), config, prefix=str(tmp_path), seed=1, device=CPU)
    assert len(history) == 6
