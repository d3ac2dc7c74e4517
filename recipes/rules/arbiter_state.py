"""Whether an Arbiter can go on from a state, looked at before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..common.errors import shown

_DAMAGED = "it is damaged, so load another one"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_state(state: Any, own: Mapping[str, Any], shapes: Sequence[torch.Size]) -> None:
    """Check that a state is one of an Arbiter like this.

    Args:
        state: to load.
        own: that of the Arbiter it is loaded into.
        shapes: of what its Adam trains.

    Raises:
        ValueError: an Arbiter with other arguments, another agent or number of logits, or a damaged state.
    """
    _require_keys("the state", state, own)
    _require_keys("its arguments", state["arguments"], own["arguments"])
    for name, value in own["arguments"].items():
        if state["arguments"][name] != value:
            raise ValueError(
                f"the state is of an Arbiter with {name}={shown(state['arguments'][name])}, and this one has "
                f"{shown(value)}: make it with the arguments of the one that was saved"
            )
    _check_agent(state["agent"], own["agent"])
    _require_shape("direction", state["direction"], own["direction"].shape)
    _check_adam("adam", state["adam"], shapes)
    _check_samples(state, own)
    _check_generator(state["generator"])


def _require_keys(what: str, values: Any, names: Mapping[str, Any] | Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping, got {type(values).__name__}: {_DAMAGED}")
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{what} has no {', '.join(missing)}: it is damaged, or not an Arbiter's")


def _check_agent(saved: Any, own: Mapping[str, Any]) -> None:
    _require_keys("the state's agent", saved, own)
    if unknown := [name for name in saved if name not in own]:
        raise ValueError(f"the state is of another agent, with {', '.join(map(str, unknown))}: give the one it is of")
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and _shape(saved[name]) != value.shape:
            raise ValueError(
                f"the state is of another agent: {name} is {_described(saved[name])}, and {_described(value)} here"
            )


def _check_adam(name: str, saved: Any, shapes: Sequence[torch.Size]) -> None:
    _require_keys(f"the state's {name}", saved, ("state",))
    _require_keys(f"the moments of the state's {name}", saved["state"], ())
    for number, values in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(shapes):
            raise ValueError(f"the state's {name} has a parameter {number!r} of {len(shapes)}: {_DAMAGED}")
        _require_keys(f"the state's {name}", values, ("step", *_MOMENTS))
        for moment in _MOMENTS:
            _require_shape(f"{name}'s {moment}", values[moment], shapes[number])
        _require_shape(f"{name}'s step", values["step"], torch.Size([]))


def _check_samples(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    alpha, logits, learned = state["alpha"], state["logits"], state["learned"]
    if not isinstance(learned, bool):
        raise ValueError(f"the state's learned must be True or False, got {shown(learned)}: {_DAMAGED}")
    if learned and logits is None:
        raise ValueError(f"the state has learned something, and has no logits: {_DAMAGED}")
    if alpha is None:
        if logits is not None:
            raise ValueError(f"the state has logits, and no alpha: {_DAMAGED}")
        return
    samples = _shape(alpha)
    if samples is None or len(samples) != 1 or not samples[0]:
        raise ValueError(f"the state's alpha must be a vector, got {_described(alpha)}: {_DAMAGED}")
    if own["alpha"] is not None and samples != own["alpha"].shape:
        raise ValueError(f"the state has {samples[0]} samples, and the agent here made {len(own['alpha'])}")
    _require_shape("alpha", alpha, samples)
    if logits is not None:
        _require_shape("logits", logits, samples)
    _check_adam("alpha_adam", state["alpha_adam"], [samples])


def _check_generator(saved: Any) -> None:
    try:
        torch.Generator("cpu").set_state(saved.cpu())
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"the state's generator is none of a CPU: {_DAMAGED}") from error


def _require_shape(name: str, values: Any, shape: torch.Size) -> None:
    if _shape(values) != shape:
        raise ValueError(
            f"the state's {name} must be a tensor of shape {tuple(shape)}, got {_described(values)}: {_DAMAGED}"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the state's {name} is not finite: {_DAMAGED}")


def _shape(values: Any) -> torch.Size | None:
    return values.shape if isinstance(values, torch.Tensor) else None


def _described(values: Any) -> str:
    return f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else shown(values)
