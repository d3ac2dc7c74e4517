"""Element-wise squares of the groups' gradients on their way to the ranks that own the elements.

Where every rank keeps whole gradients until the step, squares are added up locally and reduced in the step. Where it
does not (ZeRO-2 and 3, FSDP2), they are sent in backward, bucket by bucket, as the gradient itself is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..sharding.gradient_flow import Destination, Slice
from ..sharding.local_tensors import compute_dtype, local_part, reduction_device

BUCKET_ELEMENTS = 1 << 23
"""Elements of squares that ZeRO-2 and 3 stage before sending them: one half holds them, the other their packing."""


@dataclass
class _Watched:
    """What is known of one parameter's group gradients since the last step.

    `sums` has three fp64 numbers: of norms, of their squares, and of every second element (see `_factor`).
    `squares` is kept where gradients are whole. `source` is the tensor that takes the parameter's place in forward.
    """

    parameter: weakref.ref[torch.Tensor]
    source: weakref.ref[torch.Tensor] | None = None
    groups: int = 0
    sums: torch.Tensor | None = None
    squares: torch.Tensor | None = None

    def clear(self) -> None:
        self.groups = 0
        if self.sums is not None:
            self.sums.zero_()
        if self.squares is not None:
            self.squares.zero_()


class _Bucket:
    """Squares on their way to the ranks that own the elements.

    A gradient of the same elements that comes while the last one still waits is added to it, so nothing is sent twice
    that fits. All ranks must see gradients in the same order, as sharding wrappers demand themselves.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, dtype: torch.dtype, partition: Callable[[torch.Tensor], torch.Tensor]
    ):
        self.process_group = process_group
        self.dtype = dtype
        self.partition = partition
        self.waiting: dict[tuple[int, int], tuple[Destination, list[tuple[Slice, torch.Tensor]]]] = {}
        self.elements = 0

    def clear(self) -> None:
        self.waiting.clear()
        self.elements = 0

    def add(self, watched: _Watched, destination: Destination, flat: torch.Tensor, *, squared: bool = False) -> None:
        """Add a whole gradient's squares, or the gradient itself to be squared."""
        limit = BUCKET_ELEMENTS // 2
        for number, slices in enumerate(_cut(destination.slices, limit)):
            values = [flat.narrow(0, s.offset, s.length).to(self.dtype) for s in slices]
            waiting = self.waiting.get((id(watched), number))
            if waiting is not None:
                for (_, total), value in zip(waiting[1], values, strict=True):
                    total.add_(value) if squared else total.addcmul_(value, value)
                continue
            size = sum(s.length for s in slices)
            if self.elements + size > limit:
                self.flush()
            squares = [value.clone() if squared else value.square() for value in values]
            self.waiting[id(watched), number] = destination, list(zip(slices, squares, strict=True))
            self.elements += size

    def flush(self) -> None:
        """Send everything to its owners and add what came back to this rank's partitions."""
        if not self.waiting:
            return
        ranks = dist.get_world_size(self.process_group)
        of_owner: list[list[tuple[Destination, Slice, torch.Tensor]]] = [[] for _ in range(ranks)]
        for destination, parts in self.waiting.values():
            for slice_, squares in parts:
                of_owner[slice_.owner].append((destination, slice_, squares))
        self.clear()
        mine = of_owner[dist.get_rank(self.process_group)]
        total = self._reduce([[squares for _, _, squares in parts] for parts in of_owner])
        begin = 0
        for destination, slice_, _ in mine:
            part = total.narrow(0, begin, slice_.length)
            begin += slice_.length
            own = self.partition(destination.tensor).narrow(0, slice_.start, slice_.length)
            own.add_(part.to(own.device))

    def _reduce(self, of_owner: list[list[torch.Tensor]]) -> torch.Tensor:
        """Add each owner's elements over all ranks; return this rank's own."""
        rank, ranks = dist.get_rank(self.process_group), len(of_owner)
        lengths = [sum(map(len, parts)) for parts in of_owner]
        if ranks == 1:
            return torch.cat(of_owner[0])
        if ranks * max(lengths) <= 1.25 * sum(lengths):
            return self._reduce_scatter(of_owner, max(lengths))[: lengths[rank]]
        own = torch.empty(0, dtype=self.dtype)
        for owner, parts in enumerate(of_owner):
            if parts:
                packed = self._on_device(torch.cat(parts))
                dist.reduce(packed, dist.get_global_rank(self.process_group, owner), group=self.process_group)
                own = packed if owner == rank else own
        return own

    def _reduce_scatter(self, of_owner: list[list[torch.Tensor]], width: int) -> torch.Tensor:
        device = of_owner[0][0].device if of_owner[0] else torch.device("cpu")
        packed = torch.zeros(len(of_owner), width, dtype=self.dtype, device=device)
        for row, parts in zip(packed, of_owner, strict=True):
            if parts:
                torch.cat(parts, out=row[: sum(map(len, parts))])
        packed = self._on_device(packed)
        own = torch.empty(width, dtype=self.dtype, device=packed.device)
        # The older name is deprecated where the newer exists.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, packed.view(-1), group=self.process_group)
        return own

    def _on_device(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.to(reduction_device(self.process_group, packed.device))


def _cut(slices: Sequence[Slice], limit: int) -> Iterator[list[Slice]]:
    """Cut a layer's slices alongside each other into sets of at most `limit` elements."""
    step = max(1, limit // max(1, len(slices)))
    for begin in range(0, max((s.length for s in slices), default=0), step):
        yield [s.part(begin, begin + step) for s in slices if begin < s.length]


def _add_packed(tensors: Sequence[torch.Tensor], add: Callable[[torch.Tensor], None]) -> None:
    for pack in _packs(tensors):
        packed = torch.cat(pack)
        add(packed)
        torch._foreach_copy_(pack, list(packed.split([len(part) for part in pack])))


def _packs(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group pieces of flat tensors, all of one dtype and device, into packs of at most a bucket's elements."""
    pack: list[torch.Tensor] = []
    elements = 0
    for tensor in tensors:
        for piece in tensor.split(BUCKET_ELEMENTS):
            fits = pack and elements + len(piece) <= BUCKET_ELEMENTS
            if pack and not (fits and pack[0].dtype == piece.dtype and pack[0].device == piece.device):
                yield pack
                pack, elements = [], 0
            pack.append(piece)
            elements += len(piece)
    if pack:
        yield pack


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """For the squares of the elements of one local tensor, flat."""
    local = local_part(tensor)
    return torch.zeros(local.numel(), dtype=compute_dtype(local), device=local.device)
