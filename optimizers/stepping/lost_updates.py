"""How many weights of 16 bits an update leaves where they are: measured once, in the first step that has gradients.

Without fp32 master weights an update below half the distance to the next bf16 or fp16 number is lost, at every step
anew. Losses fall all the same, so nothing else tells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kernels.interface import GroupOperands, Operands
from ..sharding.layout import listing

__all__ = ["RoundedUpdates"]

SAMPLE = 1 << 16
"""Elements that are looked at of each local tensor, evenly spread."""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class RoundedUpdates:
    """A sample of the weights before a step; where none is of 16 bits, of nothing."""

    def __init__(self, operands: Operands):
        self._operands = operands
        mastered = {
            index
            for group in operands.groups.values()
            if group.rounding is not None and group.rounding.master is not None
            for index in group.tensors
        }
        self._before = {
            index: _sample(weights).clone()
            for index, weights in enumerate(operands.weights)
            if weights.dtype in NAMES and operands.gradients[index] is not None and index not in mastered
        }

    def describe(self, groups: Mapping[int, GroupOperands]) -> str | None:
        """After the step: the warning, with the share of the updates that were lost, or "" if none was.

        None where there was no update. Waits for the device.
        """
        if not self._before:  # as at every step, where all weights have a master
            return None
        counts, rates = [], set()
        for group in groups.values():
            rate_of = self._rates(group)
            for index in set(group.tensors) - self._held(group):
                gradient, rate = self._operands.gradients[index], rate_of.get(index)
                if rate and index in self._before and gradient is not None:
                    weights = self._operands.weights[index]
                    has_update = _sample(gradient) != 0
                    is_lost = has_update & (_sample(weights) == self._before[index])
                    # Each counts by its tensor's size.
                    counts.append(torch.stack([has_update.sum(), is_lost.sum()]) * _stride(weights))
                    rates.add(f"{rate:g}")
        made, lost = torch.stack(counts).sum(dim=0).tolist() if counts else (0, 0)
        if not made:
            return None
        if not lost:
            return ""
        dtypes = sorted({NAMES[sample.dtype] for sample in self._before.values()})
        share = f"{lost / made:.1%}" if lost >= 0.001 * made else "less than 0.1%"
        return (
            f"{share} of the {' and '.join(dtypes)} weights that have a gradient did not move in this step "
            f"(lr {listing(sorted(rates), shown=3)}): their updates are below half the distance to the next number, "
            "and nobody keeps fp32 master weights. Round bf16 weights stochastically or with a rest "
            '(master="stochastic" or "kahan"), or keep the parameters in fp32 and compute under torch.autocast, or let '
            "DeepSpeed (bf16 or fp16 in its config) or FSDP over fp32 parameters (MixedPrecisionPolicy, "
            "MixedPrecision) keep them"
        )

    def _rates(self, group: GroupOperands) -> dict[int, float]:
        """The learning rate of each local tensor that carries layers."""
        rates = torch.as_tensor(group.options["lr"], device="cpu").expand(len(group.layers)).tolist()
        return {
            self._operands.layout.layers[layer].tensor: rate for layer, rate in zip(group.layers, rates, strict=True)
        }

    def _held(self, group: GroupOperands) -> set[int]:
        """Local tensors with layers that the algorithm itself leaves where they are."""
        if group.table.moves is None:
            return set()
        moves = group.table.moves.tolist()
        layers = self._operands.layout.layers
        return {layers[layer].tensor for layer, moved in zip(group.layers, moves, strict=True) if not moved}


def _stride(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // SAMPLE)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1)[:: _stride(tensor)]
