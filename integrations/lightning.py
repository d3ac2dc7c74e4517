"""Lightning: trust ratios and layer norms in its logs, and errors where it would not train as the program reads.

    Trainer(callbacks=[TrustRatioCallback(), LayerNormsCallback(file="layer_norms.jsonl")], ...)

`configure_optimizers` returns an optimizer like any other, under every strategy. A scheduler that it returns alone
means ``"interval": "epoch"``: the rate of the first update of a warm-up would stay for a whole epoch, so a schedule
that counts updates is stepped once per update, or refused. Read from Lightning 2.5 and 2.6, of both names, `lightning`
and `pytorch_lightning`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers import LayerwiseOptimizer
from trustratio.optimizers.sharding.backends import Backend, register_backend

from .guards.first_step import FirstStepCheck
from .guards.lightning import (
    Callback,
    guard_trainers,
    refuse_backward_in_forward,
    refuse_other_intervals,
    refuse_other_windows,
)
from .guards.replaced import ReplacedOptimizerError, innermost
from .layer_norms import LayerNorms
from .named_layers import named_layers
from .norms.ratios import RatioScalars
from .norms.scalars import SHOWN, Scalars
from .norms.taken_steps import TakenSteps
from .norms.targets import Writer, begin_file, check_every, check_file

__all__ = ["DivideLossOnce", "LayerNormsCallback", "LightningBackend", "TrustRatioCallback"]


STEPS = "trustratio_steps"
"""The key in Lightning's checkpoints, of a dict: steps taken, by the callback's kind and its optimizer's number."""


class _OptimizerCallback(Callback):
    """Of one of the module's optimizers, in every n-th of its steps."""

    def __init__(self, every: int | None, optimizer: int | None):
        name = type(self).__name__
        if Callback is object:
            raise ImportError(f"{name} needs Lightning: pip install lightning")
        if every is not None:
            check_every(every)
        if isinstance(optimizer, bool) or not (optimizer is None or isinstance(optimizer, int)):
            raise TypeError(f"{name} takes an optimizer's number, from 0, and was given {optimizer!r}")
        self.every = every
        self.optimizer = optimizer
        self._steps: int | None = None

    def _chosen(self, optimizers: list[Any]) -> Any:
        if self.optimizer is None and len(optimizers) == 1:
            return optimizers[0]
        if self.optimizer is None or not 0 <= self.optimizer < len(optimizers):
            raise ValueError(
                f"{type(self).__name__} measures one of the module's {len(optimizers)} optimizers, and was given "
                f"optimizer={self.optimizer}: give its number, from 0; another callback can measure another"
            )
        return optimizers[self.optimizer]

    def _is_wanted(self, trainer: Any, step: int) -> bool:
        return step % (self.every or max(1, trainer.log_every_n_steps)) == 0

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep how many steps the optimizer has taken: the Trainer counts those of all, and those that were skipped."""
        # Not by state_dict(): Lightning takes no two callbacks of one kind there, and one optimizer may have several.
        self._note_steps()
        if self._steps is not None:
            checkpoint.setdefault(STEPS, {})[self._key()] = self._steps

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on counting from there; files of before have the Trainer's count alone."""
        self._steps = checkpoint.get(STEPS, {}).get(self._key())

    def _key(self) -> str:
        return f"{type(self).__name__}/{self.optimizer or 0}"

    def _note_steps(self) -> None:
        """Bring `_steps` up to date."""

    def _steps_before(self, trainer: Any) -> int:
        """The steps of the optimizer that were taken when training begins, or goes on."""
        if trainer.global_step == 0:
            return 0
        if self._steps is None:
            return int(trainer.global_step) // max(1, len(trainer.optimizers))
        return self._steps


class TrustRatioCallback(_OptimizerCallback):
    """Logs trust ratios and gradient noise to the Trainer's loggers, in every n-th step; others cost nothing.

    Keys as of the Hugging Face Trainer's callback: `trust_ratio/min`, `/median` and `/max` over the layers that the
    ratio scales, `trust_ratio/LAYER` if asked for; with `noise` also `gradient_noise/scale` (tr(S)/|G|^2 in samples,
    averaged over logged steps), `gradient_noise/signal` (|G|^2) and `gradient_noise/noise` (tr(S)) of the step, and
    `gradient_noise/adascale_gain`. The numbers are of whole layers under every strategy. Only the first rank waits for
    the device. Layers that the optimizer was given without names get the module's.

    Args:
        every: Log every how many steps of the optimizer; by default the Trainer's `log_every_n_steps`.
        per_layer: Log each layer's ratio too.
        noise: How many samples a batch of one rank has, to keep the norms of the micro-batches' gradients and log what
            follows from them. Costs some numbers per layer in each backward pass. A step of a single micro-batch, in
            one process, has none.
        optimizer: Which of the optimizers, counted from 0, if there are several.

    Raises:
        ImportError: If Lightning is not installed.
        TypeError: If `optimizer` is no number.
        ValueError: If `every` or `noise` is no positive integer; when training begins, if there is no such optimizer,
            or several and none was chosen, or if `noise` is asked for and a step has a single micro-batch.
        ReplacedOptimizerError: When training begins, if the optimizer is none of ours, e.g. that of a section
            "optimizer" in the config of DeepSpeedStrategy, under which Lightning calls no `configure_optimizers`.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        per_layer: bool = False,
        noise: int | None = None,
        optimizer: int | None = None,
    ):
        super().__init__(every, optimizer)
        if noise is not None and (isinstance(noise, bool) or not isinstance(noise, int) or noise < 1):
            raise ValueError(f"noise must be the samples of one rank's batch, an integer of at least 1, got {noise!r}")
        self.noise = noise
        self._scalars = RatioScalars(per_layer, noise is not None)
        self._taken: TakenSteps | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer, name its layers, and start to count its steps and to collect norms."""
        self.on_exception(trainer, pl_module, None)  # of a training that was broken off
        optimizer = _layerwise(self._chosen(trainer.optimizers))
        optimizer.name_parameters((layer.name, layer.parameter) for layer in named_layers(pl_module))

        def log(step: int) -> None:
            if trainer.is_global_zero and self._is_wanted(trainer, step):
                scalars = self._scalars.of(optimizer, self.noise or 1)
                for logger in trainer.loggers:
                    logger.log_metrics(scalars, step=step)

        if self.noise is not None:
            _check_groups(trainer, pl_module)
            optimizer.collect_group_norms()
        self._taken = TakenSteps(optimizer, log, self._steps_before(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Log the last step of the batch; others are logged when the next begins."""
        if self._taken is not None:
            self._taken.end_step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Count no more."""
        self.on_exception(trainer, pl_module, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException | None) -> None:
        """Count no more."""
        self._note_steps()
        if self._taken is not None:
            self._taken.remove()
        self._taken = None

    def _note_steps(self) -> None:
        if self._taken is not None:
            self._steps = self._taken.taken


def _layerwise(optimizer: Any) -> LayerwiseOptimizer:
    inner = innermost(optimizer)
    if not isinstance(inner, LayerwiseOptimizer):
        raise ReplacedOptimizerError(
            f"TrustRatioCallback logs an optimizer of trustratio, and {type(inner).__name__} steps: return one from "
            'configure_optimizers, and leave the section "optimizer" out of the config of DeepSpeedStrategy. '
            "LayerNormsCallback is for any optimizer"
        )
    return inner


def _check_groups(trainer: Any, pl_module: Any) -> None:
    groups = trainer.accumulate_grad_batches * trainer.world_size
    if pl_module.automatic_optimization and groups < 2:
        raise ValueError(
            "TrustRatioCallback(noise=...) compares the gradients of 2 or more micro-batches per step, and there is 1 "
            f"(accumulate_grad_batches={trainer.accumulate_grad_batches} x {trainer.world_size} rank): halve the batch "
            "and double accumulate_grad_batches, or leave out noise"
        )


class LayerNormsCallback(_OptimizerCallback):
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
        super().__init__(every, optimizer)
        check_file(file)
        self.file = file
        self._scalars = Scalars(layers, numbers)
        self._norms: LayerNorms | None = None
        self._begun = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer, and open the file."""
        self.on_train_end(trainer, pl_module)  # of a training that was broken off
        self._begun = begun = self._steps_before(trainer)
        write: Writer | None = None

        def was_measured(norms: LayerNorms) -> None:
            if trainer.is_global_zero:
                measured = norms.latest()
                step = begun + measured.step
                if write is not None:
                    write(measured, step)
                for logger in trainer.loggers:
                    logger.log_metrics(self._scalars.of(measured), step=step)

        def is_wanted(step: int) -> bool:
            return self._is_wanted(trainer, begun + step)

        self._norms = LayerNorms(self._chosen(trainer.optimizers), pl_module, every=is_wanted)
        self._norms.on_measure(was_measured)
        if self.file is not None:
            write = begin_file(self.file, begun)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure no more."""
        self._note_steps()
        if self._norms is not None:
            self._norms.remove()
        self._norms = None

    def _note_steps(self) -> None:
        if self._norms is not None:
            self._steps = self._begun + self._norms.steps_taken()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Measure no more."""
        self.on_train_end(trainer, pl_module)


class DivideLossOnce(Callback):
    """Has DeepSpeed not divide the loss by `accumulate_grad_batches`, which Lightning has done before.

    Under `DeepSpeedStrategy` both divide it, and gradients are too small by that factor: to weight decay inside the
    trust ratio, to SGD's and to clipping that matters. It calls ``engine.backward(..., scale_wrt_gas=False)``. Under
    other strategies, and without accumulation, it does nothing.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Bind the argument, to the engine of this training."""
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            engine.backward = partial(engine.backward, scale_wrt_gas=False)


class LightningBackend(Backend):
    """Looks at the schedulers that Lightning will step, and at what becomes of gradients that are added up."""

    def __init__(self) -> None:
        self._refuse_other_settings = FirstStepCheck(_refuse_other_settings)

    def admit(self, optimizer_class: type[Optimizer]) -> None:
        """Have the Trainers looked at that may be about to train it."""
        guard_trainers()

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise ConflictingSettingsError if Lightning would not train as the program reads."""
        self._refuse_other_settings(optimizer)


def _refuse_other_settings(optimizer: Any) -> None:
    refuse_other_intervals(optimizer)
    if isinstance(optimizer, LayerwiseOptimizer):
        for trainer in guard_trainers(optimizer):  # that began before they had it
            refuse_backward_in_forward(trainer, trainer.lightning_module)
            refuse_other_windows(trainer)


register_backend(LightningBackend())
