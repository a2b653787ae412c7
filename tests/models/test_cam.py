import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

from rayseg.models.cam import gradcam_plusplus
from rayseg.models.classifier import build_classifier


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return build_classifier("resnet18", weights="none").eval()


@pytest.fixture(scope="module")
def images_NCHW():
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("stage", "module"), [(-1, "layer4"), (-2, "layer3")])
def test_the_map_of_an_encoder_stage_is_what_grad_cam_gives_for_the_module_itself(
    classifier, images_NCHW, stage, module
):
    cams, scores = gradcam_plusplus(classifier, images_NCHW, target_class=1, layer=stage)
    reference = GradCAMPlusPlus(classifier, [classifier.encoder.get_submodule(module)])
    expected = reference(images_NCHW, [ClassifierOutputTarget(1)] * 3)
    assert cams.shape == (3, 64, 96)
    assert cams.dtype == np.float32
    assert expected.max() > 0.9
    np.testing.assert_allclose(cams, expected, atol=1e-5)
    np.testing.assert_allclose(scores, classifier(images_NCHW).softmax(1)[:, 1].detach().numpy(), atol=1e-6)


def test_batches_do_not_change_the_maps(classifier, images_NCHW):
    whole, _ = gradcam_plusplus(classifier, images_NCHW, target_class=0)
    parts, scores = gradcam_plusplus(classifier, images_NCHW, target_class=0, batch_size=2)
    assert scores.shape == (3,)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_model_is_left_as_it_was(classifier, images_NCHW):
    classifier.train()
    classifier.encoder.bn1.eval()
    gradcam_plusplus(classifier, images_NCHW, target_class=0)
    assert classifier.training
    assert not classifier.encoder.bn1.training
    assert all(weight.requires_grad and weight.grad is None for weight in classifier.parameters())
    assert not any(module._forward_hooks for module in classifier.modules())
    classifier.eval()


class Spot(nn.Module):
    """Scores class 1 by the brightness of the image; its feature map is the image itself."""

    def __init__(self):
        super().__init__()
        self.features = nn.AvgPool2d(8)
        self.head = nn.Linear(1, 2)
        nn.init.constant_(self.head.weight, 0)
        nn.init.constant_(self.head.bias, 0)
        self.head.weight.data[1] = 1

    def forward(self, images_NCHW):
        return self.head(self.features(images_NCHW).mean((2, 3)))


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.5, 1.0), True)])
def test_the_map_lies_on_the_bright_spot_in_every_view(scales, flip):
    model = Spot()
    images = torch.zeros(1, 1, 64, 64)
    images[..., 8:24, 40:56] = 1
    cams, scores = gradcam_plusplus(model, images, target_class=1, layer=model.features, scales=scales, flip=flip)
    assert cams[0, 8:24, 40:56].mean() > 0.6
    assert cams[0, 8:24, 8:24].mean() < 0.01
    assert cams.min() == 0
    assert cams.max() == pytest.approx(1, abs=1e-6)
    assert scores[0] > 0.5


def test_a_class_the_model_lacks_is_an_error(classifier, images_NCHW):
    with pytest.raises(IndexError):
        gradcam_plusplus(classifier, images_NCHW, target_class=7)


@pytest.mark.real
@pytest.mark.parametrize("layer", ["block", "prerelu"])
@pytest.mark.parametrize("target_class", [0, 1])
def test_maps_and_scores_equal_the_published_ones(shared, layer, target_class):
    golden = np.load(shared / "golden/gpc/gradcam_plusplus.npz", allow_pickle=False)
    shape = BlockParams.from_init_params(depth=5, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=0.25)
    model = RegNet(shape, num_classes=2, stem_width=16).eval()
    model.load_state_dict({key[3:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("sd.")})
    names = {"block": "trunk_output.block3", "prerelu": "trunk_output.block3.block3-1.f"}
    module = model.get_submodule(names[layer])
    cams, scores = gradcam_plusplus(model, torch.from_numpy(golden["input"]), target_class=target_class, layer=module)
    np.testing.assert_allclose(scores, golden["softmax"][:, target_class], atol=1e-4)
    np.testing.assert_allclose(cams, golden[f"{layer}.c{target_class}.cam_pip"], atol=1e-3)
    if layer == "block":
        np.testing.assert_allclose(cams, golden[f"{layer}.c{target_class}.cam_ref"], atol=1e-3)
