"""A model compiled region by region: the layers are alike, so that what is compiled for one serves all."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

_MOST_VERSIONS = 64
"""Of one region: kinds of layers times shapes of micro-batches, with and without gradients. Beyond torch's own limit of
8 it would go on uncompiled, and say so once."""


def compile_regions(model: Any, backend: str = "inductor") -> None:
    """Compile embeddings, encoder layers and head of a `GatheredHead`, in place: parameters keep their names.

    A whole model of 24 layers is 24 times the code, and minutes of compiling before the first update; between regions
    nothing could be fused but into a matrix product. Layers are compiled for the shapes of micro-batches, of which a
    run has few; the head for any number of masked tokens, which is another one in every micro-batch.

    Args:
        model: before or after it is wrapped.
        backend: torch.compile's.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_VERSIONS)
    for region in model.regions():
        region.compile(backend=backend, dynamic=False)
    # A method, so that a copy of the model has the copy's head.
    model.predicted_loss = MethodType(torch.compile(type(model).predicted_loss, backend=backend, dynamic=True), model)
