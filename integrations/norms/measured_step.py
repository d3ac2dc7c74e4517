"""Measures one step of one optimizer: its calls one after the other, and then all layers with one all-reduce."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt

import torch

from trustratio.optimizers.stepping.agreement import GRADIENT as GRADIENT_NORM
from trustratio.optimizers.stepping.gradients import read_gradients
from trustratio.optimizers.stepping.state import stepped_weights

from .clips import Clips
from .records import LayerNorm, MeasuredNorms
from .shard_sums import LARGEST, NONZERO, SQUARES, ShardSums, Slots

__all__ = ["MeasuredStep", "Reduced", "fetch"]

WEIGHT, GRADIENT, UPDATE = range(3)


class MeasuredStep:
    """Takes the numbers of a step's calls. Between `before` and `after` there is a copy of the call's weights.

    Attributes:
        number: Of the step.
        layout: Of all its tensors.
        clips: What each of those who clip has said, in this process.
        stepped: Ids of the tensors that have been stepped.
    """

    def __init__(self, number: int, sums: ShardSums, optimizer: torch.optim.Optimizer):
        self.number = number
        self._optimizer = optimizer
        self.layout = sums.layout
        self.clips: list[Clips] = []
        self.stepped: set[int] = set()
        self._sums = sums
        self._old: list[torch.Tensor | None] = []
        self._gradients: torch.Tensor | None = None
        device, layers = self.layout.numbers_device, len(self.layout.layers)
        self._numbers = torch.zeros(3, 3, layers, dtype=torch.float64, device=device)

    def before(self, call: Collection[int]) -> None:
        """Copy the weights of a call's local tensors, given by their indices."""
        self._old = [
            stepped_weights(self._optimizer, tensor).clone(memory_format=torch.contiguous_format)
            if index in call
            else None
            for index, tensor in enumerate(self.layout.tensors)
        ]

    def see_gradients(self, call: Collection[int], scale: torch.Tensor | None) -> None:
        """Measure the gradients that are there now; of a call, those that were seen last count.

        Args:
            call: As in `before`.
            scale: What they are multiplied by, where the optimizer itself divides by it.
        """
        gradients = [None if g is None else g.detach() for g in read_gradients(self.layout)]
        present = {index for index in call if gradients[index] is not None}
        found = self._sums.numbers(lambda chunk: self._sums.read(gradients, chunk), present)
        if scale is not None:
            divisor = scale.to(device=found.device, dtype=found.dtype)
            found[SQUARES] /= divisor.square()
            found[LARGEST] /= divisor
        self._gradients = found

    def after(self, call: Collection[int], clips: Sequence[Clips]) -> None:
        """Measure the copied weights, and what has become of them.

        Args:
            call: As in `before`.
            clips: What each of those who clip says of the call.
        """
        old, sums = self._old, self._sums
        new = [
            stepped_weights(self._optimizer, tensor).contiguous() if index in call else None
            for index, tensor in enumerate(self.layout.tensors)
        ]
        self._numbers[WEIGHT] += sums.numbers(lambda chunk: sums.read(old, chunk), call)
        self._numbers[UPDATE] += sums.numbers(lambda chunk: sums.read(new, chunk) - sums.read(old, chunk), call)
        assert self._gradients is not None
        self._numbers[GRADIENT] += self._gradients
        self.clips += clips
        self._old, self._gradients = [], None

    def reduce(self, slots: Slots, limit: float | None) -> Reduced:
        """Add up over all shards: one all-reduce per process group, and in most set-ups there is one.

        Args:
            slots: For the largest elements.
            limit: To which norm the optimizer itself clips the whole model's gradient, if it does.
        """
        sums = self._numbers[:, :LARGEST].flatten(0, 1)  # squares and counts, of weight, gradient and update
        packed = torch.cat([sums, self._clipped_here(), slots.spread(self._numbers[:, LARGEST])])
        reduced = self.layout.reduce(packed)
        added_up, said, largest = reduced.split([len(sums), 2, len(packed) - len(sums) - 2])
        numbers = torch.cat([added_up.view(3, LARGEST, -1), slots.gather(largest).unsqueeze(1)], dim=1)
        layers = [(layer.name, layer.numel) for layer in self.layout.layers]
        clipped = said.sum(dim=1)
        if limit is not None:
            clipped[0] += numbers[GRADIENT, SQUARES].sum().sqrt() > limit
            clipped[1] += 1
        return Reduced(self.number, layers, numbers, clipped)

    def _clipped_here(self) -> torch.Tensor:
        """As `Reduced.clipped`, of this rank: shape (2, layers). Rows that it clips may be on no other rank."""
        said = self._numbers.new_zeros(2, self._numbers.shape[-1])
        for clips in self.clips:
            for flag in clips.made_smaller:
                said[0] += flag.to(said.device) if isinstance(flag, torch.Tensor) else flag
            said[1] += 1 if clips.are_all else nan
        return said


@dataclass(frozen=True, eq=False)
class Reduced:
    """A step's numbers on the device.

    Attributes:
        number: Of the step.
        layers: Names and sizes.
        numbers: Of weight, gradient and update the sum of squares, the count of nonzero elements and the largest one,
            shape (3, 3, layers), fp64.
        clipped: Two sums over those who clip: greater than zero if any has made gradients smaller; and of how many
            that is known, NaN if there may have been others. Shape (2,).
    """

    number: int
    layers: Sequence[tuple[str, int]]
    numbers: torch.Tensor
    clipped: torch.Tensor

    def norms(self) -> dict[str, torch.Tensor]:
        """Of weight, gradient and update of each layer, shape (layers,)."""
        names = "norm of the weights", GRADIENT_NORM, "norm of the update"
        return dict(zip(names, self.numbers[:, SQUARES].sqrt(), strict=True))


def fetch(of_optimizers: Sequence[Reduced]) -> MeasuredNorms:
    """Bring the numbers of a step, of all its optimizers, to the host: waits for the device."""
    layers: dict[str, LayerNorm] = {}
    total = [[0.0, 0.0, 0.0] for _ in range(3)]
    elements = 0
    for reduced in of_optimizers:
        for (name, size), numbers in zip(reduced.layers, reduced.numbers.permute(2, 0, 1).tolist(), strict=True):
            layers[name] = _layer_norm(numbers, size)
            elements += size
            for one, of_model in zip(numbers, total, strict=True):
                of_model[SQUARES] += one[SQUARES]
                of_model[NONZERO] += one[NONZERO]
                of_model[LARGEST] = _larger(of_model[LARGEST], one[LARGEST])
    said = [reduced.clipped.tolist() for reduced in of_optimizers]
    made_smaller, known = sum(one for one, _ in said), sum(count for _, count in said)
    return MeasuredNorms(
        layers,
        step=max((reduced.number for reduced in of_optimizers), default=0),
        model=_layer_norm(total, elements) if layers else None,
        clipped=True if made_smaller > 0 else False if known > 0 else None,
    )


def _layer_norm(numbers: Sequence[Sequence[float]], size: int) -> LayerNorm:
    weight, gradient, update = (sqrt(of_one[SQUARES]) for of_one in numbers)
    return LayerNorm(
        weight,
        gradient,
        update,
        0.0 if update == 0 else inf if weight == 0 else update / weight,
        *(norm / sqrt(size) for norm in (weight, gradient, update)),
        *(of_one[LARGEST] for of_one in numbers),
        *(1 - of_one[NONZERO] / size for of_one in numbers),
    )


def _larger(one: float, other: float) -> float:
    """The larger, NaN where either is."""
    return other if other > one or other != other else one
