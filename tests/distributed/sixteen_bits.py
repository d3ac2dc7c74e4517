"""What is kept with 16 bits, bit for bit: training in the workers or in one process, and whole layers put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from trustratio.optimizers import OPTIMIZERS
from trustratio.optimizers.formulas import rounding
from trustratio.optimizers.sharding.local_tensors import local_part
from trustratio.optimizers.sharding.positions import runs

from . import fsdp_runs, megatron_distributed_runs, test_fsdp1
from .cases import Case, CaseRun, LayerSpec
from .exactness import MODEL, two_groups

STEPS = 10
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}

SHARDED_PARAMETERS = ("fsdp1", "fsdp2", "fsdp2 columns", "megatron")
WAYS: tuple[str | int, ...] = ("ddp", 0, 1, 2, 3, *SHARDED_PARAMETERS)
"""How a model may be sharded."""
QUARTERS = tuple(range(4))


def optimizers(quarter: int, way: str | int) -> list[str]:
    """A quarter of all that are exact there."""
    exact = [
        name for name, entry in OPTIMIZERS.items() if way not in SHARDED_PARAMETERS or entry.group_statistics is None
    ]
    return exact[quarter :: len(QUARTERS)]


# A matrix that more than one rank has in part, layers of which some ranks have nothing, cuts at odd places.
LAYERS = (*MODEL, LayerSpec("wide", (3, 29)), LayerSpec("single", (1, 5)))
# FSDP2 cuts the second dimension only where it divides.
COLUMNS = (
    LayerSpec("wide", (5, 12)),
    LayerSpec("long", (17, 6)),
    LayerSpec("conv", (3, 6, 5)),
    LayerSpec("bias", (13,), group=1),
    LayerSpec("scale", (1,), group=1),
)

Kept = dict[str, dict[str, list[tuple[int, torch.Tensor]]]]
"""Layer, what is kept of it ("weight" or a state's name), and runs of it with their positions in the layer."""
Bits = dict[str, dict[str, torch.Tensor]]
"""Layer, what is kept of it, and all of its elements as integers of as many bits."""


TRAINED: dict[str, Bits] = {}
"""What one process has trained already, by the case."""


@dataclass(frozen=True)
class Answer:
    """What one rank has at the end.

    Attributes:
        kept: Weights and element-wise state.
        ratios: Trust ratios of every step.
    """

    kept: Kept
    ratios: list[dict[str, float]]


def make_case(name: str, way: str | int, layers: tuple[LayerSpec, ...] | None = None, **changes: Any) -> Case:
    """A case of ten steps; `options` are those of both groups, `others` of the second alone."""
    layers = layers or (COLUMNS if way == "fsdp2 columns" else LAYERS)
    first, second = two_groups(name, **changes.pop("options", {}))
    groups: tuple[dict[str, Any], ...] = first, {**second, **changes.pop("others", {})}
    if name == "sngm":
        # DeepSpeed steps one group after the other, and the norm of all is its own then, added up in fp32.
        layers, groups = tuple(replace(layer, group=0) for layer in layers), groups[:1]
    changes.setdefault("steps", STEPS)
    return Case(name, layers, way, groups, whole_numbers=True, **changes)


# Inside the workers -------------------------------------------------------------------------------------------------


def train_all(cases: Sequence[Case], mistake: str | None = None, **setup: Any) -> list[Answer]:
    """Train one case after the other; with `mistake` as somebody who has not understood, see `MISTAKES`."""
    with mistaken(mistake):
        return [train(case, **setup) for case in cases]


def train(case: Case, **setup: Any) -> Answer:
    with opened(case, **setup) as (run, optimizer):
        run.train(0, case.steps)
        return Answer(kept(optimizer), run.ratios)


@contextmanager
def opened(case: Case, **setup: Any) -> Iterator[tuple[Any, Any]]:
    if case.stage == "megatron":
        with megatron_distributed_runs.running(case, **setup) as run:
            yield run, run.inner
        return
    run = _opened(case, setup)
    try:
        yield run, run.optimizer
    finally:
        run.close()


def _opened(case: Case, setup: dict[str, Any]) -> Any:
    if case.stage == "fsdp1":
        return test_fsdp1.Run(case, test_fsdp1.Setup(**setup))
    if case.stage == "fsdp2":
        return fsdp_runs.Run(case, fsdp_runs.Setup(**setup))
    if case.stage == "fsdp2 columns":
        return fsdp_runs.Run(case, fsdp_runs.Setup(options={"shard_placement_fn": fsdp_runs.second_dimension}, **setup))
    return CaseRun(case)


def kept(optimizer: Any) -> Kept:
    found: Kept = {}
    for plan in optimizer._plans.values():
        for shard in plan.layout.shards:
            layer = plan.layout.layers[shard.layer]
            tensor = plan.layout.tensors[layer.tensor]
            state = optimizer.state[tensor]
            names = [name for name in (*optimizer.element_state, "compensation") if name in state]
            for name, values in [("weight", tensor), *((name, state[name]) for name in names)]:
                part = local_part(values).detach()
                flat, of_layer = part.reshape(-1), found.setdefault(layer.name, {}).setdefault(name, [])
                for start, position, length in runs(layer, shard, tuple(part.shape)):
                    of_layer.append((position, flat[start : start + length].clone()))
    return found


# Put together -------------------------------------------------------------------------------------------------------


def whole(answers: Sequence[Answer]) -> Bits:
    """All elements of every layer; ranks that hold the same must agree about it."""
    bits: Bits = {}
    pieces = [
        (layer, name, runs_of_it) for a in answers for layer, of in a.kept.items() for name, runs_of_it in of.items()
    ]
    ends: dict[tuple[str, str], int] = {}
    for layer, name, found in pieces:
        ends[layer, name] = max([ends.get((layer, name), 0), *(position + len(values) for position, values in found)])
    known = {key: torch.zeros(end, dtype=torch.bool) for key, end in ends.items()}
    for layer, name, found in pieces:
        for position, values in found:
            integers = values.view(INTEGERS[values.dtype])
            of_layer = bits.setdefault(layer, {})
            elements = of_layer.setdefault(name, integers.new_zeros(ends[layer, name]))
            here = slice(position, position + len(values))
            is_known = known[layer, name][here]
            assert torch.equal(elements[here][is_known], integers[is_known]), f"ranks disagree about {layer}: {name}"
            elements[here] = integers
            is_known[:] = True
    assert all(all_of_it.all() for all_of_it in known.values())
    return bits


def one_process(case: Case, ranks: int, **changes: Any) -> Bits:
    """The same steps by one process, which sees the gradients of all ranks one after the other."""
    dense = replace(case, stage="dense", accumulation=case.accumulation * ranks, zero={}, config={}, **changes)
    if repr(dense) not in TRAINED:
        TRAINED[repr(dense)] = whole([train(dense)])
    return TRAINED[repr(dense)]


def assert_same_bits(found: Bits, wanted: Bits) -> None:
    assert found.keys() == wanted.keys()
    for layer, of_layer in wanted.items():
        assert found[layer].keys() == of_layer.keys(), layer
        for name, elements in of_layer.items():
            assert found[layer][name].dtype == elements.dtype, f"{layer}: {name}"
            other = (found[layer][name] != elements).sum().item()
            assert not other, f"{layer}: {other} of {len(elements)} elements of {name} have other bits"


def differing(found: Bits, wanted: Bits, of_bits: int | None = None, tolerance: int = 0) -> float:
    """The share of elements that are further apart than so many neighbours; of numbers of so many bits, or of all."""
    pairs = [
        (found[layer][name].long(), bits.long())
        for layer, of in wanted.items()
        for name, bits in of.items()
        if of_bits in (None, 8 * bits.element_size())
    ]
    elements = sum(len(bits) for _, bits in pairs)
    return sum(int(((a - b).abs() > tolerance).sum()) for a, b in pairs) / max(1, elements)


# Naive variants -----------------------------------------------------------------------------------------------------


def _generator_of_the_rank(seed: int, name: str) -> int:
    return ORIGINALS["key_of"](seed, name, torch.distributed.get_rank())  # type: ignore[no-any-return]


def _position_in_the_shard(layer: Any, shard: Any, shape: Any, elements: torch.Tensor) -> torch.Tensor:
    return elements


def _one_key_for_all_steps(self: rounding.LayerKeys, step: torch.Tensor) -> torch.Tensor:
    return ORIGINALS["at"](self, torch.ones_like(step))  # type: ignore[no-any-return]


def _to_nearest(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


ORIGINALS: dict[str, Any] = {"key_of": rounding.key_of, "at": rounding.LayerKeys.at}
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "a generator of the rank": (rounding, "key_of", _generator_of_the_rank),
    "a position in the shard": (rounding, "positions", _position_in_the_shard),
    "one key for all steps": (rounding.LayerKeys, "at", _one_key_for_all_steps),
    "to nearest": (rounding, "rounded_stochastically", _to_nearest),
}


@contextmanager
def mistaken(mistake: str | None) -> Iterator[None]:
    if mistake is None:
        yield
        return
    place, name, wrong = MISTAKES[mistake]
    right = getattr(place, name)
    views = __import__("trustratio.optimizers.formulas.chunk_view", fromlist=["chunk_view"])
    places = [place, *([views] if name == "rounded_stochastically" else [])]
    for one in places:
        setattr(one, name, wrong)
    try:
        yield
    finally:
        for one in places:
            setattr(one, name, right)
