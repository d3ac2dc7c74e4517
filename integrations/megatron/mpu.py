"""Who knows the ranks of Megatron's parallelism: an `mpu` ("model parallel unit"), and what is asked of it.

It is any module or object with Megatron's functions. Older Megatrons lack some of them, and what they lack they do not
parallelise.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

__all__ = [
    "context_parallel_ranks",
    "current_mpu",
    "data_parallel_group",
    "expert_parallel_ranks",
    "pipeline_stages",
    "use_mpu",
]

_told: Any = None  # by use_mpu


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
    global _told
    needed = ("get_tensor_model_parallel_group", "get_data_parallel_group")
    lacking = [name for name in needed if mpu is not None and not callable(getattr(mpu, name, None))]
    if lacking:
        raise TypeError(f"an mpu needs the functions {' and '.join(needed)}; {mpu!r} has no {' and no '.join(lacking)}")
    _told = mpu


def current_mpu() -> Any:
    """What `use_mpu` was told, else megatron-core's `parallel_state` if it has been initialised, else None."""
    if _told is not None:
        return _told
    state = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def data_parallel_group(mpu: Any) -> dist.ProcessGroup:
    """The ranks whose gradients are averaged: those of a context-parallel group see parts of the same samples."""
    if getattr(mpu, "__name__", "") == "megatron.core.parallel_state":
        return mpu.get_data_parallel_group(with_context_parallel=True)
    return mpu.get_data_parallel_group()


def pipeline_stages(mpu: Any) -> int:
    """Into how many stages the model is cut."""
    return _ranks(mpu, "get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def expert_parallel_ranks(mpu: Any) -> int:
    """Over how many ranks experts are spread: each has experts that the others do not have."""
    return _ranks(mpu, "get_expert_model_parallel_world_size")


def context_parallel_ranks(mpu: Any) -> int:
    """Over how many ranks each sample is spread."""
    return _ranks(mpu, "get_context_parallel_world_size")


def _ranks(mpu: Any, *names: str) -> int:
    """What the first of these functions that the mpu has says; 1 if it has none."""
    return next((count() for name in names if (count := getattr(mpu, name, None)) is not None), 1)
