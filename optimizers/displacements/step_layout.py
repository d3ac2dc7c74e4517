"""Where the layers are of all that an optimizer steps, whoever's it is; found anew where that has changed."""

from __future__ import annotations

from typing import Any

import torch

from ..sharding.backends import whole_step
from ..sharding.layout import Layout, LayoutError
from ..sharding.local_tensors import cut_of
from ..sharding.names import observed
from ..sharding.resolve import resolve_layout
from ..stepping.taking_part import taking_part

__all__ = ["StepLayout"]


class StepLayout:
    """The layout of an optimizer's whole step, also where a wrapper makes several calls of one.

    Args:
        optimizer: The innermost one.
        model: Names the layers of an optimizer that is not ours.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None):
        self._optimizer = optimizer
        self._model = model
        self._seen: frozenset[int] = frozenset()
        self._observed: Any = None
        self._cuts: dict[int, Any] = {}
        self._in_parts = False
        self.layout: Layout | None = None

    def current(self) -> tuple[Layout, bool]:
        """The layout, and whether it is new; that is a collective, so on all ranks alike.

        Raises:
            LayoutError: If no backend explains the tensors, or ranks step layers of their own.
        """
        if self.layout is not None and self._holds():
            return self.layout, False
        self.layout = self._resolve()
        return self.layout, True

    def of_call(self) -> list[int]:
        """Indices of the local tensors that `step()` is called with now, stand-ins for none among them."""
        assert self.layout is not None
        here = {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}
        return [i for i, tensor in enumerate(self.layout.tensors) if id(tensor) in here or id(tensor) not in self._cuts]

    def asked(self) -> Any:
        """The optimizer in the words in which backends are asked: itself if it is ours."""
        if callable(getattr(self._optimizer, "was_given", None)):
            return self._optimizer
        tensors = frozenset(id(tensor) for group in self._optimizer.param_groups for tensor in group["params"])
        if self._observed is None or not tensors <= self._seen:
            self._observed = observed(self._optimizer, self._model)
            self._seen = tensors
        return self._observed

    def _taking_part(self) -> list[tuple[int, torch.Tensor]]:
        return list(zip(*taking_part(self._optimizer.param_groups, self.asked().was_given), strict=True))

    def _holds(self) -> bool:
        tensors = [tensor for _, tensor in self._taking_part()]
        complete = self._in_parts or len(tensors) == len(self._cuts)
        return complete and all(self._cuts.get(id(tensor)) == cut_of(tensor) for tensor in tensors)

    def _resolve(self) -> Layout:
        whole = whole_step(self.asked())
        pairs = self._taking_part() if whole is None else whole
        layout = resolve_layout(self.asked(), pairs)
        if layout.others is not None:
            raise LayoutError(
                f"{layout.backend} has each rank step layers of its own, and the others would not see where it has "
                "moved them: use DDP without it, DeepSpeed ZeRO or FSDP"
            )
        self._in_parts, self._cuts = whole is not None, {id(tensor): cut_of(tensor) for _, tensor in pairs}
        self._seen |= frozenset(self._cuts)
        return layout
