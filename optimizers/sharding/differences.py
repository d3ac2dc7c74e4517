"""Whether all ranks of a process group say the same, for next to nothing if they do.

No rank gets what the others say: of 1,000 descriptions of layers from 1,000 ranks nobody has room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .local_tensors import reduction_device

__all__ = ["differing", "digest", "first_difference"]


def digest(text: str) -> int:
    """A number of 56 bits that stands for the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def differing(numbers: Sequence[int], process_group: dist.ProcessGroup) -> list[int]:
    """The positions at which the group's ranks have different numbers, as many on each rank: one all-reduce."""
    largest, smallest = _extremes(numbers, process_group)
    return (largest != smallest).nonzero().flatten().tolist()


def first_difference(said: Sequence[str], process_group: dist.ProcessGroup) -> list[str | None] | None:
    """What each of the group's ranks says in the first place in which they say different things.

    One all-reduce of two numbers. Only where ranks differ, one of a number per text follows, and then one text of each
    rank.

    Returns:
        The texts by rank of the group, None for a rank that has fewer; None if all say the same.
    """
    if not differing([len(said), digest(repr(said))], process_group):
        return None
    most = int(_extremes([len(said)], process_group)[0])
    places = differing([*map(digest, said), *[-1] * (most - len(said))], process_group)
    of_ranks: list[str | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(of_ranks, next(iter(said[places[0] :]), None), group=process_group)
    return of_ranks


def _extremes(numbers: Sequence[int], process_group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest and the smallest of each number over the group's ranks, int64 on the CPU."""
    mine = torch.tensor([numbers, [-number for number in numbers]], dtype=torch.int64, device="cpu")
    largest = mine.to(reduction_device(process_group, mine.device))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    of_numbers, of_negatives = largest.cpu()
    return of_numbers, -of_negatives
