"""What Lightning's Trainer makes of a program: who steps schedules, and what becomes of gradients that are added up.

Read from Lightning 2.5 and 2.6, of both names, `lightning` and `pytorch_lightning`; with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.living import living

from .replaced import ConflictingSettingsError, innermost
from .schedules import counting_updates

__all__ = [
    "Callback",
    "WindowGuard",
    "guard_trainers",
    "refuse_backward_in_forward",
    "refuse_other_intervals",
    "refuse_other_windows",
]

NAMES = ("lightning.pytorch", "pytorch_lightning")
"""One package under two names, of whose classes none is the other's."""

ONE_MICRO_BATCH_LEFT = (1, 2)
"""ZeRO stages that keep, of several backward passes that each end a step in DeepSpeed's eyes, the last alone."""


def _callback_class() -> Any:
    """The base of callbacks: of the package that is imported, or else installed; `object` without one."""
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except (ImportError, AttributeError):
            continue
    return object


Callback: Any = _callback_class()


def living_trainers() -> Iterator[Any]:
    """Yield the Trainers of this process, of both packages; but for those whose construction has failed."""
    modules = (sys.modules.get(name) for name in NAMES)
    kinds = [module.Trainer for module in modules if module is not None and hasattr(module, "Trainer")]
    for trainer in living(*kinds) if kinds else ():
        if hasattr(trainer, "strategy") and hasattr(trainer, "callbacks"):
            yield trainer


# Schedules ----------------------------------------------------------------------------------------------------------


def refuse_other_intervals(optimizer: Optimizer) -> None:
    """Raise if Lightning would step a schedule of ours less than once per update.

    Raises:
        ConflictingSettingsError: If so. A scheduler that is returned alone is stepped once per epoch.
    """
    for config in _stepped_by_lightning():
        if (config.interval, config.frequency) == ("step", 1):
            continue
        for schedule in counting_updates(config.scheduler, optimizer):
            raise ConflictingSettingsError(
                f"{type(schedule).__name__} counts updates, but Lightning would step it every "
                f"{config.frequency} {config.interval}: return from configure_optimizers "
                '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}'
            )


def _stepped_by_lightning() -> Iterator[Any]:
    for trainer in living_trainers():
        module = trainer.lightning_module
        if module is not None and module.automatic_optimization:
            yield from trainer.lr_scheduler_configs


# Windows: the micro-batches of one step ------------------------------------------------------------------------------


def refuse_other_windows(trainer: Any) -> None:
    """Raise if DeepSpeed would make a step of other micro-batches, or of other gradients, than Lightning says.

    Raises:
        ConflictingSettingsError: If so.
    """
    engine, accumulation = _engine(trainer), trainer.accumulate_grad_batches
    if engine is None or accumulation == 1:
        return
    if not engine.managed_gradient_accumulation():
        raise ConflictingSettingsError(
            '"managed_gradient_accumulation": false has DeepSpeed step at every batch, whatever '
            f"accumulate_grad_batches={accumulation} says: leave it out of the config of DeepSpeedStrategy, or "
            "accumulate by hand"
        )
    if getattr(engine.backward, "keywords", {}).get("scale_wrt_gas") is not False:
        raise ConflictingSettingsError(
            f"Lightning divides the loss by accumulate_grad_batches={accumulation}, and DeepSpeed divides it again: "
            f"gradients would be too small by a factor of {accumulation}. Add trustratio's callback: "
            "Trainer(callbacks=[DivideLossOnce()]), from trustratio.integrations.lightning"
        )
    if not trainer.fast_dev_run:  # which ends with its only epoch
        _refuse_rest(trainer.num_training_batches, accumulation)


def refuse_backward_in_forward(trainer: Any, module: Any) -> None:
    """Raise if FSDP1 would see backward passes within its own forward, after which it reads stale weights.

    Raises:
        ConflictingSettingsError: If so: FSDPStrategy has made the whole module one of FSDP1, and steps are by hand.
    """
    if isinstance(trainer.strategy.model, FullyShardedDataParallel) and not module.automatic_optimization:
        raise ConflictingSettingsError(
            "with manual optimization, training_step() calls backward() within the forward of the "
            "FullyShardedDataParallel around the whole module, and later steps are made of stale weights, with any "
            "optimizer. Wrap parts of the module in configure_model(), which FSDPStrategy leaves as they are, or use "
            "ModelParallelStrategy"
        )


def _refuse_rest(batches: float, accumulation: int) -> None:
    if math.isfinite(batches) and batches % accumulation:
        raise ConflictingSettingsError(
            f"an epoch has {batches:g} batches per rank, which accumulate_grad_batches={accumulation} does not divide: "
            "Lightning steps its schedules at the epoch's end, where DeepSpeed takes no step but adds the rest to the "
            f"next epoch. Set limit_train_batches={batches - batches % accumulation:g} in the Trainer"
            + (", or accumulate less" if batches > accumulation else ": accumulate less")
        )


def _notice_begun_window(trainer: Any) -> None:
    """Raise or warn if training goes on from within a step, some of whose gradients are gone.

    Raises:
        ConflictingSettingsError: Under DeepSpeed.
    """
    # A checkpoint may be written within the last batch, before Lightning calls it completed.
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    lost = 0 if done >= trainer.num_training_batches else done % trainer.accumulate_grad_batches
    if not lost:
        return
    problem = (
        f"the checkpoint was written after {lost} of the {trainer.accumulate_grad_batches} batches of a step, and does "
        "not have their gradients"
    )
    remedy = "Checkpoints that are written after a step, as by ModelCheckpoint(every_n_train_steps=...), go on exactly"
    if _engine(trainer) is not None:
        raise ConflictingSettingsError(
            f"{problem}; DeepSpeed would count from the next batch on, out of step with Lightning. {remedy}"
        )
    warnings.warn(f"{problem}: the first step is made of the others alone. {remedy}", stacklevel=3)


def _engine(trainer: Any) -> Any:
    """DeepSpeed's engine, None under other strategies."""
    return getattr(trainer.strategy, "deepspeed_engine", None)


class WindowGuard(Callback):
    """Looks, in a Trainer that steps one of our optimizers, at what becomes of the micro-batches of a step.

    Raises ConflictingSettingsError, before a weight moves, where DeepSpeed would step with other gradients; warns
    where a checkpoint lacks gradients of the first step.
    """

    def __init__(self) -> None:
        self._backwards = self._batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the settings, and leave a Trainer that steps none of ours."""
        self._backwards = self._batches = 0
        if not _steps_ours(trainer):
            trainer.callbacks = [one for one in trainer.callbacks if one is not self]
        else:
            refuse_backward_in_forward(trainer, pl_module)
            refuse_other_windows(trainer)
            _notice_begun_window(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Raise at the second backward pass of a step by hand that ZeRO would make of the last alone."""
        engine = None if pl_module.automatic_optimization else _engine(trainer)
        if engine is None or not _steps_ours(trainer):
            return
        self._backwards += 1
        keeps_last = engine.zero_optimization_stage() in ONE_MICRO_BATCH_LEFT and engine.managed_gradient_accumulation()
        if self._backwards > 1 and keeps_last:
            raise ConflictingSettingsError(
                f"a second backward pass before the step: ZeRO-{engine.zero_optimization_stage()} would drop the "
                'gradients of the first. Give DeepSpeedStrategy(config={..., "managed_gradient_accumulation": False}), '
                "or train with automatic optimization and accumulate_grad_batches"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Count from the start."""
        self._backwards = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note where an epoch whose length nobody knew has ended."""
        self._batches = trainer.fit_loop.batch_idx + 1

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise if the epoch before has ended within a step of DeepSpeed's; a training that ends there has none after.

        Raises:
            ConflictingSettingsError: If so.
        """
        batches, self._batches = self._batches, 0
        if _engine(trainer) is not None and pl_module.automatic_optimization and _steps_ours(trainer):
            _refuse_rest(batches, trainer.accumulate_grad_batches)


def _steps_ours(trainer: Any) -> bool:
    return any(isinstance(innermost(one), LayerwiseOptimizer) for one in trainer.optimizers)


def guard_trainers(optimizer: Any = None) -> list[Any]:
    """Give Trainers a `WindowGuard`, unless they have one; return those that had none.

    Args:
        optimizer: Of which Trainers have it; by default those are guarded that may be about to get one that is made
            now: the Trainer that fits, or where none does those that have not begun. Their guards leave them if it was
            not for them.
    """
    if Callback is object:
        return []
    living = list(living_trainers())
    if optimizer is not None:
        chosen = [one for one in living if any(innermost(other) is optimizer for other in one.optimizers)]
    else:
        chosen = [one for one in living if _status(one) == "running"]
        chosen = chosen or [one for one in living if _status(one) == "initializing"]
    unguarded = [one for one in chosen if not any(isinstance(c, WindowGuard) for c in one.callbacks)]
    for trainer in unguarded:
        trainer.callbacks.append(WindowGuard())
    return unguarded


def _status(trainer: Any) -> str | None:
    return getattr(getattr(trainer, "state", None), "status", None)
