"""The worked example that the algorithms' tests share: one fp64 layer w = (3, 4) and two gradients."""

from __future__ import annotations

from typing import Any

import torch

WEIGHTS = (3.0, 4.0)
GRADIENTS = ((0.3, -0.4), (0.1, 0.2))


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def two_steps(optimizer_class: Any, **options: Any) -> tuple[list[float], list[float], torch.optim.Optimizer]:
    """The weights after each of two steps, and the optimizer."""
    w = parameter(*WEIGHTS)
    optimizer = optimizer_class([w], **options)
    results = []
    for g in GRADIENTS:
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        results.append(w.tolist())
    return results[0], results[1], optimizer
