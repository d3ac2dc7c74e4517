"""The GPU's sweeps, computed by Triton's interpreter on the CPU. tests/gpu runs them on a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import compiled_kernels
from trustratio.optimizers import LAMB, OPTIMIZERS, create_optimizer
from trustratio.optimizers.kernels import choice, interface, triton_kernels

from ..swept import SWEPT
from . import test_kernels_guarantees as guarantees
from .kernel_runs import assert_close, flat_run, states
from .test_generic import backward, make_gradients, make_parameters, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these on the device"),
]

BLOCK = triton_kernels.BLOCK
SHAPES: dict[str, tuple[int, ...]] = {"blocks": (BLOCK + 1, 2), "odd": (3, 11), "bias": (17,), "scalar": ()}

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SWEPT),
    ("lars", {"nesterov": True, "momentum_form": "gradient"}),
    ("lars", {"momentum": 0.0}),
    ("lamb", {"max_grad_norm": 1.0}),
    ("lamb", {"update_clip": 0.5, "max_grad_norm": 1.0}),
    ("lans", {"update_clip": 0.5}),
    ("vradam", {"update_clip": 0.5}),
    ("vrlamb", {"update_clip": 0.5, "second_moment": "mean"}),
    *(("stableadamw", options) for options in OPTIMIZERS["stableadamw"].variants),
    ("vrlamb", {"second_moment": "mean", "bias_correction": False}),
    ("vrlars", {"nesterov": True, "momentum_form": "unscaled"}),
    *(("adabelief", options) for options in OPTIMIZERS["adabelief"].variants),
    *(("fastadabelief", options) for options in OPTIMIZERS["fastadabelief"].variants),
]


def run(name: str, implementation: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    parameters = make_parameters(dtype, SHAPES)
    given = {"lr": 0.05, "weight_decay": 0.1, **options}
    optimizer = create_optimizer(name, list(parameters.items()), implementation=implementation, **given)
    for step in range(2):
        gradients = make_gradients(step, parameters)
        gradients["blocks"][:, : BLOCK // 2] = 0.0  # a block without gradient
        if step == 1:
            del gradients["bias"]
        optimizer.zero_grad()
        backward(parameters, gradients)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(("name", "options"), CASES)
def test_sweeps_equal_tensor_operations(name: str, options: dict[str, Any]) -> None:
    parameters, optimizer = run(name, "triton", **options)
    expected, reference = run(name, "eager", **options)
    assert_close(parameters, expected, 1e-6)
    for state in (*optimizer.element_state, *optimizer.layer_state):
        assert_close(states(optimizer, parameters, state), states(reference, expected, state), 2e-6)
    assert optimizer.trust_ratios() == pytest.approx(reference.trust_ratios(), rel=1e-6)


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "adabelief", "fastadabelief", "stableadamw"])
def test_odd_starts_and_lengths_and_poisoned_padding(name: str) -> None:
    lengths, gaps = [1, 15, 33, BLOCK, BLOCK + 7, 16, 5], [3, 0, 1, 2, 1, 0, 9]
    assert_close(flat_run(name, "triton", lengths, gaps), flat_run(name, "eager", lengths, gaps), 1e-6)


def test_steps_are_the_same_bits_every_time() -> None:
    first, second = (values(run("lamb", "triton")[0]) for _ in range(2))
    assert all(torch.equal(first[layer], second[layer]) for layer in first)


def test_sixteen_bit_weights_and_gradients() -> None:
    parameters, _ = run("lamb", "triton", torch.bfloat16)
    expected, _ = run("lamb", "eager", torch.bfloat16)
    # The interpreter cuts off bits of bf16 where the device rounds: in each of the steps up to 2^-7 of the weight.
    assert_close(parameters, expected, 2**-6)


def test_layers_of_several_dtypes() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def trained(implementation: str) -> list[torch.Tensor]:
        ps = [torch.nn.Parameter(torch.linspace(-1, 1, 35, dtype=dtype).view(5, 7)) for dtype in dtypes]
        optimizer = LAMB(ps, implementation=implementation)
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [p.detach() for p in ps]

    for a, b in zip(trained("triton"), trained("eager"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["lamb", "clars", "vrlamb"])
def test_guarantees(name: str) -> None:
    """The same tests as the CPU's sweeps have to pass."""
    if OPTIMIZERS[name].group_statistics:
        guarantees.test_a_gradient_that_is_not_finite_changes_nothing(name, "triton")
    else:
        guarantees.test_state_is_not_written_before_the_groups_are_known_to_be_finite("triton")


class Recorded:
    """In place of a kernel: the types of what it is launched with, by the names of its arguments."""

    def __init__(self, kernel: Any, launches: list[dict[str, str]]):
        self.names, self.launches = kernel.arg_names, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            given = dict(zip(self.names, arguments, strict=False))
            assert {*given, *constants} - {"num_warps", "enable_fp_fusion", "maxnreg"} == {*self.names}
            self.launches.append({name: of_argument(value) for name, value in given.items()})

        return launch


def of_argument(value: Any) -> str:
    """As Triton's launcher types it."""
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return {torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32"}[value.dtype]
    return {int: "i32", float: "fp32"}[type(value)]


@pytest.mark.filterwarnings("ignore:.*weights that have a gradient did not move.*")
@pytest.mark.parametrize("storage", [{}, {"state_dtype": "bfloat16", "master": "kahan"}])
@pytest.mark.parametrize("name", SWEPT)
def test_kernels_are_launched_with_what_they_are_compiled_for(
    name: str, storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is known of the compiled ones is of others."""
    launches: list[dict[str, str]] = []
    kernels = {family: Recorded(kernel, launches) for family, kernel in triton_kernels._KERNELS.items()}
    monkeypatch.setattr(triton_kernels, "_KERNELS", kernels)
    monkeypatch.setattr(triton_kernels, "_fold", Recorded(triton_kernels._fold, launches))
    parameters = make_parameters(torch.bfloat16, {"one": (5, 7), "other": (5,)})
    groups = [{"params": [(layer, p)], "weight_decay": 0.1 * i} for i, (layer, p) in enumerate(parameters.items())]
    optimizer = create_optimizer(name, groups, lr=0.05, implementation="triton", **storage)
    for step in range(2):
        optimizer.zero_grad()
        backward(parameters, make_gradients(step, parameters))
        optimizer.step()
    assert launches
    for launch in launches:
        assert launch == {argument: compiled_kernels._type_of(argument, {}) for argument in launch}


def test_without_a_gpu() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with pytest.raises(interface.ImplementationError, match=r"'triton' needs parameters on cuda, got cpu"):
            choice.choose("triton", torch.device("cpu"))
    finally:
        os.environ["TRITON_INTERPRET"] = "1"
