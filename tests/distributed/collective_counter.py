"""Counts the collectives of optimizer steps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    *(("reduce_scatter_single",) if hasattr(dist, "reduce_scatter_single") else ()),
    "send",
    "recv",
)


class CollectiveCounter:
    """Counts the collectives issued inside each `optimizer.step()` call, until it is closed.

    Several may count at once, and be closed in any order: torch.distributed has its own functions back after the last.
    """

    _open: ClassVar[list[CollectiveCounter]] = []
    _originals: ClassVar[dict[str, Any]] = {}

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.per_call: list[int] = []
        self.all_reduces: list[int] = []
        self._inside = False
        if not self._open:
            self._originals.update({name: getattr(dist, name) for name in COLLECTIVES})
            for name, original in self._originals.items():
                setattr(dist, name, _counted(name, original))
        self._open.append(self)
        optimizer.register_step_pre_hook(lambda *_: self._enter())
        optimizer.register_step_post_hook(lambda *_: self._leave())

    def count(self, name: str, process_group: Any) -> None:
        self.per_call[-1] += 1
        self.all_reduces[-1] += name == "all_reduce"

    def _enter(self) -> None:
        self._inside = True
        self.per_call.append(0)
        self.all_reduces.append(0)

    def _leave(self) -> None:
        self._inside = False

    def close(self) -> None:
        if self in self._open:
            self._open.remove(self)
            if not self._open:
                for name, original in self._originals.items():
                    setattr(dist, name, original)

    @classmethod
    def close_all(cls) -> int:
        """Close those that are open; how many."""
        left = list(cls._open)
        for counter in left:
            counter.close()
        return len(left)


def _counted(name: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        for counter in CollectiveCounter._open:
            if counter._inside:
                counter.count(name, kwargs.get("group"))
        return original(*args, **kwargs)

    return call
