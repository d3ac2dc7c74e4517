"""What TrustRatio refuses and warns of, by name, before a weight moves."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from trustratio.integrations.checkpoints.consolidated import save_optimizer_state
from trustratio.optimizers import LAMB, LayoutError, TrustRatio, create_optimizer

from ..base_optimizers import Lion
from .test_proposals import ForgetsItsCount, LimitedRate, WrapsAnother
from .test_trust_ratio import parameters, train


@pytest.mark.parametrize(
    ("base_class", "dtype"), [(torch.optim.AdamW, torch.float16), (torch.optim.Adafactor, torch.bfloat16)]
)
def test_16_bit_weights_that_swallow_the_step_are_refused(base_class: Any, dtype: torch.dtype) -> None:
    named = parameters(dtype)
    with pytest.raises(LayoutError, match=f"the step of {base_class.__name__} cannot be told .* torch.autocast"):
        train(TrustRatio(base_class, named, lr=0.1), named)


@pytest.mark.parametrize(
    ("base_class", "options", "error", "message"),
    [
        (torch.optim.AdamW, {"beta": (0.9, 0.99)}, TypeError, "unexpected keyword argument 'beta'; nearest: betas"),
        (torch.optim.AdamW, {"trust_bound": (0, 1)}, TypeError, "'trust_bound'; nearest: trust_bounds"),
        (torch.optim.AdamW, {"trust_bounds": (1.0, 0.5)}, ValueError, r"trust_bounds\[1\] must be in \[1, inf\]"),
        (torch.optim.AdamW, {"lr": -1.0}, ValueError, "learning rate: -1.0"),
        (torch.optim.AdamW, {"betas": (2.0, 0.9)}, ValueError, "Invalid beta parameter"),
        (torch.optim.AdamW, {"adapt": "all"}, ValueError, "adapt must be one of None, True, False"),
        (torch.optim.AdamW, {"differentiable": True}, ValueError, "differentiable must be False"),
        (Lion, {"maximize": True}, TypeError, "unexpected keyword argument 'maximize'"),
        (torch.nn.Linear, {}, TypeError, "base_class must be an optimizer class such as"),
        (LAMB, {}, TypeError, "LAMB has a ratio of its own"),
    ],
)
def test_mistakes_are_named(base_class: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrustRatio(base_class, parameters(), **{"lr": 0.1, **options})


def test_an_object_in_place_of_a_class() -> None:
    base: Any = torch.optim.AdamW([p for _, p in parameters()])
    with pytest.raises(TypeError, match=r"got an object of AdamW: TrustRatio\(AdamW, params, lr, ...\)"):
        TrustRatio(base, parameters(), lr=0.1)


def test_params_may_come_first() -> None:
    """As whoever makes optimizers of any class gives them."""
    named: Any = parameters()
    make: Any = TrustRatio
    for optimizer in (
        make(named, base_class=Lion, lr=0.1, trust_bounds=(0.0, 2.0)),
        make(named, 0.1, (0.0, 2.0), base_class=Lion),
        make(params=named, base_class=Lion, lr=0.1, trust_bounds=(0.0, 2.0)),
        make(Lion, params=named, lr=0.1, trust_bounds=(0.0, 2.0)),
    ):
        assert optimizer.base_class is Lion
        assert optimizer.param_groups[0]["trust_bounds"] == (0.0, 2.0)
        assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("arguments", [(), (Lion,), ([torch.nn.Parameter(torch.ones(2))],)])
def test_a_base_class_or_params_that_are_missing(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"needs a base_class and params: .*\(params, lr=..., base_class="):
        TrustRatio(*arguments, lr=0.1)


def test_no_weight_decay_suits_a_base_that_has_none() -> None:
    """As the Trainer writes it into its groups."""
    named = parameters()
    optimizer = TrustRatio(torch.optim.Rprop, [{"params": named, "weight_decay": 0.0}], lr=0.1)
    assert optimizer.base_class is torch.optim.Rprop
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, named, range(1))


def test_a_group_key_that_changes_nothing_is_told_once() -> None:
    named = parameters()
    groups = [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "nesterov": True, "tag": "a"}]
    optimizer = TrustRatio(torch.optim.Rprop, groups, lr=0.1)
    with pytest.warns(UserWarning, match="Rprop makes nothing of the group key 'weight_decay', which is no option"):
        train(optimizer, named, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, named, range(1, 2))


def test_a_base_without_a_rate() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any, lr: float | None = None):
            super().__init__(params, lr=1.0)
            self.defaults["lr"] = lr

    class No(torch.optim.SGD):
        def __init__(self, params: Any, momentum: float = 0.0):
            super().__init__(params, lr=1.0, momentum=momentum)

    with pytest.raises(ValueError, match="lr must be given: Own chooses its own"):
        TrustRatio(Own, parameters())
    with pytest.raises(TypeError, match=r"must have the option lr, .* No has momentum"):
        TrustRatio(No, parameters())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("betas", (0.9, 2.0), "group 0: Invalid beta"), ("trust_bounds", (-1, 1), r"group 0: trust_bounds\[0\]")],
)
def test_options_are_checked_again_when_they_change(key: str, value: Any, message: str) -> None:
    named = parameters()
    train(optimizer := TrustRatio(torch.optim.AdamW, named, lr=0.1), named, range(1))
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=message):
        train(optimizer, named, range(1))


def test_a_file_of_another_base_is_refused() -> None:
    named = parameters()
    train(sgd := torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9), named)
    with pytest.raises(ValueError, match="does not belong to this TrustRatio"):
        TrustRatio(torch.optim.AdamW, named, lr=0.1).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize(("size", "warns"), [(1.0, False), (1e-4, True)])
def test_a_step_that_is_rounding_is_told_once(size: float, warns: bool) -> None:
    """At its own rate, of 0.001, and a gradient of 0.0001 of the weights, a quarter of the direction is rounding."""
    named = [(name, p) for name, p in parameters() if p.dim()]
    optimizer = TrustRatio(LimitedRate, named, lr=0.001)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(optimizer, named, scale=size)
    messages = [str(w.message) for w in told]
    assert len(messages) == warns
    if warns:
        assert re.search("% of its direction is rounding, in matrix; conv; bias: .* raise lr, or take", messages[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(TrustRatio(torch.optim.SGD, named, lr=0.001), named, scale=1e-6)


@pytest.mark.parametrize(("size", "warns"), [(1e-14, False), (1e-22, True)])
def test_a_direction_is_known_to_the_last_digit_or_warned_of(size: float, warns: bool) -> None:
    named, exact = parameters(), parameters(torch.float64)
    optimizer, wanted = (TrustRatio(torch.optim.SGD, of, lr=0.1, adapt=True) for of in (named, exact))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(optimizer, named, scale=size)
    train(wanted, exact, scale=size)
    if warns:
        assert "fp32 can tell beside the weights" in str(told[0].message)
    else:
        assert not told
        assert optimizer.trust_ratios() == pytest.approx(wanted.trust_ratios(), rel=1e-6)


@pytest.mark.parametrize(
    ("base_class", "message"),
    [
        (ForgetsItsCount, r"ForgetsItsCount depend on what is neither .* It may be self\.count"),
        (WrapsAnother, r"It may be self\.inner"),
        (torch.optim.ASGD, "ASGD keeps copies of the weights .*AveragedModel"),
    ],
)
def test_bases_with_state_that_would_be_wrong_are_refused_at_the_first_step(base_class: Any, message: str) -> None:
    named = parameters()
    before = [p.detach().clone() for _, p in named]
    with pytest.raises(LayoutError, match=message):
        train(TrustRatio(base_class, named, lr=0.1), named)
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


def test_a_base_that_registers_hooks_on_itself_is_refused() -> None:
    class Hooked(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1):
            super().__init__(params, lr=lr)
            self.register_step_pre_hook(lambda *_: None)

    with pytest.raises(TypeError, match=r"Hooked registers hooks on itself \(step_pre_hooks\), which nothing would"):
        TrustRatio(Hooked, parameters(), lr=0.1)


def test_by_name() -> None:
    named = parameters()
    optimizer = create_optimizer("Trust_Ratio", named, base_class=Lion, lr=0.1, trust_bounds=(0.0, 2.0))
    assert isinstance(optimizer, TrustRatio)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert type(create_optimizer("TrustRatio", named, base_class=Lion, lr=0.1)) is TrustRatio
    with pytest.raises(ValueError, match="trust_ratio needs the option base_class"):
        create_optimizer("trust_ratio", named, lr=0.1)
    with pytest.raises(ValueError, match="'beta'; nearest: betas"):
        create_optimizer("trust_ratio", named, base_class=Lion, lr=0.1, beta=0.9)


def test_files_by_layer_name_know_nothing_of_somebodys_state(tmp_path: Any) -> None:
    named = parameters()
    train(optimizer := TrustRatio(torch.optim.AdamW, named, lr=0.1), named, range(1))
    with pytest.raises(TypeError, match=r"the state of TrustRatio is AdamW's, .* or by state_dict\(\)"):
        save_optimizer_state(optimizer, tmp_path / "state")
