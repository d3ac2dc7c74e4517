"""Element-wise squares of the groups' gradients on their way to the ranks that own the elements.

Where every rank keeps whole gradients until the step (one process, DDP, ZeRO-0 and 1), squares are added up locally and
reduced in the step. Where it does not (ZeRO-2 and 3, FSDP2), they are sent in backward, bucket by bucket, as the
gradient itself is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from ..sharding.data_parallel import DataParallel
from ..sharding.gradient_flow import Destination, Slice
from ..sharding.layout import Layout
from ..sharding.local_tensors import add_over, compute_dtype, local_part, reduction_device
from .watched import Watched, backward_pass

__all__ = ["BUCKET_ELEMENTS", "Bucket", "Squares", "zeros_like_local"]

BUCKET_ELEMENTS = 1 << 23
"""Elements of squares that ZeRO-2 and 3 stage before sending them: one half holds them, the other their packing."""


class Squares:
    """The squares of one optimizer's group gradients since the last step.

    Attributes:
        partitions: Where gradients are sharded: the squares of the elements that this rank owns, by the id of the local
            tensor. Where they stay whole, `Watched.squares` has them.
        buckets: What is on its way, by process group and dtype.
        groups: Process groups that squares have for themselves, by the ids of the wrapper's, which are kept beside.
    """

    def __init__(self) -> None:
        self.partitions: dict[int, torch.Tensor] = {}
        self.buckets: dict[tuple[int, torch.dtype], Bucket] = {}
        self.groups: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        self._reduced: set[int] = set()  # ids of what this step's calls have added over the ranks

    def open(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        """Make a process group of the same ranks, and its communicator, for what is sent in backward.

        Of its own, so that it needs no agreed order with the collectives of the wrapper. Called on all its ranks, and
        never in backward: there a rank that makes a communicator waits for the others while kernels of the wrapper's
        may wait on the device, so that neither goes on.

        Args:
            process_group: The wrapper's.
            device: Where gradients are.
        """
        if id(process_group) in self.groups:
            return
        ranks = dist.get_process_group_ranks(process_group)
        own = process_group
        if len(ranks) > 1:
            own = dist.new_group(ranks, use_local_synchronization=True)
            # NCCL makes the communicator with the first collective.
            dist.all_reduce(torch.zeros(1, device=reduction_device(own, device)), group=own)
        self.groups[id(process_group)] = process_group, own

    def clear(self, watched: Iterable[Watched]) -> None:
        """Forget what was seen of all these parameters."""
        whole = [layer.squares for layer in watched if layer.squares is not None]
        if kept := [*self.partitions.values(), *whole]:
            torch._foreach_zero_(kept)
        for bucket in self.buckets.values():
            bucket.clear()
        self._reduced.clear()

    def forget(self, watched: Watched, destination: Destination | None) -> None:
        """Forget what was seen of one parameter, on its way and at its owners; on all ranks alike."""
        if watched.squares is not None:
            watched.squares.zero_()
        if destination is None:
            return
        for bucket in self.buckets.values():
            bucket.forget(watched)
        partition = self.partitions.get(id(destination.tensor))
        rank = dist.get_rank(destination.process_group)
        for run in destination.slices if partition is not None else ():
            if run.owner == rank:
                partition.narrow(0, run.start, run.length).zero_()  # type: ignore[union-attr]

    def add(self, watched: Watched, gradient: torch.Tensor, destination: Destination | None) -> None:
        """Add the squares of one group's whole gradient, and send them if the gradient itself does not stay."""
        arrange = None if destination is None else destination.arrange
        flat = gradient.reshape(-1) if arrange is None else arrange(gradient)
        dtype = compute_dtype(flat)
        if destination is not None and watched.squares is None and not destination.is_kept():
            self._bucket(destination, dtype).add(watched, destination, flat)
            return
        if watched.squares is None or watched.squares.shape != flat.shape:  # the parameter may have been resized
            watched.squares = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
        wide = flat.to(dtype)
        watched.squares.addcmul_(wide, wide)
        if destination is not None and not destination.is_kept():
            self._send(watched, destination)

    def of_whole_layers(
        self, layout: Layout, watched: Sequence[Watched], data_parallel: DataParallel, groups: int
    ) -> list[torch.Tensor]:
        """Squares of unsharded layers, added over the ranks in place: one all-reduce of the gradient's size.

        Args:
            layout: Of one `step()` call.
            watched: Its layers.
            data_parallel: The ranks.
            groups: By how much this rank's squares are multiplied where there are several.
        """
        for tensor, layer in zip(layout.tensors, watched, strict=True):
            if layer.squares is None or layer.squares.numel() != tensor.numel():
                layer.squares = torch.zeros(tensor.numel(), dtype=compute_dtype(tensor), device=tensor.device)
        squares = [layer.squares for layer in watched if layer.squares is not None]
        fresh = [s for s in squares if id(s) not in self._reduced]
        if data_parallel.ranks > 1:
            _add_packed(fresh, lambda packed: data_parallel.add(packed.mul_(groups)))
        self._reduced.update(map(id, fresh))
        return squares

    def of_shards(
        self,
        layout: Layout,
        watched: Sequence[Watched],
        destinations: Sequence[Destination],
        replicas: dist.ProcessGroup | None,
    ) -> list[torch.Tensor]:
        """Squares of this rank's parts; those kept whole until now are sent to their owners.

        Args:
            layout: Of one `step()` call.
            watched: Its layers.
            destinations: Where each layer's gradient goes.
            replicas: The ranks that hold the same shards, if any do.
        """
        # Those of whole gradients go once per step, zeros too, since all ranks must send the same; those of gradients
        # that were kept while they accumulated go if the last micro-batch, which sends them, had none of this layer.
        for layer, destination in zip(watched, destinations, strict=True):
            if destination.kept_whole and id(layer) not in self._reduced:
                self._reduced.add(id(layer))
                parameter = layer.parameter()
                assert parameter is not None
                if layer.squares is None:
                    layer.squares = torch.zeros(
                        parameter.numel(), dtype=compute_dtype(parameter), device=parameter.device
                    )
                self._send(layer, destination)
            elif layer.squares is not None and not destination.kept_whole:
                self._send(layer, destination)
        for bucket in self.buckets.values():
            bucket.flush()
        partitions = [self._partition(tensor) for tensor in layout.tensors]
        self._add_replicas([part for part in partitions if id(part) not in self._reduced], replicas)
        return partitions

    def _send(self, watched: Watched, destination: Destination) -> None:
        """Send squares that were kept whole."""
        assert watched.squares is not None
        self._bucket(destination, watched.squares.dtype).add(watched, destination, watched.squares, squared=True)
        if not destination.kept_whole:
            watched.squares = None

    def _bucket(self, destination: Destination, dtype: torch.dtype) -> Bucket:
        of_wrapper = destination.process_group
        if backward_pass() == -1:
            self.open(of_wrapper, destination.tensor.device)
        # Where no forward of the whole model was seen before backward: the wrapper's own, which has a communicator.
        _, process_group = self.groups.get(id(of_wrapper), (of_wrapper, of_wrapper))
        key = id(process_group), dtype
        if key not in self.buckets:
            self.buckets[key] = Bucket(process_group, dtype, self._partition)
        return self.buckets[key]

    def _partition(self, tensor: torch.Tensor) -> torch.Tensor:
        """The squares of the elements of one local tensor."""
        if id(tensor) not in self.partitions:
            self.partitions[id(tensor)] = zeros_like_local(tensor)
        return self.partitions[id(tensor)]

    def _add_replicas(self, partitions: list[torch.Tensor], replicas: dist.ProcessGroup | None) -> None:
        """Add partitions over the ranks that hold the same shards: one all-reduce per bucket of elements."""
        if replicas is not None:
            _add_packed(partitions, lambda packed: add_over(replicas, packed))
        self._reduced.update(map(id, partitions))


class Bucket:
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
        """Send nothing of what waits."""
        self.waiting.clear()
        self.elements = 0

    def forget(self, watched: Watched) -> None:
        """Send nothing of what waits of one parameter."""
        for key in [key for key in self.waiting if key[0] == id(watched)]:
            _, parts = self.waiting.pop(key)
            self.elements -= sum(run.length for run, _ in parts)

    def add(self, watched: Watched, destination: Destination, flat: torch.Tensor, *, squared: bool = False) -> None:
        """Add a whole gradient's squares, or the gradient itself to be squared."""
        limit = BUCKET_ELEMENTS // 2
        for number, slices in enumerate(_cut(destination.slices, limit)):
            values = _cast([flat.narrow(0, s.offset, s.length) for s in slices], self.dtype)
            waiting = self.waiting.get((id(watched), number))
            if waiting is not None:
                totals = [total for _, total in waiting[1]]
                torch._foreach_add_(totals, values) if squared else torch._foreach_addcmul_(totals, values, values)
                continue
            size = sum(s.length for s in slices)
            if self.elements + size > limit:
                self.flush()
            # Copies, in one operation.
            squares = torch._foreach_add(values, 0) if squared else torch._foreach_mul(values, values)
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
        to_this_rank = of_owner[dist.get_rank(self.process_group)]
        total = self._reduce([[squares for _, _, squares in parts] for parts in of_owner])
        kept = [self.partition(d.tensor).narrow(0, run.start, run.length) for d, run, _ in to_this_rank]
        if kept:
            parts = total.to(kept[0].device).split([len(part) for part in kept])
            torch._foreach_add_(kept, [part.to(own.device) for part, own in zip(parts, kept, strict=True)])

    def _reduce(self, of_owner: list[list[torch.Tensor]]) -> torch.Tensor:
        """Add each owner's elements over all ranks; return this rank's own."""
        rank, ranks = dist.get_rank(self.process_group), len(of_owner)
        lengths = [sum(map(len, parts)) for parts in of_owner]
        if ranks == 1:
            return torch.cat(of_owner[0])
        if ranks * max(lengths) <= 1.25 * sum(lengths):
            return self._reduce_scatter(of_owner, max(lengths))[: lengths[rank]]
        of_this_rank = torch.empty(0, dtype=self.dtype, device="cpu")
        for owner, parts in enumerate(of_owner):
            if parts:
                packed = self._on_device(torch.cat(parts))
                dist.reduce(packed, dist.get_global_rank(self.process_group, owner), group=self.process_group)
                of_this_rank = packed if owner == rank else of_this_rank
        return of_this_rank

    def _reduce_scatter(self, of_owner: list[list[torch.Tensor]], width: int) -> torch.Tensor:
        device = of_owner[0][0].device if of_owner[0] else torch.device("cpu")
        packed = torch.zeros(len(of_owner), width, dtype=self.dtype, device=device)
        for row, parts in zip(packed, of_owner, strict=True):
            if parts:
                torch.cat(parts, out=row[: sum(map(len, parts))])
        packed = self._on_device(packed)
        of_this_rank = torch.empty(width, dtype=self.dtype, device=packed.device)
        # The older name is deprecated where the newer exists.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(of_this_rank, packed.view(-1), group=self.process_group)
        return of_this_rank

    def _on_device(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.to(reduction_device(self.process_group, packed.device))


def _cut(slices: Sequence[Slice], limit: int) -> Iterator[list[Slice]]:
    """Cut a layer's slices alongside each other into sets of at most `limit` elements."""
    step = max(1, limit // max(1, len(slices)))
    for begin in range(0, max((s.length for s in slices), default=0), step):
        yield [s.part(begin, begin + step) for s in slices if begin < s.length]


def _cast(pieces: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The flat pieces themselves, or copies in another dtype, which are made at once."""
    if pieces[0].dtype == dtype:
        return pieces
    return list(torch.cat(pieces).to(dtype).split([len(piece) for piece in pieces]))


def _add_packed(tensors: Sequence[torch.Tensor], add: Callable[[torch.Tensor], None]) -> None:
    """Give flat tensors to `add`, which works in place, several of them as one."""
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


def zeros_like_local(tensor: torch.Tensor) -> torch.Tensor:
    """For the squares of the elements of one local tensor, flat."""
    local = local_part(tensor)
    return torch.zeros(local.numel(), dtype=compute_dtype(local), device=local.device)
