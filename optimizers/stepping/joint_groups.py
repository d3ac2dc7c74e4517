"""Parameter groups that are stepped together, since they differ only in options that may be vectors.

Layer-wise decay of the learning rate makes a group of nearly every layer. Stepped one by one, each has its own table,
sums and sweeps; stepped together they cost what one group costs. Only neighbours are joined, so that the layers of
joined groups follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..kernels.device_copies import DeviceCopies
from ..kernels.interface import Recent
from ..options.common import COMMON_DEFAULTS, STORAGE_OPTIONS

__all__ = ["JointGroups", "first_of_joined"]


def first_of_joined(algorithm: Algorithm) -> tuple[int, ...]:
    """For each parameter group, the first of those that it is stepped together with: itself, if it begins anew.

    Asked at every step, so it waits for nothing: tensors are the same if they are one object.
    """
    groups = algorithm.param_groups
    if not algorithm.vector_options:
        return tuple(range(len(groups)))
    names, firsts = _options_in_common(algorithm), []
    first, of_first = 0, None
    for index, group in enumerate(groups):
        options = [_comparable(group.get(name)) for name in names]
        if options != of_first:
            first, of_first = index, options
        firsts.append(first)
    return tuple(firsts)


def _options_in_common(algorithm: Algorithm) -> list[str]:
    """Those that joined groups must have the same of."""
    read = algorithm.defaults if algorithm.step_options is None else algorithm.step_options
    elsewhere = COMMON_DEFAULTS.keys() - {"adapt", *STORAGE_OPTIONS}  # counts for single tensors, or not at all
    return [name for name in read if name not in elsewhere and name not in algorithm.vector_options]


def _comparable(option: Any) -> Any:
    return id(option) if isinstance(option, torch.Tensor) else option


class JointGroups:
    """Several parameter groups of one plan that are stepped as one.

    Args:
        layer_counts: How many layers each of them has, by its index into `param_groups`; in their order.
        device: Where the numbers of layers are.
    """

    def __init__(self, layer_counts: Mapping[int, int], device: torch.device):
        self._layer_counts = dict(layer_counts)
        self._device = device
        self._copies = DeviceCopies(device)
        self._sent: dict[str, Recent] = {}
        of_layers = [place for place, count in enumerate(layer_counts.values()) for _ in range(count)]
        self._group_of_layer = torch.tensor(of_layers, dtype=torch.int64, device="cpu").to(device)

    def options(self, algorithm: Algorithm, adapt: torch.Tensor) -> dict[str, Any]:
        """The options of all, as an algorithm is given them: vectors where they differ.

        Args:
            algorithm: With the groups.
            adapt: What stands for the option of that name, where it differs.

        Raises:
            RuntimeError: If a CUDA graph is being captured, and numbers have changed since the last step.
        """
        groups = [algorithm.param_groups[index] for index in self._layer_counts]
        options = {**groups[0], "params": [parameter for group in groups for parameter in group["params"]]}
        for name in algorithm.vector_options:
            first, *others = values = [group[name] for group in groups]
            if not all(_is_the_same(first, other) for other in others):
                options[name] = adapt if name == "adapt" else self._vector(name, values)
        return options

    def _vector(self, name: str, values: Sequence[Any]) -> torch.Tensor:
        """Shape (layers,), fp64."""
        if any(
            isinstance(value, torch.Tensor) and (value.device == self._device or not value.is_cpu) for value in values
        ):
            return torch.stack([self._here(value) for value in values])[self._group_of_layer]
        return self._on_device(name, [float(value) for value in values])

    def _here(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor) and not (value.is_cpu and self._device.type != "cpu"):
            return value.detach().reshape(()).to(self._device).to(torch.float64)
        # A number is written by the device itself: copied there, also out of a tensor, it would be waited for.
        return torch.full((), float(value), dtype=torch.float64, device=self._device)

    def _on_device(self, name: str, numbers: list[float]) -> torch.Tensor:
        """The vector of the groups' numbers, sent to the device if they differ from the last step's."""
        vector: torch.Tensor = self._copies.find(
            self._sent.setdefault(name, Recent(1)),
            numbers,
            lambda: self._copies.send(self._of_layers(numbers)),
            lambda: _why_not_captured(name),
        )
        self._copies.used(vector)
        return vector

    def _of_layers(self, numbers: list[float]) -> torch.Tensor:
        """On the host."""
        of_layers = [n for n, count in zip(numbers, self._layer_counts.values(), strict=True) for _ in range(count)]
        return torch.tensor(of_layers, dtype=torch.float64, device="cpu")


def _why_not_captured(name: str) -> str:
    return (
        f"{name} of parameter groups has changed since the last step, and a CUDA graph cannot capture how the new "
        "numbers get to the device: take a step with them before the capture, or give each group its learning rate as "
        "a tensor on the device, which replays read"
    )


def _is_the_same(one: Any, other: Any) -> bool:
    """Whether two options are one object, or the same number of Python; what tensors hold is not looked at."""
    return one is other or not (isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor) or one != other)
