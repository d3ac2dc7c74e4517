"""Megatron-core's DistributedOptimizer around every optimizer, against the float64 reference.

Buffers, range maps, collectives and the wrapper are Megatron's own, over gloo on CPU; `megatron_on_cpu.py` lists what
is replaced for want of CUDA. No run on a GPU has been made.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS

from . import recorded
from .cases import Case, LayerSpec, Model, initial_weights, make_optimizer, mean_gradients
from .exactness import MODEL, assemble, assert_exact, expected, worst_error
from .megatron_distributed_runs import CUT_MODEL, WITHOUT_STATISTICS, Part, Run, data_parallel, running, train, wrap
from .megatron_on_cpu import without_cuda
from .pool import CaseFailed, WorkerPool
from .test_exactness import make_case
from .test_megatron import Network, megatron

# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name, "ddp")
    answers = pool.run(train, case)
    assert_exact(case, answers)
    # Layers straddle ranks, and a rank has nothing of some layers and of a whole group.
    tensors = [answer["tensors"] for answer in answers]
    assert sum(map(sum, tensors)) > len(MODEL)
    assert tensors[-1] == [1, 0]
    for answer in answers:
        # The first step also compares groups, shares the state of layers that a rank lacks, and proves the layout.
        assert answer["collectives"][1:] == [OPTIMIZERS[name].collectives] * (case.steps - 1)
        assert answer["all_reduces"] == answer["collectives"]
        assert answer["state"] == sum(answer["tensors"])
        assert answer["step_counts"] == dict.fromkeys(answer["step_counts"], float(case.steps))
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


@pytest.mark.parametrize("name", ["lamb", "sngm"])
@pytest.mark.parametrize("world_size", [2])
def test_clipping_by_megatron(pool: WorkerPool, name: str, world_size: int) -> None:
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


# Pipeline stages ----------------------------------------------------------------------------------------------------


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
