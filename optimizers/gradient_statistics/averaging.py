"""Who averages an optimizer's gradients: what was found out, for how long that holds, and what the wrapper dropped."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from ..sharding.backends import find_data_parallel
from ..sharding.data_parallel import DataParallel, unknown_ranks
from ..sharding.layout import Layout, LayoutError
from .watched import backward_pass

__all__ = ["Averaging"]


class Averaging:
    """What is known of who averages one optimizer's gradients.

    To find out may take a walk over all objects of the process, so it is not done for every gradient. It is done anew
    for every plan of a step, and at a backward pass for which the last answer need not hold: if nobody was known, the
    wrapper is gone, or the optimizer has other parameters, another process group or other processes than then.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = weakref.ref(optimizer)
        self._known: DataParallel | None = None
        self._setting: tuple[Any, Any] = (None, None)
        self._parameters: tuple[int, ...] = ()
        self._pass = -1
        self._planned: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._skipped_steps = 0

    @property
    def known(self) -> DataParallel | None:
        """The last answer; None before the first, or if nobody is known."""
        return self._known

    def look(self) -> bool:
        """Find out where the last answer need not hold; cheap, so that every gradient may ask. Whether it was done."""
        current = backward_pass()
        if current != -1 and current == self._pass:
            return False
        self._pass = current
        if self._holds() and self._parameters == self._parameters_now():
            return False
        self._find()
        return True

    def look_for_step(self, layout: Layout) -> bool:
        """The same for a step: at the first one with this layout, it is found out in any case."""
        # Not by the parameters: a wrapper may have put others in their place for the time of the step.
        if layout in self._planned and self._holds():
            return False
        self._find()
        if self._known is not None:
            self._planned[layout] = True
        return True

    def need(self) -> DataParallel:
        """The last answer for whoever cannot do without.

        Raises:
            LayoutError: If nobody is known although there are several ranks, or if a rank may leave the others under
                DDP's `Join`, on all ranks alike.
        """
        if self._known is None:
            raise unknown_ranks(self._optimizer())
        if self._known.joins():
            raise LayoutError(
                f"{type(self._optimizer()).__name__} adds up over ranks what each has seen, in collectives that "
                "torch's Join does not answer for ranks without further samples: give all ranks the same number of "
                "batches, and leave out Join and DistributedDataParallel.join(), or enter them with "
                "throw_on_early_termination=True"
            )
        return self._known

    def has_skipped(self) -> bool:
        """Whether the wrapper has dropped an update since this was asked last."""
        before = self._skipped_steps
        self._skipped_steps = 0 if self._known is None else self._known.skipped_steps()
        return self._skipped_steps != before

    def _find(self) -> None:
        known, self._known = self._known, find_data_parallel(self._optimizer())
        self._setting, self._parameters = self._setting_now(), self._parameters_now()
        if known is None and self._known is not None:
            self._skipped_steps = self._known.skipped_steps()

    def _holds(self) -> bool:
        return self._known is not None and self._known.is_valid() and self._setting == self._setting_now()

    def _setting_now(self) -> tuple[Any, Any]:
        initialized = dist.is_available() and dist.is_initialized()
        return id(dist.group.WORLD) if initialized else None, self._optimizer().data_parallel_group  # type: ignore[union-attr]

    def _parameters_now(self) -> tuple[int, ...]:
        groups = self._optimizer().param_groups  # type: ignore[union-attr]
        return tuple(id(parameter) for group in groups for parameter in group["params"])
