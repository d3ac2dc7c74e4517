"""torch's ZeroRedundancyOptimizer: each rank steps some of the model's parameters, whole, and sends them to the others.

    what an optimizer needs              on this rank
    sums over a layer's elements         complete: every layer is whole on the rank that steps it
    the norm of the whole model          not known: the other layers are stepped by other ranks
    group gradients, counts of rows      not known: they travel by collectives that all ranks join for all layers

Read from torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.internals import Internals
from trustratio.optimizers.sharding.layout import Layout
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.observed import held_by_wrappers
from trustratio.optimizers.sharding.refusals import refuse_model_norm, refuse_rows, refuse_statistics
from trustratio.optimizers.sharding.unsharded import whole_parameters

__all__ = ["ZeroRedundancyBackend"]

BACKEND = "ZeroRedundancyOptimizer"
INTERNALS = Internals(BACKEND, "torch", "2.9 to 2.14")
ONLY_SOME = f"under {BACKEND} a rank steps some layers only"
INSTEAD = "DDP alone, FSDP2 (fully_shard) or DeepSpeed ZeRO"
CLIPPING = "max_norm of torch.nn.utils.clip_grad_norm_, called on all parameters before step(),"


class ZeroRedundancyBackend(Backend):
    """Explains the parameters of an optimizer inside ZeroRedundancyOptimizer."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout if a ZeroRedundancyOptimizer steps this optimizer.

        Raises:
            LayoutError: If the optimizer needs more than the layers that this rank steps.
        """
        inner = held_by_wrappers(optimizer)
        wrapper = next((one for one in living(ZeroRedundancyOptimizer) if vars(one).get("optim") is inner), None)
        if wrapper is None:
            return None
        refuse_statistics(optimizer, ONLY_SOME, INSTEAD)
        refuse_rows(optimizer, f"which are counted on all ranks, but {ONLY_SOME}", f"use {INSTEAD}")
        norm = partial(refuse_model_norm, f"{ONLY_SOME}. Use {INSTEAD}")
        others = INTERNALS.read(wrapper, "process_group")
        return whole_parameters(
            optimizer, tensors, backend=BACKEND, clips_with=CLIPPING, gradient_norm=norm, others=others
        )


register_backend(ZeroRedundancyBackend())
