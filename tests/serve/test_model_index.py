"""Models that come, change, are damaged and go while the server runs."""

import json
import shutil

import pytest
from small_world import segmenter
from tiny_server import client, encoded, form, image_HWC

from rayseg.errors import ConfigError, ModelError
from rayseg.serve import models
from rayseg.serve.models import ModelIndex
from rayseg.serve.settings import ServeConfig, require_room


@pytest.fixture
def later(monkeypatch):
    """Call to let the time pass until models are looked for again."""
    now = [models.monotonic()]
    monkeypatch.setattr(models, "monotonic", lambda: now[0])
    return lambda: now.__setitem__(0, now[0] + 1000)


def names(asked):
    return {row["name"] for row in asked.get("/v1/models").json()["models"]}


def predict(asked, name="one", accept="application/json"):
    return asked.post(f"/v1/models/{name}/predict", headers={"Accept": accept}, **form(encoded(image_HWC())))


def test_models_are_added_replaced_and_removed_without_a_restart(tmp_path, later):
    segmenter(tmp_path / "one")
    asked = client(tmp_path)
    assert len(predict(asked).json()["classes"]) == 2
    # 1. added: found as soon as its name is asked for
    segmenter(tmp_path / "two", classes=3)
    later()
    assert predict(asked, "two").status_code == 200
    assert names(asked) == {"one", "two"}
    # 2. replaced: the new model computes the pixels
    shutil.rmtree(tmp_path / "one")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    later()
    assert names(asked) == {"one", "two"}
    found = predict(asked).json()
    assert [row["pixels"] for row in found["classes"]] == [
        row["pixels"] for row in predict(asked, "two").json()["classes"]
    ]
    # 3. removed
    shutil.rmtree(tmp_path / "one")
    later()
    assert names(asked) == {"two"}
    assert predict(asked).status_code == 404


def test_another_threshold_of_the_same_weights_is_another_model(tmp_path, later):
    segmenter(tmp_path / "one")
    asked = client(tmp_path)
    before = predict(asked).json()["classes"]
    path = tmp_path / "one/bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": 1.0}))
    later()
    assert names(asked) == {"one"}
    after = predict(asked).json()["classes"]
    assert before[1]["pixels"] > after[1]["pixels"] == 0


@pytest.mark.parametrize("harm", ["gone", "cut", "other"])
def test_a_model_that_cannot_be_loaded_is_a_503_without_a_path(tmp_path, harm, caplog):
    segmenter(tmp_path / "one")
    asked = client(tmp_path)
    weights = tmp_path / "one/model.safetensors"
    if harm == "gone":
        shutil.rmtree(tmp_path / "one")
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        segmenter(tmp_path / "one", classes=3)
    found = predict(asked)
    assert (found.status_code, found.headers["retry-after"]) == (503, "30")
    assert "the model cannot be loaded" in found.json()["detail"]
    assert str(tmp_path) not in found.text
    [record] = [record for record in caplog.records if "cannot be loaded" in record.message]
    assert str(tmp_path / "one") in record.facts["error"]
    if harm == "gone":
        missing = asked.get("/v1/models/one")
        assert (missing.status_code, missing.headers["retry-after"]) == (503, "30")
        assert str(tmp_path) not in missing.text


def test_models_are_served_on_while_they_cannot_be_listed(tmp_path, later, monkeypatch):
    segmenter(tmp_path / "one")
    asked = client(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(models, "served_below", lambda _: (_ for _ in ()).throw(OSError("the store is away")))
        later()
        assert names(asked) == {"one"}
    shutil.move(tmp_path / "one", tmp_path / "away")
    later()
    assert names(asked) == {"away"}


def test_a_large_prefix_is_searched_less_often(tmp_path, later):
    index = ModelIndex([tmp_path])
    assert not index._due(models.RECHECK)
    later()
    assert index._due(models.RECHECK)
    index._took = 60.0
    assert not index._due(models.RECHECK)


def test_the_start_refuses_a_missing_prefix_and_more_models_than_a_replica_keeps(tmp_path):
    with pytest.raises(ModelError, match="is not a folder"):
        ModelIndex([tmp_path / "none"])
    require_room(ServeConfig(), 9)
    with pytest.raises(ConfigError, match="models_per_replica=4"):
        require_room(ServeConfig(preload=True), 4)


def test_the_server_is_ready_until_it_drains(tmp_path):
    asked = client(tmp_path)
    assert asked.get("/readyz").json() == {"status": "ready"}
    asked.app.draining = True
    found = asked.get("/readyz")
    assert (found.status_code, found.headers["content-type"]) == (503, "application/problem+json")
