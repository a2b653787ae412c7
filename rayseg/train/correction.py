"""Fit the head of a corrected segmenter to clicks, and to pixels of the map itself that are to stay as they are.

The loss is the cross-entropy of the clicks, plus the cross-entropy of the map's pixels with the probabilities that the
segmenter gives them, plus an L2 penalty. Without clicks its minimum is a head of zeros: the map as it is. Clicks are
where the map is wrong, so they are not a sample of it: the weight of the map's pixels grows with the number of clicks.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from rayseg.config import Config
from rayseg.models.correction import ANCHORS, AXES, RECALL, Corrected, gaussian

Floats = NDArray[np.float32]
_ITERATIONS = 100
_GROWTH = 0.75  # of the map's weight: few clicks must not change it, and many must be able to
_LEAD = 2.0  # logit by which the memory lets a clicked class lead
_RIDGE = 0.05  # of the memory: clicks of different classes at almost one place
_SPREAD = 4.0  # length of a typical vector of standardised features


class CorrectionConfig(Config):
    """How clicks change a map; the defaults are chosen by cross-validation (docs/benchmarks.md)."""

    kept: float = 15.0
    """Weight of the map's own pixels as a number of clicks: kept x n^(3/4) for n clicks."""
    sure: float = 8.0
    """Exponent of the probability by which a pixel of the map counts: high ones leave pixels that are not sure free."""
    penalty: float = 3.0
    """L2 penalty on the weights of standardised features."""
    reach: float | None = 1.0
    """Distance of features, relative to a typical one, at which a click has lost two fifths of its effect; null has no
    limit."""


@dataclass(frozen=True)
class Known:
    """Pixels with their features.

    Attributes:
        features_NF: of the pixels.
        logits_NK: what the segmenter gives them; K is 1 for a class against the rest.
        classes_N: values of their classes; of pixels of the map not used.
        weights_N: how much each counts.
    """

    features_NF: Floats
    logits_NK: Floats
    classes_N: NDArray[np.int64]
    weights_N: Floats


def fit_correction(
    base: nn.Module, clicks: Known, kept: Known, settings: CorrectionConfig, threshold: float
) -> tuple[Corrected, tuple[float, float]]:
    """A segmenter with a head that moves the classes of clicks and of what resembles them; and how many clicks it hits.

    Args:
        base: the segmenter.
        clicks: clicked pixels.
        kept: pixels of the map, of all of its parts; their weights are not used.
        settings: see there.
        threshold: probability above which a pixel of a binary map is of the class.

    Returns:
        (model, shares of the clicks whose class is right (before, after)).
    """
    # 1. standardised features of the same length everywhere
    mean_F, std_F = kept.features_NF.mean(axis=0), kept.features_NF.std(axis=0)
    scale_F = _SPREAD / np.sqrt(len(mean_F)) / np.where(std_F > 0, std_F, np.inf)
    clicked_NF, own_NF = (
        torch.from_numpy(((known.features_NF - mean_F) * scale_F).astype(np.float32)) for known in (clicks, kept)
    )
    # 2. the head, whose standardisation becomes part of its weights
    weight_KF, bias_K = _head(clicked_NF, own_NF, clicks, kept, settings, threshold)
    # 3. distances to the clicks in the principal axes of the map's features
    axes_DF = _axes(own_NF)
    places_ND = clicked_NF @ axes_DF.T
    anchors_PD = places_ND[farthest(places_ND, ANCHORS)]
    near_N = gaussian(torch.cdist(places_ND, anchors_PD).amin(dim=1), settings.reach or math.inf)
    # 4. a memory of the clicks that the head does not follow
    given_NK = torch.from_numpy(clicks.logits_NK)
    headed_NK = given_NK + (clicked_NF @ weight_KF.T + bias_K) * near_N[:, None]
    lacking_NK = _lacking(headed_NK, torch.from_numpy(clicks.classes_N), _middle(threshold))
    wrong_N = torch.nonzero(lacking_NK.abs().amax(dim=1) > 0)[:, 0]
    kept_M = wrong_N[farthest(places_ND[wrong_N], ANCHORS)]
    memory_MD = places_ND[kept_M]
    kernel_MM = gaussian(torch.cdist(memory_MD, memory_MD), RECALL)
    recalled_MK = torch.linalg.solve(kernel_MM + _RIDGE * torch.eye(len(kept_M)), lacking_NK[kept_M])
    # 5. all together
    classes, features = weight_KF.shape
    model = Corrected(base, classes=classes, features=features, anchors=len(anchors_PD), memory=len(kept_M))
    scale_F, mean_F = torch.from_numpy(scale_F.astype(np.float32)), torch.from_numpy(mean_F)
    model.weight_KF.copy_(weight_KF * scale_F)
    model.bias_K.copy_(bias_K - (weight_KF * scale_F) @ mean_F)
    model.axes_DF.copy_(axes_DF * scale_F)
    model.origin_D.copy_((axes_DF * scale_F) @ mean_F)
    model.anchors_PD.copy_(anchors_PD)
    model.reach.fill_(settings.reach or 0.0)
    model.memory_MD.copy_(memory_MD)
    model.recalled_MK.copy_(recalled_MK)
    moved_NK = headed_NK + model.recall(places_ND)
    right = [_right(logits, clicks.classes_N, _middle(threshold)) for logits in (given_NK, moved_NK)]
    return model.eval(), (right[0], right[1])


def _lacking(logits_NK: Tensor, classes_N: Tensor, middle: float) -> Tensor:
    """What has to be added to the logits so that each class leads by `_LEAD`; 0 where it does."""
    all_NK = _of_classes(logits_NK, middle)
    own_N1 = all_NK.gather(1, classes_N[:, None])
    other_N1 = all_NK.scatter(1, classes_N[:, None], -math.inf).amax(dim=1, keepdim=True)
    short_N1 = (other_N1 + _LEAD - own_N1).clamp(min=0)
    if logits_NK.shape[1] == 1:
        return torch.where(classes_N[:, None] == 1, short_N1, -short_N1)
    return torch.zeros_like(all_NK).scatter(1, classes_N[:, None], short_N1)


def _right(logits_NK: Tensor, classes_N: NDArray[np.int64], middle: float) -> float:
    """Share of the pixels whose class leads."""
    return float((_of_classes(logits_NK, middle).argmax(dim=1).numpy() == classes_N).mean())


def _head(
    clicked_NF: Tensor, own_MF: Tensor, clicks: Known, kept: Known, settings: CorrectionConfig, threshold: float
) -> tuple[Tensor, Tensor]:
    """Weights (K, F) and bias (K) of the smallest loss, by L-BFGS."""
    middle = _middle(threshold)
    given_NK, own_MK = (_of_classes(torch.from_numpy(known.logits_NK), middle) for known in (clicks, kept))
    targets_MK, classes_N = own_MK.softmax(dim=1), torch.from_numpy(clicks.classes_N)
    weights_N = torch.from_numpy(clicks.weights_N)
    # Pixels of which the segmenter is unsure are free to change.
    sure_M = targets_MK.amax(dim=1) ** settings.sure
    sure_M *= settings.kept * float(weights_N.sum()) ** _GROWTH / sure_M.sum()
    outputs = clicks.logits_NK.shape[1]
    weight = torch.zeros(outputs, clicked_NF.shape[1], requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        moved_NK, moved_MK = (_of_classes(part @ weight.T + bias, 0.0) for part in (clicked_NF, own_MF))
        errors_N = cross_entropy(given_NK + moved_NK, classes_N, reduction="none")
        drifts_M = cross_entropy(own_MK + moved_MK, targets_MK, reduction="none")
        total = weights_N @ errors_N + sure_M @ drifts_M
        total = total + settings.penalty / 2 * (weight.square().sum() + bias.square().sum() / 10)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _of_classes(logits_NK: Tensor, middle: float) -> Tensor:
    """Logits of all classes; of one against the rest, those of the rest are 0, and equal at the threshold."""
    return logits_NK if logits_NK.shape[1] > 1 else pad(logits_NK - middle, (1, 0))


def _middle(threshold: float) -> float:
    return float(np.log(threshold / (1 - threshold))) if 0 < threshold < 1 else 0.0


def _axes(own_MF: Tensor) -> Tensor:
    """(AXES, F) principal axes, scaled so that a typical pair is 1 apart; rows of 0 beyond the number of features."""
    _, _, principal_FD = torch.linalg.svd(own_MF, full_matrices=False)
    axes_DF = principal_FD[:AXES]
    places_MD = own_MF[:2000] @ axes_DF.T
    typical = torch.nn.functional.pdist(places_MD).median().clamp(min=1e-6)
    return pad(axes_DF / typical, (0, 0, 0, AXES - len(axes_DF)))


def farthest(places_ND: Tensor, most: int) -> Tensor:
    """Positions of at most `most` of the places, each the farthest from those before it (Gonzalez 1985)."""
    chosen, away_N = [0][: len(places_ND)], torch.full((len(places_ND),), math.inf)
    while len(chosen) < min(most, len(places_ND)):
        away_N = torch.minimum(away_N, (places_ND - places_ND[chosen[-1]]).square().sum(dim=1))
        if not away_N.max():
            break
        chosen.append(int(away_N.argmax()))
    return torch.tensor(chosen, dtype=torch.int64)
