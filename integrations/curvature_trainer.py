"""Hugging Face Trainer: samples of the curvature, which the optimizers of `trustratio.optimizers.curvature` step by.

    trainer = CurvatureTrainer(
        model=model, args=args, ...,
        optimizer_cls_and_kwargs=optimizer_for_trainer("curvature_adamw", lr=0.5),
    )

Read from transformers 5.23.0 and accelerate 1.15.0.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from trustratio.optimizers import CurvatureAdamW, CurvatureSGD
from trustratio.optimizers.sharding.internals import Internals

from .accelerate import layerwise_optimizer

__all__ = ["CurvatureTrainer"]

INTERNALS = Internals("the Trainer's micro-batches", "accelerate", "1.15.0")


class CurvatureTrainer(Trainer):
    """A Trainer that runs the micro-batches of a step once more where `CurvatureSGD` or `CurvatureAdamW` wants it.

    On one process, under DDP, FSDP and DeepSpeed, with gradients accumulated and clipped, and with fp16's loss scale.
    Where another Trainer is subclassed, name this one first: ``class Mine(CurvatureTrainer, Seq2SeqTrainer)``. What
    is logged is the loss of the first pass. The second one costs as much as the first, every `interval` steps, and
    the memory of its micro-batches until then.

    Raises:
        TypeError: In the first step, if another optimizer trains.
    """

    _sampled: CurvatureSGD | CurvatureAdamW | None = None
    _micro_batches: list[Any]

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Train on a micro-batch, as the Trainer does; after the last one of a step on all of them again, if wanted."""
        if self._sampled is None and (optimizer := self._optimizer_of_samples()).wants_curvature():
            self._sampled, self._micro_batches = optimizer, []
        if self._sampled is not None:
            self._micro_batches.append(copy.copy(inputs))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._sampled is not None and self.accelerator.sync_gradients:
            optimizer, self._sampled = self._sampled, None
            micro_batches, self._micro_batches = self._micro_batches, []
            with optimizer.curvature(loss_scale=self._loss_scale()):
                self._train_again(model, micro_batches, num_items_in_batch)
        return loss

    def _train_again(
        self, model: torch.nn.Module, micro_batches: list[Any], num_items_in_batch: torch.Tensor | int | None
    ) -> None:
        is_last_one = INTERNALS.read(self.accelerator.gradient_state, "_set_sync_gradients")
        for number, inputs in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            is_last_one(is_last)
            with self._accumulating(model, is_last):
                super().training_step(model, inputs, num_items_in_batch)

    def _accumulating(self, model: torch.nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """What keeps gradients here until the last micro-batch; DeepSpeed's engine does so itself."""
        alone = is_last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return nullcontext() if alone else self.accelerator.no_sync(model)

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _optimizer_of_samples(self) -> CurvatureSGD | CurvatureAdamW:
        optimizer = layerwise_optimizer(self.optimizer)
        if not isinstance(optimizer, (CurvatureSGD, CurvatureAdamW)):
            raise TypeError(
                f"CurvatureTrainer takes samples for CurvatureSGD or CurvatureAdamW, and {type(optimizer).__name__} "
                'trains: give it optimizer_cls_and_kwargs=optimizer_for_trainer("curvature_adamw", lr=...), or use '
                "transformers.Trainer"
            )
        return optimizer
