"""Training on real data that is split over the ranks equals float64 training on one process."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from trustratio.optimizers import create_optimizer

from ..reference import REFERENCES, relative_error
from .pool import WorkerPool

STEPS = 5
BATCH = 24
OPTIONS: dict[str, dict[str, Any]] = {
    "lamb": {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-3},
    "lars": {"lr": 5.0, "weight_decay": 0.01, "trust_coefficient": 0.02},
}


def network(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(9, 31), torch.nn.Tanh(), torch.nn.LayerNorm(31), torch.nn.Linear(31, 5)]
    return torch.nn.Sequential(*layers).to(dtype)


def batches(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(BATCH, 9, generator=generator).to(dtype) for _ in range(STEPS)]
    return [(x, (x[:, :5] > 0).long().argmax(dim=1)) for x in inputs]


def train_on_this_rank(name: str, stage: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Train on this rank's share of each batch, cut into micro-batches; return the whole weights."""
    model = network(torch.float32)
    optimizer = create_optimizer(name, model.named_parameters(), **OPTIONS[name])
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for inputs, targets in batches(torch.float32):
        own = slice(dist.get_rank(), None, dist.get_world_size())
        for x, y in zip(inputs[own].chunk(accumulation), targets[own].chunk(accumulation), strict=True):
            engine.backward(torch.nn.functional.cross_entropy(engine(x), y))
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine.destroy()
    return weights


def train_in_float64(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The initial and the final weights of one process that sees every batch whole."""
    model = network(torch.float64)
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    states: dict[str, dict[str, Any]] = {n: {} for n in initial}
    for x, y in batches(torch.float64):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                assert p.grad is not None
                p.copy_(REFERENCES[name](p.detach().clone(), p.grad, states[n], **OPTIONS[name])[0])
    return initial, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_real_training_equals_one_process(pool: WorkerPool, name: str, world_size: int) -> None:
    initial, expected = train_in_float64(name)
    for stage, accumulation in ((0, 1), (1, 2), (2, 1), (2, 4), (3, 2)):
        for weights in pool.run(train_on_this_rank, name, stage, accumulation):
            for layer, w in weights.items():
                error = relative_error(w, expected[layer], initial[layer])
                assert error <= 2e-6, f"stage {stage}, {layer}: {error:.2e}"
