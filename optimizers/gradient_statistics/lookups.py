"""How often each row of an embedding is looked up in the global batch of one optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..sharding.layout import Layer, Layout
from ..sharding.local_tensors import is_plain
from ..sharding.unsharded import has_its_own_parameters
from .averaging import Averaging
from .watched import Watched, call_after_backward, is_added_up

__all__ = ["IdCounts", "LookupHook"]


class IdCounts:
    """Collects ids on each rank while gradients accumulate, and adds their counts over ranks for the step.

    Until then it keeps the ids themselves, 4 bytes per lookup of this rank. The counts travel as one int32 vector over
    all rows of the embeddings in a `step()` call, so 4 bytes per row: 1/D of what their fp32 gradients of D columns do.
    """

    def __init__(self, optimizer: Any):
        self._ids: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._watched: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._optimizer = weakref.ref(optimizer)
        self._averaging = Averaging(optimizer)

    def add(self, parameter: torch.Tensor, ids: torch.Tensor) -> None:
        """Note the lookups of one micro-batch.

        Those of an update that the wrapper has dropped since are forgotten, and those whose gradient is gone.
        """
        self._averaging.look()
        if self._averaging.has_skipped():
            self.forget()
        watched = self._watch(parameter)
        # A wrapper that steps copies of the parameters takes the gradients away itself.
        may_be_dropped = watched.gradient is not None and has_its_own_parameters(self._optimizer())
        if may_be_dropped and not watched.keeps_gradient():
            self._ids.pop(parameter, None)
            watched.clear()
        self._ids.setdefault(parameter, []).append(ids.detach().reshape(-1).to(torch.int32, copy=True))

    def forget(self) -> None:
        """Drop everything noted so far, with the gradients that it belongs to."""
        self._ids.clear()
        for watched in self._watched.values():
            watched.clear()

    def _watch(self, parameter: torch.Tensor) -> Watched:
        """Know of the parameter what its gradient was after the last backward pass; nothing if a wrapper took it."""
        if parameter not in self._watched:
            self._watched[parameter] = watched = Watched(weakref.ref(parameter))
            if parameter.is_leaf and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: call_after_backward(watched.note_gradient))
        known: Watched = self._watched[parameter]
        return known

    def take(self, layout: Layout, layers: Sequence[Layer]) -> tuple[list[torch.Tensor], list[bool]]:
        """Add the counts over ranks and forget them: one all-reduce if there are several ranks.

        Args:
            layout: Of the `step()` call.
            layers: Its embeddings, the same on all ranks.

        Returns:
            For each layer the count of every row in the global batch (int32), and whether this rank noted any lookup.

        Raises:
            LayoutError: If there are counts, and nobody knows over which ranks to add them.
        """
        noted = [self._ids.pop(layer.parameter, []) for layer in layers]
        for layer in layers:
            if layer.parameter in self._watched:
                self._watched[layer.parameter].clear()
        counts = torch.zeros(sum(layer.shape[0] for layer in layers), dtype=torch.int32, device=layout.numbers_device)
        of_layers = list(counts.split([layer.shape[0] for layer in layers]))
        for of_layer, parts in zip(of_layers, noted, strict=True):
            for ids in parts:
                ids = ids.to(layout.numbers_device)
                of_layer.index_add_(0, ids, torch.ones_like(ids))
        self._averaging.look_for_step(layout)
        if any(noted) or self._averaging.known is not None:  # DeepSpeed steps once before there is an engine
            self._averaging.need().add(counts)
        return of_layers, [bool(parts) for parts in noted]


class LookupHook:
    """A forward hook that notes the ids of an embedding when the gradient of its output arrives.

    At that moment and not in the forward pass, so that evaluation, passes without a backward and recomputation under
    activation checkpointing are not counted, and `zero_grad()` may stand between forward and backward. It counts for
    one optimizer: in copies and pickles of the module it stays, and does nothing.
    """

    def __init__(self, counts: IdCounts, parameter: torch.Tensor):
        self._counts = weakref.ref(counts)
        self._parameter = weakref.ref(parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {"_counts": _gone, "_parameter": _gone}

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: torch.Tensor
    ) -> None:
        if output.requires_grad:
            ids = args[0] if args else options["input"]
            output.register_hook(lambda _: self._note(ids))

    def _note(self, ids: torch.Tensor) -> None:
        counts, parameter = self._counts(), self._parameter()
        if counts is None or parameter is None:
            return
        if not is_plain(parameter) or is_added_up(parameter):  # a DTensor has others in its place in forward
            counts.add(parameter, ids)


def _gone() -> None:
    """What a weak reference returns whose object is gone."""
