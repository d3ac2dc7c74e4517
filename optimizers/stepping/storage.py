"""In how many bits the state and the weights of a call are kept, as the options in `STORAGE_OPTIONS` say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.chunk_view import COMPENSATION
from ..formulas.rounding import LayerKeys, Rounding
from ..sharding.layout import Layer, Layout, LayoutError
from ..sharding.names import observed
from .foreign_state import without_wrappers
from .state import element_dtype, keeps_compensation

__all__ = ["Storage", "forget_compensation", "refuse_storage"]

SEGMENT = re.compile(r"\[[0-9]+\]$")


class Storage:
    """What a plan's local tensors keep with how many bits, and which groups round by chance or with a rest.

    Attributes:
        state_dtypes: Of each local tensor's element-wise state.
        has_compensation: Whether each local tensor has `COMPENSATION`.
        rounds: Whether each local tensor is in a group that has a `Rounding`.
    """

    def __init__(self, algorithm: Algorithm, layout: Layout):
        self._layout = layout
        groups = [algorithm.param_groups[index] for index in layout.groups]
        pairs = [*zip(layout.tensors, groups, strict=True)]
        if not algorithm.keeps_own_state:
            pairs = [(tensor, {}) for tensor in layout.tensors]
        self.state_dtypes = [element_dtype(tensor, "", group) for tensor, group in pairs]
        self.has_compensation = [keeps_compensation(tensor, group) for tensor, group in pairs]
        in_tensors = [_rounds(tensor, group) for tensor, group in pairs]
        self._keys = _keys(algorithm, layout, {i for i, here in zip(layout.groups, in_tensors, strict=True) if here})
        self.rounds = [index in self._keys for index in layout.groups]

    def names(self, element_state: tuple[str, ...]) -> tuple[str, ...]:
        """Of all that is kept per element."""
        return (*element_state, COMPENSATION) if any(self.has_compensation) else element_state

    def dtype(self, index: int, name: str) -> torch.dtype | None:
        """Of a local tensor's element-wise state, None where it has none of that name."""
        if name != COMPENSATION:
            return self.state_dtypes[index]
        return self._layout.tensors[index].dtype if self.has_compensation[index] else None

    def rounding(self, index: int, group: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Rounding | None:
        """How a group's numbers of 16 bits are rounded in a step; None where nothing is, or to nearest.

        Args:
            index: The group's.
            group: It.
            state: The numbers of its layers, before the step.
        """
        keys = self._keys.get(index)
        if keys is None:
            return None
        # The step that these layers are about to take, if they have a gradient.
        now = keys.at(state["step"] + 1)
        return Rounding(now, keys.gammas, group["state_dtype"] == "bfloat16", group["master"])


def _keys(algorithm: Algorithm, layout: Layout, groups: Collection[int]) -> dict[int, LayerKeys]:
    """Those of the layers of each group that rounds."""
    if not groups:
        return {}
    names = list(_names(algorithm, layout.layers))
    of_groups: dict[int, list[str]] = {index: [] for index in groups}
    for name, layer in zip(names, layout.layers, strict=True):
        of_groups.get(layout.groups[layer.tensor], []).append(name)
    seeds = {index: algorithm.param_groups[index]["rounding_seed"] for index in groups}
    return {index: LayerKeys(seeds[index], of_group, layout.device) for index, of_group in of_groups.items()}


def _names(algorithm: Any, layers: Sequence[Layer]) -> Iterator[str]:
    """Names of layers that are the same under every wrapper: those that were given, or else the model's.

    What wrappers put before names is taken off as of a whole model's, so that a module that is called "module" stays.
    """
    known = observed(algorithm, None)
    for layer in layers:
        name = None if layer.parameter is None else known.parameter_name(layer.parameter)
        segment = SEGMENT.search(layer.name)
        yield without_wrappers(layer.name) if name is None else name + (segment.group() if segment else "")


def _rounds(tensor: torch.Tensor, group: Mapping[str, Any]) -> bool:
    is_bf16 = tensor.dtype == torch.bfloat16
    return group.get("state_dtype") == "bfloat16" or (group.get("master") is not None and is_bf16)


def refuse_storage(algorithm: Algorithm, layout: Layout) -> None:
    """Raise if what the groups ask for cannot be kept so.

    Raises:
        ValueError: If state of fp64 parameters was given a dtype, or there is a master of fp16 weights.
        LayoutError: If chance would depend on the sharding.
    """
    if not algorithm.keeps_own_state:
        return
    names: dict[int, str] = {}
    for layer in layout.layers:
        names.setdefault(layer.tensor, layer.name)
    for index, name in names.items():
        tensor, group = layout.tensors[index], algorithm.param_groups[layout.groups[index]]
        if tensor.dtype == torch.float64 and group["state_dtype"] is not None:
            raise ValueError(
                f"state_dtype must be None for fp64 parameters, whose state is fp64 too; got {group['state_dtype']!r} "
                f"for {name}"
            )
        if tensor.dtype == torch.float16 and group["master"] is not None:
            raise ValueError(
                f"master must be None for fp16 weights, got {group['master']!r} for {name}: keep the parameters in "
                "bf16, or in fp32 under torch.autocast"
            )
        if _rounds(tensor, group) and not layout.placed:
            raise LayoutError(
                f"{layout.backend} does not tell at which positions of a layer the elements of a rank are, and what is "
                "rounded by chance would depend on the sharding: use state_dtype=None and master=None"
            )


def forget_compensation(algorithm: Algorithm, layout: Layout) -> None:
    """Drop what weights lack of sums where none is kept any more; a later "kahan" would add it to other weights."""
    if algorithm.keeps_own_state:
        for index, tensor in zip(layout.groups, layout.tensors, strict=True):
            if not keeps_compensation(tensor, algorithm.param_groups[index]):
                algorithm.state.get(tensor, {}).pop(COMPENSATION, None)
