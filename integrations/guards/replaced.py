"""Another optimizer than the one that was given: how it is told, and the two errors of all guards."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers import LayerwiseOptimizer

__all__ = ["KEEP_IT", "ConflictingSettingsError", "ReplacedOptimizerError", "innermost", "refuse_replacement"]

KEEP_IT = 'set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config, beside offload_optimizer'


class ReplacedOptimizerError(RuntimeError):
    """Training would go on with another optimizer than the one that was given."""


class ConflictingSettingsError(RuntimeError):
    """Training would go on with another rate, on other data or in another engine than was asked for."""


def innermost(optimizer: Any) -> Any:
    """Return what the wrappers of accelerate and DeepSpeed finally step: they all name it `optimizer`."""
    while not isinstance(optimizer, LayerwiseOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            return optimizer
        optimizer = inner
    return optimizer


def refuse_replacement(optimizer: Any) -> None:
    """Raise if the optimizer was built from the groups of one of ours, whose place it has taken.

    Our groups have a key that nobody else's have: `adapt`. A wrapper that holds our optimizer may show our groups, and
    so has one that has loaded our `state_dict()`, whose state came with it: what takes our place has none.

    Raises:
        ReplacedOptimizerError: If so.
    """
    if isinstance(optimizer, LayerwiseOptimizer) or not any("adapt" in group for group in optimizer.param_groups):
        return
    if getattr(optimizer, "state", None):
        return
    wraps = any(isinstance(value, Optimizer) for value in vars(optimizer).values())
    if wraps or "adapt" in getattr(optimizer, "defaults", {}):
        return
    raise ReplacedOptimizerError(
        f"{type(optimizer).__name__} was made from the parameter groups of an optimizer of trustratio and would train "
        f"in its place. Accelerate does so under DeepSpeed's offload_optimizer: {KEEP_IT}"
    )
