"""Bfloat16 on CPUs that multiply it natively, for models whose maps it hardly changes.

A product of bfloat16 has 8 digits of 24, sums are float32. Whether a map survives that depends on the model, so it is
compared once on validation images when a model is kept, and the bundle records the result.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayseg.metrics import Confusion
from rayseg.models.bundle import Bf16, Precision


class InBf16(nn.Module):
    """A model whose convolutions and products are computed in bfloat16; its results are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The model's outputs."""
        # The context holds for one thread, so the threads of `cpu.Apart` each enter their own.
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = self.model(x_NCHW)
        return output.float()


def is_fast() -> bool:
    """Whether this machine's CPU multiplies bfloat16 natively; others emulate it, slower than float32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def chosen(precision: Precision, measured: Bf16 | None) -> bool:
    """Whether a CPU computes in bfloat16: as asked, or where it is fast and the model has been found to stand it."""
    return precision == "bf16" or (precision == "auto" and measured is not None and measured.fits and is_fast())


@torch.inference_mode()
def compared(
    model: nn.Module,
    images: Iterable[tuple[NDArray[np.float32], NDArray[np.uint8] | None]],
    *,
    threshold: float,
    classes: int,
) -> Bf16 | None:
    """Compare the classes that a model gives in float32 and in bfloat16.

    Args:
        model: gives logits, on the CPU, in evaluation mode.
        images: its inputs (bands, height, width) with the classes (height, width), 255 where not labelled, or None.
        threshold: of the probability, if the model has one output.
        classes: number of classes.

    Returns:
        None if there are no images, or this CPU would take minutes for them.
    """
    if not is_fast():
        return None
    quick, pixels, changed = InBf16(model), 0, 0
    # Both are measured against the labels: classes that change where neither is right cost nothing.
    in_fp32, in_bf16 = (Confusion(np.zeros((classes, classes), np.int64)) for _ in range(2))
    for image_CHW, truth_HW in images:
        x_1CHW = torch.from_numpy(image_CHW)[None].contiguous(memory_format=torch.channels_last)
        exact_HW, quick_HW = (_classes(net(x_1CHW)[0].float(), threshold) for net in (model, quick))
        pixels, changed = pixels + exact_HW.size, changed + int((exact_HW != quick_HW).sum())
        if truth_HW is not None:
            in_fp32 += Confusion.from_arrays(truth_HW, exact_HW, classes)
            in_bf16 += Confusion.from_arrays(truth_HW, quick_HW, classes)
    if not pixels:
        return None
    # Without labels only the changed pixels are known.
    lost = in_fp32.mean_iou_of_reference - in_bf16.mean_iou_of_reference if in_fp32.pixels else 0.0
    return Bf16(changed=round(changed / pixels, 6), lost=round(float(lost), 6))


def _classes(logits_KHW: Tensor, threshold: float) -> NDArray[Any]:
    if len(logits_KHW) == 1:
        return (logits_KHW[0].sigmoid() > threshold).numpy().astype(np.uint8)
    return logits_KHW.argmax(0).numpy().astype(np.uint8)
