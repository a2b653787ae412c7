"""Ray joined or started."""

import pytest

from rayseg import cluster
from rayseg.errors import Stalled


def test_training_has_the_gpus_of_the_cluster_for_workers_and_else_those_of_this_machine(monkeypatch):
    joined = []
    monkeypatch.setattr(cluster, "connect", joined.append)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not cluster.connect_training("local", workers=0)
    assert joined == []
    assert cluster.connect_training("local", workers=2)
    assert joined == ["local"]


def test_a_machine_too_busy_to_start_ray_is_told_in_words(monkeypatch, tmp_path):
    def init(**_):
        raise Exception("The current node timed out during startup. This could happen because ...")  # noqa: TRY002

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "_remove_afterwards", lambda folder: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Stalled, match="give the same command again later, or --engine inline"):
        cluster.connect(None)
    monkeypatch.setattr("ray.init", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cluster.connect("local")
