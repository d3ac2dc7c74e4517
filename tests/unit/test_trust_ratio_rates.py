"""Rates that are tensors stay the same tensors while a base steps at another rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import TrustRatio
from trustratio.optimizers.proposals.nature import nature_of
from trustratio.optimizers.proposals.rates import at_rate

from .test_trust_ratio import parameters, train, values


def test_groups_are_at_a_rate_for_a_while() -> None:
    shared, alone = torch.tensor(0.5), torch.tensor(0.25)
    groups: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": shared}, {"lr": shared}, {"lr": alone}]
    with at_rate(groups, 2.0**48):
        assert [float(group["lr"]) for group in groups] == [2.0**48] * 4
        assert groups[1]["lr"] is groups[2]["lr"] is shared
        groups[3]["lr"] = 7.0  # as a base may
    assert [float(group["lr"]) for group in groups] == [0.1, 0.5, 0.5, 0.25]
    assert groups[1]["lr"] is shared
    assert groups[3]["lr"] is alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("base", "options"), [(torch.optim.SGD, {}), (torch.optim.AdamW, {"weight_decay": 0.1})])
def test_a_rate_of_sixteen_bits_is_the_number_that_it_is(
    base: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The base's own products with it, such as a decay, are no coarser than those of fp32."""
    named, wanted = parameters(torch.float64), parameters(torch.float64)
    rate = torch.tensor(0.1, dtype=dtype)
    for lr, of in ((rate, named), (float(rate), wanted)):
        optimizer = TrustRatio(base, of, lr=lr, **options)
        train(optimizer, of, range(3))
    assert rate == torch.tensor(0.1, dtype=dtype)
    for name, weights in values(wanted).items():
        torch.testing.assert_close(dict(named)[name].detach(), weights, rtol=1e-7, atol=1e-8)


class WantsTensorRate(torch.optim.Optimizer):
    """SGD with a rate that it makes a tensor of, and takes nothing else for it, as torchao's classes."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": torch.tensor(lr)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if not isinstance(self.param_groups[-1]["lr"], torch.Tensor):
            self.param_groups[-1]["lr"] = torch.tensor(self.param_groups[-1]["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                raise RuntimeError("lr was changed to a non-Tensor object")
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def test_a_base_that_takes_tensor_rates_alone() -> None:
    named, wanted = parameters(), parameters()
    both = [TrustRatio(base, of, lr=0.1) for base, of in ((WantsTensorRate, named), (torch.optim.SGD, wanted))]
    for one, of in zip(both, (named, wanted), strict=True):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
        for step in range(4):
            train(one, of, [step])
            scheduler.step()
    assert isinstance(both[0].param_groups[0]["lr"], torch.Tensor)
    for name, weights in values(wanted).items():
        torch.testing.assert_close(dict(named)[name].detach(), weights, rtol=1e-6, atol=1e-7)


def test_it_is_found_to_be_element_wise_and_independent_of_its_rate() -> None:
    nature = nature_of(WantsTensorRate, {}, torch.device("cpu"))
    assert nature.is_element_wise
    assert nature.is_proportional
