"""What the loops need of a wrapped model, and the implementations on DeepSpeed and on plain DDP."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import trustratio.integrations.deepspeed  # noqa: F401 - makes the optimizers ZeRO-supported
from trustratio.integrations.checkpoints.deepspeed_engine import load_engine_state, save_engine_state
from trustratio.integrations.checkpoints.ranks import OptimizerStateError
from trustratio.integrations.layer_norms import clip_grad_norm_
from trustratio.optimizers import LayerwiseOptimizer

from ..common.errors import RecipeError
from ..configuration.phases import Phase
from ..data.masking import MaskedBatch
from ..rules.global_batch import BatchPlan
from ..rules.schedules import FactorLR
from ..runs.checkpoints import RANKS, WRITE_ERRORS, describe_checkpoint
from .loss_scale import SkippedUpdates
from .second_pass import second_pass, wants_second_pass
from .unpickling import tensors_only

TRAINING_STATE = "training_state.pt"
"""The file of a checkpoint without DeepSpeed: model, optimizer, and number of updates."""

ENGINE_STATE = "engine_state.safetensors"
"""The file of a checkpoint of ZeRO that any number of ranks reads; DeepSpeed's own are for as many as wrote them."""


class Observed(Protocol):
    """One rank of a data-parallel model with its optimizer, as far as it can be looked at, whoever trains it."""

    rank: int
    ranks: int
    device: torch.device
    optimizer: Optimizer

    def loss(self, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's summed loss and number of right predictions."""

    def losses(self, batch: MaskedBatch) -> torch.Tensor:
        """Return the loss of each prediction, fp32 (masked,)."""

    def train(self, training: bool) -> None:
        """Switch between training and evaluation mode."""

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum of a small tensor over all ranks."""

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping, if the wrapper tells."""

    def require_updates(self, most_skipped: int) -> None:
        """Check after an update that the wrapper does not skip them all; raises TrainingFailure, on all ranks alike."""

    def applied(self) -> bool:
        """Tell whether the last update moved the weights: the wrapper has not skipped it."""


class TrainingEngine(Observed, Protocol):
    """What the recipe's own loop trains: a wrapped model with its optimizer and learning-rate schedule.

    The loop calls `set_batch_plan` before the first update of a phase and where the division of the batch changes, and
    `begin_micro_batch`, `loss`, `backward` and `step` once per micro-batch. The gradient of an update is the *sum* over
    all micro-batches and ranks of what `backward` was given: an implementation undoes its wrapper's averaging. Where
    `wants_second_pass`, all that is done once more within `second_pass`, and only then is the update done.
    """

    def begin_phase(self, phase: Phase) -> None:
        """Tell the model which phase the updates that follow are of."""

    def set_batch_plan(self, plan: BatchPlan) -> None:
        """Take note of the batch division of the updates that follow."""

    def continue_schedule(self, updates: float) -> None:
        """Set the schedule to where it is after this many updates."""

    def wants_second_pass(self) -> bool:
        """Tell whether the update that begins takes two passes over its micro-batches; asked before the first."""

    def second_pass(self) -> AbstractContextManager[None]:
        """Return the context of the second pass, at whose end weights and learning rate are updated."""

    def begin_micro_batch(self, last: bool) -> None:
        """Begin a micro-batch; the `last` one of an accumulation will update the weights."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the update."""

    def step(self) -> None:
        """End a micro-batch; the last one of an accumulation updates weights and learning rate."""

    def save(self, folder: Path, for_any_ranks: bool = True) -> None:
        """Write the complete training state (collective); the folder exists.

        Args:
            folder: of the checkpoint.
            for_any_ranks: what is cut up among the ranks is also written so that another number of ranks can read it.

        Raises:
            OSError, RuntimeError, MemoryError: This rank's part could not be written. The collective part is over by
                then: no other rank waits for this one.
        """

    def load(self, folder: Path) -> None:
        """Read what `save` wrote (collective)."""


class DistributedTraining:
    """What all implementations share: ranks, sums, learning rate and schedule."""

    def __init__(self, optimizer: Optimizer, scheduler: FactorLR, device: torch.device) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.device = device
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()
        self._first_of_two = False
        self.first_norm: Any = None

    def wants_second_pass(self) -> bool:
        """Tell whether the optimizer wants a sample of the curvature; see `TrainingEngine`."""
        self._first_of_two, self.first_norm = wants_second_pass(self.optimizer), None
        return self._first_of_two

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def require_updates(self, most_skipped: int) -> None:
        """Skip no update: without DeepSpeed there is no fp16."""

    def applied(self) -> bool:
        """Tell whether the last update moved the weights: without DeepSpeed every one does."""
        return True

    def continue_schedule(self, updates: float) -> None:
        """Set the schedule to where it is after this many updates."""
        # The schedule is a function of the update's number, so its position is all there is to restore; a stored
        # schedule would bring back the length that the run had before it was made longer.
        self.scheduler.last_epoch = updates
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate


def set_batch_plan(engine: deepspeed.DeepSpeedEngine, plan: BatchPlan) -> None:
    """Tell DeepSpeed the batch division of the updates that follow, which it reports and sizes its buffers by."""
    engine.set_train_micro_batch_size(plan.micro)
    engine.set_train_batch_size(plan.sequences)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = plan.accumulation


@contextlib.contextmanager
def postponed_failures(writer: Any, method: str) -> Iterator[None]:
    """Have a method that writes files raise at the end of the block only, before what fails because of it.

    Between their files ranks meet in barriers: one that left at the first failure would keep the others waiting.

    Args:
        writer: whose method, e.g. DeepSpeed's checkpoint engine.
        method: its name.

    Raises:
        OSError, RuntimeError, MemoryError: the first failure.
    """
    write, failures = getattr(writer, method), []

    def write_or_remember(*arguments: Any, **options: Any) -> Any:
        try:
            return write(*arguments, **options)
        except WRITE_ERRORS as error:
            failures.append(error)
        except SafetensorError as error:  # what safetensors makes of a full disk
            failures.append(OSError(str(error)))

    setattr(writer, method, write_or_remember)
    try:
        yield
    except WRITE_ERRORS as error:
        failures.append(error)
    finally:
        setattr(writer, method, write)
    if failures:
        raise failures[0]


class DeepSpeedTraining(DistributedTraining):
    """`TrainingEngine` on a `DeepSpeedEngine`."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: Optimizer,
        scheduler: Callable[[Optimizer], FactorLR],
    ) -> None:
        """Train with an engine.

        Args:
            engine: as `deepspeed.initialize` or `Accelerator.prepare` makes it.
            optimizer: the one that the engine was given.
            scheduler: makes the learning-rate schedule; the engine has none of its own.

        Raises:
            RecipeError: DeepSpeed put another optimizer in the place of this one.
        """
        used = engine.basic_optimizer
        if used is not optimizer:
            raise RecipeError(
                f"DeepSpeed replaced {type(optimizer).__name__} by {type(used).__name__}; remove the settings that "
                "need an optimizer of DeepSpeed's own"
            )
        super().__init__(optimizer, scheduler(optimizer), torch.device(engine.device))
        self.engine = engine
        self.skipped = SkippedUpdates(engine)
        self._last = True

    @classmethod
    def initialize(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Callable[[Optimizer], FactorLR],
        settings: dict[str, Any],
    ) -> DeepSpeedTraining:
        """Wrap the model by `deepspeed.initialize` (collective).

        Args:
            model: its forward takes (input_ids, positions, labels).
            optimizer: over the model's named parameters.
            scheduler: makes the learning-rate schedule.
            settings: DeepSpeed configuration from `deepspeed_settings.merge`.
        """
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        return cls(engine, optimizer, scheduler)

    def begin_phase(self, phase: Phase) -> None:
        """Tell the model inside the engine; see `GatheredHead.begin_phase`."""
        self.engine.module.begin_phase(phase)

    def set_batch_plan(self, plan: BatchPlan) -> None:
        """Tell DeepSpeed the batch division."""
        set_batch_plan(self.engine, plan)
        # Between updates, by this accumulation as well.
        self.engine.micro_steps = self.engine.global_steps * plan.accumulation

    def begin_micro_batch(self, last: bool) -> None:
        """Tell DeepSpeed where an update ends: its own count would be off after a phase with another accumulation."""
        self._last = last
        self.engine.set_gradient_accumulation_boundary(last)

    def loss(self, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's summed loss and number of right predictions."""
        return self.engine(batch.input_ids, batch.positions, batch.labels)

    def losses(self, batch: MaskedBatch) -> torch.Tensor:
        """Return the loss of each prediction."""
        return self.engine(batch.input_ids, batch.positions, batch.labels, reduction="none")[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the update; see `TrainingEngine`."""
        # DeepSpeed averages over the ranks and, unless told otherwise, over the accumulation steps.
        self.engine.backward(loss * self.ranks, scale_wrt_gas=False)

    def step(self) -> None:
        """End a micro-batch; an update that DeepSpeed skips (fp16 overflow) does not advance the schedule."""
        with self.skipped.updating():
            self.engine.step()
        if self._last and not self._first_of_two and self.skipped.count():
            self.scheduler.step()

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Run the micro-batches again in the block; DeepSpeed's step at its end is the update."""
        with second_pass(self.optimizer, self.engine) as self.first_norm:
            self._first_of_two = False
            yield

    def require_updates(self, most_skipped: int) -> None:
        """Check that DeepSpeed has not skipped so many updates in a row; see `SkippedUpdates`."""
        self.skipped.require_fewer(most_skipped)

    def applied(self) -> bool:
        """Tell whether the last update moved the weights: DeepSpeed has not skipped it."""
        return not self.skipped.in_a_row

    def train(self, training: bool) -> None:
        """Switch between training and evaluation mode."""
        self.engine.train(training)

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping."""
        norm = self.engine.get_global_grad_norm() if self.first_norm is None else self.first_norm
        return None if norm is None else float(norm)

    def save(self, folder: Path, for_any_ranks: bool = True) -> None:
        """Write the complete training state; see `TrainingEngine` for what is raised."""
        failure = None
        try:
            with postponed_failures(self.engine.checkpoint_engine, "save"):
                self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        except WRITE_ERRORS as error:
            failure = error
        cut_up = self.engine.zero_optimization_stage() > 0
        if for_any_ranks and cut_up and isinstance(self.optimizer, LayerwiseOptimizer):
            self._save_engine_state(folder / ENGINE_STATE)  # where the other ranks wait, whatever failed
        if failure is not None:
            raise failure

    def load(self, folder: Path) -> None:
        """Read the complete training state, which another number of ranks may have written.

        Raises:
            RecipeError: DeepSpeed found no checkpoint of its own in the folder, or the state file is of another run.
        """
        if (folder / ENGINE_STATE).is_file() and self._is_of_other_ranks(folder):
            self._load_engine_state(folder / ENGINE_STATE)
        else:
            self._load_own(folder)
        # Skipped updates (fp16 overflow) do not move the schedule.
        self.continue_schedule(self.engine.global_steps - self.engine.skipped_steps)

    def _save_engine_state(self, file: Path) -> None:
        """Write the file for other numbers of ranks; without it the checkpoint is whole for as many as now."""
        try:
            save_engine_state(self.engine, file)
        except OptimizerStateError as error:  # on all ranks
            if self.rank == 0:
                warnings.warn(f"only {self.ranks} ranks can continue from {file.parent}: {error}", stacklevel=2)

    def _is_of_other_ranks(self, folder: Path) -> bool:
        return describe_checkpoint(folder)["identity"].get(RANKS, self.ranks) != self.ranks

    def _load_engine_state(self, file: Path) -> None:
        try:
            load_engine_state(self.engine, file, verify=False)  # as a file of the checkpoint it was
        except OptimizerStateError as error:
            raise RecipeError(f"{file} cannot be continued: {error}") from error

    def _load_own(self, folder: Path) -> None:
        options = {"tag": folder.name, "load_lr_scheduler_states": False}
        with tensors_only(folder):
            loaded, _ = self.engine.load_checkpoint(str(folder.parent), **options)
        if loaded is None:
            raise RecipeError(f"{folder} holds no DeepSpeed checkpoint")


class DataParallelTraining(DistributedTraining):
    """`TrainingEngine` on `DistributedDataParallel`, or on the bare model where there is one rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Callable[[Optimizer], FactorLR],
        device: torch.device,
        gradient_clipping: float,
    ) -> None:
        """Train a model that was moved to its device.

        Args:
            model: wrapped in `DistributedDataParallel` if there are several ranks.
            optimizer: over the model's named parameters.
            scheduler: makes the learning-rate schedule.
            device: of this rank.
            gradient_clipping: global-norm limit, 0 for none.
        """
        super().__init__(optimizer, scheduler(optimizer), device)
        self.model = model
        self.gradient_clipping = gradient_clipping
        self.in_fp32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        self._last = True
        self._updates = 0
        self._norm: torch.Tensor | None = None

    def begin_phase(self, phase: Phase) -> None:
        """Tell the model inside the wrapper; see `GatheredHead.begin_phase`."""
        self._bare_model().begin_phase(phase)

    def set_batch_plan(self, plan: BatchPlan) -> None:
        """Nothing depends on the batch division here."""

    def begin_micro_batch(self, last: bool) -> None:
        """Reduce gradients in the last micro-batch's backward only."""
        self._last = last
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last  # what `no_sync` sets

    def loss(self, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's summed loss and number of right predictions."""
        return self.model(batch.input_ids, batch.positions, batch.labels)

    def losses(self, batch: MaskedBatch) -> torch.Tensor:
        """Return the loss of each prediction."""
        return self.model(batch.input_ids, batch.positions, batch.labels, reduction="none")[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the update; see `TrainingEngine`."""
        (loss * self.ranks).backward()  # DDP averages over the ranks

    def step(self) -> None:
        """End a micro-batch; after the last one clip, update and advance the schedule."""
        if not self._last or self._first_of_two:
            return
        self._norm = self._clip(self.gradient_clipping or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self._updates += 1

    def _clip(self, limit: float) -> torch.Tensor:
        """Clip the gradient by its global norm, and return that, which torch rounds to the gradient's precision."""
        if self.in_fp32:
            return nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return clip_grad_norm_(self.optimizer, limit)

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Run the micro-batches again in the block; then clip the first pass's gradient, and update."""
        with second_pass(self.optimizer):
            yield
        self._first_of_two = False
        self.step()

    def train(self, training: bool) -> None:
        """Switch between training and evaluation mode."""
        self.model.train(training)

    def gradient_norm(self) -> float | None:
        """Return the global gradient norm of the last update before clipping."""
        return None if self._norm is None else float(self._norm)

    def save(self, folder: Path, for_any_ranks: bool = True) -> None:
        """Write the complete training state; every rank holds all of it, and the first one writes."""
        if self.rank == 0:
            state = {
                "model": self._bare_model().state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "updates": self._updates,
            }
            torch.save(state, folder / TRAINING_STATE)

    def load(self, folder: Path) -> None:
        """Read the complete training state.

        Raises:
            RecipeError: the folder has no such file.
        """
        if not (folder / TRAINING_STATE).is_file():
            raise RecipeError(f"{folder} holds no {TRAINING_STATE}: it was written by a run with another wrapper")
        with tensors_only(folder):
            state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
        self._bare_model().load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._updates = state["updates"]
        self.continue_schedule(self._updates)

    def _bare_model(self) -> Any:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
