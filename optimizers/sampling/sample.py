"""One sample of the curvature along each layer's step: gradients at w and at w + v, of one `step()` call's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..formulas.chunk_view import ChunkView
from ..formulas.chunks import Summand, cut_into_chunks, squares, values
from ..formulas.layer_table import LayerTable
from ..formulas.stages import Stage, sums_over_layers
from ..formulas.updates import Number, Update
from ..kernels.eager import EagerSweeps
from ..sharding.moved_weights import MovedWeights
from ..stepping.gradients import read_gradients
from ..stepping.plan import Plan
from ..stepping.state import write_all_numbers
from ..stepping.step import Step

__all__ = ["SMALLEST_RMS", "MeasuresCurvature", "Sample", "Sampled"]

SMALLEST_RMS = 0.01
"""The root mean square that a layer's weights count with at least when it is moved in proportion: biases begin at 0."""


class MeasuresCurvature(Protocol):
    """What an algorithm says so that its curvature can be sampled."""

    def direction(self, group: dict[str, Any], layers: LayerTable) -> Update:
        """Describe -p: what a step with rate 1 subtracts, of the gradient times the vector `layers.scale`."""

    def decay_in_gradient(self, group: dict[str, Any]) -> Number:
        """λ where λ/2‖w‖² belongs to what is minimised, else 0; a vector where the group's λ is one."""


@dataclass(frozen=True)
class Sampled:
    """Sums over all layers of one `step()` call: squared norms, shape ().

    Attributes:
        first: Of the gradient at w.
        second: Of the gradient at w + v.
        difference: Of their difference.
    """

    first: torch.Tensor
    second: torch.Tensor
    difference: torch.Tensor


class Sample:
    """The two gradients of the layers of one `step()` call.

    While it lasts it costs a copy of this rank's part of the gradient and one of the weights. Nothing is written to
    the state before `end`, and nothing waits for the device.
    """

    def __init__(self, algorithm: Any, plan: Plan):
        """Begin nothing yet.

        Args:
            algorithm: A `LayerwiseOptimizer` that `MeasuresCurvature`.
            plan: Of the call.
        """
        self._algorithm = algorithm
        self._formula: MeasuresCurvature = algorithm
        self._plan = plan
        self._moved = MovedWeights(algorithm)
        self._gradients: list[torch.Tensor | None] = []

    # At w

    def begin(self, signs: torch.Tensor, scale: float | torch.Tensor, *, publish: bool) -> None:
        """Keep the gradient, and move each layer by s h p, where ‖h p‖ is `perturbation` times ‖w‖.

        A layer stays where it is if its gradient is zero, or anything of it is not finite.

        Args:
            signs: s, shape (layers,).
            scale: What the gradient must be multiplied by to be the loss's own.
            publish: Whether the model is brought up to date.
        """
        self._gradients = [None if t.grad is None else t.grad.detach().clone() for t in self._plan.tensors]
        if not self._plan.layout.tensors:
            return
        step = Step(self._algorithm, self._plan)
        self._scale = self._vector(scale)
        _hand_out(step, "scale", self._scale)
        w, p, g = self._sums(step, self._squares).sqrt()
        smallest = SMALLEST_RMS * self._plan.layout.elements.sqrt()
        factor = signs.to(w.device) * self._option(step, "perturbation") * torch.maximum(w, smallest) / p
        self._factor = torch.where((g != 0) & g.isfinite() & factor.isfinite(), factor, torch.zeros_like(factor))
        _hand_out(step, "factor", self._factor)
        self._move(step, publish)

    @sums_over_layers("w", "p", "g")
    def _squares(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return squares(x.w), squares(self._formula.direction(group, layers).change(x)), squares(x.g)

    def _move(self, step: Step, publish: bool) -> None:
        sweeps = EagerSweeps(step.operands, step.takes_part, self._plan.cache)
        chunks = cut_into_chunks(self._plan.joint_layout)

        def change(index: int, local: torch.Tensor) -> None:
            if not step.takes_part[index]:
                return
            for chunk in filter(None, (whole.only(index.__eq__) for whole in chunks)):
                group = step.groups[chunk.group]
                x = sweeps.view(group, chunk, in_place=False)
                by, factor = self._formula.direction(group.options, group.table).change(x), x.of(group.table.factor)
                x.move(torch.where(factor != 0, by * factor, torch.zeros_like(by)))
            in_order = step.operands.weights[index]
            if in_order.data_ptr() != local.data_ptr():
                local.copy_(in_order)

        self._moved.move(self._plan.layout.tensors, change, publish=publish)

    # At w + v

    @property
    def is_lost(self) -> bool:
        """Whether somebody has changed the weights, so that they cannot be restored."""
        return self._moved.are_lost

    def refuse_lost(self) -> None:
        """Raise RuntimeError if it is so."""
        self._moved.refuse_lost()

    def restore(self, *, publish: bool) -> None:
        """Give the weights the bits that they had. Raises RuntimeError if somebody has changed them."""
        self._moved.restore(publish=publish)

    def put_gradient_back(self) -> None:
        """Make the gradient that of the first pass."""
        for tensor, gradient in zip(self._plan.tensors, self._gradients, strict=True):
            tensor.grad = gradient

    def end(self, scale: float | torch.Tensor, *, publish: bool) -> Sampled | None:
        """Take the gradient at w + v, restore weights and gradient, and add the sample to the averages.

        What is not finite is not added, nor is a layer whose gradient is zero in one of the passes, nor anything if
        all gradients are the same in both.

        Args:
            scale: As in `begin`, of the second gradient.
            publish: Whether the model is brought up to date.

        Returns:
            None if the call steps nothing.
        """
        layout = self._plan.layout
        second = read_gradients(layout, self._plan.as_they_lie)
        self.restore(publish=publish)
        self.put_gradient_back()
        if not layout.tensors:
            return None
        step = Step(self._algorithm, self._plan)
        step.operands.inputs["second"] = self._like_first(step, second), None
        _hand_out(step, "scale", self._scale)
        _hand_out(step, "second_scale", self._vector(scale))
        descent, change, p, *squared = self._sums(step, self._products)
        curvature = change / self._factor + self._decay(step) * p
        measured = (self._factor != 0) & (squared[1] != 0) & descent.isfinite() & curvature.isfinite()
        measured &= squared[2].sum() != 0
        self._average(step, measured, {"descent": descent, "curvature": curvature})
        return Sampled(*torch.stack(squared).sum(dim=1))

    @sums_over_layers("descent", "curvature", "p", "first", "second", "difference")
    def _products(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        against = self._formula.direction(group, layers).change(x)  # -p
        first, second = x.g * x.of(layers.scale), x.second * x.of(layers.second_scale)
        difference = second - first
        descent = against * x.plus(first, x.w, self._formula.decay_in_gradient(group))
        of_gradients = squares(first), squares(second), squares(difference)
        return values(descent), values(against * -difference), squares(against), *of_gradients

    def _like_first(self, step: Step, second: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """The second gradients with the sign of the first, zeros where there are none."""
        groups = self._algorithm.param_groups
        signed = [
            -gradient if gradient is not None and groups[group]["maximize"] else gradient
            for gradient, group in zip(second, self._plan.layout.groups, strict=True)
        ]
        pairs = zip(signed, step.operands.weights, strict=True)
        return [torch.zeros_like(like) if gradient is None else gradient for gradient, like in pairs]

    def _average(self, step: Step, measured: torch.Tensor, sampled: Mapping[str, torch.Tensor]) -> None:
        """Add numbers to the running averages of the layers that were measured, and count the sample."""
        old, beta = step.layer_state, self._option(step, "beta")
        new = {name: beta * old[name] + (1 - beta) * number for name, number in sampled.items()}
        new["samples"] = old["samples"] + 1
        for name, number in new.items():
            kept = torch.where(measured, number, old[name])
            write_all_numbers(step.states, self._plan.layout.tensors, name, self._plan.layer_counts, kept)

    # Numbers of layers, shape (layers,), fp64

    def _sums(self, step: Step, stage: Stage) -> torch.Tensor:
        """The sums of a stage over all shards, shape (sums, layers): one all-reduce."""
        layout = self._plan.layout
        sweeps = EagerSweeps(step.operands, step.takes_part, self._plan.cache)
        shape = len(stage.sum_sizes), len(layout.layers)
        packed = torch.zeros(shape, dtype=torch.float64, device=layout.numbers_device)
        for index, group in step.groups.items():
            packed[:, group.layers.start : group.layers.stop] = sweeps.measure(index, stage, keep=False).of_layers
        return layout.reduce(packed)

    def _vector(self, number: float | torch.Tensor) -> torch.Tensor:
        as_tensor = torch.as_tensor(number, dtype=torch.float64, device=None if torch.is_tensor(number) else "cpu")
        return as_tensor.to(self._plan.layout.numbers_device).expand(len(self._plan.layout.layers))

    def _option(self, step: Step, name: str) -> torch.Tensor:
        return self._of_layers(step, [group.options[name] for group in step.groups.values()])

    def _decay(self, step: Step) -> torch.Tensor:
        return self._of_layers(step, [self._formula.decay_in_gradient(g.options) for g in step.groups.values()])

    def _of_layers(self, step: Step, numbers: Sequence[Number]) -> torch.Tensor:
        """One vector of what each group has, a number or a vector of its layers."""
        device = self._plan.layout.numbers_device
        of_groups = [
            (number if isinstance(number, torch.Tensor) else torch.tensor(number, dtype=torch.float64, device="cpu"))
            .to(device)
            .expand(len(group.layers))
            for number, group in zip(numbers, step.groups.values(), strict=True)
        ]
        return torch.cat(of_groups)


def _hand_out(step: Step, name: str, vector: torch.Tensor) -> None:
    """Give each group's table the numbers of its layers."""
    for group in step.groups.values():
        setattr(group.table, name, vector[group.layers.start : group.layers.stop])
