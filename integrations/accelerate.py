"""Accelerate: our optimizer behind its wrappers, and errors where it would not train as the program reads.

`accelerator.prepare(model, optimizer)` needs nothing from here. But with `offload_optimizer` in the DeepSpeed config it
builds a `DeepSpeedCPUAdam` from the optimizer's groups and trains with that, without a word; and it may count other
processes than there are, or leave DeepSpeed out. The first step raises then, before a weight moves, wherever accelerate
was imported, before or after the optimizer was constructed. Read from accelerate 1.15.0.
"""

from __future__ import annotations

import os
from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.backends import Backend, register_backend

from .guards.accelerated import refuse_other_set_up
from .guards.first_step import FirstStepCheck
from .guards.replaced import KEEP_IT, ConflictingSettingsError, ReplacedOptimizerError, innermost, refuse_replacement

__all__ = [
    "AccelerateBackend",
    "ConflictingSettingsError",
    "ReplacedOptimizerError",
    "count_ranks_on_cpu",
    "layerwise_optimizer",
    "refuse_replacement",
]


def layerwise_optimizer(optimizer: Any) -> LayerwiseOptimizer:
    """Return the optimizer inside what `accelerator.prepare` or the Trainer made of it.

    Args:
        optimizer: Any wrapper, or the optimizer itself. `trust_ratios()`, `statistics` and `collect_group_norms()` are
            found on the result.

    Raises:
        ReplacedOptimizerError: If another optimizer is inside.
    """
    inner = innermost(optimizer)
    refuse_replacement(inner)
    if not isinstance(inner, LayerwiseOptimizer):
        raise ReplacedOptimizerError(
            f"{type(inner).__name__} steps, which is no optimizer of trustratio. If one was given: {KEEP_IT}; leave "
            'the "optimizer" section out of that config; give it to the Trainer as optimizer_cls_and_kwargs'
        )
    return inner


def count_ranks_on_cpu() -> None:
    """Let an Accelerator with DeepSpeed know of the other ranks on a machine without an accelerator device.

    Accelerate 1.15 knows no backend for DeepSpeed there, and takes every rank for the only one: each gets the whole
    data set. Call this first, before `Accelerator(...)`. Starts the process group, over gloo, if there is none. The
    Trainer needs ``TrainingArguments(use_cpu=True)`` in its place.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


class AccelerateBackend(Backend):
    """Looks, before an optimizer steps, at what accelerate has made of it and of its schedulers."""

    def __init__(self) -> None:
        self._refuse_other_set_up = FirstStepCheck(refuse_other_set_up)

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise ReplacedOptimizerError or ConflictingSettingsError if it would not train as the program reads."""
        refuse_replacement(optimizer)
        self._refuse_other_set_up(optimizer)


register_backend(AccelerateBackend())
