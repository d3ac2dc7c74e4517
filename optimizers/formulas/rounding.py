"""Rounding to bf16 that is the same however layers are cut, on as many processes as there may be, and after a resume.

Stochastic rounding goes up or down by chance, so that the mean of what is kept is what was computed: updates far below
the distance of two bf16 numbers are not lost. The chance is a function of the seed, the layer's name and step, and the
element's position in the whole layer. What a parameter group keeps with 16 bits, compiled code knows from `Rounding`;
tensor operations ask `RandomFields`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..sharding.layout import Layout
from ..sharding.local_tensors import local_part
from ..sharding.positions import positions
from .split_mix import gamma_of, key_of, signed, split_mix

if TYPE_CHECKING:
    from .chunks import Chunk

__all__ = [
    "FIELD_OF_WEIGHTS",
    "MASTERS",
    "WORD",
    "LayerKeys",
    "RandomFields",
    "Rounding",
    "field_of_state",
    "rest_of",
    "rounded_stochastically",
    "split_sum",
    "sum_of",
]

MASTERS = ("stochastic", "kahan")

WORD = 0xD1B54A32D192ED03
"""By which the keys of an element's words of 64 bits differ; each has four fields of 16 bits."""
FIELD_OF_WEIGHTS = 3


def field_of_state(index: int) -> int:
    """Which field rounds an element-wise state, by its place in `Algorithm.element_state`: 0, 1, 2, 4, 5, 6, 8, ..."""
    return index + index // 3


@dataclass(frozen=True, eq=False)
class Rounding:
    """What one parameter group keeps with 16 bits, and the chances of one step.

    Attributes:
        keys: int64, shape (layers of the group,), on the elements' device: the bits of each layer's key in this step.
        gammas: int64, of the same shape, on the same device; the same tensor at every step.
        state: Whether element-wise state is bf16.
        master: One of `MASTERS`, or None for rounding to nearest; of bf16 weights.
    """

    keys: torch.Tensor
    gammas: torch.Tensor
    state: bool
    master: str | None = None


class LayerKeys:
    """The layers' keys, of which each step makes its own.

    Args:
        seed: The group's `rounding_seed`.
        names: Of the group's layers, the same on all ranks and under every wrapper.
        device: Of the elements.
    """

    def __init__(self, seed: int, names: Sequence[str], device: torch.device):
        self._of_layers = _sent([key_of(seed, name) for name in names], device)
        self.gammas = _sent([gamma_of(seed, name) for name in names], device)

    def at(self, step: torch.Tensor) -> torch.Tensor:
        """The keys in each layer's step, int64; computed on the device, so that a captured graph has new ones."""
        return split_mix(self._of_layers, step.to(torch.int64).to(self.gammas.device))


def _sent(numbers: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([signed(number) for number in numbers], dtype=torch.int64, device="cpu").to(device)


class RandomFields:
    """The 16 random bits of each element of a chunk, for each number of it that is rounded."""

    def __init__(self, rounding: Rounding, chunk: Chunk, layout: Layout, first_layer: int):
        self.rounding = rounding
        self._chunk = chunk
        self._layout = layout
        self._first_layer = first_layer
        self._words: dict[int, torch.Tensor] = {}

    def __call__(self, field: int) -> torch.Tensor:
        """The field's numbers in [0, 2^16), int64, shape (elements,)."""
        word, place = divmod(field, 4)
        if word not in self._words:
            self._words[word] = torch.cat([self._of_piece(word, index) for index in range(len(self._chunk.pieces))])
        return (self._words[word] >> 16 * place) & 0xFFFF

    def _of_piece(self, word: int, index: int) -> torch.Tensor:
        piece, layout = self._chunk.pieces[index], self._layout
        shard, tensor = layout.shards[piece.shard], layout.tensors[piece.tensor]
        device = tensor.device
        begin = piece.start - shard.start
        elements = torch.arange(begin, begin + piece.length, device=device)
        places = positions(layout.layers[piece.layer], shard, tuple(local_part(tensor).shape), elements)
        layer = piece.layer - self._first_layer
        key, gamma = (numbers[layer].to(device) for numbers in (self.rounding.keys, self.rounding.gammas))
        return split_mix(key + signed(word * WORD % (1 << 64)), places, gamma)


def rounded_stochastically(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Round fp32 to what bf16 has, up with the chance that keeps the mean; what bf16 has stays as it is, NaN too.

    Args:
        x: fp32.
        random: Whole numbers in [0, 2^16), of the same shape.

    Returns:
        fp32, with the last 16 bits zero.
    """
    kept = (x.contiguous().view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), torch.nan, kept.view(torch.float32))


def sum_of(weights: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Weights that are kept as the sums of two bf16 numbers, the first of which is the one nearest to the sum.

    Where it is not, somebody has written other weights since, and the rest is not theirs: it counts as zero.

    Args:
        weights: bf16, or fp32 with what bf16 has.
        rest: Likewise, of the same shape.

    Returns:
        fp32, of the same shape.
    """
    weights = weights.float()
    total = weights + rest.float()
    return torch.where(_nearest(total) == weights, total, weights)


def split_sum(total: torch.Tensor, random: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two numbers of `sum_of`: bf16 weights and what they lack, which is rounded in its turn.

    Args:
        total: fp32.
        random: By which the rest is rounded stochastically; None for to nearest.

    Returns:
        Weights and rest, both fp32 with what bf16 has. The rest is zero of weights that are not finite.
    """
    nearest = _nearest(total)
    rest = _finite(total - nearest)
    # A rest that is rounded to half a distance lies as near to the next weight, which may be the even one.
    kept = nearest + (_nearest(rest) if random is None else rounded_stochastically(rest, random))
    weights = _nearest(kept)
    return weights, _finite(kept - weights)


def rest_of(total: torch.Tensor) -> torch.Tensor:
    """The rest beside the nearest bf16 weights, for those who write these by themselves; arguments as `split_sum`."""
    nearest = _nearest(total)
    rest = _nearest(_finite(total - nearest))
    # Half a distance would be the next weight's: the next smaller number.
    return torch.where(_nearest(nearest + rest) == nearest, rest, rest * (1 - 2.0**-8))


def _nearest(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isfinite(), x, 0.0)
