"""One random sign per layer and sample, the same on all ranks, under every sharding and after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..sharding.layout import Layer

__all__ = ["labels_of", "signs"]


def signs(seed: int, number: int, labels: Iterable[str]) -> torch.Tensor:
    """Return 1 or -1 for each layer, shape (layers,), fp64, on the CPU.

    Args:
        seed: The optimizer's.
        number: The sample's.
        labels: Of the layers; different ones get independent signs.
    """
    drawn = [hashlib.blake2b(f"{seed}/{number}/{label}".encode(), digest_size=1).digest()[0] & 1 for label in labels]
    return torch.tensor(drawn, dtype=torch.float64, device="cpu") * 2 - 1


def labels_of(optimizer: Any, layers: Sequence[Layer]) -> list[str]:
    """A label for each layer that no sharding changes: the name that came with its parameter, else its place.

    Segments of a parameter are counted.
    """
    places = {id(parameter): str(place) for place, parameter in enumerate(optimizer.given_parameters())}
    labels: list[str] = []
    seen: dict[str, int] = {}
    for layer in layers:
        known = layer.parameter is not None and optimizer.parameter_name(layer.parameter)
        label = known or places.get(id(layer.parameter), layer.name)
        seen[label] = segment = seen.get(label, -1) + 1
        labels.append(f"{label}/{segment}")
    return labels
