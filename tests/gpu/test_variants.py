"""Options that compile into kernels of their own."""

from __future__ import annotations

from typing import Any

import pytest

from trustratio.optimizers import OPTIMIZERS

from ..swept import SWEPT
from .cases import Steps

MORE: list[tuple[str, dict[str, Any]]] = [
    ("lars", {"nesterov": True, "momentum_form": "gradient"}),
    ("lars", {"momentum": 0.0}),
    ("lamb", {"update_clip": 0.5}),
    ("lans", {"update_clip": 0.5}),
    ("vrlamb", {"second_moment": "mean", "bias_correction": False}),
    ("vrlars", {"nesterov": True, "momentum_form": "unscaled"}),
]
VARIANTS = [*((name, options) for name in SWEPT for options in OPTIMIZERS[name].variants), *MORE]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_options_equal_the_reference(name: str, options: dict[str, Any], device: str) -> None:
    steps = Steps(name, device, **options)
    for step in range(2):
        steps.step(step)
