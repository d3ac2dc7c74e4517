"""bf16 weights that nobody keeps in fp32: what each master makes of small updates, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from trustratio.optimizers import LAMB, LARS, OPTIMIZERS, TrustRatio, create_optimizer

from .test_generic import OWN_OPTIONS, backward, make, make_gradients, make_parameters, train, values

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*", "ignore:.*did not move in this step"
)

IMPLEMENTATIONS = [None, "eager"]
MASTERS = ["stochastic", "kahan"]
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def summed(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> torch.Tensor:
    return p.detach().double() + optimizer.state[p]["compensation"].double()


# Kahan --------------------------------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("steps", [1, 100])
def test_parameter_and_compensation_follow_fp32_weights(implementation: str | None, steps: int) -> None:
    """Each step rounds the sum to half a unit of the compensation's last place, which is 2^-18 of the weight."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 50, generator=generator).bfloat16()
    p, master = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = {"lr": 1e-4, "adapt": False, "weight_decay": 0.0, "implementation": implementation}
    optimizer, exact = LAMB([p], master="kahan", **options), LAMB([master], **options)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        master.grad = p.grad.float()
        optimizer.step()
        exact.step()
    error = (summed(optimizer, p) - master.detach().double()).abs() / torch.maximum(start.double().abs(), master.abs())
    assert steps > 1 or error.max() <= 2**-16
    assert not torch.equal(p.detach().double(), master.detach().double())
    moved = (master.detach() - start.float()).norm().item()
    assert (summed(optimizer, p) - master.detach().double()).norm() < 0.02 * moved
    # Without it.
    alone = torch.nn.Parameter(start.clone())
    alone.grad = p.grad
    LAMB([alone], **options).step()
    assert (alone != start).float().mean() < 0.5


@implementations
def test_ties_and_their_rest(implementation: str | None) -> None:
    """Half-way sums go to the even number, and the rest says by how much."""
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0 + 2**-7, -1.0, 1.0, 0.0], dtype=torch.bfloat16))
    optimizer = LARS([p], lr=1.0, momentum=0.0, adapt=False, master="kahan", implementation=implementation)
    p.grad = torch.tensor([-(2**-8), -(2**-8), 2**-8, 2**-20, 2**-100], dtype=torch.bfloat16)
    optimizer.step()
    rest = optimizer.state[p]["compensation"]
    assert rest.dtype == torch.bfloat16
    assert p.tolist() == [1.0, 1.0 + 2**-6, -1.0, 1.0, -(2**-100)]
    assert rest.tolist() == [2**-8, -(2**-8), -(2**-8), -(2**-20), 0.0]
    # Two halves make one.
    optimizer.step()
    assert p.tolist()[0] == 1.0 + 2**-7
    assert rest.tolist()[0] == 0.0


@implementations
@pytest.mark.parametrize("rate", [1e-5, 3e-6, 1e-6])
def test_small_updates_of_a_sum_arrive_in_the_mean(implementation: str | None, rate: float) -> None:
    """Also those that are far below the last place of the compensation, as at the end of a schedule."""
    p = torch.nn.Parameter((1 + torch.rand(4000, generator=torch.Generator().manual_seed(0)) / 2).bfloat16())
    wide = torch.nn.Parameter(p.detach().float())
    options = {"lr": rate, "momentum": 0.0, "adapt": False, "implementation": implementation}
    optimizer, exact = LARS([p], master="kahan", **options), LARS([wide], **options)
    p.grad, wide.grad = torch.ones_like(p), torch.ones_like(wide)
    for _ in range(300):
        optimizer.step()
        exact.step()
    # A rest of up to 2^-8 is kept in steps of up to 2^-16: so far is an element off in one step at most.
    assert (summed(optimizer, p) - wide.double()).mean().abs() < 4 * 2**-17 * (300 / 4000) ** 0.5


@implementations
def test_a_step_of_nothing_leaves_both_numbers(implementation: str | None) -> None:
    """A rest is never half a distance, from which the next rounding might choose the other neighbour."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20_000, generator=generator).bfloat16())
    optimizer = LAMB([("p", p)], lr=1e-4, master="kahan", implementation=implementation)
    for _ in range(3):
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
    before = p.detach().clone(), optimizer.state[p]["compensation"].clone()
    assert torch.equal(before[0], (before[0].float() + before[1].float()).bfloat16())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(optimizer.state[p]["compensation"], before[1])


OTHER_WEIGHTS = {
    "smaller ones": lambda p: p.mul_(1e-2),
    "some are zero": lambda p: p[::2].zero_(),
    "clamped": lambda p: p.clamp_(-0.01, 0.01),
}


@implementations
@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_a_rest_is_not_added_to_weights_of_somebody_else(implementation: str | None, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64, generator=generator).bfloat16())
    optimizer = LAMB([("p", p)], lr=1e-3, master="kahan", implementation=implementation)
    for _ in range(5):
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
    assert optimizer.state[p]["compensation"].any()
    with torch.no_grad():
        OTHER_WEIGHTS[kind](p)
        written = p.clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, written)
    # No more than rounding them to bf16 has cost.
    assert ((summed(optimizer, p) - written.double()).abs() <= 2**-8 * written.double().abs()).all()


@implementations
def test_norms_are_those_of_the_sum(implementation: str | None) -> None:
    """The trust ratio of the second step, of weights that differ in the compensation alone."""
    p = torch.nn.Parameter(torch.full((8, 8), 1.0, dtype=torch.bfloat16))
    options = {"lr": 1.0, "momentum": 0.0, "trust_coefficient": 1.0, "weight_decay": 0.0}
    optimizer = LARS([p], master="kahan", implementation=implementation, **options)
    p.grad = torch.full_like(p, 0.001)
    optimizer.param_groups[0]["lr"] = 2**-10
    optimizer.step()
    before = summed(optimizer, p)
    assert p.unique().tolist() == [1.0]
    assert before.unique().tolist() == [1 - 2**-10]
    optimizer.step()
    ratio = before.norm() / p.grad.double().norm()
    assert list(optimizer.trust_ratios().values()) == pytest.approx([ratio.item()], rel=1e-6)


@all_optimizers
@pytest.mark.parametrize(("master", "state_dtype"), [("stochastic", None), ("kahan", None), ("kahan", "bfloat16")])
@pytest.mark.parametrize("kind", ["none", "zero", "frozen"])
@implementations
def test_layers_without_gradient_are_untouched(
    name: str, kind: str, master: str, state_dtype: str | None, implementation: str | None
) -> None:
    parameters = make_parameters(torch.bfloat16)
    options = {"weight_decay": 0.1, "master": master, "state_dtype": state_dtype}
    optimizer = make(name, parameters, implementation=implementation, **options)
    train(optimizer, parameters, range(2))
    for layers in (("matrix",), ("matrix", "bias"), tuple(parameters)):
        before, state = values(parameters), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        rest = {layer: p for layer, p in parameters.items() if layer not in layers}
        for layer in layers:
            parameters[layer].requires_grad_(kind != "frozen")
            if kind == "zero":
                (parameters[layer] * 0.0).sum().backward()
        backward(rest, make_gradients(5, rest))
        optimizer.step()
        for index, layer in enumerate(parameters):
            if layer in layers:
                after = optimizer.state_dict()["state"][index]
                assert torch.equal(parameters[layer], before[layer])
                assert all(torch.equal(torch.as_tensor(after[n]), torch.as_tensor(v)) for n, v in state[index].items())
        for layer in layers:
            parameters[layer].requires_grad_(True)


@all_optimizers
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.float32, None), (torch.float32, "bfloat16"), (torch.float64, None)]
)
def test_weights_of_more_bits_have_no_use_for_it(name: str, dtype: torch.dtype, state_dtype: str | None) -> None:
    plain, other = make_parameters(dtype), make_parameters(dtype)
    train(make(name, plain, state_dtype=state_dtype), plain, range(3))
    for master in MASTERS:
        other = make_parameters(dtype)
        optimizer = make(name, other, master=master, state_dtype=state_dtype)
        train(optimizer, other, range(3))
        assert all(torch.equal(plain[layer], other[layer]) for layer in plain)
        assert not any("compensation" in state for state in optimizer.state.values())


@all_optimizers
def test_fp32_state_is_what_it_was_without_the_option(name: str) -> None:
    plain, other = make_parameters(), make_parameters()
    one, two = make(name, plain), make(name, other, state_dtype=torch.float32, rounding_seed=7)
    for optimizer, parameters in ((one, plain), (two, other)):
        train(optimizer, parameters, range(3))
    assert two.param_groups[0]["state_dtype"] == "float32"
    assert all(torch.equal(plain[layer], other[layer]) for layer in plain)


# What small updates come to -----------------------------------------------------------------------------------------


def trained(master: str | None, steps: int = 300) -> tuple[float, float]:
    """A small regression by LAMB with bf16 weights: the share of them that never moved, and the last loss."""
    generator = torch.Generator().manual_seed(0)
    x, right = torch.randn(256, 32, generator=generator), torch.randn(32, 16, generator=generator)
    p = torch.nn.Parameter((0.5 * torch.randn(32, 16, generator=generator)).bfloat16())
    options = {"lr": 3e-4, "weight_decay": 0.0, "bias_correction": True, "rounding_seed": 1}
    optimizer = LAMB([("weight", p)], master=master, implementation="eager", **options)
    never = torch.ones_like(p, dtype=torch.bool)
    start = p.detach().clone()
    for _ in range(steps):
        optimizer.zero_grad()
        w = p if master != "kahan" else p + optimizer.state[p].get("compensation", torch.zeros_like(p)).float()
        loss = (x @ w.float() - x @ right).square().mean()
        loss.backward()
        optimizer.step()
        never &= p.detach() == start
    return never.double().mean().item(), loss.item()


def test_lamb_moves_weights_that_stand_still_without_a_master() -> None:
    (none, worst), *others = [trained(master) for master in (None, *MASTERS)]
    assert none > 0.5
    for never, loss in others:
        assert never < 0.02
        assert loss < 0.97 * worst


# What is told -------------------------------------------------------------------------------------------------------


def messages(optimizer: Any, parameters: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, parameters, range(2))
    return [str(w.message) for w in caught if "did not move in this step" in str(w.message)]


SLOWLY = {name: {"lr": 1e-9, **OWN_OPTIONS.get(name, {})} for name in OPTIMIZERS}


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_lost_updates_is_told_without_a_master(name: str, dtype: torch.dtype) -> None:
    if name == "adashift":
        return  # its first step moves nothing, see test_lost_updates
    parameters = make_parameters(dtype)
    (message,) = messages(make(name, parameters, **SLOWLY[name]), parameters)
    assert message.startswith(("100.0%", "99", "98", "97", "96", "95", "94"))


@all_optimizers
@pytest.mark.parametrize("master", MASTERS)
def test_nothing_is_told_with_a_master(name: str, master: str) -> None:
    parameters = make_parameters(torch.bfloat16)
    assert messages(make(name, parameters, master=master, **SLOWLY[name]), parameters) == []


def test_groups_without_a_master_are_told_of_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(8, 8, generator=generator).bfloat16()) for _ in range(2)]
    groups = [{"params": [ps[0]], "master": "kahan", "lr": 1e-9}, {"params": [ps[1]], "lr": 0.5}]
    for p in ps:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LAMB(groups).step()


# What is refused ----------------------------------------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("state_dtype", ["bfloat16", torch.float32])
def test_state_of_fp64_parameters_has_one_dtype(name: str, state_dtype: Any) -> None:
    parameters = make_parameters(torch.float64)
    before = values(parameters)
    optimizer = make(name, parameters, state_dtype=state_dtype)
    with pytest.raises(
        ValueError, match=r"state_dtype must be None for fp64 parameters.*got '(bfloat16|float32)' for "
    ):
        train(optimizer, parameters, [0])
    assert all(torch.equal(parameters[layer], w) for layer, w in before.items())
    assert not any(optimizer.state_dict()["state"].values())


@all_optimizers
@pytest.mark.parametrize("master", MASTERS)
def test_masters_of_fp16_weights(name: str, master: str) -> None:
    parameters = make_parameters(torch.float16)
    before = values(parameters)
    optimizer = make(name, parameters, master=master)
    with pytest.raises(ValueError, match=f"master must be None for fp16 weights, got '{master}' for .*bf16"):
        train(optimizer, parameters, [0])
    assert all(torch.equal(parameters[layer], w) for layer, w in before.items())


@all_optimizers
def test_dtypes_are_kept_as_text(name: str) -> None:
    for given in ("bfloat16", torch.bfloat16, "float32", torch.float32, None):
        wanted = None if given is None else str(given).removeprefix("torch.")
        group = {"params": [torch.nn.Parameter(torch.ones(2))], "state_dtype": given}
        for optimizer in (make(name, make_parameters(), state_dtype=given), create_optimizer(name, [group], lr=0.1)):
            assert optimizer.param_groups[0]["state_dtype"] == wanted
            optimizer.param_groups[0]["state_dtype"] = given


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("state_dtype", "bf16", r"state_dtype must be one of None, 'float32', 'bfloat16', got 'bf16'"),
    ("state_dtype", torch.float64, r"got torch.float64"),
    ("state_dtype", 16, r"got 16"),
    ("state_dtype", ("bfloat16",), r"got \('bfloat16',\)"),
    ("master", "fp32", r"master must be one of None, 'stochastic', 'kahan', got 'fp32'"),
    ("master", True, r"got True"),
    ("master", torch.bfloat16, r"got torch.bfloat16"),
    ("rounding_seed", -1, r"rounding_seed must be a whole number of at least 0, got -1"),
    ("rounding_seed", 1.0, r"got 1.0"),
    ("rounding_seed", True, r"got True"),
    ("rounding_seed", "1", r"got '1'"),
    ("rounding_seed", None, r"got None"),
]


@all_optimizers
def test_bad_values(name: str) -> None:
    for option, value, message in BAD_VALUES:
        with pytest.raises(ValueError, match=message):
            make(name, make_parameters(), **{option: value})
        parameters = make_parameters()
        optimizer = make(name, parameters)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [("other", torch.nn.Parameter(torch.ones(2)))], option: value})
        optimizer.param_groups[0][option] = value
        with pytest.raises(ValueError, match=message):
            train(optimizer, parameters, [0])


@all_optimizers
def test_whole_numbers_of_any_kind_are_seeds(name: str) -> None:
    for seed in (np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3), 3):
        optimizer = make(name, make_parameters(), state_dtype="bfloat16", rounding_seed=seed)
        kept = optimizer.param_groups[0]["rounding_seed"]
        assert (type(kept), kept) == (int, 3)


@pytest.mark.parametrize(("option", "value"), [("state_dtype", "bfloat16"), ("master", "kahan"), ("rounding_seed", 1)])
def test_trust_ratio_has_the_state_of_its_base(option: str, value: Any) -> None:
    message = rf"{option} must be .*, got {value!r}: AdamW keeps state and weights"
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'; AdamW keeps state and weights"):
        TrustRatio(torch.optim.AdamW, [torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **{option: value})
    with pytest.raises(ValueError, match=message):
        TrustRatio(torch.optim.AdamW, [{"params": [torch.nn.Parameter(torch.ones(2, 2))], option: value}], lr=0.1)
    optimizer = TrustRatio(torch.optim.AdamW, [torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], option: value})
