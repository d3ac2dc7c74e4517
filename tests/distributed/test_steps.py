"""What real wrappers do to plans: options come back through checkpoints, a step is several calls, parameters move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LAMB, LayoutError
from trustratio.optimizers.sharding.backends import stepped_tensors

from .pool import CaseFailed, WorkerPool

SHAPES = {"embedding": (6, 4), "dense": (4, 4), "head": (4, 3)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.embedding @ self.dense @ self.head).square().sum()


def optimizer_of(model: torch.nn.Module, **options: Any) -> LAMB:
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in model.named_parameters() if n != "head"], "adapt": True},
        {"params": [("head", p) for n, p in model.named_parameters() if n == "head"], "adapt": False},
    ]
    return LAMB(groups, lr=0.1, **options)


def engine_of(stage: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, steps: int = 1) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 6) + dist.get_rank()))
        engine.step()


# Options ------------------------------------------------------------------------------------------------------------


def single_process_state(path: Path | None) -> Any:
    """The state of one process that clips; into a file where a path is given."""
    model = Model()
    optimizer = optimizer_of(model, max_grad_norm=0.5)
    model(torch.ones(2, 6)).backward()
    optimizer.step()
    if path is not None:
        save_optimizer_state(optimizer, path)
    return optimizer.state_dict()


def options_that_come_later(way: str, stage: int, folder: str) -> None:
    """Let a limit that ZeRO makes impossible come into the groups, and train."""
    model = Model()
    optimizer = optimizer_of(model)
    engine = engine_of(stage, model, optimizer)
    train(engine)
    if way == "file":
        path = Path(folder, "state.safetensors")
        single_process_state(path)
        dist.barrier()
        load_optimizer_state(engine, path)
    elif way == "engine":
        for group in optimizer.param_groups:
            group["max_grad_norm"] = 0.5
        engine.save_checkpoint(folder, tag="clipping")
        model = Model()
        optimizer = optimizer_of(model)
        engine = engine_of(stage, model, optimizer)
        engine.load_checkpoint(folder, tag="clipping")
    elif way == "one group":
        optimizer.param_groups[0]["max_grad_norm"] = 0.5
    train(engine)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("way", "stage"), [("file", 1), ("file", 3), ("engine", 1), ("one group", 2), ("one group", 3)]
)
def test_a_limit_that_zero_makes_impossible_is_refused_however_it_comes(
    pool: WorkerPool, way: str, stage: int, world_size: int, tmp_path: Path
) -> None:
    with pytest.raises(CaseFailed, match=r"rank 0:(?s:.)*max_grad_norm(?s:.)*rank 1:(?s:.)*max_grad_norm"):
        pool.run(options_that_come_later, way, stage, str(tmp_path))


def options_by_distributed_checkpoint() -> list[Any]:
    """By torch's own way of loading, into fully_shard, where clipping is possible: the option is taken."""
    saved_model, model = Model(), Model()
    saved = optimizer_of(saved_model, max_grad_norm=0.5)
    saved_model(torch.ones(2, 6)).backward()
    saved.step()
    state = get_optimizer_state_dict(saved_model, saved)
    plain = optimizer_of(plain_model := copy.deepcopy(saved_model), max_grad_norm=0.5)
    plain.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for own, other in zip(model.parameters(), saved_model.parameters(), strict=True):
            own.copy_(other)
    fully_shard(model)
    optimizer = optimizer_of(model)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(state), options=StateDictOptions(full_state_dict=True))
    for each, own in ((model, optimizer), (plain_model, plain)):
        own.zero_grad()
        each(torch.ones(2, 6)).backward()
        own.step()
    pairs = zip(model.parameters(), plain_model.parameters(), strict=True)
    return [(p.full_tensor().detach(), q.detach()) for p, q in pairs]


@pytest.mark.parametrize("world_size", [2])
def test_a_limit_that_comes_by_distributed_checkpoint_is_kept(pool: WorkerPool, world_size: int) -> None:
    for answer in pool.run(options_by_distributed_checkpoint):
        for found, expected in answer:
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


# Steps in several calls ---------------------------------------------------------------------------------------------


def adapted_under(stage: int) -> list[Any]:
    model = Model()
    optimizer = optimizer_of(model)
    engine = engine_of(stage, model, optimizer)
    seen = []
    for _ in range(2):
        train(engine)
        seen.append((list(optimizer.trust_ratios()), optimizer.adapted_layers()))
    return seen


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_layer_is_reported_once_with_its_own_adapt(pool: WorkerPool, stage: int, world_size: int) -> None:
    for answer in pool.run(adapted_under, stage):
        assert answer == [(["embedding", "dense", "head"], {"embedding", "dense"})] * 2


# Parameters that were moved -----------------------------------------------------------------------------------------


def parameters_moved_under(stage: int, kind: str) -> None:
    model = Model()
    optimizer = optimizer_of(model)
    engine = engine_of(stage, model, optimizer)
    if kind == "one storage":
        model.dense.data = model.embedding.data[:4]
    else:
        model.dense.data = model.embedding.data.view(-1)[5:21].view(4, 4)
    train(engine)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("kind", ["one storage", "in part"])
@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_in_one_storage_are_refused_on_all_ranks(
    pool: WorkerPool, stage: int, kind: str, world_size: int
) -> None:
    """Their shards overlap on the first rank alone."""
    with pytest.raises(CaseFailed, match=r"rank 0:(?s:.)*LayoutError(?s:.)*rank 1:(?s:.)*LayoutError"):
        pool.run(parameters_moved_under, stage, kind)


# Parameters that DeepSpeed does not step ----------------------------------------------------------------------------


def trained_later(stage: int, kind: str) -> tuple[str, bool]:
    """What is said of a layer that was not trainable when DeepSpeed took the optimizer, and whether others moved."""
    model = Model()
    model.head.requires_grad_(False)
    given = [(name, weight) for name, weight in model.named_parameters() if kind == "thawed" or name != "head"]
    optimizer = LAMB(given, lr=1e-2)
    engine = engine_of(stage, model, optimizer)
    train(engine)
    before = [tensor.clone() for tensor in flat_weights(optimizer)]
    try:
        model.head.requires_grad_(True)
        if kind == "group":
            optimizer.add_param_group({"params": [("head", model.head)]})
        train(engine)
    except LayoutError as error:
        return str(error), all(map(torch.equal, before, flat_weights(optimizer)))
    return "", False


def flat_weights(optimizer: LAMB) -> list[torch.Tensor]:
    return [tensor for _, tensor in stepped_tensors(optimizer)]


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("kind", ["thawed", "group"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_would_not_step_is_refused(pool: WorkerPool, stage: int, kind: str, world_size: int) -> None:
    """Layers that were frozen at deepspeed.initialize, and groups that are added after it."""
    for message, unchanged in pool.run(trained_later, stage, kind):
        assert "would leave head as it is" in message or "not a group that is added later" in message
        assert "and freeze afterwards what is to be trained later" in message
        assert unchanged
