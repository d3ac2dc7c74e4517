"""Which elements of a DTensor lie on this rank."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from trustratio.optimizers.sharding.layout import LayoutError

from .internals import split


def local_indices(name: str, tensor: DTensor) -> list[torch.Tensor]:
    """Along each dimension, cut the indices as DTensor cuts the tensor, from the first mesh dimension to the last."""
    indices = [torch.arange(size, device="cpu") for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    for mesh_dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim") or coordinate is None:
            raise LayoutError(f"layer {name} has the placement {placement}: a checkpoint by position cannot follow it")
        along = indices[placement.dim].view([-1 if d == placement.dim else 1 for d in range(tensor.dim())])
        ranks = tensor.device_mesh.size(mesh_dimension)
        parts = split(placement, along, ranks)
        indices[placement.dim] = parts[coordinate[mesh_dimension]].reshape(-1)
    return indices
