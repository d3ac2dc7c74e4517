"""Exact norms of every layer, before and after any optimizer's step, and clipping by them, under every sharding.

    norms = LayerNorms(optimizer, model)      # torch's, DeepSpeed's, accelerate's, ours; before or after wrapping
    ...
    optimizer.step()
    norms.latest()["encoder.layer.0.attention.self.query.weight"].ratio
    norms.write_to(file="norms.jsonl")          # python -m trustratio.integrations.layer_norms report norms.jsonl

A wrapper that shards a model leaves each rank with parts of layers, whose norms say nothing. Here the parts' sums are
added up: every number is that of the whole layer, and the same on every rank.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from trustratio.optimizers.sharding.data_parallel import processes
from trustratio.optimizers.sharding.names import observed

from .norms.chain import is_local_sgd, stepped_by
from .norms.clipping import clip, refuse_step_in_backward
from .norms.command import main
from .norms.kept_layout import KeptLayout
from .norms.measured_step import Reduced, fetch
from .norms.observation import Observation
from .norms.records import LayerNorm, MeasuredNorms
from .norms.replacement import ReplacementWatch
from .norms.scalars import SHOWN, Scalars
from .norms.targets import Log, check_every, check_targets, is_first_rank, make_writer

__all__ = ["LayerNorm", "LayerNorms", "MeasuredNorms", "clip_grad_norm_"]

LOCAL = (
    "PostLocalSGDOptimizer lets the weights of ranks drift apart between averagings: layer norms are each rank's own, "
    "and a file gets those of the first rank"
)


class LayerNorms:
    """Measures, in every n-th step, the norms of all layers' weights, gradients and updates.

    Of each layer ‖w‖ before the step, ‖g‖ as the optimizer sees it, ‖Δw‖ of what the step has really changed, and
    ‖Δw‖/‖w‖; RMS, largest element and share of zeros of the three. A layer is one parameter of the model.

    Any torch.optim.Optimizer, alone or in DDP, DeepSpeed ZeRO 0 to 3 and its 16-bit optimizers, FSDP1
    (use_orig_params=True), FSDP2, HSDP, tensor parallelism, Megatron's DistributedOptimizer, ZeroRedundancyOptimizer.
    A measured step takes one all-reduce of (8 + 3 · ranks) numbers per layer in fp64 (one per process group, where
    layers are cut over several), and the memory of a copy of this rank's weights; other steps take nothing. Sums of
    squares are in fp64. After the first measured step nothing waits for the device until `latest()`, except for fused
    optimizers under GradScaler. Under pipeline parallelism each stage has its own layers.

    All ranks make it alike, also those that write nothing: a measured step waits for all. One that waits for a minute
    says so.

    Args:
        optimizer: The optimizer, or whatever wraps it: accelerate's, DeepSpeed's (the engine too), Lightning's,
            Megatron's. These may be made later. Another wrapper, which may move weights besides, is measured
            as a whole.
        model: The model, wrapped or not, whose names the layers get. By default names come from the optimizer's
            named parameters, from the modules that live in the process, or are "group.index".
        every: Steps 1·every, 2·every, ... are measured; or a function that is asked when a step begins, by the step's
            number from 1, whether it is, and answers alike on all ranks.

    Raises:
        TypeError: If `optimizer` is none of torch's, and wraps none.
        ValueError: If `every` is neither a positive integer nor a function; at the first measured step, if a parameter
            is complex.
        LayoutError: At the first measured step, if nobody can say where the layers are, or if data-parallel ranks have
            different numbers of the same layers; at any, if the process group's time ends before all ranks measure.
    """

    def __init__(self, optimizer: Any, model: torch.nn.Module | None = None, every: int | Callable[[int], bool] = 1):
        _check_model(model)
        self.every = every
        self._callbacks: list[Callable[[LayerNorms], Any]] = []
        self._fetched: tuple[list[Any], MeasuredNorms] = ([], MeasuredNorms())
        observe = partial(observed, model=model)
        stepped = stepped_by(optimizer, "LayerNorms")
        replacement = ReplacementWatch([one.optimizer for one in stepped], observe, self._is_under_way)
        then = self._was_measured, replacement.remove
        self._last: list[Reduced] = []
        local = processes() > 1 and is_local_sgd(optimizer)
        if local:
            warnings.warn(LOCAL, stacklevel=2)
        self._observations = [
            Observation(KeptLayout(one.optimizer, observe, compared=not local), one.around, self._is_wanted, *then)
            for one in stepped
        ]
        self._watching: list[ReplacementWatch | Observation] = [replacement, *self._observations]

    @property
    def every(self) -> int | Callable[[int], bool]:
        """Which steps are measured; may be set, on all ranks alike, for those that begin later."""
        return self._every

    @every.setter
    def every(self, every: int | Callable[[int], bool]) -> None:
        if not callable(every):
            check_every(every)
        self._every = every

    def latest(self) -> MeasuredNorms:
        """The norms of the last measured step, by layer; empty, with step 0, before the first. Waits for the device."""
        reduced = self._reduced()
        if self._fetched[0] != reduced:
            self._fetched = reduced, fetch(reduced)
        return self._fetched[1]

    def steps_taken(self) -> int:
        """Steps of the optimizer since this was made, measured or not, without those that were skipped."""
        return max((one.taken() for one in self._observations), default=0)

    def on_measure(self, callback: Callable[[LayerNorms], Any]) -> None:
        """Have ``callback(norms)`` called, on every rank, after each measured step, before the device has finished."""
        self._callbacks.append(callback)

    def write_to(
        self,
        file: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
        wandb: Any = None,
        log: Log | None = None,
        *,
        layers: str | Iterable[str] = "*",
        numbers: Iterable[str] = SHOWN,
        steps_done: int = 0,
    ) -> None:
        """Write each measured step, from now on, to one or several places.

        The first rank writes, and waits for the device to do so; on others this does nothing. A file gets all numbers
        of all layers. The others get the whole model's numbers, as `layer_norms/model/NUMBER`, and those that are
        chosen here as `layer_norms/NUMBER/LAYER`. A place that fails while training goes on gets no more, with a
        warning.

        Args:
            file: One JSON object per line and measured step: `MeasuredNorms.record()`, where numbers that are not
                finite are "NaN", "Infinity" and "-Infinity". If training goes on (`steps_done`), so does the file,
                without the steps after those; else one that is there is kept as ``FILE.old``.
            tensorboard: A folder, or a SummaryWriter.
            wandb: The run of Weights & Biases, which ``wandb.init()`` has returned.
            log: Called with a dict of numbers and the step: ``accelerator.log``, the ``log_metrics`` of Lightning's
                loggers.
            layers: Which layers: names or patterns such as ``"encoder.*.weight"``, one or several; ``()`` for none.
            numbers: Which numbers of each, names as in `LayerNorm`.
            steps_done: Steps that training had taken when the measuring began, e.g. those of a checkpoint; they are
                added to the step's number.

        Raises:
            ValueError: If no place is given, `numbers` has an unknown name, `steps_done` is negative, the file that
                should be continued holds anything but measured steps, or is already written to in this process.
            TypeError: If an argument is of another kind.
            ImportError: If `tensorboard` is a folder, and TensorBoard is not installed.
            OSError: If the file cannot be written; on the first rank.
        """
        scalars = Scalars(layers, numbers)
        check_targets(file, tensorboard, wandb, log, steps_done)
        if is_first_rank():
            write = make_writer(scalars, steps_done, file=file, tensorboard=tensorboard, wandb=wandb, log=log)
            self.on_measure(lambda norms: write(norms.latest(), steps_done + norms.latest().step))

    def remove(self) -> None:
        """Measure no more, and forget optimizer and model; `latest()` keeps what it has."""
        self._last = self._reduced()
        for watching in self._watching:
            watching.remove()
        self._watching, self._observations, self._callbacks = [], [], []

    def _is_wanted(self, step: int) -> bool:
        return self._every(step) if callable(self._every) else step % self._every == 0

    def _reduced(self) -> list[Reduced]:
        return [one.reduced for one in self._observations if one.reduced is not None] or self._last

    def _is_under_way(self) -> bool:
        return any(one.is_under_way() for one in self._observations)

    def _was_measured(self) -> None:
        steps = {one.reduced.number if one.reduced else 0 for one in self._observations if one.has_tensors()}
        if len(steps) == 1:  # of a chain, all optimizers have been stepped
            for callback in self._callbacks:
                callback(self)


def clip_grad_norm_(
    optimizer: Any, max_norm: float, per_layer: bool | str = False, model: torch.nn.Module | None = None
) -> torch.Tensor:
    """Clip gradients like torch.nn.utils.clip_grad_norm_, by norms of whole layers under every sharding.

    With the coefficient min(1, max_norm / (norm + 1e-6)); between a step's last backward and the step, after unscaling.
    Call it on all ranks, it takes one all-reduce where layers are sharded. Where a wrapper holds gradients back until
    its step (ZeRO, BF16_Optimizer, Megatron's DistributedOptimizer) they are clipped when its next step begins, after
    its own clipping; a call before each step takes the place of the one before.

    Args:
        optimizer: As in `LayerNorms`.
        max_norm: The largest norm (L2), at least 0. For ``per_layer="rows"`` as a multiple of the rows' weights' norm.
        per_layer: False clips by the whole model's norm, True each layer by its own, and "rows" each row of a layer
            (index of its first dimension; a bias or norm as a whole) such that ‖g_row‖ ≤ max_norm · max(‖w_row‖, 1e-3):
            adaptive gradient clipping, Brock et al. 2021, arXiv:2102.06171.
        model: As in `LayerNorms`.

    Returns:
        The norm before clipping, fp64: of the whole model, 0-d; for ``per_layer=True`` of each layer, shape (layers,),
        in the order of the parameter groups. Where the wrapper holds gradients back, nobody knows it yet: the tensor is
        NaN, and the step writes the norm into it; it stays NaN if DeepSpeed skips the step, and the clip is dropped.

    Raises:
        TypeError: If `optimizer` is none of torch's, and wraps none.
        ValueError: If `max_norm` is negative, NaN or no number, or `per_layer` another value.
        LayoutError: If the norms cannot be exact here, or data-parallel ranks have different ones, as within DDP's
            `no_sync()`; the message says what to set instead.
    """
    _check_model(model)
    refuse_step_in_backward(optimizer)
    stepped = [one.optimizer for one in stepped_by(optimizer, "clip_grad_norm_")]
    return clip(stepped, max_norm, per_layer, model)


def _check_model(model: Any) -> None:
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")


if __name__ == "__main__":
    sys.exit(main())
