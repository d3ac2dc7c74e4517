"""Updates that 16-bit weights lose are told once, with their share, where nobody keeps fp32 master weights."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, create_optimizer
from trustratio.optimizers.kernels import cpu
from trustratio.optimizers.stepping import lost_updates

IMPLEMENTATIONS = ["eager", *(["cpu"] if cpu.KERNELS.missing() is None else [])]


def messages(optimizer: torch.optim.Optimizer, steps: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    return [str(w.message) for w in caught if "did not move in this step" in str(w.message)]


def layers(dtype: torch.dtype, count: int = 3) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(50, 40 + i, generator=generator).to(dtype)) for i in range(count)]
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        p.grad[:10] = 0.0  # no update
    return ps


def share_of(message: str) -> float:
    found = re.match(r"(?:less than )?([\d.]+)% of the", message)
    assert found
    return float(found[1]) / 100


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "lr"), [("lamb", 1e-3), ("lars", 1.0), ("novograd", 1e-5)])
def test_the_share_is_that_of_the_first_step(name: str, lr: float, dtype: torch.dtype, implementation: str) -> None:
    ps = layers(dtype)
    before = [p.detach().clone() for p in ps]
    optimizer = create_optimizer(name, ps, lr=lr, weight_decay=0.0, implementation=implementation)
    (message,) = messages(optimizer)
    moved = [(p.grad != 0) & (p != w) for p, w in zip(ps, before, strict=True)]
    made = [p.grad != 0 for p in ps]
    expected = 1 - sum(m.sum().item() for m in moved) / sum(m.sum().item() for m in made)
    assert share_of(message) == pytest.approx(expected, abs=1e-3)
    assert {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype] in message
    assert f"(lr {lr:g})" in message
    assert messages(optimizer, 3) == []


def test_large_layers_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_updates, "SAMPLE", 500)
    exact = messages(LAMB(layers(torch.bfloat16), lr=1e-3))
    monkeypatch.setattr(lost_updates, "SAMPLE", 1 << 16)
    assert share_of(exact[0]) == pytest.approx(share_of(messages(LAMB(layers(torch.bfloat16), lr=1e-3))[0]), abs=0.05)


@pytest.mark.parametrize("first", ["no gradient", "zero gradient", "lr 0"])
def test_a_first_step_without_updates_says_nothing(first: str) -> None:
    ps = layers(torch.bfloat16)
    gradients = [p.grad for p in ps]
    optimizer = LAMB(ps, lr=0.0 if first == "lr 0" else 1e-3)
    for p in ps:
        p.grad = None if first == "no gradient" else torch.zeros_like(p) if first == "zero gradient" else p.grad
    assert messages(optimizer, 2) == []
    for p, gradient in zip(ps, gradients, strict=True):
        p.grad = gradient
    optimizer.param_groups[0]["lr"] = 1e-3
    assert len(messages(optimizer, 2)) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_that_loses_no_update_says_nothing(implementation: str) -> None:
    ps = [torch.nn.Parameter(torch.full((4, 3), 1.0, dtype=torch.bfloat16))]
    ps[0].grad = torch.ones_like(ps[0])
    assert messages(LAMB(ps, lr=0.5, implementation=implementation), 2) == []


def test_only_the_weights_of_16_bits_count() -> None:
    ps: list[Any] = [*layers(torch.float32, 2), *layers(torch.bfloat16, 1)]
    assert share_of(messages(LARS(ps, lr=1e-9))[0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_weights_say_nothing(dtype: torch.dtype) -> None:
    assert messages(LAMB(layers(dtype), lr=1e-12), 3) == []


def test_16_bit_weights_in_a_group_that_is_added() -> None:
    optimizer = LAMB(layers(torch.float32))
    assert messages(optimizer, 2) == []
    optimizer.add_param_group({"params": layers(torch.bfloat16)})
    assert len(messages(optimizer, 2)) == 1
