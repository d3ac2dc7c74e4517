"""Clips gradients by the norms of the whole model, of layers, or of rows of layers, wherever their elements are."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from trustratio.optimizers.formulas.chunks import Flattened, multiply, squares
from trustratio.optimizers.formulas.rows import Rows
from trustratio.optimizers.sharding.data_parallel import processes
from trustratio.optimizers.sharding.layout import Layout, LayoutError, Shard, listing
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.local_tensors import has_fp64, local_part, placements_of
from trustratio.optimizers.sharding.names import observed
from trustratio.optimizers.stepping.agreement import GRADIENT
from trustratio.optimizers.stepping.gradients import read_gradients

from .clips import noting, step_is_taken
from .kept_layout import KeptLayout
from .shard_sums import MOST_KEPT, ShardSums
from .steps_under_way import is_inner_step, watch_steps

__all__ = ["clip", "clip_now", "refuse_step_in_backward"]

EPS = 1e-6  # in torch's coefficient
SMALLEST_ROW = 1e-3  # Brock et al. 2021: smaller rows of weights count as large as this

AVERAGED = (
    "clip_grad_norm_ needs gradients that ranks have averaged: call it after a step's last backward, outside no_sync()"
)


def clip(
    optimizers: Sequence[torch.optim.Optimizer], max_norm: float, per_layer: bool | str, model: torch.nn.Module | None
) -> torch.Tensor:
    """As `clip_grad_norm_`, of the optimizers that are stepped."""
    limit = _limit(max_norm)
    if not isinstance(per_layer, bool) and per_layer != "rows":
        raise ValueError(f'per_layer must be False, True or "rows", got {per_layer!r}')
    clippers = [_clipper(optimizer, model) for optimizer in optimizers]
    for clipper in clippers:
        clipper.prepare(per_layer)
    held_back = [clipper for clipper in clippers if clipper.is_held_back()]
    if held_back and len(clippers) > 1:
        raise LayoutError(
            f"clip_grad_norm_ cannot see the gradients of {len(clippers)} chained optimizers together, which their "
            "wrapper holds back until they are stepped: use the wrapper's own clipping (clip_grad in Megatron's "
            "OptimizerConfig)"
        )
    return clippers[0].clip_at_step(limit, per_layer) if held_back else _clip_seen(clippers, limit, per_layer)


def refuse_step_in_backward(optimizer: Any) -> None:
    """Raise LayoutError of accelerate's wrapper of DeepSpeed's optimizer, whose step was taken within backward."""
    if any(kind.__name__ == "DeepSpeedOptimizerWrapper" for kind in type(optimizer).__mro__):
        raise LayoutError(
            "accelerate takes DeepSpeed's step within accelerator.backward(), and optimizer.step() takes none: a clip "
            "between them would be of the next step. Set gradient_clipping in the DeepSpeed config, or call "
            "clip_grad_norm_(optimizer.optimizer, ...) before accelerator.backward()"
        )


def _limit(max_norm: Any) -> float:
    """A limit as a float, however large.

    Raises:
        ValueError: If it is negative or no number.
    """
    is_number = isinstance(max_norm, Real) and not isinstance(max_norm, bool)
    if is_number and 0 <= max_norm <= inf:
        return float(max_norm) if max_norm <= sys.float_info.max else inf
    raise ValueError(f"max_norm must be a number of at least 0, got {max_norm!r}")


@torch.no_grad()
def _clip_seen(clippers: Sequence[Clipper], max_norm: float, per_layer: bool | str) -> torch.Tensor:
    """Clip gradients that are there, of all optimizers together."""
    measured = [clipper.measure(clipper.all_tensors, per_layer) for clipper in clippers]
    norms = torch.cat([one.norms.to(measured[0].norms.device) for one in measured])
    whole = torch.linalg.vector_norm(norms)
    for clipper, one in zip(clippers, measured, strict=True):
        clipper.agree(one.norms)
        with noting(clipper.gradients(clipper.all_tensors)) as said:
            said.append(one.clip(max_norm, whole if per_layer is False else None))
    return norms if per_layer is True else whole


@dataclass
class _Pending:
    """A clip that was arranged for the next step.

    Attributes:
        max_norm: As of `clip_grad_norm_`.
        per_layer: Likewise.
        norms: What it has returned.
        waiting: Ids of the tensors that are to be stepped before it is done.
        skipped: How many steps the wrapper had skipped by then.
    """

    max_norm: float
    per_layer: bool | str
    norms: torch.Tensor
    waiting: set[int]
    skipped: int


class Clipper:
    """Clips the gradients of one optimizer: at once, or as soon as its next step begins, in all its calls.

    It lives with the optimizer, whose hooks hold it.

    Attributes:
        kept: The optimizer, and the layout of its steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None):
        self.model = None if model is None else weakref.ref(model)
        self.kept = KeptLayout(optimizer, functools.partial(observed, model=model))
        self._sums: ShardSums | None = None
        self._rows: Rows | None = None
        self._masks: dict[frozenset[int], torch.Tensor] = {}
        self._pending: _Pending | None = None
        self._skipped: Callable[[], int] = int
        self._call: Any = None  # the keywords of the step that has begun, which no other step shares
        self.handles = watch_steps(optimizer, after=self._after_call)
        self._is_told = False
        self._averaging: WeakSet[DistributedDataParallel] = WeakSet()

    @property
    def all_tensors(self) -> range:
        """Indices of all local tensors."""
        return range(len(self._known.layout.tensors))

    def is_held_back(self) -> bool:
        """Whether nobody sees the gradients before the step. A rank may also have none where others step all layers."""
        return self._known.layout.others is None and not self.kept.has_own_parameters()

    def prepare(self, per_layer: bool | str) -> None:
        """Find the layout, and the rows that are cut, if they are not known or tensors have changed since."""
        if self._sums is None or not self.kept.is_current():
            self._sums, self._rows, self._masks = ShardSums(self.kept.resolve()), None, {}
            self._skipped = self.kept.count_skipped_steps()
            self._averaging = WeakSet(_averaging(self.kept.optimizer))
        if not all(module.require_backward_grad_sync for module in self._averaging):
            raise LayoutError(f"{AVERAGED} of DistributedDataParallel")
        if per_layer == "rows" and self._rows is None:
            _refuse_rows(self._known.layout)
            self._rows = Rows(self._known.layout, range(len(self._known.layout.layers)))
        if per_layer is False:
            _refuse_own_layers(self._known.layout)
        if not self.kept.in_parts and per_layer is False and self._known.layout.gradient_norm is not None:
            self._norm_of_wrapper()

    def agree(self, norms: torch.Tensor) -> None:
        """Raise LayoutError if ranks that should have the same gradients have not; asked once for every layout."""
        try:
            self.kept.agree({GRADIENT: norms})
        except LayoutError as error:
            raise LayoutError(f"{AVERAGED}. Here {error}") from error

    def measure(self, call: Collection[int], per_layer: bool | str) -> Measured:
        """The norms of the gradients of some local tensors, given by their indices: one all-reduce."""
        return Measured(self._known, self._rows if per_layer == "rows" else None, call)

    def clip_at_step(self, max_norm: float, per_layer: bool | str) -> torch.Tensor:
        """Arrange that the next step's gradients are clipped; what it returns will then hold the norms."""
        layout = self._known.layout
        shape = (len(layout.layers),) if per_layer is True else ()
        norms = torch.full(shape, float("nan"), dtype=torch.float64, device=layout.numbers_device)
        if not self._is_told:  # not before, as a clip at once may be made by another such hook
            self.handles += watch_steps(self.kept.optimizer, before=self._before_call)
            self._is_told = True
        self._pending = _Pending(max_norm, per_layer, norms, set(self.kept.stepped), self._skipped())
        return norms

    def _before_call(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_inner_step(optimizer):
            self.clip_pending(kwargs)

    @torch.no_grad()
    def clip_pending(self, kwargs: Any) -> None:
        """Clip the gradients of the call that begins, once, if that was arranged.

        Args:
            kwargs: The keywords of the call, by which it is known.
        """
        pending = self._pending
        if pending is None or kwargs is self._call:
            return
        self._call = kwargs
        tensors = {id(tensor) for group in self.kept.optimizer.param_groups for tensor in group["params"]}
        if pending.skipped != self._skipped() or (tensors and pending.waiting.isdisjoint(tensors)):
            self._pending = None  # its step was skipped, or ended by an exception
            return
        pending.waiting -= tensors
        if not pending.waiting or not self.kept.in_parts:
            self._pending = None
        self.prepare(pending.per_layer)
        call = self.kept.of_call()
        layout = self._known.layout
        norms, measured = pending.norms, self.measure(call, pending.per_layer)
        if pending.per_layer is True:
            norms.copy_(torch.where(self._layers_of(call), measured.norms, norms))
        elif layout.gradient_norm is None:
            norms.copy_(torch.linalg.vector_norm(measured.norms))
        else:
            norms.copy_(self._norm_of_wrapper())
        with noting(self.gradients(call)) as said:
            said.append(measured.clip(pending.max_norm, norms if pending.per_layer is False else None))

    def _layers_of(self, call: Collection[int]) -> torch.Tensor:
        """Which layers are in a call's local tensors, shape (layers,), bool; sent to the device once, as that waits."""
        layout, key = self._known.layout, frozenset(call)
        if key not in self._masks:
            if len(self._masks) == MOST_KEPT:
                self._masks.clear()
            inside = torch.tensor([layer.tensor in key for layer in layout.layers], device="cpu", dtype=torch.bool)
            self._masks[key] = inside.to(layout.numbers_device)
        return self._masks[key]

    def _after_call(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_inner_step(optimizer):
            self._call = None
            if self._sums is not None:
                step_is_taken(self.gradients(self.kept.of_call()))

    def gradients(self, call: Collection[int]) -> list[torch.Tensor]:
        """Those that the optimizer sees, in a call's local tensors."""
        gradients = [self._known.layout.tensors[index].grad for index in call]
        return [gradient for gradient in gradients if gradient is not None]

    @property
    def _known(self) -> ShardSums:
        assert self._sums is not None
        return self._sums

    def _norm_of_wrapper(self) -> torch.Tensor:
        """The norm of the whole model's gradient, where a call does not see the whole model."""
        layout = self._known.layout
        assert layout.gradient_norm is not None
        try:
            return layout.gradient_norm().to(device=layout.numbers_device, dtype=torch.float64)
        except LayoutError as error:
            instead = "per_layer=True" if layout.clips_with is None else f"{layout.clips_with}, or per_layer=True"
            raise LayoutError(f"clip_grad_norm_ by the norm of the whole model: {error}. Use {instead}") from error


_clippers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # optimizer -> weak reference to its Clipper


def _clipper(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> Clipper:
    """The optimizer's, with what it knows of the layout from the last clip."""
    known: Clipper | None = _clippers[optimizer]() if optimizer in _clippers else None
    if known is None or (None if known.model is None else known.model()) is not model:
        for handle in known.handles if known is not None else ():
            handle.remove()
        known = Clipper(optimizer, model)
        _clippers[optimizer] = weakref.ref(known)
    return known


def clip_now(optimizer: torch.optim.Optimizer, kwargs: Any) -> None:
    """Do the arranged clip of an optimizer whose step begins.

    Args:
        optimizer: The optimizer.
        kwargs: The keywords of the step.
    """
    clipper: Clipper | None = _clippers[optimizer]() if optimizer in _clippers else None
    if clipper is not None:
        clipper.clip_pending(kwargs)


class Measured:
    """Gradients of some local tensors with the norms of their layers.

    Args:
        sums: Of the layout.
        rows: Those that are clipped one by one; None to clip layers.
        call: Indices of the local tensors.
    """

    def __init__(self, sums: ShardSums, rows: Rows | None, call: Collection[int]):
        self._sums, self._rows = sums, rows
        self.layout = sums.layout
        self._gradients = [None if g is None else g.detach() for g in read_gradients(self.layout)]
        self._present = {index for index in call if self._gradients[index] is not None}
        self._of_rows: list[torch.Tensor] = []
        if rows is not None:
            weights = [local_part(tensor).detach().contiguous() for tensor in self.layout.tensors]
            self._of_rows = [self._sums_of_rows(self._gradients), self._sums_of_rows(weights)]

    @functools.cached_property
    def norms(self) -> torch.Tensor:
        """Of all layers, shape (layers,), fp64; zero for those of other tensors.

        One all-reduce, which completes the sums of rows that are cut, too.
        """
        local = self._sums.squares(lambda chunk: self._sums.read(self._gradients, chunk), self._present)
        return self._reduce(local).sqrt()

    def clip(self, max_norm: float, norm: torch.Tensor | None) -> torch.Tensor:
        """Clip, rows by their own norms, layers by one norm or by their own; whether anything became smaller."""
        if self._rows is not None:
            return self._clip_rows(max_norm)
        norms = self.norms if norm is None else norm.expand(len(self.layout.layers))
        coefficients = (max_norm / (norms + EPS)).clamp(max=1.0)
        self._scale(coefficients)
        return (coefficients < 1).any()

    def _scale(self, coefficients: torch.Tensor) -> None:
        """Multiply each layer's gradient, where it is, by its coefficient."""
        device = self.layout.device
        of_layers = coefficients.to(device=device, dtype=torch.float64 if has_fp64(device) else torch.float32).unbind()
        shards_in: dict[int, list[Shard]] = {}
        for shard in self.layout.shards:
            shards_in.setdefault(self.layout.layers[shard.layer].tensor, []).append(shard)
        views, factors = [], []
        for index in self._present.intersection(shards_in):
            gradient, shards = self._source(index), shards_in[index]
            if placements_of(self.layout.tensors[index]) is not None or not gradient.is_contiguous():
                # One layer, as its gradient lies, which may be cut in another way than the weights.
                views.append(gradient)
                factors.append(of_layers[shards[0].layer])
                continue
            views += [gradient.view(-1).narrow(0, shard.start, shard.length) for shard in shards]
            factors += [of_layers[shard.layer] for shard in shards]
        multiply(views, factors)

    def _source(self, index: int) -> torch.Tensor:
        """Where a gradient came from: the local part of it, as the optimizer sees it."""
        gradient = self.layout.tensors[index].grad
        assert gradient is not None
        return local_part(gradient).detach()

    # Rows

    def _sums_of_rows(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Sums of squares of the rows here, shape (rows,)."""
        assert self._rows is not None
        totals = torch.zeros(self._rows.count, dtype=torch.float64, device=self.layout.numbers_device)
        for chunk in self._sums.chunks:
            part = chunk.only(self._present.__contains__)
            if part is not None:
                self._rows.add_sums(totals, part, squares(self._sums.read(tensors, part)))
        return totals

    def _reduce(self, local: torch.Tensor) -> torch.Tensor:
        """The layers' sums over all shards, shape (layers,), and with them, in place, those of rows that are cut."""
        if self._rows is None:
            return self.layout.reduce(local.unsqueeze(0)).squeeze(0)
        columns = [local, *(self._rows.take_cut(sums) for sums in self._of_rows)]
        owners = (*range(len(local)), *self._rows.slot_layers * len(self._of_rows))
        reduced = self.layout.reduce(torch.cat(columns).unsqueeze(0), owners).squeeze(0)
        of_layers, *of_cut = reduced.split([len(column) for column in columns])
        for sums, completed in zip(self._of_rows, of_cut, strict=True):
            self._rows.put_cut(sums, completed)
        return of_layers

    def _clip_rows(self, max_norm: float) -> torch.Tensor:
        assert self._rows is not None
        _ = self.norms
        gradients, weights = (sums.sqrt() for sums in self._of_rows)
        limits = max_norm * weights.clamp(min=SMALLEST_ROW)
        coefficients = torch.where(gradients > limits, limits / gradients, torch.ones_like(gradients))
        flat = Flattened(self._gradients)
        for chunk in self._sums.chunks:
            part = chunk.only(self._present.__contains__)
            if part is not None:
                elements = self._sums.read(self._gradients, part)
                factor = self._rows.spread(coefficients, part, elements.dtype).to(elements.device)
                part.write(flat, elements * factor)
        for index in self._present:
            self._put_back(index)
        return (coefficients < 1).any()

    def _put_back(self, index: int) -> None:
        """Write a clipped gradient to where it came from, if it is a copy in another order."""
        source, clipped = self._source(index), self._gradients[index]
        assert clipped is not None
        if source.data_ptr() != clipped.data_ptr():
            source.copy_(clipped)


def _averaging(optimizer: torch.optim.Optimizer) -> Iterator[DistributedDataParallel]:
    """Yield the DDP modules that average gradients of the optimizer over several ranks."""
    stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for module in living(DistributedDataParallel) if processes() > 1 else ():
        if "_modules" in vars(module) and any(id(parameter) in stepped for parameter in module.parameters()):
            yield module


def _refuse_own_layers(layout: Layout) -> None:
    """Raise LayoutError if a rank has layers of its own, of which others would have to add up the norms, too."""
    own = [layer.name for layer in layout.layers if not getattr(layer.parameter, "allreduce", True)]
    if own and not layout.reductions and layout.gradient_norm is None and processes() > 1:
        raise LayoutError(
            f"clip_grad_norm_ by the norm of the whole model: each rank has layers of its own (allreduce = False), "
            f"{listing(own)}, so that ranks would clip what they share differently. Use per_layer=True"
        )


def _refuse_rows(layout: Layout) -> None:
    """Raise LayoutError, on all ranks alike, if a row may lie on several ranks in another way than in runs."""
    broken = torch.zeros(1, len(layout.layers), dtype=torch.float64, device=layout.numbers_device)
    several = [0] * len(layout.layers)
    for process_group, layers in layout.reductions:
        for layer in layers:
            several[layer] += process_group.size() > 1
    for shard in layout.shards:
        broken[0, shard.layer] += not shard.is_run
    of_all = layout.reduce(broken)[0].tolist()
    names = [
        layer.name
        for layer, pieces, groups in zip(layout.layers, of_all, several, strict=True)
        if pieces or groups > 1 or (groups and not layout.placed)
    ]
    if names:
        raise LayoutError(
            f'clip_grad_norm_(per_layer="rows") needs rows that are cut along one line: under {layout.backend} those '
            f"of {listing(names)} are cut in columns, or over several process groups. Use per_layer=True, or shard "
            "along the first dimension"
        )
