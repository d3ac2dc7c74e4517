"""Samples of the curvature in the recipe: an update of two passes, the same under every wrapper."""

from __future__ import annotations

import pytest
import torch

from .recipe_runs import losses, records, trained_tensors
from .test_wrappers import NO_DROPOUT, REFERENCE, launch, runs  # noqa: F401 - fixtures

SAMPLED = (
    *("optimizer.name=curvature_adamw", "optimizer.lr=0.2", "optimizer.interval=2", "optimizer.cap=0.05"),
    *("training.gradient_clipping=0.5", "run.noise_scale=false", "run.log_every=1"),
)
"""Samples in updates 1, 3 and 5, and after the border, where counts begin anew, in 7 and 9."""


@pytest.fixture
def sampled(runs):  # noqa: F811
    """The folder of a finished run."""
    return lambda wrapper, *arguments: runs(wrapper, NO_DROPOUT, *SAMPLED, *arguments)


@pytest.mark.parametrize(
    "wrapper",
    [
        "accelerate-ddp",
        "trainer-zero-1",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("accelerate-zero-2", "accelerate-zero-3", "trainer-ddp", "trainer-zero-3")
        ),
    ],
)
def test_every_wrapper_takes_the_same_samples(sampled, wrapper):
    ours, reference = records(sampled(wrapper)), records(sampled(REFERENCE))
    assert len(ours) == 10
    for one, other in zip(ours, reference, strict=True):
        for name in ("lr", "sequences", "masked_tokens"):
            assert one[name] == other[name]
        for name in ("loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
        assert one["trust_ratios"] == pytest.approx(other["trust_ratios"], rel=1e-2)
