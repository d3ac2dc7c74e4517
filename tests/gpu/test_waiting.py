"""Steps do not wait for the device."""

from __future__ import annotations

import pytest

from trustratio.optimizers import OPTIMIZERS

from ..swept import SWEPT
from .cases import PLAIN, Steps, make, without_waiting

pytestmark = pytest.mark.usefixtures("on_gpu")


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_does_not_wait(name: str) -> None:
    _, optimizer = make(name, "cuda", implementation="triton")
    for _ in range(2):  # compiles, and sends tables to the device
        optimizer.step()
    with without_waiting():
        optimizer.step()


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_with_gradients_elsewhere_does_not_wait(name: str) -> None:
    """Their addresses are sent."""
    parameters, optimizer = make(name, "cuda", implementation="triton")
    kept = [[p.grad for p in parameters]]
    for _ in range(2):
        optimizer.step()
    kept += [[p.grad.clone() for p in parameters] for _ in range(2)]
    for gradients in kept[1:]:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        with without_waiting():
            optimizer.step()


@pytest.mark.parametrize("name", [name for name in SWEPT if OPTIMIZERS[name].group_statistics])
def test_a_step_with_statistics_does_not_wait(name: str) -> None:
    steps = Steps(name, "cuda")
    for step in range(2):
        steps.backward(steps.gradients(step))
        steps.optimizer.step()
    steps.backward(steps.gradients(2))
    with without_waiting():
        steps.optimizer.step()
