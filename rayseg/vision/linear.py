"""A linear classifier of features, for networks that stay as they are."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

Floats = NDArray[np.float64]


def class_probabilities(
    known_NF: NDArray[np.floating], labels_N: NDArray[np.integer], asked_MF: NDArray[np.floating], *, classes: int
) -> Floats:
    """Probabilities of every class by multinomial logistic regression with a plain L2 penalty (C = 1).

    Features are scaled over all of both to mean 0, standard deviation 1 and, as there are many, by 1 / sqrt(F) x 4.

    Args:
        known_NF: features of the labelled.
        labels_N: their classes.
        asked_MF: features of those to be told.
        classes: K; a class without a label has probability 0.

    Returns:
        (M, K) float64.
    """
    everything = np.concatenate([known_NF, asked_MF]).astype(np.float64)
    spread = everything.std(axis=0)
    scaled = (everything - everything.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    scaled *= 4 / np.sqrt(scaled.shape[1])
    found = np.unique(labels_N)
    told = np.zeros((len(asked_MF), classes))
    if len(found) == 1:
        told[:, found[0]] = 1.0
        return told
    model = LogisticRegression(max_iter=1000).fit(scaled[: len(known_NF)], labels_N)
    told[:, model.classes_] = model.predict_proba(scaled[len(known_NF) :])
    return told
