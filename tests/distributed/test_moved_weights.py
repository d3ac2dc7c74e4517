"""Weights that are moved are the model's in forward, whatever wraps it, and are all as before when they are back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers.layerwise import LayerwiseOptimizer
from trustratio.optimizers.sharding import moved_weights
from trustratio.optimizers.sharding.backends import stepped_tensors
from trustratio.optimizers.sharding.local_tensors import local_part
from trustratio.optimizers.sharding.moved_weights import MovedWeights
from trustratio.optimizers.sharding.names import observed

from .cases import DTYPES, Case, mean_gradients
from .norms_runs import Run, Wrapped, running
from .pool import CaseFailed, WorkerPool
from .test_exactness import BF16, OFFLOAD
from .test_layer_norms import make_case

SUMS_IN_FP32 = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
ZERO3 = {"stage3_param_persistence_threshold": 50}

SHARDINGS: dict[str, tuple[Wrapped, str | int, dict[str, Any]]] = {
    "dense": (Wrapped(), "dense", {}),
    "ddp": (Wrapped(), "ddp", {}),
    "ZeRO-0": (Wrapped(), 0, {}),
    "FP16_UnfusedOptimizer": (Wrapped(), 0, {"dtype": "bf16", "config": BF16}),
    "ZeRO-1": (Wrapped(), 1, {}),
    "ZeRO-1 round robin": (Wrapped(), 1, {"zero": {"round_robin_gradients": True}, "dtype": "bf16"}),
    "BF16_Optimizer": (Wrapped(), 1, {"dtype": "bf16", "config": SUMS_IN_FP32}),
    "ZeRO-2": (Wrapped(), 2, {}),
    "ZeRO-2 16 bits": (Wrapped(), 2, {"dtype": "bf16"}),
    "ZeRO-2 offload": (Wrapped(), 2, {"zero": OFFLOAD, "config": {"zero_force_ds_cpu_optimizer": False}}),
    "ZeRO-3": (Wrapped(), 3, {}),
    "ZeRO-3 sub-groups": (Wrapped(), 3, {"zero": {"sub_group_size": 60, **ZERO3}, "dtype": "bf16"}),
    "ZeRO-3 Init": (Wrapped(), 3, {"zero_init": True}),
    "fsdp1": (Wrapped("fsdp1"), "fsdp1", {}),
    "fsdp1 SHARD_GRAD_OP": (Wrapped("fsdp1", {"strategy": "SHARD_GRAD_OP", "units": True}), "fsdp1", {}),
    "fsdp1 NO_SHARD": (Wrapped("fsdp1", {"strategy": "NO_SHARD"}), "fsdp1", {}),
    "fsdp2": (Wrapped("fsdp2"), "fsdp", {}),
    "fsdp2 kept": (Wrapped("fsdp2", {"units": True, "options": {"reshard_after_forward": False}}), "fsdp", {}),
    "megatron": (Wrapped("megatron"), "megatron", {}),
    "megatron 16 bits": (Wrapped("megatron"), "megatron", {"dtype": "bf16"}),
    "megatron overlapped": (
        Wrapped("megatron", {"ddp": {"overlap_param_gather": True, "overlap_grad_reduce": True}}),
        "megatron",
        {"dtype": "bf16"},
    ),
}


def loss_of(run: Run) -> float:
    """A sum over all weights, as forward sees them; an evaluation, after which FSDP may keep what it has gathered."""
    given = {name: g.to(DTYPES[run.case.dtype]) for name, g in mean_gradients(run.case)[0].items()}
    with torch.no_grad():
        return float(run.model(given).double())


def move_and_train(case: Case, wrapped: Wrapped, factor: float | None) -> dict[str, Any]:
    """Train, with all weights times a factor of two for a while after the second step; None to leave them."""
    with running(case, wrapped) as run:
        run.train(0, 2)
        ours = isinstance(run.optimizer, LayerwiseOptimizer)
        optimizer: Any = run.optimizer if ours else observed(run.optimizer, run.model)
        before, there, after, same = loss_of(run), None, None, None
        if factor is not None:
            moved = MovedWeights(optimizer)
            tensors = [tensor for _, tensor in stepped_tensors(optimizer)]
            old = [local_part(tensor).clone() for tensor in tensors]
            moved.move(tensors, lambda _, local: local.mul_(factor))
            there = loss_of(run)
            moved.restore()
            after = loss_of(run)
            same = all(torch.equal(local_part(t), o) for t, o in zip(tensors, old, strict=True))
        run.train(2, case.steps)
        return {"before": before, "there": there, "after": after, "same": same, "end": loss_of(run)}


@pytest.mark.parametrize("name", ["lamb", "torch.AdamW"])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_model_moves_and_comes_back(pool: WorkerPool, sharding: str, name: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case(name, stage, **{"steps": 4, **changes})
    left_alone = pool.run(move_and_train, case, wrapped, None)
    for answer, undisturbed in zip(pool.run(move_and_train, case, wrapped, 2.0), left_alone, strict=True):
        assert answer["there"] == 2 * answer["before"]  # a factor of two is exact in every dtype
        assert answer["after"] == answer["before"] == undisturbed["before"]
        assert answer["same"]
        assert answer["end"] == undisturbed["end"]


def move_without_publishing(case: Case, wrapped: Wrapped) -> None:
    publish = moved_weights.publish_weights
    moved_weights.publish_weights = lambda optimizer: None
    try:
        answer = move_and_train(case, wrapped, 2.0)
    finally:
        moved_weights.publish_weights = publish
    assert answer["there"] == 2 * answer["before"]


@pytest.mark.parametrize(
    "sharding", ["ZeRO-1", "BF16_Optimizer", "ZeRO-3", "fsdp1 SHARD_GRAD_OP", "fsdp2 kept", "megatron overlapped"]
)
@pytest.mark.parametrize("world_size", [2])
def test_a_model_that_is_not_told_is_caught(pool: WorkerPool, sharding: str, world_size: int) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    with pytest.raises(CaseFailed, match="AssertionError"):
        pool.run(move_without_publishing, make_case("lamb", stage, **{"steps": 2, **changes}), wrapped)
