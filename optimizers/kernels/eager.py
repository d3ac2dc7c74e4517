"""Sweeps by tensor operations: every stage and every update, on any device and for any dtype.

They work on cache-sized chunks and call the formulas themselves. Nothing is written before the last reduction is in:
measuring works on scratch copies of the state, chunk by chunk, and applying repeats the arithmetic in place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..formulas.chunk_view import ChunkView
from ..formulas.chunks import Chunk, Flattened, cut_into_chunks
from ..formulas.rounding import RandomFields
from ..formulas.stages import Stage
from .interface import SETS_OF_GRADIENTS, ElementUpdate, GroupOperands, LocalSums, Operands, Recent

__all__ = ["EagerSweeps"]


class EagerSweeps:
    """See `Sweeps`; they decline no stage and no update."""

    def __init__(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any]):
        self.operands = operands
        self.served = served
        self.cache = cache
        self.weights = Flattened(operands.weights)
        self.gradients = Flattened(operands.gradients)
        self.state = {name: Flattened(tensors) for name, tensors in operands.state.items()}

    def measure(self, group: int, stage: Stage, *, keep: bool) -> LocalSums:
        """As `Sweeps.measure`; keeps nothing."""
        operands, group_chunks = self.operands.groups[group], self._chunks[group]
        of_pieces: dict[str, list[torch.Tensor]] = {name: [] for name in stage.sum_sizes}
        maxima: dict[str, list[torch.Tensor]] = {name: [] for name in stage.maximum_names}
        of_rows = self._zero_row_sums(operands, stage)
        for chunk in group_chunks.chunks:
            summands = stage(operands.options, operands.table, self.view(operands, chunk, in_place=False))
            named = dict(zip((*of_pieces, *maxima, *of_rows), summands, strict=True))
            for name, pieces in of_pieces.items():
                pieces += chunk.sums(named[name])
            for name, pieces in maxima.items():
                pieces += chunk.largest(named[name])
            for name, row_sums in of_rows.items():
                operands.rows.add_sums(row_sums, chunk, named[name])
        layers = len(operands.layers)
        return LocalSums(
            self._of_layers(group_chunks, of_pieces, "sum", sum(stage.sum_sizes.values()), layers),
            of_rows,
            self._of_layers(group_chunks, maxima, "max", len(maxima), layers) if maxima else None,
        )

    def _of_layers(
        self, group_chunks: _GroupChunks, of_pieces: Mapping[str, list[torch.Tensor]], how: str, rows: int, layers: int
    ) -> torch.Tensor:
        if rows and group_chunks.chunks:
            return group_chunks.combine(list(of_pieces.values()), how)
        return self._zeros(rows, layers)

    def step(self, group: int, stage: Stage) -> LocalSums | None:
        """Nothing: a layer that is measured is scratch, of which nothing is left to apply."""
        return None

    def apply(self, group: int, update: ElementUpdate) -> bool:
        chunks = self._chunks[group].chunks
        if chunks:
            operands = self.operands.groups[group]
            changing = operands.table.has_gradient()
            # Where looking costs nothing: layers that do not change are left out, and few chunks need a mask.
            on_host = changing.tolist() if changing.is_cpu else None
            for chunk in chunks:
                self._apply_to(chunk, operands, update, changing, on_host)
        return True

    def _apply_to(
        self,
        chunk: Chunk,
        operands: GroupOperands,
        update: ElementUpdate,
        changing: torch.Tensor,
        on_host: list[bool] | None,
    ) -> None:
        first = operands.layers.start
        known = None if on_host is None else [on_host[layer - first] for layer in chunk.layers]
        if known is not None and not any(known):
            return
        all_change = known is not None and all(known)
        view = self.view(operands, chunk, in_place=all_change)
        view.store(update.change(view), None if all_change else view.of(changing))

    def view(self, operands: GroupOperands, chunk: Chunk, *, in_place: bool) -> ChunkView:
        """What an algorithm sees of a chunk of a group."""
        flat = {name: (Flattened(tensors), factor) for name, (tensors, factor) in self.operands.inputs.items()}
        rows, first = operands.table.rows, operands.layers.start
        rounding = operands.rounding
        random = None if rounding is None else RandomFields(rounding, chunk, self.operands.layout, first)
        return ChunkView(chunk, self.weights, self.gradients, self.state, first, rows, flat, random, in_place=in_place)

    def _zero_row_sums(self, operands: GroupOperands, stage: Stage) -> dict[str, torch.Tensor]:
        return {name: self._zeros(operands.rows.count) for name in stage.row_names}

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.operands.layout.numbers_device)

    @functools.cached_property
    def _chunks(self) -> dict[int, _GroupChunks]:
        """The chunks of each parameter group; kept from step to step, as they keep what was sent to the device."""
        recent: Recent = self.cache.setdefault("chunks", Recent(SETS_OF_GRADIENTS))
        chunks: dict[int, _GroupChunks] = recent.find(self.served, self._make_chunks)
        return chunks

    def _make_chunks(self) -> dict[int, _GroupChunks]:
        if "whole chunks" not in self.cache:
            self.cache["whole chunks"] = cut_into_chunks(self.operands.layout)
        served = [part for whole in self.cache["whole chunks"] if (part := whole.only(self.served.__getitem__))]
        by_group: dict[int, list[Chunk]] = {group: [] for group in self.operands.groups}
        for chunk in served:
            by_group[chunk.group] += chunk.unlike(len(self.operands.groups[chunk.group].layers))
        device = self.operands.layout.numbers_device
        return {
            group: _GroupChunks.of(chunks, self.operands.groups[group].layers, device)
            for group, chunks in by_group.items()
        }


@dataclass(frozen=True)
class _GroupChunks:
    """The chunks of one parameter group, and in which order the sums of their pieces are added up.

    Attributes:
        chunks: Those that are served.
        by_layer: Indices of their pieces, counted through all chunks, in the order of the layers. Shards lie in the
            order of their tensors, which need not be the same.
        counts: How many pieces each layer has, shape (layers of the group,), on the device.
    """

    chunks: list[Chunk]
    by_layer: list[int]
    counts: torch.Tensor

    @classmethod
    def of(cls, chunks: list[Chunk], layers: range, device: torch.device) -> _GroupChunks:
        layer_of_piece = [layer - layers.start for chunk in chunks for layer in chunk.layers]
        by_layer = sorted(range(len(layer_of_piece)), key=layer_of_piece.__getitem__)
        counts = torch.bincount(torch.tensor(layer_of_piece, dtype=torch.int64, device="cpu"), minlength=len(layers))
        return cls(chunks, by_layer, counts.to(device))

    def combine(self, of_pieces: Sequence[Sequence[torch.Tensor]], how: str) -> torch.Tensor:
        """The "sum" or "max" of each number's pieces per layer, in a fixed order; shape (all numbers, layers)."""
        columns = [torch.stack([sums[piece].reshape(-1) for piece in self.by_layer]) for sums in of_pieces]
        values = torch.cat(columns, dim=1)
        # The counts are not checked, since that would wait for the device.
        return torch.segment_reduce(values, how, lengths=self.counts, axis=0, unsafe=True, initial=0.0).T
