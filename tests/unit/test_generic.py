"""What every registered optimizer must do, on one process; torch.optim's conventions are in test_torch_contract."""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer, create_optimizer

from ..reference import run_reference

Tensor = torch.Tensor
Parameters = dict[str, torch.nn.Parameter]

SHAPES = {"matrix": (5, 7), "conv": (3, 2, 2, 2), "bias": (6,), "scalar": ()}
GROUPS_OF_SAMPLES = 8
LR = 0.05
OWN_OPTIONS: dict[str, dict[str, Any]] = {"adashift": {"keep": 1}}
"""With which the few steps of these tests change weights: AdaShift waits for as many steps as it keeps gradients."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*"
)

all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
all_variants = pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, entry in OPTIMIZERS.items() for options in ({}, *entry.variants)],
)


def make_parameters(dtype: torch.dtype = torch.float32, shapes: dict[str, Any] | None = None) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (shapes or SHAPES).items()
    }


def make_gradients(step: int, parameters: Parameters) -> dict[str, Tensor]:
    """The gradients of all groups of samples, fp64, representable in the parameters' dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    gradients = {}
    for name, p in parameters.items():
        mean = torch.randn(p.shape, generator=generator)
        noise = torch.randn((GROUPS_OF_SAMPLES, *p.shape), generator=generator)
        # Coarse numbers, so that 16-bit gradients add up without rounding.
        gradients[name] = ((mean + noise) * 8).round().clamp(-24, 24).double() / 8
    return gradients


def backward(parameters: Parameters, gradients: dict[str, Tensor]) -> None:
    """Make the gradients by backpropagation, one group after the other: some optimizers look at each."""
    for group in range(GROUPS_OF_SAMPLES):
        for name, g in gradients.items():
            (parameters[name] * (g[group] / GROUPS_OF_SAMPLES).to(parameters[name].dtype)).sum().backward()


def train(optimizer: torch.optim.Optimizer, parameters: Parameters, steps: Sequence[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(parameters, make_gradients(step, parameters))
        optimizer.step()


def make(name: str, parameters: Parameters, **options: Any) -> LayerwiseOptimizer:
    return create_optimizer(name, list(parameters.items()), **{"lr": LR, **OWN_OPTIONS.get(name, {}), **options})


def values(parameters: Parameters) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict()["state"])


def assert_same_state(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    else:
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


# The update ---------------------------------------------------------------------------------------------------------


@all_variants
def test_equals_the_reference_in_fp64(name: str, options: dict[str, Any]) -> None:
    parameters = make_parameters(torch.float64)
    before = values(parameters)
    given = {"lr": LR, "weight_decay": 0.1, **OWN_OPTIONS.get(name, {}), **options}
    optimizer = make(name, parameters, **given)
    train(optimizer, parameters, range(4))
    gradients = [make_gradients(step, parameters) for step in range(4)]
    expected, ratios = run_reference(
        name, before, gradients, dict.fromkeys(SHAPES, given), resolution=torch.finfo(torch.float64).eps
    )
    tolerance = 1e-6 if name in ("mclr", "cblr") else 1e-9  # their median is an fp32 number
    for layer, w in expected.items():
        torch.testing.assert_close(parameters[layer].detach(), w, rtol=tolerance, atol=tolerance)
    assert optimizer.trust_ratios() == pytest.approx(ratios[-1], rel=tolerance)


@all_optimizers
def test_maximizing_equals_the_reference_of_the_other_sign(name: str) -> None:
    """Gradients are seen as they are in backward, where the optimizer looks at single groups of samples."""
    parameters = make_parameters(torch.float64)
    before = values(parameters)
    given = {"lr": LR, "weight_decay": 0.1, **OWN_OPTIONS.get(name, {})}
    optimizer = make(name, parameters, maximize=True, **given)
    train(optimizer, parameters, range(3))
    gradients = [{layer: -g for layer, g in make_gradients(step, parameters).items()} for step in range(3)]
    expected, ratios = run_reference(
        name, before, gradients, dict.fromkeys(SHAPES, given), resolution=torch.finfo(torch.float64).eps
    )
    tolerance = 1e-6 if name in ("mclr", "cblr") else 1e-9
    for layer, w in expected.items():
        torch.testing.assert_close(parameters[layer].detach(), w, rtol=tolerance, atol=tolerance)
    assert optimizer.trust_ratios() == pytest.approx(ratios[-1], rel=tolerance)


@all_optimizers
def test_groups_equal_separate_optimizers(name: str) -> None:
    """SNGM couples the layers of all groups by design; test_sngm looks at that."""
    if name == "sngm":
        return
    together, alone = make_parameters(), make_parameters()
    options: dict[str, dict[str, Any]] = {
        "matrix": {"lr": 0.1},
        "conv": {"weight_decay": 0.2},
        "bias": {"adapt": True},
        "scalar": {},
    }
    groups = [{"params": [(layer, together[layer])], **options[layer]} for layer in SHAPES]
    one = create_optimizer(name, groups, lr=LR, **OWN_OPTIONS.get(name, {}))
    accepted = inspect.signature(OPTIMIZERS[name].optimizer_class).parameters
    several = [
        make(name, {layer: alone[layer]}, **{k: v for k, v in options[layer].items() if k in accepted})
        for layer in SHAPES
    ]
    for step in range(3):
        for parameters, optimizers in ((together, [one]), (alone, several)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            backward(parameters, make_gradients(step, parameters))
            for optimizer in optimizers:
                optimizer.step()
    for layer in SHAPES:
        torch.testing.assert_close(together[layer], alone[layer], rtol=1e-6, atol=1e-7)


@all_optimizers
def test_gradients_are_not_modified(name: str) -> None:
    parameters = make_parameters()
    optimizer = make(name, parameters)
    train(optimizer, parameters, [0])
    optimizer.zero_grad()
    backward(parameters, make_gradients(1, parameters))
    gradients = {layer: p.grad.clone() for layer, p in parameters.items()}
    optimizer.step()
    assert all(torch.equal(p.grad, gradients[layer]) for layer, p in parameters.items())


# Layers without gradient --------------------------------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("kind", ["none", "zero", "frozen"])
def test_layers_without_gradient_are_untouched(name: str, kind: str) -> None:
    parameters = make_parameters()
    optimizer = make(name, parameters, weight_decay=0.1)
    train(optimizer, parameters, range(2))
    for layers in (("matrix",), ("matrix", "bias"), tuple(SHAPES)):
        before, state = values(parameters), state_of(optimizer)
        optimizer.zero_grad()
        rest = {layer: p for layer, p in parameters.items() if layer not in layers}
        for layer in layers:
            parameters[layer].requires_grad_(kind != "frozen")
            if kind == "zero":
                (parameters[layer] * 0.0).sum().backward()
        backward(rest, make_gradients(5, rest))
        optimizer.step()
        after = state_of(optimizer)
        for index, layer in enumerate(SHAPES):
            if layer in layers:
                assert torch.equal(parameters[layer], before[layer])
                assert_same_state(after[index], state[index])
                assert optimizer.trust_ratios()[layer] == 1.0
            else:
                assert not torch.equal(parameters[layer], before[layer])
                assert after[index]["step"] == state[index]["step"] + 1


@all_optimizers
def test_no_gradient_anywhere_makes_no_state(name: str) -> None:
    parameters = make_parameters()
    before = values(parameters)
    optimizer = make(name, parameters)
    optimizer.step()
    assert same(values(parameters), before)
    assert not any(optimizer.state_dict()["state"].values())


# Saving and copying -------------------------------------------------------------------------------------------------


@all_variants
def test_a_state_dict_continues_identically(name: str, options: dict[str, Any]) -> None:
    parameters = make_parameters()
    optimizer = make(name, parameters, **options)
    train(optimizer, parameters, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = {layer: torch.nn.Parameter(w) for layer, w in values(parameters).items()}
    other = make(name, resumed, lr=123.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for o, p in ((optimizer, parameters), (other, resumed)):
        train(o, p, range(2, 4))
    assert same(values(parameters), values(resumed))
    assert optimizer.trust_ratios() == other.trust_ratios()
    assert_same_state(state_of(optimizer), state_of(other))


# Kinds of parameters ------------------------------------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_state(name: str, dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = make_parameters(dtype)
    optimizer = make(name, parameters)
    train(optimizer, parameters, range(2))
    other = make(name, {layer: torch.nn.Parameter(w) for layer, w in values(parameters).items()})
    other.load_state_dict(optimizer.state_dict())
    for o in (optimizer, other):
        for state in o.state.values():
            assert state["step"].dtype == torch.float32
            for key, value in state.items():
                assert key == "step" or value.dtype == wanted, key
    assert_same_state(state_of(optimizer), state_of(other))
    assert all(p.dtype == dtype and p.isfinite().all() for p in parameters.values())


@all_optimizers
def test_sixteen_bit_parameters_take_the_fp32_step_rounded_once(name: str) -> None:
    half = make_parameters(torch.bfloat16)
    full = {layer: torch.nn.Parameter(p.detach().float()) for layer, p in half.items()}
    for parameters in (half, full):
        train(make(name, parameters), parameters, [0])
    for layer, p in full.items():
        # VRGD bounds its ratio by the resolution of the gradient's dtype.
        tolerance = {"rtol": 0.02, "atol": 0.02} if name.startswith("vr") else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(half[layer].detach(), p.detach().bfloat16(), **tolerance)


@all_optimizers
@pytest.mark.parametrize("which", ["parameters", "gradients", "both"])
def test_memory_layout_does_not_matter(name: str, which: str) -> None:
    plain, other = make_parameters(), make_parameters()

    def rearranged(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:
            return tensor.clone(memory_format=torch.channels_last)
        return tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor, tensor], dim=-1)[..., 0]

    if which != "gradients":
        other = {layer: torch.nn.Parameter(rearranged(p.detach())) for layer, p in other.items()}
        assert not other["matrix"].is_contiguous()
    optimizers = make(name, plain), make(name, other)
    for step in range(3):
        for optimizer, parameters in zip(optimizers, (plain, other), strict=True):
            optimizer.zero_grad()
            backward(parameters, make_gradients(step, parameters))
        for p in other.values():
            p.grad = p.grad.contiguous() if which == "parameters" else rearranged(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    for layer in SHAPES:
        torch.testing.assert_close(plain[layer].detach(), other[layer].detach(), rtol=1e-5, atol=1e-6)
    assert optimizers[0].trust_ratios() == pytest.approx(optimizers[1].trust_ratios(), rel=1e-5)


@all_optimizers
def test_sparse_gradients_raise(name: str) -> None:
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = create_optimizer(name, embedding.parameters(), lr=LR)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"dense.*sparse_coo.*sparse=False"):
        optimizer.step()


@all_optimizers
def test_parameters_that_are_not_real_raise(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"floating point tensors, got w, torch\.complex64"):
        create_optimizer(name, [("w", parameter)], lr=LR)


# torch.optim's conventions ------------------------------------------------------------------------------------------


@all_optimizers
def test_names(name: str) -> None:
    named, unnamed = make_parameters(), make_parameters()
    optimizer = make(name, named)
    train(optimizer, named, [0])
    assert list(optimizer.trust_ratios()) == list(SHAPES)
    other = create_optimizer(name, list(unnamed.values()), lr=LR)
    train(other, unnamed, [0])
    assert list(other.trust_ratios()) == ["0.0", "0.1", "0.2", "0.3"]
    assert same(values(named), values(unnamed))


@all_optimizers
def test_a_group_added_later(name: str) -> None:
    parameters = make_parameters()
    first = {layer: p for layer, p in parameters.items() if layer != "bias"}
    optimizer = make(name, first)
    train(optimizer, first, [0])
    optimizer.add_param_group({"params": [("bias", parameters["bias"])], "lr": 0.0})
    before = values(parameters)
    train(optimizer, parameters, [1])
    assert torch.equal(parameters["bias"], before["bias"])
    assert not torch.equal(parameters["matrix"], before["matrix"])
    assert set(optimizer.trust_ratios()) == set(SHAPES)
    with pytest.raises(ValueError, match="lr must be in"):
        optimizer.add_param_group({"params": [("other", torch.nn.Parameter(torch.ones(2)))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


# Bad input ----------------------------------------------------------------------------------------------------------

NAN = math.nan
BAD: dict[str, list[tuple[Any, str]]] = {
    "lr": [
        (float("inf"), r"lr must be in \[0, inf\), got inf"),
        (-1.0, r"lr must be in \[0, inf\), got -1.0"),
        (NAN, "got nan"),
        ("fast", "got 'fast'"),
    ],
    "momentum": [(1.0, r"momentum must be in \[0, 1\), got 1.0"), (-0.1, "got -0.1")],
    "betas": [
        ((0.9, 1.0), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ((-0.1, 0.9), r"betas\[0\] .* got -0.1"),
        (0.9, "two numbers"),
    ],
    "eps": [(-1e-8, r"eps must be in \[0, inf\), got -1e-08")],
    "weight_decay": [(-0.1, r"weight_decay must be in \[0, inf\), got -0.1")],
    "trust_coefficient": [(0.0, r"trust_coefficient must be in \(0, inf\), got 0.0")],
    "trust_clip": [(0.0, r"trust_clip must be in \(0, inf\), got 0.0")],
    "trust_bounds": [((1.0, 0.5), r"trust_bounds\[1\] must be in \[1, inf\], got 0.5"), ((1.0,), r"\(low, high\)")],
    "max_grad_norm": [(0.0, r"max_grad_norm must be in \(0, inf\), got 0.0")],
    "nesterov": [("yes", "nesterov must be True or False, got 'yes'")],
    "momentum_form": [("other", "momentum_form must be one of 'scaled', .*, got 'other'")],
    "bias_correction": [(1, "bias_correction must be True or False, got 1")],
    "grad_averaging": [(None, "grad_averaging must be True or False, got None")],
    "normalize_grad": [(0, "normalize_grad must be True or False, got 0")],
    "decay": [(-0.1, r"decay must be in \[0, inf\), got -0.1")],
    "delay": [(-1, r"delay must be in \[0, inf\), got -1")],
    "alpha": [(0.0, r"alpha must be in \(0, inf\), got 0.0")],
    "floor": [(-0.1, r"floor must be in \[0, inf\), got -0.1")],
    "form": [("other", "form must be one of 'paper', 'released', got 'other'")],
    "statistic": [("other", r"statistic must be one of ('median', 'mean', 'norm'|'norm', 'square'), got 'other'")],
    "gsnr_floor": [(0.0, r"gsnr_floor must be in \(0, 1\], got 0.0"), (1.1, "got 1.1")],
    "gsnr_beta": [(1.0, r"gsnr_beta must be in \[0, 1\), got 1.0")],
    "second_moment": [("other", "second_moment must be one of 'adapted', 'mean', got 'other'")],
    "ratio": [(0.0, r"ratio must be in \(0, inf\), got 0.0")],
    "zeta": [(-0.1, r"zeta must be in \[0, inf\), got -0.1")],
    "threshold": [("other", "threshold must be one of 'code', 'paper', got 'other'")],
    "interval": [(0, r"interval must be in \[1, inf\), got 0"), (2.5, "interval must be a whole number, got 2.5")],
    "beta": [(1.0, r"beta must be in \[0, 1\), got 1.0")],
    "cap": [(0.0, r"cap must be in \(0, inf\), got 0.0")],
    "negative": [("other", "negative must be one of 'absolute', 'floor', got 'other'")],
    "perturbation": [(0.0, r"perturbation must be in \(0, 1\], got 0.0"), (1.5, "got 1.5")],
    "seed": [(0.5, "seed must be a whole number, got 0.5")],
    "cowclip": [(1, "cowclip must be True or False, got 1")],
    "rectify": [("yes", "rectify must be True or False, got 'yes'")],
    "decoupled": [(1, "decoupled must be True or False, got 1")],
    "fixed_decay": [(None, "fixed_decay must be True or False, got None")],
    "amsgrad": [(1, "amsgrad must be True or False, got 1"), (True, "amsgrad=True needs rectify=False")],
    "degenerated_to_sgd": [(0, "degenerated_to_sgd must be True or False, got 0")],
    "beta1": [(1.0, r"beta1 must be in \[0, 1\), got 1.0"), ("0.9", "got '0.9'")],
    "gamma": [(0.0, r"gamma must be in \(0, 1\], got 0.0"), (1.1, "got 1.1")],
    "delta": [(0.0, r"delta must be in \(0, inf\), got 0.0")],
    "constant_lr": [(1, "constant_lr must be True or False, got 1")],
    "running_maximum": [(1, "running_maximum must be True or False, got 1")],
    "keep": [(0, "keep must be a whole number of at least 1, got 0"), (2.5, "got 2.5"), (True, "got True")],
    "reduction": [("sum", "reduction must be one of 'max', 'mean', None, got 'sum'")],
    "update_clip": [(0.0, r"update_clip must be in \(0, inf\), got 0.0"), (math.inf, "got inf"), ("1", "got '1'")],
    "decay_form": [("other", "decay_form must be one of 'clipped', 'unclipped', 'fixed', got 'other'")],
    "adapt": [("yes", "adapt must be one of None, True, False, got 'yes'")],
    "segments": [(0, "segments must be a number of equal parts .* got 0"), ("3", "got '3'"), (2.0, "got 2.0")],
    "maximize": [(1, "maximize must be True or False, got 1")],
    "state_dtype": [
        ("float16", "state_dtype must be one of None, 'float32', 'bfloat16', got 'float16'"),
        (torch.float16, "got torch.float16"),
    ],
    "master": [("fp32", "master must be one of None, 'stochastic', 'kahan', got 'fp32'"), (True, "got True")],
    "rounding_seed": [(-1, "rounding_seed must be a whole number of at least 0, got -1"), (0.5, "got 0.5")],
    "foreach": [(1, "foreach must be one of None, True, False, got 1")],
    "fused": [("yes", "fused must be one of None, True, False, got 'yes'")],
    "capturable": [(None, "capturable must be True or False, got None")],
    "differentiable": [(True, "differentiable must be False, got True: a step changes weights")],
    "implementation": [("fast", "implementation must be one of None, 'eager', 'cpu', 'triton', got 'fast'")],
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, entry in OPTIMIZERS.items()
        for option in inspect.signature(entry.optimizer_class).parameters
        if option != "params"
    ],
)
def test_bad_options_raise(name: str, option: str) -> None:
    for value, message in BAD[option]:
        with pytest.raises(ValueError, match=message):
            make(name, make_parameters(), **{option: value})
        if option != "implementation":  # no group option
            with pytest.raises(ValueError, match=message):
                create_optimizer(name, [{"params": [torch.nn.Parameter(torch.ones(2))], option: value}], lr=LR)


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'lamp'.*lamb"):
        create_optimizer("lamp", [torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=r"novograd has no option 'beta'.*betas"):
        create_optimizer("novograd", [torch.nn.Parameter(torch.ones(1))], beta=0.9)
