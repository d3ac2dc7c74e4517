"""Megatron-core's DistributedOptimizer around every optimizer, against the float64 reference.

Buffers, range maps, collectives and the wrapper are Megatron's own, over gloo on CPU; `megatron_on_cpu.py` lists what
is replaced for want of CUDA. No run on a GPU has been made.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state
from trustratio.integrations.megatron.distributed_optimizer import accept, megatron_optimizer
from trustratio.optimizers import LAMB, OPTIMIZERS, create_optimizer

from . import recorded
from .cases import (
    DTYPES,
    Case,
    CollectiveCounter,
    LayerSpec,
    Model,
    group_gradients,
    initial_weights,
    make_optimizer,
    masters,
    mean_gradients,
    step_counts,
)
from .exactness import MODEL, assemble, assert_exact, expected, worst_error
from .megatron_on_cpu import without_cuda
from .pool import CaseFailed, WorkerPool
from .test_exactness import make_case
from .test_megatron import Network, megatron

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
        if case.optimizer == "naive":
            from .cases import NaiveLAMB

            accept(NaiveLAMB)
        self.inner: Any = make_optimizer(case, self.model)
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


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    answers = pool.run(train, make_case(name, "ddp"))
    assert_exact(make_case(name, "ddp"), answers)
    # Layers straddle ranks, and a rank has nothing of some layers and of a whole group.
    tensors = [answer["tensors"] for answer in answers]
    assert sum(map(sum, tensors)) > len(MODEL)
    assert tensors[-1] == [1, 0]
    for answer in answers:
        # The first step also compares groups, shares the state of layers that a rank lacks, and proves the layout.
        assert answer["collectives"][1:] == [OPTIMIZERS[name].collectives] * 4
        assert answer["all_reduces"] == answer["collectives"]
        assert answer["state"] == sum(answer["tensors"])
        assert answer["step_counts"] == dict.fromkeys(answer["step_counts"], 5.0)
        assert set(answer["step_counts"]) == {layer.name for layer in MODEL}


@pytest.mark.parametrize("name", ["lamb", "lars", "lans", "novograd", "sngm"])
@pytest.mark.parametrize("world_size", [2])
def test_main_parameters_of_16_bit_models(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name, "ddp", dtype="bf16", spread=0.0)
    answers = pool.run(train, case)
    assert_exact(case, answers)
    whole = assemble(case, answers)
    for answer in answers:
        for layer, weights in answer["weights"].items():
            assert torch.equal(weights, whole[layer].bfloat16()), layer


@pytest.mark.parametrize("world_size", [2])
def test_loss_scale_and_skipped_steps(pool: WorkerPool, world_size: int) -> None:
    case = make_case("lamb", "ddp", dtype="fp16", spread=0.0, overflow=(1,))
    assert_exact(case, pool.run(train, case))


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize("world_size", [2])
def test_a_rank_without_any_element(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name, "ddp", (LayerSpec("dense", (4, 9)),))
    case = replace(case, groups=case.groups[:1])
    answers = pool.run(train, case)
    assert_exact(case, answers)
    assert [answer["tensors"] for answer in answers] == [[1], [0]]


@pytest.mark.parametrize("world_size", [2])
def test_many_buckets_and_overlapped_communication(pool: WorkerPool, world_size: int) -> None:
    case = make_case("lamb", "ddp")
    answers = pool.run(train, case, ddp={"overlap_grad_reduce": True, "bucket_size": 100})
    assert_exact(case, answers)
    assert answers[0]["buckets"] > 2


@pytest.mark.parametrize("world_size", [2])
def test_layers_without_gradient_are_left_alone(pool: WorkerPool, world_size: int) -> None:
    case = make_case("lamb", "ddp", skipped={1: ("embedding", "bias"), 3: ("embedding",)})
    answers = pool.run(train, case)
    assert_exact(case, answers)
    for answer in answers:
        assert answer["step_counts"]["embedding"] == 3.0
        assert answer["step_counts"]["bias"] == 4.0


@pytest.mark.parametrize("world_size", [2])
def test_clipping_by_megatron(pool: WorkerPool, world_size: int) -> None:
    for name in ("lamb", "sngm"):
        case = make_case(name, "ddp", clipping=0.3)
        assert_exact(case, pool.run(train, case), bound=1e-5)


@pytest.mark.parametrize("world_size", [2])
def test_local_norms_are_caught(pool: WorkerPool, world_size: int) -> None:
    case = make_case("naive", "ddp")
    answers = pool.run(train, case)
    error, layer = worst_error(case, answers[0]["weights"])
    assert (layer, error > 1e-3) == ("embedding", True)


# Tensor parallelism -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lamb", "lars", "lans", "novograd", "sngm"])
@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 2), (4, 2)])
def test_with_tensor_parallelism(pool: WorkerPool, name: str, world_size: int, tensor_parallel: int) -> None:
    case = make_case(name, "ddp", CUT_MODEL)
    answers = pool.run(train, case, tensor_parallel)
    assert_exact(case, answers)
    groups = (world_size > tensor_parallel) + 1
    for answer in answers:
        assert answer["all_reduces"][1:] == [groups * OPTIMIZERS[name].collectives] * 4


def train_layers(name: str, tensor_parallel: int) -> dict[str, Any]:
    """A network of megatron-core's own layers."""
    from megatron.core.optimizer import OptimizerConfig

    with megatron(tensor_parallel) as state, without_cuda():
        torch.manual_seed(0)
        model = Network()
        ddp = data_parallel(model)
        inner = recorded.make_optimizer(name, model)
        wrapper = wrap(inner, ddp, state, OptimizerConfig(lr=1.0, clip_grad=0.0, use_distributed_optimizer=True))
        recorder = recorded.Recorder(model, inner)
        generator = torch.Generator().manual_seed(100 + state.get_data_parallel_rank())
        for _ in range(4):
            ddp.zero_grad_buffer()
            wrapper.zero_grad()
            ddp(torch.randint(24, (6,), generator=generator)).backward()
            ddp.finish_grad_sync()
            wrapper.step()
            recorder.end_step()
        recorder.counter.close()
        return recorder.result()


@pytest.mark.parametrize("name", ["lamb", "lars", "sngm"])
@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_layers_of_megatron_core(pool: WorkerPool, name: str, world_size: int, tensor_parallel: int) -> None:
    answers = pool.run(train_layers, name, tensor_parallel)
    recorded.assert_recorded_exact(name, answers, tensor_parallel)


def train_in_one_process(case: Case) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    model = Model(case)
    model.load(initial_weights(case))
    optimizer: Any = make_optimizer(case, model)
    ratios = []
    for gradients in mean_gradients(case):
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
        ratios.append(optimizer.trust_ratios())
    return {name: leaf.weight.detach() for name, leaf in model.leaves.items()}, ratios


@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_matrices_that_are_stacked_in_one_parameter(pool: WorkerPool, world_size: int, tensor_parallel: int) -> None:
    """Each matrix is a layer, of which tensor-parallel ranks have parts: the gate of a gated unit, for example."""
    case = make_case("lamb", "ddp", CUT_MODEL)
    matrices, others = case.groups
    case = replace(case, groups=({**matrices, "segments": {"gated": 2, "columns": 3}}, others))
    weights, ratios = train_in_one_process(case)
    assert {"gated[0]", "gated[1]", "columns[2]"} < set(ratios[0])
    for answer in pool.run(train, case, tensor_parallel):
        for found, wanted in zip(answer["ratios"], ratios, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6)
        for name, whole in weights.items():
            torch.testing.assert_close(answer["weights"][name], whole, rtol=1e-5, atol=1e-6)


# Checkpoints --------------------------------------------------------------------------------------------------------


def save(case: Case, tensor_parallel: int, path: str) -> dict[str, Any]:
    with running(case, tensor_parallel) as run:
        run.train(0, 3)
        save_optimizer_state(run.wrapper, path)
        run.train(3, case.steps)
        return run.result()


def load(case: Case, tensor_parallel: int, path: str, started: bool) -> dict[str, Any]:
    with running(case, tensor_parallel, perturbed=True) as run:
        if started:
            run.train(0, 1)
            run.ratios.clear()
        load_optimizer_state(run.wrapper, path)
        run.train(3, case.steps)
        return run.result()


def load_in_one_process(case: Case, path: str) -> None:
    model = Model(case)
    model.load({name: w + 1.0 for name, w in initial_weights(case).items()})
    optimizer: Any = make_optimizer(case, model)
    load_optimizer_state(optimizer, path)
    for gradients in mean_gradients(case)[3:]:
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
    error, layer = worst_error(case, {name: leaf.weight.detach() for name, leaf in model.leaves.items()})
    assert error <= 2e-6, f"{layer}: {error:.2e}"


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_consolidated_state(pool: WorkerPool, name: str, world_size: int, tensor_parallel: int, tmp_path: Path) -> None:
    case, path = make_case(name, "ddp", CUT_MODEL), str(tmp_path / "state.safetensors")
    saved = pool.run(save, case, tensor_parallel, path)
    assert_exact(case, saved)
    for started in (False, True):
        continued = pool.run(load, case, tensor_parallel, path, started)
        for one, other in zip(saved, continued, strict=True):
            assert one["ratios"][3:] == other["ratios"]
            for layer, weights in one["weights"].items():
                assert torch.equal(weights, other["weights"][layer]), layer
    load_in_one_process(case, path)


def save_with_megatron(case: Case, path: str) -> None:
    with running(case) as run:
        run.train(0, 2)
        run.wrapper.state_dict()
        run.wrapper.save_parameter_state(path)
        with torch.no_grad():
            run.wrapper.load_parameter_state(path)


@pytest.mark.parametrize("world_size", [2])
def test_parameter_state_of_megatron_fails_aloud(pool: WorkerPool, world_size: int, tmp_path: Path) -> None:
    with pytest.raises(CaseFailed, match="KeyError: 'step'"):
        pool.run(save_with_megatron, make_case("lamb", "ddp"), str(tmp_path / "state.pt"))
    with pytest.raises(CaseFailed, match="KeyError: 'exp_avg'"):
        pool.run(save_with_megatron, make_case("lars", "ddp"), str(tmp_path / "state.pt"))


def load_with_megatron(case: Case) -> None:
    with running(case) as run:
        for number, group in enumerate(run.inner.param_groups):
            group.update(wd_mult=number, lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False)
        # As where Transformer Engine is installed, whose Adam counts steps by group.
        with mock.patch("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", True):
            run.wrapper.load_state_dict(run.wrapper.state_dict())
        run.train(0, 1)


def step_with_the_state_of_adam(case: Case) -> None:
    with running(case) as run:
        for group in run.inner.param_groups:
            for tensor in group["params"]:
                run.inner.state[tensor] = {name: torch.empty_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
        run.train(0, 1)


@pytest.mark.parametrize("world_size", [2])
def test_state_made_for_adam_is_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=r"has the state exp_avg, exp_avg_sq instead of .*, step"):
        pool.run(load_with_megatron, make_case("lamb", "ddp"))
    with pytest.raises(CaseFailed, match=r"the state of LAMB lacks step: .*load_optimizer_state"):
        pool.run(step_with_the_state_of_adam, make_case("lamb", "ddp"))


# Experts and pipeline stages ----------------------------------------------------------------------------------------


def train_experts(name: str) -> list[dict[str, float]]:
    """One expert per rank, beside layers that both have; returns ratios of the wrappers' and of plain optimizers."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig

    case = make_case(name, "ddp", (LayerSpec("router", (37, 11)), LayerSpec("expert", (8, 16))))
    make = partial(create_optimizer, name)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    try:
        with without_cuda():
            rank = dist.get_rank()
            wrapped, plain = Model(case), Model(case)
            for model in (wrapped, plain):
                model.load(initial_weights(case))
                model.leaves["expert"].weight.data.mul_(1.0 + rank)
            wrapped.leaves["expert"].weight.allreduce = False  # type: ignore[attr-defined]
            ddp = data_parallel(wrapped)
            config = OptimizerConfig(lr=0.1, weight_decay=0.1, clip_grad=0.0, use_distributed_optimizer=True)
            optimizer = megatron_optimizer(make, config, [ddp])
            reference: Any = make(plain.named_parameters(), lr=0.1, weight_decay=0.1)
            for step, means in enumerate(mean_gradients(case)):
                ddp.zero_grad_buffer()
                optimizer.zero_grad()
                own = {n: g[rank] for n, g in group_gradients(case, step, means, 2).items()}
                ddp(own).backward()
                ddp.finish_grad_sync()
                optimizer.step()
                # Megatron divides by the number of all data-parallel ranks, of which one has samples for the expert.
                plain({"router": means["router"], "expert": own["expert"] / 2}).backward()
                reference.step()
                reference.zero_grad()
            for name_, leaf in wrapped.leaves.items():
                torch.testing.assert_close(leaf.weight, plain.leaves[name_].weight, rtol=1e-5, atol=1e-6)
            ratios: dict[str, float] = {}
            for wrapper in optimizer.chained_optimizers:
                ratios |= wrapper.optimizer.trust_ratios()
            return [ratios, reference.trust_ratios()]
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("world_size", [2])
def test_experts(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(train_experts, "lamb")
    for found, wanted in answers:
        assert found == pytest.approx(wanted, rel=1e-6)
    assert answers[0][0]["leaves.expert.weight"] != answers[1][0]["leaves.expert.weight"]
    with pytest.raises(CaseFailed, match="pipeline stages and experts"):
        pool.run(train_experts, "sngm")


def train_stage(name: str) -> dict[str, Any]:
    """A pipeline stage per rank: each trains the model as if it were alone."""
    case = make_case(name, "ddp")
    with megatron(1, 2) as state, without_cuda():
        run = Run(case, state)
        try:
            run.train(0, case.steps)
            return run.result()
        finally:
            run.counter.close()


@pytest.mark.parametrize("world_size", [2])
def test_pipeline_stages(pool: WorkerPool, world_size: int) -> None:
    assert_exact(make_case("lamb", "ddp"), pool.run(train_stage, "lamb"))
    with pytest.raises(CaseFailed, match="pipeline stages and experts"):
        pool.run(train_stage, "sngm")


# Made by Megatron ---------------------------------------------------------------------------------------------------


def train_as_a_user(name: str) -> dict[str, Any]:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    case = make_case(name, "ddp", tuple(replace(layer, group=int(len(layer.shape) == 1)) for layer in MODEL))
    options = case.groups[0]
    with megatron(1) as state, without_cuda():
        model = Model(case)
        model.load(initial_weights(case))
        ddp = data_parallel(model)
        config = OptimizerConfig(
            lr=options["lr"], weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True, min_lr=options["lr"]
        )
        others = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
        optimizer = megatron_optimizer(partial(create_optimizer, name, **others), config, [ddp])
        wd = options["weight_decay"]
        OptimizerParamScheduler(
            optimizer, init_lr=0.0, max_lr=options["lr"], min_lr=options["lr"], lr_warmup_steps=0, lr_decay_steps=9,
            lr_decay_style="constant", start_wd=wd, end_wd=wd, wd_incr_steps=9, wd_incr_style="constant",
        )  # fmt: skip
        [wrapper] = optimizer.chained_optimizers
        ratios = []
        for step, means in enumerate(mean_gradients(case)):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            of_groups = group_gradients(case, step, means, 2)
            ddp({n: g[state.get_data_parallel_rank()] for n, g in of_groups.items()}).backward()
            ddp.finish_grad_sync()
            optimizer.step()
            ratios.append(wrapper.optimizer.trust_ratios())
        names = {name.removeprefix("leaves.").removesuffix(".weight"): r for name, r in ratios[-1].items()}
        assert set(names) == {layer.name for layer in MODEL}
        return {
            "weights": {n: leaf.weight.detach() for n, leaf in model.leaves.items()},
            "ratios": [
                {n.removeprefix("leaves.").removesuffix(".weight"): r for n, r in of_step.items()} for of_step in ratios
            ],
        }


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [2])
def test_made_by_get_megatron_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    """Groups, decay and names are Megatron's: no decay for parameters of one dimension."""
    answers = pool.run(train_as_a_user, name)
    case = make_case(name, "ddp", tuple(replace(layer, group=int(len(layer.shape) == 1)) for layer in MODEL))
    assert_exact(case, answers)


def test_options_that_need_megatrons_own_adam() -> None:
    from megatron.core.optimizer import OptimizerConfig

    with pytest.raises(ValueError, match="optimizer_cpu_offload must be False"):
        megatron_optimizer(LAMB, OptimizerConfig(lr=1.0, optimizer_cpu_offload=True), [])


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "constructor", "message"),
    [
        ("clars", {}, "gradient of every single micro-batch"),
        ("vrlamb", {}, "gradient of every single micro-batch"),
        ("lamb", {"max_grad_norm": 1.0}, "clip_grad in Megatron's OptimizerConfig"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_what_it_cannot_do_is_refused(
    pool: WorkerPool, name: str, constructor: dict[str, Any], message: str, world_size: int
) -> None:
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(train, make_case(name, "ddp", constructor=constructor))
    assert str(failure.value).count("rank ") >= world_size


@pytest.mark.parametrize("world_size", [2])
def test_rows_are_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="cowclip=False"):
        pool.run(train, make_case("cowclip", "ddp", options={"cowclip": True}))


def step_without_wrapper(case: Case) -> None:
    with running(case) as run:
        run.train(0, 1)
        inner = run.inner
        for group in inner.param_groups:
            for tensor in group["params"]:
                tensor.grad = torch.ones_like(tensor)
        run.wrapper.optimizer = None
        gc.collect()
        inner._plans.clear()
        inner.step()


def step_of_other_tensors(case: Case) -> None:
    with running(case) as run:
        group = run.inner.param_groups[0]
        group["params"] = [torch.nn.Parameter(tensor.detach().clone()) for tensor in group["params"]]
        run.train(0, 1)


@pytest.mark.parametrize("world_size", [2])
def test_runs_that_nobody_explains_are_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="cannot compute exact trust ratios"):
        pool.run(step_without_wrapper, make_case("lamb", "ddp"))
    with pytest.raises(CaseFailed, match="do not change param_groups"):
        pool.run(step_of_other_tensors, make_case("lamb", "ddp"))


def train_with_precision_aware(case: Case) -> None:
    with running(case) as run:
        run.train(0, 1)
        run.inner._plans.clear()
        run.wrapper.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        run.inner.step()


@pytest.mark.parametrize("world_size", [2])
def test_main_parameters_inside_the_optimizer_are_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="use_precision_aware_optimizer=False"):
        pool.run(train_with_precision_aware, make_case("lamb", "ddp"))


def test_reference_of_a_cut_model_is_that_of_the_whole() -> None:
    """The parts of the tests' layers make up the layers."""
    case = make_case("lamb", "ddp", CUT_MODEL)
    for name, weights in initial_weights(case).items():
        parts = [Part(rank, 2).of(name, weights) for rank in range(2)]
        assert torch.equal(Part(0, 2).together(name, parts), weights)
    assert expected(case)[1]
