"""More elements than 32-bit numbers count: in one layer, in one flat partition; and more layers than there are blocks.

A layer's elements repeat a short pattern. Then the trust ratio and every element's step are those of the pattern, which
a float64 reference computes in no time. A rehearsal has the same layers with fewer repetitions.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trustratio.optimizers import LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from ..reference import REFERENCES
from .cases import BF16, LR, assert_close

Tensor = torch.Tensor

OPTIONS: dict[str, Any] = {"lr": LR, "weight_decay": 0.1}
STATE = {"lamb": 2, "lans": 2, "lars": 1}
"""Tensors of the layer's size, in fp32."""


@pytest.fixture(autouse=True)
def _give_back_memory() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def repetitions(device: str) -> tuple[int, int]:
    """Rows, and elements of a row: a little more than 2^31 in all."""
    return (2051, 1 << 20) if device == "cuda" else (11, 1 << 9)


def need(device: str, elements: int, bytes_each: int) -> None:
    """Skip where there is no memory for it, with 3 GiB for what comes and goes."""
    if device == "cuda":
        free, wanted = torch.cuda.mem_get_info()[0], elements * bytes_each + (3 << 30)
        if free < wanted:
            pytest.skip(f"needs {wanted / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")


def pattern(columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def repeated(row: Tensor, rows: int, device: str) -> Tensor:
    return row.to(device).expand(rows, -1).contiguous()


def expected_rows(
    name: str, start: Tensor, gradients: list[Tensor], found: list[Tensor], options: dict[str, Any] = OPTIONS
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pattern before each step, as it was found, and after it."""
    state: dict[str, Any] = {}
    for before, g in zip([start, *found], gradients, strict=False):
        w = before.double()[None]
        yield before.double(), REFERENCES[name](w, g.double()[None], state, **options)[0][0]


def assert_rows_are_all(rows: Tensor, expected: Tensor) -> None:
    """No row is left out."""
    differ = [(rows[at : at + 64] != expected).any(dim=1).sum() for at in range(0, len(rows), 64)]
    assert int(torch.stack(differ).sum()) == 0


@pytest.mark.parametrize(("name", "dtype"), [("lamb", BF16), ("lars", torch.float32), ("lans", BF16)])
def test_a_layer_of_more_than_two_to_the_31_elements(name: str, dtype: torch.dtype, device: str) -> None:
    rows, columns = repetitions(device)
    need(device, rows * columns, 2 * dtype.itemsize + 4 * STATE[name])
    start = pattern(columns, 0, dtype)
    gradients = [pattern(columns, seed, dtype) for seed in (1, 2)]
    p = torch.nn.Parameter(repeated(start, rows, device))
    optimizer = create_optimizer(name, [p], implementation="triton", **OPTIONS)
    found: list[Tensor] = []
    for g in gradients:
        p.grad = None  # its memory first
        p.grad = repeated(g, rows, device)
        optimizer.step()
        found.append(p.detach()[-1].cpu().clone())
        assert_rows_are_all(p.detach(), p.detach()[-1].clone())
    # LANS divides gradients by the norm of the layer, beside which eps is as much larger as the norm is.
    options = {**OPTIONS, "eps": 1e-6 * rows**0.5} if name == "lans" else OPTIONS
    for (before, expected), after in zip(expected_rows(name, start, gradients, found, options), found, strict=True):
        assert_close(after, expected, before)


def flat_partition(device: str, lengths: list[int], gap: int) -> tuple[torch.nn.Parameter, list[Shard], int]:
    """A flat tensor as ZeRO has it: layers one after another with padding between them, which nobody may touch."""
    shards, start = [], 0
    for index, length in enumerate(lengths):
        shards.append(Shard(index, start, 0, length))
        start += length + gap
    return torch.nn.Parameter(torch.full((start,), torch.nan, device=device)), shards, start


def test_a_flat_partition_of_more_than_two_to_the_31_elements(device: str) -> None:
    """The layers behind the large one begin where 32 bits do not reach."""
    rows, columns = repetitions(device)
    lengths, gap = [rows * columns, 3 * columns, 7 * columns], 5
    need(device, sum(lengths), 4 * (2 + STATE["lamb"]))
    flat, shards, total = flat_partition(device, lengths, gap)
    layers = tuple(Layer(f"layer{i}", (length // columns, columns), 0, flat) for i, length in enumerate(lengths))
    layout = Layout("test", (flat,), (0,), layers, tuple(shards), placed=True)
    optimizer = create_optimizer("lamb", [flat], implementation="triton", **OPTIONS)
    optimizer._plans.add(Plan.of(optimizer, layout, [flat]))
    flat.grad = torch.full((total,), torch.nan, device=device)

    def part(tensor: Tensor, index: int) -> Tensor:
        return tensor[shards[index].start :][: lengths[index]].view(-1, columns)

    starts = [pattern(columns, 10 + i, torch.float32) for i in range(len(lengths))]
    for i, row in enumerate(starts):
        part(flat.detach(), i).copy_(row.to(device).expand(lengths[i] // columns, -1))
    found: list[list[Tensor]] = [[] for _ in lengths]
    gradients = [[pattern(columns, 20 + 10 * step + i, torch.float32) for i in range(len(lengths))] for step in (0, 1)]
    for of_step in gradients:
        for i, row in enumerate(of_step):
            part(flat.grad, i).copy_(row.to(device).expand(lengths[i] // columns, -1))
        optimizer.step()
        for i in range(len(lengths)):
            assert_rows_are_all(part(flat.detach(), i), part(flat.detach(), i)[-1].clone())
            found[i].append(part(flat.detach(), i)[-1].cpu().clone())
    for i, of_layer in enumerate(found):
        steps = expected_rows("lamb", starts[i], [of_step[i] for of_step in gradients], of_layer)
        for (before, expected), after in zip(steps, of_layer, strict=True):
            assert_close(after, expected, before, f"layer{i}")
    for shard, length in zip(shards, lengths, strict=True):
        assert flat[shard.start + length :][:gap].isnan().all()
    assert_state_is_only_in_layers(optimizer, flat, shards, gap)


def assert_state_is_only_in_layers(
    optimizer: LayerwiseOptimizer, flat: torch.nn.Parameter, shards: list[Shard], gap: int
) -> None:
    kept = [v for v in optimizer.state[flat].values() if isinstance(v, Tensor) and v.shape == flat.shape]
    assert len(kept) == STATE["lamb"]
    for value in kept:
        for shard in shards:
            assert value[shard.start + shard.length - 1] != 0
            assert (value[shard.start + shard.length :][:gap] == 0).all()


@pytest.mark.parametrize("name", ["lamb", "lars", "lans"])
def test_ten_thousand_tiny_layers(name: str, device: str) -> None:
    """Of twenty kinds, in an order in which neighbours differ; every one is as the reference of its kind."""
    count, kinds = (10_000 if device == "cuda" else 30), 20
    kind_of = [7 * index % kinds for index in range(count)]
    starts = [pattern(15, seed, torch.float32).view(5, 3) for seed in range(kinds)]
    weights = torch.stack([starts[kind] for kind in kind_of]).to(device)
    parameters = [torch.nn.Parameter(w) for w in weights.unbind()]
    optimizer = create_optimizer(name, parameters, implementation="triton", **OPTIONS)
    states: list[dict[str, Any]] = [{} for _ in range(kinds)]
    expected = [start.double() for start in starts]
    for step in range(2):
        before = expected
        rows = [pattern(15, 100 + kinds * step + kind, torch.float32).view(5, 3) for kind in range(kinds)]
        gradients = torch.stack([rows[kind] for kind in kind_of]).to(device)
        for p, g in zip(parameters, gradients.unbind(), strict=True):
            p.grad = g
        optimizer.step()
        after = torch.stack([p.detach() for p in parameters]).cpu()
        expected = [
            REFERENCES[name](before[kind], rows[kind].double(), states[kind], **OPTIONS)[0] for kind in range(kinds)
        ]
        wanted = torch.stack([expected[kind] for kind in kind_of])
        assert_close(after, wanted, torch.stack([before[kind] for kind in kind_of]))
        expected = [after[kind_of.index(kind)].double() for kind in range(kinds)]
