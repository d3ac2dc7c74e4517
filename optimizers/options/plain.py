"""Numbers of other kinds as Python's own: what numpy, a configuration or a tensor gives for a number."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any

import torch

__all__ = ["make_plain"]


def make_plain(options: dict[str, Any], names: Iterable[str], floats: Collection[str]) -> None:
    """Replace numbers of other kinds in the options, in place; what is no number stays, to be refused by its check.

    Numbers of numpy, Decimal, Fraction and one-element tensors become Python's, and lists tuples. A learning rate that
    is a tensor stays as it is: torch's schedulers change it in place.

    Args:
        options: Of a group, or the constructor's.
        names: The options' names; other keys are left alone.
        floats: Options whose whole numbers become floats too.
    """
    for name in names:
        value = options.get(name)
        if not (value is None or (name == "lr" and isinstance(value, torch.Tensor))):
            options[name] = _plain(value, name in floats)


def _plain(value: Any, as_float: bool) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        plain = {key: _plain(inner, as_float) for key, inner in value.items()}
        # The same object if it may stay, since its owner may change it.
        return value if all(plain[key] is inner for key, inner in value.items()) else plain
    if getattr(value, "ndim", 0) == 1 and len(value) != 1 and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_plain(inner, as_float) for inner in value)
    try:
        return _plain_number(value, as_float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def _plain_number(value: Any, as_float: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return _plain(value.detach().item(), as_float) if value.numel() == 1 else value
    if isinstance(value, numbers.Integral):
        return float(value) if as_float else int(value)
    if isinstance(value, numbers.Real | Decimal):
        return float(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        inner = value.item()
        return float(inner) if type(inner) is type(value) else _plain(inner, as_float)
    return float(value) if hasattr(value, "__float__") and not getattr(value, "ndim", 0) else value
