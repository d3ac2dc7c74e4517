"""Lightning: a schedule that counts updates is stepped once per epoch, unless it is told otherwise.

`configure_optimizers` that returns a scheduler alone means ``"interval": "epoch"``: the rate of the first update of a
warm-up would stay for a whole epoch. Read from Lightning 2.6, of both names, `lightning` and `pytorch_lightning`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.living import living

from .guards.first_step import FirstStepCheck
from .guards.replaced import ConflictingSettingsError, innermost

__all__ = ["LightningBackend"]


class LightningBackend(Backend):
    """Looks at the schedulers that Lightning will step."""

    def __init__(self) -> None:
        self._refuse_other_intervals = FirstStepCheck(_refuse_other_intervals)

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise ConflictingSettingsError if Lightning would step a schedule of ours less than once per update."""
        self._refuse_other_intervals(optimizer)


def _refuse_other_intervals(optimizer: Optimizer) -> None:
    for config in _stepped_by_lightning():
        scheduler = config.scheduler
        counts = getattr(scheduler, "counts_updates", False) and innermost(scheduler) is optimizer
        if counts and (config.interval, config.frequency) != ("step", 1):
            raise ConflictingSettingsError(
                f"{type(scheduler).__name__} counts updates, but Lightning would step it every "
                f"{config.frequency} {config.interval}: return from configure_optimizers "
                '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}'
            )


def _stepped_by_lightning() -> Iterator[Any]:
    modules = (sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning"))
    kinds = [module.Trainer for module in modules if module is not None and hasattr(module, "Trainer")]
    for trainer in living(*kinds) if kinds else ():
        module = trainer.lightning_module
        if module is not None and module.automatic_optimization:
            yield from trainer.lr_scheduler_configs


register_backend(LightningBackend())
