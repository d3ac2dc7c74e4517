"""DeepSpeed: model parallelism beside ZeRO, and what it means for an optimizer.

    parallelism                  a layer's sums are added                       what a step does not see
    AutoTP, `mpu=`               over tensor-parallel ranks too, if it is cut   nothing
    pipeline stages              within the stage                               the other stages' layers
    experts (MoE)                over the expert's own data-parallel ranks      experts of other ranks
    sequence parallelism, hpZ    over the ranks among which ZeRO cuts           nothing

Read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size

from trustratio.optimizers.sharding.layout import Layout, LayoutError
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.observed import held_by_wrappers
from trustratio.optimizers.sharding.refusals import refuse_model_norm, refuse_statistics
from trustratio.optimizers.sharding.tensor_parallel import TensorParallel, layout_of_parameters, refuse_optimizer

from .internals import expert_rank, expert_ranks, ranks_per_sample, sequence_ranks

__all__ = [
    "CLIPPING",
    "PART_OF_MODEL",
    "find_engine",
    "layer_names",
    "refuse_model_parallelism",
    "refuse_partitions_over",
    "steps_with_a_part",
    "unwrapped_layout",
]

CLIPPING = "gradient_clipping in the DeepSpeed config"
PART_OF_MODEL = "steps with a part of the model, whose other layers are on other ranks: use ZeRO-1 without experts"
OF_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")


def find_engine(optimizer: Any) -> DeepSpeedEngine | None:
    """The engine that steps this optimizer, directly or through a wrapper; found as the wrapper is."""
    inner = held_by_wrappers(optimizer)
    return next((engine for engine in living(DeepSpeedEngine) if _steps_with(engine, inner)), None)


def _steps_with(engine: DeepSpeedEngine, optimizer: Any) -> bool:
    # An engine under construction, or one that was destroyed, lacks these attributes.
    inner = vars(engine).get("optimizer")
    return inner is not None and (inner is optimizer or getattr(inner, "optimizer", None) is optimizer)


def steps_with_a_part(mpu: Any, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether there are layers that only other ranks have: of other pipeline stages, or experts."""
    return _pipeline_stages(mpu) > 1 or _distributed_experts(parameters)


def _pipeline_stages(mpu: Any) -> int:
    """How many stages the model is cut into."""
    return bwc_pipeline_parallel_world_size(mpu)


def unwrapped_layout(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
    """The layout under ZeRO-0, which steps the model's own parameters; None without model parallelism."""
    engine = find_engine(optimizer)
    if engine is None:
        return None
    parallel = TensorParallel(engine.mpu)
    parameters = [tensor for _, tensor in tensors]
    plain = _pipeline_stages(engine.mpu) == 1 and parallel.size() == 1 and ranks_per_sample(engine) == 1
    if plain and not any(map(is_moe_param, parameters)):
        return None
    kind = "DeepSpeed ZeRO-0"
    refuse_model_parallelism(kind, optimizer, engine.mpu, parameters)
    options: dict[str, Any] = {}
    if steps_with_a_part(engine.mpu, parameters):
        options = {"clips_with": CLIPPING, "gradient_norm": partial(refuse_model_norm, f"{kind} {PART_OF_MODEL}")}
    name_of = layer_names(optimizer, engine.param_names)
    return layout_of_parameters(kind, optimizer, tensors, parallel, name_of, **options)


# Experts ------------------------------------------------------------------------------------------------------------


def layer_names(optimizer: Any, module_names: Mapping[torch.Tensor, str]) -> Callable[[torch.Tensor], str | None]:
    """Return a function from a parameter to its layer's name.

    An expert is named by its number among all experts, as in DeepSpeed's checkpoints: within the module every rank
    counts its own from zero, and experts of different ranks would bear one name.

    Args:
        optimizer: Knows the names that parameters were given with.
        module_names: The names in the model, for others.
    """
    experts: dict[str, int] = {}
    for name in module_names.values():
        if match := OF_EXPERT.fullmatch(name):
            experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)

    def name_of(parameter: torch.Tensor) -> str | None:
        name = optimizer.parameter_name(parameter) or module_names.get(parameter)
        match = OF_EXPERT.fullmatch(name) if name and is_moe_param(parameter) else None
        in_module = OF_EXPERT.fullmatch(module_names.get(parameter, ""))
        if match is None or in_module is None:
            return name
        first = expert_rank(parameter) * experts[in_module[1]]
        return f"{match[1]}{first + int(match[2])}{match[3]}"

    return name_of


def _distributed_experts(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether any parameter belongs to an expert that gets the samples of several ranks."""
    return any(expert_ranks(parameter) > 1 for parameter in parameters if is_moe_param(parameter))


# Refusals -----------------------------------------------------------------------------------------------------------


def refuse_model_parallelism(kind: str, optimizer: Any, mpu: Any, parameters: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if the optimizer's statistics of group gradients do not exist in this set-up."""
    refuse_optimizer(kind, optimizer, parameters)
    if optimizer.statistics is not None:
        problem = _why_not_single_gradients(mpu, parameters)
        described = None if problem is None else f"{problem} ({kind})"
        refuse_statistics(optimizer, described, "data parallelism (DDP or ZeRO) alone")


def _why_not_single_gradients(mpu: Any, parameters: Iterable[torch.Tensor]) -> str | None:
    """Why a rank does not see the gradient of each of its micro-batches; None if it does."""
    if sequence_ranks() > 1:
        return "under sequence parallelism a rank has that of a part of each sample"
    if _pipeline_stages(mpu) > 1:
        return "a pipeline stage sees only its own layers, and of a tied layer a part of the gradient"
    if _distributed_experts(parameters):
        return "an expert's gradient on one rank is made of the samples of several"
    return None


def refuse_partitions_over(
    tensor_parallel_group: dist.ProcessGroup | None, partitioned_over: dist.ProcessGroup | None, name: str
) -> None:
    """Raise LayoutError if ZeRO has spread a part of a layer over ranks that have other parts of it."""
    if tensor_parallel_group is None or partitioned_over is None:
        return
    others = set(dist.get_process_group_ranks(tensor_parallel_group)) - {dist.get_rank()}
    if others & set(dist.get_process_group_ranks(partitioned_over)):
        raise LayoutError(
            f"layer {name} is cut by tensor parallelism, and ZeRO has partitioned this rank's part over ranks that "
            "have other parts: build the model outside deepspeed.zero.Init"
        )
