"""The order in which a tensor's elements lie in memory, which need not be the one of its indices: channels_last.

Sums over a layer and what happens to an element do not depend on the order. So where a whole layer lies without gaps,
weights, gradient and state are gone over as they lie, in the same order, and nothing is copied. Rows, segments, what is
kept of single gradients and chances of rounding are counted by index; there the elements are put in order first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..formulas.algorithm import Algorithm
from ..sharding.layout import Layout
from ..sharding.local_tensors import is_plain
from ..sharding.memory import is_dense

__all__ = ["as_it_lies", "goes_as_it_lies", "in_the_order_of"]


def goes_as_it_lies(algorithm: Algorithm, layout: Layout) -> Iterator[int]:
    """Yield the local tensors whose elements lie in another order than that of their indices, which does not matter."""
    if algorithm.statistics is not None:
        return
    layers_in = [0] * len(layout.tensors)
    for layer in layout.layers:
        layers_in[layer.tensor] += 1
    for index, tensor in enumerate(layout.tensors):
        has_rows = algorithm.has_rows(algorithm.param_groups[layout.groups[index]])
        is_one_layer = layers_in[index] == 1 and is_plain(tensor)
        if is_one_layer and not has_rows and not tensor.is_contiguous() and is_dense(tensor):
            yield index


def _lies_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors of one shape have their elements in the same order; a dimension of one element has no say."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in strides)


def as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor without gaps, as a vector in the order of memory: a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def in_the_order_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its elements lie as those of `like` do, else a copy in which they do."""
    if _lies_like(tensor, like):
        return tensor
    copied = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return copied.copy_(tensor)
