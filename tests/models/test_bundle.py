import json
import pickle

import jsonschema
import numpy as np
import pystac
import pytest
import torch

from rayseg.errors import ModelError
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling, build, description, find, save
from rayseg.models.classifier import build_classifier
from rayseg.models.segmenter import build_segmenter

OPTIONS = {"architecture": "unet", "encoder": "mobilenet_v2", "classes": 1, "channels": 3}


@pytest.fixture
def described() -> Bundle:
    return Bundle(
        name="cover",
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=OPTIONS),
        classes=((0, "background", (0, 0, 0)), (1, "cover", (0, 200, 80))),
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=Scaling(scale=0.5, offset=1, mean=(10, 20, 30), std=(1, 2, 4)),
        patch=64,
        stride=48,
        metrics={"iou": 0.5},
        provenance=Provenance(config={"seed": 3}, parents=("items/a.json",)),
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_segmenter("unet", "mobilenet_v2", weights="none").eval()


@pytest.fixture
def prefix(tmp_path, described, model):
    save(tmp_path / "cover", described, model)
    return tmp_path / "cover"


def test_measures_that_are_no_number_are_left_out(described):
    measured = Bundle.model_validate(described.model_dump() | {"metrics": {"iou": float("nan"), "loss": 0.5}})
    assert measured.metrics == {"loss": 0.5}


def test_what_is_saved_is_what_is_built(prefix, described, model):
    bundle, built = build(str(prefix))
    image = torch.randn(1, 3, 64, 64)
    assert bundle.model_copy(update={"sha256": ""}) == described
    assert not built.training
    torch.testing.assert_close(built(image), model(image), rtol=0, atol=0)
    assert bundle.outputs == built(image).shape[1]
    assert description(prefix) == bundle
    assert pickle.loads(pickle.dumps(bundle)) == bundle


def test_a_bundle_lives_on_any_store(described, model):
    save("memory://bundles/cover", described, model)
    assert description("memory://bundles/cover").name == "cover"


def test_a_classifier_is_a_bundle_too(tmp_path, described):
    options = {"encoder": "resnet18", "classes": 2, "pooling": "top20", "reduce": 2}
    update = {"task": "classification", "architecture": Architecture(factory="classifier", options=options)}
    model = build_classifier("resnet18", weights="none", pooling="top20", reduce=2).eval()
    save(tmp_path, described.model_copy(update=update), model)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(build(tmp_path)[1](image), model(image))


def test_normalize_follows_its_formula_for_arrays_and_tensors(described):
    image = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)
    expected = (image * 0.5 + 1 - np.array([10, 20, 30])[:, None, None]) / np.array([1, 2, 4])[:, None, None]
    normalized = described.normalize(image)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected, rtol=1e-6)
    batch = described.scaling.normalize(torch.from_numpy(image)[None])
    np.testing.assert_allclose(batch[0].numpy(), expected, rtol=1e-6)


def test_the_item_scales_stored_values_as_the_bundle_does(prefix, described):
    item = pystac.Item.from_file(str(prefix / "item.json"))
    value = 77
    scores = [(value - z["mean"]) / z["stddev"] for z in item.properties["mlm:input"][0]["value_scaling"]]
    np.testing.assert_allclose(scores, described.normalize(np.full((3, 1, 1), value, np.uint8))[:, 0, 0], rtol=1e-6)


def test_the_item_names_model_classes_checksum_and_parents(prefix):
    item = pystac.Item.from_file(str(prefix / "item.json"))
    asset = item.assets["model"]
    assert item.properties["mlm:name"] == "cover"
    assert item.properties["mlm:tasks"] == ["semantic-segmentation"]
    assert item.properties["mlm:output"][0]["result"]["shape"] == [-1, 1, 64, 64]
    assert item.properties["mlm:output"][0]["classification:classes"][1]["color_hint"] == "00C850"
    assert asset.roles == ["mlm:model", "mlm:weights", "data"]
    assert asset.extra_fields["file:size"] == (prefix / "model.safetensors").stat().st_size
    assert asset.extra_fields["file:checksum"] == f"1220{description(prefix).sha256}"
    assert [link.href for link in item.get_links("derived_from")] == ["items/a.json"]


def test_imagery_without_the_bands_is_refused_naming_both_sides(described):
    described.check_contract(["nir", "blue", "green", "red"], "uint8")
    with pytest.raises(ModelError, match="needs the bands red, green, blue, scene7 has red, nir: green, blue missing"):
        described.check_contract(["red", "nir"], "uint8", source="scene7")
    with pytest.raises(ModelError, match="trained on uint8 values, the imagery has uint16"):
        described.check_contract(["red", "green", "blue"], "uint16")


@pytest.mark.parametrize(
    "update", [{"scaling": {"mean": [1], "std": [1]}}, {"stride": 100}, {"name": "../x"}, {"bands": []}, {"extra": 1}]
)
def test_a_bundle_that_contradicts_itself_is_refused(prefix, update):
    path = prefix / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | update))
    with pytest.raises(ModelError, match=r"bundle\.json"):
        description(prefix)


@pytest.mark.parametrize("name", ["model.safetensors", "bundle.json", "item.json"])
def test_a_bundle_with_a_file_missing_is_refused(prefix, name):
    (prefix / name).unlink()
    with pytest.raises(ModelError, match=f"incomplete, {name} missing"):
        description(prefix)


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no model bundle"):
        description(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[]", "format None"), ('{"format": 2}', "format 2")])
def test_a_file_of_another_kind_or_version_is_refused(prefix, text, reason):
    (prefix / "bundle.json").write_text(text)
    with pytest.raises(ModelError, match=reason):
        description(prefix)


def test_truncated_weights_are_refused(prefix):
    path = prefix / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged"):
        build(prefix)


def test_weights_of_another_training_are_refused(prefix, tmp_path, described):
    torch.manual_seed(1)
    save(tmp_path / "other", described, build_segmenter("unet", "mobilenet_v2", weights="none"))
    (prefix / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="sha256 differs"):
        build(prefix)


@pytest.mark.parametrize(
    "architecture",
    [
        {"factory": "os.system", "options": {}},
        {"factory": "segmenter", "options": OPTIONS | {"encoder": "resnet18"}},
        {"factory": "segmenter", "options": OPTIONS | {"activation_hook": "x"}},
    ],
)
def test_an_architecture_that_is_unknown_or_does_not_fit_the_weights_is_refused(prefix, architecture):
    path = prefix / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": architecture}))
    with pytest.raises(ModelError, match="architecture"):
        build(prefix)


@pytest.mark.real
def test_the_item_follows_the_schema_of_the_extension(shared, prefix):
    schema = json.loads((shared / "data/stac/ext-mlm/json-schema/schema.json").read_text())
    jsonschema.Draft7Validator(_offline(schema)).validate(json.loads((prefix / "item.json").read_text()))


def _offline(node):
    """The schema without references to schemas elsewhere."""
    if isinstance(node, dict):
        elsewhere = str(node.get("$ref", "")).startswith("http")
        return {} if elsewhere else {key: _offline(value) for key, value in node.items()}
    return [_offline(value) for value in node] if isinstance(node, list) else node


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, described, model, value):
    broken = build_segmenter("unet", "mobilenet_v2", weights="none")
    broken.load_state_dict(model.state_dict())
    name, weight = next(iter(broken.named_parameters()))
    weight.data.view(-1)[3] = value
    save(tmp_path / "broken", described, broken)
    with pytest.raises(ModelError, match=f"weights of {tmp_path}/broken have NaN or infinity in {name} and 0 other"):
        build(tmp_path / "broken")


def test_models_that_a_segmenter_was_made_from_are_not_offered_next_to_it(tmp_path, described, model):
    for name in ("classifier", "warm-up", "segmenter"):
        save(tmp_path / "models" / name, described, model)
    assert [prefix.rpartition("/")[2] for prefix, _ in find([tmp_path])] == ["classifier", "segmenter"]
    assert [prefix for prefix, _ in find([tmp_path / "models/warm-up"])] == [str(tmp_path / "models/warm-up")]
    (tmp_path / "models/segmenter/bundle.json").unlink()
    assert [prefix.rpartition("/")[2] for prefix, _ in find([tmp_path])] == ["classifier", "warm-up"]


def test_imagery_of_another_resolution_is_warned_of(described):
    assert described.scale_warning(10.0) == ""  # what the model learnt from is not known
    known = described.model_copy(update={"metres": 0.6})
    assert known.scale_warning(None) == known.scale_warning(0.5) == known.scale_warning(0.8) == ""
    assert "pixels of 10 m, model cover learnt from pixels of 0.6 m" in known.scale_warning(10.0)
    assert known.scale_warning(0.3)
    assert "metres" not in described.model_dump(mode="json")  # a bundle of before stays the same
