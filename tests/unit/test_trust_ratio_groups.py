"""TrustRatio around constructors that sort parameters into groups, or want groups with keys of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import TrustRatio

from .test_trust_ratio import Named, assert_same, parameters, train


class DecaysMatrices(torch.optim.AdamW):
    """Sorts plain tensors: matrices decay, and vectors have a rate of their own."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1):
        members = list(params)
        matrices, vectors = ([p for p in members if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": lr / 2, "kind": "vector"}]
        super().__init__(groups, lr=lr, weight_decay=weight_decay)


def by_hand(named: Named, lr: float = 0.1, **options: Any) -> TrustRatio:
    groups = [
        {"params": [pair for pair in named if pair[1].ndim > 1]},
        {"params": [pair for pair in named if pair[1].ndim <= 1], "weight_decay": 0.0, "lr": lr / 2},
    ]
    return TrustRatio(torch.optim.AdamW, groups, lr=lr, weight_decay=0.1, **options)


@pytest.mark.parametrize("has_names", [True, False])
def test_a_constructor_that_sorts_tensors(has_names: bool) -> None:
    named, wanted = parameters(), parameters()
    optimizer = TrustRatio(DecaysMatrices, named if has_names else [p for _, p in named], lr=0.1, adapt=True)
    expected = by_hand(wanted, adapt=True)
    train(optimizer, named)
    train(expected, wanted)
    assert_same(named, wanted)
    assert [*optimizer.trust_ratios().values()] == [*expected.trust_ratios().values()]
    if has_names:
        assert list(optimizer.trust_ratios()) == ["matrix", "conv", "bias", "scalar"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.1), (0.05, 0.0)]
    assert [group.get("kind") for group in optimizer.param_groups] == [None, "vector"]


def test_groups_are_added_afterwards_with_names_and_schedulers_go_on() -> None:
    named, wanted = parameters(), parameters()
    optimizer, expected = TrustRatio(DecaysMatrices, named[:3], lr=0.1), by_hand(wanted[:3])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, expected)]
    for one, of in ((optimizer, named), (expected, wanted)):
        one.add_param_group({"params": [of[3]], "lr": 0.3, "trust_bounds": (0.0, 2.0)})
        train(one, of, range(2))
    for scheduler in schedulers:
        scheduler.step()
    train(optimizer, named, range(2, 4))
    train(expected, wanted, range(2, 4))
    assert_same(named, wanted)
    assert optimizer.param_groups[2]["trust_bounds"] == (0.0, 2.0)
    assert list(optimizer.trust_ratios()) == ["matrix", "conv", "bias", "scalar"]


def test_segments_by_name_go_to_the_group_that_has_the_layer() -> None:
    named = [("qkv", torch.nn.Parameter(torch.randn(6, 2))), ("bias", torch.nn.Parameter(torch.randn(6)))]
    optimizer = TrustRatio(DecaysMatrices, named, lr=0.1, segments={"q*": 3})
    assert [group["segments"] for group in optimizer.param_groups] == [{"q*": 3}, None]
    train(optimizer, named)
    assert list(optimizer.trust_ratios()) == ["qkv[0]", "qkv[1]", "qkv[2]", "bias"]
    with pytest.raises(ValueError, match="segments has the name 'k', which no parameter of the group has"):
        TrustRatio(DecaysMatrices, named, lr=0.1, segments={"k": 3})


class MixesGroups(torch.optim.SGD):
    """Puts all parameters of its groups into one."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__([p for group in params for p in group["params"]], lr=lr)


def test_options_of_groups_that_a_base_joins() -> None:
    named = parameters()
    halves = [{"params": named[:2], "adapt": True}, {"params": named[2:]}]
    with pytest.raises(ValueError, match="MixesGroups puts parameters into one group that were given in several"):
        TrustRatio(MixesGroups, halves, lr=0.1)
    optimizer = TrustRatio(MixesGroups, [{**half, "adapt": False} for half in halves], lr=0.1)
    assert [group["adapt"] for group in optimizer.param_groups] == [False]


class LeavesOut(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1, keep: Any = lambda p: p.ndim > 1):
        super().__init__([p for p in params if keep(p)], lr=lr)


class HasTwice(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr=lr)
        self.param_groups.append(dict(self.param_groups[0]))


class HasItsOwn(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__([torch.nn.Parameter(p.detach().clone()) for p in params], lr=lr)


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (LeavesOut, "LeavesOut leaves out parameters that it was given, bias; scalar, so that they would not be"),
        (HasTwice, "HasTwice has parameters in its groups more than once, matrix; conv; bias; scalar, so that"),
        (HasItsOwn, "HasItsOwn has tensors in its groups that it was not given: a base must step the parameters"),
    ],
)
def test_a_base_whose_groups_are_not_what_it_was_given(base: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TrustRatio(base, parameters(), lr=0.1)


def test_a_base_may_leave_out_what_is_frozen() -> None:
    named = parameters()
    named[3][1].requires_grad_(False)
    optimizer = TrustRatio(LeavesOut, named, lr=0.1, keep=lambda p: p.requires_grad)
    assert len(optimizer.param_groups[0]["params"]) == 3


class WantsGroups(torch.optim.Optimizer):
    """As Muons that have Adam for the rest: a key says which, each has a rate of its own, and no tensor is taken."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.5, other_lr: float = 0.01):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum out of range: {momentum}")
        for group in params:
            if "use_momentum" not in group:
                raise ValueError("use_momentum must be set")
            if group["use_momentum"]:
                group["momentum"] = group.get("momentum", momentum)
            group["lr"] = group.get("lr", lr if group["use_momentum"] else other_lr)
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                u = p.grad.clone()
                if group["use_momentum"]:
                    u = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(group["momentum"]).add_(u)
                p.sub_(group["lr"] * u)


def groups_of(named: Named, **options: Any) -> list[dict[str, Any]]:
    return [{"params": named[:2], "use_momentum": True, **options}, {"params": named[2:], "use_momentum": False}]


def test_groups_with_keys_that_the_constructor_wants_and_rates_that_it_sets() -> None:
    optimizer = TrustRatio(WantsGroups, groups_of(parameters()), lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.01]
    assert [group["use_momentum"] for group in optimizer.param_groups] == [True, False]
    with pytest.raises(ValueError, match="momentum out of range: 2"):
        TrustRatio(WantsGroups, groups_of(parameters(), momentum=2), lr=0.2)
    with pytest.raises(ValueError, match="use_momentum must be set"):
        TrustRatio(WantsGroups, [{"params": parameters()}], lr=0.2)
    optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(2, 2)))], "use_momentum": False})
    assert optimizer.param_groups[2]["lr"] == 0.2


class WantsTwo(torch.optim.SGD):
    """Cannot be made of a single parameter."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.0):
        first, second, *others = params
        super().__init__([first, second, *others], lr=lr, momentum=momentum)


def test_options_of_a_class_that_takes_no_single_parameter_are_its_own_business() -> None:
    named = parameters()
    optimizer = TrustRatio(WantsTwo, named, lr=0.1, momentum=0.5)
    optimizer.param_groups[0]["momentum"] = 0.4
    optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(2, 2)))]})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="Invalid momentum"):
        TrustRatio(WantsTwo, named, lr=0.1, momentum=-1.0)


class AddsToGroups(torch.optim.SGD):
    """Has more to do with a new group than torch has, as classes with tensor rates and masks."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(group["lr"])
        for p in group["params"]:
            self.state[p]["mask"] = p.detach() > 0


def test_what_a_base_does_with_a_new_group() -> None:
    named = parameters()
    optimizer = TrustRatio(AddsToGroups, named[:3], lr=0.1)
    optimizer.add_param_group({"params": named[3:], "lr": 0.2})
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])
    assert set(optimizer.state[named[3][1]]) == {"mask"}
    assert list(optimizer.param_groups[1]["param_names"]) == ["scalar"]


def test_a_group_that_is_refused_leaves_nothing_behind() -> None:
    named = parameters()
    optimizer = TrustRatio(AddsToGroups, named[:3], lr=0.1)
    train(optimizer, named[:3])
    before = optimizer.state_dict()["state"].keys()
    with pytest.raises(ValueError, match="adapt must be one of"):
        optimizer.add_param_group({"params": named[3:], "adapt": "all"})
    with pytest.raises(ValueError, match="nearest: momentum"):
        optimizer.add_param_group({"params": named[3:], "momentun": 0.5})
    assert len(optimizer.param_groups) == 1
    assert optimizer.state_dict()["state"].keys() == before
    assert optimizer.base.param_groups is optimizer.param_groups
