"""What ranks tell one another before they step or save does not grow with their number times that of the layers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from trustratio.integrations.checkpoints.catalogue import Catalogue
from trustratio.integrations.checkpoints.local_state import LocalState
from trustratio.integrations.checkpoints.ranks import OptimizerStateError, raise_together
from trustratio.integrations.fsdp2.backend import _agree_on_placements
from trustratio.optimizers import LAMB, LayoutError

from .fsdp_runs import make_mesh
from .pool import WorkerPool

LAYERS = 60
WORDS = 8  # bytes of an int64


@contextmanager
def received() -> Iterator[list[int]]:
    """The bytes that each collective brings to this rank."""
    found: list[int] = []
    all_reduce, gather, broadcast = dist.all_reduce, dist.all_gather_object, dist.broadcast_object_list

    def reducing(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
        found.append(tensor.nbytes)
        return all_reduce(tensor, *given, **options)

    def gathering(of_ranks: list[Any], value: Any, *given: Any, **options: Any) -> None:
        found.append(len(of_ranks) * len(pickle.dumps(value)))
        gather(of_ranks, value, *given, **options)

    def broadcasting(values: list[Any], *given: Any, **options: Any) -> None:
        broadcast(values, *given, **options)
        found.append(len(pickle.dumps(values)))

    with (
        patch.object(dist, "all_reduce", reducing),
        patch.object(dist, "all_gather_object", gathering),
        patch.object(dist, "broadcast_object_list", broadcasting),
    ):
        yield found


def compare_placements(differing: str) -> tuple[str, int]:
    """The error, if any, and the bytes that came to this rank."""
    mesh = make_mesh(None)
    whole = range(40, LAYERS) if differing == "placements" and dist.get_rank() == 1 else ()
    tensors = {
        f"layer.{index}": DTensor.from_local(torch.ones(4, 2), mesh, [Replicate()])
        if index in whole
        else DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
        for index in range(LAYERS)
    }
    if differing == "order" and dist.get_rank() == 1:
        tensors = {f"layer.{40 + 59 - index if index >= 40 else index}": t for index, t in enumerate(tensors.values())}
    if differing == "number" and dist.get_rank() == 1:
        tensors.popitem()
    with received() as found:
        try:
            _agree_on_placements(list(tensors.values()), {id(t): name for name, t in tensors.items()})
        except LayoutError as error:
            return str(error), sum(found)
    return "", sum(found)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("differing", "message", "most"),
    [
        ("nothing", "", 4 * WORDS),
        ("placements", "(layer.40, (4, 2), (Shard(dim=0),), [0, 1]) on the first rank", 2 * (LAYERS + 3) * WORDS + 400),
        ("order", "(layer.40, (4, 2), (Shard(dim=0),), [0, 1]) on the first rank", 2 * (LAYERS + 3) * WORDS + 400),
        ("number", "(layer.59, (4, 2), (Shard(dim=0),), [0, 1]) on the first rank", 2 * (LAYERS + 3) * WORDS + 400),
    ],
)
def test_placements_are_compared_by_digests(
    pool: WorkerPool, differing: str, message: str, most: int, world_size: int
) -> None:
    answers = pool.run(compare_placements, differing)
    assert len({error for error, _ in answers}) == 1
    for error, received_bytes in answers:
        assert message in error
        assert bool(error) == (differing != "nothing")
        assert received_bytes <= most


def make_catalogue(own: int) -> tuple[list[str], int, int]:
    """The layers of all ranks, with some of each rank's own; the bytes that came here; those of all layers."""
    names = [f"shared.{index}" for index in range(LAYERS)]
    names += [f"of rank {dist.get_rank()}.{index}" for index in range(own)]
    local = LocalState(LAMB([(name, torch.nn.Parameter(torch.ones(2))) for name in names]), None)
    with received() as found:
        catalogue = Catalogue.of_all_ranks(local)
    return list(catalogue.layers), sum(found), len(pickle.dumps(catalogue.layers))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("own", [0, 20])
def test_each_layer_is_described_once(pool: WorkerPool, own: int, world_size: int) -> None:
    answers = pool.run(make_catalogue, own)
    names, _, size = answers[0]
    assert len(names) == LAYERS + world_size * own
    for found, received_bytes, _ in answers:
        assert found == names
        assert received_bytes <= (1.25 * size if own else 300)


def raise_problems(of_ranks: list[list[str]]) -> str:
    try:
        raise_together(of_ranks[dist.get_rank()])
    except OptimizerStateError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2])
def test_problems_of_any_rank_are_raised_on_all(pool: WorkerPool, world_size: int) -> None:
    for of_ranks in ([[], []], [["one"], []], [[], ["other"]], [["one", "two"], ["two", "other"]]):
        wanted = "\n".join(dict.fromkeys(problem for problems in of_ranks for problem in problems))
        assert pool.run(raise_problems, of_ranks) == [wanted] * world_size
