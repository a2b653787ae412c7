import numpy as np
import pytest
import torch
from published_deeplab import as_published_v2, published_v2

from rayseg.models import published_weights
from rayseg.models.segmenter import build_segmenter
from rayseg.train.s4gan import S4ganConfig, groups_of

torch.set_num_threads(1)


def drawn(number, key, shape):
    """The weights the golden values were made with."""
    g = np.random.RandomState(1000 + number).standard_normal(shape)
    if len(shape) == 4:
        return g * np.sqrt(2 / np.prod(shape[1:]))
    kind = key.rpartition(".")[2]
    if kind == "weight":
        return (0.3 if ".bn3." in key else 1.0) * (1 + 0.1 * g)
    return {"running_var": 1 + 0.2 * np.abs(g), "running_mean": 0.1 * g, "bias": 0.1 * g}.get(kind, np.zeros(shape))


@pytest.mark.real
def test_it_is_the_published_network(shared):
    golden = np.load(shared / "golden" / "landcover" / "deeplab.npz", allow_pickle=False)
    model = build_segmenter("deeplab", "resnet50", classes=7, weights="none").eval()
    state = {}
    for number, (key, text) in enumerate(zip(golden["keys"], golden["shapes"], strict=True)):
        shape = tuple(int(part) for part in str(text).split(",") if part)
        state[str(key)] = torch.from_numpy(np.asarray(drawn(number, str(key), shape), np.float32))
    fitted = published_weights.fit(model, state, "golden", renames=published_weights.LANDCOVER)
    model.load_state_dict(fitted.state)
    assert fitted.dropped == {}
    encoder = sum(weight.numel() for weight in model.encoder.parameters())
    everything = sum(weight.numel() for weight in model.parameters())
    assert [everything, encoder, everything - encoder] == golden["param_counts"].tolist()
    with torch.inference_mode():
        image = torch.from_numpy(golden["input"])
        features = model.encoder(image)
        pyramid = model.aspp(features[-1])
        logits, decoded = model(image), model.decoder(features[2], pyramid)
    found = {
        "backbone_high_c16": features[-1][:, ::16],
        "backbone_low_c16": features[2][:, ::16, ::4, ::4],
        "aspp_c8": pyramid[:, ::8],
        "decoder": decoded,
        "logits": logits[..., ::2, ::2],
    }
    for name, values in found.items():
        np.testing.assert_allclose(values.numpy(), golden[name], rtol=0, atol=1e-4 * golden[name].std(), err_msg=name)
    np.testing.assert_array_equal(logits.argmax(1)[0].numpy(), golden["argmax"])


def test_any_encoder_serves_and_logits_have_the_images_size():
    model = build_segmenter("deeplab", "mobilenet_v2", classes=3, channels=4, weights="none").eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 4, 64, 96)).shape == (1, 3, 64, 96)
        assert model.encoder(torch.zeros(1, 4, 64, 96))[-1].shape[2:] == (4, 6)
    reduced = build_segmenter("deeplab", "mobilenet_v2", classes=3, weights="none", reduce=2).eval()
    with torch.inference_mode():
        assert reduced(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.fixture(scope="module")
def v2():
    """DeepLab v2 on a small encoder, with batch norms that change something."""
    torch.manual_seed(4)
    model = build_segmenter("deeplabv2", "resnet50", classes=3, weights="none").eval()
    for name, tensor in model.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) * 0.2 + 0.6 * name.endswith(("weight", "var")))
        if name.endswith("bias") and "aspp" in name:
            tensor.copy_(torch.randn(tensor.shape))
    return model


def test_deeplab_v2_is_the_published_network_and_takes_its_names(v2):
    state = as_published_v2(v2)
    image = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        found, expected = v2(image), published_v2(state, image, (3, 4, 6, 3))
    assert found.shape == (2, 3, 64, 96)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    other = build_segmenter("deeplabv2", "resnet50", classes=3, weights="none")
    content = {f"module.base.{key}": tensor for key, tensor in state.items()}
    fitted = published_weights.fit(other, content, "made", renames=published_weights.S4GAN)
    assert (fitted.dropped, fitted.shaped) == ({}, {})
    given = v2.state_dict()
    assert all(torch.equal(tensor, given[key]) for key, tensor in fitted.state.items())
    # S4GAN's own code calls the layers as torchvision does, and the pyramid layer5
    names = {key: key.removeprefix("encoder.").replace("aspp.", "layer5.conv2d_list.") for key in given}
    spelled = {f"module.{names[key]}": tensor for key, tensor in given.items()}
    fitted = published_weights.fit(other, spelled, "made", renames=published_weights.S4GAN)
    assert all(torch.equal(tensor, given[key]) for key, tensor in fitted.state.items())


def test_deeplab_v2_learns_in_the_published_groups():
    settings = S4ganConfig(architecture="deeplabv2", encoder="resnet50")
    trained = settings.build(classes=3, channels=3, weights="none")
    groups = groups_of(trained, settings)
    assert [group["factor"] for group in groups] == [1.0, 10.0, 20.0]
    assert [[tuple(w.shape) for w in group["params"]] for group in groups[1:]] == [[(3, 2048, 3, 3)] * 4, [(3,)] * 4]
    assert groups[2]["weight_decay"] == 0
    learns = [weight for weight in groups[0]["params"] if weight.requires_grad]
    assert {weight.ndim for weight in learns} == {4}  # no scale and shift of a batch norm
