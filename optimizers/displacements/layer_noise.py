"""By noise that is as large as each layer, the same however the layer is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..formulas.split_mix import key_of
from ..sharding.layout import Layout, LayoutError, Shard
from ..sharding.local_tensors import local_part, summable
from ..sharding.moved_weights import Change
from ..sharding.positions import positions
from .counter_noise import gaussian, uniform
from .displacement import Displacement

__all__ = ["DISTRIBUTIONS", "LayerNoise"]

DISTRIBUTIONS: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {"gaussian": gaussian, "uniform": uniform}
CHUNK = 1 << 20
"""Elements whose noise is made at a time; it takes some 50 bytes for each."""


class LayerNoise(Displacement):
    """w - step_size · (‖w‖/√n) · z for a layer of n elements, z of mean 0 and variance 1: ‖step_size · z‖ is near ‖w‖.

    z is a function of seed, step, layer's name and position in the whole layer. Nothing is stored, and all ranks that
    have an element move it alike. The norms take one all-reduce for all layers where any is cut.

    Args:
        distribution: One of `DISTRIBUTIONS`.
        seed: A number.
    """

    needs_step = False

    def __init__(self, distribution: str, seed: int):
        self._draw = DISTRIBUTIONS[distribution]
        self._seed = seed

    def check(self, layout: Layout) -> None:
        if layout.shards and not layout.placed:
            raise LayoutError(
                f"{layout.backend} does not tell at which positions of a layer the elements of a rank are, and noise "
                'would depend on the sharding: use direction="gradient"'
            )

    def moves(self, layout: Layout, number: int, step_size: float) -> tuple[Sequence[torch.Tensor], Change]:
        sizes = _root_mean_squares(layout)
        shards: list[list[Shard]] = [[] for _ in layout.tensors]
        for shard in layout.shards:
            shards[layout.layers[shard.layer].tensor].append(shard)

        def change(index: int, weights: torch.Tensor) -> None:
            flat = weights.contiguous().view(-1)
            for shard in shards[index]:
                size = sizes[shard.layer].to(flat.device)
                for begin, noise in self._noise(layout, shard, tuple(weights.shape), number, flat.device):
                    part = flat.narrow(0, shard.start + begin, len(noise))
                    part.sub_((step_size * size).to(noise.dtype) * noise)
            if not weights.is_contiguous():
                weights.copy_(flat.view(weights.shape))

        return layout.tensors, change

    def _noise(
        self, layout: Layout, shard: Shard, local_shape: tuple[int, ...], number: int, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first element, noise) of one chunk of the shard after the other."""
        layer = layout.layers[shard.layer]
        key = key_of(self._seed, number, layer.name)
        for begin in range(0, shard.length, CHUNK):
            elements = torch.arange(begin, min(begin + CHUNK, shard.length), device=device)
            yield begin, self._draw(key, positions(layer, shard, local_shape, elements))

    def state_dict(self, layout: Layout | None) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any], layout: Layout) -> None:
        self._seed = state["seed"]


def _root_mean_squares(layout: Layout) -> torch.Tensor:
    """Of each whole layer's weights, shape (layers,), fp64 on the numbers' device."""
    squares = torch.zeros(1, len(layout.layers), dtype=torch.float64, device=layout.numbers_device)
    flats = [local_part(tensor).detach().reshape(-1) for tensor in layout.tensors]
    for shard in layout.shards:
        run = flats[layout.layers[shard.layer].tensor].narrow(0, shard.start, shard.length)
        norm = torch.linalg.vector_norm(summable(run), dtype=torch.float64)
        squares[0, shard.layer] += norm.square().to(squares.device)
    return (layout.reduce(squares)[0] / layout.elements.clamp(min=1)).sqrt()
