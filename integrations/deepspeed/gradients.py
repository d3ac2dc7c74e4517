"""DeepSpeed: what ZeRO does with gradients between backward and step, for statistics of group gradients.

    wrapper                          a rank keeps between micro-batches     the step's gradient is divided by
    DeepSpeedZeroOptimizer (1)       whole gradients                        loss scale · clip
    DeepSpeedZeroOptimizer (2)       its partition                          loss scale · clip
    BF16_Optimizer (1)               whole gradients, fp32                  clip
    DeepSpeedZeroOptimizer_Stage3    its slice of every layer               loss scale · clip

Stage 0 leaves gradients whole and needs no description. What `zero_grad()` of engine or wrapper drops between
micro-batches, ZeRO-1 shows by the parameters' gradients, BF16_Optimizer and ZeRO-3 by their own counts; ZeRO-2, and
ZeRO-1 with CPU offload, drop nothing then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.gradient_statistics.norms import StatisticsError
from trustratio.optimizers.sharding.gradient_flow import Destination, GradientFlow

from .internals import (
    BF16_Optimizer,
    DeepSpeedOptimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    adds_gradients,
    flat_tensors,
    global_norm,
    has_summed,
    keeps_whole_gradients,
    largest_norm,
    scales_by_torch,
    shows_gradients,
)
from .partitions import slices_of_layer, slices_of_view

__all__ = ["describe_gradient_flow"]


def describe_gradient_flow(wrapper: DeepSpeedOptimizer) -> GradientFlow | None:
    """Return where a wrapper sends gradients and how it scales them; None if it leaves them whole.

    Raises:
        StatisticsError: At the step, if the wrapper's scale cannot be known.
    """
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        destinations = _into_sub_groups(wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        destinations = _into_partitions(wrapper, _has_gradient if shows_gradients(wrapper) else None)
    elif isinstance(wrapper, BF16_Optimizer):
        destinations = _into_partitions(wrapper, partial(_has_summed, weakref.ref(wrapper)))
    else:
        return None
    reference = weakref.ref(wrapper)
    return GradientFlow(
        destinations, lambda: _loss_scale(reference()), lambda in_backward: _factor(reference(), in_backward)
    )


def _into_partitions(
    wrapper: DeepSpeedOptimizer, holds: Callable[[torch.Tensor, int, int], bool] | None
) -> dict[int, Destination]:
    """ZeRO-1/2: into the partition of a group; `holds` is asked with a parameter, its group and its place in there."""
    kept_whole = keeps_whole_gradients(wrapper)
    return {
        id(parameter): Destination(
            flat.process_group,
            flat.partition,
            tuple(slices_of_view(parameter, flat.partition)),
            kept_whole,
            holds=None if holds is None else partial(holds, parameter, flat.group, place),
        )
        for flat in flat_tensors(wrapper)
        for place, parameter in enumerate(flat.parameters)
    }


def _has_gradient(parameter: torch.Tensor, group: int, place: int) -> bool:
    return parameter.grad is not None or getattr(parameter, "grad_accum", None) is not None


def _has_summed(wrapper: weakref.ref[Any], parameter: torch.Tensor, group: int, place: int) -> bool:
    return has_summed(wrapper(), group, place)


def _into_sub_groups(wrapper: DeepSpeedZeroOptimizer_Stage3) -> dict[int, Destination]:
    """ZeRO-3: into the partition of a sub-group."""
    destinations = {}
    reference: Any = weakref.ref(wrapper)
    for flat in flat_tensors(wrapper):
        for parameter in flat.parameters:
            slices = slices_of_layer(wrapper, parameter, dist.get_world_size(flat.process_group))
            destinations[id(parameter)] = Destination(
                flat.process_group,
                flat.partition,
                tuple(slices),
                kept_whole=False,
                holds=lambda: adds_gradients(reference()),
            )
    return destinations


def _loss_scale(wrapper: Any) -> float:
    return 1.0 if isinstance(wrapper, BF16_Optimizer) else float(wrapper.loss_scale)


def _factor(wrapper: Any, in_backward: float) -> float | torch.Tensor:
    """What the averaged gradient was multiplied by.

    ZeRO divides by the loss scale of now, which is not the one of backward in a step that has just raised it; ZeRO-1/2
    reports the norm by the one, ZeRO-3 by the other.
    """
    if scales_by_torch(wrapper):
        raise StatisticsError(
            "torch's GradScaler inside ZeRO does not tell the scale of the gradients: use bf16, or the fp16 section of "
            "the DeepSpeed config"
        )
    now = _loss_scale(wrapper)
    clip = largest_norm(wrapper)
    if not clip > 0:
        return 1 / now
    norm = global_norm(wrapper)
    if norm is None:
        raise StatisticsError("ZeRO clips gradients without a norm: set zero_optimization.compute_grad_norm to true")
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        norm = norm * (in_backward / now)
    return 1 / (now * ((norm + 1e-6) / clip).clamp(min=1.0))
