"""State that a base makes in a step whose gradients are all zero, before the first that has any.

Some wrappers and torch's distributed checkpoints take such a step to have the state made. A base counts it, and the
bias corrections of all further steps would be those of later ones. So the state stands until a gradient comes, and is
then made anew; what was loaded into it in between stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..sharding.local_tensors import local_part

__all__ = ["MadeOfZeros"]


class MadeOfZeros:
    """Knows the tensors whose state was made so, and what the state was then.

    A wrapper may call for one group after the other. Then a step is one of zeros if all its calls are: what a call has
    made stays if another call of the same step has a gradient.
    """

    def __init__(self) -> None:
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._written: dict[tuple[int, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}  # by call: into groups
        self._calls: tuple[int, list[Sequence[torch.Tensor]]] = 0, []  # of zeros, in the step of this number

    def __getstate__(self) -> dict[str, Any]:
        return {"made": [*self._made.items()]}  # a weak dictionary in a copy would know the original's tensors

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._made = WeakIdKeyDictionary(dict(state["made"]))

    def make(
        self,
        number: int,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[torch.Tensor, Any],
        tensors: Sequence[torch.Tensor],
        step: Callable[[], Any],
    ) -> None:
        """Take such a step if any of the tensors has no state yet; the groups keep what they have.

        Args:
            number: Of the step, of which this may be one call.
            groups: Of the optimizer.
            states: Of the optimizer.
            tensors: Of the call.
            step: Takes it, and leaves the tensors as they are.
        """
        self._calls = number, [*(self._calls[1] if self._calls[0] == number else []), tensors]
        new = [tensor for tensor in tensors if not states[tensor]]
        if len(new) < len(tensors):
            return  # a second step with those that have some would be counted
        options = [dict(group) for group in groups]
        step()
        written = []
        for group, before in zip(groups, options, strict=True):
            after = {name: value for name, value in group.items() if value is not before.get(name)}
            written.append((group, after))
            group.clear()
            group.update(before)
        self._written[_key(tensors)] = written
        self._made.update({tensor: _marks(states[tensor]) for tensor in new})

    def keep(self, number: int) -> None:
        """Keep what was made in other calls of the step of this number, since there is a gradient in it."""
        made_in, calls = self._calls
        self._calls = number, []
        for tensors in calls if made_in == number else []:
            for group, after in self._written.pop(_key(tensors), []):
                group.update(after)
            for tensor in tensors:
                self._made.pop(tensor, None)

    def drop(self, states: Mapping[torch.Tensor, dict[str, Any]], tensors: Sequence[torch.Tensor]) -> None:
        """Give up the state of these tensors that is still what such a step has made."""
        self._written.pop(_key(tensors), None)
        for tensor in tensors if self._made else ():
            if self._made.pop(tensor, None) == _marks(states[tensor]):
                states[tensor].clear()

    def has_made(self, tensor: torch.Tensor, state: Any) -> bool:
        """Whether a tensor's state is still what such a step has made."""
        return tensor in self._made and self._made[tensor] == _marks(state)


def _key(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(id, tensors))


def _marks(state: Any) -> list[Any]:
    """What tells whether anybody has written into a state. Waits for the device."""
    return [*_of_values(state)]


def _of_values(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        elements = local_part(value).detach().float()
        yield elements.shape, elements.sum().item(), elements.norm().item()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _of_values(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _of_values(inner)
    else:
        yield value
