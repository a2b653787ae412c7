import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.color import rgb2lab
from sklearn.mixture import GaussianMixture

from rayseg.models.appearance import Appearance, features, lab


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


def pixels(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float()[None]


def test_colours_are_those_of_cie_lab(image):
    found = lab(pixels(image))[0].permute(1, 2, 0).numpy()
    assert found == pytest.approx(rgb2lab(image), abs=0.02)


def test_texture_is_the_local_deviation_of_lightness(image):
    lightness = rgb2lab(image)[..., 0]
    mean, square = (ndimage.gaussian_filter(x, 4, mode="mirror") for x in (lightness, lightness**2))
    found = features(pixels(image))[0].numpy()
    assert found[3] == pytest.approx(5 * np.log(np.sqrt(square - mean**2) + 0.5), abs=0.02)
    smooth = ndimage.gaussian_filter(rgb2lab(image), (1.5, 1.5, 0), mode="mirror")
    assert found[:3] == pytest.approx(smooth.transpose(2, 0, 1), abs=0.05)


def test_a_flat_image_has_colour_and_no_texture():
    flat = np.full((40, 40, 3), (0, 158, 115), np.uint8)
    found = features(pixels(flat))[0].numpy()
    assert found[:3, 20, 20] == pytest.approx(rgb2lab(flat)[0, 0], abs=0.02)
    assert found[3] == pytest.approx(5 * np.log(0.5), abs=0.3)


def test_logits_are_the_log_ratio_of_the_two_mixtures(image):
    rng = np.random.default_rng(1)
    parts = [GaussianMixture(k, random_state=0).fit(rng.normal(size=(300, 4)) * 20 + 10 * k) for k in (1, 3)]
    model = Appearance(components=3)
    factors = np.concatenate([part.precisions_cholesky_ for part in parts])
    heights = np.log(np.concatenate([part.weights_ for part in parts]))
    heights += np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    model.load_state_dict({
        "mean": torch.tensor([100.0, 90, 80]), "std": torch.tensor([50.0, 40, 30]),
        "centres": torch.tensor(np.concatenate([part.means_ for part in parts])).float(),
        "whitening": torch.tensor(factors).float(), "heights": torch.tensor(heights).float(),
    })  # fmt: skip
    normal = (pixels(image) - model.mean[:, None, None]) / model.std[:, None, None]
    seen = features(pixels(image))[0].permute(1, 2, 0).reshape(-1, 4).double().numpy()
    expected = (parts[0].score_samples(seen) - parts[1].score_samples(seen)).reshape(image.shape[:2])
    assert model(normal)[0, 0].numpy() == pytest.approx(expected, rel=1e-3, abs=0.01)


def test_a_pixel_depends_on_what_is_near_it_alone():
    big = np.random.default_rng(2).integers(0, 256, (120, 120, 3), np.uint8)
    whole, part = features(pixels(big)), features(pixels(big[20:100, 20:100]))
    assert torch.allclose(whole[..., 40:80, 40:80], part[..., 20:60, 20:60], atol=1e-3)
