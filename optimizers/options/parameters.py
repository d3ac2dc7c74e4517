"""What an optimizer is given to optimize: parameters, named parameters or groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["listed"]

ALLOWED = "params must be parameters, such as model.named_parameters(), or groups of them"


def listed(params: Any) -> list[Any]:
    """What was given as params, as a list, so that it can be gone over twice.

    Raises:
        TypeError: If these are no parameters.
        ValueError: If there are none, or a group has no "params".
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"{ALLOWED}, got the model itself ({type(params).__name__}): write model.named_parameters()")
    if isinstance(params, torch.Tensor):
        raise TypeError(f"{ALLOWED}: an iterable of Tensors or dicts, got one tensor: put it in a list")
    if isinstance(params, Mapping):
        advice = "put it in a list" if "params" in params else "write model.named_parameters()"
        raise TypeError(f"{ALLOWED}, got one dict: {advice}")
    if isinstance(params, str | bytes) or not isinstance(params, Iterable):
        raise TypeError(f"{ALLOWED}, got {params!r}")
    given = list(params)
    if not given:
        raise ValueError(f"{ALLOWED}, got an empty parameter list: a generator can be gone over only once")
    odd = next((one for one in given if not isinstance(one, torch.Tensor | Mapping | tuple)), None)
    if odd is not None:
        raise TypeError(f"{ALLOWED}, got a list with {odd!r:.80} in it: optimizers can only optimize Tensors")
    for index, group in enumerate(given):
        if isinstance(group, Mapping):
            _check_group(index, group)
    return given


def _check_group(index: int, group: Mapping[str, Any]) -> None:
    if "params" not in group:
        keys = ", ".join(map(repr, group)) or "nothing"
        raise ValueError(f'group {index} has no "params", only {keys}: write {{"params": [...], ...}}')
    params = group["params"]
    if isinstance(params, str | bytes | Mapping | torch.nn.Module) or not isinstance(params, Iterable):
        kind = "None" if params is None else f"a {type(params).__name__}"
        raise TypeError(f'the "params" of group {index} must be parameters or pairs of names and them, got {kind}')
