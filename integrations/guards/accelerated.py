"""What accelerate makes of a program: how many processes it counts, in which engine it trains, who steps schedulers.

Read from accelerate 1.15.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, DistributedType
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.living import living

from .first_step import check_once
from .replaced import ConflictingSettingsError, innermost, refuse_replacement

__all__ = ["check_accelerate"]


def check_accelerate(optimizer: Any) -> None:
    """Raise if accelerate would train the optimizer otherwise than the program reads.

    Raises:
        ReplacedOptimizerError: If another optimizer has taken the place of ours.
        ConflictingSettingsError: If accelerate counts other processes than there are, leaves out DeepSpeed, or would
            step a scheduler of ours several times per update.
    """
    refuse_replacement(optimizer)
    for wrapper in living(AcceleratedOptimizer, AcceleratedScheduler):
        if isinstance(wrapper, AcceleratedScheduler):
            _refuse_steps_per_process(optimizer, wrapper)
        elif isinstance(optimizer, LayerwiseOptimizer) and innermost(wrapper) is optimizer:
            _refuse_other_engine(wrapper.accelerator_state)
            _refuse_other_processes(optimizer, wrapper.accelerator_state)


def _refuse_other_engine(state: AcceleratorState) -> None:
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and state.distributed_type != DistributedType.DEEPSPEED:
        raise ConflictingSettingsError(
            "a DeepSpeed config was given, but accelerate trains without DeepSpeed "
            f"({state.distributed_type.value}): that is what ACCELERATE_USE_CPU=true, `use_cpu: true` of accelerate "
            "launch and Accelerator(cpu=True) do. Remove them (DS_ACCELERATOR=cpu keeps DeepSpeed from a GPU), or "
            "remove the DeepSpeed config"
        )


def _refuse_other_processes(optimizer: LayerwiseOptimizer, state: AcceleratorState) -> None:
    processes = _processes()
    averaged_by_hand = getattr(optimizer, "data_parallel_group", None) is not None
    if state.num_processes == processes or averaged_by_hand:
        return
    raise ConflictingSettingsError(
        f"accelerate counts {state.num_processes} process, but {processes} train: each of them would go through all of "
        "the data, as if it were alone. On a machine without GPU write TrainingArguments(use_cpu=True), "
        "Accelerator(cpu=True), or before an Accelerator with DeepSpeed count_ranks_on_cpu() of "
        "trustratio.integrations.accelerate. With GPUs start the processes with torchrun, deepspeed or accelerate "
        "launch, which say LOCAL_RANK"
    )


def _processes() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    # Those that torchrun started: without a process group each of them trains alone.
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def _refuse_steps_per_process(optimizer: Any, prepared: AcceleratedScheduler) -> None:
    """Raise if a schedule counts updates, and accelerate would step it once per process in each of them."""
    if isinstance(prepared, DeepSpeedSchedulerWrapper) or not prepared.step_with_optimizer or prepared.split_batches:
        return
    processes = AcceleratorState().num_processes
    for scheduler in _with_parts(prepared.scheduler):
        if processes > 1 and getattr(scheduler, "counts_updates", False) and innermost(scheduler) is optimizer:
            raise ConflictingSettingsError(
                f"{type(scheduler).__name__} counts updates, but accelerate steps a prepared scheduler once per "
                f"process, {processes} times per update: the schedule would end after 1/{processes} of the training. "
                "Leave it out of accelerator.prepare, and call scheduler.step() after optimizer.step() `if "
                "accelerator.sync_gradients`"
            )


def _with_parts(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and those that torch's SequentialLR and ChainedScheduler are made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _with_parts(part)


check_once(check_accelerate)
