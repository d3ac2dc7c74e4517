"""Whether a `state_dict()` belongs to an optimizer, told before anything of it is loaded.

torch compares the number of groups and of parameters, and loads the rest as it comes: the options and the state of
another algorithm, or of layers in another order, would show at the next step or never. What others put beside it (slow
weights of a wrapper, keys of a scheduler) is theirs, and passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.chunk_view import COMPENSATION
from ..options.common import COMMON_DEFAULTS, options_of
from ..options.unknown import chooses_elsewhere, options_of_others
from ..sharding.layout import listing
from ..sharding.local_tensors import local_part, placements_of
from .count import whole_steps

__all__ = ["refuse_foreign_state", "stray_state", "without_wrappers"]

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def without_wrappers(name: str) -> str:
    """The parameter's name in the model as it was before DDP, FSDP1, torch.compile or activation checkpointing."""
    kept = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return kept.removeprefix("module.")


def refuse_foreign_state(optimizer: Algorithm, state_dict: dict[str, Any]) -> None:
    """Compare options, names, and the names and shapes of the state with the optimizer's own.

    Args:
        optimizer: What should load it.
        state_dict: What `state_dict()` has returned, of as many groups and parameters; others are torch's to refuse.

    Raises:
        ValueError: Listing the differences.
    """
    saved, current = [dict(group) for group in state_dict["param_groups"]], optimizer.param_groups
    for group in saved:
        optimizer.modernize(group)
    state_dict = {**state_dict, "param_groups": saved}
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in current]:
        return
    problems = [*_foreign_options(optimizer, saved)] or [*_other_names(current, saved)]
    problems = problems or [*stray_state(state_dict), *_foreign_state(optimizer, state_dict)]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more differences"] if len(problems) > 8 else [])
        raise ValueError(
            f"the state_dict does not belong to this {type(optimizer).__name__}:\n  "
            + "\n  ".join(shown)
            + "\nLoad the state of the same optimizer class, made for the same model with its parameters in the same "
            "groups and order. In trustratio.integrations.checkpoints, convert_state converts other optimizers' state "
            "where it means the same, and save_optimizer_state goes between wrappers. Nothing was loaded"
        )


def stray_state(state_dict: dict[str, Any]) -> Iterator[str]:
    """State under a number that no parameter has, as text after JSON: torch would keep it, and nobody step with it.

    What wrappers keep beside it has names.
    """
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    stray = [repr(key) for key in state_dict["state"] if key not in known and str(key).isdecimal()]
    if stray:
        yield f"its state is of {listing(stray)}, which are not among the parameters of its groups"


def _foreign_options(optimizer: Algorithm, saved: list[dict[str, Any]]) -> Iterator[str]:
    """Options that the file lacks, and those that it has of another optimizer; schedulers add keys of their own."""
    of_others = options_of_others(optimizer.defaults)
    own = {name for base in type(optimizer).__mro__ if issubclass(base, Algorithm) for name in options_of(base)}
    for index, (group, current) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        # Wrappers add keys of their own to the defaults.
        lacking = [key for key in optimizer.defaults if key in own and key not in group and key not in COMMON_DEFAULTS]
        unknown = [key for key in group if key not in current]
        foreign = [key for key in unknown if key in of_others or chooses_elsewhere(key, group[key])]
        if lacking:
            yield f"group {index} lacks the options {', '.join(lacking)}"
        if foreign:
            yield f"group {index} has options of another optimizer: {', '.join(foreign)}"


def _other_names(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> Iterator[str]:
    """Parameters that bear other names in the file, where both know names."""
    for index, (saved_group, group) in enumerate(zip(saved, current, strict=True)):
        pairs = zip(saved_group.get("param_names") or (), group.get("param_names") or (), strict=False)
        for position, (theirs, ours) in enumerate(pairs):
            if without_wrappers(theirs) != without_wrappers(ours):
                yield f"parameter {position} of group {index} is {theirs} in the state_dict and {ours} here"


def _foreign_state(optimizer: Algorithm, state_dict: dict[str, Any]) -> Iterator[str]:
    """State that is missing or of other shapes, given the options of the file; a parameter may have none yet."""
    for group, current in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        # Wrappers that step one group at a time keep what its own options ask for, and no more.
        element_state, layer_state = _names_of_state(optimizer, group)
        wanted = {*layer_state, *element_state}
        names = dict(enumerate(current.get("param_names") or ()))
        for position, (key, parameter) in enumerate(zip(group["params"], current["params"], strict=True)):
            state = state_dict["state"].get(key) or {}
            name = names.get(position, f"number {position}")
            missing = wanted - state.keys() - state.get("layers", {}).keys()
            if missing == wanted:
                continue
            if missing:
                yield f"parameter {name} lacks the state {', '.join(sorted(missing))}"
                continue
            of_elements = (*element_state, *({COMPENSATION} & state.keys() if optimizer.keeps_own_state else ()))
            problems = [*_misshapen(layer_state, of_elements, state, parameter, name)] or [*_miscounted(state, name)]
            yield from problems
            if not problems and _is_warm_before_the_first_step(state, element_state):
                yield (
                    f"parameter {name} has step 0 and {' and '.join(element_state)} that are not zero (if steps are to "
                    "be counted anew, set them after loading)"
                )


def _misshapen(
    layer_state: Sequence[str], element_state: Sequence[str], state: dict[str, Any], parameter: torch.Tensor, name: str
) -> Iterator[str]:
    """State that is no tensor of the parameter's shape, here and on the other ranks, or no number."""
    for what in element_state:
        value = state[what]
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            yield f"{what} of parameter {name} has shape {found} instead of {tuple(parameter.shape)}"
        elif placements_of(value) != placements_of(parameter):  # on all ranks; of one rank's part, the next plan tells
            cuts = " and ".join(f"{tuple(local_part(t).shape)} {placements_of(t) or ''}" for t in (value, parameter))
            yield f"{what} of parameter {name} is cut otherwise than the parameter: {cuts} on this rank"
    for what in layer_state:
        value = state.get(what, 0.0)
        if what not in state.get("layers", {}) and (
            not _is_number(value) or torch.as_tensor(value, device="cpu").numel() != 1
        ):
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
            yield f"{what} of parameter {name} has shape {found} instead of ()"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.Tensor)


def _miscounted(state: dict[str, Any], name: str) -> Iterator[str]:
    """A `step` that counts nothing: the next bias correction would make NaN of the weights, or be another one."""
    for step in _steps(state).flatten().tolist():
        try:
            whole_steps(step)
        except ValueError as error:
            yield f"parameter {name}: {error}"


def _steps(state: dict[str, Any]) -> torch.Tensor:
    """How often each layer of a tensor was updated; nothing if the state does not tell."""
    steps = state.get("layers", {}).get("step", state.get("step"))
    return torch.as_tensor(() if steps is None else steps, device="cpu")


def _is_warm_before_the_first_step(state: dict[str, Any], element_state: Sequence[str]) -> bool:
    """Whether no layer of the tensor was updated, by `step`, but there are moments; their correction would explode."""
    steps = _steps(state)
    if not steps.numel() or steps.any():
        return False
    return any(bool(local_part(state[what]).any()) for what in element_state)


def _names_of_state(optimizer: Algorithm, saved: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the state that the optimizer keeps for a group with the options of the file: per element, layer."""
    current, optimizer.param_groups = optimizer.param_groups, [saved]
    try:
        return optimizer.element_state, optimizer.layer_state
    finally:
        optimizer.param_groups = current
