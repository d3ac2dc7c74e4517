"""AdaShift's second moment is made of the largest square of a whole layer, which a step reduces besides sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trustratio.optimizers import AdaShift
from trustratio.optimizers.sharding.layout import Layer, Layout

from . import fsdp_runs
from .cases import Case, LayerSpec, initial_weights, run_case
from .exactness import BOUND, MODEL, assert_exact, worst_error
from .pool import WorkerPool
from .test_exactness import make_case

NAN, INF = float("nan"), float("inf")
Reduce = Callable[..., torch.Tensor]


def reduced(rows: list[list[list[float]]]) -> list[list[float]]:
    """The largest of the ranks' numbers, of three layers; the one in the middle is not cut."""
    weights = torch.ones(6)
    layers = tuple(Layer(name, (2,), 0) for name in "abc")
    layout = Layout("test", (weights,), (0,), layers, (), reductions=((dist.group.WORLD, (0, 2)),))
    largest: list[list[float]] = layout.reduce(
        torch.tensor(rows[dist.get_rank()], dtype=torch.float64), largest=True
    ).tolist()
    return largest


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_largest_of_all_ranks_and_nan_above_all(pool: WorkerPool, world_size: int) -> None:
    """Gloo's own maximum of floating point numbers loses NaN, on some ranks or on all."""
    rows = [
        [[1.0, 10.0, NAN], [INF, 1.0, 0.0], [1e-300, 1.0, 0.0]],
        [[2.0, 20.0, 5.0], [-NAN, 1.0, 5e-324], [1e-299, 1.0, 0.0]],
        [[1.5, 30.0, INF], [3.0, 1.0, 0.0], [0.0, 1.0, 0.0]],
    ]
    for rank, found in enumerate(pool.run(reduced, rows[:world_size])):
        expected = [[2.0, rows[rank][0][1], NAN], [NAN, 1.0, 5e-324], [1e-299, 1.0, 0.0]]
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)


def broken_step() -> tuple[list[float], float]:
    """What is left of this rank's part of a layer, and its moment, after one element on one rank was NaN."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = torch.nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    optimizer = AdaShift([("w", w)], keep=1)
    gradient = torch.arange(1.0, 9.0)
    gradient[1] = NAN
    for g in (gradient, torch.ones(8)):
        w.grad = distribute_tensor(g, mesh, [Shard(0)])
        optimizer.step()
    return w.to_local().tolist(), optimizer.state[w]["exp_avg_sq"].item()  # type: ignore[attr-defined]


@pytest.mark.parametrize("world_size", [2])
def test_a_broken_element_of_one_rank_shows_on_all(pool: WorkerPool, world_size: int) -> None:
    for weights, moment in pool.run(broken_step):
        assert torch.tensor([*weights, moment]).isnan().all()


# What goes wrong without the reduction ------------------------------------------------------------------------------


def of_local_parts(reduce: Reduce, layout: Layout, numbers: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
    local = numbers.clone()
    reduced = reduce(layout, numbers, *rest, **how)
    if how.get("largest"):  # of the old gradient alone: by that of the new one ranks would find out that they differ
        reduced[0] = local[0]
    return reduced


def summed(reduce: Reduce, layout: Layout, numbers: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
    return reduce(layout, numbers, *rest)


@contextmanager
def reducing(how: Callable[..., torch.Tensor]) -> Iterator[None]:
    reduce = Layout.reduce
    Layout.reduce = lambda layout, *rest, **options: how(reduce, layout, *rest, **options)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Layout.reduce = reduce  # type: ignore[method-assign]


def run_wrong(case: Case, how: Callable[..., torch.Tensor]) -> dict[str, Any]:
    with reducing(how):
        return run_case(case)


@pytest.mark.parametrize("how", [of_local_parts, summed], ids=["of local parts", "summed"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_harness_catches_other_maxima(pool: WorkerPool, stage: int, how: Any, world_size: int) -> None:
    case = make_case("adashift", stage)
    error, _ = worst_error(case, pool.run(run_wrong, case, how)[0]["weights"])
    assert error > 1000 * BOUND


# Groups, gaps and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["max", "mean", None])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", ["ddp", 1, 2])
def test_each_layer_has_its_own_queue(pool: WorkerPool, stage: str | int, reduction: Any, world_size: int) -> None:
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale")}
    case = make_case("adashift", stage, steps=7, skipped=skipped, options={"reduction": reduction})
    answers = pool.run(run_case, case)
    assert_exact(case, answers)
    assert answers[0]["step_counts"]["dense"] == 5
    assert answers[0]["step_counts"]["conv"] == 7


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3, "fsdp"])
def test_groups_that_reduce_differently(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    """Where one call steps both groups, that is a maximum and a sum, and so two all-reduces."""
    case = make_case("adashift", stage)
    first, second = case.groups
    case = replace(case, groups=({**first, "adapt": True}, {**second, "reduction": "mean"}))
    if stage == "fsdp":
        answers = pool.run(fsdp_runs.run_case, case, fsdp_runs.Setup())
        assert set(answers[0]["collectives"][1:]) == {3}  # the first group has its norms besides
    else:
        answers = pool.run(run_case, case)
    assert_exact(case, answers)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ["ddp", 1, 2, 3])
def test_unused_frozen_and_tied_layers(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    layers = (*MODEL, LayerSpec("frozen", (5, 5), frozen=True), LayerSpec("decoder", (37, 11), tied_to="embedding"))
    case = make_case("adashift", stage, layers, skipped=dict.fromkeys(range(5), ("dense", "norm")))
    answers = pool.run(run_case, case)
    assert_exact(case, answers)
    assert torch.equal(answers[0]["weights"]["dense"], initial_weights(case)["dense"])


@pytest.mark.parametrize("name", ["adashift", "adabelief", "fastadabelief"])
@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_padding_is_neither_read_nor_written(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    case = make_case(name, stage, poison=True, options={"adapt": None})
    answers = pool.run(run_case, case)
    assert_exact(case, answers)
    assert all(answer["padding_is_nan"] for answer in answers)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulation_and_16_bits(pool: WorkerPool, stage: int, reduction: str, world_size: int) -> None:
    options = {"reduction": reduction}
    for changes in ({"accumulation": 3}, {"dtype": "bf16", "spread": 0.0}):
        case = make_case("adashift", stage, options=options, **changes)  # type: ignore[arg-type]
        assert_exact(case, pool.run(run_case, case))


@pytest.mark.parametrize("reduction", ["max", None])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_a_queue_that_is_not_full(
    pool: WorkerPool, stage: int, reduction: Any, world_size: int, tmp_path: Any
) -> None:
    straight = make_case("adashift", stage, steps=7, options={"keep": 4, "reduction": reduction})
    resumed = replace(straight, save_after=2, folder=str(tmp_path))
    one, other = pool.run(run_case, straight), pool.run(run_case, resumed)
    assert_exact(straight, one)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(w, b["weights"][layer]) for layer, w in a["weights"].items())
        assert a["step_counts"] == b["step_counts"]
