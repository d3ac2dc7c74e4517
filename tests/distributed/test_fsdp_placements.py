"""Any placements of DTensors in one optimizer, gradients that are sums over ranks, and fused matrices cut apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from trustratio.optimizers import LAMB, OPTIMIZERS, create_optimizer
from trustratio.optimizers.sharding.local_tensors import local_part

from .cases import LayerSpec, initial_weights, mean_gradients
from .exactness import assert_exact
from .fsdp_runs import make_case, make_mesh
from .pool import CaseFailed, WorkerPool

WHOLE, CUT = Replicate(), Shard(0)
PLACEMENTS: dict[str, tuple[Any, ...] | None] = {
    "cut by both dimensions": (CUT, CUT),
    "rows by columns": (CUT, Shard(1)),
    "columns": (WHOLE, Shard(1)),
    "cut by the first dimension": (Shard(1), WHOLE),
    "whole": (WHOLE, WHOLE),
    "on another mesh": (Shard(0),),
    "no DTensor": None,
}


def step_with_placements(name: str) -> dict[str, Any]:
    """Five steps of one optimizer whose layers are each cut in another way."""
    case = make_case(name, tuple(LayerSpec(cut, (5, 7)) for cut in PLACEMENTS))
    meshes = {2: make_mesh((2, 2)), 1: make_mesh(None)}

    def cut(layer: str, value: torch.Tensor) -> torch.Tensor:
        placements = PLACEMENTS[layer]
        return value if placements is None else distribute_tensor(value, meshes[len(placements)], placements)

    parameters = {layer: torch.nn.Parameter(cut(layer, w)) for layer, w in initial_weights(case).items()}
    optimizer = create_optimizer(name, [{"params": parameters.items(), **case.groups[0]}], lr=1.0)
    ratios, calls = [], []
    for step, gradients in enumerate(mean_gradients(case)):
        for layer, parameter in parameters.items():
            parameter.grad = cut(layer, gradients[layer])
        if step == 4:
            # A gradient that is still a sum over ranks, as tensor parallelism may leave it.
            whole = gradients["whole"]
            halves = [Partial(), WHOLE]
            parameters["whole"].grad = DTensor.from_local(whole / 2, meshes[2], halves)
        with CommDebugMode() as communication:
            optimizer.step()
        calls.append(sum(n for kind, n in communication.get_comm_counts().items() if "reduce" in str(kind)))
        ratios.append(optimizer.trust_ratios())
    weights = {
        layer: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for layer, p in parameters.items()
    }
    return {"weights": weights, "ratios": ratios, "collectives": calls}


@pytest.mark.parametrize("name", ["lamb", "lars", "lans", "novograd", "sngm"])
@pytest.mark.parametrize("world_size", [4])
def test_every_placement_in_one_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    case = replace(make_case(name, tuple(LayerSpec(cut, (5, 7)) for cut in PLACEMENTS)), spread=0.0)
    answers = pool.run(step_with_placements, name)
    assert_exact(case, answers)
    # One for each dimension of the first mesh and one for the second. The first step also proves the layout,
    # and compares placements and what the ranks have done.
    stages = OPTIMIZERS[name].collectives
    assert answers[0]["collectives"] == [3 * (stages + 3), 3 * stages, 3 * stages, 3 * stages, 3 * stages + 1]


def step_with_missing_parts() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One step with sums over ranks to which the second rank adds nothing for one layer; a third has no gradient."""
    mesh = make_mesh(None)
    parameters = {
        name: torch.nn.Parameter(distribute_tensor(torch.ones(4, 3) * (index + 1), mesh, [Replicate()]))
        for index, name in enumerate(("missing", "whole", "unused"))
    }
    optimizer = LAMB(parameters.items(), lr=0.1)
    for name in ("whole",) if dist.get_rank() == 1 else ("missing", "whole"):
        parameters[name].grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    optimizer.step()
    return {name: p.to_local().detach().clone() for name, p in parameters.items()}, optimizer.trust_ratios()


@pytest.mark.parametrize("world_size", [2])
def test_ranks_without_a_part_of_a_gradient_add_zeros(pool: WorkerPool, world_size: int) -> None:
    (one, ratios), (other, other_ratios) = pool.run(step_with_missing_parts)
    assert ratios == other_ratios
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["unused"], torch.full((4, 3), 3.0))
    assert not torch.equal(one["missing"], torch.ones(4, 3))


def step_with_fused_rows(name: str, dimension: int, segments: int | None, fused: bool) -> dict[str, Any]:
    """Three steps of a fused matrix of which each rank has a part of each of three, or all of it."""
    mesh = make_mesh(None)
    weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    cut = _StridedShard(dimension, split_factor=3)

    def place(value: torch.Tensor) -> torch.Tensor:
        if not fused:
            return value
        parts, _ = cut._split_tensor(value, dist.get_world_size(), with_padding=False, contiguous=True)
        return DTensor.from_local(parts[dist.get_rank()], mesh, [cut], shape=value.shape, stride=value.stride())

    parameter = torch.nn.Parameter(place(weight))
    group = {"params": [("qkv", parameter)], "segments": segments}
    optimizer: Any = create_optimizer(name, [group], lr=0.1)
    for step in range(3):
        parameter.grad = place(torch.randn(12, 6, generator=torch.Generator().manual_seed(step + 1)))
        optimizer.step()
    return {"weights": local_part(parameter.detach()).clone(), "ratios": optimizer.trust_ratios()}


@pytest.mark.parametrize("world_size", [2])
def test_fused_matrices_cut_apart(pool: WorkerPool, world_size: int) -> None:
    for name in ("lamb", "lars", "novograd"):
        for segments in (None, 3):
            wanted = pool.run(step_with_fused_rows, name, 0, segments, False)[0]
            pieces = wanted["weights"].chunk(3)
            for rank, found in enumerate(pool.run(step_with_fused_rows, name, 0, segments, True)):
                part = torch.cat([piece.chunk(world_size)[rank] for piece in pieces])
                torch.testing.assert_close(found["weights"], part, rtol=1e-6, atol=1e-7)
                assert found["ratios"] == pytest.approx(wanted["ratios"], rel=1e-6)
    with pytest.raises(CaseFailed, match="several pieces along dimension 1: supported along dimension 0 only"):
        pool.run(step_with_fused_rows, "lamb", 1, None, True)
