"""Steps that measure and apply a run of layers in one go, while it is in cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import create_optimizer
from trustratio.optimizers.formulas import updates
from trustratio.optimizers.formulas.layer_table import LayerTable
from trustratio.optimizers.kernels import cpu

from .kernel_runs import BLOCK, LR, assert_close, needs_compiler

pytestmark = [
    pytest.mark.usefixtures("many_threads"),
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
]

STEPS_IN_ONE_GO = [
    pytest.param("lamb", {}, id="lamb"),
    pytest.param("lamb", {"trust_bounds": (0.3, 0.9), "adapt": True}, id="lamb-bounds"),
    pytest.param("lamb", {"adapt": False}, id="lamb-not-adapted"),
    pytest.param("lamb", {"max_grad_norm": 0.5, "grad_averaging": False}, id="lamb-clipped"),
    pytest.param("lambc", {"trust_clip": 0.7, "bias_correction": False}, id="lambc"),
    pytest.param("lans", {"adapt": True}, id="lans"),
    pytest.param("lars", {"weight_decay": 0.0}, id="lars"),
    pytest.param("lars", {"momentum_form": "gradient", "eps": 1e-3, "adapt": True}, id="lars-gradient"),
    pytest.param("lars", {"momentum_form": "unscaled", "nesterov": True}, id="lars-unscaled"),
    pytest.param("lars", {"momentum": 0.0, "adapt": False}, id="lars-not-adapted"),
    # Not the default betas, with which m/d and λw cancel in the layer of one element, so that fp32 has few digits of u.
    pytest.param("adabelief", {"rectify": False, "adapt": True, "betas": (0.8, 0.99)}, id="adabelief"),
    pytest.param("adabelief", {"adapt": None, "decoupled": False}, id="adabelief-rectified"),
    pytest.param("adabelief", {"rectify": False, "adapt": True, "fixed_decay": True}, id="adabelief-fixed-decay"),
    pytest.param(
        "adabelief", {"rectify": False, "adapt": True, "amsgrad": True, "decoupled": False}, id="adabelief-amsgrad"
    ),
    pytest.param("lamb", {"update_clip": 0.7, "adapt": True, "trust_bounds": (0.3, 0.9)}, id="lamb-update-clip"),
    pytest.param("lans", {"update_clip": 0.7}, id="lans-update-clip"),
    pytest.param("stableadamw", {"update_clip": 0.9}, id="stableadamw"),
    pytest.param("stableadamw", {"decay_form": "unclipped"}, id="stableadamw-unclipped"),
    pytest.param("stableadamw", {"decay_form": "fixed"}, id="stableadamw-fixed"),
    pytest.param("fastadabelief", {"adapt": True}, id="fastadabelief"),
    pytest.param("fastadabelief", {"adapt": True, "running_maximum": False}, id="fastadabelief-without-maximum"),
]
# A cache of 64 KiB takes 4,096 elements of LAMB's layers, 8,192 of LARS's: runs of layers that end at both borders, one
# that is just too long, layers that are larger than the cache, one without gradient, one whose gradient is zero.
LENGTHS = (2048, 2048, 1, 4095, 1, 4096, 4097, 17, 3 * BLOCK + 5, 100, 200, 300, 8192, 8191, 1, 5, 33)
NO_GRADIENT, ZERO_GRADIENT, HALF_ZERO = 9, 10, 8


def batched_run(name: str, implementation: str, nan_in: int | None = None, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    ps = [torch.nn.Parameter(torch.randn(n, 1, generator=generator) * (index + 1)) for index, n in enumerate(LENGTHS)]
    groups = [{"params": ps[:12]}, {"params": ps[12:], "lr": 0.37 * LR}]
    optimizer = create_optimizer(name, groups, implementation=implementation, lr=LR, **{"weight_decay": 0.1, **options})
    for step in range(3):
        for index, p in enumerate(ps):
            p.grad = torch.randn(p.shape, generator=generator) / (index + 1)
        ps[NO_GRADIENT].grad = None
        ps[ZERO_GRADIENT].grad.zero_()
        ps[HALF_ZERO].grad[: (step + 1) * BLOCK] = 0.0
        if nan_in is not None and step == 2:
            ps[nan_in].grad[-1] = torch.nan
        optimizer.step()
    return ps, optimizer


def assert_same_bits(a: Any, b: Any) -> None:
    for index, (p, q) in enumerate(zip(a[0], b[0], strict=True)):
        assert torch.equal(p.view(torch.int32), q.view(torch.int32)), index
        found, expected = a[1].state[p], b[1].state[q]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in found), index
    assert a[1].trust_ratios() == pytest.approx(b[1].trust_ratios(), rel=0, abs=0, nan_ok=True)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """64 KiB, and the numbers of batches of each group's step."""
    monkeypatch.setattr(cpu, "cache_bytes", lambda threads: 64 << 10)
    batches: list[int] = []
    step = cpu.CpuSweeps.step

    def counted(self: Any, group: int, *rest: Any) -> Any:
        sums = step(self, group, *rest)
        if sums is not None:
            batches.extend(len(known) - 1 for known in self.tables[group].known_batches.values())
        return sums

    monkeypatch.setattr(cpu.CpuSweeps, "step", counted)
    return batches


@needs_compiler
@pytest.mark.parametrize(("name", "options"), STEPS_IN_ONE_GO)
def test_one_go_equals_two_sweeps(
    name: str, options: dict[str, Any], small_cache: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    found = batched_run(name, "cpu", **options)
    with_three = 12 if len(found[1].element_state) == 3 else 11
    assert small_cache == [{"lars": 8}.get(name, with_three)] * 3  # steps of two groups together
    expected = batched_run(name, "eager", **options)
    by_index = [dict(enumerate(ps)) for ps, _ in (found, expected)]
    assert_close(by_index[0], by_index[1], 1e-6)
    assert found[1].trust_ratios() == pytest.approx(expected[1].trust_ratios(), rel=1e-6)
    monkeypatch.setattr(cpu.CpuSweeps, "step", lambda *_: None)
    swept = batched_run(name, "cpu", **options)
    assert found[1].trust_ratios() == swept[1].trust_ratios()  # of sums with the same bits
    for p, q in zip(found[0], swept[0], strict=True):
        pairs = {"w": (p, q), **{key: (value, swept[1].state[q][key]) for key, value in found[1].state[p].items()}}
        for key, (ours, theirs) in pairs.items():
            assert (ours - theirs).norm() <= 1e-7 * theirs.norm(), key
    generator = torch.Generator().manual_seed(5)
    initial = [torch.randn(n, 1, generator=generator) * (index + 1) for index, n in enumerate(LENGTHS)]
    for untouched in (NO_GRADIENT, ZERO_GRADIENT):
        assert torch.equal(found[0][untouched], initial[untouched])
        assert all((value == 0).all() for value in found[1].state[found[0][untouched]].values())


@needs_compiler
@pytest.mark.parametrize("name", ["lamb", "lans", "lars", "adabelief", "fastadabelief", "stableadamw"])
@pytest.mark.parametrize("nan_in", [None, 4, 8])
def test_one_go_has_the_same_bits_for_any_number_of_threads(
    name: str, nan_in: int | None, small_cache: list[int]
) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(batched_run(name, "cpu", nan_in, adapt=True))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    broken = [index for index, p in enumerate(results[0][0]) if p.isnan().any()]
    assert broken == ([] if nan_in is None else [nan_in])
    if nan_in is not None:
        assert results[0][0][nan_in].isnan().all()  # its ratio is NaN


@needs_compiler
def test_the_ratio_in_c_is_that_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(6)
    layers = 3000
    sums = {name: torch.rand(layers, generator=generator, dtype=torch.float64).mul_(9).exp_() for name in "wguc"}
    for name, first in (("w", 0), ("g", 10), ("u", 20), ("c", 30)):
        sums[name][first : first + 3] = torch.tensor([0.0, torch.inf, torch.nan])
    table = LayerTable([None] * layers, torch.rand(layers, generator=generator) < 0.9, {})  # type: ignore[list-item]
    table.elements = torch.randint(1, 999, (layers,), generator=generator).double()
    for name, vector in sums.items():
        table.receive(name, vector, vector.sum())
    of_update = updates.MomentumUpdate(0.9, 0.1, *torch.ones(2, layers, dtype=torch.float64))
    form = cpu.compiled_update(of_update)
    rules: list[dict[str, Any]] = [
        {"direction": 1.0},
        {"direction": 1.0, "bounds": (0.3, 1.7)},
        {"coefficient": 1e-3, "gradient": 1.0, "weight": 0.3, "constant": 1e-5},
        {"coefficient": 0.7, "gradient": 0.1, "weight": 0.3, "direction": 0.77, "constant": 0.013},
        {"direction": 0.0},
        {"coefficient": 0.0, "update_clip": 1.0},
        {"direction": 1.0, "bounds": (0.3, 1.7), "update_clip": 0.77},
        {"gradient": 1.0, "weight": torch.tensor([0.0, 0.3], dtype=torch.float64).repeat(layers // 2)},
    ]
    for options in rules:
        rule, struct = updates.TrustRule(table.adapt, **options), cpu._Rule()
        alive = cpu._fill(struct, rule, of_update, form, table.elements)
        columns = zip(*(sums[name].tolist() for name in "wguc"), strict=True)
        found = [cpu._compiled().trustratio_ratio(struct, layer, *column) for layer, column in enumerate(columns)]
        assert all(vector.is_contiguous() for vector in alive)
        wanted = rule(table)  # torch's square roots may be off by a bit
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-15, atol=0, equal_nan=True)


@needs_compiler
def test_batches_fit_into_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, second: int, third: int):
            self.trustratio_cache_bytes = {2: second, 3: third}.__getitem__

    def found(second: int, third: int, threads: int) -> int:
        monkeypatch.setattr(cpu, "_compiled", lambda: Library(second, third))
        return cpu.cache_bytes(threads) >> 10

    assert found(2 << 20, 480 << 20, 2) == 4096
    assert found(2 << 20, 480 << 20, 64) == 16384
    assert found(256 << 10, 8 << 20, 2) == 2048
    assert found(256 << 10, 8 << 20, 16) == 4096
    assert found(0, 8 << 20, 2) == 4096
    assert found(0, 0, 2) == 16384
