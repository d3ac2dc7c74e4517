"""The choice of who computes a step."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

from trustratio.optimizers import LAMB, LayerwiseOptimizer
from trustratio.optimizers.kernels import choice, cpu, interface

from ..swept import SWEPT
from .kernel_runs import Tensor, run

pytestmark = [
    pytest.mark.usefixtures("many_threads"),
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
]


def one_step(**options: Any) -> tuple[LayerwiseOptimizer, Tensor]:
    w = torch.nn.Parameter(torch.ones(4, 4))
    w.grad = torch.ones(4, 4)
    optimizer = LAMB([w], **options)
    optimizer.step()
    return optimizer, w


def test_the_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTRATIO_IMPLEMENTATION", "eager")
    assert choice.choose(None, torch.device("cpu")) is None
    if cpu.KERNELS.missing() is None:
        assert choice.choose("cpu", torch.device("cpu")) is cpu.KERNELS
        monkeypatch.setenv("TRUSTRATIO_IMPLEMENTATION", "")
        assert choice.choose(None, torch.device("cpu")) is cpu.KERNELS
    monkeypatch.setenv("TRUSTRATIO_IMPLEMENTATION", "fast")
    with pytest.raises(ValueError, match=r"TRUSTRATIO_IMPLEMENTATION must be one of eager, cpu, triton, got 'fast'"):
        one_step()
    one_step(implementation="eager")


def test_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(interface.ImplementationError, match=r"'cpu' needs parameters on cpu, got meta"):
        choice.choose("cpu", torch.device("meta"))
    monkeypatch.setattr(cpu, "_library", lambda: None)
    monkeypatch.setattr(choice, "_warned", set())
    with pytest.raises(interface.ImplementationError, match=r"'cpu' needs its compiled functions.*C compiler"):
        one_step(implementation="cpu")
    with pytest.warns(UserWarning, match="'eager'.*'cpu' needs its compiled functions"):
        one_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step()  # warned once


def test_a_triton_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a compiler, or on a GPU that it does not know."""
    triton_kernels = pytest.importorskip("trustratio.optimizers.kernels.triton_kernels")
    if triton_kernels.KERNELS.missing() is not None:
        pytest.skip("needs Triton")

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("ptxas knows no sm_37")

    monkeypatch.setattr(triton_kernels, "_fold", Broken())
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(choice, "_OF_DEVICE", {"cpu": "triton"})
    triton_kernels._why_nothing_compiles.cache_clear()
    try:
        with pytest.warns(UserWarning, match="'eager'.*a Triton that compiles for cpu.*ptxas knows no sm_37"):
            _, found = one_step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one_step()  # warned once
        with pytest.raises(interface.ImplementationError, match="'triton' needs a Triton that compiles"):
            one_step(implementation="triton")
    finally:
        triton_kernels._why_nothing_compiles.cache_clear()
    assert torch.equal(found, one_step(implementation="eager")[1])


def test_an_interpreter_older_than_its_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels = pytest.importorskip("trustratio.optimizers.kernels.triton_kernels")
    launch = mock.MagicMock()
    launch.__getitem__.return_value.side_effect = TypeError(
        "only 0-dimensional arrays can be converted to Python scalars"
    )
    monkeypatch.setattr(triton_kernels, "_fold", launch)
    why = triton_kernels._why_nothing_compiles.__wrapped__(torch.device("cpu"))
    assert why == "numpy before 2.4, or Triton 3.7, for TRITON_INTERPRET=1"


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels = pytest.importorskip("trustratio.optimizers.kernels.triton_kernels")
    if triton_kernels.KERNELS.missing() is not None:
        pytest.skip("needs Triton")
    monkeypatch.setattr(triton_kernels, "_has_bf16", lambda device: False)
    triton_kernels._warn_of_bf16.cache_clear()
    results = []
    for implementation in ("eager", "triton"):
        ps = [torch.nn.Parameter(torch.ones(5, 5, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
        for p in ps:
            p.grad = torch.full_like(p, 0.5)
        optimizer = LAMB(ps, lr=0.1, implementation=implementation)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        assert sum("older than sm_80" in str(w.message) for w in caught) == (implementation == "triton")
        results.append(ps)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_fp64_is_computed_by_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and beside fp32 layers of the same group."""
    ps = [torch.nn.Parameter(torch.ones(5, 5, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    for p in ps:
        p.grad = torch.full_like(p, 0.5)
    optimizer = LAMB(ps)
    optimizer.step()
    assert optimizer.state[ps[0]]["exp_avg"].dtype == torch.float64
    if cpu.KERNELS.missing() is None:
        monkeypatch.setattr(choice, "_warned", set())
        optimizer.implementation = "cpu"
        with pytest.warns(UserWarning, match="'cpu' serves weights and gradients in fp32, bf16 and fp16"):
            optimizer.step()
    torch.testing.assert_close(ps[0].float(), ps[1], rtol=1e-6, atol=0)


def test_the_choice_survives_copies() -> None:
    optimizer, _ = one_step(implementation="eager")
    assert copy.deepcopy(optimizer).implementation == "eager"
    assert pickle.loads(pickle.dumps(optimizer)).implementation == "eager"
    optimizer.implementation = None
    with pytest.raises(ValueError, match="implementation must be one of None, 'eager', 'cpu', 'triton', got 'gpu'"):
        optimizer.implementation = "gpu"


def test_vrsgd_is_swept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """No optimizer of the two families falls back silently."""
    assert {"lars", "lamb", "vrsgd", "vrlamb"} <= set(SWEPT)
    assert not {"mclr", "cblr", "cowclip"} & set(SWEPT)
    monkeypatch.setattr(
        "trustratio.optimizers.kernels.eager.cut_into_chunks", lambda layout: pytest.fail("tensor operations")
    )
    for name in SWEPT:
        run(name, "cpu", steps=1)
