"""Clipping by norms of whole layers: the gradients that every wrapper's optimizer sees, and what is returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_
from trustratio.optimizers import LayoutError

from .cases import Case
from .exactness import MODEL
from .fsdp_runs import second_dimension
from .megatron_distributed_runs import CUT_MODEL
from .norms_runs import Clip, Wrapped, assert_measured, expected_norms, measure
from .pool import CaseFailed, WorkerPool
from .test_exactness import BF16
from .test_layer_norms import REPLICAS, SHARDINGS, make_case

LIMITS: dict[Any, float] = {False: 2.0, True: 0.5, "rows": 0.1}
KINDS = ("ddp", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 sub-groups", "fsdp1", "fsdp2", "megatron", "redundancy")


def reference(mode: Any, limit: float, norms: list[Any]) -> Clip:
    """What clips a step's gradients in float64, and notes the norms before it."""

    def of_model(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in gradients.values()]).norm()

    def clip(weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
        norms.append([g.norm().item() for g in gradients.values()] if mode is True else of_model(gradients).item())
        whole = of_model(gradients)
        for name, g in gradients.items():
            if mode == "rows":
                rows, of_weights = (x.reshape(len(x) if x.dim() > 1 else 1, -1) for x in (g, weights[name]))
                largest = limit * of_weights.norm(dim=1, keepdim=True).clamp(min=1e-3)
                size = rows.norm(dim=1, keepdim=True)
                g.copy_((rows * torch.where(size > largest, largest / size, 1.0)).reshape(g.shape))
            else:
                g *= min(1.0, limit / ((g.norm() if mode else whole).item() + 1e-6))

    return clip


def assert_clipped(
    pool: WorkerPool, case: Case, wrapped: Wrapped, mode: Any, limit: float | None = None
) -> list[dict[str, Any]]:
    limit = LIMITS[mode] if limit is None else limit
    answers = pool.run(measure, case, wrapped, clip={"max_norm": limit, "per_layer": mode})
    norms: list[Any] = []
    wanted = expected_norms(case, reference(mode, limit, norms))
    for answer in answers:
        for record, of_step in zip(answer["records"], wanted, strict=True):
            assert_measured(record, of_step)
        for found, of_step in zip(answer["norms"], norms, strict=True):
            assert_close(found, of_step)
        assert [record["clipped"] for record in answer["records"]] == [limit < 1e3] * case.steps
    return answers


def assert_close(found: Any, wanted: Any) -> None:
    # The norms of layers come in the order of the parameter groups, or of the wrapper's buffers.
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64).sort().values if isinstance(found, list) else torch.tensor(found),
        torch.tensor(wanted, dtype=torch.float64).sort().values if isinstance(wanted, list) else torch.tensor(wanted),
        rtol=2e-6,
        atol=0.0,
        check_dtype=False,
    )


@pytest.mark.parametrize("mode", [False, True, "rows"])
@pytest.mark.parametrize("sharding", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_clipped_by_whole_layers(pool: WorkerPool, sharding: str, mode: Any, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    answers = assert_clipped(pool, make_case("torch.SGD", stage, **changes), wrapped, mode)
    once = sharding in ("fsdp1", "fsdp2", "redundancy")
    # The first clip also proves the layout; where rows are cut, by an exchange.
    assert set(answers[0]["clips"][1:]) <= {int(once)}


@pytest.mark.parametrize("sharding", ["ddp", "ZeRO-1", "ZeRO-3", "fsdp2", "megatron"])
@pytest.mark.parametrize("world_size", [2])
def test_a_limit_that_nothing_reaches(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    for mode in (False, True, "rows"):
        assert_clipped(pool, make_case("torch.SGD", stage, **changes), wrapped, mode, limit=1e6)


@pytest.mark.parametrize("sharding", ["ZeRO-1", "ZeRO-3 sub-groups", "megatron"])
@pytest.mark.parametrize("world_size", [2])
def test_a_clip_is_of_one_step(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("torch.SGD", stage, **changes)
    clip = reference(True, 0.5, norms := [])
    wanted = expected_norms(case, lambda w, g: None if norms else clip(w, g))
    options = {"max_norm": 0.5, "per_layer": True}
    for answer in pool.run(measure, case, wrapped, clip=options, clips_until=1):
        for record, of_step in zip(answer["records"], wanted, strict=True):
            assert_measured(record, of_step)
        clipped = [record["clipped"] for record in answer["records"]]
        assert clipped == [True, *[None if sharding == "megatron" else False] * (case.steps - 1)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_clip_of_a_step_that_was_skipped_is_none_of_the_next(pool: WorkerPool, stage: int, world_size: int) -> None:
    scaler = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    case = make_case("torch.SGD", stage, dtype="fp16", spread=0.0, overflow=(0,), config={"fp16": scaler})
    case = Case(**{**vars(case), "groups": ({"lr": 0.5},) * 2})
    wanted = expected_norms(case)
    for answer in pool.run(measure, case, Wrapped(outermost=True), clip={"max_norm": 0.1}, clips_until=1):
        for record, of_step in zip(answer["records"][1:], wanted, strict=True):
            assert_measured(record, of_step)
            assert not record["clipped"]
        assert all(norm != norm for norm in answer["norms"])


@pytest.mark.parametrize("mode", [False, True, "rows"])
@pytest.mark.parametrize("world_size", [2])
def test_bf16_optimizer(pool: WorkerPool, mode: Any, world_size: int) -> None:
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    case = make_case("torch.SGD", 1, dtype="bf16", spread=0.0, config=config)
    case = Case(**{**vars(case), "groups": ({"lr": 0.5},) * 2})
    assert_clipped(pool, case, Wrapped(outermost=True), mode)


@pytest.mark.parametrize("world_size", [2])
def test_parts_of_tensor_parallelism(pool: WorkerPool, world_size: int) -> None:
    case = make_case("torch.SGD", "tensor", CUT_MODEL)
    for mode in (False, True):
        answers = assert_clipped(pool, case, Wrapped("tensor"), mode)
        assert answers[0]["clips"][1:] == [1] * (case.steps - 1)
    with pytest.raises(CaseFailed, match="cut in columns, or over several process groups"):
        assert_clipped(pool, case, Wrapped("tensor"), "rows")


@pytest.mark.parametrize("sharding", REPLICAS)
@pytest.mark.parametrize("world_size", [4])
def test_replicas_of_shards(pool: WorkerPool, sharding: str, world_size: int) -> None:
    for mode in (False, True, "rows"):
        assert_clipped(pool, make_case("torch.SGD", "fsdp", MODEL), REPLICAS[sharding], mode)


@pytest.mark.parametrize("world_size", [2])
def test_columns_of_rows_are_refused(pool: WorkerPool, world_size: int) -> None:
    columns = {"options": {"shard_placement_fn": second_dimension}}
    wrapped, case = Wrapped("fsdp2", columns), make_case("torch.SGD", "fsdp", (MODEL[1], MODEL[3]))
    assert_clipped(pool, case, wrapped, True)
    with pytest.raises(CaseFailed, match=r"rows that are cut along one line.*dense"):
        assert_clipped(pool, case, wrapped, "rows")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [2])
def test_what_to_set_where_nobody_knows_the_norm(pool: WorkerPool, stage: int, world_size: int) -> None:
    case = make_case("torch.SGD", stage, zero={"compute_grad_norm": False})
    with pytest.raises(CaseFailed, match="Use gradient_clipping in the DeepSpeed config, or per_layer=True"):
        assert_clipped(pool, case, Wrapped(outermost=True), False)
    assert_clipped(pool, case, Wrapped(outermost=True), True)


def train_one_layer(limit: float) -> tuple[Any, Any]:
    """What the ranks of ZeroRedundancyOptimizer say of a clip, one of which has the only layer."""
    model = torch.nn.Linear(4, 3, bias=False)
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    norms = LayerNorms(optimizer, model)
    parallel(torch.ones(2, 4)).sum().backward()
    norm = clip_grad_norm_(optimizer, limit, model=model)
    optimizer.step()
    return norms.latest().clipped, norm.item()


@pytest.mark.parametrize("world_size", [2])
def test_a_rank_without_layers_says_what_the_others_say(pool: WorkerPool, world_size: int) -> None:
    for limit, clipped in ((0.1, True), (1e6, False)):
        assert pool.run(train_one_layer, limit) == [(clipped, pytest.approx(2 * 12**0.5, rel=1e-6))] * world_size


def clip_before_averaging(first: bool, inside: bool) -> str:
    """What is said of a clip within no_sync() or after it, without or with one that saw averaged gradients."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.full((2, 4), 1.0 + dist.get_rank())
    if first:
        model(batch).sum().backward()
        clip_grad_norm_(optimizer, 0.1, model=model)
    try:
        with model.no_sync():
            model(batch).sum().backward()
            if inside:
                clip_grad_norm_(optimizer, 0.1, model=model)
        clip_grad_norm_(optimizer, 0.1, model=model)
    except LayoutError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("first", "inside"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("world_size", [2])
def test_gradients_that_ranks_have_not_averaged(pool: WorkerPool, first: bool, inside: bool, world_size: int) -> None:
    for said in pool.run(clip_before_averaging, first, inside):
        assert "clip_grad_norm_ needs gradients that ranks have averaged" in said
        assert "outside no_sync()" in said
        assert ("norm of the gradient" in said) is not inside


def clips_under_fsdp2() -> list[bool | None]:
    """`.clipped` after: a clip; none; one that does nothing and then another backward."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms, said = LayerNorms(optimizer, model), []
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(torch.ones(2, 4)).square().sum().backward()
        if step != 1:
            clip_grad_norm_(optimizer, 1e-2 if step == 0 else 1e9)
        if step == 2:
            model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        said.append(norms.latest().clipped)
    return said


@pytest.mark.parametrize("world_size", [2])
def test_what_is_written_into_shards_of_gradients_is_noticed(pool: WorkerPool, world_size: int) -> None:
    assert pool.run(clips_under_fsdp2) == [[True, None, None]] * 2
