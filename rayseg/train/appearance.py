"""Fit of a class's colour and texture on the pixels of chips that a segmenter is sure of."""

from collections.abc import Iterable
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.mixture import GaussianMixture

from rayseg.config import Config
from rayseg.errors import DataError
from rayseg.models.appearance import FEATURES, Appearance, features
from rayseg.models.bundle import Scaling

_NARROWEST = 1.0  # variance that is added to every feature: camera noise and JPEG, in units of Lab


class AppearanceConfig(Config):
    """A map by colour and texture, learnt from the pixels that the segmenter is sure of."""

    components: Annotated[int, Field(gt=0)] = 10
    """Gaussians for everything but the class."""
    marked: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the negative chips' pixels that the map may mark; lower it where the map marks too much."""
    sure: Annotated[float, Field(ge=0)] = 0.5
    """Distance in log-odds from the threshold beyond which the segmenter is sure of a pixel of a positive chip."""
    pixels: Annotated[int, Field(gt=0)] = 2500
    """Pixels drawn from each chip, at most, for the class and for the rest."""
    seed: int = 0
    """Of this draw and of the mixture's start."""


Known = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""A chip (H, W, 3) and its labels (H, W): 1 = the class, 0 = not, 255 = unknown."""


def fit_appearance(chips: Iterable[Known], settings: AppearanceConfig, *, scaling: Scaling) -> Appearance:
    """The Gaussians of the class and of the rest, by expectation-maximisation.

    Args:
        chips: images and labels; a negative chip's labels are all 0.
        settings: of the fit.
        scaling: of the images that the model will see.

    Raises:
        DataError: no pixel has the label 1, or too few have the label 0.
    """
    # 1. as many pixels of each chip, so that large chips do not outweigh others
    rng = np.random.default_rng(settings.seed)
    drawn: dict[int, list[NDArray[np.float32]]] = {0: [], 1: []}
    for image_HWC, labels_HW in chips:
        pixels = torch.from_numpy(image_HWC.transpose(2, 0, 1).copy()).float()[None]
        seen_NF = features(pixels)[0].permute(1, 2, 0).reshape(-1, FEATURES).numpy()
        for label, samples in drawn.items():
            known = np.flatnonzero(labels_HW.ravel() == label)
            samples.append(seen_NF[rng.choice(known, min(settings.pixels, len(known)), replace=False)])
    of_rest, of_class = (np.concatenate(drawn[label]).astype(np.float64) for label in (0, 1))
    for found, what, least in ((of_class, "the class", 2), (of_rest, "the rest", settings.components)):
        if len(found) < least:
            raise DataError(
                f"{len(found)} sure pixels of {what} in the chips, expected at least {least}; "
                "lower appearance.sure, or add chips that show it"
            )
    # 2. the Gaussians
    parts = [_fitted(of_class, 1, settings.seed), _fitted(of_rest, settings.components, settings.seed)]
    model = Appearance(components=settings.components)
    factors = np.concatenate([part.precisions_cholesky_ for part in parts])
    heights = np.log(np.concatenate([part.weights_ for part in parts]))
    # The determinant of a Cholesky factor is the product of its diagonal.
    heights += np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    values = {
        "mean": (np.array(scaling.mean) - scaling.offset) / scaling.scale,
        "std": np.array(scaling.std) / scaling.scale,
        "centres": np.concatenate([part.means_ for part in parts]),
        "whitening": factors,
        "heights": heights,
    }
    model.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})
    return model.eval()


def _fitted(samples_NF: NDArray[np.float64], components: int, seed: int) -> GaussianMixture:
    mixture = GaussianMixture(components, reg_covar=_NARROWEST, max_iter=50, random_state=seed)
    return mixture.fit(samples_NF)
