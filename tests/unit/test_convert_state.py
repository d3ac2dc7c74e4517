"""`convert_state`: training goes on from other optimizers' state as they would, or the difference is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from trustratio.integrations.checkpoints import convert_state, load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LAMB, LAMBC, LANS, LARS, OPTIMIZERS, SNGM, TVLARS, CowClip, create_optimizer

SHAPES = {"matrix": (5, 7), "conv": (3, 2, 4), "bias": (6,)}
Layers = dict[str, torch.nn.Parameter]
Make = Callable[[Layers], torch.optim.Optimizer]
SAVED, LAST = 4, 9


def start(make: Make, weights: Mapping[str, torch.Tensor] | None = None) -> tuple[Layers, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(3)
    new = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    layers = {name: torch.nn.Parameter((weights or new)[name].detach().clone()) for name in SHAPES}
    return layers, make(layers)


def train(layers: Layers, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(50 + step)
        for name in SHAPES:
            layers[name].grad = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
        optimizer.step()


def own_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]


def assert_continued(theirs: Make, ours: Make, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Train with theirs, convert, and train on with both, in float64."""
    layers, source = start(theirs)
    train(layers, source, range(SAVED))
    state = copy.deepcopy(source.state_dict())
    if change is not None:
        change(state)
    before = copy.deepcopy(state["state"])
    continued, target = start(ours, layers)
    options = own_options(target)
    target.load_state_dict(convert_state(target, state))
    torch.testing.assert_close(state["state"], before, rtol=0, atol=0)
    assert own_options(target) == options
    assert {int(of["step"]) for of in target.state_dict()["state"].values()} == {SAVED}
    assert {group["step"] for group in target.param_groups} == {SAVED}
    for pair in ((layers, source), (continued, target)):
        train(*pair, range(SAVED, LAST))
    for name in SHAPES:
        torch.testing.assert_close(continued[name], layers[name], rtol=1e-6, atol=1e-9)


# Adam ---------------------------------------------------------------------------------------------------------------

ADAM = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8}


def adamw(**options: Any) -> Make:
    return lambda layers: torch.optim.AdamW(layers.values(), **{**ADAM, "weight_decay": 0.1, **options})


def unscaled_lamb(layers: Layers) -> torch.optim.Optimizer:
    return LAMB(layers.items(), **ADAM, weight_decay=0.1, adapt=False)  # AdamW


def step_as(make: Callable[[float], Any]) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for of_parameter in state["state"].values():
            of_parameter["step"] = make(float(of_parameter["step"]))

    return change


@pytest.mark.parametrize("names", ["options", "drop"])
def test_names_that_are_one_text_are_refused(names: str) -> None:
    layer = torch.nn.Linear(2, 2)
    state = torch.optim.AdamW(layer.parameters()).state_dict()
    with pytest.raises(TypeError, match=rf"{names} must be a collection of names, such as \('lr',\), got 'lr'"):
        convert_state(LAMB(layer.parameters()), state, **{names: "lr"})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("form", [int, float, torch.tensor, lambda n: torch.tensor([n], dtype=torch.float64)])
def test_adamw_goes_on_as_lamb(options: dict[str, Any], form: Any) -> None:
    assert_continued(adamw(**options), unscaled_lamb, step_as(form))


def test_capturable_forms_and_schedulers_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(state: dict[str, Any]) -> None:
        state["param_groups"][0].update(capturable=True, initial_lr=0.02, swa_lr=0.1)

    assert_continued(adamw(), unscaled_lamb, change)


def test_amsgrad_leaves_its_maximum_behind_only_if_asked() -> None:
    with pytest.raises(ValueError, match="max_exp_avg_sq, which LAMB does not keep: name it in drop"):
        assert_continued(adamw(amsgrad=True), unscaled_lamb)
    layers, source = start(adamw(amsgrad=True))
    train(layers, source, range(SAVED))
    _, target = start(unscaled_lamb)
    target.load_state_dict(convert_state(target, source.state_dict(), drop=("max_exp_avg_sq",)))
    assert set(target.state_dict()["state"][0]) == {"exp_avg", "exp_avg_sq", "step"}


def test_adam_with_l2_goes_on_as_cowclip_and_never_as_lamb() -> None:
    def adam(layers: Layers) -> torch.optim.Optimizer:
        return torch.optim.Adam(layers.values(), **ADAM, weight_decay=0.1)

    assert_continued(adam, lambda layers: CowClip(layers.items(), **ADAM, weight_decay=0.1))
    with pytest.raises(ValueError, match=r"adds up 'gradient . decay', that of this LAMB 'gradient'"):
        assert_continued(adam, unscaled_lamb)


def test_an_adam_that_does_not_tell_is_asked() -> None:
    """As torch wrote them before `decoupled_weight_decay`, and apex's FusedAdam."""

    def forget(state: dict[str, Any]) -> None:
        del state["param_groups"][0]["decoupled_weight_decay"]

    def tell(state: dict[str, Any]) -> None:
        forget(state)
        state["param_groups"][0]["accumulates"] = "gradient"

    with pytest.raises(
        ValueError, match=r"set group\['accumulates'\] .*'gradient' \(AdamW, LAMB\), 'gradient . decay'"
    ):
        assert_continued(adamw(), unscaled_lamb, forget)
    assert_continued(adamw(), unscaled_lamb, tell)


# LAMB ---------------------------------------------------------------------------------------------------------------


def timm_lamb(timm_optim: Any, **options: Any) -> Make:
    options = {**ADAM, "weight_decay": 0.1, "max_grad_norm": None, "always_adapt": True, **options}
    return lambda layers: timm_optim["lamb"].Lamb(layers.values(), **options)


def lamb(**options: Any) -> Make:
    return lambda layers: LAMB(layers.items(), **{**ADAM, "weight_decay": 0.1, "adapt": True, **options})


def as_apex(state: dict[str, Any]) -> None:
    """What apex's FusedLAMB writes: a whole number of steps per group, and none of timm's options."""
    kept = ("lr", "bias_correction", "betas", "eps", "weight_decay", "grad_averaging", "max_grad_norm", "params")
    state["param_groups"] = [
        {**{key: group[key] for key in kept}, "step": int(group["step"])} for group in state["param_groups"]
    ]


def as_deepspeed(state: dict[str, Any]) -> None:
    """What DeepSpeed's FusedLamb writes: whole numbers of steps per parameter."""
    kept = ("lr", "bias_correction", "betas", "eps", "weight_decay", "params")
    steps = int(state["param_groups"][0]["step"])
    state["param_groups"] = [
        {**{key: group[key] for key in kept}, "max_grad_norm": 0.0, "max_coeff": 10.0, "min_coeff": 0.01}
        for group in state["param_groups"]
    ]
    for of_parameter in state["state"].values():
        of_parameter["step"] = steps


@pytest.mark.parametrize("form", [None, as_apex, as_deepspeed])
@pytest.mark.parametrize("options", [{}, {"bias_correction": False}, {"max_grad_norm": 0.5}])
def test_lambs_of_others_go_on(timm_optim: Any, options: dict[str, Any], form: Any) -> None:
    assert_continued(timm_lamb(timm_optim, **options), lamb(**options), form)


def test_a_sum_goes_on_as_a_sum_and_a_mean_as_a_mean(timm_optim: Any) -> None:
    assert_continued(timm_lamb(timm_optim, grad_averaging=False), lamb(grad_averaging=False))
    with pytest.raises(ValueError, match=r"adds up 'gradient / .1 - beta1.', that of this LAMB 'gradient'"):
        assert_continued(timm_lamb(timm_optim, grad_averaging=False), lamb())


def test_between_classes_of_this_package() -> None:
    assert_continued(
        lamb(trust_bounds=(0.0, 1.0)), lambda layers: LAMBC(layers.items(), **ADAM, weight_decay=0.1, adapt=True)
    )
    layers, source = start(lamb())
    train(layers, source, range(SAVED))
    same, normalised = (LANS(layers.items(), betas=(0.9, 0.99), normalize_grad=value) for value in (False, True))
    same.load_state_dict(convert_state(same, source.state_dict()))
    with pytest.raises(ValueError, match="adds up 'gradient', that of this LANS 'gradient / norm'"):
        convert_state(normalised, source.state_dict())


# Momentum -----------------------------------------------------------------------------------------------------------


def counted(state: dict[str, Any]) -> None:
    state["param_groups"][0]["step"] = SAVED


def sgd(**options: Any) -> Make:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, **options}
    return lambda layers: torch.optim.SGD(layers.values(), **options)


def lars(form: str, **options: Any) -> Make:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, **options}
    return lambda layers: LARS(layers.items(), momentum_form=form, **options)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_goes_on_as_unscaled_lars(nesterov: bool) -> None:
    assert_continued(sgd(nesterov=nesterov), lars("unscaled", nesterov=nesterov, adapt=False), counted)
    with pytest.raises(ValueError, match=r"does not count its updates: set group\['step'\]"):
        assert_continued(sgd(), lars("unscaled"))


@pytest.mark.parametrize("nesterov", [True, False])
def test_timms_lars_goes_on_in_the_gradient_form(timm_optim: Any, nesterov: bool) -> None:
    same = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "eps": 1e-8, "nesterov": nesterov}

    def theirs(layers: Layers) -> torch.optim.Optimizer:
        return timm_optim["lars"].Lars(layers.values(), **same, trust_coeff=0.02, always_adapt=True)

    assert_continued(theirs, lars("gradient", **same, trust_coefficient=0.02, adapt=True), counted)
    for form in ("scaled", "unscaled"):
        with pytest.raises(
            ValueError, match=f"'ratio . .gradient . decay.', that of this LARS .*{'lr' * (form[0] == 's')}"
        ):
            assert_continued(theirs, lars(form), counted)


def test_what_a_momentum_is_of() -> None:
    for other, ours in ((sgd(dampening=0.1), lars("unscaled")), (sgd(), lars("scaled")), (sgd(), lars("gradient"))):
        with pytest.raises(ValueError, match="its state adds up"):
            assert_continued(other, ours, counted)
    with pytest.raises(ValueError, match="other sign"):
        assert_continued(sgd(maximize=True), lars("unscaled"), counted)
    for target in (SNGM, TVLARS):
        with pytest.raises(ValueError, match=f"nobody else's state means what that of {target.__name__} does"):
            assert_continued(sgd(), lambda layers, target=target: target(layers.items(), lr=0.1), counted)

    def of_another_package(state: dict[str, Any]) -> None:
        counted(state)
        state["param_groups"][0].update(trust_coefficient=0.001, eps=0.0)

    def told(state: dict[str, Any]) -> None:
        of_another_package(state)
        state["param_groups"][0]["accumulates"] = "gradient + decay"

    with pytest.raises(ValueError, match="does not tell what its state adds up"):
        assert_continued(sgd(), lars("unscaled", adapt=False), of_another_package)
    assert_continued(sgd(), lars("unscaled", adapt=False), told)


# Whose state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("other", [adamw(), sgd()])
def test_a_plain_load_names_the_converter(name: str, other: Make) -> None:
    layers, source = start(other)
    train(layers, source, range(2))
    target = create_optimizer(name, layers.items(), lr=0.1)
    with pytest.raises(ValueError, match="convert_state converts other optimizers' state"):
        target.load_state_dict(source.state_dict())
    assert not target.state


@pytest.mark.parametrize("other", [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.NAdam])
@pytest.mark.filterwarnings("ignore:the moments of group")
def test_other_state_is_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=r"LAMB (keeps|does not keep)"):
        assert_continued(lambda layers: other(layers.values()), unscaled_lamb)


def test_parameters_are_matched_by_name_where_both_know_names() -> None:
    def theirs(layers: Layers) -> torch.optim.Optimizer:
        named = [(f"module.{name}", layer) for name, layer in reversed(layers.items())]
        return torch.optim.AdamW(
            [{"params": named[:1], "weight_decay": 0.1}, {"params": named[1:]}], **ADAM, weight_decay=0.1
        )

    assert_continued(theirs, unscaled_lamb)
    layers, _ = start(sgd())
    groups = [{"params": list(layers.values())[:2]}, {"params": list(layers.values())[2:]}]
    state = torch.optim.AdamW(groups).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[2, 1\] parameters, the optimizer of \[3\]"):
        convert_state(LAMB(layers.values()), state)
    state = torch.optim.AdamW([(name, layer) for name, layer in layers.items() if name != "bias"]).state_dict()
    with pytest.raises(ValueError, match="only the state_dict or only the optimizer has: bias"):
        convert_state(LAMB(layers.items()), state)


def test_options_are_kept_unless_asked_for() -> None:
    layers, source = start(adamw(lr=0.5, betas=(0.8, 0.9)))
    train(layers, source, range(2))
    source.param_groups[0]["initial_lr"] = 0.7
    target = LAMB(layers.items(), lr=0.1)
    with pytest.warns(UserWarning, match=r"averaged with betas=\(0.8, 0.9\) and go on with betas=\(0.9, 0.999\)"):
        convert_state(target, source.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = convert_state(target, source.state_dict(), options=("lr", "betas", "initial_lr"))
    target.load_state_dict(state)
    found = {key: target.param_groups[0][key] for key in ("lr", "betas", "initial_lr", "weight_decay")}
    assert found == {"lr": 0.5, "betas": (0.8, 0.9), "initial_lr": 0.7, "weight_decay": 0.01}
    for option, message in (("amsgrad", "not one of this optimizer"), ("rate", "it has no option rate")):
        with pytest.raises(ValueError, match=message):
            convert_state(target, source.state_dict(), options=("betas", option))


def test_parameters_without_state_start_anew() -> None:
    layers, source = start(adamw())
    layers["conv"].requires_grad_(False)
    layers["matrix"].grad = torch.ones_like(layers["matrix"])
    source.step()
    target = LAMB(layers.items(), betas=(0.9, 0.99))
    target.load_state_dict(convert_state(target, source.state_dict()))
    assert list(target.state_dict()["state"]) == [0]


def test_on_to_other_wrappers(tmp_path: Any) -> None:
    layers, source = start(adamw())
    train(layers, source, range(SAVED))
    alone = unscaled_lamb(layers)
    alone.load_state_dict(convert_state(alone, source.state_dict()))
    save_optimizer_state(alone, tmp_path / "state")
    others, wrapped = start(unscaled_lamb)
    load_optimizer_state(wrapped, tmp_path / "state")
    for pair in ((layers, source), (others, wrapped)):
        train(*pair, range(SAVED, LAST))
    for name in SHAPES:
        torch.testing.assert_close(others[name], layers[name], rtol=1e-6, atol=1e-9)


# Damaged state ------------------------------------------------------------------------------------------------------


def as_text(state: dict[str, Any]) -> dict[str, Any]:
    """As JSON makes it."""
    return {**state, "state": {str(number): of for number, of in state["state"].items()}}


def beyond_the_groups(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {number + 3: of for number, of in state["state"].items()}}


def stepped(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {
        **state,
        "state": {number: {**of, "step": torch.tensor(value)} for number, of in state["state"].items()},
    }


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "keys are text": (as_text, "state is of '0'; '1'; '2', which are not among the parameters"),
    "keys of no group": (beyond_the_groups, "state is of 3; 4; 5, which are not among the parameters"),
    "half a step": (stepped(2.5), "step must be the number of steps taken, a whole number, got 2.5"),
    "no step": (stepped(float("nan")), "step must be the number of steps taken, a whole number, got nan"),
    "negative": (stepped(-1.0), "step must be the number of steps taken, a whole number, got -1.0"),
    "whole checkpoint": (lambda state: {"optimizer": state}, r"state and param_groups, got a dict of 'optimizer'"),
    "groups alone": (lambda state: state["param_groups"], "state and param_groups, got <class 'list'>"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_state_is_refused(damage: str) -> None:
    change, message = DAMAGED[damage]
    layers, source = start(adamw())
    train(layers, source, range(SAVED))
    _, target = start(lambda layers: LAMB(layers.values()))
    with pytest.raises(ValueError, match=message):
        convert_state(target, change(source.state_dict()))


@pytest.mark.parametrize("change", [as_text, beyond_the_groups])
def test_own_state_of_no_parameter_is_refused(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    layers, source = start(lambda layers: LAMB(layers.values()))
    train(layers, source, range(SAVED))
    with pytest.raises(ValueError, match="which are not among the parameters of its groups"):
        source.load_state_dict(change(source.state_dict()))
    beside = {**source.state_dict()["state"], "of a wrapper": {"anything": 1}}
    source.load_state_dict({**source.state_dict(), "state": beside})
