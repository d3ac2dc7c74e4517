"""Which processes feed their own samples into one gradient, for what is counted or measured over samples.

A layout tells over which processes a layer is cut. That need not be the processes that see different samples: under
DDP nothing is cut, and yet every rank has a micro-batch of its own. Which wrapper it is, backends know; DDP, which
needs no backend, is found here. Who averages gradients without any wrapper says so: `optimizer.data_parallel_group`.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .layout import LayoutError, listing
from .living import living
from .local_tensors import add_over

__all__ = [
    "DataParallel",
    "as_process_group",
    "attribute_of",
    "ddp_ranks",
    "processes",
    "reconcile",
    "unknown_ranks",
    "while_alive",
]


def _none_skipped() -> int:
    return 0


def _always() -> bool:
    return True


def _never() -> bool:
    return False


@dataclass(frozen=True)
class DataParallel:
    """The data-parallel side of a training run.

    Attributes:
        process_group: The ranks whose gradients are averaged; None for one process.
        skipped_steps: Counts the updates that the wrapper has dropped so far, e.g. after an fp16 overflow.
        replicas: Where replicas are sharded (HSDP): the ranks that hold the same shards. `process_group` is then the
            replica.
        is_in_use: Whether the wrapper that this was read from still exists.
        joins: Whether a rank that has no more samples leaves the others' collectives to the wrapper (DDP's Join).
    """

    process_group: dist.ProcessGroup | None = None
    skipped_steps: Callable[[], int] = _none_skipped
    replicas: dist.ProcessGroup | None = None
    is_in_use: Callable[[], bool] = _always
    joins: Callable[[], bool] = _never

    @property
    def ranks(self) -> int:
        """How many ranks there are, of all replicas together."""
        return prod(map(dist.get_world_size, self._groups()))

    def is_valid(self) -> bool:
        """Whether the wrapper and its process groups still exist."""
        return self.is_in_use() and all(_ranks_of(group) is not None for group in self._groups())

    def _groups(self) -> list[dist.ProcessGroup]:
        return [group for group in (self.process_group, self.replicas) if group is not None]

    def add(self, counts: torch.Tensor) -> None:
        """Add `counts` over the ranks, in place: one all-reduce if there are several, two with replicas."""
        for group in self._groups():
            add_over(group, counts)


def processes() -> int:
    """How many processes there are that may train one model together; Horovod's too, which torch does not know."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    horovod: Any = sys.modules.get("horovod.torch")
    return int(horovod.size()) if horovod is not None and horovod.is_initialized() else 1


# DDP ----------------------------------------------------------------------------------------------------------------


def ddp_ranks(optimizer: Any, *, ignored_too: bool = False) -> DataParallel | None:
    """The ranks of the DDP modules that hold the parameters; None unless they hold all that are trained.

    DDP leaves no reference to itself on them.

    Args:
        optimizer: The optimizer.
        ignored_too: Whether a module that does not average the gradients of a parameter holds it, too.

    Raises:
        LayoutError: If there are DDP modules of different ranks.
    """
    found = _ddp_of_parameters(optimizer, ignored_too)
    if len(found) > 1:
        gc.collect()  # one of them may be garbage
        found = _ddp_of_parameters(optimizer, ignored_too)
    told = optimizer.data_parallel_group
    if len(found) > 1 and (told is None or _ranks_of(told) not in found):
        raise LayoutError(
            "DistributedDataParallel modules of different ranks hold the optimizer's parameters: "
            f"{listing([str(list(ranks)) for ranks in sorted(found)])}. Delete those that are not in use, give each an "
            "optimizer of its own, or set optimizer.data_parallel_group to the group that averages the gradients"
        )
    for ranks, modules in found.items():
        if told is None or len(found) == 1 or ranks == _ranks_of(told):
            return DataParallel(
                modules[0].process_group, is_in_use=while_alive(*modules), joins=partial(_any_joins, WeakSet(modules))
            )
    return None


def _any_joins(modules: Iterable[DistributedDataParallel]) -> bool:
    """Whether any of the modules is in a `Join` context that answers for ranks which have run out of samples."""
    configs = (vars(module).get("_join_config") for module in modules)
    return any(config.enable and not config.throw_on_early_termination for config in configs if config is not None)


def _ddp_of_parameters(optimizer: Any, ignored_too: bool) -> dict[tuple[int, ...], list[DistributedDataParallel]]:
    """The living DDP modules that together average all trained parameters, by their ranks; none if any is left out.

    On a rank that trains nothing, where others do, those count that the optimizer was given.
    """
    modules = list(living(DistributedDataParallel))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        parameters = [p for module in modules for p in module.parameters() if optimizer.was_given(p)]
    wanted = set(map(id, parameters))
    found: dict[tuple[int, ...], list[DistributedDataParallel]] = {}
    for module in modules:
        ranks = _ranks_of(vars(module).get("process_group"))
        averaged = wanted & _held_by(module, ignored_too) if ranks is not None else set()
        if ranks is not None and averaged:
            found.setdefault(ranks, []).append(module)
    covered = {key for modules in found.values() for module in modules for key in _held_by(module, ignored_too)}
    return found if wanted <= covered else {}


def _held_by(module: DistributedDataParallel, ignored_too: bool = False) -> set[int]:
    """The ids of the parameters that a DDP module averages the gradients of, or of all."""
    ignored = () if ignored_too else vars(module).get("parameters_to_ignore", ())
    inner = vars(module).get("_modules", {}).get("module")  # None under construction
    return {id(p) for name, p in inner.named_parameters() if name not in ignored} if inner is not None else set()


# What the user says -------------------------------------------------------------------------------------------------


def as_process_group(value: Any) -> dist.ProcessGroup | None:
    """The process group of what `optimizer.data_parallel_group` is set to, which may be a mesh of one dimension.

    Raises:
        TypeError: If it is neither, nor None.
        ValueError: If this rank is not in it, it no longer exists, or a mesh has several dimensions.
    """
    if value is None:
        return None
    group = value
    if hasattr(value, "get_group") and hasattr(value, "ndim"):  # a DeviceMesh, whose import takes long
        if value.ndim != 1:
            raise ValueError(
                f"data_parallel_group must be a mesh of one dimension, got {value.ndim}: name it, as in mesh['dp']"
            )
        group = value.get_group()
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns to ranks outside
            raise ValueError("data_parallel_group must be a process group that this rank is in, got one that it is not")
        raise TypeError(
            "data_parallel_group must be a torch.distributed.ProcessGroup, a DeviceMesh of one dimension or None, got "
            f"{type(value).__name__}"
        )
    ranks = _ranks_of(group)
    if ranks is None or dist.get_rank() not in ranks:
        problem = "one that was destroyed" if ranks is None else f"one of ranks {list(ranks)} on rank {dist.get_rank()}"
        raise ValueError(f"data_parallel_group must be a process group that this rank is in, got {problem}")
    return group


def reconcile(found: DataParallel | None, told: dist.ProcessGroup | None) -> DataParallel | None:
    """What is known: the wrapper's answer, or the user's where there is no wrapper.

    Raises:
        LayoutError: If the two are different ranks, or what the user named was destroyed.
    """
    if told is None:
        return found
    ranks = _ranks_of(told)
    if ranks is None:
        raise LayoutError(
            "the process group that optimizer.data_parallel_group was set to has been destroyed: set it to the one "
            "that averages the gradients now, or to None if a wrapper does"
        )
    if found is None:
        return DataParallel(told)
    of_groups = [set(_ranks_of(group) or ()) for group in found._groups()]
    if found.ranks != len(ranks) or not all(group <= set(ranks) for group in of_groups):
        known = " and ".join(str(sorted(group)) for group in of_groups) or "this process alone"
        raise LayoutError(
            f"optimizer.data_parallel_group says that ranks {list(ranks)} average the gradients, but the wrapper of "
            f"the optimizer's parameters averages them over {known}. Leave data_parallel_group at None under a "
            "wrapper, or take the wrapper away"
        )
    return found


def unknown_ranks(optimizer: Any) -> LayoutError:
    """The error for whoever must add over samples, where several ranks exist and nobody knows who averages."""
    outside = _outside_ddp(optimizer)
    left_out = (
        f" DistributedDataParallel holds the others, but not {listing(outside)}: if the model has them no more, take "
        "them out of param_groups or freeze them with requires_grad_(False)."
    )
    return LayoutError(
        f"{type(optimizer).__name__} adds up what each data-parallel rank has seen, but nobody says which of the "
        f"{processes()} ranks average gradients: no wrapper (DistributedDataParallel, fully_shard, a DeepSpeed engine) "
        f"was found to hold all parameters that the optimizer trains.{left_out if outside else ''} If gradients are "
        "averaged by hand, set optimizer.data_parallel_group to the torch process group that averages them, e.g. "
        "dist.group.WORLD; if every rank trains a model of its own, to "
        "dist.new_group([rank], use_local_synchronization=True)"
    )


def _outside_ddp(optimizer: Any) -> list[str]:
    """The trained parameters that no DDP module averages, where some have one."""
    averaged = {key for module in living(DistributedDataParallel) for key in _held_by(module)}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    outside = [p for p in trained if id(p) not in averaged]
    named = [optimizer.parameter_name(p) or f"one of shape {tuple(p.shape)}" for p in outside]
    return named if len(outside) < len(trained) else []


def while_alive(*owners: Any) -> Callable[[], bool]:
    """Return a function that tells whether all of them still exist, without keeping them alive."""
    references = [weakref.ref(owner) for owner in owners]
    return lambda: all(reference() is not None for reference in references)


def attribute_of(owner: Any, name: str) -> Callable[[], int]:
    """Return a function that reads an integer attribute, without keeping its owner alive; 0 once it is gone."""
    reference = weakref.ref(owner)
    return lambda: int(getattr(reference(), name, 0))


def _ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...] | None:
    """The ranks of a process group, ascending; None if there is none, or it was destroyed."""
    try:
        return None if group is None else tuple(sorted(dist.get_process_group_ranks(group)))
    except (KeyError, ValueError, RuntimeError):
        return None
