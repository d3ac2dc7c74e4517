"""The step that every layer-wise optimizer shares: measure, reduce, and only then apply.

One `step()` call runs the algorithm's `stages`. Each stage measures sums over the shards of every layer and adds them
up over the processes with one packed all-reduce. Nothing is written until the last reduction is in: measuring works on
scratch copies of the state, chunk by chunk, and applying repeats the arithmetic in place. That costs a second read of
the gradient and the state, and buys three things: gradients stay as they were, no memory of the model's size is
needed, and a layer whose gradient turns out to be zero on all ranks is left untouched, state included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import layout as layouts
from .chunks import Chunk, ChunkView, Summand, compute_dtype, cut_into_chunks
from .hyperparameters import check_choice
from .layers import LayerTable
from .layout import Layout, LayoutError, local_part, placements_of, resolve_layout
from .rows import Rows
from .statistics import GradientStatistics

__all__ = ["LayerwiseOptimizer", "Stage", "sums_over_layers", "sums_over_rows"]

StageMethod = Callable[[Any, dict[str, Any], LayerTable, ChunkView], tuple[Summand, ...]]
Stage = Callable[[dict[str, Any], LayerTable, ChunkView], tuple[Summand, ...]]


def sums_over_layers(*names: str, **histograms: int) -> Callable[[StageMethod], StageMethod]:
    """Declare the sums that a stage measures, in the order in which it returns them.

    The names must be known without running the stage, because a rank that holds no shard joins the reduction too.

    Args:
        names: Sums of one number per layer (`squares`, `values`).
        histograms: Name and number of bins of each histogram (`counts`); they follow the others.
    """

    def declare(stage: StageMethod) -> StageMethod:
        stage.sum_sizes = {**dict.fromkeys(names, 1), **histograms}  # type: ignore[attr-defined]
        return stage

    return declare


def sums_over_rows(*names: str) -> Callable[[StageMethod], StageMethod]:
    """Declare sums over each row, which a stage returns after those over layers; for groups with `has_rows`."""

    def declare(stage: StageMethod) -> StageMethod:
        stage.row_names = names  # type: ignore[attr-defined]
        return stage

    return declare


@dataclass
class _Plan:
    """What stays the same from step to step for one set of local tensors."""

    layout: Layout
    chunks: list[Chunk]
    group_layers: dict[int, range]  # group index -> its layers
    tensor_layers: list[range]  # local tensor -> the layers it carries
    rows: dict[int, Rows]  # group index -> its rows, where the optimizer measures them


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here. A subclass names its state and fills in `stages` and `change`.

    State and arithmetic are fp32 whatever the parameter's dtype (fp64 for fp64 parameters); a 16-bit parameter without
    a wrapper that keeps master weights is rounded once per step, when it is written.
    """

    layer_state: ClassVar[tuple[str, ...]] = ("step",)
    """State with one number per layer, zero at first. `step` counts the updates of the layer."""

    group_statistics: ClassVar[str | None] = None
    """What is kept of the groups' gradients: None, "norms" per layer, or "squares" per element besides."""

    statistics: GradientStatistics | None
    """Sees the groups' gradients, where they are wanted. See `collect_group_norms`."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        self._forget()
        defaults.setdefault("adapt", None)
        layouts.admit(type(self))
        super().__init__(params, defaults)

    # What an algorithm fills in -------------------------------------------------------------------------------------

    @property
    def element_state(self) -> tuple[str, ...]:
        """Names of the state with one value per element, zero at first."""
        return ()

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError if an option of the group is out of range."""

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError if an option cannot work with how the wrapper shards and steps."""

    def has_rows(self, group: dict[str, Any]) -> bool:
        """Whether sums over the rows of this group's layers are measured; they must be two-dimensional."""
        return False

    def before_stages(self, layout: Layout) -> None:
        """Do what precedes the stages of one `step()` call, e.g. a reduction that cannot ride in theirs."""

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        """Yield the stages whose sums the update needs; after each, its reduced sums are in `layers`.

        The sum of squares of the gradient, named "g", must be among them.
        """
        raise NotImplementedError

    def change(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        """Update the state in `x` and return what is subtracted from the weights, shape of `x.w`."""
        raise NotImplementedError

    # The step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss, as in torch.optim.

        Returns:
            The closure's loss, or None.

        Raises:
            LayoutError: If the local tensors cannot be explained, so that the norms would be wrong.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan()
        if plan.layout.tensors:
            _Step(self, plan).run()
        return loss

    def collect_group_norms(self) -> None:
        """Keep norms of the gradients of single groups (one rank's one micro-batch) from the next backward on.

        For diagnostics such as `noise_scale.gradient_noise`; CLARS and the VR optimizers do so themselves. Call it on
        all ranks.
        """
        if self.statistics is None:
            self.statistics = GradientStatistics(self, squares=False)
            for parameter in list(self._names):
                self.statistics.watch(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as in torch.optim, and with them what was kept of the groups' gradients."""
        super().zero_grad(set_to_none)
        if self.statistics is not None:
            self.statistics.discard()

    def trust_ratios(self) -> dict[str, float]:
        """Each layer's ratio in the last step: 1.0 where it was not adapted, had no gradient, or where there is none.

        Waits for the device; nothing else in this class does.
        """
        ratios: dict[str, float] = {}
        for names, vector in self._last_ratios.values():
            ratios.update(zip(names, vector.tolist(), strict=True))
        return ratios

    # Parameters and options -----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; its options are checked first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_choice("adapt", group["adapt"], (None, True, False))
            self.check(group)
            for parameter in group["params"]:
                _check_parameter(parameter)
        except ValueError:
            self.param_groups.pop()
            raise
        self._remember(group)

    def was_given(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a parameter that the constructor (or `add_param_group`) was given."""
        return tensor in self._names

    def parameter_name(self, parameter: torch.Tensor) -> str | None:
        """The name that came with the parameter, if any."""
        return self._names.get(parameter)

    def _remember(self, group: dict[str, Any]) -> None:
        names = group.get("param_names") or [None] * len(group["params"])
        self._names.update(WeakIdKeyDictionary(dict(zip(group["params"], names, strict=False))))
        if self.statistics is not None:
            for parameter in group["params"]:
                self.statistics.watch(parameter)

    def _forget(self) -> None:
        wanted = self.group_statistics
        self.statistics = None if wanted is None else GradientStatistics(self, squares=wanted == "squares")
        self._plans: dict[tuple[tuple[int, Any], ...], _Plan] = {}
        self._last_ratios: dict[tuple[int, ...], tuple[list[str], torch.Tensor]] = {}
        # Weak, so that parameters which a wrapper replaces are not kept alive.
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        given = [[self.was_given(p) for p in group["params"]] for group in self.param_groups]
        return {**super().__getstate__(), "_given": given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this from load_state_dict too, on an optimizer that knows its parameters.
        given = state.pop("_given", None)
        if given is not None:
            self._forget()
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            group.setdefault("adapt", None)
            # A copy of a wrapped optimizer holds flat tensors, which must not pass for layers.
            if given is not None and all(given[index]):
                self._remember(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch.optim does, but keep the state's own dtype: fp32 also for 16-bit parameters."""
        super().load_state_dict(state_dict)
        current = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(current, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = _on_device(value, parameter.device)

    # Plans ----------------------------------------------------------------------------------------------------------

    def _plan(self) -> _Plan:
        tensors = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        key = tuple((id(tensor), placements_of(tensor)) for _, tensor in tensors)
        plan = self._plans.get(key)
        if plan is None:
            layout = resolve_layout(self, tensors)
            self.check_layout(layout)
            plan = self._plans[key] = _make_plan(layout)
            with_rows = [index for index in plan.group_layers if self.has_rows(self.param_groups[index])]
            plan.rows = {index: Rows(layout, plan.group_layers[index]) for index in with_rows}
        return plan


def _make_plan(layout: Layout) -> _Plan:
    carried: list[list[int]] = [[] for _ in layout.tensors]
    for index, layer in enumerate(layout.layers):
        carried[layer.tensor].append(index)
    groups: dict[int, list[int]] = {}
    for group, layers in zip(layout.groups, carried, strict=True):
        groups.setdefault(group, []).extend(layers)
    return _Plan(
        layout=layout,
        chunks=cut_into_chunks(layout),
        group_layers={group: _as_range(layers) for group, layers in groups.items()},
        tensor_layers=[_as_range(layers) for layers in carried],
        rows={},
    )


def _as_range(indices: list[int]) -> range:
    covered = range(indices[0], indices[-1] + 1) if indices else range(0)
    if list(covered) != indices:
        raise LayoutError(f"layers must follow the order of their tensors, got layers {indices} in one tensor")
    return covered


class _Step:
    """One `step()` call."""

    def __init__(self, optimizer: LayerwiseOptimizer, plan: _Plan):
        self.optimizer = optimizer
        self.plan = plan
        self.layout = plan.layout
        self.locals = [local_part(tensor).detach() for tensor in self.layout.tensors]
        self.weights = [_flat(tensor) for tensor in self.locals]
        self.gradients = [_gradient_of(tensor) for tensor in self.layout.tensors]
        self.chunks = [chunk for whole in plan.chunks if (chunk := whole.only(self._takes_part))]
        self.state = {name: self._element_state(name) for name in optimizer.element_state}
        self.layer_state = {name: self._read_layer_state(name) for name in optimizer.layer_state}
        self.tables = {group: self._table(group, layers) for group, layers in plan.group_layers.items()}
        self.contributions: dict[str, torch.Tensor] = {}  # per layer, what this rank adds to the first sums
        self.inputs: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}  # per element, read only

    def run(self) -> None:
        self.optimizer.before_stages(self.layout)
        if self.optimizer.statistics is not None:
            of_groups = self.optimizer.statistics.for_step(self.layout, self.gradients)
            self.contributions = of_groups.contributions
            self.inputs = {} if of_groups.mean_square is None else {"mean_square": of_groups.mean_square}
        programs = {
            group: self.optimizer.stages(self.optimizer.param_groups[group], table)
            for group, table in self.tables.items()
        }
        while stages := {group: stage for group, program in programs.items() if (stage := next(program, None))}:
            self._reduce(stages)
        self._apply()
        self._write_layer_state()
        self._report()

    def _takes_part(self, tensor: int) -> bool:
        # Where layers are whole, no gradient here is no gradient anywhere.
        return self.gradients[tensor] is not None or bool(self.layout.reductions)

    # Measuring and applying

    def _view(self, chunk: Chunk, *, in_place: bool) -> ChunkView:
        first = self.plan.group_layers[chunk.group].start
        rows = self.plan.rows.get(chunk.group)
        return ChunkView(chunk, self.weights, self.gradients, self.state, first, rows, self.inputs, in_place=in_place)

    def _reduce(self, stages: dict[int, Stage]) -> None:
        """Measure one stage of every group that has one and add its sums over all shards of each layer."""
        sizes: dict[str, int] = {}
        for stage in stages.values():
            sizes.update(stage.sum_sizes)  # type: ignore[attr-defined]
        device = self.layout.device
        zeros = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
        parts = {name: [zero] for name, zero in zeros.items()}
        row_sums = {group: self._zero_row_sums(group, stage) for group, stage in stages.items()}
        layers = [0]
        for chunk in self.chunks:
            group = chunk.group
            sums = self._measure(stages[group], chunk, row_sums[group]) if group in stages else {}
            layers.extend(chunk.layers)
            for name, part in parts.items():
                part.extend(sums.get(name) or [zeros[name]] * len(chunk.pieces))
        own_sums = [self._add_up(list(parts.values()), layers)]
        contributions, self.contributions = self.contributions, {}
        own_sums.extend(vector.unsqueeze(0) for vector in contributions.values())
        sizes.update(dict.fromkeys(contributions, 1))
        reduced = self._all_reduce(torch.cat(own_sums), row_sums)
        rows = dict(zip(sizes, reduced.split(list(sizes.values())), strict=True))
        totals = {name: row[0] if sizes[name] == 1 else row for name, row in rows.items()}
        for group, stage in stages.items():
            own = self.plan.group_layers[group]
            for name in (*stage.sum_sizes, *contributions):  # type: ignore[attr-defined]
                self.tables[group].receive(name, totals[name][..., own.start : own.stop], totals[name].sum(dim=-1))
            for name, of_rows in row_sums[group].items():
                self.tables[group].receive_rows(name, of_rows)
        if contributions and self.optimizer.statistics is not None:
            self.optimizer.statistics.keep(self.layout, totals)

    def _zero_row_sums(self, group: int, stage: Stage) -> dict[str, torch.Tensor]:
        names = getattr(stage, "row_names", ())
        return {
            name: torch.zeros(self.plan.rows[group].count, dtype=torch.float64, device=self.layout.device)
            for name in names
        }

    def _measure(self, stage: Stage, chunk: Chunk, row_sums: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """The stage's sums by name, each with one entry per piece of the chunk; those over rows go to `row_sums`."""
        group = self.optimizer.param_groups[chunk.group]
        summands = stage(group, self.tables[chunk.group], self._view(chunk, in_place=False))
        named = dict(zip([*stage.sum_sizes, *row_sums], summands, strict=True))  # type: ignore[attr-defined]
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
        device = self.layout.device
        # Shards lie in the order of their tensors, which need not be the layers' order.
        by_layer = sorted(range(len(layers)), key=layers.__getitem__)
        values = torch.cat(
            [torch.stack([row[index].reshape(-1).to(device) for index in by_layer]) for row in parts], dim=1
        )
        counts = torch.bincount(torch.tensor(layers), minlength=len(self.layout.layers)).to(device)
        return torch.segment_reduce(values, "sum", lengths=counts, axis=0, initial=0.0).T.contiguous()

    def _apply(self) -> None:
        changing = {group: table.has_gradient() for group, table in self.tables.items()}
        on_host = {group: mask.tolist() for group, mask in changing.items() if mask.device.type == "cpu"}
        for chunk in self.chunks:
            first = self.plan.group_layers[chunk.group].start
            known = [on_host[chunk.group][layer - first] for layer in chunk.layers] if on_host else None
            if known is not None and not any(known):
                continue
            all_change = known is not None and all(known)
            view = self._view(chunk, in_place=all_change)
            change = self.optimizer.change(self.optimizer.param_groups[chunk.group], self.tables[chunk.group], view)
            view.store(change, None if all_change else view.of(changing[chunk.group]))
        for tensor, flat in zip(self.locals, self.weights, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))

    # State

    def _element_state(self, name: str) -> list[torch.Tensor]:
        return [self._element_state_of(index, name) for index in range(len(self.layout.tensors))]

    def _element_state_of(self, index: int, name: str) -> torch.Tensor:
        tensor = self.layout.tensors[index]
        if not self._takes_part(index):
            return self.locals[index].new_empty(0)
        state = self.optimizer.state[tensor]
        if name not in state:
            # Of a DTensor, a DTensor with the same placements.
            dtype, dense = compute_dtype(tensor), torch.contiguous_format
            state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=dense)
        if placements_of(state[name]) != placements_of(tensor):
            layer = self.layout.layers[self.plan.tensor_layers[index].start]
            raise LayoutError(
                f"the state {name} of {layer.name} is not cut like the parameter: load an optimizer's state with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, and do not change a parameter's "
                "placements after the first step"
            )
        return local_part(state[name]).view(-1)

    def _read_layer_state(self, name: str) -> torch.Tensor:
        """The per-layer state of all layers, shape (layers,), fp64."""
        vectors = [
            _read_layer_state(self.optimizer.state.get(tensor, {}), name, len(layers))
            for tensor, layers in zip(self.layout.tensors, self.plan.tensor_layers, strict=True)
        ]
        return torch.cat(vectors).to(self.layout.device)

    def _write_layer_state(self) -> None:
        changed = torch.cat([table.has_gradient() for table in self.tables.values()])
        for name, old in self.layer_state.items():
            new = torch.cat([getattr(table, name) for table in self.tables.values()])
            kept = torch.where(changed, new, old)
            for index, (tensor, layers) in enumerate(zip(self.layout.tensors, self.plan.tensor_layers, strict=True)):
                if self._takes_part(index):
                    dtype = torch.float32 if name == "step" else compute_dtype(tensor)  # as torch keeps it
                    _write_layer_state(self.optimizer.state[tensor], name, kept[layers.start : layers.stop].to(dtype))

    def _table(self, group: int, layers: range) -> LayerTable:
        state = {name: vector[layers.start : layers.stop] for name, vector in self.layer_state.items()}
        layer_list = list(self.layout.layers[layers.start : layers.stop])
        options = self.optimizer.param_groups[group]
        table = LayerTable(layer_list, options, self.layout.device, state, self.layout.gradient_norm)
        table.rows = self.plan.rows.get(group)
        return table

    def _report(self) -> None:
        key = tuple(id(tensor) for tensor in self.layout.tensors)
        names = [layer.name for table in self.tables.values() for layer in table.layers]
        ratios = [
            torch.where(table.has_gradient(), table.trust_ratio, torch.ones_like(table.trust_ratio))
            for table in self.tables.values()
        ]
        self.optimizer._last_ratios[key] = (names, torch.cat(ratios))


# Per-layer state: a tensor that carries one layer keeps it as torch does, a 0-d tensor. A flat tensor keeps vectors
# in a dict of their own, because DeepSpeed cuts the padding's length off every tensor in a flat tensor's state.


def _read_layer_state(state: dict[str, Any], name: str, count: int) -> torch.Tensor:
    value = state.get("layers", {}).get(name)
    if value is None:
        value = torch.as_tensor(state.get(name, 0.0))
    return value.to(torch.float64).expand(count)


def _write_layer_state(state: dict[str, Any], name: str, values: torch.Tensor) -> None:
    if len(values) == 1:
        state[name] = values[0].clone()
        return
    state.setdefault("layers", {})[name] = values.clone()
    if name == "step":
        # DeepSpeed's universal checkpoint expects one `step` for the whole flat tensor.
        state[name] = values.max()


def _check_parameter(parameter: torch.Tensor) -> None:
    if not parameter.is_floating_point():
        raise ValueError(
            f"parameters must be real floating point tensors, got {parameter.dtype} of shape {tuple(parameter.shape)}"
        )


def _gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's part of the gradient, flat."""
    gradient = tensor.grad
    if gradient is None:
        return None
    if placements_of(gradient) != placements_of(tensor):
        # Tensor parallelism leaves it to the reader to add up some gradients over ranks.
        gradient = gradient.redistribute(placements=placements_of(tensor))  # type: ignore[attr-defined]
    return _flat(_dense(local_part(gradient)))


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"gradients must be dense, got {gradient.layout} of shape {tuple(gradient.shape)}: "
            "build the embedding with sparse=False"
        )
    return gradient.detach()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view; a copy only if the tensor is not contiguous."""
    return tensor.reshape(-1)


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to(device)
    if isinstance(value, dict):
        return {name: _on_device(inner, device) for name, inner in value.items()}
    return value
