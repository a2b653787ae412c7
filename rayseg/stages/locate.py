"""Networks applied to chips: class activation maps and unsupervised objects."""

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch

from rayseg.models import bundle, unsupervised
from rayseg.models.bundle import Bundle
from rayseg.models.cam import gradcam_plusplus
from rayseg.models.cpu import threads
from rayseg.stages.rows import ChipRow
from rayseg.vision import superpixels


@dataclass
class Cam:
    """`image -> cam, certainty`: Grad-CAM++ of a class, (size, size) float32 0..1, and the class's softmax score.

    Args:
        prefix: of the classifier's bundle.
        target: position of the class among the classifier's outputs.
        layer: the encoder stage the map is taken at; -1 is the last.
        scales: the map is averaged over the image at these scales.
        flip: and over its mirror image.
    """

    prefix: str
    _: KW_ONLY
    target: int
    layer: int = -1
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @cached_property
    def _loaded(self) -> tuple[Bundle, torch.nn.Module]:
        described, model = bundle.build(self.prefix)
        return described, model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Map the batch in one pass."""
        described, model = self._loaded
        # Chips of a step are of one size, so a batch is one array.
        images_NCHW = np.stack([described.normalize(row.image.transpose(2, 0, 1)) for row in rows])
        with threads():
            cams, certainties = gradcam_plusplus(
                model,
                torch.from_numpy(images_NCHW),
                target_class=self.target,
                layer=self.layer,
                scales=self.scales,
                flip=self.flip,
            )
        return [
            replace(row, cam=cam, certainty=float(certainty))
            for row, cam, certainty in zip(rows, cams, certainties, strict=True)
        ]


@dataclass
class Segment:
    """`image -> objects`: labels (size, size) uint8 of an unsupervised segmentation of each chip alone.

    Args:
        network: a name in `unsupervised.RECIPES`.
        iterations: training steps.
        min_labels: training ends when fewer remain.
        precision: float32, or bfloat16 where the machine computes it fast.
        seed: of the network's initial weights.
    """

    network: str
    _: KW_ONLY
    iterations: int
    min_labels: int
    precision: unsupervised.Precision
    seed: int

    def __call__(self, rows: list[ChipRow]) -> list[ChipRow]:
        """Segment each chip; on a CPU with one thread, so that the objects do not depend on the number of threads."""
        votes = unsupervised.RECIPES[self.network].votes
        segment = partial(
            unsupervised.segment,
            network=self.network,
            iterations=self.iterations,
            min_labels=self.min_labels,
            precision=self.precision,
            seed=self.seed,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        # The order of sums decides the last bits, and these decide votes.
        with threads(most=1):
            divided = [superpixels.felzenszwalb(row.image) if votes else None for row in rows]
            return [replace(row, objects=segment(row.image, part)) for row, part in zip(rows, divided, strict=True)]
