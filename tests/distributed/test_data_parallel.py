"""Who averages gradients: wrappers that come late, go or are hidden, and averaging by hand."""

from __future__ import annotations

import contextlib
import gc
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LayoutError, StatisticsError, create_optimizer

from .cases import average_by_hand
from .pool import WorkerPool
from .test_exactness import make_case, run_exact

Weights = dict[str, torch.Tensor]
STEPS, MICRO_BATCHES = 3, 2


def make(name: str) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return model, create_optimizer(name, model.named_parameters(), lr=0.05, weight_decay=0.1)


def samples(seed: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def backward(forward: Any, step: int, factor: float = 1.0) -> None:
    """The micro-batches of this rank."""
    for micro in range(MICRO_BATCHES):
        x = samples(100 * step + 10 * micro + dist.get_rank())
        (factor * forward(x).square().sum() / MICRO_BATCHES).backward()


def weights(model: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(name: str, habit: str = "none") -> Weights:
    """DDP in a program with one of the habits below."""
    model, optimizer = make(name)
    kept = None
    if habit == "dry run":
        backward(model, 9)
        optimizer.zero_grad()
    elif habit == "dry run, model's zero_grad":
        backward(model, 9)
        model.zero_grad()
    elif habit == "two wrappers":
        kept = DistributedDataParallel(model)
    trained: Any = DistributedDataParallel(model, gradient_as_bucket_view=habit == "bucket views")
    if habit == "told too":
        optimizer.data_parallel_group = dist.group.WORLD
    elif habit == "frozen":
        gc.freeze()
    try:
        for step in range(STEPS):
            if habit == "made anew":
                trained = DistributedDataParallel(model)
                gc.collect()
            backward(trained, step)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        gc.unfreeze()
    del kept
    return weights(model)


def train_by_hand(name: str, *, add: bool = False, factor: float = 1.0) -> Weights:
    model, optimizer = make(name)
    optimizer.data_parallel_group = dist.group.WORLD
    for step in range(STEPS):
        backward(model, step, factor)
        average_by_hand(model, add=add)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def assert_same(found: list[Weights], wanted: Weights) -> None:
    for of_rank in found:
        for name, w in wanted.items():
            assert (of_rank[name] - w).norm() <= 2e-6 * w.norm(), (name, (of_rank[name] - w).norm() / w.norm())
            assert torch.equal(of_rank[name], found[0][name]), "replicas differ"


HABITS = ("dry run", "two wrappers", "bucket views", "told too", "frozen", "made anew")


@pytest.mark.parametrize("name", ["clars", pytest.param("vrlamb", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world_size", [2])
def test_habits_of_programs_with_ddp(pool: WorkerPool, name: str, world_size: int) -> None:
    wanted = pool.run(train, name)[0]
    for habit in HABITS:
        assert_same(pool.run(train, name, habit), wanted)


@pytest.mark.parametrize("name", ["clars", "vrsgd", "vrlars", "vrlamb"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_averaging_by_hand(pool: WorkerPool, name: str, world_size: int, accumulation: int) -> None:
    run_exact(pool, make_case(name, "by hand", accumulation=accumulation))


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_adding_up_by_hand(pool: WorkerPool, name: str, world_size: int) -> None:
    """The factor is found out, as clipping's is."""
    wanted = pool.run(train_by_hand, name, factor=2.0)[0]
    assert_same(pool.run(train_by_hand, name, add=True), wanted)
    assert_same(pool.run(train_by_hand, name), pool.run(train, name)[0])


def train_alone(steps_of_ranks: tuple[int, int]) -> dict[str, float]:
    """A model of its own on each rank, in no step with the other's; the ratios."""
    model, optimizer = make("clars")
    optimizer.data_parallel_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for step in range(steps_of_ranks[dist.get_rank()]):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.trust_ratios()  # type: ignore[no-any-return]


@pytest.mark.parametrize("world_size", [2])
def test_ranks_that_train_models_of_their_own(pool: WorkerPool, world_size: int) -> None:
    one, other = pool.run(train_alone, (2, 5)), pool.run(train_alone, (4, 5))
    assert one[0] != other[0]
    assert one[1] == other[1]


def refused(situation: str) -> str:
    model, optimizer = make("clars")
    pair = dist.new_group([0, 1])
    one = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    kept: Any = []
    if situation == "another group than the wrapper's":
        optimizer.data_parallel_group = one
        kept.append(DistributedDataParallel(model))
    elif situation == "two wrappers of different ranks":
        kept.extend((DistributedDataParallel(model), DistributedDataParallel(model, process_group=one)))
    elif situation == "join":
        kept.append(DistributedDataParallel(model))
    before = weights(model)
    try:
        with kept[0].join() if situation == "join" else contextlib.nullcontext():
            backward(kept[0] if kept else model, 0)
            optimizer.step()
    except LayoutError as error:
        assert all(torch.equal(before[name], w) for name, w in weights(model).items())
        dist.barrier(pair)  # nobody is left in a collective
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("situation", "message"),
    [
        ("nobody", r"nobody says which of the 2 ranks average gradients"),
        ("another group than the wrapper's", r"says that ranks \[[01]\] average .* averages them over \[0, 1\]"),
        ("join", r"Join does not answer for ranks without further samples: give all ranks the same number of batches"),
        ("two wrappers of different ranks", r"of different ranks hold the optimizer's parameters: .*\[0, 1\]"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_what_is_unclear_is_refused_on_all_ranks(
    pool: WorkerPool, situation: str, message: str, world_size: int
) -> None:
    for error in pool.run(refused, situation):
        assert re.search(message, error)


def train_unevenly(name: str, micro_batches: tuple[int, int]) -> Weights | str:
    """Each rank has its own number of micro-batches, and a mean over them; with none its gradient is zero."""
    model, optimizer = make(name)
    optimizer.data_parallel_group = dist.group.WORLD
    count = micro_batches[dist.get_rank()]
    for step in range(STEPS):
        for micro in range(count):
            x = samples(100 * step + 10 * micro + dist.get_rank())
            (model(x).square().sum() / count).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        average_by_hand(model)
        try:
            optimizer.step()
        except StatisticsError as error:
            dist.barrier()  # nobody is left in a collective
            return str(error)
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_ranks_with_different_numbers_of_micro_batches(pool: WorkerPool, name: str, world_size: int) -> None:
    one, other = pool.run(train_unevenly, name, (1, 3))
    assert all(torch.equal(one[layer], other[layer]) for layer in one)
    for message in pool.run(train_unevenly, name, (2, 0)):
        assert re.search(r"has a gradient of .* on a rank that saw no group's gradient", message)


def train_in_join(batches: tuple[int, int]) -> list[Weights]:
    """With DDP's `join()`, each rank its own number of batches; and alone on rank 0's, halved as DDP halves them."""
    (model, optimizer), (alone, reference) = make("lamb"), make("lamb")
    reference.data_parallel_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    ddp = DistributedDataParallel(model)
    with ddp.join():
        for step in range(batches[dist.get_rank()]):
            ddp(samples(step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for step in range(batches[0]):
        (alone(samples(step)).square().sum() / 2).backward()
        reference.step()
        reference.zero_grad()
    return [weights(model), weights(alone)]


@pytest.mark.parametrize("world_size", [2])
def test_a_rank_without_any_batch_in_join(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(train_in_join, (2, 0))
    assert_same([found for found, _ in answers], answers[0][1])
