"""The shards that compiled sweeps on the CPU go over."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, fields, replace

import torch

from ..sharding.positions import runs
from .interface import Operands

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """The shards of a layout as vectors, int64; those of groups that round are cut into runs."""

    tensor: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    layer: torch.Tensor
    group: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of(cls, operands: Operands, rounding: Container[int]) -> Shards:
        """All of a layout.

        Args:
            operands: With the layout.
            rounding: Indices of the groups that round.
        """
        layout, rows = operands.layout, []
        for shard in layout.shards:
            layer = layout.layers[shard.layer]
            group = layout.groups[layer.tensor]
            parts: Iterable[tuple[int, int, int]] = [(shard.start, shard.offset, shard.length)]
            if group in rounding:
                parts = runs(layer, shard, tuple(operands.weights[layer.tensor].shape))
            rows += [(layer.tensor, start, length, shard.layer, group, position) for start, position, length in parts]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, len(fields(cls)))
        return cls(*table.t().contiguous())

    def only(self, wanted: torch.Tensor) -> Shards:
        return Shards(*(getattr(self, column.name)[wanted] for column in fields(self)))

    def counted_from(self, layer: int) -> Shards:
        return replace(self, layer=self.layer - layer)
