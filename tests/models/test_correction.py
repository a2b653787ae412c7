import numpy as np
import torch
from torch import nn

from rayseg.models import correction
from rayseg.models.correction import AXES, Corrected, build_corrected, feature_maps, features
from rayseg.models.pixel_head import build_pixel_head
from rayseg.models.segmenter import build_segmenter
from rayseg.train.correction import CorrectionConfig, Known, farthest, fit_correction


def known(features_NF, logits_NK, classes_N):
    ones = np.ones(len(classes_N), np.float32)
    return Known(features_NF.astype(np.float32), logits_NK.astype(np.float32), np.asarray(classes_N), ones)


def groups(rng, *centres, count=300):
    return np.concatenate([centre + 0.1 * rng.normal(size=(count, 6)) for centre in centres])


def test_features_are_those_that_the_corrected_network_projects():
    torch.manual_seed(0)
    for base in (
        build_pixel_head("mobilenet_v2", classes=3, weights="none"),
        build_segmenter("unet", "mobilenet_v2", weights="none", classes=1, reduce=2),
        build_segmenter("deeplab", "mobilenet_v2", weights="none", classes=3, members=2),
    ):
        base.eval()
        images = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            found, logits = features(base, images)
            outputs = logits.shape[1]
            model = Corrected(base, classes=outputs, features=found.shape[1], anchors=1, memory=0).eval()
            assert torch.equal(model(images), base(images))  # nothing is learnt yet
            model.weight_KF.normal_(std=0.1)
            model.reach.zero_()
            moved = torch.einsum("kf,nfhw->nkhw", model.weight_KF, found)
            wanted = base(images) + nn.functional.interpolate(moved, size=(64, 64), mode="bilinear")
            torch.testing.assert_close(model(images), wanted, rtol=1e-3, atol=1e-3)
            assert sum(part.shape[1] for part in feature_maps(base, images, base(images))) == found.shape[1]


def test_a_corrected_segmenter_is_built_from_the_options_of_its_bundle():
    options = {"encoder": "mobilenet_v2", "classes": 3, "channels": 3, "hidden": 0, "lab": 1}
    model = build_corrected(of="pixel-head", features=170, anchors=2, memory=5, **options)
    assert model.sizes == {"features": 170, "anchors": 2, "memory": 5}
    assert model.recalled_MK.shape == (5, 3)
    assert model.axes_DF.shape == (AXES, 170)


def test_clicks_change_their_like_and_nothing_that_is_far():
    rng = np.random.default_rng(0)
    near, far = np.ones(6), -np.ones(6)
    own_NF = groups(rng, near, far)
    logits_NK = np.tile([2.0, 0.0, -1.0], (600, 1))
    kept = known(own_NF, logits_NK, np.zeros(600, int))
    clicks = known(groups(rng, near, count=5), logits_NK[:5], [1] * 5)
    model, (before, after) = fit_correction(nn.Linear(1, 1), clicks, kept, CorrectionConfig(reach=0.3), 0.5)
    assert (before, after) == (0.0, 1.0)
    units = torch.from_numpy(own_NF).float() @ torch.cat([model.weight_KF, model.axes_DF]).T
    moved_NK = model.moved(units.T[None, :, None])[0, :, 0].T.numpy()
    assert (moved_NK[300:] == 0).all()
    assert (moved_NK[:300, 1] > 0).mean() > 0.9
    assert (moved_NK[:300, 2] < 0.5).all()


def test_one_click_against_the_whole_map_is_followed_at_its_own_place():
    rng = np.random.default_rng(0)
    own_NF = rng.normal(size=(500, 6))
    for logits_NK, value, threshold in ((np.tile([5.0, 0.0], (500, 1)), 1, 0.5), (np.full((500, 1), 4.0), 0, 0.7)):
        kept = known(own_NF, logits_NK, np.zeros(500, int))
        clicks = known(own_NF[:1], logits_NK[:1], [value])
        model, right = fit_correction(nn.Linear(1, 1), clicks, kept, CorrectionConfig(kept=1000.0), threshold)
        assert right == (0.0, 1.0)
        assert len(model.memory_MD) == 1


def test_without_a_click_that_disagrees_the_head_stays_zero():
    rng = np.random.default_rng(0)
    own_NF, logits_NK = rng.normal(size=(500, 6)), np.tile([40.0, 0.0], (500, 1))
    clicks = known(own_NF[:3], logits_NK[:3], [0, 0, 0])
    model, _ = fit_correction(
        nn.Linear(1, 1), clicks, known(own_NF, logits_NK, np.zeros(500, int)), CorrectionConfig(), 0.5
    )
    assert float(model.weight_KF.abs().max()) < 1e-3
    assert len(model.memory_MD) == 0


def test_farthest_places_are_apart_and_not_repeated():
    places = torch.tensor([[0.0], [1.0], [10.0], [10.0], [4.0]])
    assert farthest(places, 3).tolist() == [0, 2, 4]
    assert sorted(places[farthest(places, 9), 0].tolist()) == [0.0, 1.0, 4.0, 10.0]
    assert correction.gaussian(torch.tensor([0.0, 1.0, 9.0]), 1.0).tolist()[::2] == [1.0, 0.0]


def test_clicks_that_resemble_right_pixels_do_not_change_the_map():
    rng = np.random.default_rng(0)
    own_NF = rng.normal(size=(4000, 4))
    rare_N = rng.random(4000) < 0.1
    logits_NK = np.where(rare_N[:, None], [[-3.0, 3.0]], [[3.0, -3.0]])
    wrong_N = np.flatnonzero(~rare_N)[:60]
    clicks, rest = known(own_NF[wrong_N], logits_NK[wrong_N], np.ones(60, int)), np.arange(60, 4000)
    kept = known(own_NF[rest], logits_NK[rest], np.zeros(len(rest), int))
    model, (_, after) = fit_correction(nn.Linear(1, 1), clicks, kept, CorrectionConfig(), 0.5)
    units = torch.from_numpy(rng.normal(size=(4000, 4))).float() @ torch.cat([model.weight_KF, model.axes_DF]).T
    moved_NK = model.moved(units.T[None, :, None])[0, :, 0].T.numpy()
    assert ((moved_NK + np.array([3.0, -3.0])).argmax(axis=1) == 1).mean() < 0.02
    assert after > 0.3
