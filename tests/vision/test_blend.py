import numpy as np
import pytest

from rayseg.errors import DataError
from rayseg.geo.grid import Lattice, Window
from rayseg.vision.blend import Blend

LATTICES = [Lattice(16, 12), Lattice(16, 16), Lattice(16, 8, offset=-4), Lattice(12, 8, offset=5)]


def probabilities_of(patch: Window, classes: int = 2) -> np.ndarray:
    """What a model says of a patch: different in every patch, and known from the patch alone."""
    seed = [patch.row + 10_000, patch.col + 10_000]
    return np.random.default_rng(seed).random((classes, patch.height, patch.width), np.float32)


def blended(window: Window, lattice: Lattice, field=probabilities_of) -> np.ndarray:
    blend = Blend(window, 2, lattice)
    for patch in lattice.patches(window):
        blend.add(patch, field(patch))
    return blend.result()


@pytest.mark.parametrize("lattice", LATTICES)
def test_windows_of_any_place_and_size_hold_the_same_bits_as_the_whole(lattice):
    rng = np.random.default_rng(3)
    whole = Window(-37, -21, 90, 70)
    expected = blended(whole, lattice)
    for _ in range(12):
        col, row = int(rng.integers(-37, 40)), int(rng.integers(-21, 40))
        window = Window(col, row, int(rng.integers(1, 53 - col)), int(rng.integers(1, 49 - row)))
        rows, cols = window.slices(whole)
        np.testing.assert_array_equal(blended(window, lattice), expected[:, rows, cols])


@pytest.mark.parametrize("lattice", LATTICES)
def test_a_constant_field_stays_constant_up_to_the_edges(lattice):
    result = blended(Window(-5, 3, 50, 41), lattice, lambda patch: np.full((2, *[lattice.patch] * 2), 0.3, np.float32))
    np.testing.assert_allclose(result, 0.3, rtol=1e-6)


@pytest.mark.parametrize("lattice", LATTICES)
def test_one_patch_alone_is_kept_to_its_very_edge(lattice):
    patch = lattice.patches(Window(0, 0, 1, 1))[0]
    blend = Blend(patch, 2, lattice)
    blend.add(patch, probabilities_of(patch))
    np.testing.assert_allclose(blend.result(), probabilities_of(patch), rtol=1e-6)


def test_where_no_patch_was_added_the_result_is_zero_not_nan():
    lattice = LATTICES[0]
    window = Window(0, 0, 64, 64)
    blend = Blend(window, 2, lattice)
    patch = lattice.patches(window)[0]
    blend.add(patch, np.ones((2, 16, 16), np.float32))
    blend.add(Window(500, 500, 16, 16), np.ones((2, 16, 16), np.float32))
    rows, cols = patch.intersect(window).slices(window)
    result = blend.result()
    assert result.dtype == np.float32
    assert (result[:, rows, cols] == 1).all()
    assert result.sum() == result[:, rows, cols].size


def test_a_patch_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"\(3, 16, 16\).*\(2, 16, 16\)"):
        Blend(Window(0, 0, 8, 8), 2, LATTICES[0]).add(Window(0, 0, 16, 16), np.zeros((3, 16, 16), np.float32))


def test_an_empty_window_is_refused():
    with pytest.raises(DataError, match="at least one class"):
        Blend(Window(0, 0, 0, 8), 2, LATTICES[0])
