"""Megatron-core's DistributedOptimizer: which part of each layer this rank steps.

The wrapper lays the parameters of a model into buffers, cuts every bucket of a buffer into equal parts, one per
data-parallel rank, and steps the runs of elements that its part has of each parameter:

    parameter      stepped in its place                                  its gradient
    fp32           a view of the run, which is the model's own memory    the run of `main_grad`, after reduce-scatter
    fp16, bf16     an fp32 copy of the run, "main parameter"             the same, as fp32

A rank that has nothing of a parameter has no tensor for it. Its layer is reduced there all the same, so an empty tensor
stands in; the state of stand-ins is left out of `state_dict()`, which Megatron reads by position.

`megatron_optimizer` makes what `get_megatron_optimizer` makes, with an optimizer of this package inside. An optimizer
that is given to DistributedOptimizer by hand is recognised too. What Megatron does not document is read in `_runs`,
`_members` and `publish_weights` below: the same since megatron-core 0.16. Tested on CPU with gloo, where the tests
replace what Megatron wants of CUDA (`tests/distributed/megatron_on_cpu.py`). Not run on a GPU.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from trustratio.optimizers.sharding.data_parallel import while_alive
from trustratio.optimizers.sharding.internals import Internals
from trustratio.optimizers.sharding.layout import Layout, LayoutError
from trustratio.optimizers.sharding.layout_builder import LayoutBuilder
from trustratio.optimizers.sharding.living import living
from trustratio.optimizers.sharding.local_tensors import reduction_device
from trustratio.optimizers.sharding.observed import held_by_wrappers
from trustratio.optimizers.sharding.refusals import refuse_model_norm, refuse_rows, refuse_statistics
from trustratio.optimizers.sharding.repeated_step import RepeatedStep
from trustratio.optimizers.sharding.tensor_parallel import TensorParallel

__all__ = ["accept", "find_wrapper", "layout_of_shards", "megatron_optimizer", "publish_weights", "repeated_step"]

BACKEND = "Megatron DistributedOptimizer"
INTERNALS = Internals(BACKEND, "megatron-core", "0.16.0 to 0.16.1")
CLIPPING = "clip_grad in Megatron's OptimizerConfig"
MODULE = "megatron.core.optimizer.distrib_optimizer"
PREFIX = re.compile(r"^(module\.)+")
NOBODY = -1


# Making one ---------------------------------------------------------------------------------------------------------


def megatron_optimizer(make: Callable[..., Any], config: Any, model_chunks: Sequence[Any], **options: Any) -> Any:
    """Make what megatron-core's `get_megatron_optimizer` makes, with another optimizer inside.

    Args:
        make: An optimizer class of this package, or a function like it, e.g. `partial(LAMB, eps=1e-6)`. It is called
            with Megatron's parameter groups, `lr` and `weight_decay`.
        config: Megatron's OptimizerConfig. Its `optimizer` and the options of Adam and SGD are not used.
        model_chunks: The model, wrapped in Megatron's DistributedDataParallel.
        options: Further arguments of `get_megatron_optimizer`.

    Returns:
        Megatron's optimizer: a ChainedOptimizer of the wrappers.

    Raises:
        ValueError: If the config asks for an optimizer on the CPU or for one that keeps the main parameters itself.
    """
    from megatron.core import optimizer as core

    for option in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(config, option, False):
            raise ValueError(f"{option} must be False with an optimizer of trustratio, got True")

    def make_inner(groups: Any, lr: Any, weight_decay: float, momentum: float) -> Any:
        return make(groups, lr=lr, weight_decay=weight_decay)

    # get_megatron_optimizer takes no inner optimizer. SGD is the one that it makes of groups, rate and decay in the
    # same way whatever else is installed, and it looks the class up when it is called.
    with _replaced(core, "SGD", make_inner):
        return core.get_megatron_optimizer(replace(config, optimizer="sgd"), model_chunks, **options)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def accept(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Make the class pass the wrapper's check of the inner optimizer, for which any kind of Adam passes."""
    module: Any = sys.modules.get(MODULE)
    known = getattr(module, "Adam", None)
    if known is not None and not issubclass(optimizer_class, known):
        module.Adam = (*(known if isinstance(known, tuple) else (known,)), optimizer_class)


# Explaining one -----------------------------------------------------------------------------------------------------


def find_wrapper(optimizer: Any) -> Any:
    """The DistributedOptimizer that steps this optimizer, None if there is none.

    It leaves no reference on the optimizer. This runs once per layout.
    """
    wrapper_class = getattr(sys.modules.get(MODULE), "DistributedOptimizer", None)
    if wrapper_class is None:
        return None
    wrappers, inner = living(wrapper_class), held_by_wrappers(optimizer)
    return next((wrapper for wrapper in wrappers if getattr(wrapper, "optimizer", None) is inner), None)


@dataclass(frozen=True)
class _Run:
    """What this rank steps of one parameter: elements `start` to `end` of it, in parameter group `group`."""

    tensor: torch.Tensor
    group: int
    start: int
    end: int


def layout_of_shards(wrapper: Any, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]], mpu: Any) -> Layout:
    """The layout of the runs that a DistributedOptimizer has put in place of the optimizer's parameters.

    Args:
        wrapper: The DistributedOptimizer.
        optimizer: The optimizer in it.
        tensors: (group index, run) pairs.
        mpu: Knows the tensor-parallel ranks; None where the wrapper does.

    Raises:
        LayoutError: If the wrapper steps other tensors than these, or the optimizer cannot be exact in it.
    """
    _refuse_wrapper(wrapper)
    _refuse_optimizer(optimizer)
    runs = _runs(wrapper)
    _refuse_strangers(tensors, runs)
    _refuse_incomplete_state(optimizer, runs)
    parallel = TensorParallel(mpu, wrapper.model_chunks[0].tp_group)
    name_of = _names(wrapper, optimizer)
    stand_ins = _stand_ins_of(optimizer)
    builder = LayoutBuilder(BACKEND)
    for group, parameter in sorted(_members(wrapper, runs), key=lambda member: member[0]):
        name = name_of(parameter)
        part = parallel.part(name, parameter, tuple(parameter.shape))
        run = runs.get(id(parameter)) or _Run(stand_ins.get(parameter), group, 0, 0)
        builder.carry(group, run.tensor)
        length = run.end - run.start
        builder.add(name, parameter, part, offset=run.start, length=length, over=[wrapper.data_parallel_group])
    parallel.agree(builder.layers, builder.cut)
    norm = None if _sees_whole_model(wrapper) else partial(refuse_model_norm, NORM_OF_A_PART)
    return builder.layout(clips_with=CLIPPING, gradient_norm=norm)


def _runs(wrapper: Any) -> dict[int, _Run]:
    """What this rank steps, by the id of the parameter."""
    runs = {}
    for parameters_of, tensors_of in (
        ("model_fp32_groups", "shard_fp32_groups"),
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ):
        of_groups = zip(INTERNALS.read(wrapper, parameters_of), INTERNALS.read(wrapper, tensors_of), strict=True)
        for group, (parameters, tensors) in enumerate(of_groups):
            for parameter, tensor in zip(parameters, tensors, strict=True):
                inside = INTERNALS.read(wrapper, "_get_model_param_range_map")(parameter)["param"]
                runs[id(parameter)] = _Run(tensor, group, inside.start, inside.end)
    return runs


def _members(wrapper: Any, runs: dict[int, _Run]) -> list[tuple[int, torch.Tensor]]:
    """(group, parameter) of all parameters with elements, in the order of the buffers, which all ranks share.

    A rank knows the groups of the parameters that it steps; one all-reduce tells them to the others.
    """
    parameters = [p for buffer in INTERNALS.read(wrapper, "buffers") for p in buffer.params if p.numel()]
    known_here = [run.group if (run := runs.get(id(parameter))) else NOBODY for parameter in parameters]
    groups = torch.tensor(known_here, dtype=torch.int64, device="cpu")
    groups = groups.to(reduction_device(wrapper.data_parallel_group, parameters[0].device)) if parameters else groups
    dist.all_reduce(groups, dist.ReduceOp.MAX, group=wrapper.data_parallel_group)
    return list(zip(groups.tolist(), parameters, strict=True))


def _names(wrapper: Any, optimizer: Any) -> Callable[[torch.Tensor], str]:
    """A function from a parameter to its layer's name: the one it was given, else its name in the model."""
    several = len(wrapper.model_chunks) > 1
    in_model = {
        id(parameter): (f"{chunk}." if several else "") + PREFIX.sub("", name)
        for chunk, module in enumerate(wrapper.model_chunks)
        for name, parameter in module.named_parameters()
    }
    return lambda parameter: optimizer.parameter_name(parameter) or in_model[id(parameter)]


def _sees_whole_model(wrapper: Any) -> bool:
    """Whether one `step()` call has all layers: those of other pipeline stages and experts are others' matter."""
    chunks = wrapper.model_chunks
    has_experts = any(chunk.expert_parallel_buffers for chunk in chunks)
    return dist.get_world_size(chunks[0].pp_group) == 1 and not has_experts


# Stand-ins ----------------------------------------------------------------------------------------------------------


class _StandIns:
    """Empty tensors in place of the parameters of which this rank steps nothing; the same ones for every layout."""

    def __init__(self, optimizer: Any):
        self.tensors: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.hidden: dict[torch.Tensor, Any] = {}
        optimizer.register_state_dict_pre_hook(self._hide)
        optimizer.register_state_dict_post_hook(self._show)

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        if parameter not in self.tensors:
            self.tensors[parameter] = torch.empty(0, dtype=torch.float32, device=parameter.device)
        return self.tensors[parameter]

    def _hide(self, optimizer: Any) -> None:
        """Take away their state while torch makes the dict, which must know every tensor by its place in a group."""
        self.hidden = {t: optimizer.state.pop(t) for t in self.tensors.values() if t in optimizer.state}

    def _show(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        optimizer.state.update(self.hidden)
        self.hidden = {}


_stand_ins: weakref.WeakKeyDictionary[Any, _StandIns] = weakref.WeakKeyDictionary()


def _stand_ins_of(optimizer: Any) -> _StandIns:
    inner = held_by_wrappers(optimizer)
    if inner not in _stand_ins:
        _stand_ins[inner] = _StandIns(inner)
    return _stand_ins[inner]


# After the optimizer's weights were changed between steps -------------------------------------------------------------


def publish_weights(wrapper: Any) -> None:
    """Bring the model's parameters up to date, as the wrapper does at the end of its step.

    At once with `overlap_param_gather` too; forward gathers what a step changes afterwards all the same.
    """
    INTERNALS.read(wrapper, "_copy_main_params_to_model_params")()
    for chunk in wrapper.model_chunks:
        chunk.start_param_sync(force_sync=True)
        for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            buckets.param_gather_dispatched = False


def repeated_step(wrapper: Any) -> RepeatedStep:
    """How the wrapper takes one step in two of its own: it counts no steps, and its scheduler is the loop's to call."""
    if wrapper.config.clip_grad > 0:
        raise LayoutError(
            f"no sample of the curvature can be taken under {BACKEND} that clips gradients and does not tell by what: "
            f"set {CLIPPING} to 0, or interval=None"
        )
    return RepeatedStep(lambda: _nothing, lambda: 1.0, while_alive(wrapper))


def _nothing(is_repeated: bool) -> None:
    pass


# Refusals -----------------------------------------------------------------------------------------------------------

NORM_OF_A_PART = (
    "Megatron's DistributedOptimizer steps pipeline stages and experts in calls of their own: use it without them, or "
    "DeepSpeed ZeRO-1"
)


def _refuse_wrapper(wrapper: Any) -> None:
    if wrapper.ddp_config.use_megatron_fsdp:
        raise LayoutError("Megatron-FSDP is not supported: set use_megatron_fsdp=False, or use FSDP2 (fully_shard)")
    if wrapper.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        raise LayoutError(
            "an optimizer that keeps the main parameters itself is not supported: set "
            "use_precision_aware_optimizer=False in Megatron's OptimizerConfig"
        )


def _refuse_optimizer(optimizer: Any) -> None:
    """Raise LayoutError if the optimizer needs more of a layer than sums over its elements."""
    refuse_statistics(optimizer, f"{BACKEND} adds them up in a buffer", "DDP, FSDP2 or DeepSpeed ZeRO")
    refuse_rows(optimizer, f"which is not supported under {BACKEND}")


def _refuse_strangers(tensors: Sequence[tuple[int, torch.Tensor]], runs: dict[int, _Run]) -> None:
    known = {(id(run.tensor), run.group) for run in runs.values()}
    strangers = [f"{tuple(tensor.shape)}" for group, tensor in tensors if (id(tensor), group) not in known]
    if strangers:
        raise LayoutError(
            f"the optimizer is stepped with tensors of shapes {', '.join(strangers[:5])} that Megatron's "
            "DistributedOptimizer did not put into these groups: do not change param_groups after wrapping it"
        )


def _refuse_incomplete_state(optimizer: Any, runs: dict[int, _Run]) -> None:
    """Raise LayoutError if Megatron's load_state_dict has made the state that Adam needs, in uninitialised memory."""
    wanted = {*optimizer.layer_state, *optimizer.element_state}
    for run in runs.values():
        state = optimizer.state.get(run.tensor, {})
        lacking = wanted - {*state, *state.get("layers", {})}
        if state and lacking:
            raise LayoutError(
                f"the state of {type(optimizer).__name__} lacks {', '.join(sorted(lacking))}: the checkpoints of "
                "Megatron's DistributedOptimizer hold what Adam needs. Use save_optimizer_state and "
                "load_optimizer_state of trustratio.integrations.checkpoints.consolidated instead"
            )
