"""The step of gpc after the segmenter: a map by the colour and texture of the pixels that the segmenter is sure of."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rayseg.engine.manifest import Row
from rayseg.engine.run import Step
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle
from rayseg.steps import chips, models
from rayseg.steps.cues import NO, YES
from rayseg.train.appearance import AppearanceConfig, Known, fit_appearance
from rayseg.train.labels import UNKNOWN, probabilities

MOST = 500
"""Chips of each label that the map is learnt from, at most."""


def described(network: Bundle, settings: AppearanceConfig) -> Bundle:
    """Metadata of the model that replaces the network `network` in the map."""
    architecture = Architecture(factory="appearance", options={"components": settings.components})
    return network.model_copy(
        update={"name": "segmenter", "architecture": architecture, "threshold": 0.5, "metrics": {}}
    )


def fit_cover(step: Step, listed: Step, network: Step, settings: AppearanceConfig, size: int) -> dict[str, Any]:
    """Learn the class's colour and texture from the training chips; models/segmenter is the bundle."""
    known, net = bundle.build(network.value["bundle"])
    rows = chips.rows_of(listed, held_out=False)
    # Hundreds of chips have millions of pixels: more do not change a mixture of colours.
    few = [row for label in (YES, NO) for row in [row for row in rows if row["label"] == label][:MOST]]
    model = fit_appearance(_labelled(few, known, net, settings, size), settings, scaling=known.scaling)
    mapper = described(known, settings)
    negatives = [row for row in few if row["label"] == NO]
    # Below 0.5 the map would mark pixels that the mixture finds more like the rest.
    threshold = max(0.5, chips.threshold_at(settings.marked, model, negatives, mapper, size=size))
    return {"bundle": models.keep_model(step, mapper.model_copy(update={"threshold": threshold}), model)}


def _labelled(
    rows: list[Row], known: Bundle, net: torch.nn.Module, settings: AppearanceConfig, size: int
) -> Iterator[Known]:
    """Chips and labels: of positive ones the network's where it is sure, of negative ones 0 everywhere."""
    unit = 32 * int(known.architecture.options.get("reduce", 1))
    # Distances are in logits: near 0 and 1 probabilities hardly differ, logits do.
    middle = np.log(known.threshold / (1 - known.threshold))
    for position, row in enumerate(rows):
        image_HWC = chips.read_image(rows, size, position)
        labels_HW = np.zeros((size, size), np.uint8)
        if row["label"] == YES:
            normal = known.scaling.normalize(torch.from_numpy(image_HWC.transpose(2, 0, 1).copy())[None])
            with torch.inference_mode():
                p_HW = probabilities(net, normal, unit=unit, flip=False)[0, 0].double()
            distance_HW = (torch.logit(p_HW, eps=1e-9) - middle).numpy()
            labels_HW[distance_HW > -settings.sure] = UNKNOWN
            labels_HW[distance_HW > settings.sure] = 1
        yield image_HWC, labels_HW
