"""Lightning: layer norms of any optimizer; and a schedule that counts updates is stepped once per update, or refused.

`configure_optimizers` that returns a scheduler alone means ``"interval": "epoch"``: the rate of the first update of a
warm-up would stay for a whole epoch. Read from Lightning 2.6, of both names, `lightning` and `pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.living import living

from .guards.first_step import FirstStepCheck
from .guards.replaced import ConflictingSettingsError, innermost
from .layer_norms import LayerNorms
from .norms.scalars import SHOWN, Scalars
from .norms.targets import Writer, begin_file, check_every, check_file

__all__ = ["LayerNormsCallback", "LightningBackend"]

NAMES = ("lightning.pytorch", "pytorch_lightning")
"""One package under two names, of whose classes none is the other's."""


def _callback_class() -> Any:
    """The base of callbacks: of the package that is imported, or else installed; `object` without one."""
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except (ImportError, AttributeError):
            continue
    return object


Callback: Any = _callback_class()


class LayerNormsCallback(Callback):
    """Logs exact norms of weights, gradients and updates to the Trainer's loggers, and writes them to a file.

    For every strategy and optimizer: see `LayerNorms`. Keys: `layer_norms/model/NUMBER` of the whole model, and of
    layers that are chosen `layer_norms/NUMBER/LAYER`. Works with `lightning.pytorch` and `pytorch_lightning`.

    Args:
        every: Measure every how many steps of the optimizer; by default the Trainer's `log_every_n_steps`.
        file: All numbers of all layers in each measured step, as in `LayerNorms.write_to`, written by the first rank.
            When training goes on from a checkpoint, so does the file.
        layers: Layers whose numbers are logged: names or patterns such as ``"encoder.*"``, one or several.
        numbers: Which numbers of each of these layers, names as in `LayerNorm`.
        optimizer: Which of the optimizers, counted from 0, if there are several.

    Raises:
        ImportError: If Lightning is not installed.
        TypeError: If `file` is no path, or a pattern no text.
        ValueError: If `every` is no positive integer, or a number has an unknown name; on all ranks when training
            begins, if there is no such optimizer or several and none was chosen, if the file cannot be written, or
            should be continued and holds anything but measured steps.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        file: str | os.PathLike[str] | None = None,
        layers: str | Iterable[str] = "*",
        numbers: Iterable[str] = SHOWN,
        optimizer: int | None = None,
    ):
        if Callback is object:
            raise ImportError("LayerNormsCallback needs Lightning: pip install lightning")
        if every is not None:
            check_every(every)
        check_file(file)
        self.every = every
        self.file = file
        self.optimizer = optimizer
        self._scalars = Scalars(layers, numbers)
        self._norms: LayerNorms | None = None
        self._write: Writer | None = None
        self._measured: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer, and open the file."""
        self.on_train_end(trainer, pl_module)  # of a training that was broken off

        def step() -> int:  # the Trainer counts the steps of all optimizers
            return int(trainer.global_step) // len(trainer.optimizers) + 1

        def was_measured(norms: LayerNorms) -> None:
            self._measured = step()

        def is_wanted(_: int) -> bool:
            return step() % (self.every or max(1, trainer.log_every_n_steps)) == 0

        self._norms = LayerNorms(self._chosen(trainer.optimizers), pl_module, every=is_wanted)
        self._norms.on_measure(was_measured)
        if self.file is not None:
            self._write = begin_file(self.file, step() - 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Write and log what was measured in the batch."""
        step, self._measured = self._measured, None
        if step is None or not trainer.is_global_zero:
            return
        assert self._norms is not None
        measured = self._norms.latest()
        if self._write is not None:
            self._write(measured, step)
        for logger in trainer.loggers:
            logger.log_metrics(self._scalars.of(measured), step=step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure no more."""
        if self._norms is not None:
            self._norms.remove()
        self._norms = self._write = self._measured = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Measure no more."""
        self.on_train_end(trainer, pl_module)

    def _chosen(self, optimizers: list[Any]) -> Any:
        if self.optimizer is None and len(optimizers) == 1:
            return optimizers[0]
        if self.optimizer is None or not 0 <= self.optimizer < len(optimizers):
            raise ValueError(
                f"LayerNormsCallback measures one of the module's {len(optimizers)} optimizers, and was given "
                f"optimizer={self.optimizer}: give its number, from 0; another callback can measure another"
            )
        return optimizers[self.optimizer]


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
    modules = (sys.modules.get(name) for name in NAMES)
    kinds = [module.Trainer for module in modules if module is not None and hasattr(module, "Trainer")]
    for trainer in living(*kinds) if kinds else ():
        module = trainer.lightning_module
        if module is not None and module.automatic_optimization:
            yield from trainer.lr_scheduler_configs


register_backend(LightningBackend())
