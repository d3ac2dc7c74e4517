"""What a wrapper that shards gradients does with them between backward and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Destination", "GradientFlow", "Slice"]


@dataclass(frozen=True)
class Slice:
    """A run of one layer's elements and the rank that gets them when gradients are reduced.

    Attributes:
        owner: Rank within the destination's process group.
        offset: First element inside the layer.
        length: Number of elements.
        start: First element inside the owner's local tensor.
    """

    owner: int
    offset: int
    length: int
    start: int

    def part(self, begin: int, end: int) -> Slice:
        """Return the elements from `begin` to `end` of this slice."""
        return Slice(self.owner, self.offset + begin, min(end, self.length) - begin, self.start + begin)


@dataclass(frozen=True)
class Destination:
    """Where the reduced gradient of one sharded parameter goes.

    Attributes:
        process_group: The ranks over which the gradient is averaged.
        tensor: The local tensor that holds this rank's part; the optimizer is stepped with it.
        slices: The parts of all ranks.
        kept_whole: Whether every rank keeps the parameter's whole gradient until the step.
        accumulating: Tells in backward whether the gradient is kept whole because a later one will be reduced with it.
        holds: Tells in backward whether the gradients of earlier micro-batches are still there, so that this one's is
            added to them; None where nothing drops them but what the wrapper counts as a skipped step.
        arrange: Takes a whole gradient and returns its elements, flat, in the order in which the slices count them;
            None for the layer's own order.
    """

    process_group: dist.ProcessGroup
    tensor: torch.Tensor
    slices: tuple[Slice, ...]
    kept_whole: bool
    accumulating: Callable[[], bool] | None = None
    holds: Callable[[], bool] | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None

    def is_kept(self) -> bool:
        """Whether the gradient of this backward pass is kept whole."""
        return self.kept_whole or (self.accumulating is not None and self.accumulating())


@dataclass(frozen=True)
class GradientFlow:
    """What a wrapper that shards gradients does with them between backward and step.

    Attributes:
        destinations: Where each parameter's gradient goes, by the parameter's id.
        loss_scale: The loss scale now.
        factor: Takes the loss scale of the backward passes and returns, during the step, what the averaged gradient
            was multiplied by: 1 over the loss scale, times what clipping took. None where the wrapper does not know.
        sources: Whether gradients are made for other tensors than the parameters; see `find_sources`.
    """

    destinations: Mapping[int, Destination]
    loss_scale: Callable[[], float] = lambda: 1.0
    factor: Callable[[float], float | torch.Tensor] | None = None
    sources: bool = False
