"""What a class makes of its groups, of the loss and of Python numbers, told by trying it and obeyed by TrustRatio."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from trustratio.optimizers import LayoutError, TrustRatio
from trustratio.optimizers.proposals.nature import Nature, nature_of

from .test_proposals import Plain
from .test_trust_ratio import gradients, parameters, train, values

CPU = torch.device("cpu")


class ReadsKeys(Plain):
    """Looks for keys that are no options of its constructor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                g = p.grad / p.grad.norm() if group.get("normalized") else p.grad
                warmed_up = group["lr"] / group["initial_lr"] if "initial_lr" in group else 1.0
                p.sub_(group["lr"] * warmed_up * g)


class WantsKeys(Plain):
    """Takes groups with a key of their own alone."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        params = list(params)
        if not all(isinstance(group, dict) and isinstance(group["use_rows"], bool) for group in params):
            raise KeyError("use_rows")
        super().__init__(params, lr, limit)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad / p.grad.norm(dim=-1, keepdim=True) if group["use_rows"] else p.grad))


class WantsTensors(Plain):
    """Makes groups of its own."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        params = list(params)
        many, few = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
        super().__init__([{"params": group} for group in (many, few) if group], lr, limit)


class CountsGroups(Plain):
    """Knows its groups by their number."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        super().__init__(params, lr, limit)
        self.first_rates = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, first in zip(self.param_groups, self.first_rates, strict=False):
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.clamp(-10 * first, 10 * first))


class EstimatesInState(Plain):
    """An estimate of all gradients, as a Python number that no step depends on for a while."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        state["estimate"] = 0.9 * state.get("estimate", 0.0) + float(self.norm())
        p.sub_(lr * g)


class EstimatesInList(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        self.param_groups[0].setdefault("history", []).append({"norm": float(self.norm())})
        p.sub_(lr * g)


class NormsInState(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        state["norm"] = float(g.norm())
        p.sub_(lr * g)


class QuantizesBlocks(Plain):
    """In blocks of 256 where they fit, else not at all."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        if g.numel() % 256 == 0:
            blocks = g.reshape(-1, 256)
            g = (blocks.sign() * blocks.abs().amax(dim=1, keepdim=True)).view(g.shape)
        p.sub_(lr * g)


class CentresKernels(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.sub_(lr * (g - g.mean(dim=(1, 2, 3), keepdim=True) if g.dim() == 4 else g))


class KeepsOnParameters(Plain):
    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.momentum = getattr(p, "momentum", 0.0) * 0.9 + g
        p.sub_(lr * p.momentum)


class ReadsLoss(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        loss = 1.0 if closure is None else float(closure())
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * loss * p.grad)


class IgnoresLoss(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        super().step()


class SchedulesItself(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.99


class WantsTensorRate(Plain):
    """As classes that are compiled do."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        super().__init__(params, lr, limit)
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"])

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: Any, limit: float) -> None:
        if not isinstance(lr, torch.Tensor):
            raise RuntimeError("lr was changed to a number")
        p.sub_(lr * g)


class DecaysAtOnce(Plain):
    """By a share of the weights that has nothing to do with the rate; `limit` is that share."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        p.mul_(1 - limit).sub_(lr * g)


class NeedsItsLoss(Plain):
    @torch.no_grad()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        loss = float(closure())
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * loss * p.grad)


class ComputesInFp32(Plain):
    """Whatever the dtype of the weights."""

    def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: float) -> None:
        m = state.setdefault("m", torch.zeros_like(p, dtype=torch.float32)).lerp_(g.float(), 0.1)
        v = state.setdefault("v", torch.zeros_like(p, dtype=torch.float32)).lerp_(g.float().square(), 0.01)
        p.copy_(p.float() - lr * m / (v.sqrt() + 1e-6))


class SortsByMark(CountsGroups):
    """Takes tensors alone, and makes groups by what nobody else knows."""

    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        marked: Any = {True: [], False: []}
        for p in params:
            marked[hasattr(p, "is_slow") and p.is_slow].append(p)
        super().__init__([{"params": marked[False]}, {"params": marked[True], "lr": lr / 10}], lr, limit)


class Greets(Plain):
    def __init__(self, params: Any, lr: float = 0.1, limit: float = 1.0):
        print("hello")
        super().__init__(params, lr, limit)


def found(base_class: type[torch.optim.Optimizer], options: Any = None, **in_group: Any) -> Nature:
    return nature_of(base_class, options or {}, CPU, in_group)


@pytest.mark.parametrize(
    ("base_class", "in_group", "is_element_wise", "is_layer_wise"),
    [
        (ReadsKeys, {}, True, True),
        (ReadsKeys, {"normalized": False}, True, True),
        (ReadsKeys, {"normalized": True}, False, True),
        (WantsKeys, {"use_rows": True}, False, True),
        (WantsKeys, {"use_rows": False}, True, True),
        (WantsTensors, {}, True, True),
        (WantsTensors, {"tag": "a"}, True, True),
        (CountsGroups, {}, True, True),
        (EstimatesInState, {}, False, False),
        (EstimatesInList, {}, False, False),
        (NormsInState, {}, False, True),
        (QuantizesBlocks, {}, False, True),
        (CentresKernels, {}, False, True),
        (WantsTensorRate, {}, True, True),
        (NeedsItsLoss, {}, True, True),
        (ComputesInFp32, {}, True, True),
        (SortsByMark, {}, True, True),
    ],
)
def test_what_it_looks_at(base_class: Any, in_group: Any, is_element_wise: bool, is_layer_wise: bool) -> None:
    nature = found(base_class, **in_group)
    assert (nature.is_element_wise, nature.is_layer_wise) == (is_element_wise, is_layer_wise)


def test_what_else_it_does() -> None:
    assert found(ReadsKeys).is_proportional
    assert not found(ReadsKeys, initial_lr=0.05).is_proportional
    assert found(KeepsOnParameters).hidden == ("p.momentum",)
    assert [found(kind).goes_by_groups for kind in (CountsGroups, Plain, torch.optim.AdamW)] == [True, False, False]
    assert [found(kind).reads_loss for kind in (ReadsLoss, NeedsItsLoss, IgnoresLoss)] == [True, True, False]
    assert found(SortsByMark).goes_by_groups  # for nobody knows
    assert not found(WantsTensors).goes_by_groups
    assert [found(kind).writes_rate for kind in (SchedulesItself, WantsTensorRate, Plain)] == [True, False, False]


def test_who_computes_in_fp32_by_itself_is_compared_so() -> None:
    assert found(ComputesInFp32).is_proportional


def test_a_constructor_that_prints_is_heard_once(capsys: pytest.CaptureFixture[str]) -> None:
    named = parameters()
    train(TrustRatio(Greets, named, lr=0.1), named, range(1))
    assert capsys.readouterr().out == "hello\n"


def test_it_is_tried_once_for_all_groups_that_differ_in_counts_names_and_rates() -> None:
    first = found(ReadsKeys, {"limit": 1.0}, normalized=True, steps=0, name="a", lr_scale=0.1, initial_lr=0.1)
    assert found(ReadsKeys, {"limit": 1.0}, normalized=True, steps=9, name="b", lr_scale=0.2, initial_lr=0.3) is first
    assert found(ReadsKeys, {"limit": 2.0}, normalized=True, steps=0, name="a", lr_scale=0.1) is not first


def test_a_key_of_the_base_is_kept_without_a_word_and_a_misspelt_option_refused() -> None:
    named = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = TrustRatio(ReadsKeys, [{"params": named, "normalized": True}], lr=0.1)
        train(optimizer, named)
    assert optimizer.param_groups[0]["normalized"] is True
    with pytest.raises(ValueError, match="TrustRatio has no group option 'trust_bound'"):
        TrustRatio(ReadsKeys, [{"params": parameters(), "trust_bound": (0, 1)}], lr=0.1)


def test_a_base_may_count_the_groups_of_one_call() -> None:
    """Also if some are left out for a while: only wrappers that step tensors of their own bring groups one by one."""
    named, wanted = parameters(), parameters()
    one, other = ([{"params": of[:2], "lr": 0.2}, {"params": of[2:]}] for of in (named, [(n, p) for n, p in wanted]))
    plain = CountsGroups([{**group, "params": [p for _, p in group["params"]]} for group in other], lr=0.1)
    train(TrustRatio(CountsGroups, one, lr=0.1, adapt=False), named)
    train(plain, wanted)
    for name, value in values(wanted).items():
        torch.testing.assert_close(values(named)[name], value)


def test_a_base_that_schedules_itself_is_refused() -> None:
    named = parameters()
    with pytest.raises(LayoutError, match=r"SchedulesItself writes the learning rate of its groups .* a scheduler"):
        train(TrustRatio(SchedulesItself, named, lr=0.1), named)


def test_the_rate_may_be_a_tensor_that_the_base_made() -> None:
    named, wanted = parameters(), parameters()
    rate = torch.tensor(0.1)
    optimizer = TrustRatio(WantsTensorRate, named, lr=rate)
    train(optimizer, named)
    train(TrustRatio(Plain, wanted, lr=0.1), wanted)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.1)
    for name, value in values(wanted).items():
        torch.testing.assert_close(values(named)[name], value)


@pytest.mark.parametrize("limits", [(torch.tensor(0.0), torch.tensor(0.25)), ({"of": 0.0}, {"of": 0.25})])
def test_an_option_that_begins_may_be_a_tensor_or_a_mapping(limits: Any) -> None:
    class Decays(DecaysAtOnce):
        def change(self, p: Any, g: Any, state: dict[str, Any], lr: float, limit: Any) -> None:
            super().change(p, g, state, lr, float(limit["of"] if isinstance(limit, dict) else limit))

    named = parameters()
    optimizer = TrustRatio(Decays, named, limit=limits[0], lr=0.1, adapt=False)
    train(optimizer, named, range(2))
    weights = values(named)
    optimizer.param_groups[0]["limit"] = limits[1]
    train(optimizer, named, range(2, 3))
    for name, g in gradients(2, named).items():
        torch.testing.assert_close(values(named)[name], 0.75 * weights[name] - 0.1 * g)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_decay_that_begins_later_is_not_magnified(is_loaded: bool) -> None:
    """Before, its direction was had at the large rate, at which a share of the weights is lost."""
    named, options = parameters(), {"lr": 0.1, "adapt": False}
    optimizer = TrustRatio(DecaysAtOnce, named, limit=0.0, **options)
    train(optimizer, named, range(2))
    weights = values(named)
    optimizer.param_groups[0]["limit"] = 0.25
    if is_loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, named, range(2, 3))
    for name, g in gradients(2, named).items():
        torch.testing.assert_close(values(named)[name], 0.75 * weights[name] - 0.1 * g)
