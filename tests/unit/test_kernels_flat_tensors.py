"""Sweeps where a wrapper has put layers into flat tensors, whole or cut: however they lie in memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from trustratio.optimizers import create_optimizer
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from .kernel_runs import BLOCK, LR, Tensor, assert_close, flat_run, needs_compiler

pytestmark = [
    pytest.mark.usefixtures("many_threads"),
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
]


@needs_compiler
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "tvlars"])
def test_odd_starts_and_lengths_and_poisoned_padding(name: str) -> None:
    lengths, gaps = [1, 15, 33, BLOCK, 2 * BLOCK + 7, 16, 5], [3, 0, 1, 2, 1, 0, 9]
    assert_close(flat_run(name, "cpu", lengths, gaps), flat_run(name, "eager", lengths, gaps), 1e-6)


class _Ranks:
    """Adds up over ranks that are threads."""

    def __init__(self, count: int):
        self.sums: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def add(self, rank: int, sums: Tensor) -> Tensor:
        self.sums[rank] = sums
        self.barrier.wait()
        total = torch.stack([part for part in self.sums if part is not None]).sum(dim=0)
        self.barrier.wait()
        return total


def sharded_run(name: str, implementation: str) -> tuple[Tensor, Tensor]:
    """Three steps of two ranks that hold a half of every layer each; the weights and those of whole layers."""
    generator = torch.Generator().manual_seed(2)
    lengths = (2 * BLOCK + 6, 34, 20, 2 * BLOCK)
    whole = [torch.randn(length, generator=generator) for length in lengths]
    gradients = [[torch.randn(length, generator=generator) for length in lengths] for _ in range(3)]
    for number, step in enumerate(gradients):
        if number:  # once there is momentum
            step[0][: BLOCK + 3] = 0.0  # all that rank 0 has of the layer
        step[2][:] = 0.0  # no gradient anywhere
        step[3][BLOCK + 100 :] = 0.0
    ranks = _Ranks(2)
    results: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        def half(tensors: list[Tensor]) -> Tensor:
            return torch.cat([t.view(2, -1)[rank] for t in tensors])

        flat = torch.nn.Parameter(half(whole))
        layers = tuple(Layer(f"layer{i}", (length,), 0, flat) for i, length in enumerate(lengths))
        starts = [sum(lengths[:i]) // 2 for i in range(len(lengths))]
        shards = tuple(
            Shard(i, start, rank * n // 2, n // 2) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
        )
        optimizer = create_optimizer(name, [flat], lr=LR, weight_decay=0.1, implementation=implementation)
        optimizer.param_groups[0]["adapt"] = True
        every_layer = tuple(range(len(lengths)))
        layout = _ThreadedLayout("test", (flat,), (0,), layers, shards, ((ranks, every_layer),))
        object.__setattr__(layout, "rank", rank)
        optimizer._plans.add(plan := Plan.of(optimizer, layout, [flat]))
        plan.agreement.steps_left = 0  # the ranks are threads
        for step in gradients:
            flat.grad = half(step)
            optimizer.step()
        results[rank] = flat.detach()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [torch.nn.Parameter(w.clone()) for w in whole]
    optimizer = create_optimizer(name, expected, lr=LR, weight_decay=0.1, implementation="eager")
    optimizer.param_groups[0]["adapt"] = True
    for step in gradients:
        for p, g in zip(expected, step, strict=True):
            p.grad = g
        optimizer.step()
    parts = [torch.cat([p.detach().view(2, -1)[rank] for p in expected]) for rank in range(2)]
    return torch.cat([results[0], results[1]]), torch.cat(parts)


class _ThreadedLayout(Layout):
    def reduce(self, sums: Tensor, layer_of_column: Tensor | None = None) -> Tensor:
        ranks: Any = self.reductions[0][0]
        return ranks.add(self.rank, sums)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "novograd", "tvlars"])
@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_layers_whose_gradient_is_zero_on_one_rank(name: str, implementation: str) -> None:
    """Blocks that the first sweep left out are caught up on, unless no rank has a gradient."""
    found, expected = sharded_run(name, implementation)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
