"""The blocks of elements that programs on a GPU work on, and how what they need is kept there. Made without Triton.

A block is a run of at most `BLOCK` elements of one shard. Programs load and store 16 bytes at a time where the compiler
knows that blocks begin and end at multiples of that. So what lies before the first multiple of 16 elements, and what is
left behind the last one, are blocks of their own, which another launch works on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .cpu_shards import Shards

__all__ = ["ALIGNMENT", "BLOCK", "NOWHERE", "BlockTable", "Launch", "residues"]

BLOCK = 2048
ALIGNMENT = 16  # elements: with two bytes each, 32 bytes, which is what a GPU's memory moves at least
NOWHERE = -1  # the residue of a tensor whose weights, gradient and state do not lie alike


class Launch(NamedTuple):
    """The blocks that one launch works on.

    Attributes:
        types: What the tensors have in common.
        aligned: Whether the blocks begin and end at multiples of `ALIGNMENT` elements in memory.
        rows: int64, shape (blocks, 6): tensor, start, length, layer counted from the group's first, position of the
            first element in the layer, and the place of the block's sums.
    """

    types: Any
    aligned: bool
    rows: torch.Tensor


@dataclass(frozen=True)
class BlockTable:
    """The blocks of a parameter group.

    Attributes:
        launches: Each with some of the blocks, all together with all.
        ends: int64, shape (layers + 1,): where each layer's sums begin; they follow in the order of its elements.
        count: Of blocks.
    """

    launches: list[Launch]
    ends: torch.Tensor
    count: int

    @classmethod
    def of(cls, shards: Shards, layers: int, types: Sequence[Any], residues: Sequence[int]) -> BlockTable:
        """Cut shards into blocks.

        Args:
            shards: Of the group, with layers counted from its first.
            layers: How many it has.
            types: Of each local tensor, comparable; None for those that have no blocks.
            residues: Of each local tensor, as the function of this name has them.

        Returns:
            A table on the host.
        """
        kinds = sorted({of_tensor for of_tensor in types if of_tensor is not None})
        code = {of_tensor: index for index, of_tensor in enumerate(kinds)}
        codes = torch.tensor([code.get(of_tensor, -1) for of_tensor in types], dtype=torch.int64, device="cpu")
        shards = shards.only(codes[shards.tensor] >= 0)
        shards = shards.only(shards.layer.argsort(stable=True))
        rows, aligned = _blocks(shards, torch.tensor(residues, dtype=torch.int64, device="cpu")[shards.tensor])
        launch = 2 * codes[rows[:, 0]] + ~aligned
        sizes = torch.bincount(launch, minlength=2 * len(kinds)).tolist()
        by_launch = rows[launch.argsort(stable=True)].split(sizes)
        launches = [
            Launch(kinds[index // 2], index % 2 == 0, of_launch)
            for index, of_launch in enumerate(by_launch)
            if len(of_launch)
        ]
        counts = torch.bincount(rows[:, 3], minlength=layers)
        return cls(launches, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), len(rows))


def _blocks(shards: Shards, residue: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all blocks in the order of the shards, and whether each is aligned."""
    begins, lengths = _pieces(shards, residue)
    counts = (lengths + BLOCK - 1) // BLOCK
    piece = torch.repeat_interleave(counts)
    offset = (torch.arange(len(piece), device="cpu") - (counts.cumsum(0) - counts)[piece]) * BLOCK
    length = (lengths[piece] - offset).clamp(max=BLOCK)
    offset += begins[piece]
    shard = piece // 3
    rows = [
        *(shards.tensor[shard], shards.start[shard] + offset, length),
        *(shards.layer[shard], shards.position[shard] + offset, torch.arange(len(piece), device="cpu")),
    ]
    return torch.stack(rows, dim=1), piece % 3 == 1


def _pieces(shards: Shards, residue: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each shard what is before its aligned part, that part, and what is behind it: begins in the shard, lengths."""
    head = (-(residue + shards.start)) % ALIGNMENT
    # What fits into one block is not cut into three.
    is_short = (shards.length <= BLOCK) & ((head > 0) | (shards.length % ALIGNMENT > 0))
    head = torch.where((residue == NOWHERE) | is_short, shards.length, head)
    aligned = (shards.length - head) // ALIGNMENT * ALIGNMENT
    behind = head + aligned
    begins = torch.stack([torch.zeros_like(head), head, behind], dim=1)
    lengths = torch.stack([head, aligned, shards.length - behind], dim=1)
    return begins.reshape(-1), lengths.reshape(-1)


def residues(addresses: torch.Tensor, sizes: torch.Tensor, known: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """How many elements local tensors lie behind a multiple of `ALIGNMENT`.

    Args:
        addresses: int64, shape (names, tensors): of the weights first, of gradients and state; 0 where there is none.
        sizes: The same of elements, in bytes.
        known: The second of the answers of the last time, if there was one.

    Returns:
        For each tensor the residue that all have in common, `NOWHERE` if there is none, shape (tensors,). And that of
        each address, shape (names, tensors); in the place of 0 the one that was known, at first the weights'.
    """
    here = addresses // sizes % ALIGNMENT
    if known is None or known.shape != here.shape:
        known = here[0].expand_as(here)
    each = torch.where(addresses == 0, known, here)
    return torch.where((each == each[0]).all(dim=0), each[0], NOWHERE), each
