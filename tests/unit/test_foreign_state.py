"""`load_state_dict` refuses what does not belong to the optimizer, and nothing of it is loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LANS, LARS, OPTIMIZERS, NovoGrad, create_optimizer

from .test_generic import make, make_parameters, train

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (4, 3), "bias": (4,)}


def parameters(shapes: dict[str, tuple[int, ...]] | None = None) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in (shapes or SHAPES).items()]


def stepped(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def adam(names: list[tuple[str, torch.nn.Parameter]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in names], lr=lr)


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        (LARS, LAMB, "group 0 lacks the options betas, .*options of another optimizer: momentum"),
        (adam, LAMB, "group 0 lacks the options bias_correction"),
        (LAMB, LANS, "lacks the options normalize_grad.*of another optimizer: bias_correction"),
        (LAMB, NovoGrad, "options of another optimizer: bias_correction"),
    ],
)
def test_another_optimizer(saved: Any, loading: Any, message: str, started: bool) -> None:
    source = saved(parameters(), lr=0.1)
    state = stepped(source) if started else source.state_dict()
    target = loading(parameters(), lr=0.2)
    with pytest.raises(ValueError, match=f"(?s){message}.*Load the state of the same optimizer"):
        target.load_state_dict(state)
    assert target.param_groups[0]["lr"] == 0.2
    assert not target.state


class WithAnyOptions(LARS):
    """A user's optimizer whose options bear names that schedulers and other people put into groups."""

    def __init__(self, params: Any, lr: float, initial_lr: float = 0.1, swa_lr: float = 0.1, note: int = 0):
        super().__init__(params, lr)


class Unreadable(LARS):
    """A user's optimizer of which `inspect` can tell nothing."""

    __signature__ = "unknown"


def test_what_others_put_into_groups_is_not_foreign_whatever_users_define() -> None:
    source = LARS(parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(source, lambda step: 1.0)
    source.param_groups[0]["note"] = 1
    LARS(parameters(), lr=0.2).load_state_dict(source.state_dict())


@pytest.mark.parametrize("started", [True, False])
def test_other_order_of_names(started: bool) -> None:
    shapes = {"one": (3, 3), "two": (3, 3)}
    source = LAMB(parameters(shapes), lr=0.1)
    state = stepped(source) if started else source.state_dict()
    target = LAMB(parameters(dict(reversed(shapes.items()))), lr=0.2)
    with pytest.raises(ValueError, match="parameter 0 of group 0 is one in the state_dict and two here"):
        target.load_state_dict(state)


def test_other_shapes() -> None:
    state = stepped(LAMB(parameters()))
    target = LAMB(parameters({"matrix": (3, 4), "bias": (4,)}))
    with pytest.raises(ValueError, match=r"exp_avg of parameter matrix has shape \(4, 3\) instead of \(3, 4\)"):
        target.load_state_dict(state)


def test_other_state() -> None:
    state = stepped(LAMB(parameters()))
    del state["state"][0]["step"]
    with pytest.raises(ValueError, match="parameter matrix lacks the state step"):
        LAMB(parameters()).load_state_dict(state)


@pytest.mark.parametrize("name", ["lamb", "lars", "novograd", "vrlamb"])
def test_what_belongs_is_loaded(name: str) -> None:
    """Keys of schedulers, files without the newest options, names of a wrapped model, unnamed parameters."""
    source = create_optimizer(name, parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(source, lambda _: 1.0)
    state = source.state_dict()
    for group in state["param_groups"]:
        del group["adapt"], group["segments"]
        group["param_names"] = [f"module._orig_mod.{layer}" for layer in group["param_names"]]
    create_optimizer(name, parameters(), lr=0.2).load_state_dict(state)
    target = create_optimizer(name, [parameter for _, parameter in parameters()], lr=0.2)
    target.load_state_dict(state)
    assert (target.param_groups[0]["lr"], target.param_groups[0]["initial_lr"]) == (0.1, 0.1)


def test_options_of_the_file_decide_about_the_state() -> None:
    state = stepped(LARS(parameters(), lr=0.1, momentum=0.0))
    target = LARS(parameters(), lr=0.1, momentum=0.9)
    target.load_state_dict(state)
    stepped(target)


# What is missing, and what others added ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_wrappers_put_beside_the_state_is_kept(name: str) -> None:
    """As torch.optim keeps it: beside a parameter's state, of no parameter, in a group; in its own dtype."""
    layers = make_parameters()
    source = make(name, layers)
    train(source, layers, range(1))
    state = copy.deepcopy(source.state_dict())
    added = {
        "lookahead_slow_buff": torch.full((5, 7), 3.0),
        "quantised": torch.arange(9, dtype=torch.uint8),
        "history": [torch.ones(2), "words", (1, 2)],
        "ema": {"decay": 0.9, "shadow": torch.ones(5, 7, dtype=torch.float64)},
    }
    state["state"][0].update(added)
    state["state"]["counter of a wrapper"] = 7
    state["param_groups"][0].update(lookahead_k=6, swa_lr=0.1)
    parameters = make_parameters(torch.bfloat16)
    target = make(name, parameters)
    target.load_state_dict(state)
    kept = target.state[parameters["matrix"]]
    assert kept["history"].pop(1) == added["history"].pop(1) == "words"  # type: ignore[attr-defined]
    torch.testing.assert_close({key: kept[key] for key in added}, added, rtol=0, atol=0)
    assert target.state["counter of a wrapper"] == 7  # type: ignore[index]
    assert (target.param_groups[0]["lookahead_k"], target.param_groups[0]["swa_lr"]) == (6, 0.1)
    kept["history"][0].zero_()
    kept["ema"]["shadow"].zero_()
    assert torch.equal(added["history"][0], torch.ones(2))  # type: ignore[index]
    train(target, parameters, range(1))
    assert target.state_dict()["state"][0]["quantised"].dtype == torch.uint8


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["lamb", "lars", "novograd"])
def test_timms_lookahead_goes_on(timm_optim: Any, name: str, before: bool) -> None:
    """From its own state, and from the state of the optimizer alone."""
    runs = []
    for _ in range(2):
        layers = make_parameters()
        alone = make(name, layers)
        runs.append((layers, alone, timm_optim["lookahead"].Lookahead(alone, k=2)))
    (layers, alone, wrapped), (copies, _, again) = runs
    train(wrapped if before else alone, layers, range(3))
    with torch.no_grad():
        for layer, parameter in layers.items():
            copies[layer].copy_(parameter)
    state = copy.deepcopy(alone.state_dict())
    for key in () if before else ("lookahead_alpha", "lookahead_k", "lookahead_step"):
        del state["param_groups"][0][key]
    again.load_state_dict(state)
    for optimizer, parameters in ((wrapped, layers), (again, copies)):
        train(optimizer, parameters, range(3, 6))
    assert all(torch.equal(copies[layer], parameter) for layer, parameter in layers.items())
    assert "lookahead_slow_buff" in alone.state[layers["matrix"]]
    assert again.param_groups[0]["lookahead_k"] == 2


def test_state_of_a_wrapper_alone_is_no_state_yet() -> None:
    source = LAMB(parameters())
    source.state[source.param_groups[0]["params"][0]]["ema"] = torch.ones(4, 3)
    target = LAMB(parameters())
    target.load_state_dict(source.state_dict())
    stepped(target)
    assert target.state_dict()["state"][0]["step"] == 1


def test_none_is_no_state_yet() -> None:
    state = copy.deepcopy(stepped(LAMB(parameters())))
    state["state"] = dict.fromkeys(state["state"])
    target = LAMB(parameters())
    target.load_state_dict(state)
    assert not target.state
    assert stepped(target)["state"][0]["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": None}, "lacks the state exp_avg"),
        ({"exp_avg": 1.0}, r"exp_avg of parameter matrix has shape float instead of \(4, 3\)"),
        ({"exp_avg_sq": torch.ones(12)}, r"exp_avg_sq of parameter matrix has shape \(12,\) instead of \(4, 3\)"),
        ({"step": torch.ones(2)}, r"step of parameter matrix has shape \(2,\) instead of \(\)"),
        ({"step": "12"}, r"step of parameter matrix has shape 12 instead of \(\)"),
        ({"step": torch.zeros(())}, "matrix has step 0 and exp_avg and exp_avg_sq that are not zero"),
        ({"step": torch.tensor(-1.0)}, r"matrix: step must be the number of steps taken, a whole number, got -1\.0"),
        ({"step": float("nan")}, "matrix: step must be the number of steps taken, .* got nan"),
        ({"step": 2.5}, r"matrix: step must be the number of steps taken, .* got 2\.5"),
        ({"step": 0}, "matrix has step 0 and exp_avg and exp_avg_sq that are not zero"),
    ],
)
def test_damaged_state(change: dict[str, Any], message: str) -> None:
    state = copy.deepcopy(stepped(LAMB(parameters())))
    state["state"][0].update(change)
    for what in [what for what, value in change.items() if value is None]:
        del state["state"][0][what]
    target = LAMB(parameters())
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(state)
    assert not target.state


@pytest.mark.parametrize(
    "options",
    [
        {"lars_exclude": True},
        {"weight_decay_filter": len, "lars_adaptation_filter": len},
        {"always_adapt": True},
        {"amsgrad": True},
        {"dampening": 0.1},
    ],
)
def test_options_of_other_packages_that_nobody_would_read(options: dict[str, Any]) -> None:
    state = stepped(NovoGrad(parameters(), lr=0.1))
    state["param_groups"][0].update(dict.fromkeys(options))
    NovoGrad(parameters(), lr=0.1).load_state_dict(state)  # switched off, they choose nothing
    state["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=f"options of another optimizer: {', '.join(options)}"):
        NovoGrad(parameters(), lr=0.1).load_state_dict(state)


def test_state_is_kept_in_fp32_whatever_it_comes_in() -> None:
    state = copy.deepcopy(stepped(LAMB(parameters())))
    for of_parameter in state["state"].values():
        of_parameter["exp_avg"] = of_parameter["exp_avg"].bfloat16()
    target = LAMB(parameters())
    target.load_state_dict(state)
    assert {of_parameter["exp_avg"].dtype for of_parameter in target.state.values()} == {torch.float32}
