"""After the first step of a plan, ranks that train the same layers compare their ratios; those that differ are told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer, create_optimizer

from .collective_counter import CollectiveCounter
from .pool import CaseFailed, WorkerPool

SHAPES = {"one": (4, 3), "two": (3, 5)}
OF_EVERY_KIND = ("lamb", "lars", "lans", "novograd", "sngm")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.one @ self.two).square().sum()


def batch() -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(dist.get_rank()))


def collectives_of(optimizer: LayerwiseOptimizer, take_step: Callable[[], Any], steps: int = 4) -> list[int]:
    counter = CollectiveCounter(optimizer)
    try:
        for _ in range(steps):
            take_step()
    finally:
        counter.close()
    return list(counter.per_call)


# Ranks that do the same ---------------------------------------------------------------------------------------------


def under_ddp(name: str, no_sync: bool = False, named: bool = True) -> list[int]:
    model = Model()
    parallel = DistributedDataParallel(model)
    optimizer = create_optimizer(name, model.named_parameters() if named else model.parameters(), lr=0.1)

    def take_step() -> None:
        optimizer.zero_grad()
        if no_sync:
            with parallel.no_sync():
                parallel(batch()).backward()
        else:
            parallel(batch()).backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*without the sample of the curvature.*")  # as this loop takes none
        return collectives_of(optimizer, take_step)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None])
def test_one_collective_in_the_first_step(pool: WorkerPool, name: str, world_size: int) -> None:
    if name != "cowclip":
        assert pool.run(under_ddp, name) == [[1, 0, 0, 0]] * world_size


def a_group_is_added() -> list[int]:
    model = Model()
    parallel = DistributedDataParallel(model)
    optimizer = create_optimizer("lamb", [("one", model.one)], lr=0.1)

    def take_step() -> None:
        parallel(batch()).backward()
        optimizer.step()

    calls = collectives_of(optimizer, take_step, 2)
    optimizer.add_param_group({"params": [("two", model.two)]})
    return calls + collectives_of(optimizer, take_step, 2)


def ranks_have_other_layers(kind: str) -> list[int]:
    """All ranks are under one DDP, and each steps some of its layers, all of one shape; or one rank steps none."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(dist.get_world_size())))
    parallel = DistributedDataParallel(model)
    named = list(model.named_parameters())
    mine: Any = [named[dist.get_rank()]]
    if kind == "unnamed":
        mine = [parameter for _, parameter in mine]
    optimizer = create_optimizer("lamb", mine, lr=0.1)
    if kind == "none" and dist.get_rank() > 0:
        optimizer.param_groups[0]["params"] = []

    def take_step() -> None:
        parallel(batch()).square().sum().backward()
        optimizer.step()

    return collectives_of(optimizer, take_step, 2)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("kind", ["none", "named", "unnamed"])
def test_ranks_with_other_layers_neither_hang_nor_fail(pool: WorkerPool, kind: str, world_size: int) -> None:
    assert [calls[1:] for calls in pool.run(ranks_have_other_layers, kind)] == [[0]] * world_size


def nobody_is_known() -> list[int]:
    model = Model()
    optimizer = create_optimizer("lamb", model.named_parameters(), lr=0.1)

    def take_step() -> None:
        model(batch()).backward()
        optimizer.step()

    return collectives_of(optimizer, take_step, 2)


@pytest.mark.parametrize("world_size", [2])
def test_plans_compare_once_and_only_with_ranks_that_are_known(pool: WorkerPool, world_size: int) -> None:
    assert pool.run(a_group_is_added) == [[1, 0, 1, 0]] * world_size
    assert pool.run(nobody_is_known) == [[0, 0]] * world_size


def broken_batches() -> list[bool]:
    """A gradient that is not a number is none on all ranks alike."""
    model = Model()
    parallel = DistributedDataParallel(model)
    optimizer = create_optimizer("lamb", model.named_parameters(), lr=0.1)
    parallel(batch() * float("nan")).backward()
    optimizer.step()
    return [ratio != ratio for ratio in optimizer.trust_ratios().values()]


@pytest.mark.parametrize("world_size", [2])
def test_nan_equals_nan(pool: WorkerPool, world_size: int) -> None:
    assert pool.run(broken_batches) == [[True, True]] * world_size


# Ranks that do not --------------------------------------------------------------------------------------------------

SAME_STEPS = r"rank 0:(?s:.)*LayoutError: ranks that train the same layers(?s:.)*rank 1:(?s:.)*LayoutError: ranks that"


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(("name", "named"), [*((name, True) for name in OF_EVERY_KIND), ("lamb", False)])
def test_gradients_that_are_not_averaged_are_told(pool: WorkerPool, name: str, named: bool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=SAME_STEPS):
        pool.run(under_ddp, name, no_sync=True, named=named)


def something_differs(wrapper: str, what: str) -> None:
    """Train where one rank has other weights, gradients, options or state."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    model: Any = Model()
    options = {"lr": 0.1, "weight_decay": 0.5 if odd and what == "options" else 0.1}
    optimizer = None
    trained: Any = model
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    elif wrapper == "replicate":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, p in list(model.named_parameters()):
            setattr(model, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
    elif wrapper == "fsdp2":
        fully_shard(model)
    elif wrapper == "fsdp1":
        strategy = ShardingStrategy.NO_SHARD if what == "weights" else ShardingStrategy.FULL_SHARD
        trained = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=strategy
        )
    optimizer = create_optimizer("lamb", trained.named_parameters(), **options)
    engine = None
    if wrapper == "zero":
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 1},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if what == "weights" and odd:
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.01)
    if engine is not None:
        engine.backward(engine(batch()))
        engine.step()
        return
    if wrapper == "replicate":
        for p in model.parameters():
            p.grad = torch.ones_like(p) * (1 + 0.1 * (odd and what == "gradients"))
    else:
        trained(batch()).backward()
    if what == "state":
        for p in trained.parameters():
            local = torch.full_like(p, 0.1 * (1 + odd))
            optimizer.state[p].update(step=torch.tensor(3.0), exp_avg=local, exp_avg_sq=local.square())
    optimizer.step()


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("wrapper", "what"),
    [
        ("ddp", "weights"),
        ("ddp", "options"),
        ("ddp", "state"),
        ("replicate", "gradients"),
        ("replicate", "weights"),
        ("fsdp1", "weights"),
        ("fsdp1", "options"),
        ("fsdp2", "options"),
        ("zero", "options"),
    ],
)
def test_what_differs_between_ranks_is_told(pool: WorkerPool, wrapper: str, what: str, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=SAME_STEPS):
        pool.run(something_differs, wrapper, what)


def the_last_bits_differ() -> list[str]:
    model = Model()
    parallel = DistributedDataParallel(model)
    optimizer = create_optimizer("lars", model.named_parameters(), lr=0.1)
    parallel(batch()).backward()
    with torch.no_grad():
        model.one.mul_(1 + 2e-7 * dist.get_rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("world_size", [2])
def test_rounding_is_a_warning(pool: WorkerPool, world_size: int) -> None:
    for (message,) in pool.run(the_last_bits_differ):
        assert "differ by rounding: one: trust ratio " in message
        assert " on rank 0, " in message
