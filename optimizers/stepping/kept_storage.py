"""What a load leaves as it is: in how many bits this run keeps its numbers, whatever those of the file have."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..options.common import STORAGE_OPTIONS

__all__ = ["Conversions", "kept_as_here"]


def kept_as_here(algorithm: Algorithm, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict` with the optimizer's own values of `STORAGE_OPTIONS` in its groups."""
    if not algorithm.keeps_own_state:
        return state_dict
    groups = [
        {**saved, **{name: current[name] for name in STORAGE_OPTIONS if name in current}}
        for saved, current in zip(state_dict["param_groups"], algorithm.param_groups, strict=False)
    ]
    others = state_dict["param_groups"][len(groups) :]  # too many, which torch refuses
    return {**state_dict, "param_groups": [*groups, *others]}


class Conversions:
    """Which state had another number of bits in the file, for one warning."""

    def __init__(self) -> None:
        self._found: set[tuple[str, torch.dtype, torch.dtype]] = set()

    def note(self, name: str, value: Any, kept: Any) -> None:
        if not (isinstance(value, torch.Tensor) and isinstance(kept, torch.Tensor)):
            return
        if torch.bfloat16 in (value.dtype, kept.dtype) and value.dtype != kept.dtype:
            self._found.add((name, value.dtype, kept.dtype))

    def warn(self) -> None:
        if self._found:
            names = ", ".join(sorted({name for name, _, _ in self._found}))
            dtypes = sorted({f"{_name(old)} in the file is kept in {_name(new)}" for _, old, new in self._found})
            warnings.warn(
                f"the loaded state {names}, {' and '.join(dtypes)} here, rounded to nearest, as state_dtype says",
                stacklevel=6,
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
