"""torch.optim's contract: each row is a behaviour that torch.optim.AdamW has, and so has every optimizer here."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trustratio.optimizers import OPTIMIZERS, TrustRatio

from .test_generic import OWN_OPTIONS

Tensor = torch.Tensor
Make = Callable[..., torch.optim.Optimizer]
SHAPES = {"matrix": (4, 3), "bias": (4,), "other": (2, 3)}

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*")

ROWS: list[Callable[[Make], None]] = []


def row(check: Callable[[Make], None]) -> Callable[[Make], None]:
    """Make a check a row of the table. It is given what constructs the optimizer, with a small rate if none is said."""
    ROWS.append(check)
    return check


NOT_ADAMW = ("a_copy_is_made_of_class_and_defaults",)
"""AdamW has an option that its constructor does not take; SGD and others of torch have not."""

OF_THE_BASE = ("a_copy_is_made_of_class_and_defaults", "the_representation_names_class_and_options")
"""What `TrustRatio` does otherwise: its class needs another one, and it names that."""


@pytest.mark.parametrize("name", ["adamw", "trust_ratio:SGD", "trust_ratio:AdamW", *OPTIMIZERS])
@pytest.mark.parametrize("check", ROWS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Make], None], name: str) -> None:
    if name.startswith("trust_ratio") and check.__name__ in OF_THE_BASE:
        return
    check(torch.optim.SGD if name == "adamw" and check.__name__ in NOT_ADAMW else class_of(name))


def class_of(name: str) -> Any:
    if name.startswith("trust_ratio"):
        return partial(TrustRatio, getattr(torch.optim, name.partition(":")[2]))
    if name in OWN_OPTIONS:
        return partial(OPTIMIZERS[name].optimizer_class, **OWN_OPTIONS[name])
    return torch.optim.AdamW if name == "adamw" else OPTIMIZERS[name].optimizer_class


def weights() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def loss_of(layers: dict[str, Any], step: int, sign: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    gradients = {name: sign * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    trained = [name for name in SHAPES if name in layers and layers[name].requires_grad]
    return sum(((layers[name] * gradients[name]).sum() for name in trained), torch.zeros(()))


def backward(layers: dict[str, Any], step: int, sign: float = 1.0) -> Tensor:
    loss = loss_of(layers, step, sign)
    loss.backward()
    return loss


def train(optimizer: Any, layers: dict[str, Any], *steps: int, sign: float = 1.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(layers, step, sign)
        optimizer.step()


def values(layers: dict[str, Any]) -> dict[str, Tensor]:
    return {name: layer.detach().clone() for name, layer in layers.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# Construction -------------------------------------------------------------------------------------------------------


@row
def every_form_of_parameters(make: Make) -> None:
    forms: list[Callable[[dict[str, Any]], Any]] = [
        lambda layers: list(layers.values()),
        lambda layers: tuple(layers.values()),
        lambda layers: layers.values(),
        lambda layers: (layer for layer in layers.values()),
        lambda layers: layers.items(),
        lambda layers: ((name, layer) for name, layer in layers.items()),
        lambda layers: [{"params": list(layers.values())}],
        lambda layers: [{"params": layer} for layer in layers.values()],
        lambda layers: ({"params": (pair for pair in [pair])} for pair in layers.items()),
        lambda layers: [{"params": [layers["matrix"]]}, {"params": []}, {"params": [layers["bias"], layers["other"]]}],
    ]
    results = []
    for form in forms:
        layers = weights()
        train(make(form(layers), lr=0.1), layers, 0, 1)
        results.append(values(layers))
    for result in results[1:]:
        for name in SHAPES:
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-6, atol=1e-7)


@row
def what_is_no_list_of_parameters_is_refused(make: Make) -> None:
    layers = weights()
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        make(layers["matrix"], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], lr=0.1)
    with pytest.raises(TypeError, match="ordered collections"):
        make([{"params": set(layers.values())}], lr=0.1)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make(["matrix"], lr=0.1)
    with pytest.raises(ValueError, match="non-leaf"):
        make([layers["matrix"] * 2], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [layers["matrix"]]}, {"params": [layers["matrix"]]}], lr=0.1)
    with pytest.raises(ValueError, match="with/without names"):
        make([{"params": [("matrix", layers["matrix"])]}, {"params": [layers["bias"]]}], lr=0.1)
    with pytest.raises(TypeError, match="lerning_rate"):
        make(layers.values(), lerning_rate=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make([layers["matrix"], layers["matrix"]], lr=0.1)


@row
def lr_may_come_from_the_groups_alone(make: Make) -> None:
    one, other = weights(), weights()
    train(make([{"params": [layer], "lr": 0.05} for layer in one.values()]), one, 0)
    train(make(other.values(), lr=0.05), other, 0)
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


@row
def a_copy_is_made_of_class_and_defaults(make: Make) -> None:
    layers = weights()
    optimizer = make(layers.values(), lr=0.05, weight_decay=0.1)
    for source in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other = type(source)(layers.values(), **source.defaults)
        assert {**other.defaults, "differentiable": False} == {**source.defaults, "differentiable": False}
        changed = type(source)(layers.values(), **{**source.defaults, "lr": 0.5, "maximize": True})
        assert (changed.param_groups[0]["lr"], changed.param_groups[0]["maximize"]) == (0.5, True)


@row
def groups_of_another_optimizer_of_the_class(make: Make) -> None:
    """With what schedulers and steps have put into them."""
    layers, expected = weights(), weights()
    old = make(layers.items(), lr=0.05)
    lr_scheduler.OneCycleLR(old, 0.1, total_steps=9, cycle_momentum=has_momentum(old))
    train(old, layers, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = make([{**group, "lr": 0.05} for group in old.param_groups])
    for name, layer in expected.items():
        layer.data.copy_(layers[name])
    written = {key: new.param_groups[0][key] for key in ("betas", "momentum") if key in new.param_groups[0]}
    train(new, layers, 1)
    train(make(expected.values(), lr=0.05, **written), expected, 1)
    assert same(values(layers), values(expected))


def has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    group = optimizer.param_groups[0]
    return bool(group["betas"][0] if "betas" in group else group.get("momentum"))


# Groups while training ----------------------------------------------------------------------------------------------


@row
def a_group_that_comes_later(make: Make) -> None:
    layers = weights()
    optimizer = make([layers["matrix"], layers["bias"]], lr=0.05)
    train(optimizer, layers, 0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": layers["bias"]})
    assert len(optimizer.param_groups) == 1
    before = values(layers)
    optimizer.add_param_group({"params": layers["other"], "lr": 0.01})
    train(optimizer, layers, 1, 2)
    assert not any(torch.equal(before[name], layers[name]) for name in SHAPES)


@row
def a_parameter_that_moves_to_another_group(make: Make) -> None:
    layers = weights()
    groups = [{"params": [layers["matrix"], layers["bias"]]}, {"params": [layers["other"]], "lr": 0.0}]
    optimizer = make(groups, lr=0.1)
    for group in optimizer.param_groups:  # in some forms it holds the rate of earlier steps
        group.update(momentum=0.0) if "momentum" in group else None
    train(optimizer, layers, 0)
    before = values(layers)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())  # in the same order as before
    train(optimizer, layers, 1)
    assert not torch.equal(layers["matrix"], before["matrix"])
    assert torch.equal(layers["bias"], before["bias"])


@row
def freezing_and_thawing(make: Make) -> None:
    layers, without = weights(), weights()
    optimizer = make(layers.values(), lr=0.05)
    train(optimizer, layers, 0)
    state = copy.deepcopy(optimizer.state_dict()["state"][1])
    layers["bias"].requires_grad_(False)
    before = values(layers)
    train(optimizer, layers, 1, 2)
    assert torch.equal(layers["bias"], before["bias"])
    assert_equal(optimizer.state_dict()["state"][1], state)
    layers["bias"].requires_grad_(True)
    train(optimizer, layers, 3)
    assert not torch.equal(layers["bias"], before["bias"])
    # As if it had never been there in between; so for every layer, since each has its own state.
    if type(optimizer).__name__ != "SNGM":  # whose norm is the whole model's
        other = make(without.values(), lr=0.05)
        for step, names in ((0, SHAPES), (1, ("matrix", "other")), (2, ("matrix", "other")), (3, SHAPES)):
            train(other, {name: without[name] for name in names}, step)
        for name in SHAPES:
            torch.testing.assert_close(layers[name], without[name], rtol=1e-6, atol=1e-7)


class Packed(torch.Tensor):
    """A tensor subclass, as quantised weights are."""


@row
def frozen_parameters_of_any_kind(make: Make) -> None:
    frozen = {
        "packed": torch.zeros(3, 2, dtype=torch.uint8),
        "int8": torch.zeros(3, 2, dtype=torch.int8),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "bool": torch.zeros(3, dtype=torch.bool),
        "meta": torch.zeros(3, 2, device="meta"),
        "subclass": torch.ones(3, 2).as_subclass(Packed),
        "half": torch.ones(3, 2, dtype=torch.float16),
    }
    with torch.inference_mode():
        frozen["inference"] = torch.ones(2, 2)
    layers, alone = weights(), weights()
    extra = {name: torch.nn.Parameter(value, requires_grad=False) for name, value in frozen.items()}
    optimizer = make({**extra, **layers}.items(), lr=0.05)
    train(optimizer, layers, 0, 1)
    train(make(alone.values(), lr=0.05), alone, 0, 1)
    assert same(values(layers), values(alone))
    assert not any(optimizer.state.get(p) for p in extra.values())
    make([*layers.values(), *extra.values()], lr=0.05).load_state_dict(
        make([*layers.values(), *extra.values()], lr=0.05).state_dict()
    )


@row
def parameters_without_elements(make: Make) -> None:
    shapes = ((0, 3), (3, 0), (0,), (2, 0, 3))
    empty = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    layers, alone = weights(), weights()
    optimizer = make([*empty, *layers.values()], lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        sum((p.sum() for p in empty), torch.zeros(())).backward()
        backward(layers, step)
        optimizer.step()
    train(make(alone.values(), lr=0.05), alone, 0, 1)
    assert same(values(layers), values(alone))
    only = make(empty, lr=0.05)
    empty[0].grad = torch.zeros(0, 3)
    only.step()
    only.load_state_dict(only.state_dict())


# Saving -------------------------------------------------------------------------------------------------------------


@row
def deepcopy_pickle_and_state_dict_in_the_middle(make: Make) -> None:
    layers = weights()
    optimizer = make(layers.values(), lr=0.05)
    optimizer.register_step_post_hook(note)
    optimizer.param_groups[0]["note"] = "mine"
    train(optimizer, layers, 0, 1)
    optimizer.zero_grad()
    pair = layers, optimizer
    copies = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = {name: torch.nn.Parameter(value) for name, value in values(layers).items()}
    other = make(resumed.values(), lr=9.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, layers, 2, 3)
    for copied, another in (*copies, (resumed, other)):
        train(another, copied, 2, 3)
        assert same(values(layers), values(copied))
        assert another.param_groups[0]["note"] == "mine"
        assert_equal(another.state_dict()["state"], optimizer.state_dict()["state"])


def note(*_: Any) -> None:
    """A hook that can be pickled."""


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@row
def hooks_of_state_dicts(make: Make) -> None:
    calls: list[str] = []
    layers = weights()
    optimizer = make(layers.values(), lr=0.05)
    train(optimizer, layers, 0)
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {key: value for key, value in state.items() if key != "mine"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after loading"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["before saving", "after loading"]


@row
def the_representation_names_class_and_options(make: Make) -> None:
    optimizer = make(weights().values(), lr=0.125)
    assert repr(optimizer).startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    assert "lr: 0.125" in repr(optimizer)
    assert "weight_decay: " in repr(optimizer)


# The step -----------------------------------------------------------------------------------------------------------


@row
def maximize(make: Make) -> None:
    up, down = weights(), weights()
    options = {"lr": 0.05, "weight_decay": 0.1}
    rising = make([{"params": up["matrix"], "maximize": True}, {"params": [up["bias"], up["other"]]}], **options)
    falling = make([{"params": down["matrix"]}, {"params": [down["bias"], down["other"]]}], **options)
    for step in range(3):
        for optimizer, layers, sign in ((rising, up, 1.0), (falling, down, -1.0)):
            optimizer.zero_grad()
            backward({"matrix": layers["matrix"]}, step, sign)
            backward({name: layers[name] for name in ("bias", "other")}, step)
            gradients = [p.grad.clone() for p in layers.values()]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(layers.values(), gradients, strict=True))
    for name in SHAPES:
        torch.testing.assert_close(up[name], down[name], rtol=1e-6, atol=1e-7)


@row
def zero_grad_in_both_forms(make: Make) -> None:
    layers, other = weights(), weights()
    optimizer = make(layers.values(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        assert step == 0 or all(p.grad is not None and not p.grad.any() for p in layers.values())
        backward(layers, step)
        optimizer.step()
    train(make(other.values(), lr=0.05), other, 0, 1, 2)
    assert same(values(layers), values(other))


@row
def hooks_of_steps(make: Make) -> None:
    calls: list[str] = []
    layers = weights()
    optimizer = make(layers.values(), lr=0.05)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        train(optimizer, layers, 0)
        assert sorted(calls[:2]) == ["all before", "before"]
        assert sorted(calls[2:]) == ["after", "all after"]
    finally:
        for handle in handles:
            handle.remove()
    train(optimizer, layers, 1)
    assert len(calls) == 4


@row
def closures(make: Make) -> None:
    layers, other = weights(), weights()
    optimizer = make(layers.values(), lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        return backward(layers, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    torch.testing.assert_close(loss, backward(weights(), 0))
    train(make(other.values(), lr=0.05), other, 0)
    assert same(values(layers), values(other))
    assert optimizer.step() is None


@row
def an_optimizer_per_parameter_in_backward(make: Make) -> None:
    layers, other = weights(), weights()
    of_layer = {layer: make([layer], lr=0.05) for layer in layers.values()}

    def step(layer: Tensor) -> None:
        of_layer[layer].step()
        of_layer[layer].zero_grad()

    for layer in layers.values():
        layer.register_post_accumulate_grad_hook(step)
    for number in range(3):
        backward(layers, number)
    assert all(layer.grad is None for layer in layers.values())
    several = [make([layer], lr=0.05) for layer in other.values()]
    for number in range(3):
        backward(other, number)
        for optimizer in several:
            optimizer.step()
            optimizer.zero_grad()
    assert same(values(layers), values(other))


@row
def a_grad_scaler(make: Make) -> None:
    layers, other = weights(), weights()
    optimizer = make(layers.values(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(layers, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(make(other.values(), lr=0.05), other, 0, 1, 2)
    for name in SHAPES:
        torch.testing.assert_close(layers[name], other[name], rtol=1e-5, atol=1e-6)


@row
def averaged_models(make: Make) -> None:
    model = torch.nn.Linear(3, 4)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = make(model.parameters(), lr=0.05)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert all(p.isfinite().all() for p in averaged.parameters())
