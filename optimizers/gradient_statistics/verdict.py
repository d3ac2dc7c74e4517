"""Whether a step's gradient was one that statistics can speak of: read by the host without making it wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..sharding.layout import listing
from .norms import HOOKS_ARE_LOST, HOW_TO_BUILD, StatisticsError

__all__ = ["Verdict"]

CHANGED = (
    "between backward() and step() by more than a common factor, so that the statistics of its micro-batches are not "
    "those of the gradient. A factor for the whole model, as of clip_grad_norm_, unscaling and averaging by hand, is "
    "found out; other changes, as of clip_grad_value_, masks, noise or gradients of other batches, are not. Make them "
    "in a hook (Tensor.register_hook) that the parameter has before the optimizer is constructed, for each micro-batch."
    f"{HOOKS_ARE_LOST}"
)


@dataclass
class Verdict:
    """What was found wrong with the gradients of a step, which is not taken then.

    On a CPU the error is raised in that step, elsewhere at the beginning of the next, by when it is known.
    """

    _wrong: torch.Tensor | None = None
    _names: list[str] = field(default_factory=list)
    _owner: str = ""
    _known: torch.Event | None = None

    def give(self, wrong: torch.Tensor, names: Sequence[str], owner: str) -> None:
        """Take the verdict of one step, the same on all ranks.

        Args:
            wrong: Of which layers a gradient came without groups, and of which it was changed; (2, layers), bool.
            names: The layers'.
            owner: The optimizer's class.

        Raises:
            StatisticsError: If it is known at once.
        """
        self._names, self._owner = list(names), owner
        if wrong.device.type == "cpu":
            self._wrong = wrong
            self.raise_for_last_step()
            return
        self._wrong = wrong.to("cpu", non_blocking=True)
        self._known = torch.Event(wrong.device.type)
        self._known.record(torch.accelerator.current_stream(wrong.device))  # which need not be the current device

    def raise_for_last_step(self) -> None:
        """Raise StatisticsError if the last step's gradient was wrong."""
        wrong, known = self._wrong, self._known
        self._wrong = self._known = None
        if wrong is None:
            return
        if known is not None:
            known.synchronize()  # of the last step's work alone, which is long done
        if not wrong.any():
            return
        unseen, changed = ([self._names[i] for i in row.nonzero().flatten().tolist()] for row in wrong)
        if unseen:
            raise StatisticsError(
                f"{self._owner} has a gradient of {listing(unseen)} on a rank that saw no group's gradient. "
                f"{HOW_TO_BUILD}"
            )
        # A change of one layer shifts the common factor, which layers that nobody changed then miss as well.
        which = "the gradient of" if len(changed) == 1 else "a gradient among those of"
        raise StatisticsError(f"{self._owner}: {which} {listing(changed)} was changed {CHANGED}")
