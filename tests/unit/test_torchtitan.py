"""torchtitan's container knows the optimizers here by name, and refuses what it could not do as read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from trustratio.integrations import torchtitan as ours
from trustratio.integrations.torchtitan import LayerwiseOptimizersContainer, layerwise
from trustratio.optimizers.sharding.layout import LayoutError


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))


def build(name: str, implementation: str = "for-loop", **options: Any) -> LayerwiseOptimizersContainer:
    config = layerwise(name, **options)
    config.implementation = implementation
    return config.build(model_parts=[model()])


def test_one_optimizer_trains_all_with_names_and_options() -> None:
    (optimizer,) = build("LAMB", lr=0.1, betas=(0.8, 0.9))
    assert type(optimizer) is LAMB
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["param_names"]) == (
        0.1,
        (0.8, 0.9),
        [n for n, _ in model().named_parameters()],
    )


def test_torchtitans_own_stand_beside_ours() -> None:
    groups = [
        ParamGroupConfig(pattern="bias", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1}),
        ParamGroupConfig(pattern=".*", optimizer_name="lans", optimizer_kwargs={"lr": 0.2}),
    ]
    config = LayerwiseOptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    kinds = [type(optimizer).__name__ for optimizer in config.build(model_parts=[model()])]
    assert kinds == ["AdamW", "LANS"]


@pytest.mark.parametrize(
    ("name", "implementation", "options", "message"),
    [
        ("lambb", "fused", {"lr": 0.1}, "unknown optimizer_name 'lambb'; .*lamb"),
        ("lamb", "fused", {"lr": 0.1, "max_grad_norm": 1.0}, "set torchtitan's training.max_norm"),
        ("sngm", "fused", {"lr": 0.1}, "SNGM .* norm of the whole model's gradient"),
        ("lamb", "fused_opt_states_bf16", {"lr": 0.1}, 'state_dtype="bfloat16"'),
        ("lamb", "fused", {"lr": 0.1, "beta": 0.1}, "beta"),
    ],
)
def test_what_is_refused(name: str, implementation: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, implementation, **options)


def test_a_torchtitan_without_the_method_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(OptimizersContainer, ours.FACTORIES)
    with pytest.raises(LayoutError, match="known to work are torchtitan"):
        build("lamb", lr=0.1)
