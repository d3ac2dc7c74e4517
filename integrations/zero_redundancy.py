"""torch's ZeroRedundancyOptimizer: each rank steps some of the model's parameters, whole, and sends them to the others.

    what an optimizer needs              on this rank
    sums over a layer's elements         complete: every layer is whole on the rank that steps it
    the norm of the whole model          not known: the other layers are stepped by other ranks
    group gradients, counts of rows      not known: they travel by collectives that all ranks join for all layers

Read from torch 2.13.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from trustratio.optimizers.sharding.backends import register_backend
from trustratio.optimizers.sharding.layout import Layout, LayoutError
from trustratio.optimizers.sharding.unsharded import whole_parameters

__all__ = ["ZeroRedundancyBackend"]

BACKEND = "ZeroRedundancyOptimizer"
CLIPPING = "max_norm of torch.nn.utils.clip_grad_norm_, called on all parameters before step(),"


class ZeroRedundancyBackend:
    """Explains the parameters of an optimizer inside ZeroRedundancyOptimizer."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Do nothing: any optimizer class may be given."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout if a ZeroRedundancyOptimizer steps this optimizer.

        Raises:
            LayoutError: If the optimizer needs more than the layers that this rank steps.
        """
        if not _is_inside(optimizer):
            return None
        _refuse_optimizer(optimizer)
        return whole_parameters(
            optimizer, tensors, backend=BACKEND, clips_with=CLIPPING, gradient_norm=_refuse_model_norm
        )


def _is_inside(optimizer: Any) -> bool:
    # type() rather than isinstance(), which would run the __class__ property of foreign proxy objects.
    return any(
        issubclass(type(candidate), ZeroRedundancyOptimizer) and vars(candidate).get("optim") is optimizer
        for candidate in gc.get_objects()
    )


def _refuse_optimizer(optimizer: Any) -> None:
    if optimizer.statistics is not None or any(map(optimizer.has_rows, optimizer.param_groups)):
        raise LayoutError(
            f"{type(optimizer).__name__} needs group gradients or counts of rows of all layers on all ranks, but under "
            f"{BACKEND} a rank steps some layers only: not supported. Use DDP alone, FSDP2 (fully_shard) or DeepSpeed "
            "ZeRO"
        )


def _refuse_model_norm() -> torch.Tensor:
    raise LayoutError(
        f"this optimizer needs the norm of the whole model's gradient, but under {BACKEND} a rank steps some layers "
        "only. Use DDP alone, FSDP2 (fully_shard) or DeepSpeed ZeRO"
    )


register_backend(ZeroRedundancyBackend())
