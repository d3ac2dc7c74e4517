"""Hugging Face Trainer: make the optimizer, repair the loss, log trust ratios, and notice a dropped optimizer.

    trainer = Trainer(
        model=model, args=args, ...,
        optimizer_cls_and_kwargs=optimizer_for_trainer("lamb", lr=6e-3, weight_decay=0.01),
        compute_loss_func=masked_language_modeling_loss,
    )
    trainer.add_callback(TrustRatioCallback(trainer))

`LayerNormsCallback` is for any optimizer. Read from transformers 5.23.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
import transformers
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from trustratio.optimizers import CowClip, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.sharding.backends import Backend, given_to, register_backend
from trustratio.optimizers.sharding.living import living

from .accelerate import layerwise_optimizer
from .guards.loss import watch_first_loss
from .guards.replaced import ReplacedOptimizerError, innermost, refuse_replacement
from .guards.trainer import (
    calling_trainer,
    refuse_double_division,
    refuse_uncalled_pair,
    refuse_unread_arguments,
    warn_of_lost_clipping,
)
from .layer_norms import LayerNorms
from .named_layers import named_layers
from .norms.ratios import RatioScalars
from .norms.scalars import SHOWN, Scalars
from .norms.targets import Writer, begin_file, check_every, check_file

__all__ = [
    "LayerNormsCallback",
    "OptimizerFactory",
    "TrainerBackend",
    "TrustRatioCallback",
    "masked_language_modeling_loss",
    "optimizer_for_trainer",
]

IGNORED_LABEL = -100
NOT_DECAYED = {"weight_decay": 0.0}


# The optimizer ------------------------------------------------------------------------------------------------------


class OptimizerFactory:
    """What `optimizer_cls_and_kwargs` calls, a factory in the Trainer's words, with the model it trains.

    Attributes:
        made: All optimizers that factories have made.
    """

    made: ClassVar[WeakSet[LayerwiseOptimizer]] = WeakSet()

    def __call__(self, model: torch.nn.Module, *, name: str, **options: Any) -> LayerwiseOptimizer:
        """Build the optimizer over the model's named trainable parameters.

        Layers of fewer than two dimensions (biases, norm weights) get no weight decay. With ``cowclip=True`` the
        model's embeddings are a group of their own whose rows are clipped, and their lookups are counted.
        """
        clipped = _embedding_weights(model) if options.pop("cowclip", False) else set()
        groups: dict[str, list[tuple[str, torch.Tensor]]] = {"clipped": [], "decayed": [], "plain": []}
        for layer in named_layers(model):
            if layer.parameter.requires_grad:
                kind = "clipped" if id(layer.parameter) in clipped else "decayed" if layer.is_matrix else "plain"
                groups[kind].append((layer.name, layer.parameter))
        options_of: dict[str, dict[str, Any]] = {"clipped": {"cowclip": True}, "plain": NOT_DECAYED}
        filled = [{"params": members, **options_of.get(kind, {})} for kind, members in groups.items() if members]
        if not filled:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train")
        optimizer = create_optimizer(name, filled, **options)
        if isinstance(optimizer, CowClip) and groups["clipped"]:
            optimizer.count_lookups(model)
        self.made.add(optimizer)
        return optimizer


def optimizer_for_trainer(name: str, **options: Any) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Make the pair for ``Trainer(optimizer_cls_and_kwargs=...)``.

    A plain ``(LAMB, {"lr": 6e-3})`` works too; but then weight decay comes from `TrainingArguments.weight_decay`, whose
    default is 0, whatever the options say, and layers have no names unless a `TrustRatioCallback` gives them.

    Args:
        name: A key of `OPTIMIZERS`, in any case, or "trust_ratio" with the option ``base_class``.
        options: The class's own, as in `create_optimizer`, with the class's defaults. `lr` is the peak rate: the
            Trainer's schedule multiplies it, and `TrainingArguments.learning_rate` is not read.

    Raises:
        ValueError: If the name or an option is unknown (the nearest ones are named), or an option is out of range, or a
            required one, mostly `lr`, is missing.
        ImportError: If the installed transformers has no optimizer factories, which 5.2 brought.
    """
    if not hasattr(transformers.trainer, "is_optimizer_factory"):
        raise ImportError(
            f"optimizer_for_trainer needs a Trainer that takes optimizer factories (transformers 5.2), and this is "
            f"{transformers.__version__}: upgrade it, or give optimizer_cls_and_kwargs=(class, options) itself"
        )
    matrix, vector = (torch.nn.Parameter(torch.zeros(shape, device="cpu")) for shape in ((1, 1), (1,)))
    groups = [{"params": [matrix]}, {"params": [vector], **NOT_DECAYED}]
    create_optimizer(name, groups, **options)  # errors now, not when training starts
    return OptimizerFactory, {"name": name, **options}


def _embedding_weights(model: torch.nn.Module) -> set[int]:
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds)}


# The loss -----------------------------------------------------------------------------------------------------------


def masked_language_modeling_loss(
    outputs: Any, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy per labelled token of the whole batch, for ``Trainer(compute_loss_func=...)``.

    The stock Trainer takes a model whose forward has ``**kwargs`` to divide its loss by `num_items_in_batch`, and does
    not divide by the accumulation steps then. BertForMaskedLM takes ``**kwargs`` but returns the mean of its own
    micro-batch, so that loss and gradient are too large by the accumulation steps. This sums the cross-entropy of the
    micro-batch and divides by the number of labelled tokens in the whole batch: 64 x 1, 8 x 8 and 1 x 64 (micro-batch
    x accumulation) give the same gradient. For labels that are not shifted: masked language models, token
    classification.

    Args:
        outputs: The model's, with `logits` of shape (..., classes).
        labels: int64 (...); -100 is not predicted.
        num_items_in_batch: Labelled tokens of all micro-batches and ranks; the Trainer counts them. None outside
            training: those of `labels`.

    Raises:
        ValueError: If there are no labels.
    """
    if labels is None:
        raise ValueError("masked_language_modeling_loss needs a batch with `labels` (-100 where nothing is predicted)")
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = labels.ne(IGNORED_LABEL).sum()
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)


# What happens inside ------------------------------------------------------------------------------------------------


class TrustRatioCallback(TrainerCallback):
    """Logs trust ratios and gradient noise, at the Trainer's logging steps, to wherever the Trainer reports.

    Keys: `trust_ratio/min`, `/median` and `/max` over the layers that the ratio scales, `trust_ratio/LAYER` if asked
    for; with `noise` also `gradient_noise/scale` (tr(S)/|G|^2 in samples, averaged over logging steps),
    `gradient_noise/signal` (|G|^2) and `gradient_noise/noise` (tr(S)) of the step, and
    `gradient_noise/adascale_gain`. Between logging steps nothing waits for the device.

    Args:
        trainer: The one it is added to, ``trainer.add_callback(TrustRatioCallback(trainer))``.
        per_layer: Log each layer's ratio too.
        noise: Keep the norms of the micro-batches' gradients, and log what follows from them. Needs at least two
            micro-batches or ranks per step; a shorter step at the end of an epoch that has only one is left out.

    Raises:
        TypeError: Without a Trainer.
        ValueError: When training begins, if `noise` is asked for and a step has a single micro-batch.
        ReplacedOptimizerError: When training begins, if the Trainer steps with another optimizer than one of ours.
    """

    def __init__(self, trainer: Trainer | None = None, *, per_layer: bool = False, noise: bool = False):
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"TrustRatioCallback logs through the Trainer, which callbacks are not told of, and was given "
                f"{type(trainer).__name__}: leave it out of Trainer(callbacks=...), and call "
                "trainer.add_callback(TrustRatioCallback(trainer)) afterwards"
            )
        self.trainer = trainer
        self.noise = noise
        self._scalars = RatioScalars(per_layer, noise)
        self._optimizer: LayerwiseOptimizer | None = None
        self._logged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer, name its layers, and start to collect norms."""
        model = kwargs["model"]
        self._optimizer = layerwise_optimizer(kwargs["optimizer"])
        self._optimizer.name_parameters((layer.name, layer.parameter) for layer in named_layers(model))
        self._logged = state.global_step
        if self.noise:
            _check_groups(args)
            self._optimizer.collect_group_norms()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log if the Trainer is about to."""
        if control.should_log and state.global_step > self._logged:
            self._logged = state.global_step
            assert self._optimizer is not None
            self.trainer.log(self._scalars.of(self._optimizer, self.trainer.args.per_device_train_batch_size))
            control.should_log = True  # which log() has reset, and the Trainer has yet to log its loss

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the epoch's last step under ``logging_strategy="epoch"``."""
        self.on_step_end(args, state, control, **kwargs)


def _check_groups(args: TrainingArguments) -> None:
    if args.gradient_accumulation_steps * args.world_size < 2:
        raise ValueError(
            "TrustRatioCallback(noise=True) compares the gradients of 2 or more micro-batches per step, and there is 1 "
            f"(gradient_accumulation_steps={args.gradient_accumulation_steps} x {args.world_size} rank): halve "
            "per_device_train_batch_size and double gradient_accumulation_steps, or leave out noise=True"
        )


class LayerNormsCallback(TrainerCallback):
    """Logs exact norms of weights, gradients and updates to wherever the Trainer reports, and writes them to a file.

    For every Trainer, whatever its optimizer and sharding: see `LayerNorms`. The steps that are logged are measured,
    and every n-th if asked for; others cost nothing. (Under ``logging_strategy="epoch"`` all are measured, since nobody
    knows which is the last.) Keys: `layer_norms/model/NUMBER` of the whole model, and of layers that are chosen
    `layer_norms/NUMBER/LAYER`.

    Args:
        trainer: The one it is added to; by default the one that calls it. Goes into ``Trainer(callbacks=[...])`` too.
        every: Measure every how many steps, besides those that are logged; they go to the file.
        file: All numbers of all layers in each measured step, as in `LayerNorms.write_to`, written by the first rank.
            When training goes on from a checkpoint, so does the file.
        layers: Layers whose numbers are logged: names or patterns such as ``"*"`` or ``"*.attention.*"``, one or
            several. None by default: they are many, and the Trainer prints what it logs.
        numbers: Which numbers of each of these layers, names as in `LayerNorm`.

    Raises:
        TypeError: If `trainer` is none, `file` no path, or a pattern no text.
        ValueError: If `every` is no positive integer, or a number has an unknown name; on all ranks when training
            begins, if the file cannot be written, or should be continued and holds anything but measured steps.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        every: int | None = None,
        file: str | os.PathLike[str] | None = None,
        layers: str | Iterable[str] = (),
        numbers: Iterable[str] = SHOWN,
    ):
        if not (trainer is None or isinstance(trainer, Trainer)):
            raise TypeError(f"LayerNormsCallback takes a Trainer or nothing, and was given {type(trainer).__name__}")
        if every is not None:
            check_every(every)
        check_file(file)
        self.trainer = trainer
        self._calling: Trainer | None = None
        self.every = every
        self.file = file
        self._scalars = Scalars(layers, numbers)
        self._norms: LayerNorms | None = None
        self._write: Writer | None = None
        self._wanted = self._measured = False
        self._written = self._logged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer, and open the file."""
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._calling = self.trainer or calling_trainer()
        self._norms = LayerNorms(kwargs["optimizer"], kwargs["model"], every=lambda step: self._wanted)
        self._norms.on_measure(self._was_measured)
        self._written = self._logged = state.global_step
        if self.file is not None:
            self._write = begin_file(self.file, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say whether the step that begins is measured: DeepSpeed takes it before any other event comes."""
        step = state.global_step + 1
        self._measured = False
        self._wanted = self._is_regular(step) or _is_logged(args, state, step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what was measured, and log it if the Trainer is about to log."""
        step = state.global_step
        if not self._measured or not (control.should_log or self._is_regular(step)):
            return
        assert self._norms is not None
        assert self._calling is not None
        if self._write is not None and step > self._written:
            self._written = step
            self._write(self._norms.latest(), step)
        if control.should_log and step > self._logged:
            self._logged = step
            self._calling.log(self._scalars.of(self._norms.latest()))
            control.should_log = True  # which log() has reset, and the Trainer has yet to log its loss

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the epoch's last step under ``logging_strategy="epoch"``."""
        self.on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure no more."""
        if self._norms is not None:
            self._norms.remove()
        self._norms = self._write = self._calling = None
        self._measured = False

    def _was_measured(self, norms: LayerNorms) -> None:
        self._measured = True

    def _is_regular(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0


def _is_logged(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether the Trainer will log a step, or may, which has not begun."""
    if args.logging_strategy == IntervalStrategy.EPOCH or (args.logging_first_step and step == 1):
        return True
    return args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0


class DroppedOptimizerGuard(TrainerCallback):
    """Raises, before the first step, if the Trainer trains with another optimizer or rate than it was given.

    ``Trainer(optimizers=(optimizer, None))`` under DeepSpeed drops the optimizer and trains with AdamW, and a section
    "optimizer" in DeepSpeed's config has the pair of `optimizer_for_trainer` never called. Importing this module puts
    the guard into every Trainer, as one of its default callbacks.
    """

    def __init__(self) -> None:
        self._given: LayerwiseOptimizer | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the optimizer that the Trainer was given."""
        given = innermost(kwargs.get("optimizer"))
        self._given = given if isinstance(given, LayerwiseOptimizer) else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare what was given with what is about to train."""
        trainer, stepping = calling_trainer(), innermost(kwargs["optimizer"])
        if isinstance(stepping, torch.optim.Optimizer):
            refuse_replacement(stepping)
        if self._given is not None and stepping is not self._given:
            raise _dropped(type(self._given).__name__, stepping)
        refuse_uncalled_pair(trainer, stepping, _is_made_by_pair(trainer, stepping))
        if isinstance(stepping, LayerwiseOptimizer):
            refuse_unread_arguments(args, stepping)
            refuse_double_division(trainer)
            warn_of_lost_clipping(trainer)
            watch_first_loss(trainer)


def _is_made_by_pair(trainer: Trainer, stepping: Any) -> bool:
    """Whether the optimizer is what the Trainer's pair makes; so it is if the Trainer has none of ours."""
    made_by = (trainer.optimizer_cls_and_kwargs or (None,))[0]
    if not (isinstance(made_by, type) and issubclass(made_by, (OptimizerFactory, LayerwiseOptimizer))):
        return True
    return stepping in OptimizerFactory.made if issubclass(made_by, OptimizerFactory) else isinstance(stepping, made_by)


def _dropped(given: str, stepping: Any) -> ReplacedOptimizerError:
    return ReplacedOptimizerError(
        f"the Trainer was given {given} but would train with {type(stepping).__name__}: under DeepSpeed it "
        f"drops optimizers=(optimizer, scheduler). Use optimizer_cls_and_kwargs=optimizer_for_trainer("
        f'"{given.lower()}", lr=..., weight_decay=...), from trustratio.integrations.transformers'
    )


class TrainerBackend(Backend):
    """Does what `DroppedOptimizerGuard` does, in Trainers that were made before the guard was a default callback.

    Nobody saw what such a Trainer was given; but an optimizer of ours has its model's parameters and takes no step.
    """

    def __init__(self) -> None:
        # Not those whose construction has failed, which a traceback that is kept keeps alive.
        self._unguarded = WeakSet(trainer for trainer in living(Trainer) if hasattr(trainer, "control"))
        for trainer in self._unguarded:
            trainer.add_callback(DroppedOptimizerGuard)  # for all else, where training is yet to begin

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ReplacedOptimizerError if one of those Trainers steps with another optimizer than ours."""
        for trainer in self._unguarded:
            if innermost(trainer.optimizer) is optimizer and not isinstance(optimizer, LayerwiseOptimizer):
                assert trainer.model is not None
                for given in given_to(trainer.model.parameters()):
                    raise _dropped(given, optimizer)


transformers.trainer.DEFAULT_CALLBACKS.append(DroppedOptimizerGuard)  # type: ignore[arg-type]
register_backend(TrainerBackend())
