"""The GPU's tables on a CUDA device: layers that come and go, tensors at odd places, sums in trees."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from trustratio.optimizers import LAMB
from trustratio.optimizers.kernels import triton_kernels
from trustratio.optimizers.kernels.triton_kernels import TritonKernels

from ..unit.test_triton_sums import drawn, sums

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
SHAPES = ((4097, 3), (3, 11), (17,), (), (1000, 1024))


def assert_same(found: list[torch.nn.Parameter], expected: list[torch.nn.Parameter]) -> None:
    for a, b in zip(found, expected, strict=True):
        wanted = b.detach().double()
        assert (a.detach().cpu().double() - wanted).norm() <= 1e-6 * wanted.norm()


def numbers(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def trained(device: str, implementation: str, *, drop: bool, gradients_start: int | None) -> list[torch.nn.Parameter]:
    """Five steps; parameters, and with a start their gradients, are neighbours in one buffer, at odd places."""
    buffer = torch.cat([torch.zeros(3), *(p.flatten() for p in numbers(0))]).to(device)
    views = buffer[3:].split([math.prod(shape) for shape in SHAPES])
    parameters = [torch.nn.Parameter(view.view(shape)) for view, shape in zip(views, SHAPES, strict=True)]
    optimizer = LAMB(parameters, lr=0.05, weight_decay=0.1, implementation=implementation)
    for step in range(5):
        gradients = [gradient.to(device) for gradient in numbers(step + 1)]
        if gradients_start is not None:
            in_one = torch.cat([torch.zeros(gradients_start, device=device), *(g.flatten() for g in gradients)])
            cut = in_one[gradients_start:].split([gradient.numel() for gradient in gradients])
            gradients = [view.view(shape) for view, shape in zip(cut, SHAPES, strict=True)]
        for index, (p, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            p.grad = None if drop and (step + index) % 3 == 0 else gradient
        optimizer.step()
    return parameters


@pytest.mark.parametrize(("drop", "gradients_start"), [(True, None), (False, 3), (False, 5)])
def test_layers_that_come_and_go_at_odd_places(drop: bool, gradients_start: int | None) -> None:
    found = trained(DEVICE, "triton", drop=drop, gradients_start=gradients_start)
    assert_same(found, trained("cpu", "eager", drop=drop, gradients_start=None))


def test_another_set_of_layers_does_not_wait_for_the_device() -> None:
    parameters = [torch.nn.Parameter(p.to(DEVICE)) for p in numbers(0)]
    gradients = [gradient.to(DEVICE) for gradient in numbers(1)]
    optimizer = LAMB(parameters, implementation="triton")

    def step(left_out: int | None) -> None:
        for index, p in enumerate(parameters):
            p.grad = None if index == left_out else gradients[index]
        optimizer.step()

    step(None)
    step(None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for left_out in range(len(parameters)):
            step(left_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_whose_squares_are_added_in_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "KERNELS", TritonKernels(wide=False))
    found = trained(DEVICE, "triton", drop=True, gradients_start=None)
    assert_same(found, trained("cpu", "eager", drop=True, gradients_start=None))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_norms_of_all_sizes(scale: float) -> None:
    x = drawn() * scale
    squares, magnitudes = sums(x.to(DEVICE), device=DEVICE)
    assert math.sqrt(squares) == pytest.approx(x.double().norm().item(), rel=2e-7)
    assert magnitudes == pytest.approx(x.double().abs().sum().item(), rel=4e-7)


@pytest.mark.parametrize("number", [0.0, math.inf, -math.inf, math.nan, 1e-45])
def test_numbers_that_are_not_usual(number: float) -> None:
    x = torch.zeros(2048)
    x[1234] = number
    squares, magnitudes = sums(x.to(DEVICE), device=DEVICE)
    wanted = x.double().square().sum().item()
    assert math.isnan(squares) if math.isnan(number) else squares == pytest.approx(wanted, rel=1e-6, abs=0.0)
    assert math.isnan(magnitudes) if math.isnan(number) else magnitudes == abs(x[1234].item())
