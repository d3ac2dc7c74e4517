"""Sweeps against tensor operations: the same step whoever computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, create_optimizer
from trustratio.optimizers.kernels import cpu

from .kernel_runs import SHAPES, Tensor, assert_close, needs_compiler, run, states
from .test_generic import all_variants, values

pytestmark = [
    pytest.mark.usefixtures("many_threads"),
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
]


@needs_compiler
@all_variants
def test_sweeps_equal_tensor_operations(name: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(3)
    parameters, optimizer = run(name, "cpu", **options)
    expected, reference = run(name, "eager", **options)
    assert_close(parameters, expected, 1e-6)
    for state in (*optimizer.element_state, *optimizer.layer_state):
        assert_close(states(optimizer, parameters, state), states(reference, expected, state), 2e-6)
    assert optimizer.trust_ratios() == pytest.approx(reference.trust_ratios(), rel=1e-6)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"adapt": True, "decoupled": False}, {"degenerated_to_sgd": False}])
def test_rectified_steps(options: dict[str, Any]) -> None:
    """Which begin with the sixth update."""
    parameters, expected, five = (
        run("adabelief", form, steps, **options)[0] for form, steps in (("cpu", 8), ("eager", 8), ("cpu", 5))
    )
    assert_close(parameters, expected, 1e-6)
    assert not torch.equal(parameters["odd"], five["odd"])


@needs_compiler
@pytest.mark.parametrize("name", ["lamb", "lans", "adabelief", "stableadamw"])
def test_lanes_behind_the_end_of_a_layer_add_nothing(name: str) -> None:
    """Without a memory and without ε they compute 0/0."""
    w = torch.nn.Parameter(torch.ones(19))
    options: dict[str, Any] = {"betas": (0.9, 0.0), "eps": 0.0, **({"rectify": False} if name == "adabelief" else {})}
    optimizer = create_optimizer(name, [w], adapt=True, implementation="cpu", **options)
    w.grad = torch.full((19,), 2.0)
    optimizer.step()
    assert w.isfinite().all()
    assert (w < 1).all()


@needs_compiler
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "vrlamb", "adabelief", "fastadabelief", "stableadamw"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parameters, optimizer = run(name, "cpu", steps=2)
        results.append((values(parameters), optimizer.trust_ratios()))
    for parameters, ratios in results[1:]:
        assert ratios == results[0][1]
        assert all(torch.equal(parameters[layer], results[0][0][layer]) for layer in SHAPES)


@needs_compiler
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if level > cpu._best_level():
        pytest.skip(f"this processor cannot execute the instructions of level {level}")
    names = ("lars", "lans", "vrlamb", "adabelief", "fastadabelief", "stableadamw")
    expected = {name: run(name, "eager")[0] for name in names}
    monkeypatch.setattr(cpu, "_best_level", lambda: level)
    for name, parameters in expected.items():
        assert_close(run(name, "cpu")[0], parameters, 1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Each weight is rounded once, as torch rounds it: all bit patterns, subnormal numbers and infinities included."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[~patterns.isnan()]
    results = []
    for implementation in ("cpu", "eager"):
        w = torch.nn.Parameter(patterns.clone())
        w.grad = patterns.roll(12345).clone()
        LARS([w], lr=0.3, momentum=0.0, adapt=False, implementation=implementation).step()
        results.append(w.detach())
    assert torch.equal(
        results[0].view(torch.int16)[~results[1].isnan()], results[1].view(torch.int16)[~results[1].isnan()]
    )
    assert torch.equal(results[0].isnan(), results[1].isnan())


@needs_compiler
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no such gradients")
def test_gradients_of_another_dtype_than_the_weights() -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 3001))
    other = torch.nn.Parameter(w.detach().clone())
    g = torch.randn(3001).bfloat16()
    for parameter, implementation in ((w, "cpu"), (other, "eager")):
        optimizer = LAMB([parameter], implementation=implementation)
        parameter.grad = g.float()
        optimizer.step()
        parameter.grad_dtype = None
        parameter.grad = g
        optimizer.step()
    torch.testing.assert_close(w, other, rtol=1e-6, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_sums_have_the_precision_of_fp64(scale: float) -> None:
    """Squares of neither tiny nor huge numbers are lost."""
    n = 3_000_017
    w = torch.nn.Parameter(torch.linspace(0.1, 0.2, n) * scale)
    w.grad = torch.linspace(0.3, 0.1, n) * scale
    found = {}

    class Watching(LARS):
        def stages(self, group: Any, layers: Any) -> Any:
            yield from super().stages(group, layers)
            found.update({name: layers.norm(name).item() for name in ("w", "g")})

    Watching([w], lr=0.0, implementation="cpu").step()
    for name, tensor in (("w", w.detach()), ("g", w.grad)):
        assert found[name] == pytest.approx(tensor.double().norm().item(), rel=1e-11)


@needs_compiler
def test_ten_thousand_layers() -> None:
    def trained(implementation: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        ps = [torch.nn.Parameter(torch.randn(3, 3, generator=generator)) for _ in range(10_000)]
        optimizer = LAMB(ps, implementation=implementation)
        for p in ps:
            p.grad = torch.randn(3, 3, generator=generator)
        optimizer.step()
        return torch.stack([p.detach() for p in ps])

    torch.testing.assert_close(trained("cpu"), trained("eager"), rtol=1e-5, atol=1e-6)
