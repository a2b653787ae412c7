import argparse
import gzip
import io
import math
import re
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rayseg.errors import ConfigError, ModelError
from rayseg.models.encoders import (
    averaged,
    build_encoder,
    encoder_name,
    freeze_batchnorm,
    load_encoder_weights,
    read_state,
    recalibrate_batchnorm,
)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("mobilenet_v2", "mobilenet_v2"),
        ("resnet18", "resnet18"),
        ("tu-resnet18", "tu-resnet18"),
        ("regnety_040", "tu-regnety_040"),
        ("timm-regnety_040", "tu-regnety_040"),
        ("timm-efficientnet-b0", "timm-efficientnet-b0"),
        ("timm-mobilenetv3_small_minimal_100", "tu-tf_mobilenetv3_small_minimal_100"),
    ],
)
def test_names_of_both_libraries_are_understood(asked, meant):
    assert encoder_name(asked) == meant


def test_an_unknown_name_is_refused_with_close_ones():
    with pytest.raises(ConfigError, match="regnety_040"):
        encoder_name("regnety_04")


def test_deprecated_names_warn_nobody():
    assert build_encoder("timm-efficientnet-b0", weights="none").out_channels[0] == 3


def test_imagenet_weights_without_network_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"set weights to a local \.pth or \.safetensors file, or to none"):
        build_encoder("mobilenet_v2", weights="imagenet")


def _same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "tu-regnety_002"])
@pytest.mark.parametrize(
    "prefix", ["", "encoder.", "module.encoder.", "model.encoder.", "module.net.backbone.", "_orig_mod.module."]
)
def test_weights_are_found_under_every_spelling(tmp_path, name, prefix):
    donor, encoder = build_encoder(name, weights="none"), build_encoder(name, weights="none")
    state = {f"{prefix}{key}": value for key, value in donor.state_dict().items()}
    if prefix:
        state["decoder.block.weight"] = torch.zeros(3)
    else:
        state["classifier.1.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    load_encoder_weights(encoder, str(tmp_path / "w.pth"))
    assert _same(encoder, donor)


def test_the_keys_of_timm_and_safetensors_are_read(tmp_path):
    donor, encoder = (build_encoder("tu-regnety_002", weights="none") for _ in range(2))
    state = {key.removeprefix("model."): value for key, value in donor.state_dict().items()}
    save_file(state | {"head.fc.weight": torch.zeros(1)}, tmp_path / "W.SAFETENSORS")
    load_encoder_weights(encoder, str(tmp_path / "W.SAFETENSORS"))
    assert _same(encoder, donor)


def test_a_first_convolution_for_rgb_is_adapted_to_the_bands(tmp_path):
    donor = build_encoder("resnet18", weights="none")
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder("resnet18", channels=6, weights=str(tmp_path / "w.pth")).eval()
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(encoder(torch.cat([image, image], 1))[-1], donor.eval()(image)[-1])


@pytest.mark.parametrize("other", ["resnet34", "mobilenet_v2"])
def test_weights_of_another_architecture_are_refused_with_the_count(tmp_path, other):
    torch.save(build_encoder(other, weights="none").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"w\.pth fit \d+ of the 120 tensors of ResNetEncoder"):
        build_encoder("resnet18", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_truncated_file_is_refused_by_name(tmp_path, name):
    state = build_encoder("resnet18", weights="none").state_dict()
    path = tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ModelError, match=rf"{name} \(100000 bytes\) are damaged .* 0 tensors"):
        build_encoder("resnet18", weights=str(path))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch of old"])
def test_the_content_of_a_file_of_weights_decides_its_kind(tmp_path, name, kind):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([4, -5])}
    if kind == "safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=kind == "torch")
    found = read_state(str(tmp_path / name))
    assert found.keys() == {"a", "b"}
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    torch.save({"a": torch.ones(2), "b": torch.tensor([1.0, value]), "n": torch.tensor(3)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"w\.pth have NaN or infinity in 1 of 3 tensors \(first b\)"):
        read_state(str(tmp_path / "w.pth"))


def test_files_of_other_kinds_are_called_what_they_are(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    np.savez(tmp_path / "n.npz", a=np.ones(2))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(tmp_path / "w.pth", "w.pth")
    others = {
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n",
        "a web page": b"\n<!DOCTYPE html><html></html>",
        "a gzip archive": gzip.compress((tmp_path / "w.pth").read_bytes()),
        "an archive of w.pth": packed.getvalue(),
        "an archive of a.npy": (tmp_path / "n.npz").read_bytes(),
    }
    for said, content in others.items():
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ModelError, match=rf"x\.pth \(\d+ bytes\) are not weights, but {said}; "):
            read_state(str(tmp_path / "x.pth"))


def test_a_missing_file_and_one_without_tensors_are_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        build_encoder("resnet18", weights=str(tmp_path / "none.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="no tensors by name"):
        build_encoder("resnet18", weights=str(tmp_path / "list.pth"))


@pytest.mark.parametrize(
    "parts",
    [
        lambda state: {"state_dict": state | {"criterion.weight": torch.ones(2)}, "hyper_parameters": {"lr": 0.1}},
        lambda state: {"net": state, "model": "resnet18"},
        lambda state: {"checkpoint": {"student": {"backbone": state}}},
        lambda state: {"state_dict": state | {"metric.confmat": torch.ones(2, 2)}, "loops": {"fit_loop": {}}},
    ],
)
def test_the_network_is_found_in_a_checkpoint_with_other_things(tmp_path, parts):
    donor = build_encoder("resnet18", weights="none")
    named = parts({f"model.{key}": value for key, value in donor.state_dict().items()})
    torch.save({"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, **named}, tmp_path / "w.ckpt")
    encoder = build_encoder("resnet18", weights=str(tmp_path / "w.ckpt"))
    assert _same(encoder, donor)


def test_of_two_copies_the_first_is_loaded_and_named(tmp_path, caplog):
    student, teacher = (build_encoder("resnet18", weights="none").state_dict() for _ in range(2))
    state = {f"student.{key}": t for key, t in student.items()} | {f"teacher.{key}": t for key, t in teacher.items()}
    torch.save(state, tmp_path / "w.pth")
    encoder = build_encoder("resnet18", weights=str(tmp_path / "w.pth"))
    assert torch.equal(encoder.state_dict()["conv1.weight"], student["conv1.weight"])
    assert "student. and teacher.: student. is loaded" in caplog.text


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
        (Path("/x"), "pathlib.PosixPath"),
    ],
)
def test_an_object_that_safe_loading_refuses_is_named_with_the_remedy(tmp_path, extra, named):
    torch.save({"state_dict": {"a": torch.zeros(3)}, "extra": extra}, tmp_path / "w.pth")
    with pytest.raises(
        ModelError, match=rf"an object that is not a tensor \({re.escape(named)}\).*state dict"
    ) as error:
        build_encoder("resnet18", weights=str(tmp_path / "w.pth"))
    assert "damaged" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_network_is_named_as_one(tmp_path):
    torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 1)), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"TorchScript.*save the state dict"):
        build_encoder("resnet18", weights=str(tmp_path / "w.pt"))


class Dangerous:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_a_pickle_with_code_is_refused_unread(tmp_path):
    torch.save({"state_dict": Dangerous()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match=r"evil\.pth"):
        build_encoder("resnet18", weights=str(tmp_path / "evil.pth"))


def test_frozen_batch_norms_keep_their_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    freeze_batchnorm(model)
    model(torch.randn(8, 3, 4, 4) * 5 + 3)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].weight.requires_grad


def test_recalibration_gives_the_statistics_of_the_batches():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) * (n + 1) + n for n in range(3)]
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).train()
    recalibrate_batchnorm(model, batches)
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    assert model[0].training
    assert model[1].training
    assert model[1].momentum == 0.1


def test_the_average_follows_the_weights_at_its_decay():
    model = nn.BatchNorm1d(1)
    average = averaged(model, decay=0.5)
    values = [1.0, 2.0, 4.0, 4.0]
    for value in values:
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked += 1
        average.update_parameters(model)
    kept, expected = [min(0.5, (1 + n) / (10 + n)) for n in range(4)], values[0]
    for keep, value in zip(kept[1:], values[1:], strict=True):
        expected = keep * expected + (1 - keep) * value
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.running_mean.item() == pytest.approx(expected)
    assert average.module.num_batches_tracked.item() == 4


@pytest.mark.real
def test_imagenet_weights_with_torchvision_keys_fill_the_encoder(shared):
    path = shared / "weights/mobilenet_v2_imagenet_from_tflite_int8.pth"
    encoder = build_encoder("mobilenet_v2", weights=str(path))
    given = torch.load(path, weights_only=True)
    assert all(torch.equal(value.float(), given[key].float()) for key, value in encoder.state_dict().items())


@pytest.mark.real
def test_the_truncated_checkpoint_is_refused(shared):
    with pytest.raises(ModelError, match=r"mobile_sam_truncated\.pt \(1835008 bytes\) are damaged"):
        build_encoder("mobilenet_v2", weights=str(shared / "weights/mobile_sam_truncated.pt"))
    with pytest.raises(ModelError, match="fit 0 of the 312 tensors"):
        build_encoder("mobilenet_v2", weights=str(shared / "weights/squeezenet1_1_imagenet_from_winml_fp16.pth"))
