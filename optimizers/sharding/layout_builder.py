"""How a backend puts a layout together: tensor by tensor, and in each of them layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from .layout import Layer, Layout, Shard
from .parts import Part

__all__ = ["LayoutBuilder"]


class LayoutBuilder:
    """Collects what a `Layout` consists of.

        builder = LayoutBuilder("DeepSpeed ZeRO-2")
        builder.carry(group, flat_tensor)                                     # the next local tensor, and in it
        builder.add(name, parameter, part, start, offset, length, over=ranks) # its layers, one after the other
        return builder.layout(clips_with=...)

    All ranks must add the same layers in the same order, those of which they hold nothing too, and name the process
    groups in the same order.

    Args:
        backend: Name for messages.

    Attributes:
        layers: Those added so far.
        shards: Of those layers, on this rank. `add` puts them here; what is no run of a part is put here by hand.
        cut: Indices of the layers that are cut among tensor-parallel ranks (`Part.process_group`).
    """

    def __init__(self, backend: str):
        self.layers: list[Layer] = []
        self.shards: list[Shard] = []
        self.cut: set[int] = set()
        self._backend = backend
        self._tensors: list[torch.Tensor] = []
        self._groups: list[int] = []
        self._reductions: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[int]]] = {}
        self._replicas: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[int]]] = {}
        self._placed = True

    def carry(self, group: int, tensor: torch.Tensor) -> None:
        """Begin the next local tensor, of a parameter group; the layers added from now on are in it."""
        self._tensors.append(tensor)
        self._groups.append(group)

    def add(
        self,
        name: str,
        parameter: torch.Tensor,
        part: Part,
        start: int = 0,
        offset: int = 0,
        length: int = 0,
        *,
        over: Iterable[dist.ProcessGroup] = (),
        same_on: Iterable[dist.ProcessGroup] = (),
        gradient_dtype: torch.dtype | None = None,
    ) -> int:
        """Add a layer of the current local tensor, and the run of its elements that this rank has there.

        Args:
            name: The layer's.
            parameter: The model's own.
            part: What the ranks of `over` have of it together: all of it, unless tensor parallelism cuts it besides.
            start: First element of the run in the local tensor.
            offset: First element of the run in the part.
            length: Number of elements, 0 where this rank has none.
            over: Process groups among which the part is sharded. The layer's sums are added over them, and over the
                part's own.
            same_on: Process groups whose ranks hold the same of the layer.
            gradient_dtype: As in `Layer`.

        Returns:
            The layer's index.
        """
        index = len(self.layers)
        self.layers.append(Layer(name, part.whole, len(self._tensors) - 1, parameter, gradient_dtype))
        if length:
            self.shards.extend(part.shards(index, start, offset, length))
        for process_group in over:
            _note(self._reductions, process_group, index)
        for process_group in same_on:
            _note(self._replicas, process_group, index)
        if part.process_group is not None:
            _note(self._reductions, part.process_group, index)
            self.cut.add(index)
        self._placed = self._placed and part.is_placed
        return index

    def layout(self, **options: Any) -> Layout:
        """Make the layout.

        Args:
            options: Its attributes `clips_with`, `gradient_norm`, `others` and `clipped`.
        """
        return Layout(
            backend=self._backend,
            tensors=tuple(self._tensors),
            groups=tuple(self._groups),
            layers=tuple(self.layers),
            shards=tuple(sorted(self.shards, key=lambda shard: (self.layers[shard.layer].tensor, shard.start))),
            reductions=tuple((group, tuple(layers)) for group, layers in self._reductions.values()),
            replicas=tuple((group, tuple(layers)) for group, layers in self._replicas.values()),
            placed=self._placed,
            **options,
        )


def _note(
    layers_of: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[int]]], process_group: dist.ProcessGroup, layer: int
) -> None:
    """Add one layer to those of a group. Groups of the same ranks, as of several meshes, are one."""
    ranks = tuple(dist.get_process_group_ranks(process_group))
    layers_of.setdefault(ranks, (process_group, []))[1].append(layer)
