"""What is known of one parameter's group gradients, and whether the gradient that they were added to is still there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..sharding.local_tensors import is_plain

__all__ = ["Watched", "backward_pass", "call_after_backward", "is_added_up"]


@dataclass
class Watched:
    """What is known of one parameter's group gradients since the last step.

    Attributes:
        parameter: The parameter, which a wrapper may drop.
        row: Where `GroupSums` has its sums; -1 if none are kept.
        source: The tensor that takes the parameter's place in forward, where a wrapper puts one there.
        groups: How many groups of this rank were seen.
        squares: Flat, of the parameter's size: the squares of the groups' elements, added up. None where they are not
            wanted, or do not stay on this rank.
        gradient: What the parameter's gradient was after the last backward pass: where it lay, and its version.
    """

    parameter: weakref.ref[torch.Tensor]
    row: int = -1
    source: weakref.ref[torch.Tensor] | None = None
    groups: int = 0
    squares: torch.Tensor | None = None
    gradient: tuple[int, int] | None = None

    def clear(self) -> None:
        """Forget the groups; their sums and squares are forgotten by those who add them up."""
        self.groups = 0
        self.gradient = None

    def note_gradient(self) -> None:
        """Note what the gradient is like after a backward pass."""
        self.gradient = _described(self.parameter())

    def has_gradient(self) -> bool:
        """Whether the parameter still has a gradient, of whatever was added up in it."""
        parameter = self.parameter()
        return parameter is not None and parameter.grad is not None

    def keeps_gradient(self) -> bool:
        """Whether the gradient, which the groups were added to, was neither removed nor set to zero since.

        Waits for the device only if somebody has written to it since the backward pass, or has put another in its
        place.
        """
        described = _described(self.parameter())
        if described is None or described == self.gradient:
            return described is not None
        return bool(self.parameter().grad.any())  # type: ignore[union-attr]


def _described(parameter: torch.Tensor | None) -> tuple[int, int] | None:
    gradient = None if parameter is None else parameter.grad
    if gradient is None:
        return None
    if not is_plain(gradient) or gradient.layout is not torch.strided:
        return 0, 0  # to look into a DTensor takes all ranks, and a sparse gradient lies nowhere: the step refuses it
    return gradient.data_ptr(), gradient._version


def backward_pass() -> int:
    """A number of the backward pass that runs, -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def call_after_backward(work: Callable[[], None]) -> None:
    """Call `work` at the end of the backward pass that runs, when wrappers have written their averages."""
    call_at_end = torch.autograd.Variable._execution_engine.queue_callback
    # DDP writes them in such a callback, which comes before one that is queued at the end.
    call_at_end(partial(call_at_end, work))


def is_added_up(tensor: torch.Tensor) -> bool:
    """Whether the backward pass that runs adds the tensor's gradient to `.grad`; `torch.autograd.grad` does not."""
    node = torch.autograd.graph.get_gradient_edge(tensor).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # how it says that a gradient is only returned
        return False
