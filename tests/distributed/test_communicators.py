"""Communicators are never made in backward, and an error about gradients without groups is one of all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from trustratio.optimizers import create_optimizer
from trustratio.optimizers.gradient_statistics.norms import StatisticsError
from trustratio.optimizers.gradient_statistics.squares import Bucket
from trustratio.optimizers.gradient_statistics.watch import GradientStatistics
from trustratio.optimizers.gradient_statistics.watched import backward_pass

from . import cases, fsdp_runs
from .cases import Case, LayerSpec
from .exactness import assert_exact
from .group_runs import measured
from .pool import WorkerPool
from .test_exactness import make_case

COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_single")
Events = list[tuple[str, bool]]


@contextmanager
def recording() -> Iterator[Events]:
    """What is made, and what goes through it, each with whether a backward pass was running; of new groups alone."""
    events: Events = []
    made: list[Any] = []
    names = ["new_group", *(name for name in COLLECTIVES if hasattr(dist, name))]
    originals = {name: getattr(dist, name) for name in names}

    def recorded(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = originals[name](*args, **kwargs)
            is_own = name == "new_group" and kwargs.get("use_local_synchronization", False)  # wrappers make others
            if is_own:
                made.append(found)
            if is_own or any(kwargs.get("group") is group for group in made):
                events.append((name, backward_pass() != -1))
            return found

        return call

    make_bucket = Bucket.__init__

    def bucket(self: Bucket, process_group: Any, *args: Any) -> None:
        make_bucket(self, process_group, *args)
        events.append(("bucket" if any(process_group is one for one in made) else "bucket of the wrapper", False))

    for name in names:
        setattr(dist, name, recorded(name))
    Bucket.__init__ = bucket  # type: ignore[method-assign]
    try:
        yield events
    finally:
        Bucket.__init__ = make_bucket  # type: ignore[method-assign]
        for name in names:
            setattr(dist, name, originals[name])


def run_recorded(case: Case) -> dict[str, Any]:
    """With buckets so small that they are sent in backward."""
    with recording() as events, measured(64):
        result = fsdp_runs.run_case(case, fsdp_runs.Setup()) if case.stage == "fsdp" else cases.run_case(case)
    return {**result, "events": events}


@pytest.mark.parametrize("name", ["vrsgd", "clars"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3, "fsdp"])
def test_no_communicator_is_made_in_backward(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    """It has one before the first backward, which then sends squares in it."""
    changes = {"accumulation": 2}
    case = fsdp_runs.make_case(name, **changes) if stage == "fsdp" else make_case(name, stage, **changes)
    answers = pool.run(run_recorded, case)
    assert_exact(case, answers)
    for answer in answers:
        by_squares = answer["events"]
        if name == "clars":
            assert by_squares == []
            continue
        assert by_squares[:3] == [("new_group", False), ("all_reduce", False), ("bucket", False)]
        assert all(name.startswith("reduce") for name, _ in by_squares[3:])
        in_backward = [in_backward for _, in_backward in by_squares[3:]]
        assert in_backward
        assert any(in_backward) is (stage != 1)


def run_without_own_groups(case: Case) -> dict[str, Any]:
    """As where no forward of the whole model is seen before backward: a pipeline calls its layers, or eval() holds."""
    make = GradientStatistics._open_groups
    GradientStatistics._open_groups = lambda self: None  # type: ignore[method-assign]
    try:
        return run_recorded(case)
    finally:
        GradientStatistics._open_groups = make  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["vrsgd", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [2, 3, "fsdp"])
def test_squares_travel_over_the_wrappers_group_without_a_forward(
    pool: WorkerPool, name: str, stage: str | int, world_size: int
) -> None:
    """Nothing is made in backward then either, and the numbers are the same."""
    changes = {"accumulation": 2}
    case = fsdp_runs.make_case(name, **changes) if stage == "fsdp" else make_case(name, stage, **changes)
    answers = pool.run(run_without_own_groups, case)
    assert_exact(case, answers)
    for answer in answers:
        assert answer["events"][0] == ("bucket of the wrapper", False)
        assert ("new_group", True) not in answer["events"]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x).relu())


def ratios_of_a_compiled_model(name: str, compiled: str) -> list[dict[str, float]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = torch.nn.Sequential(Block(), Block())
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = create_optimizer(name, model.named_parameters(), lr=0.1)
    run: Any = torch.compile(model, backend="eager") if compiled == "around" else model
    for part in {"whole": [model], "blocks": list(model)}.get(compiled, []):
        part.compile(backend="eager")
    found = []
    for x in torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank())):
        for micro_batch in x:
            run(micro_batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer.trust_ratios())
    return found


@pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")
@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_a_compiled_model_under_fsdp2_is_seen(pool: WorkerPool, name: str, world_size: int) -> None:
    """The modules that put other tensors in the parameters' place end a graph; others do not."""
    expected = pool.run(ratios_of_a_compiled_model, name, "not")
    for compiled in ("whole", "around", "blocks"):
        for found, plain in zip(pool.run(ratios_of_a_compiled_model, name, compiled), expected, strict=True):
            assert [pytest.approx(step, rel=1e-5) for step in plain] == found


# Errors of one rank -------------------------------------------------------------------------------------------------


def error_of(work: Callable[[], Any]) -> str:
    """The StatisticsError that a rank raises, within a minute, whatever the others do."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for a rank that has raised"
    assert [type(error) for error in raised] == [StatisticsError]
    return str(raised[0])


def step_without_forward(name: str) -> str:
    """Of a layer cut by FSDP2, rank 0 alone has a gradient that is not zero."""
    layer = torch.nn.Linear(3, 4, bias=False)
    fully_shard(layer)
    optimizer = create_optimizer(name, layer.parameters(), lr=0.1)
    gradient = torch.zeros(4, 3)
    gradient[0] = 1
    weight = layer.weight
    weight.grad = distribute_tensor(gradient, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
    return error_of(optimizer.step)


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("world_size", [2])
def test_a_gradient_without_a_forward_is_an_error_on_ranks_that_hold_zeros_of_it(
    pool: WorkerPool, name: str, world_size: int
) -> None:
    for message in pool.run(step_without_forward, name):
        assert "has a gradient of layer 0.0 but saw none of its groups'" in message


def run_without_hooks(case: Case) -> str:
    see = GradientStatistics._see
    GradientStatistics._see = lambda self, watched, gradient: None  # type: ignore[method-assign]
    try:
        return error_of(lambda: cases.run_case(case))
    finally:
        GradientStatistics._see = see  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_without_groups_are_an_error_on_ranks_that_hold_padding_alone(
    pool: WorkerPool, name: str, stage: int, world_size: int
) -> None:
    case = make_case(name, stage, (LayerSpec("a", (1, 1)), LayerSpec("b", (1,), group=1)))
    for message in pool.run(run_without_hooks, case):
        assert "has gradients but saw no group's gradient" in message
