"""Sums over elements on devices without fp64: in fp32 over short blocks, whose sums are added in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sharding.local_tensors import summable

__all__ = ["sums_in_blocks"]

ROW = 32
BLOCK = ROW * ROW
"""Elements per block. Added by rows and then over these, whatever a device's order, no sum has a long chain."""


def sums_in_blocks(parts: Sequence[torch.Tensor], *, squared: bool) -> list[torch.Tensor]:
    """The sum over each part, or over its squares, as 0-d fp64 tensors on the CPU. Waits for the device.

    Args:
        parts: Flat, fp32, on one device.
        squared: Whether squares are summed. Each block is divided by its largest element before, as fp32 has no squares
            of very small and very large numbers.
    """
    counts = [-(-len(part) // BLOCK) for part in parts]
    zeros = parts[0].new_zeros(BLOCK)
    padded = [piece for part in parts for piece in (part, zeros[: -len(part) % BLOCK])]
    blocks = torch.cat(padded).view(-1, ROW, ROW)
    if not squared:
        sums = summable(_of_blocks(blocks)).to(torch.float64)
        return [of_part.sum() for of_part in sums.split(counts)]

    largest = blocks.abs().amax(dim=(1, 2))
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    scaled = _of_blocks((blocks / scale.view(-1, 1, 1)).square_())
    sums, factors = summable(torch.stack([scaled, scale])).to(torch.float64)
    return [of_part.sum() for of_part in (sums * factors.square()).split(counts)]


def _of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.sum(dim=2).sum(dim=1)
