"""DeepSpeed: where the layers are inside ZeRO's flat partitions.

ZeRO replaces each group's parameters by one flat fp32 tensor per rank. Which layers lie in it is read, once per flat
tensor, from the wrapper that made it:

    wrapper                          one flat tensor holds                       step() is called
    DeepSpeedZeroOptimizer (1, 2)    this rank's 1/N of a group's concatenation  once per group
    BF16_Optimizer (1)               the same                                    once
    DeepSpeedZeroOptimizer_Stage3    1/N of every layer of a sub-group           once per sub-group
    FP16_UnfusedOptimizer (0)        one whole layer each                        once

Importing this module makes the registered classes pass DeepSpeed's check for optimizers that are safe under ZeRO.
What DeepSpeed does not document is read in `internals.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from trustratio.optimizers import OPTIMIZERS
from trustratio.optimizers.sharding.backends import Backend, register_backend
from trustratio.optimizers.sharding.data_parallel import DataParallel, attribute_of, while_alive
from trustratio.optimizers.sharding.gradient_flow import GradientFlow, Slice
from trustratio.optimizers.sharding.layout import Layout, LayoutError, listing
from trustratio.optimizers.sharding.layout_builder import LayoutBuilder
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.observed import ObservedOptimizer, held_by_wrappers
from trustratio.optimizers.sharding.refusals import refuse_model_norm
from trustratio.optimizers.sharding.repeated_step import RepeatedStep
from trustratio.optimizers.sharding.tensor_parallel import TensorParallel
from trustratio.optimizers.sharding.unsharded import has_its_own_parameters

from ..guards.deepspeed_schedulers import refuse_other_rates
from ..guards.first_step import FirstStepCheck
from .checkpoints import refuse_lossy_checkpoints
from .gradients import describe_gradient_flow
from .internals import (
    INTERNALS,
    BF16_Optimizer,
    DeepSpeedOptimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    FP16_UnfusedOptimizer,
    data_parallel_group,
    flat_tensors,
    global_norm,
    keeps_whole_gradients,
    largest_norm,
    loss_scale_just_grew,
    master_copies,
    publish,
    scales_by_torch,
    supported_optimizers,
)
from .parallelism import (
    CLIPPING,
    PART_OF_MODEL,
    find_engine,
    layer_names,
    refuse_model_parallelism,
    refuse_partitions_over,
    steps_with_a_part,
    unwrapped_layout,
)
from .partitions import slice_of_rank, slices_of_layer, slices_of_view
from .repeated_step import hold, refuse_two_steps

__all__ = ["DeepSpeedBackend"]

_TRAINABLE_BEFORE = (
    "give the optimizer all parameters, trainable, before deepspeed.initialize, and freeze afterwards what is to be "
    "trained later"
)


@dataclass(frozen=True)
class _Held:
    """What this rank holds of a layer; a slice of length 0 where other ranks have all of it."""

    parameter: torch.Tensor
    shape: tuple[int, ...]
    run: Slice


@dataclass(frozen=True)
class _FlatTensor:
    """What one of the optimizer's tensors holds of each of its layers, and the ranks that hold the rest."""

    process_group: dist.ProcessGroup | None
    layers: Sequence[_Held]


class DeepSpeedBackend(Backend):
    """Explains the tensors of DeepSpeed's optimizer wrappers."""

    def __init__(self) -> None:
        self._refuse_other_rates = FirstStepCheck(refuse_other_rates)
        self._left_out: WeakIdKeyDictionary = WeakIdKeyDictionary()  # optimizer -> its layers that no wrapper steps

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ConflictingSettingsError if a scheduler of DeepSpeed trains with other rates than were given.

        And LayoutError if a layer was thawed that was frozen at deepspeed.initialize.
        """
        self._refuse_other_rates(optimizer)
        left_out = self._left_out.get(optimizer, {})
        if thawed := [name for parameter, name in left_out.items() if parameter.requires_grad]:
            raise LayoutError(
                "DeepSpeed steps only what was trainable at deepspeed.initialize, and would leave "
                f"{listing(thawed)} as it is: {_TRAINABLE_BEFORE}"
            )

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Add the class to the list that DeepSpeed compares an optimizer's exact type with."""
        supported = supported_optimizers()
        if optimizer_class not in supported:
            supported.append(optimizer_class)

    def before_group(self, optimizer: Any) -> None:
        """Raise LayoutError: DeepSpeed steps no group that is added after it has copied the others."""
        wrapper = _find_wrapper(optimizer)
        if wrapper is not None:
            raise LayoutError(
                f"{type(wrapper).__name__} holds this optimizer and steps only what it had at deepspeed.initialize, "
                f"not a group that is added later: {_TRAINABLE_BEFORE}"
            )

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout of tensors that a DeepSpeed wrapper made or cut, None for any others.

        Raises:
            LayoutError: If a wrapper that cannot be exact holds the optimizer.
        """
        if all(optimizer.was_given(tensor) for _, tensor in tensors):
            return unwrapped_layout(optimizer, tensors)
        wrapper = _find_wrapper(optimizer)
        if wrapper is None:
            return None
        refuse_lossy_checkpoints(wrapper, optimizer)
        kind, held = _describe(wrapper)
        described = [(group, tensor, held[id(tensor)]) for group, tensor in tensors if id(tensor) in held]
        if len(described) < len(tensors):
            return None
        # Of the whole model, so that no group is stepped before another is refused.
        parameters = [layer.parameter for flat in held.values() for layer in flat.layers]
        refuse_model_parallelism(kind, optimizer, getattr(wrapper, "mpu", None), parameters)
        if not isinstance(optimizer, ObservedOptimizer):  # nobody asked us how that one is to train
            self._left_out[optimizer] = _left_out(optimizer, parameters)
            self.before_step(optimizer)
        return _layout(kind, wrapper, optimizer, described)

    def stepped_tensors(self, optimizer: Any) -> list[tuple[int, torch.Tensor]] | None:
        """Return all flat tensors with their groups: `param_groups` lack them between steps (ZeRO-3) or in them."""
        wrapper = None if has_its_own_parameters(optimizer) else _find_wrapper(optimizer)
        if not isinstance(wrapper, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)):
            return None
        on_disk = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3)
        if on_disk and (wrapper.swap_optimizer or wrapper.params_in_nvme_and_cpu):
            raise LayoutError(
                "the optimizer's state lies on NVMe, where only DeepSpeed finds it: use engine.save_checkpoint and "
                "engine.load_checkpoint, or set offload_optimizer.device and offload_param.device to cpu"
            )
        return [(flat.group, flat.partition) for flat in flat_tensors(wrapper)]

    def copied_parameters(self, optimizer: Any) -> list[torch.Tensor] | None:
        """Return those of the optimizer's wrapper, None without one."""
        wrapper = _find_wrapper(optimizer)
        if wrapper is None:
            return None
        _, held = _describe(wrapper)
        return [layer.parameter for flat in held.values() for layer in flat.layers]

    def publish_weights(self, optimizer: Any) -> None:
        """Bring the model's parameters up to date after the optimizer's own weights were changed between steps."""
        wrapper = None if has_its_own_parameters(optimizer) else _find_wrapper(optimizer)
        if wrapper is not None:
            publish(wrapper)

    def repeated_step(self, optimizer: Any) -> RepeatedStep | None:
        """Return how the engine takes one step in two of its own, None without an engine.

        Raises:
            LayoutError: If it cannot, or gradients are clipped by what nobody knows.
        """
        engine = find_engine(optimizer)
        if engine is None:
            return None
        wrapper = _find_wrapper(optimizer)
        refuse_two_steps(engine, wrapper)
        factor = partial(_gradient_factor, None if wrapper is None else weakref.ref(wrapper))
        return RepeatedStep(partial(hold, weakref.ref(engine)), factor, while_alive(engine))

    def data_parallel(self, optimizer: Any) -> DataParallel | None:
        """Return the engine's data-parallel group and its count of skipped steps, None without an engine."""
        engine = find_engine(optimizer)
        if engine is None:
            return None
        skipped = attribute_of(engine, "skipped_steps")
        return DataParallel(data_parallel_group(engine), skipped, is_in_use=while_alive(engine))

    def gradient_flow(self, optimizer: Any) -> GradientFlow | None:
        """Return where gradients go between backward and step, None if they stay whole."""
        wrapper = _find_wrapper(optimizer)
        return None if wrapper is None else describe_gradient_flow(wrapper)


def _left_out(optimizer: Any, held: Sequence[torch.Tensor]) -> WeakIdKeyDictionary:
    """The model's parameters, with their names, that the optimizer was given and the wrapper does not hold."""
    engine = find_engine(optimizer)
    known = set(map(id, held))
    named = () if engine is None else engine.module.named_parameters()
    left_out = {p: name for name, p in named if optimizer.was_given(p) and id(p) not in known}
    return WeakIdKeyDictionary({p: name for p, name in left_out.items() if getattr(p, "ds_numel", p.numel())})


_wrappers: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def _find_wrapper(optimizer: Any) -> DeepSpeedOptimizer | None:
    """The DeepSpeed object that steps this optimizer.

    DeepSpeed leaves no reference to it on the optimizer, and on a model's parameters only for those that have elements
    on this rank. So it is searched for, once: an optimizer whose tensors it has replaced goes to no other.
    """
    inner = held_by_wrappers(optimizer)
    known = _wrappers[inner]() if inner in _wrappers else None
    if known is not None and known.optimizer is inner:
        return known
    found = next((one for one in living(DeepSpeedOptimizer) if getattr(one, "optimizer", None) is inner), None)
    if found is not None:
        _wrappers[inner] = weakref.ref(found)
    return found


def _describe(wrapper: DeepSpeedOptimizer) -> tuple[str, dict[int, _FlatTensor]]:
    """The wrapper's name for messages, and what each of its tensors (by id) holds."""
    if getattr(wrapper, "zenflow", None):
        raise LayoutError("zenflow steps with optimizers of its own: remove zero_optimization.zenflow")
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return "DeepSpeed ZeRO-3", _stage3(wrapper)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        stage = 1 if keeps_whole_gradients(wrapper) else 2
        return f"DeepSpeed ZeRO-{stage}", _concatenated(wrapper)
    if isinstance(wrapper, BF16_Optimizer):
        return "DeepSpeed BF16_Optimizer (ZeRO-1)", _concatenated(wrapper)
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        return "DeepSpeed FP16_UnfusedOptimizer", dict(_master_copies(wrapper))
    raise LayoutError(
        f"{type(wrapper).__name__} is not supported. Supported DeepSpeed wrappers: ZeRO stages 1, 2 and 3, "
        "BF16_Optimizer and FP16_UnfusedOptimizer"
    )


def _concatenated(wrapper: DeepSpeedOptimizer) -> dict[int, _FlatTensor]:
    """ZeRO-1/2: this rank's partition of each group's buffer."""
    held = {}
    for flat in flat_tensors(wrapper):
        rank = dist.get_rank(flat.process_group)
        runs = (slice_of_rank(slices_of_view(parameter, flat.partition), rank) for parameter in flat.parameters)
        layers = [_Held(p, tuple(p.shape), run) for p, run in zip(flat.parameters, runs, strict=True)]
        held[id(flat.partition)] = _FlatTensor(flat.process_group, layers)
    return held


def _stage3(wrapper: DeepSpeedZeroOptimizer_Stage3) -> dict[int, _FlatTensor]:
    """ZeRO-3: this rank's slices of each sub-group's parameters."""
    held = {}
    for flat in flat_tensors(wrapper):
        rank, ranks = dist.get_rank(flat.process_group), dist.get_world_size(flat.process_group)
        runs = (slice_of_rank(slices_of_layer(wrapper, parameter, ranks), rank) for parameter in flat.parameters)
        # Under zero.Init a parameter's own shape is (0,).
        layers = [_Held(p, tuple(p.ds_shape), run) for p, run in zip(flat.parameters, runs, strict=True)]
        held[id(flat.partition)] = _FlatTensor(flat.process_group, layers)
    return held


def _master_copies(wrapper: FP16_UnfusedOptimizer) -> Iterator[tuple[int, _FlatTensor]]:
    """Stage 0 with 16-bit parameters: an unsharded fp32 copy of each."""
    for master, parameter in master_copies(wrapper):
        whole = Slice(owner=0, offset=0, length=parameter.numel(), start=0)
        yield id(master), _FlatTensor(None, [_Held(parameter, tuple(parameter.shape), whole)])


def _layout(
    kind: str, wrapper: DeepSpeedOptimizer, optimizer: Any, described: Sequence[tuple[int, torch.Tensor, _FlatTensor]]
) -> Layout:
    name_of = layer_names(optimizer, getattr(wrapper, "param_names", None) or {})
    mpu = getattr(wrapper, "mpu", None)
    # Stage 3 keeps of the mpu its group alone.
    parallel = TensorParallel(mpu, getattr(wrapper, "model_parallel_group", None))
    builder = LayoutBuilder(kind)
    for carrier, (group, tensor, flat) in enumerate(described):
        builder.carry(group, tensor)
        over = [] if flat.process_group is None else [flat.process_group]
        for index, layer in enumerate(flat.layers):
            name, run = name_of(layer.parameter) or f"{carrier}.{index}", layer.run
            part = parallel.part(name, layer.parameter, layer.shape)
            refuse_partitions_over(part.process_group, flat.process_group, name)
            builder.add(name, layer.parameter, part, run.start, run.offset, run.length, over=over)
    parallel.agree(builder.layers, builder.cut)
    part_of_model = steps_with_a_part(mpu, (layer.parameter for _, _, flat in described for layer in flat.layers))
    sharded = not isinstance(wrapper, FP16_UnfusedOptimizer)
    return builder.layout(
        clips_with=CLIPPING if sharded or part_of_model else None,
        gradient_norm=_gradient_norm(kind, wrapper, part_of_model),
        clipped=partial(_has_clipped, weakref.ref(wrapper)),
    )


def _has_clipped(wrapper: weakref.ref[Any]) -> bool | torch.Tensor:
    """Whether the wrapper's own clipping makes this step's gradient smaller; it clips nothing without a norm."""
    norm, limit = _unclipped_norm(wrapper()), largest_norm(wrapper())
    return limit > 0 and norm is not None and norm + 1e-6 > limit


def _gradient_factor(reference: weakref.ref[Any] | None) -> float | torch.Tensor:
    """By what the wrapper multiplies the loss's gradient before the optimizer's step."""
    if reference is None:
        return 1.0
    wrapper = reference()
    norm, limit = _unclipped_norm(wrapper), largest_norm(wrapper)
    clips = 1.0 if norm is None or limit <= 0 else 1 / ((norm + 1e-6) / limit).clamp(min=1.0)
    if isinstance(wrapper, DeepSpeedZeroOptimizer) and loss_scale_just_grew(wrapper):
        return clips / wrapper.loss_scaler.scale_factor
    return clips


def _gradient_norm(kind: str, wrapper: DeepSpeedOptimizer, part_of_model: bool) -> Callable[[], torch.Tensor] | None:
    """How to learn the norm of the whole model's gradient; None where one `step()` call sees the whole model."""
    in_parts = isinstance(wrapper, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3))
    if getattr(wrapper, "has_moe_layers", False):
        problem = "does not compute it exactly for mixture-of-experts layers"
    elif in_parts and scales_by_torch(wrapper):
        problem = "leaves the loss scale to torch's GradScaler: use bf16, or the fp16 section of the DeepSpeed config"
    elif not in_parts and part_of_model:
        problem = PART_OF_MODEL
    elif in_parts:
        reference = weakref.ref(wrapper)
        return lambda: _norm_at_step(kind, reference())
    else:
        return None
    return partial(refuse_model_norm, f"{kind} {problem}")


def _norm_at_step(kind: str, wrapper: Any) -> torch.Tensor:
    """The norm as it reaches `step()`: what ZeRO reports, which is before clipping, clipped by ZeRO's formula."""
    norm = _unclipped_norm(wrapper)
    if norm is None:
        refuse_model_norm(f"{kind} does not compute it: set zero_optimization.compute_grad_norm to true")
    clip = largest_norm(wrapper)
    return norm / ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else norm


def _unclipped_norm(wrapper: Any) -> torch.Tensor | None:
    """What the wrapper reports, by the scale of the gradient that it clips; None if it was told not to compute it."""
    norm = global_norm(wrapper)
    if norm is not None and isinstance(wrapper, DeepSpeedZeroOptimizer) and loss_scale_just_grew(wrapper):
        # ZeRO-1/2 reports the norm by the loss scale of the backward pass, but divides the gradient by the new one.
        return norm / wrapper.loss_scaler.scale_factor
    if norm is not None and isinstance(wrapper, FP16_UnfusedOptimizer):
        return norm / INTERNALS.read(wrapper, "loss_scale")
    return norm


_backend = DeepSpeedBackend()
register_backend(_backend)
for _entry in OPTIMIZERS.values():
    _backend.admit(_entry.optimizer_class)
