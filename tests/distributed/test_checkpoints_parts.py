"""`state_dict()` of one rank, or of another cut, loaded by all: refused on all ranks, by name, before a step."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trustratio.optimizers import LAMB
from trustratio.optimizers.sharding.layout import LayoutError

from .pool import WorkerPool
from .test_checkpoints_lossy import make_engine, refusal, train


def of_first_rank(optimizer: torch.optim.Optimizer) -> Any:
    """What `if rank == 0: torch.save(...)` leaves for all ranks to load."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    contents = [file.getvalue()]
    dist.broadcast_object_list(contents)
    return torch.load(io.BytesIO(contents[0]), weights_only=False)


def load_other_parts_under_zero() -> dict[str, str]:
    in_turn = make_engine(2, zero_optimization={"round_robin_gradients": True})
    train(in_turn, 2)
    optimizer = in_turn.basic_optimizer
    own = optimizer.state_dict()
    optimizer.load_state_dict(own)
    train(in_turn, 1)
    assert "pieces" not in next(iter(optimizer.state.values()))["layers"]
    optimizer.load_state_dict(of_first_rank(optimizer))
    of_rank = refusal(in_turn)
    in_order = make_engine(2)
    in_order.basic_optimizer.load_state_dict(own)
    return {"another rank": of_rank, "another order": refusal(in_order)}


@pytest.mark.parametrize("world_size", [2])
def test_flat_tensors(pool: WorkerPool, world_size: int) -> None:
    for answer in pool.run(load_other_parts_under_zero):
        assert "other parts of the layers than DeepSpeed ZeRO-2 keeps there: 0.weight" in answer["another rank"]
        assert "other parts of the layers than DeepSpeed ZeRO-2 keeps there: 1.weight" in answer["another order"]
        assert "each rank's own state_dict() under the same settings" in answer["another order"]


def load_first_ranks_state_under_fsdp(rows: int, mesh_shape: tuple[int, ...], own: bool) -> str:
    torch.manual_seed(0)
    names = ("replicas", "shards")[-len(mesh_shape) :]
    model = torch.nn.Linear(3, rows)
    fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    optimizer = LAMB(model.named_parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.load_state_dict(optimizer.state_dict() if own else of_first_rank(optimizer))
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    try:
        for _ in range(2):  # a caught refusal is repeated
            try:
                step()
            except LayoutError as error:
                refused = str(error)
            else:
                return "went on"
        assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))  # type: ignore[attr-defined]
        return refused
    finally:
        dist.barrier()


@pytest.mark.parametrize(
    ("rows", "mesh_shape", "own", "message"),
    [
        (
            4,
            (2,),
            False,
            "other parts of the layers than FSDP2 (DTensor) keeps there: weight; bias. Save and load each",
        ),
        (
            5,
            (2,),
            False,
            "other parts of the layers than FSDP2 (DTensor) keeps there: weight; bias. Save and load each",
        ),
        (5, (2,), True, "went on"),
        (5, (2, 1), False, "went on"),  # replicas have the same part
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_dtensors(
    pool: WorkerPool, rows: int, mesh_shape: tuple[int, ...], own: bool, message: str, world_size: int
) -> None:
    for answer in pool.run(load_first_ranks_state_under_fsdp, rows, mesh_shape, own):
        assert message in answer
