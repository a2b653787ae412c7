"""Unsupervised segmentation by a small network that is trained on the imagery it segments.

    image --> network --> argmax --> labels --(majority vote in each superpixel)--> targets --> training step, repeat

Networks and their training are recipes by name, and one loop runs them all:
    v1        4 layers, labels voted in superpixels (Cao & Huang 2022, ISPRS 188; after Kanezaki 2018, ICASSP)
    v2        3 layers, no superpixels, a continuity term instead (Kim, Kanezaki & Tanaka 2020, IEEE TIP 29)
    deepnet   6 layers that see 4 x 4 px as one in their middle, for scenes in patches (Chen et al. 2022, IEEE GRSL 19)

The global random state is neither used nor changed: initial weights come from a separate generator.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rayseg.engine.tuning import reused_memory
from rayseg.errors import ConfigError, DataError
from rayseg.models.cpu import BatchNorm, Conv1x1, Conv3x3

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """Architecture and training of a network.

    Attributes:
        build: (bands, classes) -> network with output (N, classes, H, W).
        classes: channels of the output: the largest number of labels, at most 256.
        votes: targets are voted inside superpixels; otherwise they are the network's own argmax.
        optimizer: parameters -> optimizer.
        continuity: weight of the mean absolute difference of the output between neighbouring pixels.
        last_pass: the result is the argmax after the last step, not the last step's targets.
    """

    build: Callable[[int, int], nn.Module]
    classes: int
    votes: bool
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    continuity: float = 0.0
    last_pass: bool = False


def segment(
    image_HWC: NDArray[Any],
    superpixels_HW: NDArray[np.integer] | None = None,
    *,
    network: str | Recipe = "v1",
    iterations: int = 64,
    min_labels: int = 4,
    seed: int = 1943,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
) -> NDArray[np.uint8]:
    """Segment one image; the same image, settings and device give the same labels.

    Args:
        image_HWC: any number of bands in any order; integers are divided by the largest value of their type
            (uint8: x/255), floats are unchanged.
        superpixels_HW: superpixel of every pixel, for the vote; -1 is nodata, without vote, target or label.
        network: a name in `RECIPES`, or a recipe.
        iterations: most training steps, each on the whole image.
        min_labels: training ends after the first step with fewer labels than this.
        seed: of the initial weights.
        device: torch device.
        precision: `bfloat16` runs the network under autocast: for GPUs and for CPUs with AMX or AVX512-BF16 (on others
            it is several times slower); labels differ from `float32`.

    Returns:
        Labels (H, W) uint8, 0..k-1 without gaps, in the order of the network's channels; 0 where no data.

    Raises:
        ConfigError: unknown network or precision, or no iteration.
        DataError: superpixels are missing or do not fit the image, or it is not an (H, W, C) array.
    """
    # 1. check and prepare
    if iterations < 1:
        raise ConfigError(f"{iterations} iterations, expected at least 1; raise them")
    if precision not in {"float32", "bfloat16"}:
        raise ConfigError(f"precision is {precision!r}, expected 'float32' or 'bfloat16'; choose one of them")
    if isinstance(network, str) and network not in RECIPES:
        raise ConfigError(f"network is {network!r}, expected one of {sorted(RECIPES)}; choose one of them")
    recipe = RECIPES[network] if isinstance(network, str) else network
    image = as_input(image_HWC, device)
    segments = _segments(superpixels_HW, image, votes=recipe.votes)
    model = initial(recipe, bands=image.shape[1], seed=seed).to(image.device)
    # 2. train on the image until few labels remain
    with quick_and_reproducible(image.device, precision):
        labels = torch.empty(0)
        for labels, _ in train(model, image, segments, recipe=recipe, iterations=iterations, precision=precision):
            if int(torch.bincount(labels[labels >= 0], minlength=recipe.classes).count_nonzero()) < min_labels:
                break
        if recipe.last_pass:
            with torch.no_grad():
                labels = labels.where(labels < 0, _forward(model, image, precision).argmax(1).flatten())
    # 3. number the labels without gaps
    known = labels >= 0
    labels[known] = torch.unique(labels[known], return_inverse=True)[1]
    labels_HW: NDArray[np.uint8] = labels.clamp(min=0).view(image.shape[2:]).to(torch.uint8).cpu().numpy()
    return labels_HW


def train(
    model: nn.Module,
    image_1CHW: Tensor,
    segments: Tensor | None,
    *,
    recipe: Recipe,
    iterations: int,
    precision: Precision = "float32",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Train on one image, yielding after every step.

    Args:
        model: network of the recipe, on the image's device; trained in place.
        image_1CHW: float32 image.
        segments: superpixel of every pixel (H * W,) int64, 0 or more, -1 for no data; None without a vote.
        recipe: how to train.
        iterations: number of steps.
        precision: of the network's arithmetic.

    Yields:
        The result of `step`.
    """
    optimizer = recipe.optimizer(model.parameters())
    model.train()
    seen = None if segments is None or bool((segments >= 0).all()) else (segments >= 0).nonzero()[:, 0]
    for _ in range(iterations):
        yield step(model, optimizer, image_1CHW, segments, recipe=recipe, precision=precision, seen=seen)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image_1CHW: Tensor,
    segments: Tensor | None,
    *,
    recipe: Recipe,
    precision: Precision = "float32",
    seen: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """One training step on one image, towards its current labels, voted inside its superpixels.

    Args:
        model: network of the recipe, in training mode.
        optimizer: of its weights.
        image_1CHW: float32 image.
        segments: superpixel of every pixel (H * W,) int64, 0 or more; None without a vote.
        recipe: how to train.
        precision: of the network's arithmetic.
        seen: positions of the pixels with data; None for all. Only the continuity term uses the others.
        teacher: network whose labels are voted on instead of the model's own.

    Returns:
        (targets (H * W,) int64, -100 for no data; loss before the step, a scalar).
    """
    optimizer.zero_grad()
    logits_1KHW = _forward(model, image_1CHW, precision)
    # 1. targets: the current labels, voted in superpixels
    labels = (logits_1KHW.detach() if teacher is None else teacher(image_1CHW)).argmax(1).flatten()
    at = slice(None) if seen is None else seen  # an index of all positions would copy them
    voted = vote(labels[at], segments[at], recipe.classes) if recipe.votes and segments is not None else labels[at]
    targets = voted if seen is None else torch.full_like(labels, -100).index_copy_(0, seen, voted)
    # 2. cross-entropy, and the difference between neighbouring pixels (Kim et al. 2020, eq. 4)
    loss = F.cross_entropy(logits_1KHW.permute(0, 2, 3, 1).flatten(0, 2), targets)
    if recipe.continuity:
        steps = logits_1KHW.diff(dim=2).abs().mean() + logits_1KHW.diff(dim=3).abs().mean()
        loss = loss + recipe.continuity * steps
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return targets, loss.detach()


def vote(labels: Tensor, segments: Tensor, classes: int) -> Tensor:
    """The most frequent label of every pixel's segment; the lowest of equally frequent ones.

    Args:
        labels: (pixels,) int64, 0..classes-1.
        segments: (pixels,) int64, 0 or more.
        classes: number of possible labels.

    Returns:
        (pixels,) int64.
    """
    # One histogram over (segment, label): no loop over segments.
    counts = torch.bincount(segments * classes + labels)
    counts = F.pad(counts, (0, -len(counts) % classes)).view(-1, classes)
    # Scaling by the classes and adding a bonus that falls with the label makes the largest count unique:
    # argmax alone guarantees no order among ties.
    bonus = torch.arange(classes - 1, -1, -1, device=counts.device)
    return (counts * classes + bonus).argmax(1)[segments]


def initial(recipe: Recipe, *, bands: int, seed: int) -> nn.Module:
    """A new network of the recipe, channels_last, on the CPU.

    Weights equal PyTorch's defaults after `torch.manual_seed(seed)`; the global generator is not used.
    """
    # Built without memory, as layers fill it from the global generator.
    with torch.device("meta"):
        model = recipe.build(bands, recipe.classes)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            # As in `nn.Conv2d.reset_parameters`, which takes no generator.
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return model.to(memory_format=torch.channels_last)


class Labeller(nn.Module):
    """A network from imagery to logits of groups of labels: a group's softmax is the sum over its labels.

    Args:
        net: the network of a recipe, on imagery averaged over squares.
        groups_K: group of every label; -1 for unused labels.
        reduce: side of the squares in px; probabilities are interpolated bilinearly.
    """

    def __init__(self, net: nn.Module, groups_K: Sequence[int], *, reduce: int = 1) -> None:
        super().__init__()
        self.net, self.reduce = net, reduce
        groups = torch.tensor(groups_K)
        one_hot_KG = F.one_hot(groups.clamp(min=0), int(groups.max()) + 1) * (groups >= 0)[:, None]
        self.register_buffer("members_GK11", one_hot_KG.T.float()[:, :, None, None].contiguous(), persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NGHW; sides of the images are multiples of 4 * reduce."""
        size = images_NCHW.shape[2:]
        members_GK11: Tensor = self.get_buffer("members_GK11")
        # The softmax of all labels adds up within a group; a group's logit is the logarithm of the sum.
        shares_NKHW = self.net(reduced(images_NCHW, self.reduce)).float().softmax(1)
        shares_NGHW = F.conv2d(shares_NKHW, members_GK11)
        if self.reduce > 1:
            shares_NGHW = F.interpolate(shares_NGHW, size=size, mode="bilinear")
        return shares_NGHW.clamp(min=1e-12).log()


def reduced(images_NCHW: Tensor, side: int) -> Tensor:
    """Means over squares of `side` px."""
    return F.avg_pool2d(images_NCHW, side) if side > 1 else images_NCHW


def build_unsupervised(
    network: str,
    *,
    channels: int,
    labels: int,
    classes: int,
    groups: str = "",
    reduce: int = 1,
    weights: str = "none",
) -> nn.Module:
    """A network from images_NCHW (float32, sides multiples of 4 * reduce) to logits_NKHW of that size.

    Args:
        network: a name in `NETWORKS`.
        channels: bands of the images.
        labels: outputs of the network.
        classes: groups of labels, one logit each.
        groups: group of every label, as text: "0,1,0,-1"; "" keeps the labels.
        reduce: side in px of the squares that are averaged to one input pixel of the network.
        weights: unused; the only weights are those of the scene.

    Raises:
        ConfigError: the network is unknown, or the groups do not fit labels and classes.
    """
    if network not in NETWORKS:
        raise ConfigError(f"network is {network!r}, expected one of {sorted(NETWORKS)}; choose one of them")
    net = NETWORKS[network](channels, labels)
    numbers = [int(group) for group in groups.split(",")] if groups else list(range(labels))
    if len(numbers) != labels or max(numbers) + 1 != classes:
        raise ConfigError(f"groups {groups!r} do not assign {labels} labels to {classes} classes; train again")
    return Labeller(net, numbers, reduce=reduce)


def as_input(image_HWC: NDArray[Any], device: str | torch.device = "cpu") -> Tensor:
    """The image as (1, C, H, W) float32, channels_last: integers divided by the largest value of their type.

    Raises:
        DataError: it is empty or not an (H, W, C) array.
    """
    if image_HWC.ndim != 3 or image_HWC.size == 0:
        raise DataError(f"an image of shape {image_HWC.shape} cannot be segmented, expected (height, width, bands)")
    scale = np.iinfo(image_HWC.dtype).max if np.issubdtype(image_HWC.dtype, np.integer) else 1
    image = torch.from_numpy(image_HWC.astype(np.float32) / np.float32(scale))
    return image.permute(2, 0, 1)[None].to(device).contiguous(memory_format=torch.channels_last)


def _forward(model: nn.Module, image_1CHW: Tensor, precision: Precision) -> Tensor:
    with torch.autocast(image_1CHW.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits_1KHW: Tensor = model(image_1CHW)
    return logits_1KHW.float()


def _segments(superpixels_HW: NDArray[np.integer] | None, image_1CHW: Tensor, *, votes: bool) -> Tensor | None:
    """Superpixels as (H * W,) int64 on the image's device; None if the recipe needs none."""
    if superpixels_HW is None and not votes:
        return None
    size = tuple(image_1CHW.shape[2:])
    if superpixels_HW is None or superpixels_HW.shape != size or superpixels_HW.max() < 0:
        given = "none" if superpixels_HW is None else f"{superpixels_HW.shape} up to {superpixels_HW.max()}"
        raise DataError(f"this network votes in superpixels of shape {size} from 0, found {given}; compute them first")
    return torch.from_numpy(superpixels_HW.astype(np.int64).ravel()).to(image_1CHW.device)


def quick_and_reproducible(device: torch.device, precision: Precision) -> ExitStack:
    """Settings for reproducible training, for a `with` block."""
    stack = ExitStack()
    stack.enter_context(reused_memory())
    if device.type == "cuda":
        tf32 = precision == "bfloat16"
        stack.enter_context(torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=tf32))
    return stack


_relu = partial(nn.ReLU, inplace=True)


def _build_v1(bands: int, classes: int) -> nn.Module:
    return nn.Sequential(
        *(Conv3x3(bands, 64), BatchNorm(64), _relu()),
        *(Conv1x1(64, 32), BatchNorm(32), _relu()),
        *(Conv3x3(32, 64), BatchNorm(64), _relu()),
        *(Conv1x1(64, classes), BatchNorm(classes)),
    )


def _build_v2(bands: int, classes: int) -> nn.Module:
    return nn.Sequential(
        *(Conv3x3(bands, classes), _relu(), BatchNorm(classes)),
        *(Conv3x3(classes, classes), _relu(), BatchNorm(classes)),
        *(Conv1x1(classes, classes), BatchNorm(classes)),
    )


def _build_deepnet(bands: int, classes: int) -> nn.Module:
    return nn.Sequential(
        *(Conv3x3(bands, 64), BatchNorm(64), _relu(), nn.MaxPool2d(2)),
        *(Conv3x3(64, 64), BatchNorm(64), _relu(), nn.MaxPool2d(2)),
        *(Conv3x3(64, 64), BatchNorm(64), _relu()),
        *(nn.Upsample(scale_factor=2), Conv3x3(64, 64), BatchNorm(64), _relu()),
        *(nn.Upsample(scale_factor=2), Conv3x3(64, 64), BatchNorm(64), _relu()),
        *(Conv1x1(64, classes), BatchNorm(classes)),
    )


_SGD = partial(torch.optim.SGD, momentum=0.9)
RECIPES = {
    "v1": Recipe(_build_v1, classes=32, votes=True, optimizer=partial(_SGD, lr=0.05)),
    "v2": Recipe(_build_v2, classes=100, votes=False, optimizer=partial(_SGD, lr=0.1), continuity=1.0, last_pass=True),
    "deepnet": Recipe(_build_deepnet, classes=32, votes=True, optimizer=partial(torch.optim.Adam, lr=1e-3)),
}

NETWORKS: Mapping[str, Callable[[int, int], nn.Module]] = {
    **{name: recipe.build for name, recipe in RECIPES.items()},
    "nearest": Conv1x1,  # the nearest of some centres: see `nearest`
}


def nearest(centres_KC: NDArray[np.floating]) -> nn.Module:
    """The network "nearest", whose largest logit is that of the nearest centre: -|x - c|^2 + |x|^2."""
    count, bands = centres_KC.shape
    net = Conv1x1(bands, count)
    centres = torch.from_numpy(np.asarray(centres_KC, np.float32))
    net.load_state_dict({"weight": 2 * centres[:, :, None, None], "bias": -centres.square().sum(1)})
    return net
