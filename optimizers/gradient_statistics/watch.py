"""Statistics of the gradients of single groups of samples, taken in backward before gradients are reduced.

A group is one rank's one micro-batch. Its gradient is seen by a hook on the parameter, which gets the fresh local
gradient before anything else does, whatever wraps the model. Two things are kept of the groups since the last step:

    norms      per layer: sum of the norms and of their squares. A few numbers per layer, which travel with the first
               sums of the step.
    squares    per element: sum of the squares, sharded like the gradient. Where every rank keeps whole gradients
               until the step (one process, DDP, ZeRO-0 and 1), squares are added up locally and reduced in the step:
               one more reduction of the gradient's size. Where it does not (ZeRO-2 and 3), neither can squares be
               kept whole: they are sent to the owners of the elements in backward, bucket by bucket, as the gradient
               itself is, once per micro-batch.

With h the gradient that a hook sees, `step()` gets gbar = (c / ranks) sum h, over ranks and micro-batches. The factor
c is 1 over the loss scale, times what clipping took; 1/accumulation is already in h. With n micro-batches per rank
there are k = n · ranks groups, and group i's gradient, on the scale of gbar = (1/k) sum g_i, is g_i = n c h_i.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..sharding.backends import _backends, find_data_parallel, find_gradient_flow, find_sources
from ..sharding.data_parallel import DataParallel
from ..sharding.gradient_flow import Destination, GradientFlow
from ..sharding.layout import Layer, Layout
from ..sharding.local_tensors import add_over, compute_dtype, local_part, placements_of
from .norms import GroupNorms, StatisticsError, StepStatistics, norms_from_table
from .squares import _add_packed, _Bucket, _Watched, _zeros_like

__all__ = ["GradientStatistics"]


FEW_GROUPS = 8
"""With fewer groups the element-wise variance says little; the paper of VRGD demands as many."""

HOW_TO_BUILD = (
    "Group gradients are seen in backward(): construct the optimizer with the model's own parameters, pass that object "
    "to the wrapper, and let backward() make the gradients. Gradients made in another way are given by "
    "optimizer.statistics.add_group({name or parameter: gradient}), once per group."
)


class GradientStatistics:
    """Watches the parameters of one optimizer.

    Everything is discarded by `optimizer.zero_grad()`, and with the first gradient after a step or after a step that
    the wrapper skipped.
    """

    def __init__(self, optimizer: Any, squares: bool):
        """Watch nothing yet.

        Args:
            optimizer: Its owner.
            squares: Whether element-wise squares are wanted besides the norms.
        """
        self._optimizer = weakref.ref(optimizer)
        self._squares = squares
        self._watched: dict[int, _Watched] = {}
        self._warned = False
        self._forward_hook: Any = None
        self._forget_wrapper()
        self._look_for_sources()

    @property
    def squares(self) -> bool:
        """Whether element-wise squares are collected besides the norms."""
        return self._squares

    @property
    def groups(self) -> int:
        """How many groups of this rank have been seen since the last step."""
        return max((watched.groups for watched in self._watched.values()), default=0)

    def watch(self, parameter: torch.Tensor) -> None:
        """See the gradient of every group with respect to this parameter from now on."""
        watched = self._watched.get(id(parameter))
        if watched is not None and watched.parameter() is parameter:
            return
        self._watched[id(parameter)] = watched = _Watched(weakref.ref(parameter))
        if parameter.is_leaf and parameter.is_floating_point():
            self._register(parameter, watched)

    def _register(self, tensor: torch.Tensor, watched: _Watched) -> None:
        this = weakref.ref(self)

        def hook(gradient: torch.Tensor) -> None:
            statistics = this()
            if statistics is not None and statistics._optimizer() is not None:
                statistics._see(watched, gradient.detach())

        trained = tensor.requires_grad
        tensor.requires_grad_(True)  # a frozen parameter takes no hook, and may be thawed later
        tensor.register_hook(hook)
        tensor.requires_grad_(trained)

    def _look_for_sources(self) -> None:
        """Ask after every forward of a module whether it used other tensors in place of the parameters.

        Until all are known, or until the first gradient shows that there are none.
        """
        if not any(hasattr(backend, "sources") for backend in _backends.load()):
            return
        this = weakref.ref(self)

        def after_forward(module: torch.nn.Module, *_: Any) -> None:
            statistics = this()
            if statistics is None:
                handle.remove()
            else:
                statistics._find_sources(module)

        self._forward_hook = handle = torch.nn.modules.module.register_module_forward_hook(after_forward)

    def _find_sources(self, module: torch.nn.Module) -> None:
        optimizer = self._optimizer()
        for parameter, source in [] if optimizer is None else find_sources(optimizer, module):
            self.watch(parameter)
            watched = self._watched[id(parameter)]
            if watched.source is None or watched.source() is not source:
                watched.source = weakref.ref(source)
                self._register(source, watched)

    def _stop_looking(self) -> None:
        """Called in backward, when forward is over. Parts of the model that it left out may come later."""
        groups = self._optimizer().param_groups  # type: ignore[union-attr]
        trained = [id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad]
        found = [key for key in trained if key in self._watched and self._watched[key].source is not None]
        if self._forward_hook is not None and len(found) in (0, len(trained)):
            self._forward_hook.remove()
            self._forward_hook = None

    def add_group(self, gradients: Mapping[Any, torch.Tensor]) -> None:
        """Count one group whose gradient was not made by backward(). For one process.

        Args:
            gradients: The group's gradient, by parameter or by the name that came with the parameter. The mean over
                the groups must be what the parameters' `.grad` holds at the step.

        Raises:
            KeyError: If a parameter is not the optimizer's.
        """
        by_name = {self._name(watched): watched for watched in self._watched.values()}
        for key, gradient in gradients.items():
            watched = self._watched.get(id(key)) if isinstance(key, torch.Tensor) else by_name.get(key)
            if watched is None:
                raise KeyError(
                    f"{key if isinstance(key, str) else type(key).__name__} is no parameter of the optimizer"
                )
            self._see(watched, gradient.detach())

    def discard(self) -> None:
        """Forget the groups seen so far; their gradients will not be part of the next step."""
        for watched in self._watched.values():
            watched.clear()
        for partition in self._partitions.values():
            partition.zero_()
        for bucket in self._buckets.values():
            bucket.clear()
        self._stepped = False
        self._reduced: set[int] = set()
        if self._data_parallel is not None:
            self._skipped_steps = self._data_parallel.skipped_steps()

    def _name(self, watched: _Watched) -> str | None:
        parameter, optimizer = watched.parameter(), self._optimizer()
        return None if parameter is None or optimizer is None else optimizer.parameter_name(parameter)

    def _forget_wrapper(self) -> None:
        self._data_parallel: DataParallel | None = None
        self._flow: GradientFlow | None = None
        self._loss_scale = 1.0
        self._skipped_steps = 0
        self._stepped = False
        self._reduced = set()
        self._partitions: dict[int, torch.Tensor] = {}
        self._buckets: dict[tuple[int, torch.dtype], _Bucket] = {}
        self._clipping = torch.ones((), dtype=torch.float64)
        self._last: dict[tuple[int, ...], tuple[tuple[str, ...], torch.Tensor]] = {}

    # Backward -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _see(self, watched: _Watched, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided or placements_of(gradient) is not None:
            return  # the step refuses sparse gradients, and those of which this rank has a part
        self._find_wrapper()
        if self._forward_hook is not None:
            self._stop_looking()
        assert self._data_parallel is not None
        if self._stepped or self._skipped_steps != self._data_parallel.skipped_steps():
            self.discard()
        if self._flow is not None:
            self._loss_scale = self._flow.loss_scale()
        watched.groups += 1
        norm = torch.linalg.vector_norm(gradient.reshape(-1), dtype=torch.float64)
        seen = torch.stack([norm, norm.square(), _probe(gradient)])
        watched.sums = seen if watched.sums is None else watched.sums.add_(seen)
        if self._squares:
            self._add_squares(watched, gradient)

    def _find_wrapper(self) -> None:
        if self._data_parallel is None:
            optimizer = self._optimizer()
            self._data_parallel = find_data_parallel(optimizer)
            self._skipped_steps = self._data_parallel.skipped_steps()
            self._flow = find_gradient_flow(optimizer)

    def _add_squares(self, watched: _Watched, gradient: torch.Tensor) -> None:
        destination = self._destination(watched)
        arrange = None if destination is None else destination.arrange
        flat = gradient.reshape(-1) if arrange is None else arrange(gradient)
        dtype = compute_dtype(flat)
        if destination is not None and watched.squares is None and not destination.is_kept():
            self._bucket(destination, dtype).add(watched, destination, flat)
            return
        if watched.squares is None:
            watched.squares = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
        wide = flat.to(dtype)
        watched.squares.addcmul_(wide, wide)
        if destination is not None and not destination.is_kept():
            self._send(watched, destination)

    def _send(self, watched: _Watched, destination: Destination) -> None:
        """Send squares that were kept whole."""
        assert watched.squares is not None
        self._bucket(destination, watched.squares.dtype).add(watched, destination, watched.squares, squared=True)
        if not destination.kept_whole:
            watched.squares = None

    def _destination(self, watched: _Watched) -> Destination | None:
        return None if self._flow is None else self._flow.destinations.get(id(watched.parameter()))

    def _bucket(self, destination: Destination, dtype: torch.dtype) -> _Bucket:
        key = id(destination.process_group), dtype
        if key not in self._buckets:
            # Of its own, so that it needs no agreed order with the collectives of the wrapper.
            ranks = dist.get_process_group_ranks(destination.process_group)
            process_group = dist.new_group(ranks, use_local_synchronization=True) if len(ranks) > 1 else None
            self._buckets[key] = _Bucket(process_group or destination.process_group, dtype, self._partition)
        return self._buckets[key]

    def _partition(self, tensor: torch.Tensor) -> torch.Tensor:
        """The squares of the elements of one local tensor."""
        if id(tensor) not in self._partitions:
            self._partitions[id(tensor)] = _zeros_like(tensor)
        return self._partitions[id(tensor)]

    # Step -----------------------------------------------------------------------------------------------------------

    def for_step(self, layout: Layout, gradients: Sequence[torch.Tensor | None]) -> StepStatistics:
        """Return what one `step()` call needs; squares that are still local are reduced here.

        Args:
            layout: Of the call.
            gradients: The flat gradients of the layout's tensors.

        Raises:
            StatisticsError: If there are gradients, but no group was ever seen.
        """
        watched = [self._watched_layer(layer) for layer in layout.layers]
        self._check_seen(layout, watched, gradients)
        if self.groups == 0:
            return self._nothing(layout)
        self._find_wrapper()
        self._stepped = True
        ranks, sharded = self._ranks(), bool(layout.reductions)
        # Where the wrapper tells the factor, the step's reduction adds up the ranks' averages. Where it has to be found
        # out of them, they are added up here, and every rank contributes its share of the result.
        told = self._flow is not None and self._flow.factor is not None and sharded
        averages = self._averages(layout, watched, gradients, complete=not told)
        factor = self._wrappers_factor(layout) if told else self._factor(layout, averages[2], averages[4])
        self._clipping = factor * self._loss_scale
        self._warn_of_few(self.groups * ranks)
        groups = torch.full_like(averages[0], self.groups if told else self.groups * ranks)
        shares = 1.0 if told else layout.copies
        contributions = {
            "group_norm": averages[0] * factor / shares,
            "group_square": averages[1] * factor.square() * self.groups / shares,
            "groups": groups / shares,
            "not_finite": averages[3],
        }
        if not self._squares:
            return StepStatistics(contributions, None)
        flats = self._sharded_squares(layout, watched) if sharded else self._whole_squares(layout, watched)
        # The variance of one group is zero, not what rounding makes of it: without squares it is clamped to zero.
        several = self.groups * ranks > 1
        return StepStatistics(contributions, (flats, factor.square() * (self.groups / ranks) * several))

    def _nothing(self, layout: Layout) -> StepStatistics:
        """No group was seen and gradients are zero: nothing will be updated. The wrapper may not even exist yet."""
        zeros = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.device)
        contributions = dict.fromkeys(("group_norm", "group_square", "groups", "not_finite"), zeros)
        flats = [_zeros_like(tensor) for tensor in layout.tensors]
        return StepStatistics(contributions, (flats, zeros.sum()) if self._squares else None)

    def _averages(
        self,
        layout: Layout,
        watched: Sequence[_Watched],
        gradients: Sequence[torch.Tensor | None],
        *,
        complete: bool,
    ) -> torch.Tensor:
        """The layers' sums divided by the ranks, 0 or NaN, and the probe of the gradient now; shape (5, layers).

        Over all ranks if `complete`; else of this rank's groups, which the step's reduction will add to the others'.
        """
        zeros = torch.zeros(3, dtype=torch.float64, device=layout.device)
        sums = torch.stack([zeros if layer.sums is None else layer.sums.to(layout.device) for layer in watched], dim=1)
        # 0 · sum is 0 unless something is not finite; of the whole model, though a call may see one group of it.
        of_model = [layer.sums[1].to(layout.device) for layer in self._watched.values() if layer.sums is not None]
        not_finite = (0 * torch.stack(of_model).sum()).expand(1, len(watched))
        now = _probes(layout, gradients) * layout.copies if complete else zeros[:1].expand(len(watched))
        averages = torch.cat([sums, not_finite, now.unsqueeze(0)])
        if complete:
            assert self._data_parallel is not None
            self._data_parallel.add(averages)
        return averages / self._ranks()

    def keep(self, layout: Layout, totals: Mapping[str, torch.Tensor]) -> None:
        """Keep the reduced sums of a `step()` call for `norms()`; on the device, so that no step waits for it."""
        rows = [totals[name] for name in ("groups", "group_norm", "group_square", "g")]
        clipping = self._clipping.expand_as(totals["g"])
        names = tuple(layer.name for layer in layout.layers)
        self._last[tuple(map(id, layout.tensors))] = names, torch.stack([*rows, clipping])

    def norms(self) -> dict[str, GroupNorms]:
        """Return the norms of every layer in the last step, without the loss scale and as before any clipping.

        Waits for the device; nothing else in this class does.

        Raises:
            StatisticsError: Before the first step.
        """
        if not self._last:
            raise StatisticsError(f"{self._owner()} has taken no step yet, so there are no statistics")
        names, table = self.norm_table()
        return norms_from_table(names, table.tolist())

    def norm_table(self) -> tuple[list[str], torch.Tensor]:
        """The same as layer names and a tensor, shape (5, layers), without waiting; see `norms_from_table`."""
        if not self._last:
            return [], torch.zeros(5, 0, dtype=torch.float64)
        names = [name for of_call, _ in self._last.values() for name in of_call]
        return names, torch.cat([rows for _, rows in self._last.values()], dim=1)

    def _check_seen(
        self, layout: Layout, watched: Sequence[_Watched], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Raise unless gradients come with groups. Zeros may come without: some wrappers step once to make the state.

        Where layers are whole and this process is alone, each layer can be told; else a layer may have its gradient
        from other ranks, and one that no group had a gradient for is not updated.
        """
        if self._flow is not None and self._flow.sources:
            for layer, seen in zip(layout.layers, watched, strict=True):
                if seen.source is None and gradients[layer.tensor] is not None:
                    raise StatisticsError(
                        f"{self._owner()} has a gradient of layer {layer.name} but saw none of its groups', since no "
                        "forward of a module under fully_shard was seen to use it. Construct the optimizer before the "
                        "first forward, and call the module rather than a method of it"
                    )
        if self.groups == 0:
            found = [g for g in gradients if g is not None and g.any()]
            if found:
                raise StatisticsError(f"{self._owner()} has gradients but saw no group's gradient. {HOW_TO_BUILD}")
        elif not layout.reductions and self._ranks() == 1:
            for layer, seen in zip(layout.layers, watched, strict=True):
                gradient = gradients[layer.tensor]
                if seen.groups == 0 and gradient is not None and gradient.any():
                    raise StatisticsError(
                        f"{self._owner()} has a gradient of layer {layer.name} but saw no group's. {HOW_TO_BUILD}"
                    )

    def _ranks(self) -> int:
        return 1 if self._data_parallel is None else self._data_parallel.ranks

    def _watched_layer(self, layer: Layer) -> _Watched:
        watched = self._watched.get(id(layer.parameter))
        if watched is None or watched.parameter() is not layer.parameter:
            raise StatisticsError(f"{self._owner()} does not know the parameter of layer {layer.name}. {HOW_TO_BUILD}")
        return watched

    def _owner(self) -> str:
        return type(self._optimizer()).__name__

    def _warn_of_few(self, groups: int) -> None:
        if self._squares and groups < FEW_GROUPS and not self._warned:
            self._warned = True
            meaning = (
                "the variance of one group is zero, so every multiplier is 1, as in the base optimizer"
                if groups == 1
                else "the variance between groups is hardly known, and most multipliers fall to gsnr_floor"
            )
            warnings.warn(
                f"{self._owner()} has {groups} group{'s' * (groups > 1)} of samples per step (ranks x micro-batches), "
                f"fewer than {FEW_GROUPS}: {meaning}. Use more ranks or more gradient accumulation.",
                stacklevel=2,
            )

    def _wrappers_factor(self, layout: Layout) -> torch.Tensor:
        assert self._flow is not None
        assert self._flow.factor is not None
        factor = self._flow.factor(self._loss_scale)
        if isinstance(factor, torch.Tensor):
            return factor.to(layout.device, torch.float64).reshape(())
        return torch.full((), factor, dtype=torch.float64, device=layout.device)

    def _factor(self, layout: Layout, seen: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """What the gradient was multiplied by since backward, where nobody tells: unscaling, and the user's clipping.

        The sum of every second element is linear in the gradient, so the average over ranks of what the hooks saw,
        times the factor, is what it is now. The best factor over all layers is taken; within rounding it is 1.
        """
        factor = (now * seen).sum() / seen.square().sum()
        coarsest = max(layer.gradient_resolution for layer in layout.layers)
        is_one = ((factor - 1).abs() <= 16 * coarsest) | (seen == 0).all()
        return torch.where(is_one, torch.ones_like(factor), factor)

    # Squares

    def _whole_squares(self, layout: Layout, watched: Sequence[_Watched]) -> list[torch.Tensor]:
        """Squares of unsharded layers, added over the ranks in place: one all-reduce of the gradient's size."""
        assert self._data_parallel is not None
        for tensor, layer in zip(layout.tensors, watched, strict=True):
            if layer.squares is None:
                layer.squares = torch.zeros(tensor.numel(), dtype=compute_dtype(tensor), device=tensor.device)
        squares = [layer.squares for layer in watched if layer.squares is not None]
        fresh = [s for s in squares if id(s) not in self._reduced]
        if self._ranks() > 1:
            _add_packed(fresh, self._data_parallel.add)
        self._reduced.update(map(id, fresh))
        return squares

    def _sharded_squares(self, layout: Layout, watched: Sequence[_Watched]) -> list[torch.Tensor]:
        """Squares of this rank's parts; those kept whole until now are sent to their owners."""
        for layer in watched:
            destination = self._destination(layer)
            if destination is None:
                raise StatisticsError(f"{layout.backend} does not tell where gradients go. {HOW_TO_BUILD}")
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
                self._send(layer, destination)  # without a gradient in the last micro-batch
        for bucket in self._buckets.values():
            bucket.flush()
        partitions = [self._partition(tensor) for tensor in layout.tensors]
        self._add_replicas([part for part in partitions if id(part) not in self._reduced])
        return partitions

    def _add_replicas(self, partitions: list[torch.Tensor]) -> None:
        """Add partitions over the ranks that hold the same shards: one all-reduce per bucket of elements."""
        replicas = None if self._data_parallel is None else self._data_parallel.replicas
        if replicas is not None:
            _add_packed(partitions, lambda packed: add_over(replicas, packed))
        self._reduced.update(map(id, partitions))


def _probe(gradient: torch.Tensor, begin: int = 0) -> torch.Tensor:
    """A number that is linear in the gradient: the sum of every second element along the last dimension.

    Of all elements it would be zero for many layers, e.g. a softmax's bias. `begin` is the position in the layer's last
    dimension of the part that is given, so that the parts' numbers add up to the layer's.
    """
    rows = gradient.reshape(-1, gradient.shape[-1] if gradient.dim() else 1)
    return rows[:, begin % 2 :: 2].sum(dtype=torch.float64)


def _probes(layout: Layout, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The probe of this rank's part of each layer's gradient; of layouts whose tensors carry one layer each."""
    found = [torch.zeros((), dtype=torch.float64, device=layout.device) for _ in layout.layers]
    for shard in layout.shards:
        layer = layout.layers[shard.layer]
        gradient = gradients[layer.tensor]
        if gradient is not None:
            local = gradient.view(local_part(layout.tensors[layer.tensor]).shape)
            begin = shard.offset % layer.shape[-1] if layer.shape else 0
            found[shard.layer] = _probe(local, begin).to(layout.device)
    return torch.stack(found)
