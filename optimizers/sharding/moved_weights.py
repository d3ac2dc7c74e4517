"""Weights that are elsewhere for a while, for a forward and backward there, and come back to the bit.

Two calls around the forward and backward of the moved weights, whatever wraps the model:

    moved = MovedWeights(optimizer)
    moved.move(tensors, lambda index, weights: weights.add_(directions[index], alpha=0.01))
    model(batch).backward()
    moved.restore()
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .backends import publish_weights
from .local_tensors import local_part

__all__ = ["Change", "MovedWeights"]

LOST = (
    "weights were changed while they were moved, and cannot be moved back: load a checkpoint of the model and then the "
    "optimizer's state, and from then on load, average and change weights when they are restored"
)

Change = Callable[[int, torch.Tensor], Any]
"""Takes the index of a tensor and what of it is on this rank, which it changes in place."""


class MovedWeights:
    """Moves the weights that an optimizer steps, has the wrapper bring the model up to date, and moves them back.

    It costs the memory of a copy of what moves on this rank, in the dtype in which it is stepped (fp32 masters where a
    wrapper keeps them), and one pass over it each way. Where a wrapper has copies stepped (ZeRO, BF16_Optimizer,
    Megatron's DistributedOptimizer), each publishing is a copy to the model's dtype and an all-gather of the model's
    weights, as a step has one. FSDP gathers in the next forward, as always. One process and DDP pay nothing besides.
    16-bit weights without masters are moved in 16 bits, so that small moves round away; they come back all the same.
    What `torch.autocast` has cast and kept of them is forgotten each time, also within one region.

    Args:
        optimizer: A `LayerwiseOptimizer`, or an `ObservedOptimizer` of another; the innermost of its wrappers.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._kept: list[_Kept] = []
        self._are_moved = self._are_lost = False

    @property
    def are_moved(self) -> bool:
        """Whether they are; so it is on a rank, too, that has none of those that are, and if they are lost."""
        return self._are_moved

    @property
    def are_lost(self) -> bool:
        """Whether they cannot be restored, as somebody has changed them."""
        return self._are_lost

    def refuse_lost(self) -> None:
        """Raise RuntimeError if they are lost."""
        if self._are_lost:
            raise RuntimeError(LOST)

    def forget(self) -> None:
        """Take the weights as they are for the original ones, as when they are loaded."""
        self._kept, self._are_moved, self._are_lost = [], False, False

    @torch.no_grad()
    def move(self, tensors: Sequence[torch.Tensor], change: Change, *, publish: bool = True) -> None:
        """Keep the bits of the tensors, change them and publish. Where publishing communicates, on all ranks alike.

        Args:
            tensors: Local tensors that the optimizer steps, all those that the change is for.
            change: Called with the index of each and its local part.
            publish: Whether the model is brought up to date; not where a step of the wrapper's is about to do so.

        Raises:
            RuntimeError: If weights are moved already.
        """
        self.refuse_lost()
        if self._are_moved:
            raise RuntimeError("the weights are moved already: restore them before they are moved again")
        try:
            for index, tensor in enumerate(tensors):
                self._kept.append(_Kept(tensor))
                change(index, local_part(tensor))
                self._kept[-1].note()
        except BaseException:
            for kept in self._kept:
                kept.restore()
            self._kept = []
            raise
        self._are_moved = True
        self._bring_up_to_date(publish)

    @torch.no_grad()
    def restore(self, *, publish: bool = True) -> None:
        """Give the weights the bits that they had, and publish; nothing if none are moved.

        Args:
            publish: As in `move`.

        Raises:
            RuntimeError: If somebody has written to them since they were moved, as a checkpoint does that is loaded;
                then they stay as they are, and it raises again each time until `forget`.
        """
        if not self._are_moved:
            return
        self._are_lost |= any(one.was_written() for one in self._kept)
        if self._are_lost:
            self._kept = []
        self.refuse_lost()
        for one in self._kept:
            one.restore()
        self.forget()
        self._bring_up_to_date(publish)

    def publish(self) -> None:
        """Bring the model up to date where that was left out."""
        self._bring_up_to_date(publish=True)

    def _bring_up_to_date(self, publish: bool) -> None:
        if publish:
            publish_weights(self._optimizer)
        torch.clear_autocast_cache()  # else a region that has cast a weight would go on with what it was


class _Kept:
    """The bits of one tensor's local part."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor
        self._bits = local_part(tensor).detach().clone()
        self._version = -1

    def note(self) -> None:
        """Note that the tensor is as it should be until it is restored."""
        self._version = local_part(self._tensor)._version

    def was_written(self) -> bool:
        """Whether anybody has changed the tensor in place since. Writing to its `data` goes unnoticed."""
        return local_part(self._tensor)._version != self._version

    def restore(self) -> None:
        local_part(self._tensor).copy_(self._bits)
