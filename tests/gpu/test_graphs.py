"""Steps in CUDA graphs: replays, other steps between them, and captures that are refused."""

from __future__ import annotations

import pytest
import torch

from .cases import assert_same, captured, make

pytestmark = pytest.mark.usefixtures("on_gpu")

CAPTURED = (
    *("lamb", "lars", "lans", "lambc", "novograd", "sngm", "tvlars"),
    *("stableadamw", "adabelief", "fastadabelief"),
)


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_replays(name: str) -> None:
    lr = torch.tensor(0.05, device="cuda")
    parameters, optimizer = make(name, "cuda", lr=lr, implementation="triton")
    expected, reference = make(name, "cpu", lr=0.05, implementation="eager")
    graph = captured(optimizer)
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        reference.step()
    assert_same(parameters, expected, 1e-5)
    assert optimizer.state[parameters[0]]["step"].item() == 5


def test_a_replay_reads_the_rate_and_the_gradients_that_are_there() -> None:
    lr = torch.tensor(0.05, device="cuda")
    parameters, optimizer = make("lamb", "cuda", lr=lr, implementation="triton")
    expected, reference = make("lamb", "cpu", lr=0.05, implementation="eager")
    graph = captured(optimizer)
    for _ in range(2):
        reference.step()
    for p, w in zip(parameters, expected, strict=True):
        p.grad.mul_(-0.5)
        w.grad.mul_(-0.5)
    lr.fill_(0.01)
    reference.param_groups[0]["lr"] = 0.01
    graph.replay()
    reference.step()
    assert_same(parameters, expected, 1e-5)


def test_a_captured_step_outlives_other_steps() -> None:
    """Steps with gradients elsewhere, or with none for some layers, between replays."""
    lr = torch.tensor(0.05, device="cuda")
    parameters, optimizer = make("lamb", "cuda", lr=lr, implementation="triton")
    expected, reference = make("lamb", "cuda", lr=0.05, implementation="eager")
    graph = captured(optimizer)
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


def test_a_captured_step_outlives_its_plan() -> None:
    """A group that is added makes another one; a replay reads the numbers of layers that it was captured with."""
    lr = torch.tensor(0.05, device="cuda")
    parameters, optimizer = make("lamb", "cuda", lr=lr, implementation="triton")
    expected, reference = make("lamb", "cuda", lr=0.05, implementation="eager")
    graph = captured(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(8, device="cuda"))]})
    optimizer.step()
    garbage = [torch.full((1 << k,), -1, dtype=torch.int64, device="cuda") for k in range(12) for _ in range(8)]
    graph.replay()
    del garbage
    for _ in range(4):
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
