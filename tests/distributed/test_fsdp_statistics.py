"""Statistics of group gradients under FSDP2 and HSDP: values, wire and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from trustratio.optimizers import OPTIMIZERS, create_optimizer

from ..reference import relative_error
from .cases import Case, LayerSpec, initial_weights, mean_gradients
from .exactness import MODEL, assert_exact, expected, worst_error
from .fsdp_runs import MESHES, Setup, make_case, run_case, run_exact, running, second_dimension
from .group_runs import measured, seeing_reduced_gradients
from .pool import WorkerPool
from .test_gradient_statistics import assert_norms

STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is not None]


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize(("world_size", "mesh"), [(1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (4, "hsdp")])
def test_statistics(pool: WorkerPool, name: str, world_size: int, mesh: str) -> None:
    case = make_case(name)
    run_exact(pool, case, Setup(MESHES[mesh]))
    for keep in ("sharded", "replica", None):
        run_exact(pool, replace(case, accumulation=3), Setup(MESHES[mesh], units=True, keep=keep))


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_gradients_kept_by_a_replica(pool: WorkerPool, name: str, world_size: int) -> None:
    run_exact(pool, replace(make_case(name), accumulation=3), Setup((2, 1), units=True, keep="replica"))


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_statistics_with_options(pool: WorkerPool, name: str, world_size: int, mesh: str) -> None:
    case, shape = make_case(name), MESHES[mesh]
    for setup in (
        Setup(shape, wrap="swap"),
        Setup(shape, units=True, checkpointing=True),
        Setup(shape, options={"reshard_after_forward": False}),
        Setup(shape, options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ):
        run_exact(pool, case, setup)
    run_exact(pool, replace(case, clipping=0.5), Setup(shape, clipping=0.5))
    layers = (LayerSpec("wide", (5, 12)), LayerSpec("conv", (3, 4, 5)), LayerSpec("bias", (9,), group=1))
    run_exact(pool, make_case(name, layers), Setup(shape, options={"shard_placement_fn": second_dimension}))
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale")}
    answers = run_exact(pool, make_case(name, skipped=skipped), Setup(shape))
    assert answers[0]["step_counts"]["dense"] == 3


def run_with_dropped_batches(case: Case, setup: Setup) -> dict[str, Any]:
    """Before each step's own, a batch that is not finite and one that is; the model zeroes the gradients of both."""
    with running(case, setup) as run:
        for step in range(case.steps):
            run.model.set_requires_gradient_sync(True)
            for factor in (float("nan"), 3.0):
                given = {name: factor * g for name, g in mean_gradients(case)[step].items()}
                run.model(given).backward()
                run.model.zero_grad()
            run.train(step, step + 1)
        return run.result()


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_dropped_batches_do_not_count(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name)
    assert_exact(case, pool.run(run_with_dropped_batches, case, Setup(units=True)))


def run_mixed(case: Case, reduce_dtype: torch.dtype | None) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    return run_case(case, Setup(options={"mp_policy": policy}))


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_statistics_in_mixed_precision(pool: WorkerPool, name: str, world_size: int) -> None:
    """Gradients that 16 bits represent, and so do their sums."""
    case = make_case(name, dtype="bf16", spread=0.0)
    answers = pool.run(run_mixed, case, None)
    reference, ratios = expected(case, world_size)
    for layer, weights in reference.items():
        error = relative_error(answers[0]["weights"][layer], weights, initial_weights(case)[layer])
        assert error <= 1e-5, f"{layer}: {error:.2e}"
    for found, wanted in zip(answers[0]["ratios"], ratios, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


def run_norms(case: Case, setup: Setup) -> list[dict[str, tuple[float, ...]]]:
    with running(case, setup) as run:
        run.optimizer.collect_group_norms()
        found = []
        for step in range(case.steps):
            run.train(step, step + 1)
            norms = run.optimizer.statistics.norms()
            found.append({name: (n.groups, n.mean_norm, n.mean_square, n.square_of_mean) for name, n in norms.items()})
        return found


@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_norms_for_any_optimizer(pool: WorkerPool, world_size: int, mesh: str) -> None:
    case = make_case("lamb", accumulation=2, noise=1.0)
    for norms in pool.run(run_norms, case, Setup(MESHES[mesh])):
        assert_norms(case, norms, world_size)


def run_measured(case: Case, setup: Setup, bucket_elements: int) -> dict[str, Any]:
    with measured(bucket_elements) as traffic:
        return {**run_case(case, setup), "traffic": vars(traffic)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_wire_and_memory_of_statistics(pool: WorkerPool, accumulation: int, world_size: int) -> None:
    """Squares are sent as often as gradients, and kept whole only while gradients are."""
    elements = sum(w.numel() for w in initial_weights(make_case("lamb")).values())
    case = make_case("vrlamb", accumulation=accumulation)
    for keep in ("sharded", None):
        passes = case.steps * (1 if keep else accumulation)
        for answer in pool.run(run_measured, case, Setup(units=True, keep=keep), 64):
            traffic = answer["traffic"]
            assert elements * passes <= traffic["sent"] <= 1.25 * elements * passes
            assert traffic["staged"] <= 1.25 * 64 / 2
            assert traffic["whole"] <= (elements if keep and accumulation > 1 else 0)
            assert traffic["partitions"] <= elements / world_size + 16 * len(MODEL)


def run_on_reduced_gradients(case: Case) -> dict[str, Any]:
    with seeing_reduced_gradients():
        return run_case(case, Setup())


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("world_size", [2])
def test_statistics_of_reduced_gradients_are_caught(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name)
    answer = pool.run(run_on_reduced_gradients, case)[0]
    assert worst_error(case, answer["weights"], ranks=world_size)[0] > 0.05


def thawed(optimizer_name: str, steps: int, sharded: bool) -> dict[str, torch.Tensor]:
    """Train the last layer for two steps, then all; each rank has its batch, or one process those of all ranks."""
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    net[0].requires_grad_(False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    alone = dist.new_group([rank], use_local_synchronization=True)
    if sharded:
        for part in (net[0], net[2], net):
            fully_shard(part)
    optimizer = create_optimizer(optimizer_name, list(net[2].parameters()), lr=0.1)
    if not sharded:
        optimizer.data_parallel_group = alone
    if optimizer.statistics is None:
        optimizer.collect_group_norms()
    for step in range(steps):
        if step == 2:
            net[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(net[0].parameters())})
        optimizer.zero_grad()
        for batch in (rank,) if sharded else range(ranks):
            samples = torch.randn(2, 4, generator=torch.Generator().manual_seed(9 * step + batch), dtype=torch.float64)
            (net(samples).square().mean() / (1 if sharded else ranks)).backward()
        optimizer.step()
    weights = {name: p.full_tensor() if sharded else p for name, p in net.named_parameters()}
    norms = optimizer.statistics.norms()
    answer = {name: weight.detach().clone() for name, weight in weights.items()}
    return answer | {f"norms/{name}": torch.tensor([n.groups, n.mean_norm]) for name, n in norms.items()}


def both_thawed(name: str) -> list[dict[str, torch.Tensor]]:
    return [thawed(name, 5, sharded) for sharded in (True, False)]


@pytest.mark.parametrize("name", ["clars", "vrlamb", "lars"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_group_added_in_the_middle_of_training(pool: WorkerPool, name: str, world_size: int) -> None:
    for found, wanted in pool.run(both_thawed, name):
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            assert torch.allclose(found[key], value, rtol=1e-6, atol=0), key
