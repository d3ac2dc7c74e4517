"""Somebody's optimizer as the base of ours: made, checked and stepped, and what it would have made of the weights."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..options.common import STORAGE_OPTIONS
from ..options.unknown import nearest
from ..sharding.layout import Layout, LayoutError
from ..sharding.local_tensors import local_part, placements_of
from .instances import copied, make_base, options_of_base

__all__ = [
    "attributes_of",
    "check_base_class",
    "check_options",
    "dtensors_named",
    "known_at_first",
    "make_alone",
    "params_may_come_first",
    "propose",
    "refuse_hooks",
    "refuse_unknown_options",
]

ANY_RATE = 1e-3
PIECE = 1 << 22
"""Elements that are exchanged at once."""
WEAK = weakref.ref, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet, WeakIdKeyDictionary


def check_base_class(base_class: Any) -> None:
    """Raise TypeError unless it is an optimizer class of torch's kind that has a learning rate."""
    if isinstance(base_class, torch.optim.Optimizer):
        name = type(base_class).__name__
        raise TypeError(f"base_class must be a class, got an object of {name}: TrustRatio({name}, params, lr, ...)")
    if not (isinstance(base_class, type) and issubclass(base_class, torch.optim.Optimizer)):
        raise TypeError(f"base_class must be an optimizer class such as torch.optim.AdamW, got {base_class!r:.80}")
    if isinstance(getattr(base_class, "param_groups", None), property):
        raise TypeError(
            f"base_class must step by itself, and {base_class.__name__} wraps another: give that one's class"
        )
    names, takes_others = options_of_base(base_class)
    if "lr" not in names and not takes_others:
        raise TypeError(f"base_class must have the option lr, against which its step is measured; {_has(base_class)}")


def params_may_come_first(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor of (base_class, params, ...) take params first and base_class by name.

    So does whoever makes optimizers as ``optimizer_class(params, **options)``, such as the Trainer.
    """

    @functools.wraps(init)
    def either_way(self: Any, *args: Any, **options: Any) -> None:
        if "base_class" in options:
            init(self, options.pop("base_class"), *args, **options)
        elif len(args) + ("params" in options) < 2:
            name = type(self).__name__
            raise TypeError(
                f"{name} needs a base_class and params: {name}(torch.optim.AdamW, params, lr=...), or "
                f"{name}(params, lr=..., base_class=torch.optim.AdamW)"
            )
        else:
            init(self, *args, **options)

    return either_way


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
            keeps = f"{base_class.__name__} keeps state and weights" if name in STORAGE_OPTIONS else None
            raise TypeError(
                f"TrustRatio({base_class.__name__}) got an unexpected keyword argument {name!r}; "
                f"{keeps or nearest(name, allowed)}"
            )


def make_alone(
    base_class: type[torch.optim.Optimizer],
    tensor: torch.Tensor,
    lr: Any,
    options: Mapping[str, Any],
    keys: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An instance with one tensor.

    Args:
        base_class: The class.
        tensor: What it steps.
        lr: See `make_base`.
        options: Of the constructor.
        keys: What its group has besides; None if the constructor is given tensors, not groups.
    """
    return make_base(base_class, [tensor] if keys is None else [{"params": [tensor], **keys}], lr, options)


def check_options(
    base_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    accepted: Mapping[str, Any],
    keys: Mapping[str, Any] | None = None,
) -> None:
    """Have the class check options, as its constructor does: raise what it raises.

    Nothing is raised if it does not take a single parameter with the accepted options either: then the error may have
    other reasons.

    Args:
        base_class: The class.
        options: Without lr, which schedulers set to 0 where constructors may not like it.
        accepted: Those that the class was made with.
        keys: See `make_alone`.
    """
    try:
        _make_any(base_class, options, keys)
    except Exception:  # whatever it may raise
        if _is_made(base_class, accepted, keys):
            raise


def _make_any(
    base_class: type[torch.optim.Optimizer], options: Mapping[str, Any], keys: Mapping[str, Any] | None
) -> None:
    any_parameter = torch.nn.Parameter(torch.zeros(2, 2, device="cpu"))
    on_any_device = {"fused": None} if options.get("fused") else {}
    options, keys = copied({**options, **on_any_device}), None if keys is None else copied(keys)
    with redirect_stdout(StringIO()):  # some greet whoever makes them
        make_alone(base_class, any_parameter, ANY_RATE, options, keys)


def _is_made(
    base_class: type[torch.optim.Optimizer], options: Mapping[str, Any], keys: Mapping[str, Any] | None
) -> bool:
    try:
        _make_any(base_class, options, keys)
    except Exception:
        return False
    return True


def attributes_of(base: torch.optim.Optimizer) -> dict[str, Any]:
    """What a base has besides what torch's own copies of an optimizer have.

    Not what stands in the place of a method, as torch.compile and schedulers put it there: it is bound to this object.

    Raises:
        TypeError: If an attribute cannot be copied, or would tell other parameters in a copy.
    """
    of_every = vars(torch.optim.Optimizer([torch.zeros(1, device="cpu")], {}))
    own = {
        name: value
        for name, value in vars(base).items()
        if name not in of_every and not callable(getattr(torch.optim.Optimizer, name, None))
    }
    known = {id(parameter) for group in base.param_groups for parameter in group["params"]}
    for name, value in own.items():
        problem = _why_not_copied(value, known)
        if problem:
            raise TypeError(
                f"{type(base).__name__} cannot be copied or pickled, for its attribute {name} {problem}: make a new "
                "TrustRatio and load the state_dict() of this one"
            )
    return own


def _why_not_copied(value: Any, known: Collection[int]) -> str:
    parts = [*_parts(value, set())]
    if any(isinstance(part, WEAK) or (isinstance(part, int | str) and _number(part) in known) for part in parts):
        return "knows parameters by their id() or by weak references"
    try:
        if not isinstance(value, torch.Tensor):
            copy.copy(value)
    except Exception as error:  # whatever it may raise
        return f"cannot be: {error}"
    return ""


def _number(part: int | str) -> int | None:
    """A number, also as text, as some make keys of id()."""
    return part if isinstance(part, int) else int(part) if part.isdecimal() else None


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield a value, and what is in it if it is a collection of Python's or an object with attributes."""
    yield value
    if id(value) in seen or isinstance(value, torch.Tensor | type | torch.optim.Optimizer):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        value = (*value, *value.values())
    inner = value if isinstance(value, list | tuple | set | frozenset) else getattr(value, "__dict__", {}).values()
    for part in [*inner]:
        yield from _parts(part, seen)


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


@contextmanager
def dtensors_named(name: str, layout: Layout) -> Iterator[None]:
    """Raise LayoutError where a base fails since it is stepped with DTensors; its other errors stay what they are.

    Args:
        name: The base class's.
        layout: Of the step.
    """
    try:
        yield
    except Exception as error:  # torch says RuntimeError where DTensors meet plain tensors
        is_of_dtensors = isinstance(error, NotImplementedError) or "DTensor" in str(error)
        if not is_of_dtensors or all(placements_of(tensor) is None for tensor in layout.tensors):
            raise
        raise LayoutError(
            f"{name} cannot step DTensors, which {layout.backend} has in the weights' place "
            f"({type(error).__name__}: {error}): take DeepSpeed ZeRO or DistributedDataParallel, which have plain "
            "tensors, or a base of plain tensor operations, such as those of torch.optim"
        ) from error


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.numel() <= PIECE:
        return [tensor]
    rows = max(1, PIECE * len(tensor) // tensor.numel())
    pieces: Sequence[torch.Tensor] = tensor.split(rows)
    return pieces
