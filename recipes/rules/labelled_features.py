"""Checks of samples that are rows of numbers, with a class each: what is wrong is named with its row and column."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from trustratio.optimizers.sharding.local_tensors import summable

__all__ = ["as_features", "as_labels", "refuse_empty"]

_ROWS = 1 << 14  # that are looked at together


def as_features(features: Any) -> torch.Tensor:
    """Return a table of finite real numbers as a tensor.

    Raises:
        ValueError: If it is something else; names the first row and column that is not finite.
    """
    x = summable(_tensor("features", features))
    if x.dim() != 2 or x.is_complex() or x.shape[1] == 0:
        raise ValueError(f"features must be real numbers of shape (samples, features), got {x.dtype} {tuple(x.shape)}")
    for first, part in zip(range(0, max(1, len(x)), _ROWS), x.split(_ROWS), strict=True):
        if not part.isfinite().all():
            row, column = (~part.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"features must be finite, got {part[row, column].item()} in row {first + row}, column {column}"
            )
    return x


def as_labels(labels: Any, samples: int | None, classes: int | None) -> torch.Tensor:
    """Return the class of each sample as int64 (samples,), zeros if there are no labels.

    Args:
        labels: As given.
        samples: How many there must be; None for any number.
        classes: Number of classes, if that is given.

    Raises:
        ValueError: If they are not whole numbers, of another length, or not from 0 to classes - 1 where that is given.
    """
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"classes must be a whole number of at least 1, or None, got {classes!r}")
    found = torch.zeros(samples or 0, dtype=torch.int64) if labels is None else _tensor("labels", labels)
    if found.dim() != 1 or samples not in (None, len(found)):
        expected = "samples" if samples is None else samples
        raise ValueError(f"labels must have one number per sample, shape ({expected},), got {tuple(found.shape)}")
    whole = found.to(torch.int64)
    wrong = (whole != found).nonzero() if not found.is_complex() else found.new_zeros(1, 1, dtype=torch.int64)
    if len(wrong):
        row = int(wrong[0, 0])
        raise ValueError(f"labels must be whole numbers, got {found[row].item()!r} in row {row}")
    if classes is not None and not ((whole >= 0) & (whole < classes)).all():
        row = int(((whole < 0) | (whole >= classes)).nonzero()[0])
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {int(whole[row])} in row {row}")
    return whole


def refuse_empty(present: Collection[int], classes: int | None) -> None:
    """Raise ValueError if a class from 0 to classes - 1 is not among those that have samples."""
    if classes is not None:
        empty = [k for k in range(classes) if k not in present]
        if empty:
            raise ValueError(f"every class from 0 to {classes - 1} must have a sample, got none of {empty[:5]}")


def _tensor(name: str, given: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor or numbers in rows, got {type(given).__name__}: {error}") from error
