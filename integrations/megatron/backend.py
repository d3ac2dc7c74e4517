"""Megatron: layers cut over tensor-parallel ranks by Megatron's own classes, or by others with the same attributes.

An optimizer stepped with the model's own parameters finds, at the first step, which of them are parts of layers
(`tensor_model_parallel`), along which dimension (`partition_dim`) and over which ranks. The ranks are known

    without a call                  if megatron.core.parallel_state has been initialised
    by `use_mpu(mpu)`               from any object with Megatron's functions, e.g. an older Megatron's `mpu` module

Parameters that are not marked are whole on every tensor-parallel rank and are counted once. `partition_stride` moves
elements between ranks and so changes no sum. A parameter with `shared=True` is a tied layer's copy on another pipeline
stage: it is a layer there too, and takes the same step.

Of megatron-core's own optimizer wrappers the DistributedOptimizer is supported: `megatron_distributed.py`. Its 16-bit
wrapper without it (Float16OptimizerWithFloat16Params) steps whole fp32 copies and is refused. Read from megatron-core
0.16.1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.backends import register_backend
from trustratio.optimizers.sharding.data_parallel import DataParallel
from trustratio.optimizers.sharding.layout import Layout, LayoutError

from ..tensor_parallel import TensorParallel, layout_of_parameters, refuse_optimizer
from .distributed_optimizer import accept, find_wrapper, layout_of_shards, publish_weights

__all__ = ["MegatronBackend", "use_mpu"]

BACKEND = "Megatron tensor parallelism"
PLAIN = (torch.Tensor, torch.nn.Parameter)


def use_mpu(mpu: Any) -> None:
    """Tell which ranks are tensor-, data- and pipeline-parallel; for all optimizers, before their first step.

    Not needed with megatron-core, whose `parallel_state` is found, nor with DeepSpeed's AutoTP or `mpu=`.

    Args:
        mpu: A module or object with `get_tensor_model_parallel_group()` and `get_data_parallel_group()`, which return
            torch process groups, and, if the model has pipeline stages, `get_pipeline_model_parallel_world_size()`.
            None forgets the last one.

    Raises:
        TypeError: If it lacks one of the first two.
    """
    needed = ("get_tensor_model_parallel_group", "get_data_parallel_group")
    lacking = [name for name in needed if mpu is not None and not callable(getattr(mpu, name, None))]
    if lacking:
        raise TypeError(f"an mpu needs the functions {' and '.join(needed)}; {mpu!r} has no {' and no '.join(lacking)}")
    _backend.mpu = mpu


class MegatronBackend:
    """Explains a model's own parameters where Megatron's parallelism is in use."""

    def __init__(self) -> None:
        self.mpu: Any = None

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Make the class pass the check of Megatron's DistributedOptimizer."""
        accept(optimizer_class)

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout under a DistributedOptimizer, or of the model's own parameters where it is cut.

        Raises:
            LayoutError: If another wrapper of Megatron's holds the optimizer, or the optimizer cannot be exact.
        """
        parameters = [tensor for _, tensor in tensors]
        mpu = self._current_mpu()
        wrapper = _distributed_wrapper(optimizer)
        if wrapper is not None:
            return layout_of_shards(wrapper, optimizer, tensors, mpu)
        _refuse_copies(optimizer, parameters)
        if mpu is None or not all(optimizer.was_given(p) and _is_plain(p) for p in parameters):
            return None
        _refuse_statistics(optimizer, mpu)
        parallel = TensorParallel(mpu)
        sees_whole_model = _pipeline_stages(mpu) == _expert_parallel_ranks(mpu) == 1
        if sees_whole_model and parallel.size() == parallel.size(expert=True) == 1:
            return None
        refuse_optimizer(BACKEND, optimizer, parameters)
        options: dict[str, Any] = {}
        if not sees_whole_model:
            options = {"clips_with": "clip_grad in Megatron's own step", "gradient_norm": _refuse_model_norm}
        return layout_of_parameters(BACKEND, optimizer, tensors, parallel, optimizer.parameter_name, **options)

    def publish_weights(self, optimizer: Any) -> None:
        """Bring the model's parameters up to date after the optimizer's own weights were changed between steps."""
        wrapper = _distributed_wrapper(optimizer)
        if wrapper is not None:
            publish_weights(wrapper)

    def data_parallel(self, optimizer: Any) -> DataParallel | None:
        """Return the data-parallel ranks, None where no mpu is known."""
        mpu = self._current_mpu()
        return None if mpu is None else DataParallel(_data_parallel_group(mpu))

    def tensor_parallel_group(self, parameter: torch.Tensor) -> dist.ProcessGroup | None:
        """Return the ranks over which a parameter like this one is cut if it is marked, None if they are not known."""
        mpu = self._current_mpu()
        return None if mpu is None else TensorParallel(mpu).ranks(expert=not getattr(parameter, "allreduce", True))

    def _current_mpu(self) -> Any:
        if self.mpu is not None:
            return self.mpu
        state = sys.modules.get("megatron.core.parallel_state")
        return state if state is not None and state.model_parallel_is_initialized() else None


def _distributed_wrapper(optimizer: Any) -> Any:
    """The DistributedOptimizer around the optimizer. It leaves it none of the parameters that it was given."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return None if tensors and all(map(optimizer.was_given, tensors)) else find_wrapper(optimizer)


def _data_parallel_group(mpu: Any) -> dist.ProcessGroup:
    """The ranks whose gradients are averaged: those of a context-parallel group see parts of the same samples."""
    if getattr(mpu, "__name__", "") == "megatron.core.parallel_state":
        return mpu.get_data_parallel_group(with_context_parallel=True)
    return mpu.get_data_parallel_group()


def _is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter) in PLAIN and not getattr(parameter, "_fsdp_flattened", False)


def _pipeline_stages(mpu: Any) -> int:
    return _ranks(mpu, "get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def _expert_parallel_ranks(mpu: Any) -> int:
    """Over how many ranks experts are spread: each has experts that the others do not have."""
    return _ranks(mpu, "get_expert_model_parallel_world_size")


def _ranks(mpu: Any, *names: str) -> int:
    """What the first of these functions that the mpu has says; 1 if it has none."""
    return next((count() for name in names if (count := getattr(mpu, name, None)) is not None), 1)


# Refusals -----------------------------------------------------------------------------------------------------------


def _refuse_model_norm() -> torch.Tensor:
    raise LayoutError(
        "this optimizer needs the norm of the whole model's gradient, but steps with one pipeline stage or some "
        "experts of it: use DeepSpeed ZeRO-1 for pipeline stages, which computes the norm over all of them, or an "
        "optimizer without such a norm for experts"
    )


def _refuse_statistics(optimizer: Any, mpu: Any) -> None:
    """Raise LayoutError if the optimizer's statistics of group gradients do not exist with this parallelism."""
    if optimizer.statistics is None:
        return
    problem = None
    if _pipeline_stages(mpu) > 1:
        problem = "a pipeline stage sees only its own layers"
    elif _expert_parallel_ranks(mpu) > 1:
        problem = "an expert's gradient on one rank is made of the samples of several"
    elif _ranks(mpu, "get_context_parallel_world_size") > 1:
        problem = "under context parallelism a rank has that of a part of each sample"
    if problem is not None:
        raise LayoutError(
            f"{type(optimizer).__name__} needs the gradient of every rank's every micro-batch, but {problem}: not "
            "supported. Use data parallelism (DDP or ZeRO) alone"
        )


def _refuse_copies(optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if Megatron-core's wrapper has put fp32 copies, attributes included, in place of parameters."""
    if any(hasattr(tensor, "tensor_model_parallel") and not optimizer.was_given(tensor) for tensor in tensors):
        raise LayoutError(
            "Megatron-core's optimizer wrappers step fp32 copies of the model's parameters, which is supported with "
            "use_distributed_optimizer=True only. Set it in Megatron's OptimizerConfig and "
            "DistributedDataParallelConfig, step the model's own parameters in fp32, or use DeepSpeed ZeRO with mpu="
        )


_backend = MegatronBackend()
register_backend(_backend)
