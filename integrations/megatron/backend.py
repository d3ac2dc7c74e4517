"""Megatron: layers cut over tensor-parallel ranks by Megatron's own classes, or by others with the same attributes.

An optimizer stepped with the model's own parameters finds, at the first step, which of them are parts of layers
(`tensor_model_parallel`), along which dimension (`partition_dim`) and over which ranks. The ranks are known

    without a call                  if megatron.core.parallel_state has been initialised
    by `use_mpu(mpu)`               from any object with Megatron's functions, e.g. an older Megatron's `mpu` module

Parameters that are not marked are whole on every tensor-parallel rank and are counted once. `partition_stride` moves
elements between ranks and so changes no sum. A parameter with `shared=True` is a tied layer's copy on another pipeline
stage: it is a layer there too, and takes the same step.

Of megatron-core's own optimizer wrappers the DistributedOptimizer is supported: `distributed_optimizer.py`. Its 16-bit
wrapper without it (Float16OptimizerWithFloat16Params) steps whole fp32 copies and is refused. Read from megatron-core
0.16.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.data_parallel import DataParallel
from trustratio.optimizers.sharding.layout import Layout, LayoutError
from trustratio.optimizers.sharding.local_tensors import is_flattened, is_plain
from trustratio.optimizers.sharding.refusals import refuse_model_norm, refuse_statistics
from trustratio.optimizers.sharding.repeated_step import RepeatedStep
from trustratio.optimizers.sharding.tensor_parallel import TensorParallel, layout_of_parameters, refuse_optimizer
from trustratio.optimizers.sharding.unsharded import has_its_own_parameters

from .distributed_optimizer import accept, find_wrapper, layout_of_shards, publish_weights, repeated_step
from .mpu import context_parallel_ranks, current_mpu, data_parallel_group, expert_parallel_ranks, pipeline_stages

__all__ = ["MegatronBackend"]

BACKEND = "Megatron tensor parallelism"


class MegatronBackend(Backend):
    """Explains a model's own parameters where Megatron's parallelism is in use."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Make the class pass the check of Megatron's DistributedOptimizer."""
        accept(optimizer_class)

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout under a DistributedOptimizer, or of the model's own parameters where it is cut.

        Raises:
            LayoutError: If another wrapper of Megatron's holds the optimizer, or the optimizer cannot be exact.
        """
        parameters = [tensor for _, tensor in tensors]
        mpu = current_mpu()
        wrapper = _distributed_wrapper(optimizer)
        if wrapper is not None:
            return layout_of_shards(wrapper, optimizer, tensors, mpu)
        _refuse_copies(optimizer, parameters)
        if mpu is None or not all(optimizer.was_given(p) and _is_own(p) for p in parameters):
            return None
        refuse_statistics(optimizer, _why_not_single_gradients(mpu), "data parallelism (DDP or ZeRO) alone")
        parallel = TensorParallel(mpu)
        sees_whole_model = pipeline_stages(mpu) == expert_parallel_ranks(mpu) == 1
        if sees_whole_model and parallel.size() == parallel.size(expert=True) == 1:
            return None
        refuse_optimizer(BACKEND, optimizer, parameters)
        options: dict[str, Any] = {}
        if not sees_whole_model:
            options = {
                "clips_with": "clip_grad in Megatron's own step",
                "gradient_norm": partial(refuse_model_norm, NORM_OF_A_PART),
            }
        return layout_of_parameters(BACKEND, optimizer, tensors, parallel, optimizer.parameter_name, **options)

    def publish_weights(self, optimizer: Any) -> None:
        """Bring the model's parameters up to date after the optimizer's own weights were changed between steps."""
        wrapper = _distributed_wrapper(optimizer)
        if wrapper is not None:
            publish_weights(wrapper)

    def repeated_step(self, optimizer: Any) -> RepeatedStep | None:
        """Return how a DistributedOptimizer takes one step in two of its own, None if there is none.

        Raises:
            LayoutError: If it clips gradients, by what it does not tell.
        """
        wrapper = _distributed_wrapper(optimizer)
        return None if wrapper is None else repeated_step(wrapper)

    def data_parallel(self, optimizer: Any) -> DataParallel | None:
        """Return the data-parallel ranks, None where no mpu is known."""
        mpu = current_mpu()
        return None if mpu is None else DataParallel(data_parallel_group(mpu))

    def tensor_parallel_group(self, parameter: torch.Tensor) -> dist.ProcessGroup | None:
        """Return the ranks over which a parameter like this one is cut if it is marked, None if they are not known."""
        mpu = current_mpu()
        return None if mpu is None else TensorParallel(mpu).ranks_of(parameter)


def _distributed_wrapper(optimizer: Any) -> Any:
    """The DistributedOptimizer around the optimizer, None if there is none."""
    return None if has_its_own_parameters(optimizer) else find_wrapper(optimizer)


def _is_own(parameter: torch.Tensor) -> bool:
    """Whether no other wrapper has made the parameter, or flattened it."""
    return is_plain(parameter) and not is_flattened(parameter)


# Refusals -----------------------------------------------------------------------------------------------------------

NORM_OF_A_PART = (
    "steps with one pipeline stage or some experts of it: use DeepSpeed ZeRO-1 for pipeline stages, which computes the "
    "norm over all of them, or an optimizer without such a norm for experts"
)


def _why_not_single_gradients(mpu: Any) -> str | None:
    """Why a rank does not see the gradient of each of its micro-batches; None if it does."""
    if pipeline_stages(mpu) > 1:
        return "a pipeline stage sees only its own layers"
    if expert_parallel_ranks(mpu) > 1:
        return "an expert's gradient on one rank is made of the samples of several"
    if context_parallel_ranks(mpu) > 1:
        return "under context parallelism a rank has that of a part of each sample"
    return None


def _refuse_copies(optimizer: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError if Megatron-core's wrapper has put fp32 copies, attributes included, in place of parameters."""
    if any(hasattr(tensor, "tensor_model_parallel") and not optimizer.was_given(tensor) for tensor in tensors):
        raise LayoutError(
            "Megatron-core's optimizer wrappers step fp32 copies of the model's parameters, which is supported with "
            "use_distributed_optimizer=True only. Set it in Megatron's OptimizerConfig and "
            "DistributedDataParallelConfig, step the model's own parameters in fp32, or use DeepSpeed ZeRO with mpu="
        )


register_backend(MegatronBackend())
