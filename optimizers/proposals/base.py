"""Somebody's optimizer as the base of ours: made, checked and stepped, and what it would have made of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..options.parameters import listed
from ..options.unknown import nearest
from ..sharding.local_tensors import local_part
from .instances import copied, make_base, options_of_base

__all__ = [
    "as_groups",
    "check_base_class",
    "check_options",
    "known_at_first",
    "propose",
    "refuse_hooks",
    "refuse_unknown_options",
]

ANY_RATE = 1e-3
PIECE = 1 << 22
"""Elements that are exchanged at once."""


def check_base_class(base_class: Any) -> None:
    """Raise TypeError unless it is an optimizer class of torch's kind that has a learning rate."""
    if isinstance(base_class, torch.optim.Optimizer):
        name = type(base_class).__name__
        raise TypeError(f"base_class must be a class, got an object of {name}: TrustRatio({name}, params, lr, ...)")
    if not (isinstance(base_class, type) and issubclass(base_class, torch.optim.Optimizer)):
        raise TypeError(f"base_class must be an optimizer class such as torch.optim.AdamW, got {base_class!r}")
    if isinstance(getattr(base_class, "param_groups", None), property):
        raise TypeError(
            f"base_class must step by itself, and {base_class.__name__} wraps another: give that one's class"
        )
    names, takes_others = options_of_base(base_class)
    if "lr" not in names and not takes_others:
        raise TypeError(f"base_class must have the option lr, against which its step is measured; {_has(base_class)}")


def refuse_hooks(base: torch.optim.Optimizer) -> None:
    """Raise TypeError if a base has registered hooks on itself when it was made: nothing would call them."""
    of_base = vars(base).items()
    kinds = [name.removeprefix("_optimizer_") for name, hooks in of_base if name.startswith("_optimizer_") and hooks]
    if kinds:
        raise TypeError(
            f"{type(base).__name__} registers hooks on itself ({', '.join(kinds)}), which nothing would call: "
            "do in its step() what they do, or register them on the TrustRatio"
        )


def _has(base_class: type[torch.optim.Optimizer]) -> str:
    names, _ = options_of_base(base_class)
    return f"{base_class.__name__} has {', '.join(names) or 'no options'}"


def refuse_unknown_options(
    base_class: type[torch.optim.Optimizer], options: Mapping[str, Any], own: Sequence[str]
) -> None:
    """Raise TypeError, as Python does, if the class has not all of these options; the nearest is named."""
    names, takes_others = options_of_base(base_class)
    for name in options:
        if name not in names and not takes_others:
            allowed = [*own, *(known for known in names if known not in own)]
            raise TypeError(
                f"TrustRatio({base_class.__name__}) got an unexpected keyword argument {name!r}; "
                f"{nearest(name, allowed)}"
            )


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Parameters, named parameters or groups as groups, so that they can be gone over twice."""
    given = listed(params)
    if not isinstance(given[0], dict):
        return [{"params": given}]
    return [{**group, "params": _as_list(group["params"])} for group in given]


def _as_list(params: Any) -> Any:
    if isinstance(params, torch.Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)  # torch refuses sets, which have no order


def check_options(base_class: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Have the class check options, as its constructor does: raise what it raises.

    Args:
        base_class: The class.
        options: Without lr, which schedulers set to 0 where constructors may not like it.
    """
    any_parameter = torch.nn.Parameter(torch.zeros(2, 2, device="cpu"))
    device_options = {"fused": None} if options.get("fused") else {}
    make_base(base_class, [any_parameter], ANY_RATE, copied({**options, **device_options}))


def known_at_first(closure: Callable[[], Any], loss: Any, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """A closure that has been evaluated: it returns that loss the first time, and evaluates again after that.

    Also the first time, if somebody has changed the tensors or their gradients by then, as sharpness-aware
    minimization does.
    """
    known = [True]
    before = _marks(tensors)

    def evaluate() -> Any:
        is_known = bool(known) and _marks(tensors) == before
        known.clear()
        return loss if is_known else closure()

    return evaluate


def _marks(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """What tells whether tensors were written, or have other data or gradients; waits for nothing."""
    return [(id(tensor.grad), tensor._version, local_part(tensor).data_ptr()) for tensor in tensors]


def propose(tensors: Iterable[torch.Tensor], step: Callable[[], Any]) -> list[torch.Tensor]:
    """Let a step change the tensors, put them back, and return what it had made of them.

    Takes one copy of the tensors; a piece at a time changes places.
    """
    current = list(tensors)
    other = [tensor.clone() for tensor in current]
    try:
        step()
    except BaseException:
        for tensor, before in zip(current, other, strict=True):
            tensor.copy_(before)
        raise
    for tensor, before in zip(current, other, strict=True):
        for here, there in zip(_pieces(tensor), _pieces(before), strict=True):
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
    return other


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.numel() <= PIECE:
        return [tensor]
    rows = max(1, PIECE * len(tensor) // tensor.numel())
    pieces: Sequence[torch.Tensor] = tensor.split(rows)
    return pieces
