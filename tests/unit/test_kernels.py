"""Sweeps against tensor operations: the same step whoever computes it, however tensors lie in memory."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, OPTIMIZERS, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.formulas import updates
from trustratio.optimizers.formulas.layer_table import LayerTable
from trustratio.optimizers.kernels import choice, cpu, interface
from trustratio.optimizers.kernels.interface import Operands
from trustratio.optimizers.sharding.layout import Layer, Layout, LayoutError, Shard
from trustratio.optimizers.stepping.plan import Plan

from ..swept import SWEPT
from .test_generic import all_variants, backward, make_gradients, make_parameters, train, values

Tensor = torch.Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")

BLOCK = 16384
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks": (BLOCK + 1, 2),
    "odd": (3, 11),
    "bias": (17,),
    "scalar": (),
    "empty_rows": (40, 1024),
}
LR = 0.05

needs_compiler = pytest.mark.skipif(cpu.KERNELS.missing() is not None, reason="built without a C compiler")


@pytest.fixture(autouse=True)
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are shared among threads too."""
    monkeypatch.setattr(cpu, "ELEMENTS_PER_THREAD", 1000)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(name: str, implementation: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    parameters = make_parameters(dtype, SHAPES)
    given = {"lr": LR, "weight_decay": 0.1, **options}
    optimizer = create_optimizer(name, list(parameters.items()), implementation=implementation, **given)
    for step in range(steps):
        gradients = make_gradients(step, parameters)
        gradients["empty_rows"][:, 20 + step :] = 0.0  # whole blocks without gradient, fewer each time
        if step == 1:
            del gradients["bias"]
        optimizer.zero_grad()
        backward(parameters, gradients)
        optimizer.step()
    return parameters, optimizer


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for layer in a:
        wanted, got = b[layer].detach().double(), a[layer].detach().double()
        assert (got - wanted).norm() <= tolerance * wanted.norm(), layer


def states(optimizer: LayerwiseOptimizer, parameters: dict[str, torch.nn.Parameter], name: str) -> dict[str, Tensor]:
    return {layer: optimizer.state[p][name] for layer, p in parameters.items()}


# The same result ----------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "vrlamb"])
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
    expected = {name: run(name, "eager")[0] for name in ("lars", "lans", "vrlamb")}
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


# Layers in flat tensors ---------------------------------------------------------------------------------------------


def flat_run(name: str, implementation: str, lengths: Sequence[int], gaps: Sequence[int]) -> dict[str, Tensor]:
    """Steps over one flat tensor with layers at odd places and NaN between them."""
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths) + sum(gaps)
    flat = torch.nn.Parameter(torch.full((total,), torch.nan))
    optimizer = create_optimizer(name, [flat], lr=LR, weight_decay=0.1, implementation=implementation, adapt=True)
    layers, shards, start = [], [], 0
    for index, (length, gap) in enumerate(zip(lengths, gaps, strict=True)):
        start += gap
        layers.append(Layer(f"layer{index}", (length,), 0, flat))
        shards.append(Shard(index, start, 0, length))
        with torch.no_grad():
            flat[start : start + length] = torch.randn(length, generator=generator)
        start += length
    layout = Layout("test", (flat,), (0,), tuple(layers), tuple(shards))
    optimizer._plans[(id(flat),)] = Plan.of(layout, [flat])
    for _ in range(3):
        flat.grad = torch.full((total,), torch.nan)
        for index, shard in enumerate(shards):
            part = flat.grad[shard.start : shard.start + shard.length]
            part.copy_(torch.randn(shard.length, generator=generator) * (index != 2))
        optimizer.step()
    outside = torch.ones(total, dtype=torch.bool)
    for shard in shards:
        outside[shard.start : shard.start + shard.length] = False
    assert flat[outside].isnan().all()
    state = optimizer.state[flat]
    for key in optimizer.element_state:
        assert (state[key][outside] == 0).all()  # never written
    assert state["layers"]["step"].tolist() == [0.0 if index == 2 else 3.0 for index in range(len(lengths))]
    return {layer.name: flat[s.start : s.start + s.length] for layer, s in zip(layers, shards, strict=True)}


@needs_compiler
@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "tvlars"])
def test_odd_starts_and_lengths_and_poisoned_padding(name: str) -> None:
    lengths, gaps = [1, 15, 33, BLOCK, 2 * BLOCK + 7, 16, 5], [3, 0, 1, 2, 1, 0, 9]
    assert_close(flat_run(name, "cpu", lengths, gaps), flat_run(name, "eager", lengths, gaps), 1e-6)


class _Ranks:
    """Adds up over ranks that are threads."""

    def __init__(self, count: int):
        self.sums: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def add(self, rank: int, sums: Tensor) -> Tensor:
        self.sums[rank] = sums
        self.barrier.wait()
        total = torch.stack([part for part in self.sums if part is not None]).sum(dim=0)
        self.barrier.wait()
        return total


def sharded_run(name: str, implementation: str) -> tuple[Tensor, Tensor]:
    """Three steps of two ranks that hold a half of every layer each; the weights and those of whole layers."""
    generator = torch.Generator().manual_seed(2)
    lengths = (2 * BLOCK + 6, 34, 20, 2 * BLOCK)
    whole = [torch.randn(length, generator=generator) for length in lengths]
    gradients = [[torch.randn(length, generator=generator) for length in lengths] for _ in range(3)]
    for number, step in enumerate(gradients):
        if number:  # once there is momentum
            step[0][: BLOCK + 3] = 0.0  # all that rank 0 has of the layer
        step[2][:] = 0.0  # no gradient anywhere
        step[3][BLOCK + 100 :] = 0.0
    ranks = _Ranks(2)
    results: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        def half(tensors: list[Tensor]) -> Tensor:
            return torch.cat([t.view(2, -1)[rank] for t in tensors])

        flat = torch.nn.Parameter(half(whole))
        layers = tuple(Layer(f"layer{i}", (length,), 0, flat) for i, length in enumerate(lengths))
        starts = [sum(lengths[:i]) // 2 for i in range(len(lengths))]
        shards = tuple(
            Shard(i, start, rank * n // 2, n // 2) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
        )
        optimizer = create_optimizer(name, [flat], lr=LR, weight_decay=0.1, implementation=implementation)
        optimizer.param_groups[0]["adapt"] = True
        every_layer = tuple(range(len(lengths)))
        layout = _ThreadedLayout("test", (flat,), (0,), layers, shards, ((ranks, every_layer),))
        object.__setattr__(layout, "rank", rank)
        optimizer._plans[(id(flat),)] = Plan.of(layout, [flat])
        for step in gradients:
            flat.grad = half(step)
            optimizer.step()
        results[rank] = flat.detach()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [torch.nn.Parameter(w.clone()) for w in whole]
    optimizer = create_optimizer(name, expected, lr=LR, weight_decay=0.1, implementation="eager")
    optimizer.param_groups[0]["adapt"] = True
    for step in gradients:
        for p, g in zip(expected, step, strict=True):
            p.grad = g
        optimizer.step()
    parts = [torch.cat([p.detach().view(2, -1)[rank] for p in expected]) for rank in range(2)]
    return torch.cat([results[0], results[1]]), torch.cat(parts)


class _ThreadedLayout(Layout):
    def reduce(self, sums: Tensor, layer_of_column: Tensor | None = None) -> Tensor:
        ranks: Any = self.reductions[0][0]
        return ranks.add(self.rank, sums)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "novograd", "tvlars"])
@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_layers_whose_gradient_is_zero_on_one_rank(name: str, implementation: str) -> None:
    """Blocks that the first sweep left out are caught up on, unless no rank has a gradient."""
    found, expected = sharded_run(name, implementation)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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


# Measured and applied in one go -------------------------------------------------------------------------------------

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
    assert len(small_cache) == 6  # steps of two groups
    assert small_cache[:2] == {"lars": [5, 3]}.get(name, [8, 3])
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
@pytest.mark.parametrize("name", ["lamb", "lans", "lars"])
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
    sums = {name: torch.rand(layers, generator=generator, dtype=torch.float64).mul_(9).exp_() for name in "wgu"}
    for name, first in (("w", 0), ("g", 10), ("u", 20)):
        sums[name][first : first + 3] = torch.tensor([0.0, torch.inf, torch.nan])
    table = LayerTable([None] * layers, torch.rand(layers, generator=generator) < 0.9, {})  # type: ignore[list-item]
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
    ]
    for options in rules:
        rule, struct = updates.TrustRule(table.adapt, **options), cpu._Rule()
        alive = cpu._fill(struct, rule, of_update, form)
        columns = zip(*(sums[name].tolist() for name in "wgu"), strict=True)
        found = [cpu._compiled().trustratio_ratio(struct, layer, *column) for layer, column in enumerate(columns)]
        assert len(alive) == 2
        wanted = rule(table)  # torch's square roots may be off by a bit
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-15, atol=0, equal_nan=True)


# Guarantees ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.group_statistics])
@pytest.mark.parametrize("implementation", ["cpu", "eager"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, implementation: str) -> None:
    parameters = make_parameters()
    optimizer = create_optimizer(name, list(parameters.items()), lr=LR, implementation=implementation)
    train(optimizer, parameters, [0])
    before, state = values(parameters), copy.deepcopy(optimizer.state_dict()["state"])
    gradients = make_gradients(1, parameters)
    gradients["conv"][3, 0, 0] = torch.inf
    optimizer.zero_grad()
    backward(parameters, gradients)
    optimizer.step()
    assert all(torch.equal(parameters[layer], before[layer]) for layer in before)
    for index, expected in state.items():
        found = optimizer.state_dict()["state"][index]
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@needs_compiler
@pytest.mark.parametrize("implementation", ["cpu", "eager"])
def test_state_is_not_written_before_the_groups_are_known_to_be_finite(implementation: str) -> None:
    """LAMB with watched groups: what travels with its only reduction may still stop the step."""
    parameters = make_parameters()
    optimizer = LAMB(list(parameters.items()), implementation=implementation)
    optimizer.collect_group_norms()
    train(optimizer, parameters, [0])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    gradients = make_gradients(1, parameters)
    gradients["bias"][0, 0] = torch.inf
    optimizer.zero_grad()
    backward(parameters, gradients)
    optimizer.step()
    for index, expected in before.items():
        assert all(torch.equal(optimizer.state_dict()["state"][index][key], value) for key, value in expected.items())


@needs_compiler
def test_autograd_sees_that_weights_changed() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([w], lr=0.1, implementation="cpu")
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_tensors_that_move_between_steps() -> None:
    """Wrappers give weights, gradients and state new storage."""
    moved, kept = (torch.nn.Parameter(torch.linspace(-1, 1, 1001).view(7, 143)) for _ in range(2))
    optimizers = [LAMB([p], implementation="cpu") for p in (moved, kept)]
    for step in range(3):
        for p, optimizer in zip((moved, kept), optimizers, strict=True):
            p.grad = torch.linspace(1, 2 + step, 1001).view(7, 143)
            optimizer.step()
        moved.data = moved.data.clone()
        state = optimizers[0].state[moved]
        state["exp_avg"] = state["exp_avg"].t().clone().t() if step else state["exp_avg"].clone()
    assert torch.equal(moved, kept)


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_a_gradient_of_another_shape_is_refused(implementation: str) -> None:
    """Compiled sweeps would read beyond its end."""
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = LAMB([("bias", p)], implementation=implementation)
    p.data = torch.ones(100_000)
    with pytest.raises(LayoutError, match=r"gradient of bias has shape \(4,\), but the parameter has \(100000,\)"):
        optimizer.step()
    assert (p == 1).all()


@needs_compiler
def test_state_of_another_shape_or_device_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = LAMB([("bias", p)], implementation="cpu")
    optimizer.step()
    state = optimizer.state[p]
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(3)
    with pytest.raises(LayoutError, match="the state exp_avg of bias is not cut like the parameter"):
        optimizer.step()
    state["exp_avg"] = torch.zeros(4, device="meta")
    assert cpu.KERNELS.serves(Operands(optimizer._plan().layout, [p], [p.grad], {"exp_avg": [kept]})) == [True]
    assert cpu.KERNELS.serves(Operands(optimizer._plan().layout, [p], [p.grad], {"exp_avg": [state["exp_avg"]]})) == [
        False
    ]


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_tables_of_sets_of_gradients_do_not_pile_up(implementation: str) -> None:
    ps = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(6)]
    optimizer = LAMB(ps, implementation=implementation)
    for step in range(40):
        for bit, p in enumerate(ps):
            p.grad = torch.ones(3, 3) if step >> bit & 1 else None
        optimizer.step()
    (plan,) = optimizer._plans.values()
    recent = [table for table in plan.cache.values() if isinstance(table, interface.Recent)]
    assert recent
    assert all(len(table.made) <= interface.SETS_OF_GRADIENTS for table in recent)
    assert len(plan.cache) < 6


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


@needs_compiler
@pytest.mark.parametrize("steps_before", [0, 1])
def test_steps_in_a_fork(steps_before: int) -> None:
    """Where the threads of torch's OpenMP runtime are gone. Torch itself works there with one thread only."""
    program = f"""
import os, signal, time, torch
from trustratio.optimizers import LAMB
torch.set_num_threads(2)
torch.ones(1000, 1000).exp()  # starts torch's threads
ps = [torch.nn.Parameter(torch.ones(100, 100)) for _ in range(100)]
optimizer = LAMB(ps, implementation="cpu")
for p in ps:
    p.grad = torch.ones(100, 100)
for _ in range({steps_before}):
    optimizer.step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2
optimizer.step()
if child == 0:
    os._exit(0 if all(0 < p[0, 0] < 1 for p in ps) else 1)
for _ in range(100):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.3)
else:
    os.kill(child, signal.SIGKILL)
assert ended and os.waitstatus_to_exitcode(status) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler")
def test_compiled_functions_are_there_where_a_compiler_is() -> None:
    """Their build is optional, so nothing else tells that the C file does not compile."""
    assert cpu.KERNELS.missing() is None


# The choice ---------------------------------------------------------------------------------------------------------


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
    assert not {"mclr", "cowclip"} & set(SWEPT)
    monkeypatch.setattr(
        "trustratio.optimizers.kernels.eager.cut_into_chunks", lambda layout: pytest.fail("tensor operations")
    )
    for name in SWEPT:
        run(name, "cpu", steps=1)
