"""The metrics of GLUE and SQuAD v1.1, in plain numpy. All are between 0 and 1, correlations between -1 and 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]


def accuracy(predictions: Values, labels: Values) -> float:
    """Return the share of right predictions."""
    return float(np.mean(predictions == labels))


def f1(predictions: Values, labels: Values) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 if neither predicted nor present."""
    hits = float(np.sum((predictions == 1) & (labels == 1)))
    total = float(np.sum(predictions == 1) + np.sum(labels == 1))
    return 2 * hits / total if total else 0.0


def matthews(predictions: Values, labels: Values) -> float:
    """Return Matthews' correlation of two binary vectors; 0 if one of them is constant."""
    return pearson(predictions.astype(float), labels.astype(float))


def pearson(predictions: Values, labels: Values) -> float:
    """Return Pearson's correlation; 0 if one of the vectors is constant."""
    x, y = predictions - np.mean(predictions), labels - np.mean(labels)
    size = float(np.sqrt(np.sum(x * x) * np.sum(y * y)))
    return float(np.sum(x * y)) / size if size else 0.0


def spearman(predictions: Values, labels: Values) -> float:
    """Return Spearman's rank correlation; ties share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: Values) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


# SQuAD ---------------------------------------------------------------------------------------------------------------


def normalized_answer(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation, articles and surplus spaces."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(prediction: str, truth: str) -> float:
    """Return 1 if the normalized answers are equal, else 0."""
    return float(normalized_answer(prediction) == normalized_answer(truth))


def token_f1(prediction: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of the normalized answers' words."""
    answered, wanted = normalized_answer(prediction).split(), normalized_answer(truth).split()
    common = sum((Counter(answered) & Counter(wanted)).values())
    return 2 * common / (len(answered) + len(wanted)) if common else 0.0


def squad_scores(predictions: Mapping[str, str], truths: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return `exact_match` and `f1`: means over the questions of the best value over each question's answers.

    Args:
        predictions: answer by question id; a missing one counts as "".
        truths: the answers that count as right, by question id.

    Source: the definitions of Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.
    """
    scores = {"exact_match": exact_match, "f1": token_f1}
    return {
        name: float(np.mean([max(score(predictions.get(key, ""), t) for t in texts) for key, texts in truths.items()]))
        for name, score in scores.items()
    }
