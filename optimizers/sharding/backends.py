"""What a wrapper's integration tells the optimizers, and how the integrations are found.

A backend is registered by the module that an entry point under `trustratio.backends` names; that module is imported
once the program has imported the wrapper, so `trustratio.optimizers` needs torch alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .data_parallel import DataParallel, _ddp_process_group
from .gradient_flow import GradientFlow
from .import_watch import call_after_import
from .layout import Layout

__all__ = ["Backend", "find_data_parallel", "find_gradient_flow", "find_sources", "register_backend"]


class Backend(Protocol):
    """What a sharding wrapper's integration provides (one file in integrations/)."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Tell the wrapper that this optimizer class is safe with it. Called when an optimizer is constructed."""

    def explain(self, optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
        """Return the layout of the (group index, local tensor) pairs, or None if this wrapper did not make them."""


GUARDS = ("accelerate", "transformers.trainer")
"""Wrappers that may train with another optimizer without ever asking ours: their backends say so. So they are needed
also where the wrapper is imported after the optimizer was constructed, while others are asked for at the first step."""


@dataclass
class _Backends:
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


_backends = _Backends()


def register_backend(backend: Backend) -> None:
    """Add a backend; `step()` asks it about tensors that are not the optimizer's own parameters."""
    _backends.registered.append(backend)


def admit(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Make the class acceptable to every wrapper that is imported, and have guards wait for those that are not."""
    _backends.watch_for_guards()
    for backend in _backends.load():
        backend.admit(optimizer_class)


def tensor_parallel_groups(parameter: torch.Tensor) -> list[dist.ProcessGroup]:
    """The process groups over which a parameter like this one is cut, if it is: what backends know."""
    found = []
    for backend in _backends.load():
        describe = getattr(backend, "tensor_parallel_group", None)
        ranks = describe(parameter) if describe is not None else None
        if ranks is not None:
            found.append(ranks)
    return found


def find_data_parallel(optimizer: Any) -> DataParallel:
    """Find the wrapper that averages the gradients of the optimizer's parameters.

    Args:
        optimizer: A `LayerwiseOptimizer`; its model may have been wrapped since it was constructed.

    Returns:
        What the wrapper says; this process alone if there is none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return DataParallel()  # no wrapper is without process groups, and backends may look at every object
    for backend in _backends.load():
        describe = getattr(backend, "data_parallel", None)
        found = describe(optimizer) if describe is not None else None
        if found is not None:
            return found
    return DataParallel(_ddp_process_group(optimizer))


def find_gradient_flow(optimizer: Any) -> GradientFlow | None:
    """Ask the backends for the wrapper that shards the optimizer's gradients; None if gradients stay whole."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    for backend in _backends.load():
        describe = getattr(backend, "gradient_flow", None)
        found = describe(optimizer) if describe is not None else None
        if found is not None:
            return found
    return None


def find_sources(optimizer: Any, module: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ask the backends for tensors that take the place of the optimizer's parameters in a module's forward.

    Returns:
        (parameter, tensor whose gradient backward makes in its place) pairs.
    """
    backends = [backend for backend in _backends.registered if hasattr(backend, "sources")]
    return [pair for backend in backends for pair in backend.sources(optimizer, module)]
