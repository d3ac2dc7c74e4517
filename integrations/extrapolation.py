"""Extrapolation in the Hugging Face Trainer, whose loop is its own.

    trainer = Trainer(model=model, args=args, ...)
    trainer.add_callback(ExtrapolationCallback(step_size=0.01))

With DeepSpeed, FSDP and DDP alike. Read from transformers 5.23.0.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trustratio.optimizers import Extrapolation
from trustratio.optimizers.extrapolation import check_options

from .guards.trainer import calling_trainer

__all__ = ["ExtrapolationCallback"]


class ExtrapolationCallback(TrainerCallback):
    """Has the Trainer's gradients taken at extrapolated weights; see `Extrapolation`.

    Evaluations and checkpoints have the original weights. Each checkpoint gets the extrapolation's own state,
    ``extrapolation.pt`` or one file per rank, and training that goes on from a checkpoint in ``args.output_dir`` reads
    it; where it is not there, the first step is not extrapolated, with a warning.

    Args:
        step_size: As of `Extrapolation`.
        direction: The same.
        last_step: The last step that is extrapolated; None for all. The paper stops after the first phase.
        options: Further options of `Extrapolation`: `noise`, `seed`.

    Raises:
        ValueError: If an argument is out of range.
        LayoutError: When training begins to call the model, where `Extrapolation` raises it.

    Attributes:
        extrapolation: While the Trainer trains.
    """

    def __init__(self, step_size: float, direction: str = "gradient", *, last_step: int | None = None, **options: Any):
        check_options(step_size, direction, **options)
        if last_step is not None and (not isinstance(last_step, int) or last_step < 0):
            raise ValueError(f"last_step must be a number of steps or None, got {last_step!r}")
        self._step_size, self._direction, self._options = step_size, direction, options
        self._last_step = last_step
        self.extrapolation: Extrapolation | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model as the Trainer has wrapped it."""
        self.on_train_end(args, state, control)  # of a training that was broken off
        if self._is_over(state):
            return
        self.extrapolation = Extrapolation(
            kwargs["optimizer"], self._step_size, self._direction, model=kwargs["model"], **self._options
        ).attach(calling_trainer().model_wrapped)
        if state.global_step:
            self._load(self._files(args, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the last step that is extrapolated."""
        if self._is_over(state):
            self.on_train_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state beside the checkpoint."""
        if self.extrapolation is None:
            return
        content = self.extrapolation.state_dict()
        common, own = self._files(args, state)
        if content["rank"] is not None or not (dist.is_initialized() and dist.get_rank()):
            os.makedirs(common.parent, exist_ok=True)
            torch.save(content, common if content["rank"] is None else own)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the weights back, and free what was kept."""
        if self.extrapolation is not None:
            self.extrapolation.remove()
            self.extrapolation = None

    def _is_over(self, state: TrainerState) -> bool:
        return self._last_step is not None and state.global_step >= self._last_step

    def _files(self, args: TrainingArguments, state: TrainerState) -> tuple[Path, Path]:
        """Of all ranks, and of this one."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return folder / "extrapolation.pt", folder / f"extrapolation_{rank}.pt"

    def _load(self, files: tuple[Path, Path]) -> None:
        assert self.extrapolation is not None
        found = next((file for file in files if file.exists()), None)
        if found is None:
            warnings.warn(
                f"there is no extrapolation.pt in {files[0].parent}: the first step from that checkpoint is not "
                "extrapolated",
                stacklevel=3,
            )
            return
        self.extrapolation.load_state_dict(torch.load(found, map_location="cpu", weights_only=True))
