"""What the training loop needs of a distributed wrapper, and DeepSpeed's implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import trustratio.integrations.deepspeed  # noqa: F401 - makes the optimizers ZeRO-supported
from trustratio.recipes.learning_rate_schedules import FactorLR
from trustratio.recipes.recipe_errors import RecipeError
from trustratio.recipes.token_masking import MaskedBatch


class TrainingEngine(Protocol):
    """One rank of a data-parallel model with its optimizer and learning-rate schedule.

    The loop calls `loss`, `backward` and `step` once per micro-batch. The gradient of an update is the *sum* over
    all micro-batches and ranks of what `backward` was given: an implementation undoes its wrapper's averaging.
    """

    rank: int
    ranks: int
    device: torch.device

    def loss(self, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's summed loss and number of right predictions."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the update."""

    def step(self) -> None:
        """End a micro-batch; the last one of an accumulation updates weights and learning rate."""

    def train(self, training: bool) -> None:
        """Switch between training and evaluation mode."""

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum of a small tensor over all ranks."""

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping, if the wrapper tells."""

    def trust_ratios(self) -> dict[str, float]:
        """Return the last update's trust ratio per layer; {} for an optimizer without."""

    def save(self, folder: Path) -> None:
        """Write the complete training state (collective); the folder exists."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote (collective)."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class DeepSpeedTraining:
    """`TrainingEngine` on `deepspeed.initialize`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Callable[[Optimizer], FactorLR],
        settings: dict[str, Any],
    ) -> None:
        """Wrap the model.

        Args:
            model: its forward takes (input_ids, positions, labels).
            optimizer: over the model's named parameters.
            scheduler: makes the learning-rate schedule, stepped once per update.
            settings: DeepSpeed configuration from `deepspeed_settings.merge`.

        Raises:
            RecipeError: DeepSpeed put another optimizer in the place of this one.
        """
        self.engine, _, _, self.scheduler = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings
        )
        self.optimizer = self.engine.basic_optimizer
        if self.optimizer is not optimizer:
            raise RecipeError(
                f"DeepSpeed replaced {type(optimizer).__name__} by {type(self.optimizer).__name__}; remove the "
                "settings that need an optimizer of DeepSpeed's own"
            )
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()
        self.device = torch.device(self.engine.device)

    def loss(self, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's summed loss and number of right predictions."""
        return self.engine(batch.input_ids, batch.positions, batch.labels)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the update; see `TrainingEngine`."""
        # DeepSpeed averages over the ranks and, unless told otherwise, over the accumulation steps.
        self.engine.backward(loss * self.ranks, scale_wrt_gas=False)

    def step(self) -> None:
        """End a micro-batch."""
        self.engine.step()

    def train(self, training: bool) -> None:
        """Switch between training and evaluation mode."""
        self.engine.train(training)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def trust_ratios(self) -> dict[str, float]:
        """Return the last update's trust ratio per layer."""
        ratios = getattr(self.optimizer, "trust_ratios", None)
        return ratios() if ratios is not None else {}

    def save(self, folder: Path) -> None:
        """Write the complete training state."""
        self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read the complete training state.

        Raises:
            RecipeError: DeepSpeed found no checkpoint of its own in the folder.
        """
        loaded, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if loaded is None:
            raise RecipeError(f"{folder} holds no DeepSpeed checkpoint")
        # The schedule is a function of the update's number, so its position is all there is to restore; a stored
        # schedule would bring back the length that the run had before it was made longer. Skipped updates (fp16
        # overflow) do not move it.
        self.scheduler.last_epoch = self.engine.global_steps - self.engine.skipped_steps
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()
