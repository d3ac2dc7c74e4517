"""What accelerate makes of a program: how many processes it counts, in which engine it trains, who steps schedulers.

What accelerate does not document is read in this file alone, and the same since accelerate 1.10: `_models`,
`_optimizers`, `_schedulers` and `_dataloaders` of an Accelerator.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import DistributedType
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.internals import Internals
from trustratio.optimizers.sharding.living import living

from .replaced import ConflictingSettingsError, innermost
from .schedules import counting_updates

__all__ = ["refuse_other_set_up"]

INTERNALS = Internals("accelerate", "accelerate", "1.10.0 to 1.15.0")

AVERAGING = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)


def refuse_other_set_up(optimizer: Any) -> None:
    """Raise if an Accelerator that has prepared the optimizer would train it otherwise than the program reads.

    Raises:
        ConflictingSettingsError: If accelerate counts other processes than there are, leaves out DeepSpeed, or would
            step a scheduler of ours several times per update.
    """
    for accelerator in _living_accelerators():
        for scheduler in INTERNALS.read(accelerator, "_schedulers"):
            _refuse_steps_per_process(accelerator, scheduler, optimizer)
        if isinstance(optimizer, LayerwiseOptimizer) and any(
            innermost(prepared) is optimizer for prepared in INTERNALS.read(accelerator, "_optimizers")
        ):
            _refuse_other_engine(accelerator)
            _refuse_other_processes(accelerator, optimizer)


def _living_accelerators() -> Iterator[Accelerator]:
    """Yield those that prepare: not one whose construction has failed, nor one whose state accelerate has forgotten.

    A traceback that is kept keeps the first kind alive. TrainingArguments, for one, makes accelerate forget.
    """
    for accelerator in living(Accelerator):
        state = vars(accelerator).get("state")
        if "rng_types" in vars(accelerator) and state is not None and vars(state):
            yield accelerator


def _refuse_other_engine(accelerator: Accelerator) -> None:
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConflictingSettingsError(
            f"a DeepSpeed config was given, but accelerate trains without DeepSpeed ({accelerator.distributed_type}): "
            "that is what ACCELERATE_USE_CPU=true, `use_cpu: true` of accelerate launch and Accelerator(cpu=True) do. "
            "Remove them (DS_ACCELERATOR=cpu keeps DeepSpeed from a GPU), or remove the DeepSpeed config"
        )


def _refuse_other_processes(accelerator: Accelerator, optimizer: LayerwiseOptimizer) -> None:
    processes = _processes()
    if accelerator.num_processes == processes:
        return
    averaged = accelerator.distributed_type == DistributedType.DEEPSPEED or any(
        isinstance(module, AVERAGING) for model in INTERNALS.read(accelerator, "_models") for module in model.modules()
    )
    if INTERNALS.read(accelerator, "_dataloaders"):
        consequence = "each of them would read all of the data, as if it were alone"
    elif averaged or not INTERNALS.read(accelerator, "_models") or optimizer.data_parallel_group is not None:
        return  # the program itself sees to what accelerate cannot
    else:
        consequence = "nobody averages their gradients, so that each of them would train a model of its own"
    raise ConflictingSettingsError(
        f"accelerate counts {accelerator.num_processes} process, but {processes} train: {consequence}. On a machine "
        "without GPU write TrainingArguments(use_cpu=True), Accelerator(cpu=True), or, before an Accelerator with "
        "DeepSpeed, count_ranks_on_cpu() of trustratio.integrations.accelerate. With GPUs start the processes with "
        "torchrun, deepspeed or accelerate launch, which set LOCAL_RANK"
    )


def _processes() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    # Those that torchrun started: without a process group each of them trains alone.
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def _refuse_steps_per_process(accelerator: Accelerator, prepared: AcceleratedScheduler, optimizer: Any) -> None:
    """Raise if a schedule counts updates, and accelerate would step it once per process in each of them."""
    if isinstance(prepared, DeepSpeedSchedulerWrapper) or not prepared.step_with_optimizer or prepared.split_batches:
        return
    processes = accelerator.num_processes
    for scheduler in counting_updates(prepared.scheduler, optimizer):
        if processes > 1:
            raise ConflictingSettingsError(
                f"{type(scheduler).__name__} counts updates, but accelerate steps a prepared scheduler once per "
                f"process, {processes} times per update: the schedule would end after 1/{processes} of the training. "
                "Leave it out of accelerator.prepare, and call scheduler.step() after optimizer.step() `if "
                "accelerator.sync_gradients`"
            )
