"""Measured norms in one process: what is measured, of which layers, under which names, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trustratio.integrations.layer_norms import LayerNorms, MeasuredNorms, clip_grad_norm_
from trustratio.optimizers import LAMB, create_optimizer
from trustratio.optimizers.sharding import backends
from trustratio.optimizers.sharding.backends import Backend
from trustratio.optimizers.sharding.layout import LayoutError
from trustratio.optimizers.sharding.names import unwrapped_names

from .test_waiting import META, NothingFromTheHost


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Conv1d(3, 2, 2), torch.nn.LayerNorm(6)).to(dtype)


def give_gradients(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def step_of(model: torch.nn.Module, optimizer: Any, seed: int = 0) -> dict[str, tuple[torch.Tensor, ...]]:
    """Take a step; each parameter's weights before, gradient and change, in float64."""
    give_gradients(model, seed)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {n: (before[n], gradients[n], p.detach().double() - before[n]) for n, p in model.named_parameters()}


def assert_measured(found: MeasuredNorms, wanted: dict[str, tuple[torch.Tensor, ...]]) -> None:
    assert set(found) == set(wanted)
    whole = tuple(torch.cat([triple[i].reshape(-1) for triple in wanted.values()]) for i in range(3))
    for name, (w, g, change) in {**wanted, "": whole}.items():
        layer = found[name] if name else found.model
        assert layer is not None
        for which, values in (("weight", w), ("gradient", g), ("update", change)):
            assert getattr(layer, which) == pytest.approx(values.norm().item(), rel=2e-6)
            assert getattr(layer, f"{which}_rms") == pytest.approx(values.square().mean().sqrt().item(), rel=2e-6)
            assert getattr(layer, f"largest_{which}") == pytest.approx(values.abs().max().item(), rel=2e-6)
            assert getattr(layer, f"zero_{which}s") == pytest.approx((values == 0).double().mean().item())
        assert layer.ratio == pytest.approx((change.norm() / w.norm()).item(), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, LAMB])
def test_norms_are_of_what_really_changed(make: Callable[..., Any], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = make(model.parameters(), lr=0.02)
    norms = LayerNorms(optimizer, model)
    for step in range(3):
        wanted = step_of(model, optimizer, step)
        assert_measured(norms.latest(), wanted)
        assert norms.latest().step == step + 1


def test_updates_that_16_bits_lose_are_none() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1e-3, 0.0], dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    norms = LayerNorms(optimizer)
    weight.grad = torch.tensor([1.0, 1.0, 0.0], dtype=torch.bfloat16)
    optimizer.step()
    layer = norms.latest()["0.0"]
    assert layer.zero_updates == pytest.approx(2 / 3)
    assert layer.zero_weights == layer.zero_gradients == pytest.approx(1 / 3)
    assert layer.largest_update == pytest.approx(1e-3, rel=0.01)


def test_nothing_is_there_before_the_first_measured_step() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model, every=2)
    assert (dict(norms.latest()), norms.latest().step, norms.latest().model) == ({}, 0, None)
    step_of(model, optimizer)
    assert norms.latest().step == 0
    wanted = step_of(model, optimizer)
    assert_measured(norms.latest(), wanted)
    step_of(model, optimizer)
    assert norms.latest().step == 2


def test_layers_without_gradient_frozen_tied_and_empty() -> None:
    model = torch.nn.Module()
    model.used, model.unused = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    model.frozen = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    model.empty = torch.nn.ParameterList([torch.zeros(0, 3)])
    model.tied = model.used
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    model.used.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert list(norms.latest()) == ["used.weight", "unused.weight"]
    unused = norms.latest()["unused.weight"]
    assert (unused.gradient, unused.zero_gradients, unused.update, unused.ratio) == (0.0, 1.0, 0.0, 0.0)
    assert norms.latest()["used.weight"].gradient == pytest.approx(6**0.5)


def test_ratios_of_zeros_and_of_what_is_no_number() -> None:
    zeros, broken = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([zeros, broken], lr=0.1)
    norms = LayerNorms(optimizer)
    zeros.grad, broken.grad = torch.ones(2, 2), torch.tensor([1.0, float("nan"), float("inf")])
    optimizer.step()
    found = norms.latest()
    assert found["0.0"].ratio == float("inf")
    assert found["0.1"].gradient != found["0.1"].gradient
    assert found["0.1"].largest_gradient != found["0.1"].largest_gradient
    assert found.model is not None
    assert found.model.largest_gradient != found.model.largest_gradient


def test_a_closure_makes_the_gradient() -> None:
    model = make_model()
    for make in (torch.optim.SGD, torch.optim.LBFGS):
        optimizer = make(model.parameters(), lr=0.01)
        norms = LayerNorms(optimizer, model)

        def closure() -> torch.Tensor:
            give_gradients(model, 3)
            return torch.zeros(())

        give_gradients(model, 1)  # which is no more there when the step begins in earnest
        optimizer.step(closure)
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert norms.latest()[name].gradient == pytest.approx(p.grad.norm().item(), rel=1e-6)


def test_a_fused_optimizer_divides_by_the_loss_scale() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    norms = LayerNorms(optimizer, model)
    scaler.scale(torch.ones(()))  # which makes the scale
    give_gradients(model)
    wanted = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        assert p.grad is not None
        p.grad *= 64
    scaler.step(optimizer)
    for name, norm in wanted.items():
        assert norms.latest()[name].gradient == pytest.approx(norm, rel=1e-6)
    assert norms.latest().model.zero_gradients == 0.0  # type: ignore[union-attr]


def test_channels_last() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    assert_measured_after(model, optimizer, norms)


def assert_measured_after(model: torch.nn.Module, optimizer: Any, norms: LayerNorms) -> None:
    wanted = step_of(model, optimizer)
    assert_measured(norms.latest(), wanted)


# Steps, and who watches them ----------------------------------------------------------------------------------------


def test_callbacks_two_watchers_and_an_end() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one, other = LayerNorms(optimizer, model), LayerNorms(optimizer, model, every=2)
    seen: list[Any] = []
    one.on_measure(seen.append)
    for _ in range(2):
        step_of(model, optimizer)
    assert seen == [one, one]
    assert one.latest().record() == other.latest().record()
    one.remove()
    step_of(model, optimizer)
    assert len(seen) == one.latest().step == 2


def test_groups_that_come_later_and_loaded_state() -> None:
    model, more = make_model(), torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer)
    assert_measured_after(model, optimizer, norms)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_measured_after(model, optimizer, norms)
    optimizer.add_param_group({"params": more.parameters()})
    both = torch.nn.ModuleDict({"model": model, "more": more})
    wanted = step_of(both, optimizer)
    assert_measured(norms.latest(), wanted)


def test_parameters_that_change_their_shape() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    assert_measured_after(model, optimizer, norms)
    model[0].weight.data = torch.randn(6, 4)
    assert_measured_after(model, optimizer, norms)


class Chain:
    """As Megatron's ChainedOptimizer."""

    def __init__(self, *optimizers: Any):
        self.chained_optimizers = list(optimizers)


def test_a_chain_is_measured_as_one() -> None:
    model = make_model()
    one, *others = model.parameters()
    chain = Chain(torch.optim.SGD([one], lr=0.1), SimpleNamespace(optimizer=torch.optim.AdamW(others, lr=0.1)))
    norms = LayerNorms(chain, model)
    seen: list[int] = []
    norms.on_measure(lambda found: seen.append(len(found.latest())))

    def step() -> None:
        chain.chained_optimizers[0].step()
        chain.chained_optimizers[1].optimizer.step()

    for _ in range(2):
        wanted = step_of(model, SimpleNamespace(step=step))
        assert_measured(norms.latest(), wanted)
    assert seen == [6, 6]


def test_a_step_that_ends_in_the_middle_is_said() -> None:
    """Two groups that a wrapper steps one by one, and a backend that says so."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    assert_measured_after(model, optimizer, norms)
    observation = norms._observations[0]
    observation._kept.in_parts = True
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[0], "params": groups[0]["params"][:2]}]
    step_of(model, optimizer)
    with pytest.warns(UserWarning, match="step 2 of SGD was not measured"):
        step_of(model, optimizer)
    assert norms.latest().step == 1


def test_copies_and_pickles_of_the_optimizer() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    step_of(model, optimizer)
    pickle.loads(pickle.dumps(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    step_of(model, copied)
    assert norms.latest().step == 1


def test_the_model_is_not_kept_alive() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    step_of(model, optimizer)
    gone: list[int] = []
    torch.nn.Parameter.__del__ = lambda p: gone.append(1)  # type: ignore[attr-defined]
    try:
        del model, optimizer, norms
        gc.collect()
    finally:
        del torch.nn.Parameter.__del__  # type: ignore[attr-defined]
    assert len(gone) >= 6


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_a_measured_step_waits_for_nothing(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.empty(shape, device=META)) for shape in ((5, 7), (5,), (), (3, 2))]
    optimizer: Any = (
        torch.optim.SGD(parameters, lr=0.1, foreach=False)
        if name == "sgd"
        else create_optimizer(name, parameters, lr=0.1, implementation="eager")
    )
    norms = LayerNorms(optimizer)
    for step in range(4):
        for p in parameters[step % 2 :]:
            p.grad = torch.empty_like(p)
        if step < 2:
            optimizer.step()
        else:
            with NothingFromTheHost():
                optimizer.step()
        optimizer.zero_grad()
    with pytest.raises((NotImplementedError, RuntimeError)):
        norms.latest()


# Who clipped --------------------------------------------------------------------------------------------------------


def test_own_clipping_is_known() -> None:
    model = make_model()
    for limit, clipped in ((None, None), (1e6, False), (1e-3, True)):
        optimizer = LAMB(model.parameters(), lr=0.01, max_grad_norm=limit)
        norms = LayerNorms(optimizer, model)
        step_of(model, optimizer)
        assert norms.latest().clipped is clipped


# Names --------------------------------------------------------------------------------------------------------------


def test_names_of_the_unwrapped_model() -> None:
    given = ["module._orig_mod.layer.0._fsdp_wrapped_module.weight", "module._orig_mod.my_module.bias"]
    weight = torch.zeros(1)
    found = [name for name, _ in unwrapped_names((name, weight) for name in given)]
    assert found == ["layer.0.weight", "my_module.bias"]
    assert [name for name, _ in unwrapped_names([("module.a", weight), ("b", weight)])] == ["module.a", "b"]


def test_names_come_from_the_optimizer_or_from_living_modules() -> None:
    model = torch.compile(make_model(), backend="eager")
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    named = torch.optim.SGD([(f"module.{number}", p) for number, p in enumerate(model.parameters())], lr=0.1)
    ours = LAMB([(f"_orig_mod.own.{number}", p) for number, p in enumerate(model.parameters())], lr=0.1)
    wanted = {
        plain: [name.removeprefix("_orig_mod.") for name, _ in model.named_parameters()],
        named: [str(number) for number in range(6)],
        ours: [f"own.{number}" for number in range(6)],
    }
    for optimizer, names in wanted.items():
        norms = LayerNorms(optimizer)
        step_of(model, optimizer)
        assert list(norms.latest()) == names
        norms.remove()


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LayerNorms(object()), TypeError, r"got object$"),
        (lambda: LayerNorms(SimpleNamespace(optimizer=3)), TypeError, r"got int \(inside SimpleNamespace\)"),
        (lambda: LayerNorms(Chain()), TypeError, "got Chain"),
        (lambda: LayerNorms(torch.optim.SGD([torch.zeros(1)], lr=1.0), every=0), ValueError, "at least 1, got 0"),
        (lambda: LayerNorms(torch.optim.SGD([torch.zeros(1)], lr=1.0), every=True), ValueError, "got True"),
        (lambda: LayerNorms(torch.optim.SGD([torch.zeros(1)], lr=1.0), [1]), TypeError, "model must be a .*got list"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_complex_parameters_are_refused_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"0\.weight is of dtype torch\.complex64"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert norms.latest().step == 0


def test_another_optimizer_that_steps_the_parameters_is_named() -> None:
    model, other = make_model(), make_model()
    given, stepped = torch.optim.AdamW(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(given, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(other, torch.optim.SGD(other.parameters(), lr=0.1))  # of another model
    with pytest.warns(UserWarning, match="was given AdamW, but SGD steps its parameters"):
        step_of(model, stepped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(model, stepped)  # said once
        step_of(model, given)
    assert norms.latest().step == 1


def test_a_step_that_takes_its_parent_s_is_one_step() -> None:
    """Torch calls the hooks of both, once the parent's class has been used by itself."""
    model = make_model()
    torch.optim.SGD(model.parameters())

    class Shrinking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.5)
            return loss

    optimizer = Shrinking(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2, 3):
            wanted = step_of(model, optimizer, step)
            assert norms.latest().step == step
            assert_measured(norms.latest(), wanted)


def test_an_optimizer_within_the_measured_one_has_not_taken_its_place() -> None:
    model = make_model()

    class Outer(torch.optim.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {"lr": 0.1})
            self.inside = torch.optim.SGD(self.param_groups, lr=0.1)

        def step(self, closure: Any = None) -> None:
            self.inside.step()

    optimizer = Outer(model.parameters())
    norms = LayerNorms(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = step_of(model, optimizer)
    assert_measured(norms.latest(), wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_that_the_optimizer_does_not_train(shared: bool) -> None:
    trained, other = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    model = trained[0] if shared else other
    lacks = r"the model that was given lacks \d of the 4 parameters that SGD steps, of shape \([23], 2\)"
    LayerNorms(optimizer, model)
    give_gradients(trained)
    for attempt in (optimizer.step, lambda: clip_grad_norm_(optimizer, 1.0, model=model)):
        with pytest.raises(LayoutError, match=lacks + ".*give the model that the optimizer trains") as caught:
            attempt()
        assert "trust ratio" not in str(caught.value)
        assert "constructor" not in str(caught.value)


def test_what_was_removed_holds_neither_model_nor_hooks() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    norms.on_measure(lambda found, model=model: model.zero_grad())  # type: ignore[misc]
    step_of(model, optimizer)
    norms.remove()
    norms.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    weights, kept = weakref.ref(model[0].weight), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert (weights(), kept()) == (None, None)
    assert norms.latest().step == 1


def test_nothing_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"needs a torch.optim.Optimizer, or a wrapper .* got NoneType"):
        LayerNorms(None)


def test_watching_for_replacement_asks_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may look at different moments: whatever explains a layout communicates, and would wait for ever."""
    asked = []

    class Explaining(Backend):
        def explain(self, optimizer: Any, tensors: Any) -> None:
            asked.append(optimizer)

    monkeypatch.setattr(backends, "_known", replace(backends._known, registered=[Explaining()]))
    model = torch.nn.Linear(2, 2)
    norms = LayerNorms(torch.optim.AdamW(model.parameters()), model)
    flat = torch.ones(3, requires_grad=True)  # as a wrapper makes, of which no module knows
    flat.grad = torch.ones(3)
    torch.optim.SGD([flat], lr=0.1).step()
    norms.remove()
    assert not asked


def test_what_is_measured_lives_no_longer_for_it() -> None:
    model = torch.nn.Linear(2, 2)
    norms = LayerNorms(torch.optim.AdamW(model.parameters()), model)
    weights = weakref.ref(model.weight)
    del model, norms
    gc.collect()
    assert weights() is None
