"""One step: measure, reduce, and only then apply.

Each stage of an algorithm asks for sums over the elements of every layer. They are measured over the shards on this
rank and added up over the processes with one packed all-reduce; when the last ones are in, state and weights are
updated. Who goes over the elements for that is a matter of choice, see `kernels`. None of them changes a gradient or
needs memory of the model's size, and a layer whose gradient turns out to be zero on all ranks is left untouched, state
included:

- Tensor operations write nothing until the last reduction is in.
- Compiled sweeps may keep the moments that they update while measuring a direction, which saves reading the gradient
  again. They leave out blocks whose gradient is zero, and catch up on them if their layer turns out to have a gradient
  elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.chunk_view import ChunkView
from ..formulas.chunks import Flattened
from ..formulas.layer_table import LayerTable
from ..formulas.rows import Rows
from ..formulas.stages import Stage
from ..kernels.choice import open_sweeps
from ..kernels.interface import ElementUpdate, GroupOperands, LocalSums, Operands
from ..sharding.layout import Layer, LayoutError
from ..sharding.local_tensors import cut_alike, is_plain, local_part
from .gradients import read_gradients
from .plan import Plan
from .state import make_element_state, read_all_numbers, write_all_numbers
from .storage_order import as_it_lies, in_the_order_of

__all__ = ["Step"]


class Step:
    """One `step()` call."""

    def __init__(self, algorithm: Algorithm, plan: Plan):
        self.algorithm = algorithm
        self.plan = plan
        self.layout = plan.layout
        self.locals = [_local(tensor) for tensor in self.layout.tensors]
        self.gradients = read_gradients(self.layout, plan.as_they_lie)
        # Where layers are whole, no gradient here is no gradient anywhere.
        sharded = bool(self.layout.reductions)
        self.takes_part = [sharded or gradient is not None for gradient in self.gradients]
        self.states = [
            algorithm.state[tensor] if takes_part else None
            for tensor, takes_part in zip(self.layout.tensors, self.takes_part, strict=True)
        ]
        self.layer_state = {name: self._read_layer_state(name) for name in algorithm.layer_state}
        self.groups = {index: self._group(index, layers) for index, layers in plan.group_layers.items()}
        self.operands = Operands(
            plan.joint_layout,
            weights=[
                as_it_lies(tensor) if index in plan.as_they_lie else _contiguous(tensor)
                for index, tensor in enumerate(self.locals)
            ],
            gradients=self._descending(),
            state={name: self._element_state(name) for name in plan.storage.names(algorithm.element_state)},
            groups=self.groups,
        )
        self.sweeps = open_sweeps(algorithm.implementation, self.operands, self.takes_part, plan.cache)
        # What this rank adds to the first sums, per layer; until it is in, it may still rule that nothing changes.
        self.contributions: dict[str, torch.Tensor] = {}
        self.finished: set[int] = set()  # groups that have been updated while they were measured

    def run(self) -> torch.Tensor:
        """Take the step and return the trust ratio of each layer, in the order of `Plan.names`."""
        self.algorithm.before_stages(self.layout)
        self._take_group_statistics()
        self._take_inputs()
        programs = {index: self._stages(index) for index in self.groups}
        while stages := {index: stage for index in programs if (stage := self._next(index, programs[index]))}:
            local_sums = {index: self._measure(index, stage) for index, stage in stages.items()}
            totals = self._reduce(stages, local_sums)
            self._hand_out(stages, local_sums, totals)
            self._hand_out_maxima(stages, self._reduce_maxima(stages, local_sums))
        self._apply()
        self._write_layer_state()
        return self._trust_ratios()

    def changed_something(self) -> bool:
        """Whether any layer had a gradient, as far as that can be told without waiting for the device.

        Some wrappers step once with zeros to make the state, so the numbers are looked at until a plan has stepped.
        """
        if not self.plan.has_stepped and any(self.takes_part):
            tables = [group.table.has_gradient() for group in self.groups.values()]
            self.plan.has_stepped = self.layout.device.type == "meta" or bool(torch.cat(tables).any())
        return self.plan.has_stepped and any(self.takes_part)

    def _take_group_statistics(self) -> None:
        """Take over what was seen of the groups' gradients in backward, where the algorithm wants that."""
        if self.algorithm.statistics is not None:
            statistics = self.algorithm.statistics.for_step(self.layout, Flattened(self.gradients))
            self.contributions = statistics.contributions
            if statistics.mean_square is not None:
                self.operands.inputs["mean_square"] = statistics.mean_square

    def _take_inputs(self) -> None:
        """Take what the algorithm adds of its own, in the order in which weights are gone over."""
        gradients, is_first = self.gradients, not self.plan.has_stepped
        for name, given in self.algorithm.inputs(self.layout, gradients, is_first=is_first).items():
            in_order = [
                as_it_lies(in_the_order_of(tensor, like)) if index in self.plan.as_they_lie else _contiguous(tensor)
                for index, (tensor, like) in enumerate(zip(given, self.locals, strict=True))
            ]
            self.operands.inputs[name] = in_order, None

    def _descending(self) -> list[torch.Tensor | None]:
        """The gradients whose descent is wanted: negated, so copied, in groups that maximize."""
        groups = self.algorithm.param_groups
        if not any(group["maximize"] for group in groups):
            return self.gradients
        return [
            -gradient if gradient is not None and groups[group]["maximize"] else gradient
            for gradient, group in zip(self.gradients, self.layout.groups, strict=True)
        ]

    # Sums

    def _stages(self, group: int) -> Iterator[Stage]:
        with self._explaining(group):
            return self.algorithm.stages(self.groups[group].options, self.groups[group].table)

    def _next(self, group: int, program: Iterator[Stage]) -> Stage | None:
        with self._explaining(group):
            return next(program, None)

    def _measure(self, group: int, stage: Stage) -> LocalSums:
        """Measure one stage of a parameter group over the shards on this rank."""
        nothing_may_stop_it = not self.contributions
        with self._explaining(group):
            if nothing_may_stop_it and not self.layout.reductions:
                sums = self.sweeps.step(group, stage)
                if sums is not None:
                    self.finished.add(group)
                    return sums
            return self.sweeps.measure(group, stage, keep=nothing_may_stop_it)

    def _reduce(self, stages: Mapping[int, Stage], local_sums: Mapping[int, LocalSums]) -> dict[str, torch.Tensor]:
        """Add the groups' sums over all shards of each layer, with one all-reduce; none if there are no sums.

        Returns:
            The totals by name, shape (layers,), of histograms (bins, layers); zero in groups whose stage lacks a name.
            Row sums are completed where they are.
        """
        # What was taken from the groups' gradients travels with the first sums.
        sizes = {name: size for stage in stages.values() for name, size in stage.sum_sizes.items()}
        sizes.update(dict.fromkeys(self.contributions, 1))
        packed = self._pack(stages, local_sums, sizes)
        # So do, in whichever reduction, rows of embeddings that a shard boundary cuts.
        row_sums = [
            (self.groups[group].rows, totals) for group, sums in local_sums.items() for totals in sums.of_rows.values()
        ]
        if not (sizes or row_sums):  # a stage of maxima alone
            return {}
        reduced = self._all_reduce(packed, row_sums) if row_sums else self.layout.reduce(packed)
        return {name: rows[0] if sizes[name] == 1 else rows for name, rows in _named_rows(reduced, sizes).items()}

    def _reduce_maxima(
        self, stages: Mapping[int, Stage], local_sums: Mapping[int, LocalSums]
    ) -> dict[str, torch.Tensor]:
        """The largest of the groups' maxima over all shards of each layer, likewise; zero where a stage lacks one."""
        sizes = dict.fromkeys((name for stage in stages.values() for name in stage.maximum_names), 1)
        if not sizes:
            return {}
        shape = len(sizes), len(self.layout.layers)
        packed = torch.zeros(shape, dtype=torch.float64, device=self.layout.numbers_device)
        by_name = _named_rows(packed, sizes)
        for group, stage in stages.items():
            layers, maxima = self.groups[group].layers, local_sums[group].maxima
            if maxima is not None:
                for name, of_group in zip(stage.maximum_names, maxima, strict=True):
                    by_name[name][0, layers.start : layers.stop] = of_group
        return dict(zip(sizes, self.layout.reduce(packed, largest=True), strict=True))

    def _pack(
        self, stages: Mapping[int, Stage], local_sums: Mapping[int, LocalSums], sizes: Mapping[str, int]
    ) -> torch.Tensor:
        """One matrix for all groups: a column per layer, and of each name as many rows as it has numbers."""
        shape = sum(sizes.values()), len(self.layout.layers)
        packed = torch.zeros(shape, dtype=torch.float64, device=self.layout.numbers_device)
        by_name = _named_rows(packed, sizes)
        for group, stage in stages.items():
            layers = self.groups[group].layers
            for name, sums in _named_rows(local_sums[group].of_layers, stage.sum_sizes).items():
                by_name[name][:, layers.start : layers.stop] = sums
        for name, of_all_layers in self.contributions.items():
            by_name[name][0] = of_all_layers
        return packed

    def _all_reduce(self, packed: torch.Tensor, row_sums: Sequence[tuple[Rows, torch.Tensor]]) -> torch.Tensor:
        """Add the layers' sums over all shards, and with them, in place, the sums of rows that are cut."""
        # One long row: the matrix, then a slot for each cut row of each of the sums over rows.
        columns = [packed.reshape(-1), *(rows.take_cut(sums) for rows, sums in row_sums)]
        slots = [layer for rows, _ in row_sums for layer in rows.slot_layers]
        owners = (*range(packed.shape[1]),) * len(packed) + (*slots,)
        reduced = self.layout.reduce(torch.cat(columns).unsqueeze(0), owners).squeeze(0)
        of_layers: torch.Tensor
        of_layers, *of_cut_rows = reduced.split([len(column) for column in columns])
        for (rows, sums), completed in zip(row_sums, of_cut_rows, strict=True):
            rows.put_cut(sums, completed)
        return of_layers.view(packed.shape)

    def _hand_out(
        self,
        stages: Mapping[int, Stage],
        local_sums: Mapping[int, LocalSums],
        totals: Mapping[str, torch.Tensor],
    ) -> None:
        """Give each group's table the totals of its layers, and the statistics those of the groups' gradients."""
        model_totals = {name: total.sum(dim=-1) for name, total in totals.items()}
        for index, stage in stages.items():
            group = self.groups[index]
            for name in (*stage.sum_sizes, *self.contributions):
                of_group = totals[name][..., group.layers.start : group.layers.stop]
                group.table.receive(name, of_group, model_totals[name])
            for name, row_totals in local_sums[index].of_rows.items():
                group.table.receive_rows(name, row_totals)
        if self.contributions and self.algorithm.statistics is not None:
            self.algorithm.statistics.keep(self.layout, totals)
        self.contributions = {}

    def _hand_out_maxima(self, stages: Mapping[int, Stage], maxima: Mapping[str, torch.Tensor]) -> None:
        for index, stage in stages.items():
            group = self.groups[index]
            for name in stage.maximum_names:
                of_all = maxima[name]
                group.table.receive(name, of_all[group.layers.start : group.layers.stop], of_all.amax())

    # Applying

    def _apply(self) -> None:
        """Update state and weights of the layers that have a gradient somewhere."""
        # All are described before the first is applied.
        updates = {index: self._update(index) for index in self.groups if index not in self.finished}
        for index, update in updates.items():
            with self._explaining(index):
                self.sweeps.apply(index, update)
        for tensor, in_order in zip(self.locals, self.operands.weights, strict=True):
            if in_order.data_ptr() != tensor.data_ptr():
                tensor.copy_(in_order)

    def _update(self, index: int) -> ElementUpdate:
        group = self.groups[index]
        with self._explaining(index):
            update = self.algorithm.update(group.options, group.table)
        if update is None:
            return _OwnFormula(partial(self.algorithm.change, group.options, group.table))
        return update

    def _explaining(self, index: int) -> AbstractContextManager[None]:
        """What runs the formulas for groups that are stepped together says so if they fail."""
        joint = self.plan.joint_groups.get(index)
        return nullcontext() if joint is None else joint.explaining(self.algorithm, self.groups[index].options)

    # State

    def _element_state(self, name: str) -> list[torch.Tensor]:
        values: list[torch.Tensor] = []
        for index, (tensor, state) in enumerate(zip(self.layout.tensors, self.states, strict=True)):
            dtype = self.plan.storage.dtype(index, name)
            if state is None or dtype is None:
                values.append(self.locals[0].new_empty(0, dtype=dtype or torch.bfloat16))
                continue
            value = state.get(name)
            lies_ready = type(value) is torch.Tensor and value.dtype is dtype and _lies_like(value, tensor)
            if not lies_ready or index in self.plan.as_they_lie:
                value = self._element_state_of(index, tensor, state, name)
            values.append(value)
        return values

    def _element_state_of(self, index: int, tensor: torch.Tensor, state: dict[str, Any], name: str) -> torch.Tensor:
        group = self.algorithm.param_groups[self.layout.groups[index]]
        value = make_element_state(state, tensor, name, group)
        if not cut_alike(value, tensor):
            layer = self.layout.layers[self.plan.tensor_layers[index].start]
            resized = value.shape != tensor.shape
            shapes = f" (of shape {tuple(value.shape)} beside {tuple(tensor.shape)})" if resized else ""
            raise LayoutError(
                f"the state {name} of {layer.name} is not cut like the parameter{shapes}: load an optimizer's state "
                "with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, do not cut a parameter anew "
                "after the first step, and where one was resized, as by resize_token_embeddings, delete its state: "
                "optimizer.state.pop(parameter, None)"
            )
        if index in self.plan.as_they_lie:
            state[name] = in_the_order_of(value, tensor)
            return as_it_lies(state[name])
        if not value.is_contiguous():
            value = state[name] = value.contiguous()
        return _local(value)

    def _read_layer_state(self, name: str) -> torch.Tensor:
        """The per-layer state of all layers, shape (layers,), fp64."""
        # A tensor that does not take part may have some from earlier steps.
        states = [
            self.algorithm.state.get(tensor, {}) if state is None else state
            for tensor, state in zip(self.layout.tensors, self.states, strict=True)
        ]
        return read_all_numbers(states, name, self.plan.layer_counts, self.layout.numbers_device)

    def _write_layer_state(self) -> None:
        """Keep the per-layer state of the layers that were updated."""
        tables = [group.table for group in self.groups.values()]
        changed = torch.cat([table.has_gradient() for table in tables])
        for name, old in self.layer_state.items():
            new = torch.cat([getattr(table, name) for table in tables])
            kept = torch.where(changed, new, old)
            write_all_numbers(self.states, self.layout.tensors, name, self.plan.layer_counts, kept)

    # Numbers of layers

    def _group(self, index: int, layers: range) -> GroupOperands:
        options = self._options(index)
        state = {name: numbers[layers.start : layers.stop] for name, numbers in self.layer_state.items()}
        layer_list = list(self.layout.layers[layers.start : layers.stop])
        table = LayerTable(layer_list, self._adapt(index), state, self.layout.gradient_norm)
        table.rows, table.elements = self.plan.rows.get(index), self._elements(index, layer_list)
        table.resolution = self.layout.gradient_resolution[layers.start : layers.stop]
        rounding = self.plan.storage.rounding(index, options, state)
        return GroupOperands(options, layers, self.plan.group_tensors[index], table, rounding)

    def _options(self, index: int) -> dict[str, Any]:
        """The options of a group, or of several that are stepped together."""
        joint = self.plan.joint_groups.get(index)
        if joint is None:
            return self._with_rate_here(self.algorithm.param_groups[index])
        return self._with_rate_here(joint.options(self.algorithm, self._adapt(index)))

    def _with_rate_here(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options with a learning rate in fp64, as 16 bits would round what a formula makes of it first.

        Vectors of layers can be multiplied by it, as one of them can itself.
        """
        lr = options.get("lr")
        if not isinstance(lr, torch.Tensor):
            return options
        if lr.numel() == 1 and not (lr.dim() == 0 and lr.is_cpu):
            lr = lr.detach().reshape(()).to(self.layout.numbers_device)
        return {**options, "lr": lr.to(torch.float64)}

    def _adapt(self, group: int) -> torch.Tensor:
        known: dict[Any, torch.Tensor] = self.plan.cache
        if ("adapt", group) not in known:
            device = self.layout.numbers_device
            known["adapt", group] = torch.tensor(self.plan.adapted[group], device=device, dtype=torch.bool)
        return known["adapt", group]

    def _elements(self, group: int, layers: Sequence[Layer]) -> torch.Tensor:
        known: dict[Any, torch.Tensor] = self.plan.cache
        if ("elements", group) not in known:
            sizes = [layer.numel for layer in layers]
            known["elements", group] = torch.tensor(sizes, device=self.layout.numbers_device, dtype=torch.float64)
        return known["elements", group]

    def gradient_squares(self) -> torch.Tensor:
        """The squared norm of each layer's gradient, in the order of `Plan.names`; after `run`."""
        return torch.cat([group.table.total("g") for group in self.groups.values()])

    def _trust_ratios(self) -> torch.Tensor:
        ratios = [
            torch.where(table.has_gradient(), table.trust_ratio, torch.ones_like(table.trust_ratio))
            for table in (group.table for group in self.groups.values())
        ]
        return torch.cat(ratios)


@dataclass(frozen=True, eq=False)
class _OwnFormula:
    """An `ElementUpdate` in the algorithm's own words; no compiled code knows it."""

    change: Callable[[ChunkView], torch.Tensor]


def _named_rows(matrix: torch.Tensor, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The rows of a matrix by name, so many for each, one after the other."""
    return dict(zip(sizes, matrix.split(list(sizes.values())), strict=True))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if is_plain(tensor) else local_part(tensor)


def _lies_like(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and value.shape == tensor.shape and value.is_contiguous()


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its elements lie in order, else a copy in which they do."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
