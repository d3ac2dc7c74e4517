"""Whatever reads or moves weights and state of 16 bits: norms, samples of the curvature, extrapolation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.integrations.layer_norms import LayerNorms
from trustratio.optimizers import LAMB, CurvatureAdamW, CurvatureSGD, Extrapolation
from trustratio.optimizers.formulas.chunk_view import COMPENSATION

KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "state": (torch.float32, {"state_dtype": "bfloat16"}),
    "stochastic": (torch.bfloat16, {"master": "stochastic", "state_dtype": "bfloat16"}),
    "kahan": (torch.bfloat16, {"master": "kahan"}),
}


def layer(dtype: torch.dtype, size: int = 64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(8, size // 8, generator=generator).to(dtype))


def gradient(like: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step + 1)).to(like.dtype)


def test_norms_are_of_the_sums_that_kahan_keeps() -> None:
    """The parameters alone hardly move, or by whole steps of bf16."""
    weight = layer(torch.bfloat16)
    optimizer = LAMB([("w", weight)], lr=1e-4, master="kahan", implementation="eager")
    norms = LayerNorms(optimizer)
    for step in range(3):
        before = weight.detach().double() + optimizer.state.get(weight, {}).get(COMPENSATION, torch.zeros(()))
        weight.grad = gradient(weight, step)
        optimizer.step()
        after = weight.detach().double() + optimizer.state[weight][COMPENSATION]
        measured = norms.latest()["w"]
        assert measured.weight == pytest.approx(float(before.norm()), rel=1e-6)
        assert measured.update == pytest.approx(float((after - before).norm()), rel=1e-6)
        assert measured.update == pytest.approx(1e-4 * measured.weight, rel=0.05)


@pytest.mark.parametrize("master", [None, "stochastic"])
def test_norms_of_other_weights_are_of_what_they_become(master: str | None) -> None:
    weight = layer(torch.bfloat16)
    optimizer = LAMB([("w", weight)], lr=1e-2, master=master, implementation="eager")
    norms = LayerNorms(optimizer)
    before = weight.detach().double()
    weight.grad = gradient(weight, 0)
    optimizer.step()
    assert norms.latest()["w"].update == pytest.approx(float((weight.detach().double() - before).norm()), rel=1e-6)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kind", [CurvatureSGD, CurvatureAdamW])
def test_a_sample_of_the_curvature_gives_every_bit_back(kind: Any, kept: str) -> None:
    dtype, options = KEPT[kept]
    weight = layer(dtype)
    optimizer = kind([("w", weight)], lr=0.01, interval=2, implementation="eager", perturbation=0.05, **options)
    for step in range(4):
        optimizer.zero_grad()
        before = weight.detach().clone()
        kept_bits = {name: value.clone() for name, value in optimizer.state[weight].items() if value.dim()}
        wanted = optimizer.wants_curvature()
        assert wanted == (step % 2 == 0)
        (weight.float() * gradient(weight, step)).square().sum().backward()
        if wanted:
            with optimizer.curvature():
                assert not torch.equal(weight, before)
                (weight.float() * gradient(weight, step)).square().sum().backward()
        assert torch.equal(weight, before)
        assert all(torch.equal(optimizer.state[weight][name], value) for name, value in kept_bits.items())
        optimizer.step()


def test_a_sample_moves_along_the_direction_that_it_measures() -> None:
    """Which is made of state as it will be kept."""
    weight = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = CurvatureAdamW([("w", weight)], lr=0.01, interval=1, perturbation=0.1, state_dtype="bfloat16")
    before = weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        assert optimizer.wants_curvature()
        (weight * gradient(weight, step)).square().sum().backward()
        with optimizer.curvature():
            moved = float((weight.detach().double() - before.double()).norm())
            (weight * gradient(weight, step)).square().sum().backward()
        assert moved == pytest.approx(0.1 * float(before.double().norm()), rel=1e-5)
        optimizer.step()
        before = weight.detach().clone()


@pytest.mark.parametrize("kept", KEPT)
def test_extrapolation_gives_every_bit_back(kept: str) -> None:
    dtype, options = KEPT[kept]
    steps = []
    for extrapolated in (True, False):
        weight = layer(dtype)
        optimizer = LAMB([("w", weight)], lr=0.01, implementation="eager", **options)
        around = Extrapolation(optimizer, step_size=0.1, direction="noise") if extrapolated else None
        for step in range(4):
            before = weight.detach().clone()
            if around is not None:
                with around:
                    assert not torch.equal(weight, before)
            assert torch.equal(weight, before)
            weight.grad = gradient(weight, step)
            optimizer.step()
        steps.append((weight.detach().clone(), dict(optimizer.state[weight])))
    assert torch.equal(steps[0][0], steps[1][0])
    assert all(torch.equal(value, steps[1][1][name]) for name, value in steps[0][1].items())
