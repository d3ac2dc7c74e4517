"""The consolidated state where tensor parallelism cuts layers: from one process to its ranks, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state
from trustratio.integrations.megatron import use_mpu
from trustratio.optimizers import LAMB

from .pool import CaseFailed, WorkerPool
from .recorded import cut_dimension, fresh_deepspeed_groups, whole
from .test_megatron import Unit
from .test_tensor_parallel import small_bert, small_llama

Tensors = dict[str, torch.Tensor]
BOUND = 2e-6

# Megatron: layers that carry its attributes ---------------------------------------------------------------------------

# The shape, the dimension that is cut, and how many stacked matrices are cut each on its own.
LAYERS: dict[str, tuple[tuple[int, ...], int | None, int]] = {
    "rows": ((6, 5), 0, 1),
    "columns": ((5, 8), 1, 1),
    "middle": ((2, 4, 3), 1, 1),
    "last": ((2, 3, 4), 2, 1),
    "gated": ((8, 3), 0, 2),
    "gated columns": ((3, 8), 1, 2),
    "whole": ((4, 4), None, 1),
    "bias": ((6,), 0, 1),
}


def draw(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, (shape, *_) in LAYERS.items()}


def part_of(name: str, value: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    _, dimension, stacked = LAYERS[name]
    if dimension is None:
        return value.clone()
    pieces = [matrix.chunk(ranks, dim=dimension)[rank] for matrix in value.chunk(stacked, dim=dimension)]
    return torch.cat(pieces, dim=dimension)


def steps(optimizer: LAMB, parameters: Tensors, seeds: range, rank: int = 0, ranks: int = 1) -> None:
    for seed in seeds:
        for name, gradient in draw(seed).items():
            parameters[name].grad = part_of(name, gradient, rank, ranks)
        optimizer.step()


def start(seed: int, rank: int = 0, ranks: int = 1) -> tuple[Tensors, LAMB]:
    parameters = {name: torch.nn.Parameter(part_of(name, value, rank, ranks)) for name, value in draw(seed).items()}
    for name, parameter in parameters.items():
        _, dimension, stacked = LAYERS[name]
        if dimension is not None and ranks > 1:
            vars(parameter).update(tensor_model_parallel=True, partition_dim=dimension, partition_stride=stacked)
    return dict(parameters), LAMB(parameters.items(), lr=0.1)


@contextmanager
def told(unit: Any) -> Iterator[None]:
    use_mpu(unit)
    try:
        yield
    finally:
        use_mpu(None)


def continue_marked(source: str, target: str) -> Tensors:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with told(Unit([list(range(ranks))])):
        parameters, optimizer = start(7, rank, ranks)
        load_optimizer_state(optimizer, source)
        loaded = load_file(source)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, part_of(name, loaded[f"weight/{name}"], rank, ranks)), name
            for state in optimizer.element_state:
                wanted = part_of(name, loaded[f"{state}/{name}"], rank, ranks)
                assert torch.equal(optimizer.state[parameter][state], wanted), f"{state} of {name}"
        steps(optimizer, parameters, range(12, 15), rank, ranks)
        save_optimizer_state(optimizer, target)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def assert_close(name: str, found: torch.Tensor, wanted: torch.Tensor, bound: float = BOUND) -> None:
    # A bias of attention's keys has no effect: its gradient is rounding, and so it stays near zero.
    error = ((found - wanted).norm() / wanted.norm().clamp(min=0.1)).item()
    assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("world_size", [2])
def test_megatron(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    source, target = str(tmp_path / "one"), str(tmp_path / "two")
    straight, optimizer = start(0)
    steps(optimizer, straight, range(10, 12))
    save_optimizer_state(optimizer, source)
    answers = pool.run(continue_marked, source, target)
    steps(optimizer, straight, range(12, 15))
    for rank, answer in enumerate(answers):
        for name, weights in answer.items():
            assert_close(name, weights, part_of(name, straight[name], rank, world_size))
    back, other = start(7)
    load_optimizer_state(other, target)
    steps(optimizer, straight, range(15, 18))
    steps(other, back, range(15, 18))
    for name, weights in back.items():
        assert_close(name, weights, straight[name])


# DeepSpeed's AutoTP ---------------------------------------------------------------------------------------------------

FAMILIES = {"bert": small_bert, "llama": small_llama}


def batch(step: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens}


def alone(family: str, seed: int) -> tuple[torch.nn.Module, LAMB]:
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    return model, LAMB(model.named_parameters(), lr=0.02)


def steps_alone(model: torch.nn.Module, optimizer: LAMB, of: range) -> None:
    for step in of:
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def continue_autotp(family: str, stage: int, source: str, target: str, forget: bool = False) -> dict[str, Any]:
    """Load, take three steps and save; with `forget`, AutoTP does not say how it has cut one layer."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": 2},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    with fresh_deepspeed_groups():
        model, optimizer = alone(family, 7)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        parameters = dict(engine.module.named_parameters())
        try:
            if forget:
                cut = next(p for p in parameters.values() if cut_dimension(p) == 1)
                cut.ds_autotp_universal_checkpoint_meta["partition_sizes"] = None  # type: ignore[attr-defined]
            load_optimizer_state(engine, source, model=engine.module)
            loaded = _weights(parameters)
            for step in range(2, 5):
                engine.backward(engine(**batch(step)).loss)
                engine.step()
            save_optimizer_state(engine, target, model=engine.module)
            dimensions = {name: cut_dimension(parameter) for name, parameter in parameters.items()}
            return {"loaded": loaded, "trained": _weights(parameters), "dimensions": dimensions}
        finally:
            engine.destroy()


def _weights(parameters: Tensors) -> Tensors:
    weights = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights


@pytest.mark.parametrize(
    ("family", "stage", "world_size"),
    [("bert", 1, 2), ("llama", 0, 2), ("llama", 3, 2), ("bert", 2, 4), ("bert", 3, 4)],
)
def test_autotp(pool: WorkerPool, tmp_path: Path, family: str, stage: int, world_size: int) -> None:
    source, target = str(tmp_path / "one"), str(tmp_path / "two")
    model, optimizer = alone(family, 0)
    steps_alone(model, optimizer, range(2))
    save_optimizer_state(optimizer, source)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    answers = pool.run(continue_autotp, family, stage, source, target)
    steps_alone(model, optimizer, range(2, 5))
    straight = dict(model.named_parameters())
    for first in range(0, world_size, 2):
        pair, dimensions = answers[first : first + 2], answers[0]["dimensions"]
        for name, weights in whole([answer["loaded"] for answer in pair], dimensions, before).items():
            assert torch.equal(weights, before[name]), name
        for name, weights in whole([answer["trained"] for answer in pair], dimensions, before).items():
            assert_close(name, weights, straight[name].detach())
    back, other = alone(family, 7)
    load_optimizer_state(other, target)
    steps_alone(model, optimizer, range(5, 8))
    steps_alone(back, other, range(5, 8))
    for name, parameter in back.named_parameters():
        assert_close(name, parameter.detach(), straight[name].detach())


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("world_size", [2])
def test_unknown_positions_are_refused(pool: WorkerPool, tmp_path: Path, stage: int, world_size: int) -> None:
    source = str(tmp_path / "one")
    save_optimizer_state(alone("bert", 0)[1], source)
    with pytest.raises(CaseFailed, match=r"does not tell where all elements of layer .* are") as failure:
        pool.run(continue_autotp, "bert", stage, source, source, True)
    assert str(failure.value).count("OptimizerStateError: ") >= world_size
