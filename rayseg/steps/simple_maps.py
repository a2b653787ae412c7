"""The simple baselines of class maps: a linear head on frozen features, and a random forest on colour and texture."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.nn.functional import interpolate, pad

from rayseg.engine.run import Step
from rayseg.geo.grid import NODATA, Tile
from rayseg.io import cog, pictures, rasters, scenes
from rayseg.io.scenes import LabelledImage
from rayseg.metrics import Confusion
from rayseg.models.bundle import Scaling
from rayseg.models.pixel_head import PixelHead
from rayseg.models.pretrained_weights import PACKAGED
from rayseg.stages.compare import images_on, truth_of
from rayseg.steps import baseline
from rayseg.steps import map as mapping
from rayseg.steps.baseline import Method
from rayseg.steps.models import input_scaling
from rayseg.store import put
from rayseg.train.frozen import Pair, fit_forest, fit_linear, sample, untrained
from rayseg.train.learning import NetworkConfig
from rayseg.vision.color import ClassTable
from rayseg.vision.crops import middle
from rayseg.vision.fill import mirrored

Image = NDArray[Any]
Classes = NDArray[np.uint8]
ENCODER = "tf_efficientnet_lite0"
_UNIT = 32  # px; the encoder halves an image five times
SHOWN = 1024
"""Side in px of the place that the report shows by all methods."""


@dataclass
class Simple:
    """A simple method that has learnt.

    Attributes:
        name: with an article.
        predict: image_CHW in the imagery's data type -> classes_HW.
        seconds: of processor time so far.
    """

    name: str
    predict: Callable[[Image], Classes]
    seconds: float


def learnt(
    network: NetworkConfig,
    scaling: Scaling,
    pairs: Iterable[Pair],
    count: int,
    *,
    classes: int,
    rgb8: bool,
    linear: bool = True,
) -> list[Simple]:
    """The linear head and the random forest, learnt from the same pixels.

    Args:
        network: its encoder is used where no package has weights, or the imagery is not 8-bit RGB.
        scaling: of that encoder.
        pairs: windows to learn from.
        count: number of the windows.
        classes: number of classes.
        rgb8: whether the imagery is 8-bit RGB.
        linear: whether to fit the linear head, too.

    Raises:
        DataError: no pixel is labelled.
        ModelError: the weights are missing.
    """
    began, encoder, weights = time.process_time(), network.encoder, network.weights
    if rgb8 and PACKAGED[ENCODER].file:
        encoder, weights, scaling = ENCODER, "packaged", input_scaling(ENCODER)
    net = untrained(encoder, weights, scaling, classes=classes, lab=rgb8)
    samples = sample(net, pairs, count, scaling)
    # Both methods need the samples, so the time for them counts twice.
    sampling = time.process_time() - began
    forest = fit_forest(samples)
    spent = time.process_time() - began
    simple = [Simple("a random forest on colour and texture", _Forest(net, forest, scaling), spent)]
    if linear:
        began = time.process_time() - sampling
        fit_linear(net, samples)
        predict = partial(predicted, net, scaling=scaling)
        head = Simple("a linear head on frozen features", predict, time.process_time() - began)
        simple = [head, *simple]
    return simple


def predicted(net: nn.Module, image_CHW: Image, scaling: Scaling, *, unit: int = _UNIT) -> Classes:
    """Classes_HW of an image of any size by a segmenter of two or more classes, on the CPU.

    Args:
        net: in evaluation mode.
        image_CHW: in the imagery's data type.
        scaling: from stored values to the network's input.
        unit: px of which the network's input sides are multiples.
    """
    height, width = image_CHW.shape[1:]
    with torch.inference_mode():
        logits = net(_input(image_CHW, scaling, unit))[0, :, :height, :width]
    return np.asarray(logits.argmax(dim=0).numpy().astype(np.uint8))


@dataclass
class _Forest:
    net: PixelHead
    forest: RandomForestClassifier
    scaling: Scaling

    def __call__(self, image_CHW: Image) -> Classes:
        height, width = image_CHW.shape[1:]
        with torch.inference_mode():
            colors = self.net.color(_input(image_CHW, self.scaling))[0]
            p_NK = self.forest.predict_proba(colors.flatten(1).T.numpy()).astype(np.float32)
            # The forest decides at a quarter of the resolution: probabilities are interpolated, not classes.
            maps = torch.from_numpy(p_NK.T.reshape(1, -1, *colors.shape[1:]))
            best = interpolate(maps, scale_factor=4, mode="bilinear")[0, :, :height, :width].argmax(dim=0)
        return np.asarray(self.forest.classes_.astype(np.uint8)[best.numpy()])


def _input(image_CHW: Image, scaling: Scaling, unit: int = _UNIT) -> torch.Tensor:
    """The normalised image, repeated at its lower and right edge to whole units of the network."""
    images = torch.from_numpy(scaling.normalize(image_CHW))[None]
    return pad(images, (0, -images.shape[3] % unit, 0, -images.shape[2] % unit), mode="replicate")


def compare(
    simple: Sequence[Simple],
    pairs: Callable[[], Iterable[Pair]],
    table: ClassTable,
    *,
    measure: Callable[[Confusion], float],
) -> list[Method]:
    """Measure each method on images with masks, and its IoU per class.

    Args:
        simple: the methods; their time is added to `seconds`.
        pairs: reads the images and masks again for every method.
        table: the classes.
        measure: of the confusion of all images.
    """
    methods, classes = [], len(table.classes)
    for method in simple:
        total = Confusion(np.zeros((classes, classes), np.int64))
        for image_CHW, classes_HW in pairs():
            began = time.process_time()
            predicted_HW = method.predict(image_CHW)
            method.seconds += time.process_time() - began  # without reading, which all methods share
            total += Confusion.from_arrays(classes_HW, predicted_HW, classes)
        methods.append(Method(method.name, measure(total), method.seconds, baseline.parts_of(total, table.names)))
    return methods


def draw_side_by_side(
    step: Step,
    image_HWC: NDArray[np.uint8],
    maps: Sequence[Classes],
    table: ClassTable,
    *,
    names: Sequence[str],
    place: str,
) -> tuple[str, str, str]:
    """Write an image and maps of the same place side by side as `<step>/baselines.webp`.

    Args:
        step: the current step.
        image_HWC: to show.
        maps: see `panels`.
        table: the classes.
        names: of the image and the maps, from left to right.
        place: what they show, for the caption.

    Returns:
        (title, path below the run, caption).
    """
    put(step.prefix / "baselines.webp", pictures.encoded(panels(image_HWC, maps, table), "webp"))
    return "Next to simple baselines", f"steps/{step.name}/baselines.webp", f"From left: {', '.join(names)}, {place}."


def draw_median_tile(
    step: Step,
    validated: Step,
    simple: Sequence[Simple],
    images: Sequence[LabelledImage],
    table: ClassTable,
    bands: tuple[str, ...],
) -> tuple[str, str, str]:
    """Draw the middle of the validated tile of median accuracy by the model and by the simple methods.

    Args:
        step: the current step.
        validated: the step that wrote `tiles/<id>.tif` and the confusion of each tile.
        simple: the methods.
        images: the labelled images that the tiles show.
        table: the classes.
        bands: that the methods see.

    Returns:
        See `draw_side_by_side`.
    """
    # 1. the best tile and the worst would flatter or blame the model
    compared = [
        (Confusion(np.array(record.facts["confusion"])), Tile.from_row(row))
        for row, record in mapping.rows_with(validated, "confusion")
    ]
    known = sorted(((c.overall_accuracy, tile.id, tile) for c, tile in compared if c.pixels), key=lambda row: row[:2])
    _, _, tile = known[len(known) // 2]
    # 2. its middle, by every method
    window = middle(tile.window, SHOWN).intersect(tile.window)
    sources = [scenes.image_on(image) for image in images_on(images, tile.grid)]
    image_CHW, valid_HW = rasters.read(sources, tile.grid, window, bands=bands)
    [mapped_HW] = cog.read_bands(validated.prefix / "tiles" / f"{tile.id}.tif")
    maps = [
        truth_of(images, replace(tile, window=window), table),
        mapped_HW[window.slices(tile.window)],
        *(np.where(valid_HW, method.predict(mirrored(image_CHW, valid_HW)), NODATA) for method in simple),
    ]
    names = ["imagery", "mask", "this model", *(method.name for method in simple)]
    shown_HWC = pictures.shown(sources, tile.grid, window)
    return draw_side_by_side(step, shown_HWC, maps, table, names=names, place=f"in {tile.id}")


def panels(
    image_HWC: NDArray[np.uint8], maps: Sequence[Classes], table: ClassTable, *, side: int = 420
) -> NDArray[np.uint8]:
    """An image and maps of the same place side by side, (height, width, 3) uint8; unlabelled pixels are grey.

    Args:
        image_HWC: to show.
        maps: classes_HW with 255 where nothing is known.
        table: the classes.
        side: px of a panel at most.
    """
    # Grey where nothing is known.
    colors_K3 = np.full((256, 3), 110, np.uint8)
    colors_K3[list(table.values)] = table.colors
    step = max(1, -(-max(image_HWC.shape[:2]) // side))
    shown = [image_HWC, *(colors_K3[classes_HW] for classes_HW in maps)]
    gap = np.full((-(-image_HWC.shape[0] // step), 6, 3), 255, np.uint8)
    return np.concatenate([part for panel in shown for part in (panel[::step, ::step], gap)][:-1], axis=1)
