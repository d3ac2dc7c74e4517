"""Tensor parallelism by DTensor, alone and under FSDP2: real layers in float64 against one process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LAMB, OPTIMIZERS

from ..base_optimizers import create
from .exactness import BASE_OPTIONS
from .pool import CaseFailed, WorkerPool

STEPS = 4
NAMES = ("lamb", "lars", "lans", "novograd")


class Network(torch.nn.Module):
    """Layers for every style: cut rows and columns, and norms that all ranks have but feed with their own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(24, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.up = torch.nn.Linear(12, 30)
        self.down = torch.nn.Linear(30, 12)
        self.last_norm = torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return torch.nn.functional.cross_entropy(self.head(self.last_norm(x)).flatten(0, 1), ids.roll(1, 1).flatten())


STYLES = {
    "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "last_norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def train(name: str, mesh_shape: tuple[int, ...] | None, make: Callable[..., Any] = create) -> dict[str, Any]:
    """Train in float64; the last dimension of the mesh is tensor-parallel, those before it are FSDP's.

    Without a mesh, this process trains alone on all samples. `make` makes the optimizer of that name.
    """
    torch.manual_seed(0)
    model = Network().double()
    samples, own = 8, slice(None)
    if mesh_shape is not None:
        names = ("replicate", "shard", "tensor")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        parallelize_module(model, mesh["tensor"], STYLES)
        if len(mesh_shape) > 1:
            for layer in (model.up, model.down):
                fully_shard(layer, mesh=mesh[names[:-1]])
            fully_shard(model, mesh=mesh[names[:-1]])
        of_tensor_group = mesh.size() // mesh_shape[-1]
        per_rank = samples // of_tensor_group
        own = slice(dist.get_rank() // mesh_shape[-1] * per_rank, (dist.get_rank() // mesh_shape[-1] + 1) * per_rank)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    options = {"lr": 0.05, "weight_decay": 0.1, **BASE_OPTIONS.get(name, {})}
    groups = [{"params": matrices, **options}, {"params": vectors, **options, "weight_decay": 0.0}]
    optimizer = make(name, groups, lr=options["lr"])
    collectives, ratios = [], []
    for step in range(STEPS):
        ids = torch.randint(24, (samples, 6), generator=torch.Generator().manual_seed(step))
        model(ids[own]).backward()
        with CommDebugMode() as communication:
            optimizer.step()
        collectives.append(communication.get_total_counts())
        ratios.append(optimizer.trust_ratios())
        optimizer.zero_grad()
    answer = {
        "weights": {n: whole(p).detach().clone() for n, p in model.named_parameters()},
        "placements": {n: str(getattr(p, "placements", None)) for n, p in model.named_parameters()},
        "ratios": ratios,
        "collectives": collectives,
    }
    del model, optimizer
    gc.collect()
    return answer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for answer in found:
        for name, weights in wanted["weights"].items():
            torch.testing.assert_close(answer["weights"][name], weights, rtol=1e-9, atol=1e-11)
        for ratios, expected in zip(answer["ratios"], wanted["ratios"], strict=True):
            assert ratios == pytest.approx(expected, rel=1e-9)
        assert answer["ratios"] == found[0]["ratios"]


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [
        (2, (2,)),
        (3, (3,)),
        (4, (2, 2)),
        pytest.param(8, (2, 2, 2), id="replicas of shards of tensor-parallel layers"),
    ],
)
def test_real_layers_equal_one_process(pool: WorkerPool, mesh: tuple[int, ...], world_size: int) -> None:
    for name in NAMES:
        wanted = pool.run(train, name, None)[0]
        found = pool.run(train, name, mesh)
        assert_same(found, wanted)
        # One all-reduce per stage and dimension that cuts a layer; one more adds up the norms' gradients, which under
        # FSDP2 are complete already. The first step gathers the placements over every dimension and proves the layout.
        stages, cut = OPTIMIZERS[name].collectives, min(2, len(mesh))
        each = stages * cut + (len(mesh) == 1)
        assert set(found[0]["collectives"][1:]) == {each}
    if len(mesh) > 1:
        assert "_StridedShard" in found[0]["placements"]["up.weight"]


# Wrappers that take DTensors apart ----------------------------------------------------------------------------------


def step_of_taken_apart(wrapper: str, mesh_shape: tuple[int, int]) -> None:
    """One step of tensor-parallel layers inside a wrapper that shows the optimizer their local parts."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "tensor"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    wrapped: torch.nn.Module
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model, device_mesh=mesh["data"])
    else:
        wrapped = FullyShardedDataParallel(
            model, device_mesh=mesh["data"], use_orig_params=True, device_id=torch.device("cpu")
        )
    optimizer = LAMB(wrapped.named_parameters())
    wrapped(torch.ones(2, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("world_size", "mesh"), [(2, (2, 1)), (4, (2, 2))])
@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("ddp", r"0\.weight, a Parameter of shape .* that DistributedDataParallel has made of a DTensor's part"),
        ("fsdp1", "layer 0.weight is cut by tensor parallelism, and FSDP1 has flattened this rank's part"),
    ],
)
def test_local_parts_without_their_placements_are_refused(
    pool: WorkerPool, wrapper: str, message: str, mesh: tuple[int, int], world_size: int
) -> None:
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(step_of_taken_apart, wrapper, mesh)
    assert str(failure.value).count("LayoutError: ") == world_size
