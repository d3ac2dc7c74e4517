"""What a load leaves as it is: in how many bits this run keeps its numbers, whatever those of the file have."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.chunk_view import COMPENSATION
from ..options.common import STATE_DTYPES, STORAGE_OPTIONS
from ..sharding.local_tensors import is_flattened
from .state import element_dtype, keeps_compensation

__all__ = ["Conversions", "in_one_dtype", "kept_as_here"]

LEFT_BEHIND = (
    'the rest of bf16 weights that the file has of master="kahan" is left behind, as nothing here keeps one: weights '
    "go on as the bf16 numbers that are loaded"
)


def kept_as_here(algorithm: Algorithm, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict` with the optimizer's own `STORAGE_OPTIONS`, and its options that are newer than the file."""
    if not algorithm.keeps_own_state:
        return state_dict
    groups = [
        {
            **{name: current[name] for name in algorithm.newer_options},
            **saved,
            **{name: current[name] for name in STORAGE_OPTIONS if name in current},
        }
        for saved, current in zip(state_dict["param_groups"], algorithm.param_groups, strict=False)
    ]
    others = state_dict["param_groups"][len(groups) :]  # too many, which torch refuses
    return {**state_dict, "param_groups": [*groups, *others]}


def in_one_dtype(algorithm: Algorithm, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict` with each compensation of a parameter that FSDP1 has flattened as wide as its other state.

    FSDP1 gathers state of one dtype alone. No bit is lost, and loading makes bf16 of it again.
    """
    if not algorithm.keeps_own_state:
        return state_dict
    state = dict(state_dict["state"])
    parameters = [(group, parameter) for group in algorithm.param_groups for parameter in group["params"]]
    for index, (group, parameter) in enumerate(parameters):
        if COMPENSATION in state.get(index, {}) and is_flattened(parameter) and algorithm.element_state:
            wide = state[index][COMPENSATION].to(element_dtype(parameter, algorithm.element_state[0], group))
            state[index] = {**state[index], COMPENSATION: wide}
    return {**state_dict, "state": state}


class Conversions:
    """What was kept with another number of bits in the file, for one warning.

    Args:
        algorithm: Which loads it.
    """

    def __init__(self, algorithm: Algorithm):
        self._algorithm = algorithm
        self._found: dict[tuple[torch.dtype, torch.dtype], set[str]] = {}
        self._left_behind = False
        self._seeds: set[tuple[int, int]] = set()

    def note(self, name: str, old: torch.dtype | None, new: torch.dtype | None) -> None:
        """Note which dtype a state has in the file, and which one here; None where it is no tensor."""
        if old is None or new is None or old == new or name == COMPENSATION:
            return
        if torch.bfloat16 in (old, new):
            self._found.setdefault((old, new), set()).add(name)

    def note_left_behind(self) -> None:
        """Note that what the file has of `COMPENSATION` is not kept."""
        self._left_behind = True

    def note_groups(self, state_dict: dict[str, Any]) -> None:
        """Note what options tell: torch.distributed.checkpoint reads into tensors like those that are there."""
        pairs = zip(self._algorithm.param_groups, state_dict["param_groups"], strict=False)
        for group, saved in pairs if self._algorithm.keeps_own_state and state_dict["state"] else ():
            for name in self._algorithm.element_state:
                self.note(name, _state_dtype(saved), _state_dtype(group))
            if _by_chance(saved) and _by_chance(group) and saved.get("rounding_seed", 0) != group["rounding_seed"]:
                self._seeds.add((saved.get("rounding_seed", 0), group["rounding_seed"]))
            has_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in group["params"])
            self._left_behind |= has_bf16 and saved.get("master") == "kahan" != group["master"]

    def leaves_behind(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> bool:
        """Whether a parameter's loaded state has a compensation that is not kept here."""
        is_ours = self._algorithm.keeps_own_state and COMPENSATION in state
        left = is_ours and not keeps_compensation(parameter, group)
        self._left_behind |= left
        return left

    def warn(self, stacklevel: int) -> None:
        """Warn once of all that was noted."""
        sentences = [
            f"the loaded state {', '.join(sorted(names))} is {_name(old)} in the file and kept in {_name(new)} here, "
            f"{'rounded to nearest, ' if new == torch.bfloat16 else ''}as state_dtype says"
            for (old, new), names in sorted(self._found.items(), key=str)
        ] + ([LEFT_BEHIND] if self._left_behind else [])
        sentences += [
            f"rounding_seed is {theirs} in the file and stays {ours} here: what is rounded by chance goes other ways "
            "than in the run that was saved"
            for theirs, ours in sorted(self._seeds)
        ]
        if sentences:
            warnings.warn("; ".join(sentences), stacklevel=stacklevel + 1)


def _state_dtype(group: Mapping[str, Any]) -> torch.dtype:
    given = group.get("state_dtype")
    return given if isinstance(given, torch.dtype) else STATE_DTYPES.get(given or "", torch.float32)


def _by_chance(group: Mapping[str, Any]) -> bool:
    return group.get("master") is not None or _state_dtype(group) == torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
