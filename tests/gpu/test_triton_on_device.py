"""The sweeps of triton_kernels.py on a CUDA device: results, no synchronisation, graph capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS, LayerwiseOptimizer, create_optimizer

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
    assert ("pointers", "weights") in next(iter(optimizer._plans.values())).cache
