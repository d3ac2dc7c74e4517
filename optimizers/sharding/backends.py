"""What a wrapper's integration tells the optimizers: the questions, who is asked them, and how integrations are found.

A backend is registered by the module that an entry point under `trustratio.backends` names; that module is imported
once the program has imported the wrapper, so `trustratio.optimizers` needs torch alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .data_parallel import DataParallel, ddp_process_group
from .gradient_flow import GradientFlow
from .import_watch import call_after_import
from .layout import Layout

__all__ = [
    "Backend",
    "admit",
    "explain",
    "find_data_parallel",
    "find_gradient_flow",
    "find_sources",
    "may_replace_parameters",
    "publish_weights",
    "register_backend",
    "stepped_tensors",
    "tensor_parallel_groups",
]

T = TypeVar("T")


class Backend:
    """What a sharding wrapper's integration provides (one file or folder in integrations/): answers to eight questions.

    Each answers "not mine" here. A subclass overrides those that its wrapper has something to say to, `explain` at
    least, and is made known by `register_backend`. An optimizer asks all backends until one answers.
    """

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Tell the wrapper that this optimizer class is safe with it. Called when an optimizer is constructed."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout of the tensors of one `step()` call, None if this wrapper did not make them.

        `LayoutBuilder` makes one. It is asked at the first step, and proven by one collective.

        Args:
            optimizer: The `LayerwiseOptimizer`; it knows which parameters its constructor was given, and their names.
            tensors: (index into `optimizer.param_groups`, local tensor) pairs.

        Raises:
            LayoutError: If the tensors are this wrapper's, but the optimizer's step could not be exact.
        """
        return None

    def tensor_parallel_group(self, parameter: torch.Tensor) -> dist.ProcessGroup | None:
        """Return the ranks over which a parameter like this one is cut if it is marked as a part, None if not known."""
        return None

    def data_parallel(self, optimizer: Any) -> DataParallel | None:
        """Return the ranks that average the optimizer's gradients, None if this wrapper does not average them."""
        return None

    def gradient_flow(self, optimizer: Any) -> GradientFlow | None:
        """Return where gradients go between backward and step, None if they stay whole."""
        return None

    def sources(self, optimizer: Any, module: torch.nn.Module) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Return the tensors that a module's forward, which has just run, used in place of the optimizer's parameters.

        Where any backend overrides this, it is asked after every forward until all parameters are known.

        Returns:
            (parameter, tensor whose gradient backward makes in its place) pairs.
        """
        return ()

    def stepped_tensors(self, optimizer: Any) -> list[tuple[int, torch.Tensor]] | None:
        """Return all tensors of a whole step with their groups where `param_groups` lack them between steps."""
        return None

    def publish_weights(self, optimizer: Any) -> None:
        """Bring the model's parameters up to date where this wrapper's optimizers step copies of them.

        Called after the optimizer's own weights were changed between steps, as by a checkpoint.
        """


GUARDS = ("accelerate", "transformers.trainer")
"""Wrappers that may train with another optimizer without ever asking ours: their backends say so. So they are needed
also where the wrapper is imported after the optimizer was constructed, while others are asked for at the first step."""


@dataclass
class _Known:
    """The backends of this process."""

    registered: list[Backend] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    watching: bool = False

    def watch_for_guards(self) -> None:
        """See to it that guards are loaded whenever their wrapper is imported."""
        if not self.watching:
            self.watching = True
            call_after_import(GUARDS, self._load_guard)

    def load(self) -> list[Backend]:
        """Import the backends of those wrappers that the program has imported, and return all known backends."""
        for entry_point in entry_points(group="trustratio.backends"):
            if entry_point.name in sys.modules:
                self._try(entry_point)
        return self.registered

    def _load_guard(self, wrapper: str) -> None:
        for entry_point in entry_points(group="trustratio.backends", name=wrapper):
            self._try(entry_point)

    def _try(self, entry_point: EntryPoint) -> None:
        if entry_point.name in self.tried:
            return
        self.tried.add(entry_point.name)
        try:
            entry_point.load()
        except ImportError as error:
            warnings.warn(f"trustratio cannot use {entry_point.name}: {error}", stacklevel=5)


_known = _Known()


def register_backend(backend: Backend) -> None:
    """Make a backend known: from now on optimizers ask it, after those that were registered before."""
    _known.registered.append(backend)


# The questions, put to all backends ---------------------------------------------------------------------------------


def admit(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Make the class acceptable to every wrapper that is imported, and have guards wait for those that are not."""
    _known.watch_for_guards()
    for backend in _known.load():
        backend.admit(optimizer_class)


def explain(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
    """Return the layout of one `step()` call's tensors from the wrapper that made them; None if none did."""
    return _first(backend.explain(optimizer, tensors) for backend in _known.load())


def tensor_parallel_groups(parameter: torch.Tensor) -> list[dist.ProcessGroup]:
    """The process groups over which a parameter like this one is cut, if it is: what backends know."""
    groups = [backend.tensor_parallel_group(parameter) for backend in _known.load()]
    return [group for group in groups if group is not None]


def find_data_parallel(optimizer: Any) -> DataParallel:
    """Find the wrapper that averages the gradients of the optimizer's parameters.

    Args:
        optimizer: A `LayerwiseOptimizer`; its model may have been wrapped since it was constructed.

    Returns:
        What the wrapper says; this process alone if there is none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return DataParallel()  # no wrapper is without process groups, and backends may look at every object
    answer = _first(backend.data_parallel(optimizer) for backend in _known.load())
    return DataParallel(ddp_process_group(optimizer)) if answer is None else answer


def find_gradient_flow(optimizer: Any) -> GradientFlow | None:
    """Ask for the wrapper that shards the optimizer's gradients; None if gradients stay whole."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return _first(backend.gradient_flow(optimizer) for backend in _known.load())


def may_replace_parameters() -> bool:
    """Whether any wrapper puts other tensors in the parameters' place in a forward, so that `find_sources` may find."""
    return any(type(backend).sources is not Backend.sources for backend in _known.load())


def find_sources(optimizer: Any, module: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ask for tensors that took the place of the optimizer's parameters in a module's forward, which has just run.

    Returns:
        (parameter, tensor whose gradient backward makes in its place) pairs.
    """
    # Not of backends that are yet to be loaded: this is asked after every forward.
    return [pair for backend in _known.registered for pair in backend.sources(optimizer, module)]


def stepped_tensors(optimizer: Any) -> list[tuple[int, torch.Tensor]]:
    """All (group index, local tensor) pairs of a whole step, from the wrapper if it hides them between steps."""
    answer = _first(backend.stepped_tensors(optimizer) for backend in _known.load())
    if answer is not None:
        return answer
    return [(index, tensor) for index, group in enumerate(optimizer.param_groups) for tensor in group["params"]]


def publish_weights(optimizer: Any) -> None:
    """Bring the model's parameters up to date where the optimizer's weights are not the model's own."""
    for backend in _known.load():
        backend.publish_weights(optimizer)


def _first(answers: Iterable[T | None]) -> T | None:
    """The first answer that is not "not mine"; backends after it are not asked."""
    return next((answer for answer in answers if answer is not None), None)
