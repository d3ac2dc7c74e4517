"""What the Hugging Face Trainer was asked for, against what it would train with. Read from transformers 5.23.0."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import transformers
from transformers import Trainer, TrainingArguments

from trustratio.optimizers import LayerwiseOptimizer

from .replaced import KEEP_IT, ConflictingSettingsError, ReplacedOptimizerError

__all__ = [
    "calling_trainer",
    "refuse_double_division",
    "refuse_uncalled_pair",
    "refuse_unread_arguments",
    "warn_of_lost_clipping",
]

# What a Trainer that is given an optimizer does not read, and the option in its place.
UNREAD = {"learning_rate": "lr", "weight_decay": "weight_decay"}


def calling_trainer() -> Trainer:
    """Return the Trainer whose event is being handled. Callbacks are not told of it, but it is what calls them."""
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer
        frame = frame.f_back
    raise RuntimeError("no Trainer is calling")


def refuse_uncalled_pair(trainer: Trainer, stepping: Any, made_by_pair: bool) -> None:
    """Raise if another optimizer would step than the one that `optimizer_cls_and_kwargs` makes.

    Raises:
        ReplacedOptimizerError: If so, with who made it.
    """
    if made_by_pair:
        return
    if "optimizer" in _deepspeed_config(trainer):
        reason = (
            'the section "optimizer" of the DeepSpeed config, under which the Trainer does not read '
            "optimizer_cls_and_kwargs: remove that section"
        )
    elif type(trainer).create_optimizer is not Trainer.create_optimizer:
        reason = (
            f"{type(trainer).__name__}.create_optimizer, which overrides the Trainer's and does not read "
            "optimizer_cls_and_kwargs: remove one of them"
        )
    else:
        reason = f"elsewhere. If offload_optimizer is set: {KEEP_IT}"
    raise ReplacedOptimizerError(
        f"{type(stepping).__name__} would train in place of the optimizer of optimizer_cls_and_kwargs. "
        f"It comes from {reason}"
    )


def refuse_unread_arguments(args: TrainingArguments, optimizer: LayerwiseOptimizer) -> None:
    """Raise if the arguments ask for another rate or weight decay than the optimizer was given.

    Raises:
        ConflictingSettingsError: If so. Arguments at their defaults ask for nothing.
    """
    for argument, option in UNREAD.items():
        asked = getattr(args, argument)
        given = [float(options[option]) for options in optimizer.given_options if option in options]
        if asked == TrainingArguments.__dataclass_fields__[argument].default or not given:
            continue
        if not any(math.isclose(asked, value, rel_tol=1e-6) for value in given):
            raise ConflictingSettingsError(
                f"TrainingArguments({argument}={asked:g}) is not read where the Trainer is given an optimizer, and "
                f"{type(optimizer).__name__} has {option}={max(given):g}: write {option}={asked:g} there, or leave "
                f"{argument} out"
            )


def refuse_double_division(trainer: Trainer) -> None:
    """Raise if accelerate would divide the loss by the accumulation steps, which the Trainer or the loss has done.

    Raises:
        ConflictingSettingsError: If so, as from transformers 5.2 to 5.5. Under DeepSpeed accelerate divides nothing.
    """
    steps = trainer.accelerator.gradient_accumulation_steps
    if steps > 1 and not trainer.is_deepspeed_enabled:
        raise ConflictingSettingsError(
            f"accelerate would divide the loss by its own gradient_accumulation_steps={steps}, after the Trainer of "
            f"transformers {transformers.__version__} has divided it: gradients would be too small by a factor of "
            f"{steps}. Install transformers 5.6 or newer, leave num_steps out of accelerator_config, or set "
            "trainer.accelerator.gradient_accumulation_steps = 1 before trainer.train()"
        )


def warn_of_lost_clipping(trainer: Trainer) -> None:
    """Warn if `max_grad_norm` clips nothing, since DeepSpeed clips by its config alone.

    The Trainer itself raises where the config has another number.
    """
    clipping, asked = _deepspeed_config(trainer).get("gradient_clipping", 0.0), trainer.args.max_grad_norm
    if trainer.is_deepspeed_enabled and asked and not clipping and trainer.is_world_process_zero():
        warnings.warn(
            f'max_grad_norm={asked:g} clips nothing under DeepSpeed, whose config has no "gradient_clipping": write '
            '"gradient_clipping": "auto" in it, or max_grad_norm=0.0',
            stacklevel=3,
        )


def _deepspeed_config(trainer: Trainer) -> dict[str, Any]:
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return {} if plugin is None else plugin.deepspeed_config
