"""A DeepSpeed run's state in one file that another number of ranks, or another ZeRO stage, continues from.

    save_engine_state(engine, "state.safetensors")      # on all ranks, e.g. four under ZeRO-3
    load_engine_state(engine, "state.safetensors")      # on all ranks, e.g. three, in a new engine

The optimizer's part goes through the consolidated state; the rest is a few numbers of the engine.
Read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from trustratio.optimizers.sharding.layout import listing

from .consolidated import load_optimizer_state, save_optimizer_state

__all__ = ["load_engine_state", "save_engine_state"]

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save_engine_state(engine: DeepSpeedEngine, path: str | os.PathLike[str], *, extra: Any = None) -> None:
    """Write trained weights, optimizer state, group options, scheduler, step counters and loss scale to one file.

    Call it on all ranks after `engine.step()` at the end of an accumulation. Frozen parameters and buffers are not in
    the file; a warning names them.

    Args:
        engine: What `deepspeed.initialize` returned, with an optimizer of this package.
        path: The file, which rank 0 writes; one that was there is replaced when the new one is complete on disk.
        extra: Anything plain, as in `save_optimizer_state`; `load_engine_state` returns it.

    Raises:
        OptimizerStateError: As `save_optimizer_state`.
        ValueError: In the middle of an accumulation.
        TypeError: If the scheduler's state or `extra` is not plain.
    """
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise ValueError(
            f"{engine.micro_steps % engine.gradient_accumulation_steps()} of {engine.gradient_accumulation_steps()} "
            "micro-batches are accumulated: save after the last one, their gradients are not part of the file"
        )
    _warn_of_the_rest(engine)
    scheduler = engine.lr_scheduler
    state = {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "loss_scale": {
            name: getattr(kept, name) for kept in _loss_scale(engine) for name in LOSS_SCALE if hasattr(kept, name)
        },
        "extra": extra,
    }
    save_optimizer_state(engine, path, model=engine.module, extra=state)


def load_engine_state(
    engine: DeepSpeedEngine, path: str | os.PathLike[str], *, strict: bool = True, verify: bool = True
) -> Any:
    """Continue from a file of `save_engine_state`, with any number of ranks and any ZeRO stage. Call it on all ranks.

    Group options are restored; after them the scheduler, which sets its `lr` at its next step. A scheduler that the
    engine does not have, or a loss scale, is left out.

    Args:
        engine: A new engine for the same model and optimizer.
        path: The file; every rank reads it.
        strict: As in `load_optimizer_state`.
        verify: As in `load_optimizer_state`.

    Returns:
        What was given as `extra`.

    Raises:
        OptimizerStateError: On all ranks, before anything is changed, if the file is of another model or optimizer.
    """
    _warn_of_the_rest(engine)
    state = load_optimizer_state(engine, path, model=engine.module, strict=strict, verify=verify)
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    if engine.lr_scheduler is not None and state["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    for target in _loss_scale(engine):
        for name, value in state["loss_scale"].items():
            if hasattr(target, name):
                setattr(target, name, value)
    return state["extra"]


def _loss_scale(engine: DeepSpeedEngine) -> list[Any]:
    """The object that keeps the loss scale, under the name that the wrapper gives it."""
    named = (getattr(engine.optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
    return [kept for kept in named if kept is not None]


def _warn_of_the_rest(engine: DeepSpeedEngine) -> None:
    module: torch.nn.Module = engine.module
    saved = module.state_dict(keep_vars=True)
    rest = [name for name, value in saved.items() if isinstance(value, torch.Tensor) and not value.requires_grad]
    if rest:
        warnings.warn(f"not part of the engine's state file, so restore them yourself: {listing(rest)}", stacklevel=3)
