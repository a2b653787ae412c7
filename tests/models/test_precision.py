"""Bfloat16 on CPUs: what it changes is measured, and it is used only where that is little."""

import numpy as np
import pytest
import torch
from torch import nn

from rayseg.models import precision
from rayseg.models.bundle import Bf16
from rayseg.models.precision import InBf16, chosen, compared


class Near(nn.Module):
    """Logits of two classes that differ by the image's first band x `gap`, on top of 1."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            self.conv.weight[:] = torch.tensor([[0.0, 1.0], [gap, 1.0]])[:, :, None, None]
            self.conv.bias.zero_()

    def forward(self, x_NCHW):
        return self.conv(x_NCHW)


@pytest.fixture(autouse=True)
def quick_cpu(monkeypatch):
    monkeypatch.setattr(precision, "is_fast", lambda: True)


def images():
    """Ones and minus ones by rows, a second band of ones, and the sign as the class."""
    sign = np.repeat(np.array([-1, 1] * 16, np.float32)[:, None], 32, axis=1)
    return [(np.stack([sign, np.ones_like(sign)]), (sign > 0).astype(np.uint8))]


def test_a_difference_below_the_digits_of_bfloat16_is_counted():
    # 1 and 1 + 0.5 are different in bfloat16, 1 and 1 + 1e-4 are not: the tie goes to class 0
    assert compared(Near(0.5), images(), threshold=0.5, classes=2) == Bf16(changed=0.0, lost=0.0)
    found = compared(Near(1e-4), images(), threshold=0.5, classes=2)
    assert found == Bf16(changed=0.5, lost=0.75)  # IoU 1 and 1; then .5 and 0
    assert not found.fits


def test_masks_may_lack_and_no_images_give_no_answer():
    [(image, _)] = images()
    assert compared(Near(1e-4), [(image, None)], threshold=0.5, classes=2) == Bf16(changed=0.5, lost=0.0)
    assert compared(Near(1e-4), [], threshold=0.5, classes=2) is None


@pytest.mark.parametrize(
    ("asked", "measured", "fast", "expected"),
    [
        ("auto", Bf16(changed=0.004, lost=0.0), True, True),
        ("auto", Bf16(changed=0.006, lost=0.0), True, False),
        ("auto", Bf16(changed=0.0, lost=0.006), True, False),
        ("auto", Bf16(changed=0.0, lost=0.0), False, False),
        ("auto", None, True, False),
        ("bf16", None, False, True),
        ("fp32", Bf16(changed=0.0, lost=0.0), True, False),
    ],
)
def test_bfloat16_is_used_as_asked_or_where_it_is_fast_and_changes_little(asked, measured, fast, expected, monkeypatch):
    monkeypatch.setattr(precision, "is_fast", lambda: fast)
    assert chosen(asked, measured) is expected


def test_results_are_float32():
    x = torch.rand(1, 2, 8, 8)
    with torch.inference_mode():
        assert InBf16(Near(0.5))(x).dtype == torch.float32
        assert not torch.equal(InBf16(Near(0.3))(x), Near(0.3)(x))
