from pathlib import Path

import numpy as np
import pytest

from rayseg.errors import DataError
from rayseg.vision import superpixels

HALVES = np.zeros((40, 60, 3), np.uint8)
HALVES[:, 25:] = (200, 40, 90)


@pytest.mark.parametrize("method", [superpixels.felzenszwalb, superpixels.slic])
def test_labels_run_from_zero_without_gaps_and_no_superpixel_crosses_a_strong_edge(method):
    labels = method(HALVES)
    assert labels.dtype == np.int32
    assert labels.shape == (40, 60)
    assert set(np.unique(labels)) == set(range(labels.max() + 1))
    assert not set(np.unique(labels[:, :22])) & set(np.unique(labels[:, 28:]))


@pytest.mark.parametrize("bands", [1, 4])
def test_any_number_of_bands_is_taken(bands):
    image = np.repeat(HALVES[..., :1], bands, axis=2)
    assert superpixels.felzenszwalb(image).max() == 1
    assert superpixels.slic(image, segments=20).max() > 0


def test_an_image_without_channel_axis_is_refused():
    with pytest.raises(DataError, match="add the channel axis"):
        superpixels.felzenszwalb(HALVES[..., 0])


@pytest.mark.real
def test_felzenszwalb_equals_the_reference(shared: Path):
    golden = np.load(shared / "golden/gpc/unsup_v1_8iter.npz")
    np.testing.assert_array_equal(superpixels.felzenszwalb(golden["image_bgr"]), golden["felzenszwalb"])


@pytest.mark.parametrize("method", sorted(superpixels.METHODS))
@pytest.mark.parametrize("bands", [1, 3, 10])
def test_every_method_divides_every_pixel_and_keeps_to_edges(method, bands):
    image = np.zeros((48, 60, bands), np.float32)
    image[:, 30:] = 0.8
    image += np.random.default_rng(0).normal(0, 0.01, image.shape).astype(np.float32)
    labels = superpixels.METHODS[method](np.clip(image, 0, 1))
    assert labels.shape == (48, 60)
    assert labels.min() == 0
    assert len(np.unique(labels)) == labels.max() + 1
    crossing = set(np.unique(labels[:, :28])) & set(np.unique(labels[:, 32:]))
    assert not crossing


@pytest.mark.parametrize("method", sorted(superpixels.METHODS))
def test_every_method_takes_an_image_of_one_pixel(method):
    assert superpixels.METHODS[method](np.zeros((1, 1, 3), np.float32)).tolist() == [[0]]


def test_halved_has_the_images_shape_when_its_sides_are_odd():
    image = np.random.default_rng(0).integers(0, 255, (33, 35, 3), dtype=np.uint8)
    labels = superpixels.halved(image)
    assert labels.shape == (33, 35)
    np.testing.assert_array_equal(labels, superpixels.halved(image / np.float32(255)))
