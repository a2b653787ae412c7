"""Fit the head of a corrected segmenter to clicks, and to pixels of the map itself that are to stay as they are.

The loss is the cross-entropy of the clicks, plus the cross-entropy of the map's pixels with the probabilities that the
segmenter gives them, plus an L2 penalty. Without clicks its minimum is a head of zeros: the map as it is. Clicks are
where the map is wrong, so they are not a sample of it: the weight of the map's pixels grows with the number of clicks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from rayseg.config import Config
from rayseg.models.correction import ANCHORS, AXES, Corrected, gaussian

Floats = NDArray[np.float32]
_ITERATIONS = 100
_GROWTH = 0.75  # of the map's weight: few clicks must not change it, and many must be able to
_TRIES, _STRONGER = 7, 4.0  # of fits, each with so much more weight on the map
_CLICKS_FOR_ALL = 4000.0  # clicks that may change a whole class
_LEAST_SHARE = 0.01  # of the map, below which a class's change is measured against this share
_LEAD = 2.0  # logit by which the memory lets a clicked class lead
_RECALLS = (0.25, 0.12, 0.06, 0.03)  # distances that the memory of a click may reach
_RIDGE = 0.05  # of the memory: clicks of different classes at almost one place
_SPREAD = 4.0  # length of a typical vector of standardised features


class CorrectionConfig(Config):
    """How clicks change a map; the defaults are chosen by cross-validation (docs/benchmarks.md)."""

    kept: float = 15.0
    """Weight of the map's own pixels as a number of clicks: kept x n^(3/4) for n clicks."""
    balance: float = 0.5
    """A class of the map counts by its share of the pixels to 1 minus this power; 1 balances all classes."""
    change: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of a class, of pixels that the model is sure of, that clicks may change; each click adds 1 / 4000."""
    sure: float = 8.0
    """Exponent of the probability by which a pixel of the map counts: high ones leave pixels that are not sure free."""
    penalty: float = 3.0
    """L2 penalty on the weights of standardised features."""
    reach: Annotated[float, Field(gt=0)] | None = 1.0
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
    # 2. distances to the clicks in the principal axes of the map's features
    axes_DF = _axes(own_NF)
    places_ND, around_MD = clicked_NF @ axes_DF.T, own_NF @ axes_DF.T
    anchors_PD = places_ND[farthest(places_ND, ANCHORS)]
    near_N, near_M = (
        gaussian(torch.cdist(places, anchors_PD).amin(dim=1), settings.reach or math.inf)
        for places in (places_ND, around_MD)
    )
    # 3. the head, whose standardisation becomes part of its weights, and the memory
    middle = _middle(threshold)
    most = settings.change + float(clicks.weights_N.sum()) / _CLICKS_FOR_ALL
    problem = _Problem(clicked_NF, own_NF, near_M, clicks, kept, middle)
    weight_KF, bias_K = _head(problem, settings, most)
    given_NK, own_MK = (torch.from_numpy(known.logits_NK) for known in (clicks, kept))
    headed_NK = given_NK + (clicked_NF @ weight_KF.T + bias_K) * near_N[:, None]
    headed_MK = own_MK + (own_NF @ weight_KF.T + bias_K) * near_M[:, None]

    def allowed(new_MK: Tensor) -> bool:
        return _changed(_of_classes(own_MK, middle), _of_classes(new_MK, middle), settings.sure) <= most

    lacking_NK = _lacking(headed_NK, torch.from_numpy(clicks.classes_N), middle)
    memory_RD, recalled_RK, recall = _memory(places_ND, lacking_NK, around_MD, headed_MK, allowed)
    # 4. all together
    classes, features = weight_KF.shape
    model = Corrected(base, classes=classes, features=features, anchors=len(anchors_PD), memory=len(memory_RD))
    scale_F, mean_F = torch.from_numpy(scale_F.astype(np.float32)), torch.from_numpy(mean_F)
    model.weight_KF.copy_(weight_KF * scale_F)
    model.bias_K.copy_(bias_K - (weight_KF * scale_F) @ mean_F)
    model.axes_DF.copy_(axes_DF * scale_F)
    model.origin_D.copy_((axes_DF * scale_F) @ mean_F)
    model.anchors_PD.copy_(anchors_PD)
    model.reach.fill_(settings.reach or 0.0)
    model.memory_MD.copy_(memory_RD)
    model.recalled_MK.copy_(recalled_RK)
    model.recall_reach.fill_(recall)
    moved_NK = headed_NK + model.recall(places_ND)
    right = [_right(logits, clicks.classes_N, middle) for logits in (given_NK, moved_NK)]
    return model.eval(), (right[0], right[1])


def _memory(
    places_ND: Tensor, lacking_NK: Tensor, around_MD: Tensor, headed_MK: Tensor, allowed: Callable[[Tensor], bool]
) -> tuple[Tensor, Tensor, float]:
    """(places, what is added there, reach) of the clicks that the head does not follow, as wide as it may be.

    Args:
        places_ND: of the clicks.
        lacking_NK: what their logits lack.
        around_MD: places of the map's pixels.
        headed_MK: their logits with the head.
        allowed: whether these may become the logits of the map's pixels.
    """
    wrong_N = torch.nonzero(lacking_NK.abs().amax(dim=1) > 0)[:, 0]
    at_R = wrong_N[farthest(places_ND[wrong_N], ANCHORS)]
    memory_RD, apart_MR = places_ND[at_R], torch.cdist(around_MD, places_ND[at_R])
    for recall in _RECALLS:
        kernel_RR = gaussian(torch.cdist(memory_RD, memory_RD), recall)
        recalled_RK = torch.linalg.solve(kernel_RR + _RIDGE * torch.eye(len(at_R)), lacking_NK[at_R])
        if allowed(headed_MK + gaussian(apart_MR, recall) @ recalled_RK):
            break
    return memory_RD, recalled_RK, recall


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


@dataclass(frozen=True)
class _Problem:
    """What a head is fitted to: standardised features, nearness of the map's pixels, logits and classes."""

    clicked_NF: Tensor
    own_MF: Tensor
    near_M: Tensor
    clicks: Known
    kept: Known
    middle: float


def _head(problem: _Problem, settings: CorrectionConfig, most: float) -> tuple[Tensor, Tensor]:
    """Weights (K, F) and bias (K) that follow the clicks and change no class more than so many clicks may.

    Where features cannot tell wrong pixels from right ones, the map's pixels get more and more weight.
    """
    count = float(problem.clicks.weights_N.sum())
    own_MK = _of_classes(torch.from_numpy(problem.kept.logits_NK), problem.middle)
    for attempt in range(_TRIES):
        weight, bias = _fitted(problem, settings, settings.kept * _STRONGER**attempt * count**_GROWTH)
        moved_MK = (problem.own_MF @ weight.T + bias) * problem.near_M[:, None]
        if _changed(own_MK, own_MK + _of_classes(moved_MK, 0.0), settings.sure) <= most:
            return weight, bias
    return torch.zeros_like(weight), torch.zeros_like(bias)


def _changed(own_MK: Tensor, new_MK: Tensor, sure: float) -> float:
    """The largest share of a class that leaves or joins it, each pixel weighted by how sure the map is."""
    weights_M = own_MK.softmax(dim=1).amax(dim=1) ** sure
    before_M, after_M = own_MK.argmax(dim=1), new_MK.argmax(dim=1)
    shares = []
    for value in range(own_MK.shape[1]):
        mine_M = before_M == value
        flow_M = (before_M != after_M) & (mine_M | (after_M == value))
        # A class that the map hardly has may grow.
        least = _LEAST_SHARE * float(weights_M.sum())
        shares.append(float(weights_M[flow_M].sum()) / max(float(weights_M[mine_M].sum()), least, 1e-9))
    return max(shares)


def _fitted(problem: _Problem, settings: CorrectionConfig, kept: float) -> tuple[Tensor, Tensor]:
    """Weights (K, F) and bias (K) of the smallest loss, by L-BFGS; `kept` is the weight of all of the map's pixels."""
    clicks = problem.clicks
    given_NK, own_MK = (
        _of_classes(torch.from_numpy(known.logits_NK), problem.middle) for known in (clicks, problem.kept)
    )
    targets_MK, classes_N = own_MK.softmax(dim=1), torch.from_numpy(clicks.classes_N)
    weights_N = torch.from_numpy(clicks.weights_N)
    # Pixels of which the segmenter is unsure are free to change; rare classes count more than by their pixels.
    sure_M, predicted_M = targets_MK.amax(dim=1) ** settings.sure, own_MK.argmax(dim=1)
    shares_K = torch.bincount(predicted_M, minlength=own_MK.shape[1]).clamp(min=1) / len(predicted_M)
    sure_M *= shares_K[predicted_M] ** -settings.balance
    sure_M *= kept / sure_M.sum()
    outputs = clicks.logits_NK.shape[1]
    weight = torch.zeros(outputs, problem.own_MF.shape[1], requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        moved_NK, moved_MK = (_of_classes(part @ weight.T + bias, 0.0) for part in (problem.clicked_NF, problem.own_MF))
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
