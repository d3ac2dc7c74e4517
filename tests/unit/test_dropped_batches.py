"""What a batch leaves behind that never became a step: nothing, however it was dropped; and what changes gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trustratio.optimizers import CLARS, LAMB, VRLAMB, VRSGD, StatisticsError
from trustratio.optimizers.gradient_statistics.probes import PROBES, probes
from trustratio.optimizers.gradient_statistics.verdict import Verdict
from trustratio.optimizers.noise_scale import gradient_noise

SPECS = {"clars": CLARS, "vrsgd": VRSGD, "vrlamb": VRLAMB}


@pytest.fixture(autouse=True)
def _few_groups_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*group.* of samples per step")
        yield


def make(name: str = "clars", dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Sequential, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).to(dtype)
    if name == "collect":
        optimizer = LAMB(model.named_parameters(), lr=0.05)
        optimizer.collect_group_norms()
        return model, optimizer
    return model, SPECS[name](model.named_parameters(), lr=0.05)


def loss_of(model: torch.nn.Module, number: int, factor: float = 1.0) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
    return factor * model(x).square().mean() / 2


def batch(model: torch.nn.Module, number: int, factor: float = 1.0) -> None:
    """Two micro-batches."""
    for micro in range(2):
        loss_of(model, 10 * number + micro, factor).backward()


def result(model: torch.nn.Module, optimizer: Any) -> tuple[list[torch.Tensor], Any]:
    return [p.detach().clone() for p in model.parameters()], optimizer.statistics.norms()


def undisturbed(name: str, steps: int = 2) -> tuple[list[torch.Tensor], Any]:
    model, optimizer = make(name)
    for step in range(steps):
        batch(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


def assert_undisturbed(model: torch.nn.Module, optimizer: Any, name: str) -> None:
    weights, norms = undisturbed(name)
    found = result(model, optimizer)
    assert all(map(torch.equal, found[0], weights))
    assert found[1] == norms


# Dropping -----------------------------------------------------------------------------------------------------------


def by_parameters(model: torch.nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def by_other_zeros(model: torch.nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


DROPS: dict[str, Callable[[torch.nn.Module, Any], None]] = {
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "grad = None": by_parameters,
    "grad = zeros": by_other_zeros,
}


@pytest.mark.parametrize("factor", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("name", ["clars", "vrsgd", "vrlamb", "collect"])
def test_a_dropped_batch_leaves_nothing(name: str, drop: str, factor: float) -> None:
    model, optimizer = make(name)
    for step in range(2):
        batch(model, 90 + step, factor)
        DROPS[drop](model, optimizer)
        batch(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert_undisturbed(model, optimizer, name)


@pytest.mark.parametrize("drop", DROPS)
def test_accumulation_that_is_interrupted(drop: str) -> None:
    model, optimizer = make()
    for step in range(2):
        loss_of(model, 90, float("nan") if step else 1.0).backward()
        DROPS[drop](model, optimizer)
        loss_of(model, 91).backward()
        DROPS[drop](model, optimizer)
        batch(model, step)
        optimizer.step()
        model.zero_grad()
    assert_undisturbed(model, optimizer, "clars")


@pytest.mark.parametrize("drop", ["model.zero_grad", "model.zero_grad in place"])
def test_a_layer_that_only_the_dropped_batch_used(drop: str) -> None:
    model, optimizer = make("vrsgd")
    branch = torch.nn.Linear(5, 5)
    optimizer.add_param_group({"params": list(branch.named_parameters("branch"))})
    whole = torch.nn.ModuleList([model, branch])
    before = branch.weight.detach().clone()
    branch(model(torch.ones(2, 6))).sum().mul(float("nan")).backward()
    DROPS[drop](whole, optimizer)
    batch(model, 0)
    optimizer.step()
    assert torch.equal(branch.weight, before)
    assert not torch.equal(model[0].weight, make()[0][0].weight)


def test_gradients_that_are_only_returned_do_not_count() -> None:
    for name in SPECS:
        model, optimizer = make(name)
        for step in range(2):
            torch.autograd.grad(loss_of(model, 90), list(model.parameters()))
            loss_of(model, 10 * step).backward()
            gradient = torch.autograd.grad(loss_of(model, 91), model[0].weight, create_graph=True)[0]
            assert gradient.requires_grad
            loss_of(model, 10 * step + 1).backward()
            torch.autograd.grad(loss_of(model, 92), model[2].weight)
            optimizer.step()
            optimizer.zero_grad()
        assert_undisturbed(model, optimizer, name)


def test_a_backward_pass_for_evaluation_between_steps() -> None:
    model, optimizer = make()
    for step in range(2):
        loss_of(model, 90).backward(inputs=list(model.parameters()))
        model.zero_grad()
        batch(model, step)
        optimizer.step()
        model.zero_grad()
    assert_undisturbed(model, optimizer, "clars")


def test_a_graph_that_is_used_twice_makes_two_groups() -> None:
    model, optimizer = make()
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert {n.groups for n in optimizer.statistics.norms().values()} == {2}
    assert gradient_noise(optimizer).model.noise == pytest.approx(0.0, abs=1e-9)


def test_a_closure_that_is_called_twice() -> None:
    for drop in ("model.zero_grad", "optimizer.zero_grad in place"):
        model, optimizer = make()

        def closure(model: Any, optimizer: Any, drop: str, step: int) -> None:
            for number in (90, step):
                DROPS[drop](model, optimizer)
                batch(model, number)

        for step in range(2):
            optimizer.step(partial(closure, model, optimizer, drop, step))
        assert_undisturbed(model, optimizer, "clars")


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.requires_grad_()
            for layer in self:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    model, optimizer = make("vrsgd")
    through = Checkpointed(*model)
    for step in range(2):
        batch(through, 90)
        model.zero_grad(set_to_none=bool(step))
        batch(through, step)
        optimizer.step()
        model.zero_grad(set_to_none=not step)
    assert_undisturbed(model, optimizer, "vrsgd")


# GradScaler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("name", ["clars", "vrsgd", "collect"])
def test_statistics_are_without_the_loss_scale(name: str, clip: float | None, unscaled: bool) -> None:
    """It changes between the steps, one of which the scaler skips; what zeroes gradients is the model."""
    model, optimizer = make(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for step, broken in ((0, False), (0, True), (1, False)):
        for micro in range(2):
            loss = loss_of(model, 10 * step + micro, float("inf") if broken else 1.0)
            scaler.scale(loss).backward()
        if unscaled or clip is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    if clip is None:
        weights, norms = undisturbed(name)
        for found, wanted in zip(result(model, optimizer)[0], weights, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    else:
        plain, reference = make(name)
        for step in range(2):
            batch(plain, step)
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            reference.step()
            reference.zero_grad()
        norms = reference.statistics.norms()
    for layer, of_layer in optimizer.statistics.norms().items():
        wanted_norms = vars(norms[layer])
        for key, value in vars(of_layer).items():
            assert value == pytest.approx(wanted_norms[key], rel=1e-5), (layer, key)


# What happens to gradients between backward and step ----------------------------------------------------------------


def norm_of_gradient(model: torch.nn.Module) -> float:
    gradients = [p.grad.double().reshape(-1) for p in model.parameters() if p.grad is not None]
    return float(torch.cat(gradients).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("clip", [None, 0.99, 0.9, 1e-3])
def test_a_small_clip_is_seen_in_every_dtype_and_none_is_exactly_none(dtype: torch.dtype, clip: float | None) -> None:
    model, optimizer = make("collect", dtype)
    for step in range(4):
        batch(model, step)
        if clip is not None:
            before = norm_of_gradient(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip * before)
            wanted = norm_of_gradient(model) / before  # the factor has the gradient's dtype too
        optimizer.step()
        optimizer.zero_grad()
        factor = optimizer.statistics.norm_table()[1][4].unique().tolist()
        if clip is None:
            assert factor == [1.0]
        else:
            assert factor == [pytest.approx(wanted, rel=1e-3 if dtype.itemsize == 2 else 1e-6)]


def clip_value(model: torch.nn.Module) -> None:
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.02)


def mask(model: Any) -> None:
    model[0].weight.grad[:4] = 0


def one_layer(model: Any) -> None:
    model[2].weight.grad *= 1.5


def other_batch(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)


def by_data(model: torch.nn.Module) -> None:
    """Old programs' way of zeroing, which leaves no trace on the gradient; then another batch."""
    for parameter in model.parameters():
        parameter.grad.data.zero_()  # type: ignore[union-attr]
    batch(model, 5)


@pytest.mark.parametrize("change", [clip_value, mask, one_layer, other_batch, by_data])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clars", "vrsgd"])
def test_what_is_no_factor_is_refused(name: str, dtype: torch.dtype, change: Any) -> None:
    model, optimizer = make(name, dtype)
    batch(model, 0)
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        StatisticsError,
        match=r"(the gradient of|a gradient among those of) .* was changed between backward\(\) and step\(\)",
    ):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    batch(model, 0)
    optimizer.step()
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("name", ["clars", "vrsgd"])
def test_numbers_below_the_normal_ones_round_to_more_than_their_resolution(name: str) -> None:
    """As those of keys' biases, which would be zero but for rounding, when ranks are averaged in fp16."""
    usual, tiny = (torch.nn.Parameter(torch.ones(64, dtype=torch.float16)) for _ in range(2))
    optimizer = SPECS[name]([("usual", usual), ("tiny", tiny)], lr=0.1)
    numbers = torch.tensor([3, -1, -1, -1], dtype=torch.float16).repeat_interleave(4).repeat(4) * 2.0**-24
    for _ in range(7):
        ((usual * 0.25).sum() + (tiny * numbers).sum()).backward()
    with torch.no_grad():
        for parameter in (usual, tiny):
            assert parameter.grad is not None
            parameter.grad /= 2  # of what is odd, it is rounded
    optimizer.step()
    assert optimizer.statistics.norms()["usual"].mean_norm == pytest.approx(14.0)  # as before a clipping


def test_layers_whose_gradient_is_taken_away_take_no_part() -> None:
    model, optimizer = make()
    batch(model, 0)
    model[0].weight.grad = None
    model[2].weight.grad.zero_()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)] == [True, False, True, False]


def test_probes_of_parts_add_up() -> None:
    gradient = torch.randn(7, 3, 10, dtype=torch.float64)
    whole = probes(gradient)
    assert whole.shape == (PROBES,)
    torch.testing.assert_close(probes(gradient[:3]) + probes(gradient[3:], first_row=3), whole)
    columns = probes(gradient[..., :3]) + probes(gradient[..., 3:], first_column=3)
    torch.testing.assert_close(columns, whole)
    torch.testing.assert_close(probes(gradient[:, :1]) + probes(gradient[:, 1:]), whole)
    even = torch.randn(6, 8, dtype=torch.float64)
    torch.testing.assert_close(probes(even), probes(even[:5]) + probes(even[5:], first_row=5))
    torch.testing.assert_close(probes(even.t().contiguous().t()), probes(even))
    for shape in ((), (1,), (5,), (8,)):
        assert probes(torch.ones(shape)).sum() == max(1, sum(shape))


def test_on_a_gpu_the_error_comes_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device, which is not the current one."""
    events: list[str] = []
    event = SimpleNamespace(record=events.append, synchronize=lambda: events.append("synchronize"))
    monkeypatch.setattr(torch, "Event", lambda kind: event)
    monkeypatch.setattr("torch.accelerator.current_stream", lambda device: f"stream of {device.index}")
    verdict = Verdict()
    for wrong, which in (([False, False], ""), ([False, True], "the gradient of b"), ([True] * 2, "a .* of a; b")):
        on_host = torch.tensor([[False, False], wrong])
        on_device: Any = SimpleNamespace(device=torch.device("cuda", 1), to=lambda *_, wait=on_host, **__: wait)
        verdict.give(on_device, ["a", "b"], "CLARS")
        if which:
            with pytest.raises(StatisticsError, match=f"CLARS: {which} was changed"):
                verdict.raise_for_last_step()
        verdict.raise_for_last_step()
    assert events == ["stream of 1", "synchronize"] * 3
