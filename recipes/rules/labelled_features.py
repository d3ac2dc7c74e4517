"""Checks of samples that are rows of numbers, with a class each: what is wrong is named with its row and column."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trustratio.optimizers.sharding.local_tensors import is_plain, placements_of, summable

__all__ = ["as_features", "as_labels", "as_whole", "fingerprint", "refuse_empty", "refuse_other_groups"]

_ROWS = 1 << 14  # that are looked at together
_FEW_OPERATIONS = torch.uint16, torch.uint32, torch.uint64  # torch lacks most of them for these, and for fp8
_LARGEST_FLOAT = 2.0**53  # beyond it not every whole number is a float


def as_features(features: Any) -> torch.Tensor:
    """Return a table of finite real numbers as a tensor; what is no tensor is read as numpy reads it, floats in fp64.

    Raises:
        ValueError: If it is something else; names the first row and column that is not finite.
    """
    x = summable(_tensor("features", features))
    if x.dim() != 2 or x.is_complex() or x.shape[1] == 0:
        raise ValueError(f"features must be real numbers of shape (samples, features), got {x.dtype} {tuple(x.shape)}")
    if x.dtype in _FEW_OPERATIONS or (x.is_floating_point() and x.itemsize == 1):
        x = x.to(torch.float64)
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
    if classes is not None:
        as_whole("classes", classes, 1)
    found = torch.zeros(samples or 0, dtype=torch.int64, device="cpu") if labels is None else _tensor("labels", labels)
    if found.dim() != 1 or samples not in (None, len(found)):
        expected = "samples" if samples is None else samples
        raise ValueError(f"labels must have one number per sample, shape ({expected},), got {tuple(found.shape)}")
    whole = _whole_labels(summable(found)).contiguous()
    if classes is not None and not ((whole >= 0) & (whole < classes)).all():
        row = int(((whole < 0) | (whole >= classes)).nonzero()[0])
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {int(whole[row])} in row {row}")
    return whole


def as_whole(name: str, value: Any, least: int) -> int:
    """Return a whole number, of Python, numpy or torch, as an int.

    Raises:
        ValueError: If it is something else, or below the least that is allowed.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def fingerprint(rows: torch.Tensor) -> str:
    """What tells tables or labels from others: the same for the same numbers on any device, and in any float dtype."""
    found = hashlib.blake2b(str(tuple(rows.shape)).encode(), digest_size=16)
    for part in rows.split(_ROWS):
        found.update(part.to(torch.float64).cpu().numpy().tobytes())
    return found.hexdigest()


def refuse_empty(present: Collection[int], classes: int | None) -> None:
    """Raise ValueError if a class from 0 to classes - 1 is not among those that have samples."""
    if classes is not None:
        empty = [k for k in range(classes) if k not in present]
        if empty:
            raise ValueError(f"every class from 0 to {classes - 1} must have a sample, got none of {empty[:5]}")


def refuse_other_groups(group: Any) -> None:
    """Raise ValueError if it is neither None nor a process group that this rank is in."""
    if group is not None and not (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0):
        raise ValueError("group must be a process group that this rank is in")


def _whole_labels(found: torch.Tensor) -> torch.Tensor:
    if found.is_complex():
        raise ValueError(f"labels must be whole numbers, got {found.dtype}")
    if found.is_floating_point():
        found = found.to(torch.float64)
    whole = found.to(torch.int64)
    if found.is_floating_point():
        wrong, too_large = whole != found, found.abs() > _LARGEST_FLOAT
    else:
        wrong, too_large = torch.zeros_like(whole, dtype=torch.bool), (whole < 0) & (found.dtype == torch.uint64)
    for rows, allowed in ((too_large, "below 2**63, as floats up to 2**53"), (wrong, "whole numbers")):
        if rows.any():
            row = int(rows.nonzero()[0])
            raise ValueError(f"labels must be {allowed}, got {found[row].item()!r} in row {row}")
    return whole


def _tensor(name: str, given: Any) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        _refuse_unreadable(name, given)
        return given.detach()
    try:
        if isinstance(given, list | tuple) and any(isinstance(row, torch.Tensor) for row in given):
            return torch.stack(tuple(given)).detach()
        return _from_array(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor or numbers in rows, got {type(given).__name__}: {error}") from error


def _refuse_unreadable(name: str, given: torch.Tensor) -> None:
    kinds = {
        "quantized": given.is_quantized,
        "nested": given.is_nested,
        "meta": given.is_meta,
        "packed": given.dtype == torch.float4_e2m1fn_x2,
        "sharded": not is_plain(given) and placements_of(given) is not None,
        "sparse": given.layout != torch.strided,
    }
    kind = next((kind for kind, is_it in kinds.items() if is_it), None)
    if kind is not None:
        raise ValueError(f"{name} must be a dense tensor that holds its numbers, got a {kind} one ({given.dtype})")


def _from_array(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor, without a copy where torch can share it."""
    if array.dtype == object:  # as pandas makes of columns of several kinds
        array = np.asarray(array.tolist())
    if array.dtype == np.longdouble and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing is written here
        return torch.as_tensor(array, device="cpu")
