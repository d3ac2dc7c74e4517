"""Layers that are several matrices in one, such as a fused QKV: one layer, and one trust ratio, for each matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from .layout import Layer, Layout, Shard


def segments_of(group: Mapping[str, Any], name: str) -> int:
    """Into how many segments a group's option `segments` cuts the layer of this name."""
    option = group.get("segments") or 1
    if isinstance(option, int):
        return option
    return next((count for pattern, count in option.items() if fnmatchcase(name, pattern)), 1)


def in_segments(layout: Layout, groups: Sequence[Mapping[str, Any]]) -> Layout:
    """Replace each layer that is several matrices in one, stacked along dimension 0, by one layer per matrix.

    Args:
        layout: As the backend sees it: one layer per parameter.
        groups: The options of the groups that `layout.groups` counts.

    Raises:
        ValueError: If dimension 0 of a layer does not divide into its segments.
    """
    counts = [segments_of(groups[layout.groups[layer.tensor]], layer.name) for layer in layout.layers]
    if all(count == 1 for count in counts):
        return layout
    layers: list[Layer] = []
    parts_of: list[range] = []
    for layer, count in zip(layout.layers, counts, strict=True):
        parts_of.append(range(len(layers), len(layers) + count))
        layers.extend(_segments(layer, count))
    shards = [
        part
        for shard in layout.shards
        for part in _cut_shard(shard, parts_of[shard.layer], layers[parts_of[shard.layer].start])
    ]
    reductions, replicas = (
        tuple((group, tuple(part for layer in indices for part in parts_of[layer])) for group, indices in of_groups)
        for of_groups in (layout.reductions, layout.replicas)
    )
    return replace(layout, layers=tuple(layers), shards=tuple(shards), reductions=reductions, replicas=replicas)


def _segments(layer: Layer, count: int) -> list[Layer]:
    if count == 1:
        return [layer]
    if not layer.shape or layer.shape[0] % count:
        raise ValueError(f"layer {layer.name} of shape {layer.shape} does not divide into {count} segments")
    shape = (layer.shape[0] // count, *layer.shape[1:])
    return [replace(layer, name=f"{layer.name}[{index}]", shape=shape) for index in range(count)]


def _cut_shard(shard: Shard, parts: range, segment: Layer) -> Iterator[Shard]:
    """Cut a shard where segments meet."""
    if len(parts) == 1:
        yield replace(shard, layer=parts.start)
    elif shard.is_run:
        for number, begin, end in _ranges(shard.offset, shard.end, segment.numel):
            start = shard.start + begin - shard.offset
            yield Shard(parts[number], start, begin - number * segment.numel, end - begin)
    else:
        yield from _cut_block(shard, parts, segment)


def _cut_block(block: Shard, parts: range, segment: Layer) -> Iterator[Shard]:
    """Cut a shard that is narrower than the layer: as many elements in each row, from the same column on."""
    rows_of_segment = segment.shape[0]
    width = segment.numel // rows_of_segment
    first, column = divmod(block.offset, width)
    last = (block.end - 1) // width
    in_row = block.length // (last + 1 - first)
    reach = block.end - block.offset - (last - first) * width
    for number, begin, end in _ranges(first, last + 1, rows_of_segment):
        yield Shard(
            parts[number],
            start=block.start + (begin - first) * in_row,
            offset=(begin - number * rows_of_segment) * width + column,
            length=(end - begin) * in_row,
            span=(end - begin - 1) * width + reach,
        )


def _ranges(begin: int, end: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut [begin, end) at the multiples of `size`: yields (number, begin, end)."""
    for number in range(begin // size, -(-end // size)):
        yield number, max(begin, number * size), min(end, (number + 1) * size)
