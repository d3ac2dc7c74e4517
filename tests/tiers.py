"""What is quick and what is slow: of a test with many cases the fewest that show everything once are quick.

Everything is every value of every parameter, and every kind of optimizer with every value of the other parameters. What
the other cases show besides is combinations, which `-m slow` runs.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS, OptimizerEntry

_MOST_RANKS = 2
"""More processes than cores take many times as long."""

_MATRIX = "tests/distributed/test_exactness.py::test_weights_and_ratios_equal_one_process"
"""The proof itself, of which more is quick: three ranks, where layers lie on one in the middle, and LAMB everywhere."""


def leave_the_fewest_quick(items: Iterable[pytest.Item]) -> None:
    """Mark as slow all cases of each test but the fewest that show everything."""
    tests = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None) is not None and "gpu" not in item.path.parts:
            tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        most = _MOST_RANKS + (name == _MATRIX)
        candidates = [case for case in cases if _ranks(case) <= most and case.get_closest_marker("slow") is None]
        chosen = {case.nodeid for case in _fewest(candidates)}
        for case in cases:
            if case.nodeid not in chosen:
                case.add_marker(pytest.mark.slow)


def _fewest(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The greedy cover: again and again the case that shows most of what is missing; of these one on two ranks."""
    shown = {case.nodeid: _shown(case) for case in cases}
    missing = set().union(*shown.values())
    used: Counter[Any] = Counter()

    def worth(case: pytest.Item) -> tuple[int, bool, int]:
        of_case = shown[case.nodeid]
        return len(of_case & missing), _ranks(case) == _MOST_RANKS, -sum(used[one] for one in of_case)

    chosen = []
    while missing:
        chosen.append(max(cases, key=worth))
        used.update(shown[chosen[-1].nodeid])
        missing -= shown[chosen[-1].nodeid]
    return chosen


def _shown(case: pytest.Item) -> set[tuple[str, ...]]:
    """The values of a case's parameters, and each together with the kind of its optimizers."""
    is_proof = case.nodeid.startswith(_MATRIX)
    values = {(name, repr(value)) for name, value in case.callspec.params.items()}  # type: ignore[attr-defined]
    named = {one: OPTIMIZERS[one[1].strip("'")] for one in values if one[1].strip("'") in OPTIMIZERS}
    kinds = {f"statistics: {entry.group_statistics}" for entry in named.values()}
    if is_proof:
        kinds |= {name for _, name in named if name == "'lamb'"}
        kinds = {"three ranks"} if _ranks(case) > _MOST_RANKS else kinds
    others = values - set(named) - {("world_size", "1")}
    paired = {(kind, *value) for kind in kinds for value in others}
    if "distributed" in case.path.parts and not is_proof:
        return others | paired | {(name, _asked_of_backends(entry)) for (name, _), entry in named.items()}
    return values | paired


def _asked_of_backends(entry: OptimizerEntry) -> str:
    """What distinguishes optimizers where every one of them has been proven already."""
    return f"{entry.group_statistics}, {entry.sums}, {_layer_state(entry.optimizer_class)}"


@functools.cache
def _layer_state(optimizer_class: Any) -> tuple[str, ...]:
    state: tuple[str, ...] = optimizer_class([torch.nn.Parameter(torch.ones(1))], lr=1.0).layer_state
    return state


def _ranks(case: pytest.Item) -> int:
    """The most worker processes that a case needs, itself or for the files that it reads."""
    params = case.callspec.params  # type: ignore[attr-defined]
    return max((n for n in map(params.get, ("world_size", "after")) if isinstance(n, int)), default=0)
