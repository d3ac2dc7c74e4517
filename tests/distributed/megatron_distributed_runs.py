"""Training with Megatron-core's DistributedOptimizer in the workers, over gloo on CPU; see `megatron_on_cpu.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from trustratio.integrations.megatron.distributed_optimizer import accept
from trustratio.optimizers import OPTIMIZERS

from .cases import (
    DTYPES,
    Case,
    LayerSpec,
    Model,
    group_gradients,
    initial_weights,
    make_optimizer,
    masters,
    mean_gradients,
    step_counts,
)
from .collective_counter import CollectiveCounter
from .megatron_on_cpu import without_cuda
from .test_megatron import megatron

WITHOUT_STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
# Which dimension tensor parallelism cuts.
CUT: dict[str, int | None] = {"rows": 0, "columns": 1, "middle": 1, "gated": 0, "whole": None, "bias": 0, "norm": None}
SHAPES = {"rows": (26, 11), "columns": (9, 26), "middle": (2, 6, 7), "gated": (8, 13), "whole": (13, 5)}
CUT_MODEL = (
    *(LayerSpec(name, shape) for name, shape in SHAPES.items()),
    LayerSpec("bias", (26,), group=1),
    LayerSpec("norm", (7,), group=1),
)
STRIDES = {"gated": 2}  # two matrices in one, each of which is cut


class Part:
    """Which part of each layer a tensor-parallel rank has."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks

    def of(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        dimension = CUT.get(name) if self.ranks > 1 else None
        if dimension is None:
            return whole
        stacked = whole.chunk(STRIDES.get(name, 1), dim=dimension)
        return torch.cat([m.chunk(self.ranks, dim=dimension)[self.rank] for m in stacked], dim=dimension)

    def together(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        dimension = CUT.get(name) if self.ranks > 1 else None
        if dimension is None:
            return parts[0]
        of_matrices = zip(*(part.chunk(STRIDES.get(name, 1), dim=dimension) for part in parts), strict=True)
        return torch.cat([torch.cat(pieces, dim=dimension) for pieces in of_matrices], dim=dimension)


def data_parallel(model: torch.nn.Module, **options: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    return DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, **options),
        model,
    )


def wrap(inner: Any, ddp: Any, state: Any, config: Any) -> Any:
    """Give the optimizer to a DistributedOptimizer by hand."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    return DistributedOptimizer(
        inner,
        config,
        DynamicGradScaler(2.0**14, 1.0, 2.0, 0.5, 1000, 1) if config.fp16 else None,
        None,
        model_chunks=[ddp],
        per_model_buffers={0: ddp.buffers},
        data_parallel_group=state.get_data_parallel_group(with_context_parallel=True),
        data_parallel_group_gloo=state.get_data_parallel_group_gloo(with_context_parallel=True),
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )


class Run:
    """A model in Megatron's DistributedDataParallel, and an optimizer in its DistributedOptimizer.

    Args:
        case: What is trained; its gradients are the average over the data-parallel ranks.
        state: megatron.core.parallel_state, initialised.
        ddp: Options of DistributedDataParallelConfig.
        config: Options of OptimizerConfig.
        perturbed: Start from other weights, so that what a checkpoint fails to restore shows.
    """

    def __init__(
        self,
        case: Case,
        state: Any,
        ddp: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        perturbed: bool = False,
    ):
        from megatron.core.optimizer import OptimizerConfig

        self.case, self.state = case, state
        self.part = Part(state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size())
        self.model = self._model(1.0 if perturbed else 0.0)
        self.ddp = data_parallel(self.model, **(ddp or {}))
        self.inner: Any = make_optimizer(case, self.model)
        accept(type(self.inner))  # of others than ours as well
        self.wrapper = wrap(
            self.inner,
            self.ddp,
            state,
            OptimizerConfig(
                lr=1.0,
                clip_grad=case.clipping,
                use_distributed_optimizer=True,
                bf16=case.dtype == "bf16",
                fp16=case.dtype == "fp16",
                **(config or {}),
            ),
        )
        self.counter = CollectiveCounter(self.inner)
        self.ratios: list[dict[str, float]] = []
        self.gradients = mean_gradients(case)

    def _model(self, added: float) -> Model:
        parts = {name: self.part.of(name, w) for name, w in initial_weights(self.case).items()}
        layers = tuple(replace(layer, shape=tuple(parts[layer.name].shape)) for layer in self.case.layers)
        model = Model(replace(self.case, layers=layers))
        model.load({name: w + added for name, w in parts.items()})
        for name, leaf in model.leaves.items():
            if self.part.ranks > 1 and CUT.get(name) is not None:
                weight: Any = leaf.weight
                weight.tensor_model_parallel, weight.partition_dim = True, CUT[name]
                weight.partition_stride = STRIDES.get(name, 1)
        return model.to(DTYPES[self.case.dtype])

    def train(self, first: int, last: int) -> None:
        rank = self.state.get_data_parallel_rank()
        ranks = self.state.get_data_parallel_world_size()
        for step in range(first, last):
            self.ddp.zero_grad_buffer()
            self.wrapper.zero_grad()
            of_groups = group_gradients(self.case, step, self.gradients[step], ranks)
            factor = float("inf") if step in self.case.overflow else 1.0
            own = {name: factor * self.part.of(name, g[rank]) for name, g in of_groups.items()}
            if self.case.dtype != "fp32":
                own = {name: g.to(DTYPES[self.case.dtype]) for name, g in own.items()}
            self.wrapper.scale_loss(self.ddp(own)).sum().backward()
            self.ddp.finish_grad_sync()
            self.wrapper.step()
            self.ratios.append(self.inner.trust_ratios() if hasattr(self.inner, "trust_ratios") else {})

    def result(self) -> dict[str, Any]:
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        self.counter.close()
        return {
            "weights": {name: self._together(name, leaf.weight) for name, leaf in self.model.leaves.items()},
            "masters": masters(self.inner),
            "ratios": self.ratios,
            "collectives": self.counter.per_call,
            "all_reduces": self.counter.all_reduces,
            "step_counts": step_counts(self.inner),
            "tensors": [len(group["params"]) for group in self.inner.param_groups],
            "state": len(self.inner.state_dict()["state"]),
            "buckets": sum(len(buffer.buckets) for buffer in self.ddp.buffers),
        }

    def _together(self, name: str, part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(self.part.ranks)]
        dist.all_gather(parts, part.detach().contiguous(), group=self.state.get_tensor_model_parallel_group())
        return self.part.together(name, parts)


@contextmanager
def running(case: Case, tensor_parallel: int = 1, **options: Any) -> Iterator[Run]:
    with megatron(tensor_parallel) as state, without_cuda():
        run = Run(case, state, **options)
        try:
            yield run
        finally:
            run.counter.close()


def train(case: Case, tensor_parallel: int = 1, **options: Any) -> dict[str, Any]:
    with running(case, tensor_parallel, **options) as run:
        run.train(0, case.steps)
        return run.result()
