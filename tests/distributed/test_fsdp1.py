"""FSDP1 against the float64 reference: every sharding strategy, its own state_dict API, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from trustratio.optimizers import OPTIMIZERS

from .cases import (
    Case,
    LayerSpec,
    Leaf,
    Model,
    group_gradients,
    initial_weights,
    make_optimizer,
    mean_gradients,
)
from .collective_counter import CollectiveCounter
from .exactness import MODEL, assert_exact, two_groups
from .pool import CaseFailed, WorkerPool

EXACT = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")


def make_case(name: str, layers: tuple[LayerSpec, ...] = MODEL, **changes: Any) -> Case:
    return Case(name, layers, "fsdp1", two_groups(name, **changes.pop("options", {})), **changes)


@dataclass(frozen=True)
class Setup:
    """How the model is wrapped.

    Attributes:
        strategy: Name of the sharding strategy; the hybrid ones on a mesh of two by two.
        units: Whether every layer is a unit of its own, beside one for the whole model.
        early: Make the optimizer before the model is wrapped.
        options: Further arguments of FullyShardedDataParallel.
        checkpoint: Save and load after three steps, through FSDP1's functions.
    """

    strategy: str = "FULL_SHARD"
    units: bool = False
    early: bool = False
    options: dict[str, Any] | None = None
    checkpoint: bool = False


class Run:
    def __init__(self, case: Case, setup: Setup):
        self.case = case
        self.model = Model(case)
        self.model.load(initial_weights(case))
        self.optimizer: Any = make_optimizer(case, self.model) if setup.early else None
        options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu"), **(setup.options or {})}
        if setup.strategy.lstrip("_").startswith("HYBRID"):
            options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        if setup.units:
            options["auto_wrap_policy"] = ModuleWrapPolicy({Leaf})
        strategy = ShardingStrategy[setup.strategy]
        self.wrapped = FullyShardedDataParallel(self.model, sharding_strategy=strategy, **options)
        if self.optimizer is None:
            self.optimizer = make_optimizer(case, self.model)
        self.counter = CollectiveCounter(self.optimizer)
        self.ratios: list[dict[str, float]] = []

    def train(self, first: int, last: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        for step in range(first, last):
            means = mean_gradients(self.case)[step]
            of_groups = group_gradients(self.case, step, means, world * self.case.accumulation)
            for micro in range(self.case.accumulation):
                given = {name: g[micro * world + rank] for name, g in of_groups.items()}
                (self.wrapped(given) / self.case.accumulation).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ratios.append(self.optimizer.trust_ratios() if hasattr(self.optimizer, "trust_ratios") else {})

    def result(self) -> dict[str, Any]:
        local = {layer.name: self.model.leaves[layer.name].weight for layer in self.case.layers}
        answer = {
            "ratios": self.ratios,
            "collectives": self.counter.per_call,
            "step_counts": {name: float(self.optimizer.state[p].get("step", 0)) for name, p in local.items()},
            "local_elements": {name: p.numel() for name, p in local.items()},
            "options": [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups],
        }
        with FullyShardedDataParallel.summon_full_params(self.wrapped):
            answer["weights"] = {
                layer.name: self.model.leaves[layer.name].weight.detach().float().clone() for layer in self.case.layers
            }
        return answer

    def close(self) -> None:
        self.counter.close()
        self.model = self.wrapped = self.optimizer = None  # type: ignore[assignment]
        gc.collect()


@contextmanager
def running(case: Case, setup: Setup) -> Iterator[Run]:
    run = Run(case, setup)
    try:
        yield run
    finally:
        run.close()


def run_case(case: Case, setup: Setup) -> dict[str, Any]:
    with running(case, setup) as run:
        if not setup.checkpoint:
            run.train(0, case.steps)
            return run.result()
        run.train(0, 3)
        with full_state(run.wrapped):
            weights = run.wrapped.state_dict()
            state = FullyShardedDataParallel.optim_state_dict(run.wrapped, run.optimizer)
    # Other weights, so that what is not restored shows.
    with running(replace(case, seed=case.seed + 7), setup) as fresh:
        with full_state(fresh.wrapped):
            fresh.wrapped.load_state_dict(weights)
            own = FullyShardedDataParallel.optim_state_dict_to_load(fresh.wrapped, fresh.optimizer, state)
        fresh.optimizer.load_state_dict(own)
        fresh.case = case
        fresh.train(3, case.steps)
        return fresh.result()


def full_state(module: FullyShardedDataParallel) -> Any:
    """Whole tensors. With its default offload_to_cpu=True, FSDP1 aliases the states of optimizers on the CPU."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(),
        FullOptimStateDictConfig(offload_to_cpu=False),
    )


def run_exact(pool: WorkerPool, case: Case, setup: Setup) -> list[dict[str, Any]]:
    answers = pool.run(run_case, case, setup)
    assert_exact(case, answers)
    return answers


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, world_size: int) -> None:
    answers = run_exact(pool, make_case(name), Setup())
    several = world_size > 1
    for answer in answers:
        # The first step also proves the layout, and compares what the ranks have done.
        stages = OPTIMIZERS[name].collectives
        assert answer["collectives"] == [several * (stages + 2 * (step == 0)) for step in range(5)]
        assert set(answer["step_counts"].values()) == {5.0}
    if several:
        assert any(0 in answer["local_elements"].values() for answer in answers)


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(pool: WorkerPool, name: str, strategy: str, units: bool, world_size: int) -> None:
    answers = run_exact(pool, make_case(name), Setup(strategy, units))
    assert set(answers[0]["collectives"][1:]) == {0 if strategy == "NO_SHARD" else 1}


@pytest.mark.parametrize("world_size", [4])
@pytest.mark.parametrize("strategy", ["HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"])
def test_hybrid_strategies(pool: WorkerPool, strategy: str, world_size: int) -> None:
    for units in (False, True):
        answers = run_exact(pool, make_case("lamb"), Setup(strategy, units))
        # The first step proves the layout, and compares what ranks of a replica, and of all replicas, have done.
        assert answers[0]["collectives"] == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("world_size", [2])
def test_options(pool: WorkerPool, world_size: int) -> None:
    case = make_case("lamb")
    run_exact(pool, case, Setup(early=True))
    run_exact(pool, replace(case, accumulation=3), Setup())
    skipped = {0: ("dense", "norm"), 3: ("dense", "bias", "norm", "scale")}
    answers = run_exact(pool, replace(case, skipped=skipped), Setup(units=True))
    assert answers[0]["step_counts"]["dense"] == 3
    frozen = make_case("lamb", (*MODEL, LayerSpec("frozen", (5, 5), frozen=True)))
    run_exact(pool, frozen, Setup())


def weights_after_a_small_step(mixed: bool) -> dict[str, torch.Tensor]:
    """One step that is too small for 16 bits, from a gradient that they represent."""
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16) if mixed else MixedPrecision()
    case = replace(make_case("lamb", dtype="bf16", spread=0.0), groups=({"lr": 1e-4}, {"lr": 1e-4}))
    with running(case, Setup(options={"mixed_precision": policy})) as run:
        run.train(0, 1)
        return run.result()["weights"]


@pytest.mark.parametrize("world_size", [2])
def test_mixed_precision_steps_fp32_parameters(pool: WorkerPool, world_size: int) -> None:
    mixed = pool.run(weights_after_a_small_step, True)[0]
    full = pool.run(weights_after_a_small_step, False)[0]
    assert all(torch.equal(mixed[layer], weights) for layer, weights in full.items())
    assert not torch.equal(mixed["dense"], mixed["dense"].bfloat16().float())


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("world_size", [2])
def test_its_own_state_dict_continues_bit_for_bit(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name, steps=6, skipped={1: ("dense",)})
    one = pool.run(run_case, case, Setup())
    other = pool.run(run_case, case, Setup(checkpoint=True))
    for a, b in zip(one, other, strict=True):
        for layer, weights in a["weights"].items():
            assert torch.equal(weights, b["weights"][layer]), layer
        assert a["ratios"][3:] == b["ratios"]
        assert a["step_counts"] == b["step_counts"]


# Refusals -----------------------------------------------------------------------------------------------------------


def step_that_is_refused(what: str) -> None:
    if what == "flat":
        model = FullyShardedDataParallel(torch.nn.Linear(4, 3), device_id=torch.device("cpu"))
        from trustratio.optimizers import LAMB

        optimizer = LAMB(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return
    if what == "before":
        inner = torch.nn.Linear(4, 3)
        from trustratio.optimizers import LAMB

        optimizer = LAMB(inner.named_parameters())
        model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return
    if what == "wrapped later":
        case = make_case("lamb")
        plain = Model(case)
        plain.load(initial_weights(case))
        optimizer = make_optimizer(case, plain)
        plain(mean_gradients(case)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
        wrapped(mean_gradients(case)[1]).backward()
        optimizer.step()
        return
    with running(make_case(what), Setup()) as run:
        run.train(0, 1)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("flat", "pass use_orig_params=True to FullyShardedDataParallel"),
        (
            "before",
            r"weight of shape .* \(now Linear\._flat_param\).* \(with use_orig_params=True\)",
        ),
        ("wrapped later", "is not cut like the parameter"),
        ("clars", "CLARS needs the gradient of every single micro-batch of every layer"),
        ("vrlamb", "VRLAMB needs the gradient of every single micro-batch of every layer"),
    ],
)
def test_what_cannot_be_exact_is_refused(pool: WorkerPool, what: str, message: str, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(step_that_is_refused, what)
    assert str(failure.value).count("LayoutError: ") >= world_size
