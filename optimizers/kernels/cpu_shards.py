"""The shards that compiled sweeps on the CPU go over."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable
from dataclasses import dataclass, fields, replace

import torch

from ..sharding.layout import Layer, Shard
from ..sharding.positions import runs
from .interface import Operands

__all__ = ["Shards", "scattered_tensors"]

SHORT_RUN = 64  # elements, on average


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


def scattered_tensors(operands: Operands) -> set[int]:
    """Local tensors of groups that round whose shards are short runs: a table of them would be as large as they are."""
    layout = operands.layout
    rounding = {group for group, of_group in operands.groups.items() if of_group.rounding is not None}
    found = set()
    for shard in layout.shards:
        layer = layout.layers[shard.layer]
        if not shard.is_run and layout.groups[layer.tensor] in rounding and layer.tensor not in found:
            local_shape = tuple(operands.weights[layer.tensor].shape)
            if _mean_run(layer.shape, shard, local_shape) < SHORT_RUN:
                found.add(layer.tensor)
    return found


@functools.lru_cache(maxsize=10_000)
def _mean_run(shape: tuple[int, ...], shard: Shard, local_shape: tuple[int, ...]) -> float:
    return shard.length / sum(1 for _ in runs(Layer("", shape, 0), shard, local_shape))
