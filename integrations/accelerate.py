"""Accelerate: our optimizer behind its wrappers, and an error where it has been replaced.

`accelerator.prepare(model, optimizer)` needs nothing from here. But with `offload_optimizer` in the DeepSpeed config it
builds a `DeepSpeedCPUAdam` from the optimizer's groups and trains with that, without a word. The first step of such an
optimizer raises, wherever accelerate was imported, before or after ours was constructed. Read from accelerate 1.15.0.
"""

from __future__ import annotations

import os
from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.backends import Backend, register_backend

__all__ = [
    "AccelerateBackend",
    "ReplacedOptimizerError",
    "count_ranks_on_cpu",
    "layerwise_optimizer",
    "refuse_replacement",
]

KEEP_IT = 'set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config, beside offload_optimizer'


class ReplacedOptimizerError(RuntimeError):
    """Training would go on with another optimizer than the one that was given."""


def innermost(optimizer: Any) -> Any:
    """Return what the wrappers of accelerate and DeepSpeed finally step: they all name it `optimizer`."""
    while not isinstance(optimizer, LayerwiseOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            return optimizer
        optimizer = inner
    return optimizer


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
    """Let accelerate know of the other ranks when DeepSpeed runs on a machine without an accelerator device.

    Accelerate 1.15 knows no backend for DeepSpeed there, and takes every rank for the only one: each gets the whole
    data set, silently. Call this first, before `Accelerator(...)`, or before `TrainingArguments` with
    ``accelerator_config={"use_configured_state": True}``. Starts the process group, over gloo, if there is none.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def refuse_replacement(optimizer: Any) -> None:
    """Raise if the optimizer was built from the groups of one of ours, whose place it has taken.

    Our groups have a key that nobody else's have: `adapt`. A wrapper that holds our optimizer may show our groups.

    Raises:
        ReplacedOptimizerError: If so.
    """
    if isinstance(optimizer, LayerwiseOptimizer) or not any("adapt" in group for group in optimizer.param_groups):
        return
    wraps = any(isinstance(value, Optimizer) for value in vars(optimizer).values())
    if wraps or "adapt" in getattr(optimizer, "defaults", {}):
        return
    raise ReplacedOptimizerError(
        f"{type(optimizer).__name__} was made from the parameter groups of an optimizer of trustratio and would train "
        f"in its place. Accelerate does so under DeepSpeed's offload_optimizer: {KEEP_IT}"
    )


class AccelerateBackend(Backend):
    """Looks whether an optimizer that is about to step has taken the place of one of ours."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise ReplacedOptimizerError if it has."""
        refuse_replacement(optimizer)


register_backend(AccelerateBackend())
