"""What cannot be exact with somebody's optimizer as the base, one sentence for each."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..formulas.layer_table import LayerTable
from ..options.common import COMMON_DEFAULTS, STORAGE_OPTIONS
from ..sharding.layout import Layout, LayoutError, listing
from ..sharding.local_tensors import local_part, placements_of
from .nature import Nature

__all__ = ["refuse_layout", "refuse_loss", "refuse_storage_options", "warn_of_lost_digits"]

MOST_ROUNDING = 0.01
"""The largest share of a direction that may be rounding without a word."""
WHOLE = "Keep layers whole (DistributedDataParallel)"


def refuse_layout(name: str, nature: Nature, layout: Layout, *, has_all_groups: bool) -> None:
    """Raise LayoutError if a base cannot step the layout's tensors exactly.

    Args:
        name: The base class's.
        nature: Its nature.
        layout: Of a `step()` call.
        has_all_groups: Whether the call steps all groups that the optimizer was given.
    """
    if nature.writes_rate:
        raise LayoutError(
            f'{name} writes the learning rate of its groups (group["lr"]) in its step, by which its step is divided: '
            "leave that to a scheduler, and keep a factor of its own under another name"
        )
    if nature.hidden is not None:
        raise LayoutError(
            f"steps of {name} depend on what is neither in its state nor in its groups, and would be lost in "
            "checkpoints and wrong where a step has several calls: keep that in self.state[p] or in the groups. "
            f"It may be {listing(list(nature.hidden)) or 'outside of the class'}"
        )
    if nature.follows_weights:
        raise LayoutError(
            f"{name} keeps copies of the weights in its state, as its own steps would make them, and a ratio makes "
            "other ones: take a base without, and average with torch.optim.swa_utils.AveragedModel"
        )
    if not nature.is_element_wise and _cuts(layout):
        raise LayoutError(
            f"{name} {_why(nature)}, so it is not exact under {layout.backend}, which cuts layers or steps several as "
            f"one. {WHOLE}, or take a base that treats every element by itself, such as AdamW, RMSprop, SGD or Lion"
        )
    if nature.goes_by_groups and not has_all_groups:
        raise LayoutError(
            f"{name} takes other steps if groups are stepped one at a time, as {layout.backend} does, since it counts "
            "them or goes by their number: have it read all from the group that it steps, or use one group"
        )
    if not nature.is_layer_wise and (layout.clips_with or layout.others is not None):
        raise LayoutError(
            f"a layer's step of {name} depends on other layers, of which {layout.backend} does not show it all: leave "
            "out what makes it so, such as clipping by the norm of the whole gradient, or use DistributedDataParallel"
        )
    if nature.puts_others_in_place and any(placements_of(tensor) is not None for tensor in layout.tensors):
        raise LayoutError(
            f"{name} puts other tensors in the weights' place (p.data = ...), and a DTensor, as {layout.backend} has, "
            "keeps its own: have it write into the weights (p.copy_(...), p.sub_(...))"
        )
    dtypes = {local_part(tensor).dtype for tensor in layout.tensors}
    if torch.float16 in dtypes or (torch.bfloat16 in dtypes and not nature.is_proportional):
        raise LayoutError(
            f"the step of {name} cannot be told from what it makes of fp16 or bf16 weights, which round it away: keep "
            "the parameters in fp32 and compute under torch.autocast, or let DeepSpeed or FSDP keep fp32 master weights"
        )


def refuse_loss(name: str) -> None:
    """Raise LayoutError where ranks would give their own losses to a base whose steps depend on it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise LayoutError(
            f"steps of {name} depend on the loss, and each rank's closure returns one of its own: take a base that "
            "does not read it, or train in one process"
        )


def warn_of_lost_digits(name: str, group: Mapping[str, Any], layers: LayerTable, *, takes_large_rate: bool) -> None:
    """Warn where w - w_after is so small beside w that it is rounding to a good part.

    Waits for the device.

    Args:
        name: The base class's.
        group: Whose step it is.
        layers: With the norms of "w" and of "d", which is w - w_after.
        takes_large_rate: Whether the base stepped at the large rate, not at the group's own.
    """
    # A number's rounding is spread over ±eps/2 of it, at most: its root mean square is about a fifth of eps.
    dtypes = [local_part(tensor).dtype for tensor in group["params"] if tensor.grad is not None]
    epsilon = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    rounding = 0.2 * epsilon * layers.norm("w") / layers.norm("d")
    shares = zip(layers.layers, rounding.tolist(), strict=True)
    lost = {layer.name: share for layer, share in shares if MOST_ROUNDING < share < float("inf")}
    if lost:
        advice = (
            "its direction is smaller than fp32 can tell beside the weights: scale the loss up, or the weights down"
            if takes_large_rate
            else "it steps at the learning rate itself: raise lr, or take a base whose direction does not depend on "
            "lr, such as AdamW, which is free of that"
        )
        warnings.warn(
            f"the step of {name} is so small beside the weights that up to {min(1.0, max(lost.values())):.0%} of its "
            f"direction is rounding, in {listing(list(lost))}: {advice}",
            stacklevel=8,
        )


def _cuts(layout: Layout) -> bool:
    """Whether any local tensor is not one whole parameter."""
    shapes = [tuple(local_part(tensor).shape) for tensor in layout.tensors]
    parameters = [(shapes[layer.tensor], layer.parameter) for layer in layout.layers]
    shared = any(dist.get_world_size(process_group) > 1 for process_group, _ in layout.reductions)
    return shared or any(p is None or tuple(p.shape) != shape for shape, p in parameters)


def _why(nature: Nature) -> str:
    if nature.is_random:
        return "draws random numbers"
    if nature.failure:
        return f"fails when it is tried on flat pieces of layers (in the trial: {nature.failure})"
    return "makes other steps of flat pieces of a layer, as TrustRatio would step them, than of the whole layer"


def refuse_storage_options(name: str, group: Mapping[str, Any], of_base: Collection[str]) -> None:
    """Raise ValueError if a group says how state or weights are kept, which is the base's business.

    Args:
        name: The base's.
        group: With all common options.
        of_base: The base's own options.
    """
    for option in STORAGE_OPTIONS:
        default = COMMON_DEFAULTS[option]  # type: ignore[literal-required]
        if option not in of_base and group[option] != default:
            raise ValueError(f"{option} must be {default!r}, got {group[option]!r}: {name} keeps state and weights")
