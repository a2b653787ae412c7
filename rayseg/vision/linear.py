"""A linear classifier of features from a frozen network."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

Floats = NDArray[np.float64]


def class_probabilities(
    known_NF: NDArray[np.floating], labels_N: NDArray[np.integer], features_MF: NDArray[np.floating], *, classes: int
) -> Floats:
    """Class probabilities by multinomial logistic regression with an L2 penalty (C = 1).

    Features of both sets together are scaled to mean 0 and standard deviation 4 / sqrt(F), F being their number.

    Args:
        known_NF: features of the labelled samples.
        labels_N: their classes.
        features_MF: features of the samples to classify.
        classes: number of classes K; a class without a label has probability 0.

    Returns:
        (M, K) float64.
    """
    everything = np.concatenate([known_NF, features_MF]).astype(np.float64)
    spread = everything.std(axis=0)
    # A constant feature keeps the value 0 and has no influence.
    scaled = (everything - everything.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    scaled *= 4 / np.sqrt(scaled.shape[1])
    present = np.unique(labels_N)
    probabilities_MK = np.zeros((len(features_MF), classes))
    if len(present) == 1:  # logistic regression needs two classes
        probabilities_MK[:, present[0]] = 1.0
        return probabilities_MK
    model = LogisticRegression(max_iter=1000).fit(scaled[: len(known_NF)], labels_N)
    probabilities_MK[:, model.classes_] = model.predict_proba(scaled[len(known_NF) :])
    return probabilities_MK
