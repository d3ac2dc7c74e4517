"""What belongs to a measured step: wrappers that move weights, closures, exceptions, and steps that are left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.optim import PostLocalSGDOptimizer

from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_
from trustratio.optimizers import LAMB

from .test_layer_norms import assert_measured, give_gradients, make_model, step_of
from .test_proxies import PROXIES

# Wrappers -----------------------------------------------------------------------------------------------------------


def shrink(optimizer: Any) -> None:
    """What the wrappers here do besides: as Lookahead, they move the weights after the inner step."""
    while not hasattr(optimizer, "param_groups"):
        optimizer = optimizer.optimizer
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.5)


class Plain:
    """None of torch's."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        shrink(self.optimizer)
        return loss


class Borrowing(torch.optim.Optimizer):
    """Of torch's class, without its constructor, and so without hooks."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, {}

    step = Plain.step  # type: ignore[assignment]


class Genuine(torch.optim.Optimizer):
    """With groups and hooks of its own."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return Plain.step(self, closure)  # type: ignore[arg-type]


class Averager:
    def average_parameters(self, params: Any) -> None:
        shrink(self)

    param_groups: Any = None


def averaging(optimizer: Any) -> Any:
    """Torch's own, which averages parameters after the step."""
    averager: Any = Averager()
    averager.param_groups = optimizer.param_groups
    return PostLocalSGDOptimizer(optimizer, averager)


class Engine:
    """Takes the backward pass into its step."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def step(self, backward: Callable[[], None]) -> None:
        self.optimizer.zero_grad()
        backward()
        self.optimizer.step()


WRAPPERS = (Plain, Borrowing, Genuine, averaging)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("inner", [lambda one: one, *PROXIES])
def test_a_wrapper_that_moves_weights_is_measured_as_a_whole(wrap: Any, inner: Any) -> None:
    model = make_model()
    optimizer = wrap(inner(torch.optim.AdamW(model.parameters(), lr=0.1)))
    norms = LayerNorms(optimizer, model)
    for step in (1, 2):
        wanted = step_of(model, optimizer, step)
        assert norms.latest().step == step
        assert_measured(norms.latest(), wanted)
    norms.remove()
    step_of(model, optimizer)
    assert norms.latest().step == 2
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_around_one_that_moves_weights(wrap: Any) -> None:
    model = make_model()
    optimizer = wrap(wrap(torch.optim.SGD(model.parameters(), lr=0.1)))
    norms = LayerNorms(optimizer, model)
    wanted = step_of(model, optimizer)
    assert_measured(norms.latest(), wanted)


def test_parameters_of_a_wrapper_beside_those_inside() -> None:
    class Beside(torch.optim.SGD):
        def __init__(self, own: Any, others: Any):
            super().__init__(own, lr=0.1)
            self.optim = torch.optim.AdamW(others, lr=0.1)

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.optim.step()

    model = make_model()
    own, *others = model.parameters()
    optimizer = Beside([own], others)
    norms = LayerNorms(optimizer, model)
    wanted = step_of(model, optimizer)
    assert_measured(norms.latest(), wanted)


def test_one_of_torch_s_class_without_hooks() -> None:
    class Bare(Borrowing):
        def __init__(self, optimizer: Any):
            super().__init__(optimizer)
            self.base = vars(self).pop("optimizer")

        def step(self, closure: Any = None) -> Any:
            self.base.step(closure)
            shrink(self)

    model = make_model()
    optimizer = Bare(torch.optim.SGD(model.parameters(), lr=0.1))
    norms = LayerNorms(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = step_of(model, optimizer)
    assert_measured(norms.latest(), wanted)
    give_gradients(model)
    clip_grad_norm_(optimizer, 0.25, model=model)
    optimizer.step()
    assert norms.latest().clipped is True


def test_an_engine_whose_step_makes_the_gradients() -> None:
    model = make_model()
    engine = Engine(torch.optim.SGD(model.parameters(), lr=0.1))
    norms = LayerNorms(engine, model)

    class Stepping:
        def step(self) -> None:
            engine.step(lambda: give_gradients(model, 3))

    wanted = step_of(model, Stepping(), 3)
    assert_measured(norms.latest(), wanted)


def test_a_step_that_the_wrapper_leaves_out_does_not_count() -> None:
    class Skipping(Plain):
        skips = True

        def step(self, closure: Any = None) -> Any:
            return None if self.skips else super().step(closure)

    model = make_model()
    optimizer = Skipping(torch.optim.SGD(model.parameters(), lr=0.1))
    norms = LayerNorms(optimizer, model)
    step_of(model, optimizer)
    assert norms.latest().step == 0
    optimizer.skips = False
    wanted = step_of(model, optimizer)
    assert norms.latest().step == 1
    assert_measured(norms.latest(), wanted)


def test_a_schedule_may_watch_the_same_wrapper() -> None:
    model = make_model()
    optimizer = Borrowing(torch.optim.SGD(model.parameters(), lr=0.1))
    first = torch.optim.lr_scheduler.ConstantLR(optimizer)
    norms = LayerNorms(optimizer, model)
    second = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2):
            wanted = step_of(model, optimizer, step)
            first.step()
            second.step()
            assert norms.latest().step == step
            assert_measured(norms.latest(), wanted)


def test_a_wrapper_made_later_is_named() -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(inner, model)
    with pytest.warns(UserWarning, match="measures the steps of SGD, which Genuine takes.*give LayerNorms the Genuine"):
        step_of(model, Genuine(inner))
    assert norms.latest().step == 1


# Closures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_gradients_of_a_closure_that_the_step_drops(make: Any, by_name: bool) -> None:
    class Dropping(make):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.zero_grad()
            return loss

    model = make_model()
    optimizer = Dropping(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        give_gradients(model, 3)
        return torch.zeros(())

    if by_name:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)
    give_gradients(model, 3)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert norms.latest()[name].gradient == pytest.approx(p.grad.norm().item(), rel=1e-6)


def test_a_clip_in_a_closure() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)

    def closure() -> torch.Tensor:
        give_gradients(model)
        return clip_grad_norm_(optimizer, 0.25, model=model)

    optimizer.step(closure)
    assert norms.latest().clipped is True
    assert norms.latest().model.gradient == pytest.approx(0.25, rel=1e-5)  # type: ignore[union-attr]


# Exceptions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["closure", "callback", "every", "hook"])
@pytest.mark.parametrize("wrap", [lambda one: one, Plain])
def test_the_step_after_an_exception_is_measured(error: Any, where: str, wrap: Any) -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(inner)
    breaks = {"now": False}

    def may_break(at: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if breaks["now"] and at == where:
                raise error
            return True if at == "every" else None

        return call

    norms = LayerNorms(optimizer, model, every=may_break("every"))
    norms.on_measure(may_break("callback"))
    inner.register_step_pre_hook(may_break("hook"))

    def step(seed: int) -> Any:
        class Stepping:
            def step(self) -> None:
                optimizer.step(may_break("closure"))

        return step_of(model, Stepping(), seed)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0)
        breaks["now"] = True
        with pytest.raises(error):
            step(1)
        breaks["now"] = False
        taken = 2 + (where == "callback")
        for number in (taken, taken + 1):
            wanted = step(number)
            assert norms.latest().step == number
            assert_measured(norms.latest(), wanted)


# Steps that are left out, and clips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_step_that_gradscaler_leaves_out_does_not_count(every: int, fused: bool, unscaled: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    norms = LayerNorms(optimizer, model, every=every)
    measured: list[int] = []
    norms.on_measure(lambda one: measured.append(one.latest().step))
    taken = 0
    for overflows in (False, True, True, False, False, True, False, False, True, False):
        optimizer.zero_grad()
        (scaler.scale(model[0](torch.ones(3, 5)).sum()) * (float("inf") if overflows else 1.0)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        taken += not overflows
        assert norms.latest().step == taken // every * every
        assert norms.latest().model is None or norms.latest().model.update > 0
    assert measured == list(range(every, taken + 1, every))


@pytest.mark.parametrize("to_none", [False, True])
def test_a_clip_of_a_step_that_was_left_out_is_no_clip_of_the_next(to_none: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    model[0](torch.ones(3, 5)).sum().backward()
    clip_grad_norm_(optimizer, 1e-3, model=model)
    optimizer.zero_grad(set_to_none=to_none)  # and no step, as after an overflow
    model[0](torch.ones(3, 5)).sum().backward()
    optimizer.step()
    assert norms.latest().clipped is None


def test_a_clip_counts_for_a_step_that_is_taken_again() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    give_gradients(model)
    clip_grad_norm_(optimizer, 0.25, model=model)

    def stop(*_: Any) -> None:
        raise RuntimeError

    handle = optimizer.register_step_pre_hook(stop)
    with pytest.raises(RuntimeError):
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert norms.latest().clipped is True
    give_gradients(model)
    optimizer.step()
    assert norms.latest().clipped is None


CLIPS: dict[str, Callable[[Any, torch.nn.Module], Any]] = {
    "clips": lambda optimizer, model: clip_grad_norm_(optimizer, 0.25, model=model),
    "clips layers": lambda optimizer, model: clip_grad_norm_(optimizer, 0.1, per_layer=True, model=model),
    "clips rows": lambda optimizer, model: clip_grad_norm_(optimizer, 0.01, per_layer="rows", model=model),
    "clips nothing": lambda optimizer, model: clip_grad_norm_(optimizer, 1e4, model=model),
    "clips no layer": lambda optimizer, model: clip_grad_norm_(optimizer, 1e4, per_layer=True, model=model),
    "clips no row": lambda optimizer, model: clip_grad_norm_(optimizer, 1e4, per_layer="rows", model=model),
    "clips without model": lambda optimizer, model: clip_grad_norm_(optimizer, 0.25),
    "torch's": lambda optimizer, model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.125),
    "backward": lambda optimizer, model: add_gradients(model),
    "zeros": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "none": lambda optimizer, model: (optimizer.zero_grad(), give_gradients(model)),
    "step": lambda optimizer, model: (optimizer.step(), optimizer.zero_grad(set_to_none=False)),
}


def add_gradients(model: torch.nn.Module) -> None:
    """As another micro-batch does, in place."""
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 1


@pytest.mark.parametrize(
    ("calls", "clipped"),
    [
        (("clips", "clips nothing"), True),
        (("clips", "clips no layer"), True),
        (("clips layers", "clips nothing"), True),
        (("clips layers", "clips no row"), True),
        (("clips rows", "clips no layer", "clips nothing"), True),
        (("clips without model", "clips nothing"), True),
        (("clips nothing", "clips"), True),
        (("clips nothing", "clips no layer", "clips no row"), False),
        (("clips", "torch's"), None),
        (("clips", "torch's", "clips nothing"), None),  # what was changed may have been another step's
        (("clips", "backward", "clips nothing"), None),
        (("clips nothing", "backward", "clips"), True),
        (("clips", "none", "clips nothing"), False),
        (("clips", "zeros", "backward", "clips nothing"), None),
        (("clips", "step", "backward", "clips nothing"), False),
        (("clips", "step", "backward"), None),
        (("clips nothing", "step", "backward", "clips"), True),
    ],
)
def test_any_clip_of_a_step_counts(calls: tuple[str, ...], clipped: bool | None) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    give_gradients(model)
    for call in calls:
        CLIPS[call](optimizer, model)
    optimizer.step()
    assert norms.latest().clipped is clipped


@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_a_clip_counts_whichever_optimizer_of_a_wrapper_it_is_given(given: str) -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = Genuine(inner)
    norms = LayerNorms(wrapper if given == "inner" else inner, model)
    give_gradients(model)
    clip_grad_norm_(inner if given == "inner" else wrapper, 0.25, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the wrapper takes the steps of the one that is measured
        wrapper.step()
    assert norms.latest().clipped is True


def test_a_limit_of_our_optimizer_does_not_hide_a_clip_before() -> None:
    model = make_model()
    optimizer = LAMB(model.named_parameters(), lr=0.1, max_grad_norm=1e4)
    norms = LayerNorms(optimizer, model)
    for first, clipped in (("clips", True), ("none", False)):
        give_gradients(model)
        CLIPS[first](optimizer, model)
        optimizer.step()
        assert norms.latest().clipped is clipped


def test_every_may_be_set_later() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model, every=2)
    measured: list[int] = []
    norms.on_measure(lambda one: measured.append(one.latest().step))
    changes: dict[int, Any] = {5: 4, 9: lambda step: step > 10}
    for step in range(1, 13):
        norms.every = changes.get(step, norms.every)
        step_of(model, optimizer)
    assert measured == [2, 4, 8, 11, 12]
    for wrong in (0, True, 2.0, None):
        with pytest.raises(ValueError, match="every must be an integer of at least 1, got"):
            norms.every = wrong
    assert norms.every is changes[9]


def test_a_name_that_was_not_measured_is_told() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model, every=2)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(KeyError, match=r"'weight': no step was measured so far; see LayerNorms\(every=\)"):
        norms.latest()["weight"]
    optimizer.step()
    assert norms.latest()["weight"].ratio > 0
    with pytest.raises(
        KeyError, match=r"'module\.weight' is no layer that was measured.*have elements; the nearest is 'weight'"
    ):
        norms.latest()["module.weight"]
    assert norms.latest().get("module.weight") is None


def test_layers_without_elements_alone() -> None:
    model = torch.nn.ParameterList([torch.zeros(0, 3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    model[0].grad = torch.zeros(0, 3)
    assert clip_grad_norm_(optimizer, 1.0, model=model).item() == 0
    optimizer.step()
    assert (norms.latest().step, norms.latest().record()["layers"], norms.latest().model) == (1, {}, None)
    with pytest.raises(
        KeyError, match=r"'0' is no layer that was measured, as those are that are trained and have ele"
    ):
        norms.latest()["0"]
