"""Parameter groups that are stepped together, since they differ only in options that may be vectors.

Layer-wise decay of the learning rate makes a group of nearly every layer. Stepped one by one, each has its own table,
sums and sweeps; stepped together they cost what one group costs. Only neighbours are joined, so that the layers of
joined groups follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.hyperparameters import is_number
from ..kernels.device_copies import DeviceCopies
from ..kernels.interface import Recent
from ..options.common import COMMON_DEFAULTS, STORAGE_OPTIONS
from ..options.unknown import PACKAGE

__all__ = ["JointGroups", "first_of_joined"]

PARAMETER_KEYS = ("params", "param_names")
KEPT_BY_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
"""Numbers that torch's schedulers write beside the options, so that they differ where learning rates do."""
ELSEWHERE = {*PARAMETER_KEYS, *COMMON_DEFAULTS} - {"adapt", *STORAGE_OPTIONS}
"""Keys that count for single tensors, or not at all."""
PLAIN = {type(None), bool, int, float, str}
"""Types whose values are compared as they are."""
FROM_FORMULAS = (TypeError, ValueError, RuntimeError)
"""What torch and Python raise where a number was expected; what derives from them is about something else."""


def first_of_joined(algorithm: Algorithm) -> tuple[int, ...]:
    """For each parameter group, the first of those that it is stepped together with: itself, if it begins anew.

    Asked at every step, so it waits for nothing: tensors are the same if they are one object.
    """
    groups = algorithm.param_groups
    if not algorithm.vector_options:
        return tuple(range(len(groups)))
    read, firsts = _keys_read(algorithm), []
    vectors = frozenset(_vectors(algorithm, read))
    compared = None if read is None else read - ELSEWHERE - (vectors & {"adapt"})
    first, of_first = 0, None
    for index, group in enumerate(groups):
        options = _in_common(group, compared, vectors)
        if options != of_first:
            first, of_first = index, options
        firsts.append(first)
    return tuple(firsts)


def _keys_read(algorithm: Algorithm) -> set[str] | None:
    """Keys of a group that its step depends on; None where formulas may read any."""
    named = algorithm.step_options
    if named is None and not _is_of_the_package(algorithm):
        return None
    storage = STORAGE_OPTIONS if algorithm.keeps_own_state else ()
    return {*(algorithm.defaults if named is None else named), *algorithm.plan_options, *storage}


def _is_of_the_package(algorithm: Algorithm) -> bool:
    """Whether its formulas are known to read options alone."""
    return type(algorithm).__module__.startswith(PACKAGE)


def _vectors(algorithm: Algorithm, read: set[str] | None) -> tuple[str, ...]:
    """Keys in which joined groups may differ, as formulas are given vectors: a scheduler's numbers too, if read."""
    kept = [name for name in KEPT_BY_SCHEDULERS if (read is None or name in read) and name not in algorithm.defaults]
    return *algorithm.vector_options, *kept


def _in_common(group: Mapping[str, Any], compared: set[str] | None, vectors: frozenset[str]) -> dict[str, Any]:
    """What joined groups must have the same of, for comparison; of numbers that may be vectors, that they are there."""
    if compared is None:
        compared = group.keys() - ELSEWHERE - (vectors & {"adapt"})
    return {
        name: "a number" if name in vectors and _is_number(group[name]) else _comparable(group[name])
        for name in compared
        if name in group
    }


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else is_number(value)


def _comparable(value: Any) -> Any:
    """A value that can be compared without a look into tensors: what it is, or else which object."""
    if type(value) in PLAIN:  # nearly all, at every step
        return value
    if isinstance(value, Mapping):
        return tuple((key, _comparable(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return value if isinstance(value, bool | int | float | str) else id(value)


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
        options = dict(groups[0])
        for name in PARAMETER_KEYS:
            if name in options:
                options[name] = [of_parameter for group in groups for of_parameter in group[name]]
        for name in _vectors(algorithm, _keys_read(algorithm)):
            first, *others = values = [group.get(name) for group in groups]
            if not all(_is_the_same(first, other) for other in others):
                options[name] = adapt if name == "adapt" else self._vector(name, values)
        return options

    @contextmanager
    def explaining(self, algorithm: Algorithm, options: Mapping[str, Any]) -> Iterator[None]:
        """Say of an error in formulas of others that options are vectors there; what has a type of its own passes."""
        try:
            yield
        except FROM_FORMULAS as error:
            names = _vectors(algorithm, _keys_read(algorithm))
            vectors = [name for name in names if name != "adapt" and _is_vector(options.get(name))]
            if not vectors or type(error) not in FROM_FORMULAS or _is_of_the_package(algorithm):
                raise
            raise type(error)(_why_not_together(algorithm, list(self._layer_counts), vectors, error)) from error

    def _vector(self, name: str, values: Sequence[Any]) -> torch.Tensor:
        """Shape (layers,), fp64."""
        if any(
            isinstance(value, torch.Tensor) and (value.device == self._device or not value.is_cpu) for value in values
        ):
            return torch.stack([self._here(value) for value in values]).to(torch.float64)[self._group_of_layer]
        return self._on_device(name, [float(value) for value in values])

    def _here(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor) and not (value.is_cpu and self._device.type != "cpu"):
            return value.detach().reshape(()).to(self._device)
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


def _is_vector(option: Any) -> bool:
    return isinstance(option, torch.Tensor) and option.dim() == 1


def _why_not_together(algorithm: Algorithm, groups: list[int], vectors: list[str], error: Exception) -> str:
    return (
        f"{error}. The parameter groups {', '.join(map(str, groups))} are stepped together, as vector_options of "
        f"{type(algorithm).__name__} allows: where they differ ({', '.join(vectors)}), formulas get a vector over the "
        "layers. Spread it over elements with x.of(...), add multiples with x.plus(...), or leave the name out of "
        "vector_options, so that groups that differ in it are stepped one by one"
    )


def _why_not_captured(name: str) -> str:
    return (
        f"{name} of parameter groups has changed since the last step, and a CUDA graph cannot capture how the new "
        "numbers get to the device: take a step with them before the capture, or give each group its learning rate as "
        "a tensor on the device, which replays read"
    )


def _is_the_same(one: Any, other: Any) -> bool:
    """Whether two options are one object, or the same number of Python; what tensors hold is not looked at."""
    return one is other or not (isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor) or one != other)
