"""DeepSpeed: all that is read of it and that it does not document, with the versions that have it.

    of                      what                                                                        since
    engine                  seq_data_parallel_group, sequence_parallel_size                             0.16
    ZeRO-1, 2               single_partition_of_fp32_groups, bit16_groups, real_dp_process_group,       0.16
                            partition_gradients, cpu_offload, loss_scaler, custom_loss_scaler,
                            update_lp_params
    BF16_Optimizer          fp32_groups_flat_partition, bf16_groups, real_dp_process_group,             0.16
                            fp32_groups_has_gradients, update_lp_params
    ZeRO-3                  fp32_partitioned_groups_flat, fp16_groups, sub_group_to_group_id,           0.16
                            grad_position, get_param_id, micro_step_id,
                            _reassign_or_swap_out_partitioned_parameters, persistent_parameters
                            sub_group_process_groups                                                    after 0.19.0
    ZeRO-1, 2, 3            _global_grad_norm, clip_grad                                                0.16
                            torch_autocast_gradscaler; before it there was no such scaler               0.17
    FP16_UnfusedOptimizer   fp32_groups, fp16_groups                                                    0.16
    deepspeed.utils.groups  _get_expert_parallel_rank, _get_expert_parallel_world_size,                 0.16
                            _get_sequence_parallel_world_size

Since that version; `INTERNALS` names the one with which tests pass. That attributes were there before is no promise.
Versions before 0.16 were not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.internals import Internals
from trustratio.optimizers.sharding.layout import LayoutError
from trustratio.optimizers.sharding.local_tensors import summable

INTERNALS = Internals("DeepSpeed", "deepspeed", "0.19.8")

try:
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups as process_groups
except ImportError as error:
    raise ImportError(INTERNALS.lacks(error.name or str(error))) from error

__all__ = [
    "INTERNALS",
    "BF16_Optimizer",
    "DeepSpeedOptimizer",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "FP16_UnfusedOptimizer",
    "FlatTensor",
    "adds_gradients",
    "data_parallel_group",
    "expert_rank",
    "expert_ranks",
    "flat_tensors",
    "global_norm",
    "has_summed",
    "keeps_whole_gradients",
    "largest_norm",
    "loss_scale_just_grew",
    "master_copies",
    "publish",
    "ranks_per_sample",
    "scales_by_torch",
    "sequence_ranks",
    "shows_gradients",
    "slice_in_partition",
    "supported_optimizers",
]


@dataclass(frozen=True)
class FlatTensor:
    """One flat fp32 tensor with which ZeRO has its optimizer stepped.

    Attributes:
        partition: This rank's tensor.
        parameters: The model's, with DeepSpeed's attributes, of which it holds parts.
        process_group: The ranks that hold the other parts.
        group: The optimizer's parameter group that it belongs to.
    """

    partition: torch.Tensor
    parameters: list[Any]
    process_group: dist.ProcessGroup
    group: int


def flat_tensors(wrapper: DeepSpeedOptimizer) -> list[FlatTensor]:
    """Those of ZeRO-1, 2 and 3, in the order in which they are stepped."""
    read = INTERNALS.read
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        partitions, parameters = read(wrapper, "fp32_partitioned_groups_flat"), read(wrapper, "fp16_groups")
        ranks = read(wrapper, "sub_group_process_groups")
        groups = [read(wrapper, "sub_group_to_group_id")[number] for number in range(len(partitions))]
    else:
        bf16 = isinstance(wrapper, BF16_Optimizer)
        partitions = read(wrapper, "fp32_groups_flat_partition" if bf16 else "single_partition_of_fp32_groups")
        parameters = read(wrapper, "bf16_groups" if bf16 else "bit16_groups")
        ranks, groups = read(wrapper, "real_dp_process_group"), list(range(len(partitions)))
    return [FlatTensor(*members) for members in zip(partitions, parameters, ranks, groups, strict=True)]


def keeps_whole_gradients(wrapper: DeepSpeedOptimizer) -> bool:
    """Whether a rank has the whole gradients of its micro-batches until the step: ZeRO-1."""
    return isinstance(wrapper, BF16_Optimizer) or not INTERNALS.read(wrapper, "partition_gradients")


def shows_gradients(wrapper: DeepSpeedZeroOptimizer) -> bool:
    """Whether the gradients of earlier micro-batches are on the model's parameters: ZeRO-1 without CPU offload."""
    return keeps_whole_gradients(wrapper) and not INTERNALS.read(wrapper, "cpu_offload")


def has_summed(wrapper: Any, group: int, place: int) -> bool:
    """Whether BF16_Optimizer has a gradient of an earlier micro-batch for the parameter at this place of a group."""
    return bool(INTERNALS.read(wrapper, "fp32_groups_has_gradients")[group][place])


def adds_gradients(wrapper: Any) -> bool:
    """Whether ZeRO-3 will add the next micro-batch's gradients to what it has."""
    return INTERNALS.read(wrapper, "micro_step_id") > 0


def slice_in_partition(wrapper: DeepSpeedZeroOptimizer_Stage3, parameter: torch.Tensor) -> tuple[int, int]:
    """Where a rank's slice of the parameter begins in its partition under ZeRO-3, and its length with padding."""
    positions = INTERNALS.read(wrapper, "grad_position")
    _, start, length = positions[INTERNALS.read(wrapper, "get_param_id")(parameter)]
    return start, length


def master_copies(wrapper: FP16_UnfusedOptimizer) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter]]:
    """Yield (fp32 copy, 16-bit parameter) of stage 0."""
    groups = zip(INTERNALS.read(wrapper, "fp32_groups"), INTERNALS.read(wrapper, "fp16_groups"), strict=True)
    for masters, parameters in groups:
        yield from zip(masters, parameters, strict=True)


def publish(wrapper: DeepSpeedOptimizer) -> None:
    """Bring the model's parameters up to date after the fp32 weights were changed between steps."""
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        persistent = INTERNALS.read(wrapper, "persistent_parameters")
        # Within a checkpoint they are partitioned like the others, and have to stay so.
        is_between_steps = all(one.ds_status is ZeroParamStatus.AVAILABLE for one in persistent)
        wrapper.checkpoint_event_prologue()
        for sub_group in range(len(flat_tensors(wrapper))):
            INTERNALS.read(wrapper, "_reassign_or_swap_out_partitioned_parameters")(sub_group)
        if is_between_steps:
            wrapper.checkpoint_event_epilogue()
    elif isinstance(wrapper, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        INTERNALS.read(wrapper, "update_lp_params")()
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        for master, parameter in master_copies(wrapper):
            parameter.data.copy_(master)
    else:
        raise LayoutError(
            f"{type(wrapper).__name__} keeps weights of its own that are changed in its steps alone: use ZeRO stages "
            "1, 2 or 3, BF16_Optimizer or FP16_UnfusedOptimizer"
        )


def supported_optimizers() -> list[type[torch.optim.Optimizer]]:
    """The list that DeepSpeed compares an optimizer's exact type with."""
    return INTERNALS.read(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS")


# Scales of the gradient ---------------------------------------------------------------------------------------------


def global_norm(wrapper: DeepSpeedOptimizer) -> torch.Tensor | None:
    """The gradient's norm that the wrapper reports for this step, before clipping; None if it was told not to."""
    norm = INTERNALS.read(wrapper, "_global_grad_norm")
    if norm is None:
        return None
    if isinstance(norm, torch.Tensor):
        return summable(norm).to(torch.float64)
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def largest_norm(wrapper: DeepSpeedOptimizer) -> float:
    """The norm to which the wrapper clips gradients, 0 if it does not."""
    return float(INTERNALS.read(wrapper, "clip_grad"))


def scales_by_torch(wrapper: DeepSpeedOptimizer) -> bool:
    """Whether torch's GradScaler, which tells nobody, holds the loss scale."""
    return getattr(wrapper, "torch_autocast_gradscaler", None) is not None


def loss_scale_just_grew(wrapper: DeepSpeedZeroOptimizer) -> bool:
    """Whether this step, which was not skipped, has raised the dynamic loss scale."""
    scaler = INTERNALS.read(wrapper, "loss_scaler")
    if INTERNALS.read(wrapper, "custom_loss_scaler") or not isinstance(scaler, DynamicLossScaler):
        return False
    stable_steps = scaler.cur_iter - scaler.last_overflow_iter - 2  # as the scaler saw it before it counted this step
    return stable_steps > 0 and stable_steps % scaler.scale_window == 0


# Process groups -----------------------------------------------------------------------------------------------------


def data_parallel_group(engine: Any) -> dist.ProcessGroup:
    """The ranks whose gradients are averaged, those with other parts of the same samples among them."""
    return INTERNALS.read(engine, "seq_data_parallel_group")


def ranks_per_sample(engine: Any) -> int:
    """Over how many ranks an engine spreads each sample."""
    return INTERNALS.read(engine, "sequence_parallel_size")


def expert_rank(parameter: Any) -> int:
    """Return which one this rank is of those over which the experts of this expert's parameter are spread."""
    return INTERNALS.read(process_groups, "_get_expert_parallel_rank")(parameter.group_name)


def expert_ranks(parameter: Any) -> int:
    """Over how many ranks they are spread."""
    return INTERNALS.read(process_groups, "_get_expert_parallel_world_size")(parameter.group_name)


def sequence_ranks() -> int:
    """Over how many ranks each sample is spread."""
    return INTERNALS.read(process_groups, "_get_sequence_parallel_world_size")()
