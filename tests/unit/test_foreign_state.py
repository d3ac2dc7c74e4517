"""`load_state_dict` refuses what does not belong to the optimizer, and nothing of it is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LANS, LARS, NovoGrad, create_optimizer

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
    with pytest.raises(ValueError, match=r"matrix has the state exp_avg, exp_avg_sq instead of .*, step"):
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
