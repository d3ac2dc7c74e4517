"""torchtitan's container with optimizers here: the step of one process under FSDP2, and checkpoints by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trustratio.optimizers import OPTIMIZERS, create_optimizer

from .pool import WorkerPool

NAMES = ("lamb", "lars", "lans", "novograd", "adashift")
STEPS = 4
DECAYED = {"lr": 0.05, "weight_decay": 0.1}
UNDECAYED = {"lr": 0.02, "weight_decay": 0.0}

pytest.importorskip("torchtitan", reason="torchtitan is not installed")


def a_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in a_model().parameters()]


def container(model: torch.nn.Module, name: str) -> Any:
    from torchtitan.components.optimizer import ParamGroupConfig

    from trustratio.integrations.torchtitan import LayerwiseOptimizersContainer

    groups = [
        ParamGroupConfig(pattern=r"\.bias$", optimizer_name=name, optimizer_kwargs=UNDECAYED),
        ParamGroupConfig(pattern=r".*", optimizer_name=name, optimizer_kwargs=DECAYED),
    ]
    return LayerwiseOptimizersContainer.Config(param_groups=groups).build(model_parts=[model])


def train(name: str, first: int, saved: dict[str, Any] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train from a step, or from what was saved before it; return the weights and what a checkpoint holds."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = a_model()
    fully_shard(model, mesh=mesh)
    optimizers = container(model, name)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
    for step in range(first, STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(step), strict=True):
            parameter.grad = torch.distributed.tensor.distribute_tensor(gradient, mesh, parameter.placements)
        optimizers.step()
        optimizers.zero_grad()
        if step == 1:
            saved = copy.deepcopy({"model": model.state_dict(), "optimizers": optimizers.state_dict()})
    assert saved is not None
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}, saved


def train_and_resume(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    through, saved = train(name, 0)
    resumed, _ = train(name, 2, saved)
    return through, resumed


def alone(name: str) -> dict[str, torch.Tensor]:
    model = a_model().double()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.endswith("bias")], **UNDECAYED},
        {"params": [p for n, p in named if not n.endswith("bias")], **DECAYED},
    ]
    optimizer = create_optimizer(name, groups)
    for step in range(STEPS):
        for (_, parameter), gradient in zip(named, gradients(step), strict=True):
            parameter.grad = gradient.double()
        optimizer.step()
    return {name: p.detach() for name, p in named}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_step_of_one_process_and_a_resume(pool: WorkerPool, name: str, world_size: int) -> None:
    expected = alone(name)
    for through, resumed in pool.run(train_and_resume, name):
        for layer, weights in expected.items():
            assert (through[layer].double() - weights).norm() <= 2e-6 * weights.norm()
            assert torch.equal(through[layer], resumed[layer])


def train_and_save_before(name: str) -> list[bool]:
    """Is all as it was after a checkpoint before the first step, for which torchtitan takes a step of rate zero?"""
    model = a_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    before = [p.full_tensor().clone() for p in model.parameters()]
    optimizers = container(model, name)
    optimizers.state_dict()
    return [torch.equal(old, p.full_tensor()) for old, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("world_size", [2])
def test_a_checkpoint_before_the_first_step_moves_nothing(pool: WorkerPool, world_size: int) -> None:
    for name in OPTIMIZERS:
        if not OPTIMIZERS[name].group_statistics and name != "sngm":
            assert all(map(all, pool.run(train_and_save_before, name))), name
