"""The loss under accumulation: whether whoever computes it divides by the number of items that the Trainer counts.

If it does not, it returns a mean, which the Trainer takes for a part of one and does not divide by the accumulation
steps: loss and gradient are too large by their number. What is watched is the number of items itself, while the loss of
the first micro-batch is computed; so it does not matter whose loss it is. Read from transformers 5.23.0.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import Trainer

__all__ = ["watch_first_loss"]


def watch_first_loss(trainer: Trainer) -> None:
    """Warn, when the Trainer's first loss has been computed, if its size depends on how the batch is cut."""
    args = trainer.args
    # Compiled functions cannot be watched, and DataParallel copies what it passes on.
    if _parts_of_a_batch(trainer) < 2 or args.n_gpu > 1 or args.torch_compile:
        return
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def watched(*given: Any, **options: Any) -> Any:
        if trainer.model is None or not trainer.model.training:
            return compute(*given, **options)
        del trainer.compute_loss  # this function: the class's own comes to light again
        items = options.get("num_items_in_batch")
        with _Uses(items) as uses:
            loss = compute(*given, **options)
        if _is_taken_for_a_part(trainer, items) and not uses.seen:
            _warn(trainer)
        return loss

    trainer.compute_loss = watched  # type: ignore[method-assign]


class _Uses(TorchFunctionMode):
    """Notes whether any of torch's functions gets a certain tensor."""

    def __init__(self, watched: Any):
        super().__init__()
        self.watched, self.seen = watched, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= any(value is self.watched for value in (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def _parts_of_a_batch(trainer: Trainer) -> int:
    ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return trainer.args.gradient_accumulation_steps * ranks


def _is_taken_for_a_part(trainer: Trainer, items: Any) -> bool:
    """Whether the Trainer leaves the division to the loss; what a subclass says of its loss comes first."""
    if not isinstance(items, torch.Tensor) or getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
        return False
    return bool(trainer.model_accepts_loss_kwargs) or trainer.compute_loss_func is not None


def _warn(trainer: Trainer) -> None:
    if not trainer.is_world_process_zero():
        return
    given = trainer.compute_loss_func
    if given is not None:
        culprit = f"compute_loss_func={getattr(given, '__name__', given)!s}"
    elif type(trainer).compute_loss is not Trainer.compute_loss:
        culprit = f"{type(trainer).__name__}.compute_loss"
    elif trainer.label_smoother is not None:  # which transformers 5.14 and older do not hand the number of items
        culprit = f"label_smoothing_factor={trainer.args.label_smoothing_factor}"
    else:
        culprit = type(trainer.model).__name__
    warnings.warn(
        f"{culprit} does not divide its loss by num_items_in_batch, and the Trainer does not divide it by the "
        f"accumulation steps: loss and gradient are about {_parts_of_a_batch(trainer)} times too large. Give the "
        "Trainer a compute_loss_func that divides by it; for labels that are not shifted that is compute_loss_func="
        "masked_language_modeling_loss, from trustratio.integrations.transformers",
        stacklevel=4,
    )
