"""Tell the wrapper of a loop of one's own that the batch of the next updates is another."""

from __future__ import annotations

from typing import Any

from .global_batch import plan_batch


def set_global_batch(wrapper: Any, batch: int, micro_batch: int | None = None) -> int:
    """Have the updates that follow take `batch` samples over all ranks, in micro-batches of the same size as before.

    Call it between two updates, on all ranks alike, and then run as many micro-batches per update as it returns.

    Args:
        wrapper: a DeepSpeed engine, or an `accelerate.Accelerator`, with or without DeepSpeed.
        batch: samples per update; a multiple of micro-batch x ranks.
        micro_batch: samples per rank and pass; needed by an Accelerator without DeepSpeed, which does not know it.

    Returns:
        The micro-batches per rank and update.

    Raises:
        RecipeError: micro-batch x ranks does not divide the batch; the nearest possible ones are named.
        ValueError: in the middle of an update, or the micro-batch is not known.
        TypeError: another wrapper. The Trainer is one: it counts micro-batches through an epoch, and would step in the
            middle of an update after a change; see recipes/bert_trainer.py for a Trainer whose updates differ.
    """
    if hasattr(wrapper, "set_train_batch_size"):
        return _of_engine(wrapper, batch, micro_batch)
    if hasattr(wrapper, "gradient_state"):
        return _of_accelerator(wrapper, batch, micro_batch)
    raise TypeError(
        f"set_global_batch takes a DeepSpeed engine or an accelerate.Accelerator, got {type(wrapper).__name__}; a "
        "Trainer counts micro-batches through an epoch and cannot change their number in it"
    )


def _of_engine(engine: Any, batch: int, micro_batch: int | None) -> int:
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise ValueError(_MIDDLE)
    accumulation = _set_engine(engine, batch, micro_batch)
    # Whole updates by the new number as well: the next boundary is counted from here.
    engine.micro_steps = engine.global_steps * accumulation
    return accumulation


def _set_engine(engine: Any, batch: int, micro_batch: int | None) -> int:
    micro = engine.train_micro_batch_size_per_gpu()
    if micro_batch not in (None, micro):
        raise ValueError(f"micro_batch={micro_batch} is not the engine's, {micro}, which stays: leave it out")
    plan = plan_batch(batch, micro, engine.dp_world_size)
    engine.set_train_batch_size(batch)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = plan.accumulation
    return plan.accumulation


def _of_accelerator(accelerator: Any, batch: int, micro_batch: int | None) -> int:
    if accelerator.step % accelerator.gradient_accumulation_steps:
        raise ValueError(_MIDDLE)
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)  # with DeepSpeed alone
    if wrapped is not None:
        accumulation = _set_engine(wrapped.engine, batch, micro_batch)
    elif micro_batch is None:
        raise ValueError("set_global_batch needs micro_batch, the samples per rank and pass: this Accelerator has none")
    else:
        accumulation = plan_batch(batch, micro_batch, accelerator.num_processes).accumulation
    accelerator.gradient_accumulation_steps = accumulation
    accelerator.step = 0  # it counts micro-batches, of which every so many are an update
    return accumulation


_MIDDLE = "set_global_batch is for between two updates, and some micro-batches of one have been run: finish it first"
