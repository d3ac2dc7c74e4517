"""Updates that DeepSpeed skips in fp16 because their gradients overflow: a few in a row are usual, many are the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import deepspeed

from ..common.errors import TrainingFailure

_AT_THE_LEAST = "loss scale already at minimum"  # in the bare Exception of DeepSpeed's ZeRO


class SkippedUpdates:
    """Counts the updates that an engine has skipped in a row; all ranks skip the same ones."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Count those of `engine`."""
        self.engine = engine
        self.in_a_row = 0

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Do the last micro-batch of an update in the block.

        Raises:
            TrainingFailure: it overflows, and DeepSpeed cannot lower the loss scale any further; on all ranks.
        """
        try:
            yield
        except Exception as error:
            if _AT_THE_LEAST not in str(error):
                raise
            self.in_a_row += 1
            raise TrainingFailure(self._told("DeepSpeed lowers it no further")) from error

    def count(self) -> bool:
        """Take note of the update that was just done; return whether it moved the weights."""
        applied = self.engine.was_step_applied()
        self.in_a_row = 0 if applied else self.in_a_row + 1
        return applied

    def require_fewer(self, most: int) -> None:
        """Check that the weights still move.

        Raises:
            TrainingFailure: `most` updates in a row were skipped; on all ranks.
        """
        if self.in_a_row >= most:
            raise TrainingFailure(self._told(f"run.most_skipped_updates={most}"))

    def _told(self, why: str) -> str:
        optimizer = self.engine.optimizer
        scale = getattr(getattr(optimizer, "loss_scale_config", optimizer), "cur_scale", float("nan"))
        return (
            f"{self.in_a_row} updates in a row were skipped because gradients overflow in fp16, the last at a loss "
            f"scale of {scale:g} ({why}); no weight has moved since: use --precision bf16 or fp32, or a lower --lr"
        )
