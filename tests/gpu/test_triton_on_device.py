"""The sweeps of triton_kernels.py on a CUDA device: results, no synchronisation, graph capture, rounding to bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from ..swept import SWEPT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ((4097, 3), (3, 11), (17,), (), (1000, 1024))
PLAIN = [name for name in SWEPT if OPTIMIZERS[name].group_statistics is None]


def make(
    name: str, device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[torch.nn.Parameter], LayerwiseOptimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return parameters, create_optimizer(name, parameters, **{"lr": 0.05, **options})


def assert_same(found: list[torch.nn.Parameter], expected: list[torch.nn.Parameter], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        wanted = b.detach().cpu().double()
        assert (a.detach().cpu().double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_tensor_operations(name: str, dtype: torch.dtype) -> None:
    parameters, optimizer = make(name, "cuda", dtype, implementation="triton")
    expected, reference = make(name, "cpu", dtype, implementation="eager")
    for _ in range(3):
        optimizer.step()
        reference.step()
    assert_same(parameters, expected, 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    _, optimizer = make(name, "cuda", implementation="triton")
    for _ in range(2):  # compiles, and sends tables to the device
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_replays() -> None:
    lr = torch.tensor(0.05, device="cuda")
    parameters, optimizer = make("lamb", "cuda", lr=lr, implementation="triton")
    expected, reference = make("lamb", "cuda", lr=0.05, implementation="eager")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        reference.step()
    assert_same(parameters, expected, 1e-5)
    assert optimizer.state[parameters[0]]["step"].item() == 5


def test_a_captured_step_outlives_other_steps() -> None:
    """Steps with gradients elsewhere, or with none for some layers, between replays."""
    lr = torch.tensor(0.05, device="cuda")
    parameters, optimizer = make("lamb", "cuda", lr=lr, implementation="triton")
    expected, reference = make("lamb", "cuda", lr=0.05, implementation="eager")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    in_place = [p.grad for p in parameters]
    for step in range(12):
        for index, p in enumerate(parameters):
            p.grad = None if step >> index & 1 else in_place[index].clone()
        optimizer.step()
    garbage = [torch.full((1 << k,), -1, dtype=torch.int64, device="cuda") for k in range(12) for _ in range(8)]
    graph.replay()
    del garbage
    for step in range(16):
        for index, p in enumerate(expected):
            left_out = 3 <= step < 15 and (step - 3) >> index & 1
            p.grad = None if left_out else in_place[index].clone()
        reference.step()
    assert_same(parameters, expected, 1e-5)


def test_a_capture_that_would_need_new_tables_is_refused() -> None:
    parameters, optimizer = make("lamb", "cuda", lr=torch.tensor(0.05, device="cuda"), implementation="triton")
    for _ in range(2):
        optimizer.step()
    kept = parameters[0].grad  # so that the new one has another address
    parameters[0].grad = kept.clone()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="pointers of gradients changed"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_on_another_device_than_the_current_one() -> None:
    parameters, optimizer = make("lamb", "cuda:1", implementation="triton")
    expected, reference = make("lamb", "cpu", implementation="eager")
    for _ in range(2):
        optimizer.step()
        reference.step()
    assert_same(parameters, expected, 1e-6)


def test_the_same_bits_every_time() -> None:
    results = []
    for _ in range(2):
        parameters, optimizer = make("lamb", "cuda", implementation="triton")
        optimizer.step()
        results.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gpu_is_chosen_by_itself() -> None:
    pytest.importorskip("triton")
    parameters, _ = make("lamb", "cuda")
    optimizer = LAMB(parameters)
    optimizer.step()
    assert ("pointers",) in next(iter(optimizer._plans.values())).cache


# In bf16 ------------------------------------------------------------------------------------------------------------

MASTERS = (None, "stochastic", "kahan")
BF16 = torch.bfloat16
KEPT = [(torch.float32, None), *((BF16, master) for master in MASTERS)]


def make_rounding(name: str, device: str, dtype: torch.dtype, master: str | None, **options: Any) -> Any:
    return make(name, device, dtype, **{"state_dtype": "bfloat16", "master": master, **options})


def kept_numbers(parameters: list[torch.nn.Parameter], optimizer: LayerwiseOptimizer) -> dict[str, torch.Tensor]:
    """Weights, with their compensations added, and element-wise state, each as one vector."""
    states = [optimizer.state[p] for p in parameters]
    weights = [
        p.detach().double() + state.get("compensation", p.new_zeros(())).double()
        for p, state in zip(parameters, states, strict=True)
    ]
    found = {"weights": torch.cat([w.reshape(-1) for w in weights])}
    for key in optimizer.element_state:
        found[key] = torch.cat([state[key].reshape(-1).double() for state in states])
    return {key: value.cpu() for key, value in found.items()}


def compare_kept(found: Any, expected: Any, tolerance: float, share: float = 1e-3) -> None:
    """But for a few, numbers are equal: compiled code fuses products and sums, and chance may then fall otherwise."""
    wanted = kept_numbers(*expected)
    for key, value in kept_numbers(*found).items():
        scale = wanted[key].abs().clamp(min=wanted[key].abs().mean())
        distance = (value - wanted[key]).abs()
        assert (distance > tolerance * scale).double().mean() <= share, key
        assert distance.max() <= 2**-6 * wanted[key].abs().max(), key


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("dtype", "master"), KEPT)
def test_rounding_is_that_of_tensor_operations(name: str, dtype: torch.dtype, master: str | None) -> None:
    found = make_rounding(name, "cuda", dtype, master, implementation="triton")
    expected = make_rounding(name, "cpu", dtype, master, implementation="eager")
    for _ in range(2):
        found[1].step()
        expected[1].step()
    compare_kept(found, expected, 1e-5)


@pytest.mark.parametrize("master", MASTERS)
def test_parts_of_a_layer_have_the_bits_of_the_whole(master: str | None) -> None:
    """Compared without ratios, whose sums are added in another order."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(64, 517, generator=generator).to(BF16) for _ in range(2))
    results = []
    for columns in (slice(0, 517), slice(33, 233)):
        p = torch.nn.Parameter(start[:, columns].contiguous().cuda())
        shard = Shard(0, 0, columns.start, p.numel(), 63 * 517 + columns.stop - columns.start)
        layout = Layout("test", (p,), (0,), (Layer("layer", (64, 517), 0, p),), (shard,), placed=True)
        optimizer = LAMB([p], adapt=False, state_dtype="bfloat16", master=master, implementation="triton")
        optimizer._plans.add(Plan.of(optimizer, layout, [p]))
        for _ in range(3):
            p.grad = gradient[:, columns].contiguous().cuda()
            optimizer.step()
        kept = [p.detach(), *(value for value in optimizer.state[p].values() if value.shape == p.shape)]
        results.append([value[:, slice(33, 233)] if columns.start == 0 else value for value in kept])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_that_rounds_does_not_wait_for_the_device(name: str, master: str | None) -> None:
    _, optimizer = make_rounding(name, "cuda", BF16, master, implementation="triton")
    for _ in range(3):  # the first one with gradients counts lost updates, where weights have no master
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("master", MASTERS)
def test_a_captured_step_rounds_anew_at_each_replay(master: str | None) -> None:
    """With the chances that steps without a graph have."""
    lr = torch.tensor(0.05, device="cuda")
    found, expected = (make_rounding("lamb", "cuda", BF16, master, lr=lr, implementation="triton") for _ in range(2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            found[1].step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found[1].step()
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        expected[1].step()
    wanted = kept_numbers(*expected)
    assert all(torch.equal(value, wanted[key]) for key, value in kept_numbers(*found).items())


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
def test_numbers_that_are_not_finite_on_the_device(master: str) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 64, device="cuda", dtype=BF16))
    optimizer = LAMB([p], adapt=False, state_dtype="bfloat16", master=master, implementation="triton")
    p.grad = torch.ones_like(p)
    p.grad[3], p.grad[4], p.grad[5] = torch.nan, torch.inf, -torch.inf
    optimizer.step()
    m = optimizer.state[p]["exp_avg"]
    assert m.view(torch.int16)[3].item() == 0x7FC0
    assert m[4].item() == torch.inf
    assert m[5].item() == -torch.inf
    assert p.isnan().tolist() == [index in (3, 4, 5) for index in range(64)]
