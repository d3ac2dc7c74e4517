"""The same bits wherever elements of a layer lie: DTensors of any placements, tensor parallelism, memory formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from trustratio.optimizers import create_optimizer

from . import cases
from .cases import Case, LayerSpec, initial_weights, mean_gradients, whole_numbers
from .fsdp_runs import make_mesh
from .megatron_distributed_runs import CUT_MODEL
from .pool import WorkerPool
from .sixteen_bits import Answer, assert_same_bits, kept, make_case, one_process, train_all, whole

pytestmark = pytest.mark.filterwarnings("ignore:.*did not move in this step")

STATE = {"state_dtype": "bfloat16"}
MASTERS = ("stochastic", "kahan")
NAMES = ("lamb", "lars", "lans")
implementations = pytest.mark.parametrize("implementation", [None, "eager"])

# DTensors -----------------------------------------------------------------------------------------------------------

WHOLE = Replicate()
ROWS = {"whole": WHOLE, "rows": Shard(0), "columns": Shard(1), "fused": _StridedShard(0, split_factor=2)}
BOXES = {
    "rows by columns": (Shard(0), Shard(1)),
    "columns by rows": (Shard(1), Shard(0)),
    "rows twice": (Shard(0), Shard(0)),
    "columns twice": (Shard(1), Shard(1)),
    "a dimension": (WHOLE, Shard(1)),
    "the other": (Shard(1), WHOLE),
}
PLACEMENTS: dict[int, dict[str, tuple[Any, ...]]] = {
    1: {name: (placement,) for name, placement in ROWS.items()},
    2: BOXES,
}
"""By the dimensions of the mesh."""


def placed_case(name: str, dimensions: int, options: dict[str, Any], **changes: Any) -> Case:
    layers = tuple(LayerSpec(layer, (12, 12)) for layer in PLACEMENTS[dimensions])
    case = make_case(name, "dense", layers, options=options, **changes)
    return replace(case, groups=case.groups[:1])


def train_placed(case: Case, dimensions: int) -> Answer:
    """Layers that are each cut in another way, stepped without a wrapper."""
    ranks = dist.get_world_size()
    mesh = make_mesh(None if dimensions == 1 else (2, ranks // 2))

    def cut(layer: str, value: torch.Tensor) -> torch.Tensor:
        placements = PLACEMENTS[dimensions][layer]
        if not isinstance(placements[0], _StridedShard):
            return distribute_tensor(value, mesh, placements)
        parts, _ = placements[0]._split_tensor(value, ranks, with_padding=False, contiguous=True)
        return DTensor.from_local(parts[dist.get_rank()], mesh, placements, shape=value.shape, stride=value.stride())

    dtype = torch.bfloat16 if case.parameters == "bf16" else torch.float32
    weights = initial_weights(case)
    parameters = {layer: torch.nn.Parameter(cut(layer, w.to(dtype))) for layer, w in weights.items()}
    group = {"params": list(parameters.items()), **case.groups[0]}
    optimizer = create_optimizer(case.optimizer, [group], lr=1.0, **case.constructor)
    ratios = []
    for step, like in enumerate(mean_gradients(case)):
        for layer, g in whole_numbers(case, step, like, 1).items():
            parameters[layer].grad = cut(layer, g[0].to(dtype))
        optimizer.step()
        ratios.append(optimizer.trust_ratios())
    return Answer(kept(optimizer), ratios)


@implementations
@pytest.mark.parametrize("master", [None, *MASTERS])
@pytest.mark.parametrize(("world_size", "dimensions"), [(2, 1), (3, 1), (4, 2)])
def test_placements(
    pool: WorkerPool, dimensions: int, master: str | None, implementation: str | None, world_size: int
) -> None:
    for name in NAMES:
        options = {**STATE, "master": master}
        parameters = "fp32" if master is None else "bf16"
        case = placed_case(
            name, dimensions, options, parameters=parameters, constructor={"implementation": implementation}
        )
        assert_same_bits(whole(pool.run(train_placed, case, dimensions)), one_process(case, 1))


# Megatron -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 2), (4, 2)])
def test_megatrons_tensor_parallelism(pool: WorkerPool, world_size: int, tensor_parallel: int) -> None:
    several = [make_case(name, "megatron", CUT_MODEL, options=STATE) for name in NAMES]
    for case, *answers in zip(several, *pool.run(train_all, several, tensor_parallel=tensor_parallel), strict=True):
        assert_same_bits(whole(answers), one_process(case, world_size // tensor_parallel))


# Memory formats -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = (LayerSpec("conv", (6, 4, 3, 3)), LayerSpec("small", (2, 5, 2, 2)), LayerSpec("bias", (6,), group=1))


class ChannelsLast(cases.Leaf):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None = None):
        super().__init__(shape, dtype)
        if len(shape) == 4:
            self.weight = torch.nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last))


def train_channels_last(several: list[Case]) -> list[Answer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "Leaf", ChannelsLast)
        return train_all(several)


@implementations
@pytest.mark.parametrize("way", ["ddp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_channels_last(pool: WorkerPool, way: str | int, implementation: str | None, world_size: int) -> None:
    """DeepSpeed and FSDP2 refuse such weights."""
    constructor = {"implementation": implementation}
    several = [make_case(name, way, CONVOLUTIONS, options=STATE, constructor=constructor) for name in NAMES]
    if way == "ddp":
        for master in MASTERS:
            options = {**STATE, "master": master}
            case = make_case("lamb", way, CONVOLUTIONS, options=options, parameters="bf16", constructor=constructor)
            several.append(case)
    for case, *answers in zip(several, *pool.run(train_channels_last, several), strict=True):
        assert_same_bits(whole(answers), one_process(case, world_size))
