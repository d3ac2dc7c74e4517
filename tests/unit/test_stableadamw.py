from __future__ import annotations

import pytest
import torch

from trustratio.optimizers import StableAdamW

from ..reference import stableadamw

WEIGHTS = (1.0, -2.0)
GRADIENTS = ((1.0, -2.0), (3.0, 0.5), (-1.0, 4.0))
RMS = (1.0, 0.977488, 1.146524)
AFTER = ((0.9899, -1.9898), (0.98063976, -1.98489693), (0.97633541, -1.98821915))


def test_worked_example() -> None:
    w = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
    optimizer = StableAdamW([("w", w)], lr=0.01)
    for gradient, rms, after in zip(GRADIENTS, RMS, AFTER, strict=True):
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert w.tolist() == pytest.approx(after, abs=5e-9)
        assert optimizer.trust_ratios()["w"] == pytest.approx(1 / max(1.0, rms), rel=1e-6)


def test_reference_agrees_with_the_worked_example() -> None:
    w, state = torch.tensor(WEIGHTS, dtype=torch.float64), {}
    for gradient, rms, after in zip(GRADIENTS, RMS, AFTER, strict=True):
        w, ratio = stableadamw(w, torch.tensor(gradient, dtype=torch.float64), state, lr=0.01)
        assert w.tolist() == pytest.approx(after, abs=5e-9)
        assert ratio == pytest.approx(1 / max(1.0, rms), rel=1e-6)
