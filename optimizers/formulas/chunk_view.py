"""What an algorithm sees of a chunk: weights, gradient and state as flat tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..sharding.local_tensors import compute_dtype
from .chunks import Chunk
from .rounding import FIELD_OF_WEIGHTS, RandomFields, field_of_state, rounded_stochastically, split_sum, sum_of

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["COMPENSATION", "ChunkView", "Input"]

Input = tuple[Sequence[torch.Tensor], torch.Tensor | None]
"""Tensors like the local ones, and the number that multiplies them; None for 1."""

COMPENSATION = "compensation"
"""The state with what bf16 weights lack of the sum, where a group's `master` is "kahan"."""


class ChunkView:
    """What an algorithm sees of a chunk.

    `x.w` and `x.g` are the weights and the gradient, flat, in fp32 (fp64 for fp64 parameters). Element-wise state is
    read by its name, e.g. `x.exp_avg`, and may be updated in place: the view holds a scratch copy until `store`.
    State that is kept in bf16 is rounded then at the latest, and `x.kept("exp_avg")` is what will be kept of it.
    `x.of(vector)` spreads a vector with one number per layer of the parameter group over the chunk's elements,
    `x.plus(x.g, x.w, vector)` adds such multiples, and `x.of_rows(vector)` spreads a vector with a number per row, in
    groups whose rows are measured.
    """

    def __init__(
        self,
        chunk: Chunk,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        state: Mapping[str, Sequence[torch.Tensor]],
        first_layer: int,
        rows: Rows | None = None,
        inputs: Mapping[str, Input] | None = None,
        random: RandomFields | None = None,
        *,
        in_place: bool,
    ):
        """Read a chunk.

        Args:
            chunk: Which elements.
            weights: Flat local tensors.
            gradients: Their flat gradients; None counts as zero.
            state: Flat element-wise state by name.
            first_layer: Index of the group's first layer in the layout.
            rows: The group's rows, where they are measured.
            inputs: Further flat tensors by name, which are read only.
            random: For what the group keeps with 16 bits.
            in_place: Update state where it lies if no conversion or packing is needed, instead of in a scratch copy.
        """
        self._chunk = chunk
        self._weights = weights
        self._state = state
        self._first_layer = first_layer
        self._rows = rows
        self._inputs = inputs or {}
        self._random = random
        self._in_place = in_place
        self._scratch: dict[str, torch.Tensor] = {}
        self.dtype = compute_dtype(weights[chunk.pieces[0].tensor])
        self.w, self._w_is_view = self._read_weights()
        self.g = self._read_gradient(gradients)

    @property
    def _master(self) -> str | None:
        """Of these weights."""
        if self._random is None or self._weights[self._chunk.pieces[0].tensor].dtype != torch.bfloat16:
            return None
        return self._random.rounding.master

    def _read_weights(self) -> tuple[torch.Tensor, bool]:
        w, is_view = self._chunk.read(self._weights, self.dtype)
        if self._master == "kahan":
            w = sum_of(w, self._chunk.read(self._state[COMPENSATION], self.dtype)[0])
        return w, is_view

    def _read_gradient(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        pieces = self._chunk.pieces
        if all(gradients[piece.tensor] is not None for piece in pieces):
            return self._chunk.read(gradients, self.dtype)[0]  # type: ignore[arg-type]
        runs = [(gradients[piece.tensor], piece) for piece in pieces]
        return torch.cat(
            [
                self.w.new_zeros(piece.length)
                if flat is None
                else flat.narrow(0, piece.start, piece.length).to(self.dtype)
                for flat, piece in runs
            ]
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        state, inputs = self.__dict__.get("_state", {}), self.__dict__.get("_inputs", {})
        if name in inputs:
            flats, factor = inputs[name]
            given, _ = self._chunk.read(flats, self.dtype)
            if factor is not None:
                given = given * self._beside_elements(factor.to(self.dtype))
            self.__dict__[name] = given
            return given
        if name not in state:
            raise AttributeError(f"a chunk has w, g, {list(inputs)} and the state {list(state)}, not {name}")
        elements, is_view = self._chunk.read(state[name], self.dtype)
        if not (is_view and self._in_place):
            elements = elements.clone() if is_view else elements
            self._scratch[name] = elements
        self.__dict__[name] = elements
        return elements

    def kept(self, name: str) -> torch.Tensor:
        """An element-wise state as it will be kept, rounded in place: what a step is made of, once it is updated."""
        elements: torch.Tensor = getattr(self, name)
        if self._random is not None and self._random.rounding.state:
            elements.copy_(self._rounded(name, elements))
        return elements

    def _rounded(self, name: str, elements: torch.Tensor) -> torch.Tensor:
        assert self._random is not None
        return rounded_stochastically(elements, self._random(field_of_state(list(self._state).index(name))))

    def of(self, per_layer: torch.Tensor) -> torch.Tensor:
        """Spread a vector of the group's layers, shape (layers,), so that it multiplies the chunk's elements."""
        return self._spread(per_layer, self.dtype)

    def plus(
        self,
        elements: torch.Tensor,
        others: torch.Tensor,
        factor: float | torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return elements + factor · others, the same bits for a number and for a vector of the group's layers.

        Args:
            elements: Flat, the chunk's.
            others: Likewise.
            factor: One number for all layers, or shape (layers,).
            out: Where the sum goes, which may be `elements`; None for a new tensor.
        """
        if not isinstance(factor, torch.Tensor):
            return torch.add(elements, others, alpha=factor, out=out)
        if factor.dim():
            factor = self._spread(factor, elements.dtype)
        return torch.addcmul(elements, others, factor.to(elements.dtype), out=out)

    def _spread(self, per_layer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._chunk.spread(self._beside_elements(per_layer), self._first_layer, dtype)

    def of_rows(self, per_row: torch.Tensor) -> torch.Tensor:
        """Spread a vector of the group's rows on this rank, shape (rows,), over the chunk's elements."""
        assert self._rows is not None, "the optimizer's has_rows() is False for this group"
        return self._beside_elements(self._rows.spread(per_row, self._chunk, self.dtype))

    def _beside_elements(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of layers on the elements' device; if they are elsewhere, because it has no fp64."""
        if numbers.device == self.w.device:
            return numbers
        return (numbers if numbers.dtype == torch.bool else numbers.to(self.dtype)).to(self.w.device)

    def store(self, change: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Subtract `change` from the weights and keep the updated state.

        Args:
            change: Flat, the chunk's elements.
            where: Boolean, broadcastable to the elements: those that may change. Everything if None.
        """
        for name in self._scratch:
            new = self.kept(name)
            if where is not None:
                new = torch.where(where, new, self._chunk.read(self._state[name], self.dtype)[0])
            self._chunk.write(self._state[name], new)
        if where is not None:
            change = torch.where(where, change, torch.zeros_like(change))
        if self._master == "kahan":
            self.w.sub_(change)
            self._write_sum(where)
        elif self._master == "stochastic":
            assert self._random is not None
            self.w.sub_(change)
            self._chunk.write(self._weights, rounded_stochastically(self.w, self._random(FIELD_OF_WEIGHTS)))
        else:
            self.move(change)

    def move(self, change: torch.Tensor) -> None:
        """Subtract `change`, flat, the chunk's elements, from the weights; the state stays as it is."""
        self.w.sub_(change)
        if not self._w_is_view:
            self._chunk.write(self._weights, self.w)

    def _write_sum(self, where: torch.Tensor | None) -> None:
        """Write weights as the sum of two numbers of bf16."""
        compensation = self._state[COMPENSATION]
        assert self._random is not None
        nearest, rest = split_sum(self.w, self._random(FIELD_OF_WEIGHTS))
        if where is not None:  # the same sum may have other summands
            nearest = torch.where(where, nearest, self._chunk.read(self._weights, nearest.dtype)[0])
            rest = torch.where(where, rest, self._chunk.read(compensation, rest.dtype)[0])
        self._chunk.write(self._weights, nearest)
        self._chunk.write(compensation, rest)
