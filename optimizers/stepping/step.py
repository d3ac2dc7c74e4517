"""One step: measure, reduce, and only then apply.

Each stage measures sums over the shards of every layer, and adds them up over the processes with one packed
all-reduce. Who goes over the elements is a matter of choice: compiled sweeps (see `kernels`) for the tensors that they
serve, tensor operations on cache-sized chunks for all others. Neither changes a gradient or needs memory of the
model's size, and a layer whose gradient turns out to be zero on all ranks is left untouched, state included:

- Tensor operations write nothing until the last reduction is in. Measuring works on scratch copies of the state, chunk
  by chunk, and applying repeats the arithmetic in place.
- Sweeps may keep the moments that they update while measuring a direction, which saves reading the gradient again. They
  leave out blocks whose gradient is zero, and catch up on them if their layer turns out to have a gradient elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..formulas.chunk_view import ChunkView
from ..formulas.chunks import Chunk, Summand
from ..formulas.layer_table import LayerTable, adapts
from ..formulas.stages import Sums
from ..formulas.updates import AdamUpdate
from ..kernels.choice import choose, warn_of_others
from ..kernels.interface import Operands, Sweeps
from ..sharding.layout import LayoutError
from ..sharding.local_tensors import cut_alike, is_plain, local_part
from .gradients import read_gradients
from .plan import Plan
from .state import make_element_state, read_all_numbers, write_all_numbers

if TYPE_CHECKING:
    from ..formulas.stages import Stage
    from ..layerwise import LayerwiseOptimizer

__all__ = ["Step"]


class _Flattened(Sequence[Any]):
    """Flat views of contiguous tensors, made where they are needed."""

    def __init__(self, tensors: Sequence[torch.Tensor | None]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        tensor = self.tensors[index]
        return None if tensor is None else tensor.detach().view(-1)


class Step:
    """One `step()` call."""

    def __init__(self, optimizer: LayerwiseOptimizer, plan: Plan):
        self.optimizer = optimizer
        self.plan = plan
        self.layout = plan.layout
        self.locals = [_local(tensor) for tensor in self.layout.tensors]
        self.weights = [_contiguous(tensor) for tensor in self.locals]
        self.gradients = read_gradients(self.layout)
        # Where layers are whole, no gradient here is no gradient anywhere.
        sharded = bool(self.layout.reductions)
        self.takes_part = [sharded or gradient is not None for gradient in self.gradients]
        self.states = [
            optimizer.state[tensor] if takes_part else None
            for tensor, takes_part in zip(self.layout.tensors, self.takes_part, strict=True)
        ]
        self.state = {name: self._element_state(name) for name in optimizer.element_state}
        self.layer_state = {name: self._read_layer_state(name) for name in optimizer.layer_state}
        self.tables = {group: self._table(group, layers) for group, layers in plan.group_layers.items()}
        self.contributions: dict[str, torch.Tensor] = {}  # per layer, what this rank adds to the first sums
        self.inputs: dict[str, tuple[Sequence[torch.Tensor], torch.Tensor]] = {}  # per element, read only
        self.finished: set[int] = set()  # groups whose weights and state have been updated while they were measured
        self._choose_kernels()

    def run(self) -> torch.Tensor:
        """Take the step and return the trust ratio of each layer, in the order of `Plan.names`."""
        self.optimizer.before_stages(self.layout)
        if self.optimizer.statistics is not None:
            of_groups = self.optimizer.statistics.for_step(self.layout, _Flattened(self.gradients))
            self.contributions = of_groups.contributions
            if of_groups.mean_square is not None:
                self.inputs = {"mean_square": of_groups.mean_square}
                self.operands.mean_square = of_groups.mean_square
        programs = {
            group: self.optimizer.stages(self.optimizer.param_groups[group], table)
            for group, table in self.tables.items()
        }
        while stages := {group: stage for group, program in programs.items() if (stage := next(program, None))}:
            self._reduce(stages)
        self._apply()
        self._write_layer_state()
        return self._trust_ratios()

    # Who works on what

    def _choose_kernels(self) -> None:
        self.operands = Operands(self.layout, self.weights, self.gradients, self.state)
        chosen = choose(self.optimizer.implementation, self.layout.device)
        served = [False] * len(self.weights) if chosen is None else chosen.serves(self.operands)
        self.served = [a and b for a, b in zip(served, self.takes_part, strict=True)]
        self.all_served = self.served == self.takes_part
        self.sweeps: Sweeps | None = None
        if chosen is not None and any(self.served):
            self.sweeps = chosen.open(self.operands, self.served, self.plan.cache)
        if chosen is not None and not self.all_served:
            warn_of_others(self.optimizer.implementation)

    def _chunks(self, groups_without_sweeps: set[int]) -> list[Chunk]:
        """What tensor operations work on: all of these groups, and elsewhere the tensors that no sweep serves."""
        if self.all_served and not groups_without_sweeps:
            return []
        groups = self.layout.groups

        def wanted(tensor: int) -> bool:
            return self.takes_part[tensor] and (not self.served[tensor] or groups[tensor] in groups_without_sweeps)

        # Kept, as a chunk keeps what it has sent to the device.
        wanted_tensors = [wanted(tensor) for tensor in range(len(groups))]
        return self.plan.recent("chunks").find(
            wanted_tensors,
            lambda: [chunk for whole in self.plan.chunks if (chunk := whole.only(wanted_tensors.__getitem__))],
        )

    def _view(self, chunk: Chunk, *, in_place: bool) -> ChunkView:
        first = self.plan.group_layers[chunk.group].start
        rows = self.plan.rows.get(chunk.group)
        weights, gradients = _Flattened(self.weights), _Flattened(self.gradients)
        state = {name: _Flattened(tensors) for name, tensors in self.state.items()}
        return ChunkView(chunk, weights, gradients, state, first, rows, self.inputs, in_place=in_place)

    # Measuring

    def _reduce(self, stages: dict[int, Stage]) -> None:
        """Measure one stage of every group that has one and add its sums over all shards of each layer."""
        sizes: dict[str, int] = {}
        for stage in stages.values():
            sizes.update(stage.sum_sizes)
        row_sums = {group: self._zero_row_sums(group, stage) for group, stage in stages.items()}
        swept = {group: found for group, stage in stages.items() if (found := self._sweep(group, stage)) is not None}
        own_sums = [self._measure_chunks(stages, sizes, set(stages) - set(swept), row_sums)]
        row_of = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        for group, of_names in swept.items():
            layers = self.plan.group_layers[group]
            for name, sums in of_names.items():
                own_sums[0][row_of[name], layers.start : layers.stop] += sums
        contributions, self.contributions = self.contributions, {}
        own_sums.extend(vector.unsqueeze(0) for vector in contributions.values())
        sizes.update(dict.fromkeys(contributions, 1))
        reduced = self._all_reduce(torch.cat(own_sums), row_sums)
        rows = dict(zip(sizes, reduced.split(list(sizes.values())), strict=True))
        totals = {name: row[0] if sizes[name] == 1 else row for name, row in rows.items()}
        for group, stage in stages.items():
            own = self.plan.group_layers[group]
            for name in (*stage.sum_sizes, *contributions):
                self.tables[group].receive(name, totals[name][..., own.start : own.stop], totals[name].sum(dim=-1))
            for name, of_rows in row_sums[group].items():
                self.tables[group].receive_rows(name, of_rows)
        if contributions and self.optimizer.statistics is not None:
            self.optimizer.statistics.keep(self.layout, totals)

    def _sweep(self, group: int, stage: Stage) -> dict[str, torch.Tensor] | None:
        """The sums of a group's stage over its layers, if sweeps can measure them."""
        if self.sweeps is None or not isinstance(stage, Sums):
            return None
        changing = self.tables[group].may_change()
        # What travels with these sums may still rule that nothing changes.
        final = not self.contributions
        found = None
        if final and stage.rules and self.all_served and not self.layout.reductions:
            found = self.sweeps.step(group, stage, changing)
        if found is not None:
            self.finished.add(group)
        else:
            found = self.sweeps.measure(group, stage, changing, keep=final and isinstance(stage.of, AdamUpdate))
        return None if found is None else dict(zip(stage.names, found, strict=True))

    def _zero_row_sums(self, group: int, stage: Stage) -> dict[str, torch.Tensor]:
        names = getattr(stage, "row_names", ())
        return {
            name: torch.zeros(self.plan.rows[group].count, dtype=torch.float64, device=self.layout.device)
            for name in names
        }

    def _measure_chunks(
        self,
        stages: dict[int, Stage],
        sizes: dict[str, int],
        groups_without_sweeps: set[int],
        row_sums: dict[int, dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        """The sums of what tensor operations work on, shape (rows, layers), with zeros for all else."""
        device = self.layout.device
        chunks = self._chunks(groups_without_sweeps)
        if not chunks:
            return torch.zeros(sum(sizes.values()), len(self.layout.layers), dtype=torch.float64, device=device)
        zeros = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
        parts = {name: [zero] for name, zero in zeros.items()}
        layers = [0]
        for chunk in chunks:
            group = chunk.group
            sums = self._measure(stages[group], chunk, row_sums[group]) if group in stages else {}
            layers.extend(chunk.layers)
            for name, part in parts.items():
                part.extend(sums.get(name) or [zeros[name]] * len(chunk.pieces))
        return self._add_up(list(parts.values()), layers)

    def _measure(self, stage: Stage, chunk: Chunk, row_sums: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """The stage's sums by name, each with one entry per piece of the chunk; those over rows go to `row_sums`."""
        group = self.optimizer.param_groups[chunk.group]
        summands: Sequence[Summand] = stage(group, self.tables[chunk.group], self._view(chunk, in_place=False))
        named = dict(zip([*stage.sum_sizes, *row_sums], summands, strict=True))
        for name, totals in row_sums.items():
            self.plan.rows[chunk.group].add_sums(totals, chunk, named.pop(name))
        return {name: chunk.sums(summand) for name, summand in named.items()}

    def _all_reduce(self, sums: torch.Tensor, row_sums: dict[int, dict[str, torch.Tensor]]) -> torch.Tensor:
        """Add the layers' sums over all shards, and with them, in place, the sums of rows that are cut."""
        measured = [(self.plan.rows[group], totals) for group, named in row_sums.items() for totals in named.values()]
        if not measured:
            return self.layout.reduce(sums)
        columns = [sums.reshape(-1), *(rows.take_cut(totals) for rows, totals in measured)]
        every_layer = torch.arange(sums.shape[1], device=sums.device).repeat(len(sums))
        owners = torch.cat([every_layer, *(rows.slot_layers for rows, _ in measured)])
        packed = self.layout.reduce(torch.cat(columns).unsqueeze(0), owners).squeeze(0)
        of_layers, *cut = packed.split([len(column) for column in columns])
        for (rows, totals), completed in zip(measured, cut, strict=True):
            rows.put_cut(totals, completed)
        return of_layers.view(sums.shape)

    def _add_up(self, parts: list[list[torch.Tensor]], layers: list[int]) -> torch.Tensor:
        """Sum the pieces' values per layer, shape (rows, layers), in a fixed order."""
        # Shards lie in the order of their tensors, which need not be the layers' order.
        by_layer = sorted(range(len(layers)), key=layers.__getitem__)
        values = torch.cat([torch.stack([row[index].reshape(-1) for index in by_layer]) for row in parts], dim=1)
        # Sent to the device when it changes, and not checked there, as both wait for the device.
        counts = self.plan.recent("counts").find(layers, lambda: self._counts(layers))
        return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True, initial=0.0).T.contiguous()

    def _counts(self, layers: list[int]) -> torch.Tensor:
        return torch.bincount(torch.tensor(layers), minlength=len(self.layout.layers)).to(self.layout.device)

    # Applying

    def _apply(self) -> None:
        pending = {group: table for group, table in self.tables.items() if group not in self.finished}
        changing = {group: table.has_gradient() for group, table in pending.items()}
        updates = {
            group: self.optimizer.update(self.optimizer.param_groups[group], table) for group, table in pending.items()
        }
        swept = self.finished | {
            group
            for group, update in updates.items()
            if self.sweeps is not None and update is not None and self.sweeps.apply(group, update, changing[group])
        }
        if swept:
            written = [w for w, served in zip(self.weights, self.served, strict=True) if served]
            torch.autograd.graph.increment_version(written)
        self._apply_to_chunks(self._chunks(set(self.tables) - swept), updates, changing)
        for tensor, in_order in zip(self.locals, self.weights, strict=True):
            if in_order is not tensor:
                tensor.copy_(in_order)

    def _apply_to_chunks(self, chunks: list[Chunk], updates: dict[int, Any], changing: dict[int, torch.Tensor]) -> None:
        if not chunks:
            return
        on_host = {group: mask.tolist() for group, mask in changing.items() if mask.device.type == "cpu"}
        for chunk in chunks:
            first = self.plan.group_layers[chunk.group].start
            known = [on_host[chunk.group][layer - first] for layer in chunk.layers] if on_host else None
            if known is not None and not any(known):
                continue
            all_change = known is not None and all(known)
            view = self._view(chunk, in_place=all_change)
            update = updates[chunk.group]
            if update is None:
                options = self.optimizer.param_groups[chunk.group]
                change = self.optimizer.change(options, self.tables[chunk.group], view)
            else:
                change = update.change(view)
            view.store(change, None if all_change else view.of(changing[chunk.group]))

    # State

    def _element_state(self, name: str) -> list[torch.Tensor]:
        nothing = self.weights[0].new_empty(0, dtype=torch.float32)
        found: list[torch.Tensor] = []
        for index, (tensor, state) in enumerate(zip(self.layout.tensors, self.states, strict=True)):
            value = nothing if state is None else state.get(name)
            if state is not None and not (type(value) is torch.Tensor and _lies_like(value, tensor)):
                value = self._element_state_of(index, tensor, state, name)
            found.append(value)
        return found

    def _element_state_of(self, index: int, tensor: torch.Tensor, state: dict[str, Any], name: str) -> torch.Tensor:
        value = make_element_state(state, tensor, name)
        if not cut_alike(value, tensor):
            layer = self.layout.layers[self.plan.tensor_layers[index].start]
            raise LayoutError(
                f"the state {name} of {layer.name} is not cut like the parameter: load an optimizer's state with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, and do not cut a parameter anew "
                "after the first step"
            )
        if not value.is_contiguous():
            value = state[name] = value.contiguous()
        return _local(value)

    def _read_layer_state(self, name: str) -> torch.Tensor:
        """The per-layer state of all layers, shape (layers,), fp64."""
        # A tensor that does not take part may have some from earlier steps.
        states = [
            self.optimizer.state.get(tensor, {}) if state is None else state
            for tensor, state in zip(self.layout.tensors, self.states, strict=True)
        ]
        return read_all_numbers(states, name, self.plan.layer_counts, self.layout.device)

    def _write_layer_state(self) -> None:
        changed = torch.cat([table.has_gradient() for table in self.tables.values()])
        for name, old in self.layer_state.items():
            new = torch.cat([getattr(table, name) for table in self.tables.values()])
            kept = torch.where(changed, new, old)
            write_all_numbers(self.states, self.layout.tensors, name, self.plan.layer_counts, kept)

    def _table(self, group: int, layers: range) -> LayerTable:
        state = {name: vector[layers.start : layers.stop] for name, vector in self.layer_state.items()}
        layer_list = list(self.layout.layers[layers.start : layers.stop])
        options = self.optimizer.param_groups[group]
        adapt = self._adapt(group, layer_list, options["adapt"])
        table = LayerTable(layer_list, adapt, state, self.layout.gradient_norm)
        table.rows = self.plan.rows.get(group)
        return table

    def _adapt(self, group: int, layers: Sequence[Any], option: bool | None) -> torch.Tensor:
        known = self.plan.cache
        if (group, option) not in known:
            known[group, option] = torch.tensor(
                [adapts(layer, option) for layer in layers], device=self.layout.device, dtype=torch.bool
            )
        return known[group, option]

    def _trust_ratios(self) -> torch.Tensor:
        ratios = [
            torch.where(table.has_gradient(), table.trust_ratio, torch.ones_like(table.trust_ratio))
            for table in self.tables.values()
        ]
        return torch.cat(ratios)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if is_plain(tensor) else local_part(tensor)


def _lies_like(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and value.shape == tensor.shape and value.is_contiguous()


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its elements lie in order, else a copy in which they do."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
