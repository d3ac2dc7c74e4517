"""Which optimizers compiled sweeps compute: those that leave measuring and updating to a description."""

from __future__ import annotations

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer
from trustratio.optimizers.formulas.algorithm import Algorithm


def is_swept(optimizer_class: type[LayerwiseOptimizer]) -> bool:
    """Whether it has an `update`, and no stage that is a method of its own (see `sums_over_layers`)."""
    members = [member for base in optimizer_class.__mro__ for member in vars(base).values()]
    return optimizer_class.update is not Algorithm.update and not any(hasattr(m, "sum_sizes") for m in members)


SWEPT = [name for name, entry in OPTIMIZERS.items() if is_swept(entry.optimizer_class)]
