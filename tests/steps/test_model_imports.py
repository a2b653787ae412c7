"""Weights of other codes as bundles: the same logits, and a word on everything that is left out."""

import numpy as np
import pytest
import torch
from published_deeplab import as_published_v2
from small_world import classifier, rayseg, refused, segmenter

from rayseg.errors import ModelError
from rayseg.models import bundle
from rayseg.models.classifier import build_classifier, build_over_imagenet
from rayseg.models.discriminator import Discriminator
from rayseg.models.plot_classifier import build_plot_classifier
from rayseg.models.segmenter import build_segmenter
from rayseg.train.classifier import ClassifierConfig
from rayseg.train.s4gan import DiscriminatorConfig, S4ganConfig


def drawn(model):
    """The network with random weights and batch norms, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.5 * name.endswith("running_var"))
    return model.eval()


def imported(tmp_path, kind, content, *settings):
    torch.save(content, tmp_path / "w.tar")
    words = [part for text in settings for part in ("--set", text)]
    found = rayseg("models", "import", kind, tmp_path / "w.tar", "--out", tmp_path / "bundle", *words)
    assert found.exit_code == 0, found.output
    return *bundle.build(tmp_path / "bundle"), found.stdout.splitlines()


def same(one, other, size=64):
    images = torch.from_numpy(np.random.default_rng(5).normal(size=(2, 3, size, size)).astype(np.float32))
    with torch.inference_mode():
        return torch.equal(one(images), other(images))


def test_gpcs_classifier_with_epoch_and_optimizer_around_it(tmp_path):
    model = drawn(build_classifier("test_resnet", classes=2, weights="none"))
    # as smp's ClassificationHead: pool, flatten, dropout, linear
    state = {key.replace("head.", "classification_head.3."): t for key, t in model.state_dict().items()}
    state["classification_head.3.weight"] = state["classification_head.3.weight"][..., 0, 0]
    state = {f"module.{key}": t for key, t in state.items()} | {"module.spare": torch.ones(2, 5)}
    content = {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}}
    described, found, said = imported(tmp_path, "gpc-classifier", content, "classifier.encoder=test_resnet")
    assert same(found, model)
    assert (described.task, [name for _, name, _ in described.classes]) == ("classification", ["gpc", "nongpc"])
    assert described.scaling.mean == (98.3519, 96.9567, 95.5713)
    count = len(model.state_dict())
    assert said[0].endswith(f"{count} of {count + 1} tensors loaded from {tmp_path}/w.tar")
    assert sorted(said[1:3]) == [
        f"  by its shape: head.{part} <- module.classification_head.3.{part}" for part in ("bias", "weight")
    ]
    assert said[3:] == [
        "  dropped epoch: not weights",
        "  dropped optimizer: not weights",
        "  dropped module.spare: the network has no such tensor",
    ]


def test_gpcs_segmenter_keeps_its_one_output(tmp_path):
    model = drawn(build_segmenter("unet", "test_resnet", classes=1, weights="none"))
    settings = ["segmenter.encoder=test_resnet"]
    described, found, _ = imported(tmp_path, "gpc-segmenter", {"state_dict": model.state_dict()}, *settings)
    assert same(found, model)
    assert described.outputs == 1


def test_a_classifier_over_imagenets_outputs(tmp_path):
    model = drawn(build_over_imagenet("resnet10t", classes=3, weights="none"))
    state = {key.replace("encoder.", "model.").replace("head.", "linear."): t for key, t in model.state_dict().items()}
    table = "{classes: [{name: a, color: '#000000'}, {name: b, color: '#FF0000'}, {name: c, color: '#00FF00'}]}"
    _, found, _ = imported(tmp_path, "al-classifier", state, "classifier.encoder=resnet10t", f"classes={table}")
    assert same(found, model)


def test_plots_are_torchvisions_layers_in_a_sequence_and_a_note_says_what_differs(tmp_path):
    model = drawn(build_plot_classifier("resnet18", weights="none"))
    layers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    state = {}
    for key, tensor in model.state_dict().items():
        part, _, rest = key.removeprefix("encoder.").partition(".")
        state[f"resnet.{layers[part]}.{rest}" if key.startswith("encoder.") else key.replace("head", "fc")] = tensor
    _, found, said = imported(tmp_path, "plots", state, "classifier.encoder=resnet18")
    assert same(found, model)
    assert said[-1].startswith("  note: hue and richness are computed")
    torch.save(model, tmp_path / "module.pth")
    words = ("models", "import", "plots", tmp_path / "module.pth", "--out", tmp_path / "other")
    assert "save the state dict alone" in refused(4, *words)


def test_s4gans_segmenter_and_discriminator(tmp_path):
    model = drawn(build_segmenter("deeplabv2", "resnet50", classes=18, weights="none"))
    state = {f"module.base.{key}": tensor for key, tensor in as_published_v2(model).items()}
    words = ["segmenter.encoder=resnet50", "bands=[blue, green, red]"]
    described, found, said = imported(tmp_path, "s4gan", state, *words)
    assert same(found, model)
    assert (described.outputs, described.bands) == (18, ("blue", "green", "red"))
    assert described.scaling.mean == (122.67891434, 116.66876762, 104.00698793)
    assert said[0].endswith(f"{len(state)} of {len(state)} tensors loaded from {tmp_path}/w.tar")
    assert "blue, green, red of DeepGlobe" in said[-1]
    judge = drawn(Discriminator(classes=18, width=4))
    torch.save({f"module.{key}": tensor for key, tensor in judge.state_dict().items()}, tmp_path / "d.pth")
    start = DiscriminatorConfig(width=4, start=str(tmp_path / "d.pth"))
    taken = start.build(classes=18, channels=3).state_dict()
    assert all(torch.equal(tensor, taken[key]) for key, tensor in judge.state_dict().items())
    with pytest.raises(ModelError, match="of the 10 tensors of Discriminator"):
        start.build(classes=6, channels=3)
    assert "start" not in DiscriminatorConfig().model_dump()


def test_what_is_not_a_whole_network_of_its_kind_is_refused(tmp_path):
    model = build_segmenter("unet", "test_resnet", classes=1, weights="none")
    torch.save({k: t for k, t in model.state_dict().items() if k.startswith("encoder.")}, tmp_path / "w.pth")
    words = ("models", "import", "gpc-segmenter", tmp_path / "w.pth", "--out", tmp_path / "bundle")
    said = refused(4, *words, "--set", "segmenter.encoder=test_resnet")
    assert "tensors of Unet, first decoder." in said
    assert not (tmp_path / "bundle").exists()
    assert "kind 'sam' is unknown, expected one of: gpc-classifier" in refused(2, *words[:2], "sam", *words[3:])
    assert "classes of segmenter are not set" in refused(2, *words[:2], "segmenter", *words[3:])


def test_a_training_starts_from_a_bundle_and_names_the_layers_that_start_anew(tmp_path, caplog):
    whole = segmenter(tmp_path / "model", classes=3)
    settings = S4ganConfig(architecture="unet", encoder="mobilenet_v2", weights="none", start=whole)
    given = bundle.build(whole)[1].state_dict()
    taken = settings.build(classes=3, channels=3).state_dict()
    assert all(torch.equal(tensor, given[key]) for key, tensor in taken.items())
    other = settings.build(classes=5, channels=3).state_dict()
    assert torch.equal(other["encoder.features.0.0.weight"], given["encoder.features.0.0.weight"])
    assert "tensors are taken over, not segmentation_head.0.weight, segmentation_head.0.bias" in caplog.text
    of_chips = ClassifierConfig(encoder="mobilenet_v2", weights="none", start=classifier(tmp_path / "classifier"))
    again = bundle.build(of_chips.start)[1].state_dict()
    assert torch.equal(of_chips.build(classes=2).state_dict()["head.weight"], again["head.weight"])
    with pytest.raises(ModelError, match="does not fit: encoder"):
        settings.model_copy(update={"encoder": "test_resnet"}).build(classes=3, channels=3)
    assert "start" not in S4ganConfig().model_dump()
