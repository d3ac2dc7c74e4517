"""LAD in plain float64, sample by sample of a table; shares nothing with the package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lad(
    x: NDArray[np.float64], labels: NDArray[np.int64], iterations: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return scores and labels, for tables without equal scores at the border of the highest quarter."""
    samples, features = x.shape
    anomalous = np.zeros(samples, dtype=bool)
    scores = np.zeros(samples)
    for _ in range(iterations):
        of_classes = []
        for k in np.unique(labels):
            members = x[(labels == k) & ~anomalous]
            if len(members) < 3:
                members = x[labels == k]
            shifted = members - members[0]  # so that a constant has no variance, not even one of rounding
            mean = members[0] + shifted.mean(axis=0)
            with np.errstate(divide="ignore"):
                precision = 1 / shifted.var(axis=0)
            precision[~np.isfinite(precision)] = 0.0
            if precision.any():
                of_classes.append(((x - mean) ** 2 * precision / 2 / len(members)).max(axis=1))
        deviations = np.min(of_classes, axis=0)
        spread = deviations.max() - deviations.min()
        if spread <= 1e-12 * deviations.max():  # alike but for rounding
            return np.zeros(samples), np.zeros(samples, dtype=bool)
        scores = (deviations - deviations.min()) / spread
        anomalous = scores >= min(0.95, scores.mean() + 2 * scores.var(ddof=1))
        if anomalous.sum() > min(0.25 * samples, features):
            anomalous = np.zeros(samples, dtype=bool)
            anomalous[np.argsort(-scores)[: int(0.25 * samples)]] = True
    return scores, anomalous


def made_up(samples: int = 211, features: int = 5, classes: int = 3, seed: int = 0) -> tuple[NDArray[np.float64], ...]:
    """Classes of unequal size, heavy tails, a feature that is constant and one that is so but for one sample."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes, size=samples, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    labels[:classes] = np.arange(classes)
    x = random.standard_t(2, size=(samples, features)) * 10.0 ** random.integers(-3, 4, features) + labels[:, None]
    x[:, 0] = 0.1
    x[:, 1] = 0.3
    x[samples // 2, 1] = 5.0
    return x, labels
