from functools import partial

import pytest

from rayseg.config import load
from rayseg.engine import cluster
from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError, ModelError
from rayseg.models.bundle import Scaling
from rayseg.pipelines import gpc, landcover
from rayseg.pipelines.al_s4gan import pipeline as al_s4gan
from rayseg.steps import charts, models
from rayseg.steps.models import expect_weights, input_scaling
from rayseg.train.supervised import SupervisedConfig, expect_supervisable

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


def anything(*, workers):
    assert workers


def test_training_has_the_gpus_of_the_cluster_for_workers_and_else_those_of_this_machine(monkeypatch, tmp_path):
    step = Step("fit", str(tmp_path), "", Engine(address="local"))
    joined = []
    monkeypatch.setattr(cluster, "connect", joined.append)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not models.training_setup(step, workers=0, expect=anything).use_gpu
    assert joined == []
    assert models.training_setup(step, workers=2, expect=anything).use_gpu
    assert joined == ["local"]
    # Ray would wait without end; a cluster may grow
    with pytest.raises(ConfigError, match="workers is 3, but this machine has 2 GPU, expected one for each worker"):
        models.training_setup(step, workers=3, expect=anything)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(ConfigError, match="workers is 5, but this machine has 4 CPU"):
        models.training_setup(step, workers=5, expect=anything)
    on_cluster = Step("fit", str(tmp_path), "", Engine(address="10.0.0.1:6379"))
    assert models.training_setup(on_cluster, workers=5, expect=anything).workers == 5


@pytest.mark.parametrize(
    ("resources", "batch", "workers", "said"),
    [
        ({"GPU": 4.0}, 12, 4, "4 workers of Ray Train, GPU"),
        ({"GPU": 4.0}, 6, 3, "3 workers of Ray Train, GPU"),  # four cannot share a batch of six
        ({"GPU": 1.0}, 6, 1, "1 worker of Ray Train, GPU"),
        ({}, 6, 1, "1 worker of Ray Train, CPU"),
    ],
)
def test_auto_trains_on_the_gpus_of_a_cluster_as_far_as_the_batch_can_be_shared(
    monkeypatch, tmp_path, resources, batch, workers, said
):
    monkeypatch.setattr(cluster, "connect", lambda address: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0} | resources)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = SupervisedConfig(learning={"batch": batch, "freeze_batchnorm": "all"})
    expect = partial(expect_supervisable, settings, classes=2)
    on_cluster = Step("fit", str(tmp_path), "", Engine(address="auto"))
    setup = models.training_setup(on_cluster, workers=0, expect=expect)
    assert (setup.workers, setup.use_gpu) == (workers, bool(resources))
    assert said in charts._trained_on(on_cluster.prefix)
    # locally, and in trials of a sweep, the process itself
    for engine in (Engine(), Engine("inline", "auto")):
        alone = models.training_setup(Step("fit", str(tmp_path), "", engine), workers=0, expect=expect)
        assert alone.workers == 0
        assert "in the command's process" in charts._trained_on(on_cluster.prefix)


def test_auto_is_the_default_by_another_name_so_that_older_runs_resume():
    asked = [load(gpc.Config, None, settings) for settings in ([], ["workers=auto"], ["workers=0"])]
    assert {config.model_dump_json() for config in asked} == {asked[0].model_dump_json()}
    assert '"workers":0' in asked[0].model_dump_json()
