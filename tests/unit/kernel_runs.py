"""Runs that the tests of the kernels compare: the same steps by one implementation and by another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trustratio.optimizers import LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.kernels import cpu
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from .test_generic import backward, make_gradients, make_parameters

Tensor = torch.Tensor

BLOCK = 16384
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks": (BLOCK + 1, 2),
    "odd": (3, 11),
    "bias": (17,),
    "scalar": (),
    "empty_rows": (40, 1024),
}
LR = 0.05

needs_compiler = pytest.mark.skipif(cpu.KERNELS.missing() is not None, reason="built without a C compiler")


def run(name: str, implementation: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    parameters = make_parameters(dtype, SHAPES)
    given = {"lr": LR, "weight_decay": 0.1, **options}
    optimizer = create_optimizer(name, list(parameters.items()), implementation=implementation, **given)
    for step in range(steps):
        gradients = make_gradients(step, parameters)
        gradients["empty_rows"][:, 20 + step :] = 0.0  # whole blocks without gradient, fewer each time
        if step == 1:
            del gradients["bias"]
        optimizer.zero_grad()
        backward(parameters, gradients)
        optimizer.step()
    return parameters, optimizer


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for layer in a:
        wanted, got = b[layer].detach().double(), a[layer].detach().double()
        assert (got - wanted).norm() <= tolerance * wanted.norm(), layer


def states(optimizer: LayerwiseOptimizer, parameters: dict[str, torch.nn.Parameter], name: str) -> dict[str, Tensor]:
    return {layer: optimizer.state[p][name] for layer, p in parameters.items()}


def flat_run(
    name: str,
    implementation: str,
    lengths: Sequence[int],
    gaps: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Tensor]:
    """Steps over one flat tensor with layers at odd places and NaN between them."""
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths) + sum(gaps)
    flat = torch.nn.Parameter(torch.full((total,), torch.nan, dtype=dtype))
    given = {"lr": LR, "weight_decay": 0.1, "implementation": implementation, "adapt": True, **options}
    optimizer = create_optimizer(name, [flat], **given)
    layers, shards, start = [], [], 0
    for index, (length, gap) in enumerate(zip(lengths, gaps, strict=True)):
        start += gap
        layers.append(Layer(f"layer{index}", (length,), 0, flat))
        shards.append(Shard(index, start, 0, length))
        with torch.no_grad():
            flat[start : start + length] = torch.randn(length, generator=generator)
        start += length
    layout = Layout("test", (flat,), (0,), tuple(layers), tuple(shards), placed=True)
    optimizer._plans.add(Plan.of(optimizer, layout, [flat]))
    for _ in range(3):
        flat.grad = torch.full((total,), torch.nan, dtype=dtype)
        for index, shard in enumerate(shards):
            part = flat.grad[shard.start : shard.start + shard.length]
            part.copy_(torch.randn(shard.length, generator=generator) * (index != 2))
        optimizer.step()
    outside = torch.ones(total, dtype=torch.bool)
    for shard in shards:
        outside[shard.start : shard.start + shard.length] = False
    assert flat[outside].isnan().all()
    state = optimizer.state[flat]
    unchanged = shards[2].start, shards[2].start + shards[2].length
    for value in (value for value in state.values() if isinstance(value, Tensor) and value.shape == flat.shape):
        assert (value[outside] == 0).all()  # never written
        assert (value[slice(*unchanged)] == 0).all()
    assert state["layers"]["step"].tolist() == [0.0 if index == 2 else 3.0 for index in range(len(lengths))]
    return {layer.name: flat[s.start : s.start + s.length] for layer, s in zip(layers, shards, strict=True)}
