import pytest
import torch
from torch import nn

from rayseg.errors import ConfigError
from rayseg.models.segmenter import ARCHITECTURES, build_segmenter


@pytest.mark.parametrize("architecture", ["unet", "deeplabv3plus", "fpn"])
def test_logits_have_the_size_of_the_image(architecture):
    model = build_segmenter(architecture, "resnet18", weights="none", classes=3).eval()
    assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 3, 64, 96)


def test_any_encoder_of_timm_will_do():
    model = build_segmenter("unet", "regnety_002", weights="none", channels=4).eval()
    assert model(torch.zeros(1, 4, 64, 64)).shape == (1, 1, 64, 64)


def test_a_reduced_segmenter_sees_the_mean_of_squares_and_answers_at_full_size(tmp_path):
    plain = build_segmenter("unet", "resnet18", weights="none").eval()
    reduced = build_segmenter("unet", "resnet18", weights="none", reduce=2).eval()
    reduced.net.load_state_dict(plain.state_dict())
    coarse = torch.randn(1, 3, 64, 64)
    logits = reduced(nn.functional.interpolate(coarse, scale_factor=2, mode="nearest"))
    assert logits.shape == (1, 1, 128, 128)
    torch.testing.assert_close(logits, nn.functional.interpolate(plain(coarse), scale_factor=2, mode="bilinear"))
    assert reduced.encoder is reduced.get_submodule("encoder") is reduced.net.encoder
    assert len(reduced.state_dict()) == len(plain.state_dict())


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=", ".join(ARCHITECTURES)):
        build_segmenter("unett", "resnet18", weights="none")


def test_an_encoder_the_architecture_cannot_use_is_refused():
    with pytest.raises(ConfigError, match="vgg11"):
        build_segmenter("deeplabv3plus", "vgg11", weights="none")


def test_the_encoder_takes_weights_from_a_file(tmp_path):
    donor = build_segmenter("unet", "resnet18", weights="none")
    torch.save(donor.state_dict(), tmp_path / "unet.pth")
    model = build_segmenter("fpn", "resnet18", weights=str(tmp_path / "unet.pth"))
    for taken, given in zip(_weights(model.encoder), _weights(donor.encoder), strict=True):
        torch.testing.assert_close(taken, given)


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return list(module.state_dict().values())
