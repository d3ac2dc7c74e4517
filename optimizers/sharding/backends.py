"""What a wrapper's integration tells the optimizers: the questions, who is asked them, and how integrations are found.

A backend is registered by a module of `integrations/`, which is imported once the program has imported the wrapper, so
`trustratio.optimizers` needs torch alone. That is looked up whenever an optimizer of ours is constructed or asks a
question, and before every step of every optimizer of the process: one of another package may step in ours' place.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .data_parallel import DataParallel, ddp_ranks, processes, reconcile
from .gradient_flow import GradientFlow
from .layout import Layout
from .local_tensors import may_be_trained
from .observed import ObservedOptimizer
from .repeated_step import RepeatedStep

__all__ = [
    "Backend",
    "admit",
    "copied_parameters",
    "explain",
    "find_data_parallel",
    "find_gradient_flow",
    "find_repeated_step",
    "find_sources",
    "given_to",
    "may_replace_parameters",
    "may_shard_gradients",
    "publish_weights",
    "register_backend",
    "stepped_tensors",
    "tensor_parallel_groups",
    "watch_steps",
    "whole_step",
]

T = TypeVar("T")


class Backend:
    """What a sharding wrapper's integration provides (a file or folder in integrations/): answers to twelve questions.

    Each answers "not mine" here. A subclass overrides those that its wrapper has something to say to, `explain` at
    least, and is made known by `register_backend`. An optimizer asks all backends until one answers.
    """

    replacing_modules: tuple[type, ...] = (torch.nn.Module,)
    """Those in whose forward `sources` may find something: they end a graph of torch.compile, others do not."""

    def admit(self, optimizer_class: type[torch.optim.Optimizer]) -> None:
        """Tell the wrapper that this optimizer class is safe with it. Called when an optimizer is constructed."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise if this optimizer has taken the place of one of ours, and would train without a word.

        Called before every step of every optimizer of the process, ours and others', so it must cost next to nothing.
        """

    def before_group(self, optimizer: Any) -> None:
        """Raise if this wrapper holds the optimizer and would not step a group that is added now.

        Asked where the optimizer has groups, and other parameters in them than it was given.
        """

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

        Where any backend overrides this, it is asked after every forward until all parameters are known; of what
        torch.compile traces, after those of `replacing_modules` alone.

        Returns:
            (parameter, tensor whose gradient backward makes in its place) pairs.
        """
        return ()

    def stepped_tensors(self, optimizer: Any) -> list[tuple[int, torch.Tensor]] | None:
        """Return all tensors of a whole step with their groups where `param_groups` lack some, between or in steps."""
        return None

    def copied_parameters(self, optimizer: Any) -> list[torch.Tensor] | None:
        """Return the model's parameters of which this wrapper has the optimizer step copies, None if of none.

        Asked on one rank and not on another, so it must communicate with nobody.
        """
        return None

    def publish_weights(self, optimizer: Any) -> None:
        """Bring the model's parameters up to date where this wrapper's optimizers step copies of them.

        Called on all ranks after the optimizer's own weights were changed between steps, as by a checkpoint or by
        `MovedWeights`, so it may communicate. It should cost no search after the first time.
        """

    def repeated_step(self, optimizer: Any) -> RepeatedStep | None:
        """Return how this wrapper takes one step in two of its own, None if gradients are there before its step().

        Raises:
            LayoutError: If it cannot.
        """
        return None


WRAPPERS = {
    "accelerate": "trustratio.integrations.accelerate",
    "deepspeed": "trustratio.integrations.deepspeed",
    "lightning.pytorch": "trustratio.integrations.lightning",
    "megatron.core": "trustratio.integrations.megatron",
    "pytorch_lightning": "trustratio.integrations.lightning",
    "torch.distributed.fsdp": "trustratio.integrations.fsdp1",
    "torch.distributed.optim.zero_redundancy_optimizer": "trustratio.integrations.zero_redundancy",
    "torch.distributed.tensor": "trustratio.integrations.fsdp2.backend",
    "transformers.trainer": "trustratio.integrations.transformers",
}
"""The module that is imported wherever a wrapper is in use, and ours that registers the wrapper's backend."""


@dataclass
class _Known:
    """The backends of this process, and what they may ask."""

    registered: list[Backend] = field(default_factory=list)
    not_imported: dict[str, str] = field(default_factory=WRAPPERS.copy)
    watching: bool = False
    given: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # parameter -> class name, until it steps

    def load(self) -> list[Backend]:
        """Import the backends of those wrappers that the program has imported, and return all known backends."""
        for wrapper in [name for name in self.not_imported if name in sys.modules]:
            try:
                importlib.import_module(self.not_imported.pop(wrapper))
            except ImportError as error:
                warnings.warn(f"trustratio cannot use {wrapper}: {error}", stacklevel=5)
        return self.registered

    def watch_steps(self) -> None:
        """Have all backends asked before every step that any optimizer takes from now on."""
        if not self.watching:
            self.watching = True
            register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for backend in self.load():
            backend.before_step(optimizer)


_known = _Known()


def register_backend(backend: Backend) -> None:
    """Make a backend known: from now on optimizers ask it, after those that were registered before."""
    _known.registered.append(backend)


# The questions, put to all backends ---------------------------------------------------------------------------------


def admit(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's class acceptable to every wrapper that is imported, and look at all steps from now on."""
    watch_steps()
    for backend in _known.load():
        backend.admit(type(optimizer))
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _known.given.update(dict.fromkeys(given, type(optimizer).__name__))


def watch_steps() -> None:
    """Have all backends look at every step of the process from now on, also at those of others' optimizers."""
    _known.watch_steps()


def given_to(parameters: Iterable[torch.Tensor]) -> set[str]:
    """Names of our classes that were constructed with any of the parameters, and have taken no step so far."""
    return {_known.given[parameter] for parameter in parameters if parameter in _known.given}


def before_group(optimizer: Any) -> None:
    """Raise LayoutError if a wrapper holds the optimizer that would not step a group that is added now."""
    for backend in _known.load():
        backend.before_group(optimizer)


def explain(optimizer: Any, tensors: Sequence[tuple[int, torch.Tensor]]) -> Layout | None:
    """Return the layout of one `step()` call's tensors from the wrapper that made them; None if none did."""
    if not isinstance(optimizer, ObservedOptimizer):  # who is observed has not stepped in the place of one of ours
        for parameter in list(_known.given):
            if optimizer.was_given(parameter):
                del _known.given[parameter]
    return _first(backend.explain(optimizer, tensors) for backend in _known.load())


def tensor_parallel_groups(parameter: torch.Tensor) -> list[dist.ProcessGroup]:
    """The process groups over which a parameter like this one is cut, if it is: what backends know."""
    groups = [backend.tensor_parallel_group(parameter) for backend in _known.load()]
    return [group for group in groups if group is not None]


def find_data_parallel(optimizer: Any) -> DataParallel | None:
    """Find out who averages the gradients of the optimizer's parameters.

    This may look at every object of the process, and its answer holds for now: the model may be wrapped later.

    Args:
        optimizer: A `LayerwiseOptimizer`; its model may have been wrapped since it was constructed.

    Returns:
        What the wrapper says, or else the user (`optimizer.data_parallel_group`); this process alone if it is the only
        one. None if there are several and nobody is known, which is an error for whoever needs to know.

    Raises:
        LayoutError: If wrapper and user name different ranks, or several wrappers do.
    """
    told = optimizer.data_parallel_group
    answer = None
    if dist.is_available() and dist.is_initialized():  # else there is no wrapper, and backends may look at every object
        answer = _first(backend.data_parallel(optimizer) for backend in _known.load())
    if answer is None:
        answer = DataParallel() if processes() == 1 else ddp_ranks(optimizer)
    return reconcile(answer, told)


def find_gradient_flow(optimizer: Any) -> GradientFlow | None:
    """Ask for the wrapper that shards the optimizer's gradients; None if gradients stay whole."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return _first(backend.gradient_flow(optimizer) for backend in _known.load())


def may_replace_parameters() -> tuple[type, ...]:
    """The modules in whose forward a wrapper may put other tensors in the parameters' place, see `find_sources`.

    Empty if no wrapper does.
    """
    replacing = [backend for backend in _known.load() if type(backend).sources is not Backend.sources]
    return tuple(kind for backend in replacing for kind in backend.replacing_modules)


def may_shard_gradients() -> bool:
    """Whether any wrapper shards gradients in backward, so that `find_gradient_flow` may find it."""
    return any(type(backend).gradient_flow is not Backend.gradient_flow for backend in _known.load())


def find_sources(optimizer: Any, module: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ask for tensors that took the place of the optimizer's parameters in a module's forward, which has just run.

    Returns:
        (parameter, tensor whose gradient backward makes in its place) pairs.
    """
    return [pair for backend in _known.load() for pair in backend.sources(optimizer, module)]


def stepped_tensors(optimizer: Any) -> list[tuple[int, torch.Tensor]]:
    """All (group index, local tensor) pairs of a whole step, from the wrapper if it hides them between steps."""
    answer = whole_step(optimizer)
    if answer is not None:
        return answer
    tensors = [(index, tensor) for index, group in enumerate(optimizer.param_groups) for tensor in group["params"]]
    return [(index, tensor) for index, tensor in tensors if tensor.requires_grad or may_be_trained(tensor)]


def whole_step(optimizer: Any) -> list[tuple[int, torch.Tensor]] | None:
    """The same where a wrapper knows them that may step them in several calls; None where one call has them all."""
    return _first(backend.stepped_tensors(optimizer) for backend in _known.load())


def copied_parameters(optimizer: Any) -> list[torch.Tensor]:
    """The model's parameters of which a wrapper has the optimizer step copies; needs no other rank."""
    return _first(backend.copied_parameters(optimizer) for backend in _known.load()) or []


def publish_weights(optimizer: Any) -> None:
    """Bring the model's parameters up to date where the optimizer's weights are not the model's own."""
    for backend in _known.load():
        backend.publish_weights(optimizer)


def find_repeated_step(optimizer: Any) -> RepeatedStep | None:
    """How the wrapper takes one step in two, None where gradients are on the parameters between backward and step."""
    return _first(backend.repeated_step(optimizer) for backend in _known.load())


def _first(answers: Iterable[T | None]) -> T | None:
    """The first answer that is not "not mine"; backends after it are not asked."""
    return next((answer for answer in answers if answer is not None), None)
