"""What is linearly readable from features: the simplest judge of an encoder."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def logistic_probe(train_x: np.ndarray, train_labels: np.ndarray, val_x: np.ndarray) -> np.ndarray:
    """Class probabilities (M, C) of `val_x` (M, D) by logistic regression on the standardised `train_x` (N, D)."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return regression.fit(train_x, train_labels).predict_proba(val_x)
