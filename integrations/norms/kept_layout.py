"""The layout of an optimizer's whole step, found when it is first needed and again when its tensors have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.backends import find_data_parallel, whole_step
from trustratio.optimizers.sharding.layout import Layer, Layout, LayoutError, listing
from trustratio.optimizers.sharding.local_tensors import cut_of
from trustratio.optimizers.sharding.names import observed
from trustratio.optimizers.sharding.observed import ObservedOptimizer
from trustratio.optimizers.sharding.resolve import resolve_layout
from trustratio.optimizers.sharding.unsharded import has_its_own_parameters
from trustratio.optimizers.stepping.agreement import Agreement
from trustratio.optimizers.stepping.taking_part import taking_part

__all__ = ["KeptLayout"]


class KeptLayout:
    """Where the layers of one optimizer are.

    A wrapper may step group by group, or sub-group by sub-group. The layout is of all that a step has, so that the
    sums of all its calls can be added up at once.

    Args:
        optimizer: The innermost one.
        observe: Makes of it what backends are asked about, with the model's parameters as they are by then.
        compared: Whether ranks that have the same layers should have the same numbers of them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        observe: Callable[[torch.optim.Optimizer], ObservedOptimizer],
        *,
        compared: bool = True,
    ):
        self.optimizer = optimizer
        self.layout: Layout | None = None
        self.stepped: frozenset[int] = frozenset()  # ids of the tensors of a whole step
        self._observe = observe
        self._observed: ObservedOptimizer | None = None
        self._looked_at: set[int] = set()
        self._cuts: dict[int, Any] = {}
        self.in_parts = False
        self._agreement = Agreement()
        self._compared = compared

    def has_own_parameters(self) -> bool:
        """Whether the optimizer is stepped with the model's own parameters, so that their gradients can be seen."""
        return has_its_own_parameters(self._look())

    def is_current(self) -> bool:
        """Whether the layout is of the tensors that `step()` is, or would be, called with now."""
        _, tensors = self._taking_part()
        complete = self.in_parts or len(tensors) == len(self._cuts)
        return (
            self.layout is not None
            and complete
            and all(id(tensor) in self._cuts and self._cuts[id(tensor)] == cut_of(tensor) for tensor in tensors)
        )

    def of_call(self) -> list[int]:
        """Indices into the layout's tensors of those that `step()` is called with now."""
        assert self.layout is not None
        here = {id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]}
        return [
            index
            for index, tensor in enumerate(self.layout.tensors)
            if id(tensor) in here or id(tensor) not in self.stepped  # stand-ins, which are in no group
        ]

    def count_skipped_steps(self) -> Callable[[], int]:
        """What counts the steps that the wrapper leaves out, as after an overflow: always 0 where no wrapper tells."""
        try:
            found = find_data_parallel(self._look())
        except LayoutError:  # which only matters to who needs to know the ranks
            found = None
        return int if found is None else found.skipped_steps

    def agree(self, numbers: Mapping[str, torch.Tensor]) -> None:
        """Compare the layers' numbers, of shape (layers,), with the other ranks that have the same layers.

        Once for every layout, and a second time if no layer had a gradient at first. Waits for the device.

        Raises:
            LayoutError: On all ranks, if they differ by more than rounding.
        """
        if self._compared and self._agreement.steps_left and self.layout is not None:
            self._agreement.compare(self._look(), self.layout, numbers)

    def resolve(self) -> Layout:
        """Find and prove the layout; a collective, so on all ranks alike.

        Raises:
            ValueError: If a parameter is complex.
            LayoutError: If no backend explains the tensors.
        """
        groups, tensors = self._taking_part()
        whole = _whole_step(self._look())
        self.in_parts = whole is not None
        pairs = list(zip(groups, tensors, strict=True)) if whole is None else whole
        self._refuse_complex([tensor for _, tensor in pairs])
        try:
            layout = resolve_layout(self._look(), pairs)
        except LayoutError as error:
            if not error.not_whole:
                raise
            raise LayoutError(self._why_unknown([tensor for _, tensor in pairs], error.not_whole)) from error
        self.layout = layout = with_layers_of_others(layout)
        self._agreement = Agreement()
        self._cuts = {id(tensor): cut_of(tensor) for _, tensor in pairs}
        self.stepped = frozenset(self._cuts)
        self._looked_at |= self.stepped
        return layout

    def _why_unknown(self, tensors: Sequence[torch.Tensor], described: Sequence[str]) -> str:
        """What to say where tensors are not known to be layers, the reason for each of which was given."""
        strangers = [tensor for tensor in tensors if not self._look().was_given(tensor)]
        if not strangers:
            return f"norms of layers cannot be exact for {listing(described)}"
        optimizer, anywhere = type(self.optimizer).__name__, observed(self.optimizer, None)
        shapes = listing([f"shape {tuple(tensor.shape)}" for tensor in strangers], shown=3)
        if all(map(anywhere.was_given, strangers)):
            return (
                f"norms of layers: the model that was given lacks {len(strangers)} of the {len(tensors)} parameters "
                f"that {optimizer} steps, of {shapes}: give the model that the optimizer trains"
            )
        return (
            f"norms of layers: {optimizer} steps {len(strangers)} tensors of {shapes} that are parameters of no "
            "module, and no known wrapper has made: give LayerNorms the model, or a torch.nn.ParameterList of "
            "parameters that are in no module"
        )

    def _look(self) -> ObservedOptimizer:
        """The optimizer in the words of backends; made anew when it has other tensors, as the model may have too."""
        tensors = {id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]}
        if self._observed is None or not tensors <= self._looked_at:
            self._observed = self._observe(self.optimizer)
            self._looked_at = tensors
        return self._observed

    def _taking_part(self) -> tuple[list[int], list[torch.Tensor]]:
        return taking_part(self.optimizer.param_groups, self._look().was_given)

    def _refuse_complex(self, tensors: Sequence[torch.Tensor]) -> None:
        for index, tensor in enumerate(tensors):
            if tensor.is_complex():
                name = self._look().parameter_name(tensor) or f"parameter {index}"
                raise ValueError(
                    f"{name} is of dtype {tensor.dtype}: norms are of real numbers. Train torch.view_as_real of it, or "
                    "put it into an optimizer of its own"
                )


def _whole_step(optimizer: ObservedOptimizer) -> list[tuple[int, torch.Tensor]] | None:
    try:
        return whole_step(optimizer)
    except LayoutError as error:
        raise LayoutError(f"norms of layers need all tensors of a step, but {error}") from error


def with_layers_of_others(layout: Layout) -> Layout:
    """The layout with the layers that other ranks step, of which this one has no shards; one exchange of names."""
    if layout.others is None:
        return layout
    here = [(layer.name, layer.shape) for layer in layout.layers]
    of_ranks: list[list[tuple[str, tuple[int, ...]]]] = [[]] * dist.get_world_size(layout.others)
    dist.all_gather_object(of_ranks, here, group=layout.others)
    rank = dist.get_rank(layout.others)
    first = sum(map(len, of_ranks[:rank]))
    layers = [
        layout.layers[index] if owner == rank else Layer(name, shape, 0)
        for owner, described in enumerate(of_ranks)
        for index, (name, shape) in enumerate(described)
    ]
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):  # of layers without a name, which are counted on each rank
        owners = [owner for owner, described in enumerate(of_ranks) for _ in described]
        layers = [replace(layer, name=f"{o}.{layer.name}") for o, layer in zip(owners, layers, strict=True)]
    shards = tuple(replace(shard, layer=shard.layer + first) for shard in layout.shards)
    reductions = ((layout.others, tuple(range(len(layers)))),)
    return replace(layout, layers=tuple(layers), shards=shards, reductions=reductions, gradient_norm=None)
