import pytest

from rayseg.engine import cluster
from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError, ModelError
from rayseg.models.bundle import Scaling
from rayseg.pipelines import landcover
from rayseg.pipelines.al_s4gan import pipeline as al_s4gan
from rayseg.steps import models
from rayseg.steps.models import expect_weights, input_scaling
from rayseg.train.supervised import SupervisedConfig

LITE = SupervisedConfig(encoder="tf_efficientnet_lite0", weights="packaged")


@pytest.mark.parametrize("pipeline", [landcover, al_s4gan])
def test_the_scaling_follows_from_the_encoder_unless_it_is_given(pipeline):
    given = Scaling(mean=(1.0,) * 3, std=(2.0,) * 3)
    lite = pipeline.Config(segmenter={"encoder": "tf_efficientnet_lite0"})
    assert lite.scaling == Scaling(mean=(127.0,) * 3, std=(128.0,) * 3)
    assert pipeline.Config().scaling == Scaling(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    assert pipeline.Config(segmenter={"encoder": "tf_efficientnet_lite0"}, scaling=given).scaling == given


@pytest.mark.parametrize(
    "scaling",
    [
        {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},  # of most other encoders
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},  # of values 0..1
        {"mean": (127.0, 127.0, 300.0), "std": (128.0,) * 3},
    ],
)
def test_a_scaling_of_other_weights_is_refused_with_the_expected_one(scaling):
    with pytest.raises(ConfigError, match=r"tf_efficientnet_lite0 expect mean \[127.0, 127.0, 127.0\] and std \[128.0"):
        expect_weights(LITE, Scaling(**scaling))


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(mean=(127.5,) * 3, std=(127.5,) * 3),
        Scaling(scale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3),  # the same in values of 0..1
        Scaling(mean=(1.0,) * 4, std=(1.0,) * 4),  # four bands have no standard
    ],
)
def test_a_scaling_that_means_the_same_is_accepted(scaling):
    expect_weights(LITE, scaling)


def test_the_paper_of_gpc_may_use_its_own_mean_and_deviation():
    own = Scaling(mean=(98.3519, 96.9567, 95.5713), std=(52.7343, 45.8798, 44.3465))
    expect_weights(SupervisedConfig(encoder="regnety_040"), own)
    assert input_scaling("regnety_040").std == (58.395, 57.12, 57.375)


def test_random_weights_and_other_values_have_no_expected_scaling():
    expect_weights(SupervisedConfig(encoder="resnet18", weights="none"), Scaling(mean=(1.0,) * 3, std=(1.0,) * 3))
    expect_weights(LITE, None)
    with pytest.raises(ModelError, match="no package has weights of encoder resnet18"):
        expect_weights(SupervisedConfig(encoder="resnet18", weights="packaged"))


def test_training_has_the_gpus_of_the_cluster_for_workers_and_else_those_of_this_machine(monkeypatch, tmp_path):
    step = Step("fit", str(tmp_path), "", Engine(address="local"))
    joined = []
    monkeypatch.setattr(cluster, "connect", joined.append)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not models.training_setup(step, workers=0).use_gpu
    assert joined == []
    assert models.training_setup(step, workers=2).use_gpu
    assert joined == ["local"]
