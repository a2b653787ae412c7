import numpy as np
import pytest
import torch

from rayseg.errors import ConfigError
from rayseg.models.classifier import build_classifier, class_probabilities

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_average_pooling_is_the_linear_layer_on_the_mean_features():
    model = build_classifier("mobilenet_v2", weights="none", classes=3).eval()
    features = model.encoder(IMAGES)[-1].mean((2, 3))
    expected = features @ model.head.weight[:, :, 0, 0].T + model.head.bias
    torch.testing.assert_close(model(IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_the_poolings_lie_between_mean_and_maximum():
    torch.manual_seed(0)
    names = ("average", "logsumexp", "top10", "top20")
    models = {name: build_classifier("resnet18", weights="none", stride=16, pooling=name).eval() for name in names}
    for model in models.values():
        model.load_state_dict(models["average"].state_dict())
    positions = models["average"].position_logits(IMAGES)
    mean, soft, top, wide = (models[name](IMAGES) for name in names)
    highest = positions.flatten(2).max(2).values
    assert positions.shape == (2, 2, 4, 4)
    assert (mean < soft).all()
    assert (soft < highest).all()
    assert (wide < top).all()
    torch.testing.assert_close(top, positions.flatten(2).topk(2, dim=2).values.mean(2))


def test_logsumexp_pooling_of_equal_scores_is_that_score():
    model = build_classifier("resnet18", weights="none", pooling="logsumexp")
    torch.testing.assert_close(model.pool(torch.full((1, 2, 3, 3), 0.7)), torch.full((1, 2), 0.7))


def test_dilation_gives_a_finer_map_and_reduction_a_coarser_one():
    dilated = build_classifier("mobilenet_v2", weights="none", stride=8).eval()
    reduced = build_classifier("mobilenet_v2", weights="none", reduce=2).eval()
    assert dilated.position_logits(IMAGES).shape[2:] == (8, 8)
    assert reduced.position_logits(IMAGES).shape[2:] == (1, 1)
    coarse = torch.nn.functional.avg_pool2d(IMAGES, 2)
    reduced.reduce = 1
    once = reduced(coarse)
    reduced.reduce = 2
    torch.testing.assert_close(reduced(IMAGES), once)


def test_one_logit_is_a_probability_by_itself():
    torch.testing.assert_close(class_probabilities(torch.zeros(2, 1)), torch.full((2, 1), 0.5))
    torch.testing.assert_close(class_probabilities(torch.zeros(1, 4)), torch.full((1, 4), 0.25))


def test_dropout_drops_only_in_training():
    model = build_classifier("resnet18", weights="none", dropout=0.5).eval()
    torch.testing.assert_close(model(IMAGES), model(IMAGES))
    model.dropout.train()
    assert not np.allclose(model(IMAGES).detach(), model(IMAGES).detach())


def test_images_may_have_other_bands():
    assert build_classifier("resnet18", weights="none", channels=5).eval()(torch.zeros(1, 5, 64, 64)).shape == (1, 2)


def test_an_unknown_pooling_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="average, logsumexp, top1"):
        build_classifier("resnet18", weights="none", pooling="median")
