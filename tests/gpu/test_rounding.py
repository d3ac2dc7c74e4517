"""State and weights of sixteen bits on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LayerwiseOptimizer
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from .cases import BF16, INTERPRETED, PLAIN, captured, make, without_waiting

MASTERS = (None, "stochastic", "kahan")
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
def test_rounding_is_that_of_tensor_operations(name: str, dtype: torch.dtype, master: str | None, device: str) -> None:
    if INTERPRETED and dtype is BF16 and master is None:
        pytest.skip("Triton's interpreter cuts off bits of bf16 where a device rounds")
    found = make_rounding(name, device, dtype, master, implementation="triton")
    expected = make_rounding(name, "cpu", dtype, master, implementation="eager")
    for _ in range(2):
        found[1].step()
        expected[1].step()
    compare_kept(found, expected, 1e-5)


@pytest.mark.parametrize("master", MASTERS)
def test_parts_of_a_layer_have_the_bits_of_the_whole(master: str | None, device: str) -> None:
    """Compared without ratios, whose sums are added in another order."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(8, 517, generator=generator).to(BF16) for _ in range(2))
    results = []
    for columns in (slice(0, 517), slice(33, 233)):
        p = torch.nn.Parameter(start[:, columns].clone(memory_format=torch.contiguous_format).to(device))
        shard = Shard(0, 0, columns.start, p.numel(), 7 * 517 + columns.stop - columns.start)
        layout = Layout("test", (p,), (0,), (Layer("layer", (8, 517), 0, p),), (shard,), placed=True)
        optimizer = LAMB([p], adapt=False, state_dtype="bfloat16", master=master, implementation="triton")
        optimizer._plans.add(Plan.of(optimizer, layout, [p]))
        for _ in range(3):
            p.grad = gradient[:, columns].contiguous().to(device)
            optimizer.step()
        kept = [p.detach(), *(value for value in optimizer.state[p].values() if value.shape == p.shape)]
        results.append([value[:, slice(33, 233)] if columns.start == 0 else value for value in kept])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_that_rounds_does_not_wait_for_the_device(name: str, master: str | None, on_gpu: None) -> None:
    _, optimizer = make_rounding(name, "cuda", BF16, master, implementation="triton")
    for _ in range(3):  # the first one with gradients counts lost updates, where weights have no master
        optimizer.step()
    with without_waiting():
        optimizer.step()


@pytest.mark.parametrize("master", MASTERS)
def test_a_captured_step_rounds_anew_at_each_replay(master: str | None, on_gpu: None) -> None:
    """With the chances that steps without a graph have."""
    lr = torch.tensor(0.05, device="cuda")
    found, expected = (make_rounding("lamb", "cuda", BF16, master, lr=lr, implementation="triton") for _ in range(2))
    graph = captured(found[1], steps_before=3)
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        expected[1].step()
    wanted = kept_numbers(*expected)
    assert all(torch.equal(value, wanted[key]) for key, value in kept_numbers(*found).items())


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
def test_numbers_that_are_not_finite(master: str, device: str) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 64, device=device, dtype=BF16))
    optimizer = LAMB([p], adapt=False, state_dtype="bfloat16", master=master, implementation="triton")
    p.grad = torch.ones_like(p)
    p.grad[3], p.grad[4], p.grad[5] = torch.nan, torch.inf, -torch.inf
    optimizer.step()
    m = optimizer.state[p]["exp_avg"]
    assert m.view(torch.int16)[3].item() == 0x7FC0
    assert m[4].item() == torch.inf
    assert m[5].item() == -torch.inf
    assert p.isnan().tolist() == [index in (3, 4, 5) for index in range(64)]


@pytest.mark.parametrize("offset", [(1 << 31) - 700, (1 << 32) + 77, 1 << 40])
@pytest.mark.parametrize("master", ["stochastic", "kahan"])
def test_chances_far_into_a_layer(master: str, offset: int, device: str) -> None:
    """Positions of more than 31 and 32 bits, in several blocks; without ratios, whose sums have another order."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5000, generator=generator).to(BF16) for _ in range(2))
    results = []
    for where, implementation in ((device, "triton"), ("cpu", "eager")):
        p = torch.nn.Parameter(start.clone().to(where))
        layer = Layer("layer", (1 << 41,), 0, p)
        layout = Layout("test", (p,), (0,), (layer,), (Shard(0, 0, offset, p.numel()),), placed=True)
        optimizer = LAMB([p], adapt=False, state_dtype="bfloat16", master=master, implementation=implementation)
        optimizer._plans.add(Plan.of(optimizer, layout, [p]))
        for _ in range(2):
            p.grad = gradient.to(where)
            optimizer.step()
        results.append(([p], optimizer))
    compare_kept(*results, 1e-5)
