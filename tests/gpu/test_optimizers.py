"""Every optimizer on a device, in three dtypes, against the float64 references; the others' bits stay the same."""

from __future__ import annotations

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS

from .cases import PLAIN, Steps, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_the_reference(name: str, dtype: torch.dtype, device: str) -> None:
    """A layer's gradient is missing at the second step; the last one starts from weights that have moved."""
    steps = Steps(name, device, dtype)
    steps.step(0)
    steps.step(1, without=("odd",))
    steps.step(2)


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_bits_every_time(name: str, device: str) -> None:
    results = []
    for _ in range(2):
        parameters, optimizer = make(name, device, implementation="triton")
        for _ in range(2):
            optimizer.step()
        results.append(([p.detach().clone() for p in parameters], optimizer))  # kept: the second lies elsewhere
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_the_gpu_is_chosen_by_itself(on_gpu: None) -> None:
    pytest.importorskip("triton")
    parameters, _ = make("lamb", "cuda")
    optimizer = LAMB(parameters)
    optimizer.step()
    (plan,) = optimizer._plans.values()
    assert any(key[0] == "pointers" for key in plan.cache)


def test_weights_of_several_dtypes_in_one_optimizer(device: str) -> None:
    """fp64 layers are computed by tensor operations beside the sweeps."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ps = [torch.nn.Parameter(torch.linspace(-1, 1, 35, dtype=dtype).view(5, 7).to(device)) for dtype in dtypes]
    optimizer = LAMB(ps, lr=0.05, implementation="triton")
    wanted = [torch.nn.Parameter(p.detach().cpu().double()) for p in ps]
    reference = LAMB(wanted, lr=0.05, implementation="eager")
    for p in (*ps, *wanted):
        p.grad = torch.ones_like(p)
    optimizer.step()
    reference.step()
    for p, w in zip(ps, wanted, strict=True):
        allowed = max(1e-6, torch.finfo(p.dtype).eps)
        assert (p.detach().cpu().double() - w.detach()).norm() <= allowed * w.detach().norm()
