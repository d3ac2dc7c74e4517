"""DeepSpeed: what ZeRO does with gradients between backward and step, for statistics of group gradients.

    wrapper                          a rank keeps between micro-batches     the step's gradient is divided by
    DeepSpeedZeroOptimizer (1)       whole gradients                        loss scale · clip
    DeepSpeedZeroOptimizer (2)       its partition                          loss scale · clip
    BF16_Optimizer (1)               whole gradients, fp32                  clip
    DeepSpeedZeroOptimizer_Stage3    its slice of every layer               loss scale · clip

Stage 0 leaves gradients whole and needs no description. What `zero_grad()` of engine or wrapper drops between
micro-batches, ZeRO-1 shows by the parameters' gradients, BF16_Optimizer and ZeRO-3 by their own counts; ZeRO-2, and
ZeRO-1 with CPU offload, drop nothing then. Read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from trustratio.optimizers.gradient_statistics.norms import StatisticsError
from trustratio.optimizers.sharding.gradient_flow import Destination, GradientFlow

from .partitions import slices_of_layer, slices_of_view

__all__ = ["describe_gradient_flow", "global_gradient_norm"]


def describe_gradient_flow(wrapper: DeepSpeedOptimizer) -> GradientFlow | None:
    """Return where a wrapper sends gradients and how it scales them; None if it leaves them whole.

    Raises:
        StatisticsError: At the step, if the wrapper's scale cannot be known.
    """
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        destinations = _into_sub_groups(wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        partitions = wrapper.single_partition_of_fp32_groups
        groups = zip(partitions, wrapper.bit16_groups, wrapper.real_dp_process_group, strict=True)
        shows = not (wrapper.partition_gradients or wrapper.cpu_offload)
        holds = _has_gradient if shows else None
        destinations = _into_partitions(groups, kept_whole=not wrapper.partition_gradients, holds=holds)
    elif isinstance(wrapper, BF16_Optimizer):
        partitions = wrapper.fp32_groups_flat_partition
        groups = zip(partitions, wrapper.bf16_groups, wrapper.real_dp_process_group, strict=True)
        destinations = _into_partitions(groups, kept_whole=True, holds=partial(_has_summed, weakref.ref(wrapper)))
    else:
        return None
    reference = weakref.ref(wrapper)
    return GradientFlow(
        destinations, lambda: _loss_scale(reference()), lambda in_backward: _factor(reference(), in_backward)
    )


def _into_partitions(
    groups: Iterable[tuple[torch.Tensor, list[torch.nn.Parameter], dist.ProcessGroup]],
    *,
    kept_whole: bool,
    holds: Callable[[torch.Tensor, int, int], bool] | None,
) -> dict[int, Destination]:
    """ZeRO-1/2: into the partition of a group; `holds` is asked with a parameter, its group and its place in there."""
    return {
        id(parameter): Destination(
            process_group,
            partition,
            tuple(slices_of_view(parameter, partition)),
            kept_whole,
            holds=None if holds is None else partial(holds, parameter, group, place),
        )
        for group, (partition, parameters, process_group) in enumerate(groups)
        for place, parameter in enumerate(parameters)
    }


def _has_gradient(parameter: torch.Tensor, group: int, place: int) -> bool:
    return parameter.grad is not None or getattr(parameter, "grad_accum", None) is not None


def _has_summed(wrapper: weakref.ref[Any], parameter: torch.Tensor, group: int, place: int) -> bool:
    return bool(wrapper().fp32_groups_has_gradients[group][place])  # type: ignore[union-attr]


def _into_sub_groups(wrapper: DeepSpeedZeroOptimizer_Stage3) -> dict[int, Destination]:
    """ZeRO-3: into the partition of a sub-group."""
    destinations = {}
    adds_to: Any = weakref.ref(wrapper)
    for number, (partition, parameters) in enumerate(
        zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
    ):
        process_group = wrapper.sub_group_process_groups[number]
        for parameter in parameters:
            slices = slices_of_layer(wrapper, parameter, dist.get_world_size(process_group))
            destinations[id(parameter)] = Destination(
                process_group, partition, tuple(slices), kept_whole=False, holds=lambda: adds_to().micro_step_id > 0
            )
    return destinations


def _loss_scale(wrapper: Any) -> float:
    return 1.0 if isinstance(wrapper, BF16_Optimizer) else float(wrapper.loss_scale)


def global_gradient_norm(wrapper: Any) -> torch.Tensor:
    """The norm of the whole model's gradient before clipping, as the wrapper reports it: a number or a tensor."""
    norm = wrapper._global_grad_norm
    if isinstance(norm, torch.Tensor):
        return norm.to(torch.float64)
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def _factor(wrapper: Any, in_backward: float) -> float | torch.Tensor:
    """What the averaged gradient was multiplied by.

    ZeRO divides by the loss scale of now, which is not the one of backward in a step that has just raised it; ZeRO-1/2
    reports the norm by the one, ZeRO-3 by the other.
    """
    if getattr(wrapper, "torch_autocast_gradscaler", None):
        raise StatisticsError(
            "torch's GradScaler inside ZeRO does not tell the scale of the gradients: use bf16, or the fp16 section of "
            "the DeepSpeed config"
        )
    now = _loss_scale(wrapper)
    if not wrapper.clip_grad > 0:
        return 1 / now
    norm = global_gradient_norm(wrapper)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        norm = norm * (in_backward / now)
    return 1 / (now * ((norm + 1e-6) / wrapper.clip_grad).clamp(min=1.0))
