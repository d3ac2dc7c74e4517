"""Accelerators that a process keeps, though they prepare nothing any more, keep nobody from stepping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from trustratio.optimizers import LAMB


def _failed() -> Any:
    try:
        Accelerator(cpu=True, mixed_precision="other")
    except ValueError as error:
        return error  # whose traceback holds it
    raise AssertionError("it was made")


def _forgotten() -> Any:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerator


@pytest.mark.parametrize("leave", [_failed, _forgotten])
def test_a_step_beside_it(leave: Callable[[], Any]) -> None:
    left = leave()
    model = torch.nn.Linear(4, 3)
    optimizer = LAMB(model.named_parameters(), lr=0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert left is not None
    assert set(optimizer.trust_ratios()) == {"weight", "bias"}
