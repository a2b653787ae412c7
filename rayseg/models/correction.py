"""A trained segmenter whose classes clicks have corrected: a light head on its frozen features, near to clicks alone.

    image --> segmenter --> logits ------------------------------------------------+--> logits
    image --> encoder's maps, colour, logits --> linear head x nearness, memory ---+

The memory holds the clicks that the head does not follow, each for features that are very much like its own. Features
that resemble no click have the nearness 0, and their logits are the segmenter's own, bit for bit.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from rayseg.models.pixel_head import STRIDE, PixelHead, around, resized
from rayseg.models.segmenter import Enlarged, Ensemble, Reduced

ANCHORS = 256
"""Most clicks that the nearness is measured to; of more, those that are farthest apart."""
AXES = 24
"""Principal axes of the features in which distances are measured."""
_LOWEST = -8.0  # log probability: what is even less likely makes no difference
_FAINT = 0.05  # below this a Gaussian counts as 0


class Corrected(nn.Module):
    """Images_NCHW (float32, normalised) to logits_NKHW of their size.

    Attributes:
        base: the segmenter.
        weight_KF, bias_K: the head: what is added to the logits of a feature with nearness 1.
        axes_DF, origin_D: principal axes of the features, scaled so that a typical distance is 1.
        anchors_PD: clicks in these axes.
        reach: distance at which the nearness has fallen to exp(-1/2); 0 if the head holds everywhere.
        memory_MD, recalled_MK: clicks in these axes, and what is added to the logits at each.
        recall_reach: distance at which that has fallen to exp(-1/2).
    """

    weight_KF: Tensor
    bias_K: Tensor
    axes_DF: Tensor
    origin_D: Tensor
    anchors_PD: Tensor
    reach: Tensor
    memory_MD: Tensor
    recalled_MK: Tensor
    recall_reach: Tensor

    def __init__(self, base: nn.Module, *, classes: int, features: int, anchors: int, memory: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.register_buffer("weight_KF", torch.zeros(classes, features))
        self.register_buffer("bias_K", torch.zeros(classes))
        self.register_buffer("axes_DF", torch.zeros(AXES, features))
        self.register_buffer("origin_D", torch.zeros(AXES))
        self.register_buffer("anchors_PD", torch.zeros(anchors, AXES))
        self.register_buffer("reach", torch.ones(()))
        self.register_buffer("memory_MD", torch.zeros(memory, AXES))
        self.register_buffer("recalled_MK", torch.zeros(memory, classes))
        self.register_buffer("recall_reach", torch.ones(()))

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of features and clicks, as `build_corrected` takes them."""
        return {"features": self.weight_KF.shape[1], "anchors": len(self.anchors_PD), "memory": len(self.memory_MD)}

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW."""
        logits = self.base(images_NCHW)
        maps = feature_maps(self.base, images_NCHW, logits)
        # Products of all features with rows of weights, (N, U, height / 4, width / 4). A linear map and an
        # interpolation can change places; the map first needs far less memory.
        size = [side // STRIDE for side in images_NCHW.shape[2:]]
        parts = torch.split(torch.cat([self.weight_KF, self.axes_DF]), [part.shape[1] for part in maps], dim=1)
        units = [resized(conv2d(part, weight[..., None, None]), size) for part, weight in zip(maps, parts, strict=True)]
        moved = self.moved(torch.stack(units).sum(dim=0))
        corrected: Tensor = logits + interpolate(moved, size=images_NCHW.shape[2:], mode="bilinear")
        return corrected

    def moved(self, units_NUhw: Tensor) -> Tensor:
        """What is added to the logits (N, K, h, w), from the products of the features with head and axes."""
        count, (height, width) = len(self.weight_KF), units_NUhw.shape[2:]
        moved = []
        for units_PU in units_NUhw.flatten(2).mT:
            head_PK, places_PD = units_PU[:, :count] + self.bias_K, units_PU[:, count:] - self.origin_D
            moved.append(head_PK * self.nearness(places_PD)[:, None] + self.recall(places_PD))
        return torch.stack(moved).mT.reshape(len(moved), count, height, width)

    def nearness(self, places_PD: Tensor) -> Tensor:
        """0..1 of each place: a Gaussian of its distance to the nearest click, and 0 where that is faint."""
        if not self.reach:
            return places_PD.new_ones(len(places_PD))
        return gaussian(torch.cdist(places_PD, self.anchors_PD).amin(dim=1), self.reach)

    def recall(self, places_PD: Tensor) -> Tensor:
        """What the memory adds to the logits at each place (P, K)."""
        return gaussian(torch.cdist(places_PD, self.memory_MD), self.recall_reach) @ self.recalled_MK


def gaussian(distances: Tensor, reach: float | Tensor) -> Tensor:
    """exp(-(d / reach)^2 / 2), moved and scaled to be exactly 0 where it is below `_FAINT`, and 1 at 0."""
    return ((torch.exp(-(distances / reach).square() / 2) - _FAINT) / (1 - _FAINT)).clamp(min=0)


def feature_maps(base: nn.Module, images_NCHW: Tensor, logits_NKHW: Tensor) -> list[Tensor]:
    """Maps whose channels together are the features: the encoder's at strides 2 to 16, colour, log probabilities."""
    color = [] if isinstance(base, PixelHead) else [around(images_NCHW, size) for size in (STRIDE, 16)]
    pooled = avg_pool2d(logits_NKHW.float(), STRIDE)
    known = torch.cat([torch.zeros_like(pooled), pooled], dim=1) if pooled.shape[1] == 1 else pooled
    return [*_encoded(base, images_NCHW), *color, known.log_softmax(dim=1).clamp(min=_LOWEST)]


def features(base: nn.Module, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """All features (N, F, height / 4, width / 4), and the logits (N, K, height / 4, width / 4) of the same squares."""
    logits = base(images_NCHW)
    size = [side // STRIDE for side in images_NCHW.shape[2:]]
    maps = [resized(part, size) for part in feature_maps(base, images_NCHW, logits)]
    return torch.cat(maps, dim=1), avg_pool2d(logits.float(), STRIDE)


def _encoded(net: nn.Module, images_NCHW: Tensor) -> list[Tensor]:
    """Maps of a segmenter's encoder, at strides 2 to 16 of the images that it sees; none of a model without one."""
    if isinstance(net, PixelHead):
        return net.maps(images_NCHW)
    if isinstance(net, Ensemble):
        return _encoded(net.members[0], images_NCHW)
    if isinstance(net, Reduced):
        return _encoded(net.net, avg_pool2d(images_NCHW, net.reduce))
    if isinstance(net, Enlarged):
        return _encoded(net.net, interpolate(images_NCHW, scale_factor=net.enlarge, mode="bilinear"))
    if not hasattr(net, "encoder"):
        return []
    maps: list[Tensor] = net.get_submodule("encoder")(images_NCHW)[1:5]
    return maps


def build_corrected(
    *, of: str, features: int, anchors: int, memory: int, weights: str = "none", **options: str | int | float
) -> Corrected:
    """A segmenter with a head that changes nothing yet.

    Args:
        of: factory of the segmenter, as bundles name it.
        features: number of its features.
        anchors: number of clicks that the nearness is measured to.
        memory: number of clicks in the memory.
        weights: of the segmenter's encoder.
        options: the segmenter's own.
    """
    from rayseg.models.bundle import FACTORIES

    module, factory = FACTORIES[of]
    chosen: dict[str, Any] = dict(options)
    base: nn.Module = getattr(import_module(module), factory)(**chosen, weights=weights)
    return Corrected(base, classes=int(options.get("classes", 1)), features=features, anchors=anchors, memory=memory)
