"""Sums over the rows of embeddings: every piece of a layer, and work that grows with the chunk, not with the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trustratio.optimizers.formulas.chunks import Chunk, Piece, squares, values
from trustratio.optimizers.formulas.rows import Rows
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard


class LargestResult(TorchDispatchMode):
    """The most elements that an operation, which is no view, has made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view and isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    tensors = tuple(torch.arange(float(torch.Size(shape).numel())) for shape in shapes)
    layers = tuple(Layer(str(i), shape, i) for i, shape in enumerate(shapes))
    shards = tuple(Shard(i, 0, 0, len(tensor)) for i, tensor in enumerate(tensors))
    return Layout("test", tensors, (0,) * len(shapes), layers, shards)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_all_runs_of_a_layer(width: int) -> None:
    """Of two layers, of which the first is passed by: each run's elements in order, however it cuts rows."""
    layout = layout_of((2, 5), (6, width))
    rows = Rows(layout, [0, 1])
    flat = layout.tensors[1]
    per_row = torch.arange(8, dtype=torch.float64)
    owner = 2 + torch.arange(6).repeat_interleave(width)
    for begin in range(len(flat)):
        for end in range(begin + 1, len(flat) + 1):
            chunk = Chunk(0, (Piece(1, 1, begin, end - begin, begin, 1),))
            assert rows.spread(per_row, chunk, torch.float32).tolist() == owner[begin:end].tolist()
            for summand, part in ((values, flat[begin:end]), (squares, flat[begin:end] ** 2)):
                totals = torch.zeros(8, dtype=torch.float64)
                rows.add_sums(totals, chunk, summand(flat[begin:end]))
                expected = torch.zeros(8, dtype=torch.float64).index_add_(0, owner[begin:end], part.double())
                torch.testing.assert_close(totals, expected)


def test_a_chunk_does_not_read_the_whole_table() -> None:
    """A table of many rows has many chunks: what each does must not grow with the table."""
    layout = layout_of((10_000, 2), (3, 2))
    rows = Rows(layout, [0, 1])
    chunk = Chunk(0, (Piece(0, 0, 19_991, 9, 19_991, 0), Piece(1, 1, 0, 6, 0, 1)))
    per_row = torch.arange(10_003, dtype=torch.float64)
    with LargestResult() as largest:
        found = rows.spread(per_row, chunk, torch.float32)
    assert found.tolist() == [9995, *(row for row in range(9996, 10_003) for _ in range(2))]
    assert largest.elements == 15
