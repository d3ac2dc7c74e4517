"""torch's ZeroRedundancyOptimizer around optimizers whose layers are whole on the ranks that step them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import OPTIMIZERS

from .pool import CaseFailed, WorkerPool

STEPS = 3


def train(name: str, wrapped: bool, **options: Any) -> dict[str, torch.Tensor]:
    """Train under DDP, with the optimizer inside ZeroRedundancyOptimizer or without it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    parallel = DistributedDataParallel(model)
    optimizer_class = OPTIMIZERS[name].optimizer_class
    optimizer: torch.optim.Optimizer
    if wrapped:
        optimizer = ZeroRedundancyOptimizer(parallel.parameters(), optimizer_class=optimizer_class, lr=0.1, **options)
    else:
        optimizer = optimizer_class(parallel.parameters(), lr=0.1, **options)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    for _ in range(STEPS):
        parallel(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [2])
def test_layerwise_numbers_are_exact(pool: WorkerPool, name: str, world_size: int) -> None:
    wanted = pool.run(train, name, False)
    for found, expected in zip(pool.run(train, name, True), wanted, strict=True):
        assert all(torch.equal(found[layer], weights) for layer, weights in expected.items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sngm", {}, "LayoutError: this optimizer needs the norm of the whole model's gradient"),
        ("lamb", {"max_grad_norm": 0.1}, "ValueError: max_grad_norm=0.1 .* set max_norm of torch.nn.utils.clip_grad"),
        ("clars", {}, "LayoutError: CLARS needs the gradient of every single micro-batch.* a rank steps some layers"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_what_needs_the_whole_model_is_refused(
    pool: WorkerPool, name: str, options: dict[str, Any], message: str, world_size: int
) -> None:
    with pytest.raises(CaseFailed, match=message):
        pool.run(train, name, True, **options)
