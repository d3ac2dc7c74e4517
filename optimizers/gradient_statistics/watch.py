"""Statistics of the gradients of single groups of samples, taken in backward before gradients are reduced.

A group is one rank's one micro-batch. Its gradient is seen by a hook on the parameter, which gets the fresh local
gradient before anything else does, whatever wraps the model. Two things are kept of the groups since the last step:

    norms      per layer: sum of the norms and of their squares. A few numbers per layer, which travel with the first
               sums of the step.
    squares    per element: sum of the squares, sharded like the gradient. They travel as the gradient itself does, and
               cost as much; see `squares.py`.

With h the gradient that a hook sees, `step()` gets gbar = (c / ranks) sum h, over ranks and micro-batches. The factor
c is 1 over the loss scale, times what clipping took; 1/accumulation is already in h. With n micro-batches per rank
there are k = n · ranks groups, and group i's gradient, on the scale of gbar = (1/k) sum g_i, is g_i = n c h_i.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..sharding.backends import find_gradient_flow, find_sources, may_replace_parameters, may_shard_gradients
from ..sharding.gradient_flow import Destination, GradientFlow
from ..sharding.layout import Layer, Layout, LayoutError
from ..sharding.local_tensors import placements_of
from .averaging import Averaging
from .factor import factor_between
from .loss_scale import LossScale
from .norms import HOW_TO_BUILD, GroupNorms, LastNorms, StatisticsError, StepStatistics, norms_from_table
from .probes import PROBES, LocalProbes
from .squares import Squares, zeros_like_local
from .sums import GroupSums
from .unseen import refuse_without_any_group, refuse_without_forward, refuse_without_groups, unseen_layers
from .verdict import Verdict
from .watched import Watched, backward_pass, call_after_backward, is_added_up

__all__ = ["GradientStatistics"]

FEW_GROUPS = 8
"""With fewer groups the element-wise variance says little; the paper of VRGD demands as many."""


class GradientStatistics:
    """Watches the parameters of one optimizer.

    Everything is discarded by `optimizer.zero_grad()`, and with the first gradient after a step or after a step that
    the wrapper skipped. What was seen of one parameter is discarded where the gradient that it was added to is gone,
    by whomever it was removed or set to zero.
    """

    def __init__(self, optimizer: Any, squares: bool):
        """Watch nothing yet.

        Args:
            optimizer: Its owner.
            squares: Whether element-wise squares are wanted besides the norms.
        """
        self._optimizer = weakref.ref(optimizer)
        self._watched: dict[int, Watched] = {}  # by the parameters' ids
        self._group_sums = GroupSums()
        self._squares = Squares() if squares else None
        self._of_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._last = LastNorms()
        self._warned = False
        self._forward_hook: Any = None
        # Of the wrapper, as far as it is known.
        self._averaging = Averaging(optimizer)
        self._flow: GradientFlow | None = None
        # Of the groups since the last step.
        self._loss_scale: torch.Tensor | float = 1.0
        self._stepped = False
        self._pass = -1  # the last backward pass, and whose gradients it made
        self._of_pass: list[Watched] = []
        self._scaler = LossScale(optimizer)
        self._verdict = Verdict()
        self._clipping = torch.ones((), dtype=torch.float64, device="cpu")
        self._look_for_sources()

    @property
    def squares(self) -> bool:
        """Whether element-wise squares are collected besides the norms."""
        return self._squares is not None

    @property
    def groups(self) -> int:
        """How many groups of this rank have been seen since the last step."""
        return max((watched.groups for watched in self._watched.values()), default=0)

    def watch(self, parameter: torch.Tensor) -> None:
        """See the gradient of every group with respect to this parameter from now on."""
        watched = self._watched.get(id(parameter))
        if watched is not None and watched.parameter() is parameter:
            return
        self._watched[id(parameter)] = watched = Watched(weakref.ref(parameter), self._group_sums.new_row())
        if self._forward_hook is None and self._flow is not None and self._flow.sources:
            self._look_for_sources()  # again: a group was added in the middle of training
        if parameter.is_leaf and parameter.is_floating_point() and not parameter.is_inference():
            self._register(parameter, watched)

    def _register(self, tensor: torch.Tensor, watched: Watched) -> None:
        this, hooked = weakref.ref(self), weakref.ref(tensor)

        def hook(gradient: torch.Tensor) -> None:
            statistics, tensor = this(), hooked()
            if statistics is None or tensor is None or statistics._optimizer() is None or not is_added_up(tensor):
                return
            statistics._see(watched, gradient.detach())

        trained = tensor.requires_grad
        tensor.requires_grad_(True)  # a frozen parameter takes no hook, and may be thawed later
        tensor.register_hook(hook)
        tensor.requires_grad_(trained)

    def _look_for_sources(self) -> None:
        """Ask after every forward of a module whether it used other tensors in place of the parameters.

        Until all are known, or until the first gradient shows that there are none. What squares need in backward is
        made in the first forward, too.
        """
        replacing = may_replace_parameters()
        if not (replacing or (self._squares is not None and may_shard_gradients())):
            return
        this = weakref.ref(self)

        def after_forward(module: torch.nn.Module, *_: Any) -> None:
            if torch.compiler.is_compiling() and not isinstance(module, replacing):
                return  # a graph goes on here, where a look at the module would end it
            statistics = this()
            if statistics is None:
                handle.remove()
            else:
                statistics._find_sources(module)

        self._forward_hook = handle = torch.nn.modules.module.register_module_forward_hook(after_forward)

    @torch._disable_dynamo
    def _find_sources(self, module: torch.nn.Module) -> None:
        optimizer, is_new = self._optimizer(), False
        for parameter, source in [] if optimizer is None else find_sources(optimizer, module):
            self.watch(parameter)
            watched = self._watched[id(parameter)]
            if watched.source is None or watched.source() is not source:
                watched.source = weakref.ref(source)
                self._register(source, watched)
                is_new = True
        if self._squares is not None and not self._squares.groups and (is_new or self._sees_all(module)):
            self._open_groups()

    def _sees_all(self, module: torch.nn.Module) -> bool:
        """Whether a forward that backward may follow has just run through all that is trained."""
        if not (module.training and torch.is_grad_enabled()):
            return False
        here = set(map(id, module.parameters()))
        living = ((key, watched.parameter()) for key, watched in self._watched.items())
        return here.issuperset(key for key, p in living if p is not None and p.requires_grad)

    def _open_groups(self) -> None:
        """Make the process groups of squares that will be sent in backward, before it."""
        optimizer = self._optimizer()
        if optimizer is None or backward_pass() != -1:  # where activations are computed again
            return
        try:
            flow = find_gradient_flow(optimizer)
        except (StatisticsError, LayoutError):  # which backward says
            return
        for destination in () if flow is None else flow.destinations.values():
            if self._squares is not None and not destination.kept_whole:
                self._squares.open(destination.process_group, destination.tensor.device)

    def _stop_looking(self) -> None:
        """Called in backward, when forward is over. Parts of the model that it left out may come later."""
        groups = self._optimizer().param_groups  # type: ignore[union-attr]
        trained = [id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad]
        replaced = [key for key in trained if key in self._watched and self._watched[key].source is not None]
        if self._forward_hook is not None and len(replaced) in (0, len(trained)):
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
        self._group_sums.clear()
        if self._squares is not None:
            self._squares.clear(self._watched.values())
        self._stepped = False
        self._averaging.has_skipped()  # counts as known from now on

    def _name(self, watched: Watched) -> str | None:
        parameter, optimizer = watched.parameter(), self._optimizer()
        return None if parameter is None or optimizer is None else optimizer.parameter_name(parameter)

    # Backward -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _see(self, watched: Watched, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided or placements_of(gradient) is not None or not gradient.numel():
            return  # the step refuses sparse gradients, and those of which this rank has a part
        if self._averaging.look():
            self._flow = find_gradient_flow(self._optimizer())
        if self._forward_hook is not None:
            self._stop_looking()
        if self._averaging.has_skipped() or self._stepped:
            self.discard()
        elif watched.groups and backward_pass() != -1 and not self._is_kept(watched):
            self._forget(watched)
        self._do_later(watched)
        if self._flow is not None:
            self._loss_scale = self._flow.loss_scale()
        watched.groups += 1
        self._group_sums.see(watched.row, gradient)
        if self._squares is not None:
            self._squares.add(watched, gradient, self._destination(watched))

    def _is_kept(self, watched: Watched) -> bool:
        """Whether the gradient of the groups seen so far is still there, so that the next is added to it."""
        destination = self._destination(watched)
        if destination is None:
            return watched.keeps_gradient()
        return destination.holds is None or destination.holds()

    def _forget(self, watched: Watched) -> None:
        """Forget the groups of one parameter, whose gradient was dropped."""
        watched.clear()
        self._group_sums.forget(watched.row)
        if self._squares is not None:
            self._squares.forget(watched, self._destination(watched))

    def _do_later(self, watched: Watched) -> None:
        """At the end of a backward pass add up what was seen, and note what the gradient is like.

        So that a change before the next pass is noticed, where nobody else has the gradient.
        """
        current = backward_pass()
        if current == -1:
            return
        if current != self._pass:
            self._pass, self._of_pass = current, []
            call_after_backward(partial(_after_backward, self._group_sums, self._of_pass))
        if self._flow is None:
            self._of_pass.append(watched)

    def _destination(self, watched: Watched) -> Destination | None:
        return None if self._flow is None else self._flow.destinations.get(id(watched.parameter()))

    # Step -----------------------------------------------------------------------------------------------------------

    def for_step(self, layout: Layout, gradients: Sequence[torch.Tensor | None]) -> StepStatistics:
        """Return what one `step()` call needs; squares that are still local are reduced here.

        Args:
            layout: Of the call.
            gradients: The flat gradients of the layout's tensors.

        Raises:
            StatisticsError: If there are gradients, but no group was ever seen; if the gradient was changed since
                backward by more than a factor, on a GPU at the next step.
            LayoutError: If there are several ranks, and nobody is known to average their gradients.
        """
        self._verdict.raise_for_last_step()
        if self._averaging.look_for_step(layout):
            self._flow = find_gradient_flow(self._optimizer())
        watched = [self._watched_layer(layer) for layer in layout.layers]
        for layer, seen in zip(layout.layers, watched, strict=True):
            if seen.groups and layout.tensors[layer.tensor] is layer.parameter and not seen.has_gradient():
                self._forget(seen)
        self._check_seen(layout, watched, gradients)
        if self.groups == 0 and not self._has_company(layout):
            return self._nothing(layout)
        self._averaging.need()
        self._stepped = True
        ranks, sharded = self._ranks(), bool(layout.reductions)

        # Where the wrapper tells the factor, the step's reduction adds up the ranks' averages. Where it has to be found
        # out of them, they are added up here, and every rank contributes its share of the result.
        told = self._flow is not None and self._flow.factor is not None and sharded
        sums = self._sums(layout, watched)
        if told:
            factor, shares = (
                self._wrappers_factor(layout),
                torch.ones((), dtype=torch.float64, device=layout.numbers_device),
            )
        else:
            # 1 where this rank has a gradient of a layer, although it has seen none of any.
            unseen = torch.zeros_like(layout.elements) if self.groups else unseen_layers(layout, gradients)
            now = self._of_layout(layout).probes(gradients) * layout.copies
            sums, factor = self._complete(layout, torch.cat([sums, unseen.unsqueeze(0), now]))
            shares = layout.copies
            self._loss_scale = self._loss_scale if self._flow is not None else self._scaler.now(layout.numbers_device)
        self._clipping = factor * self._loss_scale
        self._warn_of_few(self.groups * ranks)

        # A group's gradient is n c h (see above); the averages are of h, over the ranks.
        norms, squares, _, not_finite = sums[:4] / ranks
        contributions = {
            "group_norm": norms * factor / shares,
            "group_square": squares * factor.square() / shares,
            "groups": sums[2] / shares,
            "not_finite": not_finite,
        }
        if self._squares is None:
            return StepStatistics(contributions, None)

        # The squares' mean, (1/k) sum (n c h)^2. The variance of one group is zero, not what rounding makes of it:
        # without squares it is clamped to zero.
        flats = self._sum_of_squares(self._squares, layout, watched)
        several = self.groups * ranks > 1
        remaining = (1 if self._has_company(layout) else self.groups) / ranks
        return StepStatistics(contributions, (flats, factor.square() * remaining * several))

    def _sum_of_squares(self, squares: Squares, layout: Layout, watched: Sequence[Watched]) -> list[torch.Tensor]:
        """The squares of all ranks' groups, flat, in the order of the layout's tensors.

        Where ranks add up those of whole layers, each times its own number of groups, which need not be the same.
        """
        data_parallel = self._averaging.need()
        if not layout.reductions:
            return squares.of_whole_layers(layout, watched, data_parallel, self.groups)
        destinations = [destination for layer in watched if (destination := self._destination(layer)) is not None]
        if len(destinations) < len(watched):
            raise StatisticsError(f"{layout.backend} does not tell where gradients go. {HOW_TO_BUILD}")
        return squares.of_shards(layout, watched, destinations, data_parallel.replicas)

    def _nothing(self, layout: Layout) -> StepStatistics:
        """No group was seen and gradients are zero: nothing will be updated. The wrapper may not even exist yet."""
        zeros = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.numbers_device)
        contributions = dict.fromkeys(("group_norm", "group_square", "groups", "not_finite"), zeros)
        flats = [zeros_like_local(tensor) for tensor in layout.tensors]
        return StepStatistics(contributions, (flats, zeros.sum()) if self.squares else None)

    def _sums(self, layout: Layout, watched: Sequence[Watched]) -> torch.Tensor:
        """What this rank adds to the layers' sums, shape (4 + PROBES, layers).

        Norms; squares, times the number of groups; that number; 0 or NaN; and the probes.
        """
        sums = self._group_sums.of(self._of_layout(layout).rows(watched))
        groups = torch.full_like(sums[:1], self.groups)
        # Of the whole model, though a call may see one group of it.
        not_finite = self._group_sums.not_finite(layout.numbers_device).expand_as(groups)
        return torch.cat([sums[:1], sums[1:2] * self.groups, groups, not_finite, sums[2:]])

    def _of_layout(self, layout: Layout) -> _OfLayout:
        """What is kept from step to step for one layout."""
        if layout not in self._of_layouts:
            self._of_layouts[layout] = _OfLayout(layout)
        found: _OfLayout = self._of_layouts[layout]
        return found

    def _complete(self, layout: Layout, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add this rank's sums to the others' and find the factor in them.

        Returns:
            The sums over the ranks, and the factor. The not-finite row is NaN if the step must not be taken.
        """
        self._averaging.need().add(sums)
        ranks = self._ranks()
        now = sums[5 + PROBES :] / ranks
        # A layer whose gradient was set to zero takes no part, whatever was seen of it.
        sums[:2] = torch.where((now != 0).any(dim=0), sums[:2], 0.0)
        sums[3] = (0 * sums[1]).sum()
        squares, groups, seen, unseen = sums[1], sums[2], sums[4 : 4 + PROBES] / ranks, sums[4 + PROBES]
        mean_square = squares / (groups / ranks).clamp(min=1) / ranks**2
        found = factor_between(layout, seen, now, mean_square, additions=groups / ranks + ranks)
        wrong = torch.stack([unseen > 0, found.disagrees & found.value.isfinite()])
        sums[3] += torch.where(wrong.any(), torch.nan, 0.0)
        self._verdict.give(wrong, [layer.name for layer in layout.layers], self._owner())
        return sums, found.value

    def keep(self, layout: Layout, totals: Mapping[str, torch.Tensor]) -> None:
        """Keep the reduced sums of a `step()` call for `norms()`; on the device, so that no step waits for it."""
        self._last.keep(layout, totals, self._clipping)

    def norms(self) -> dict[str, GroupNorms]:
        """Return the norms of every layer in the last step, without the loss scale and as before any clipping.

        Waits for the device; nothing else in this class does.

        Raises:
            StatisticsError: Before the first step.
        """
        names, table = self.norm_table()
        if not names:
            raise StatisticsError(f"{self._owner()} has taken no step yet, so there are no statistics")
        return norms_from_table(names, table.tolist())

    def norm_table(self) -> tuple[list[str], torch.Tensor]:
        """The same as layer names and a tensor, shape (5, layers), without waiting; see `norms_from_table`."""
        return self._last.table()

    def _check_seen(self, layout: Layout, watched: Sequence[Watched], gradients: Sequence[torch.Tensor | None]) -> None:
        """Raise unless gradients come with groups.

        Where layers are whole and this process is alone, each layer can be told; else a layer may have its gradient
        from other ranks, and one that no group had a gradient for is not updated.
        """
        if self._flow is not None and self._flow.sources:
            refuse_without_forward(self._owner(), layout, watched, gradients)
        if self.groups == 0 and not self._has_company(layout):
            refuse_without_any_group(self._owner(), layout, gradients)
        elif not layout.reductions and self._ranks() == 1:
            refuse_without_groups(self._owner(), layout, watched, gradients)

    def _has_company(self, layout: Layout) -> bool:
        """Whether other ranks wait in a collective of the statistics, even if this one has seen nothing."""
        return not layout.reductions and self._ranks() > 1

    def _ranks(self) -> int:
        return 1 if self._averaging.known is None else self._averaging.known.ranks

    def _watched_layer(self, layer: Layer) -> Watched:
        watched = self._watched.get(id(layer.parameter))
        if watched is None or watched.parameter() is not layer.parameter:
            raise StatisticsError(f"{self._owner()} does not know the parameter of layer {layer.name}. {HOW_TO_BUILD}")
        return watched

    def _owner(self) -> str:
        return type(self._optimizer()).__name__

    def _warn_of_few(self, groups: int) -> None:
        if self.squares and groups < FEW_GROUPS and not self._warned:
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
        factor = self._flow.factor(float(self._loss_scale))
        if isinstance(factor, torch.Tensor):
            return factor.to(layout.numbers_device).to(torch.float64).reshape(())
        return torch.full((), factor, dtype=torch.float64, device=layout.numbers_device)


class _OfLayout:
    """What the statistics need of a layout at every step, sent to the device once.

    Attributes:
        probes: Adds up the probes of gradients.
    """

    def __init__(self, layout: Layout):
        self.probes = LocalProbes(layout)
        self._device = layout.numbers_device
        self._rows: tuple[list[int], torch.Tensor] | None = None

    def rows(self, watched: Sequence[Watched]) -> torch.Tensor:
        """The rows of the layers' sums, on the device."""
        rows = [layer.row for layer in watched]
        if self._rows is None or self._rows[0] != rows:  # a parameter that was taken out comes back with a new one
            self._rows = rows, torch.tensor(rows, dtype=torch.long, device=self._device)
        return self._rows[1]


@torch.no_grad()
def _after_backward(sums: GroupSums, of_pass: Sequence[Watched]) -> None:
    sums.add_up()
    for watched in of_pass:
        watched.note_gradient()
