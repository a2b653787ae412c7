import numpy as np
import pytest
import torch

from rayseg.errors import ConfigError
from rayseg.models.segment_labels import SegmentLabels, build_segments
from rayseg.vision.segment_clusters import pixel_features

OPTIONS = {"scale": 100.0, "sigma": 0.5, "min_size": 16}
BANDS = ("red", "green", "blue")


def _fields():
    """Two fields, a quarter and three quarters of the image."""
    image_CHW = np.full((3, 64, 80), 0.2, np.float32)
    image_CHW[:, :, 20:] = np.array([0.3, 0.6, 0.2])[:, None, None]
    return image_CHW


def test_every_region_has_the_label_of_its_nearest_centre_and_images_do_not_depend_on_their_batch():
    image_CHW = _fields()
    features_HWF = pixel_features(image_CHW.transpose(1, 2, 0), BANDS)
    centres_KF = np.stack([features_HWF[:, 40:].mean((0, 1)), features_HWF[:, :10].mean((0, 1)), [500.0] * 4])
    model = SegmentLabels(centres_KF, 25.0, BANDS, method="halved", contrast=1200.0, options=OPTIONS)
    batch = torch.from_numpy(np.stack([image_CHW, image_CHW[:, :, ::-1].copy()]))
    logits_NKHW = model(batch)
    assert logits_NKHW.shape == (2, 3, 64, 80)
    labels_NHW = logits_NKHW.argmax(1)
    assert labels_NHW[0, :, :16].unique().tolist() == [1]
    assert labels_NHW[0, :, 24:].unique().tolist() == [0]
    assert torch.equal(model(batch[1:])[0], logits_NKHW[1])
    # log of the ratio of two Gaussians of variance 25
    means_NF = centres_KF[:1]
    logits = model.logits(means_NF)[0]
    expected = (np.square(centres_KF[0] - centres_KF[1])).sum() / 50
    assert logits[0] - logits[1] == pytest.approx(expected, rel=1e-4)


def test_a_bundle_rebuilds_it_from_its_options():
    options = {"bands": ",".join(BANDS), "features": 4, "classes": 3, "contrast": 1200.0, **OPTIONS}
    model = build_segments("halved", **options, weights="none")
    assert model.state_dict()["centres"].shape == (3, 4)
    with pytest.raises(ConfigError, match="'hexagons', expected one of"):
        build_segments("hexagons", **options)
    with pytest.raises(ConfigError, match="have no pretrained"):
        build_segments("halved", **{**options, "weights": "imagenet"})
