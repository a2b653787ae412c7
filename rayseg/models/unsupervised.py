"""Unsupervised segmentation of one image by a small network that is trained on this image alone.

    image --> network --> argmax --> labels --(majority vote in each superpixel)--> targets --> one training step, again

Networks and their training are recipes by name, all run by one loop:
    v1        4 layers, labels voted in superpixels (Cao & Huang 2022, ISPRS 188; after Kanezaki 2018, ICASSP)
    v2        3 layers, no superpixels, a continuity term instead (Kim, Kanezaki & Tanaka 2020, IEEE TIP 29)

Nothing depends on the global random state or changes it: initial weights are drawn from a generator of their own.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rayseg.errors import ConfigError, DataError
from rayseg.models.cpu import BatchNorm, Conv1x1, Conv3x3, reused_memory

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """How one network is built and trained.

    Attributes:
        build: (bands, classes) -> network with output (N, classes, H, W).
        classes: channels of the output: the most labels there can be, at most 256.
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
    """Segment one image; the same image, settings and device always give the same labels.

    Args:
        image_HWC: any number of bands in any order; integers are divided by the largest value of their type
            (uint8: x/255), floats are taken as they are.
        superpixels_HW: superpixel of every pixel, 0 or more; needed by networks that vote.
        network: a name in `RECIPES`, or a recipe.
        iterations: most training steps, one on the whole image each.
        min_labels: training ends after the first step with fewer labels than this.
        seed: of the initial weights.
        device: torch device.
        precision: `bfloat16` runs the network under autocast: for GPUs and for CPUs with AMX or AVX512-BF16 (on others
            it is several times slower); labels differ from `float32`.

    Returns:
        Labels (H, W) uint8, 0..k-1 without gaps, in the order of the network's channels.

    Raises:
        ConfigError: unknown network or precision, or no iteration.
        DataError: superpixels are missing or do not fit the image, or it is no (H, W, C) array.
    """
    recipe = _recipe(network, iterations, precision)
    image = as_input(image_HWC, device)
    segments = _segments(superpixels_HW, image, votes=recipe.votes)
    model = initial(recipe, bands=image.shape[1], seed=seed).to(image.device)
    with _quick_and_reproducible(image.device, precision):
        labels = torch.empty(0)
        for labels, _ in train(model, image, segments, recipe=recipe, iterations=iterations, precision=precision):
            if int(torch.bincount(labels, minlength=recipe.classes).count_nonzero()) < min_labels:
                break
        if recipe.last_pass:
            with torch.no_grad():
                labels = _forward(model, image, precision).argmax(1)
    _, gapless = torch.unique(labels, return_inverse=True)
    labels_HW: NDArray[np.uint8] = gapless.view(image.shape[2:]).to(torch.uint8).cpu().numpy()
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
        segments: superpixel of every pixel (H * W,) int64, 0 or more; None without a vote.
        recipe: how to train.
        iterations: number of steps.
        precision: of the network's arithmetic.

    Yields:
        (targets (H * W,) int64, the labels this step was trained towards; loss before the step, a scalar).
    """
    optimizer = recipe.optimizer(model.parameters())
    model.train()
    for _ in range(iterations):
        optimizer.zero_grad()
        logits_1KHW = _forward(model, image_1CHW, precision)
        labels = logits_1KHW.detach().argmax(1).flatten()
        targets = labels if segments is None else vote(labels, segments, recipe.classes)
        loss = _loss(logits_1KHW, targets, recipe.continuity)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield targets, loss.detach()


def vote(labels: Tensor, segments: Tensor, classes: int) -> Tensor:
    """Give every pixel the most frequent label of its segment; of equally frequent ones the lowest.

    Args:
        labels: (pixels,) int64, 0..classes-1.
        segments: (pixels,) int64, 0 or more.
        classes: number of possible labels.

    Returns:
        (pixels,) int64.
    """
    counts = torch.bincount(segments * classes + labels)
    counts = F.pad(counts, (0, -len(counts) % classes)).view(-1, classes)
    # Scaling by the classes and adding a bonus that falls with the label makes the largest count unique:
    # argmax alone promises no order among ties.
    bonus = torch.arange(classes - 1, -1, -1, device=counts.device)
    return (counts * classes + bonus).argmax(1)[segments]


def initial(recipe: Recipe, *, bands: int, seed: int) -> nn.Module:
    """A fresh network of the recipe, channels_last, on the CPU.

    Weights are what PyTorch's defaults give after `torch.manual_seed(seed)`, without touching the global generator.
    """
    with torch.device("meta"):
        model = recipe.build(bands, recipe.classes)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return model.to(memory_format=torch.channels_last)


def as_input(image_HWC: NDArray[Any], device: str | torch.device = "cpu") -> Tensor:
    """The image as (1, C, H, W) float32, channels_last: integers divided by the largest value of their type.

    Raises:
        DataError: it is no non-empty (H, W, C) array.
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


def _loss(logits_1KHW: Tensor, targets: Tensor, continuity: float) -> Tensor:
    flat = logits_1KHW.permute(0, 2, 3, 1).flatten(0, 2)
    loss = F.cross_entropy(flat, targets)
    if continuity:
        steps = logits_1KHW.diff(dim=2).abs().mean() + logits_1KHW.diff(dim=3).abs().mean()
        loss = loss + continuity * steps
    return loss


def _recipe(network: str | Recipe, iterations: int, precision: str) -> Recipe:
    if iterations < 1:
        raise ConfigError(f"{iterations} iterations were asked for, expected at least 1")
    if precision not in {"float32", "bfloat16"}:
        raise ConfigError(f"precision is {precision!r}, expected 'float32' or 'bfloat16'")
    if isinstance(network, Recipe):
        return network
    if network not in RECIPES:
        raise ConfigError(f"network is {network!r}, expected one of {sorted(RECIPES)}: choose one of them")
    return RECIPES[network]


def _segments(superpixels_HW: NDArray[np.integer] | None, image_1CHW: Tensor, *, votes: bool) -> Tensor | None:
    """Superpixels as (H * W,) int64 on the image's device; None when the network does not vote."""
    if not votes:
        return None
    size = tuple(image_1CHW.shape[2:])
    if superpixels_HW is None or superpixels_HW.shape != size or superpixels_HW.min() < 0:
        found = "none" if superpixels_HW is None else f"{superpixels_HW.shape} from {superpixels_HW.min()}"
        raise DataError(f"this network votes in superpixels of shape {size} from 0, found {found}: make them first")
    return torch.from_numpy(superpixels_HW.astype(np.int64).ravel()).to(image_1CHW.device)


def _quick_and_reproducible(device: torch.device, precision: Precision) -> ExitStack:
    """The settings the loop runs under; they end with the `with` block."""
    stack = ExitStack()
    if device.type == "cpu":
        stack.enter_context(reused_memory())
    elif device.type == "cuda":
        tf32 = precision == "bfloat16"
        stack.enter_context(torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=tf32))
    return stack


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


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


def _sgd(lr: float) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


RECIPES = {
    "v1": Recipe(_build_v1, classes=32, votes=True, optimizer=_sgd(0.05)),
    "v2": Recipe(_build_v2, classes=100, votes=False, optimizer=_sgd(0.1), continuity=1.0, last_pass=True),
}
