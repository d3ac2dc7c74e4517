"""What is audited: how the model and the optimizer are made, in every process anew."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trustratio.optimizers import OPTIMIZERS

from .errors import CannotAudit
from .injection import Injection, seeded_weights
from .models import SmallModel

__all__ = ["Subject"]

OF_THE_MODEL = ("model", "module")


@dataclass(frozen=True)
class Subject:
    """A model and an optimizer to train it with.

    Attributes:
        optimizer: "pkg.mod.Class", "pkg.mod:function", the name of an optimizer of this package, or a callable. It is
            called with a list of parameters; or with the model, if its only required parameter is called so.
        model: "pkg.mod:function" or a callable, without arguments; None: a small BERT-like model.
        options: Further arguments of the optimizer.
        name: Of the optimizer, for people; empty: as it is written.
    """

    optimizer: str | Callable[..., Any]
    model: str | Callable[[], nn.Module] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def title(self) -> str:
        """The optimizer's name and options."""
        given = self.optimizer
        name = self.name or (given if isinstance(given, str) else _name(given))
        return " ".join([name, *(f"{key}={value}" for key, value in self.options.items())])

    def make_model(self, groups: int, dtype: torch.dtype | None, seed: int) -> tuple[nn.Module, Injection]:
        """The model, with seeded weights and injected gradients, on the CPU.

        Args:
            groups: Ranks times micro-batches.
            dtype: Of its floating-point parameters; None: as the user made them.
            seed: Of the weights.

        Raises:
            CannotAudit: If it cannot be made, or has nothing to train.
        """
        make = SmallModel if self.model is None else _resolve(self.model, "model")
        torch.manual_seed(0)
        try:
            model = make()
        except (Exception, SystemExit) as error:
            raise CannotAudit(f"the model could not be made: {_described(error)}") from error
        if not isinstance(model, nn.Module):
            raise CannotAudit(f"{_name(make)} returned a {type(model).__name__}, not a torch.nn.Module")
        _refuse_without_values(model)
        try:
            injection = Injection(model, groups)
        except ValueError as error:
            raise CannotAudit(str(error)) from error
        if dtype is not None:
            model.to(dtype)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weights in seeded_weights(injection.shapes, seed).items():
                parameters[name].copy_(weights)
        return model, injection

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters as they are now.

        Raises:
            CannotAudit: If there is none of that name, or it cannot be made so.
        """
        make = self._maker()
        takes_model = not inspect.isclass(make) and _required(make) in [[name] for name in OF_THE_MODEL]
        argument = model if takes_model else [p for p in model.parameters() if p.requires_grad]
        try:
            optimizer = make(argument, **self.options)
        except (Exception, SystemExit) as error:
            remark = _remark_on_texts(self.options)
            raise CannotAudit(f"{self.title} could not be made: {_described(error)}{remark}") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise CannotAudit(f"{self.title} made a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        if "closure" in _required(optimizer.step):
            raise CannotAudit(
                f"{type(optimizer).__name__}.step needs a closure, which DeepSpeed and the Trainer never give: it "
                "cannot be audited, nor trained with them"
            )
        return optimizer

    def _maker(self) -> Callable[..., Any]:
        if isinstance(self.optimizer, str) and self.optimizer.lower() in OPTIMIZERS:
            return OPTIMIZERS[self.optimizer.lower()].optimizer_class
        made: Callable[..., Any] = _resolve(self.optimizer, "optimizer")
        if inspect.isclass(made) and not issubclass(made, torch.optim.Optimizer):
            raise CannotAudit(f"{self.optimizer} is a class, but no torch.optim.Optimizer")
        return made


def _refuse_without_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise CannotAudit(
                f"{name} of {type(model).__name__} has no shape before the model is called, as in LazyLinear: write "
                "its size, or call the model in the function that makes it"
            )
        if tensor.is_meta:
            raise CannotAudit(f"{name} of {type(model).__name__} is on the meta device: make the model on the CPU")


def _remark_on_texts(options: dict[str, Any]) -> str:
    """What may be the cause of an error: lr=1e-3x is no number."""
    texts = [f"{name}={value}" for name, value in options.items() if isinstance(value, str)]
    return f" ({', '.join(texts)} was read as a text, being no Python literal)" if texts else ""


def _resolve(given: Any, what: str) -> Any:
    """The object that "pkg.mod:name" or "pkg.mod.name" stands for; others as they are."""
    if isinstance(given, (nn.Module, torch.optim.Optimizer)):
        raise CannotAudit(
            f"the {what} is a {type(given).__name__} itself: give a function that makes it, as every rank makes its own"
        )
    if callable(given):
        return given
    if not isinstance(given, str):
        raise CannotAudit(f"the {what} is a function, or its name in a text, not {given!r}")
    _refuse_paths(given, what)
    module, _, name = given.partition(":") if ":" in given else given.rpartition(".")
    if not module or not name:
        known = f", or one of {', '.join(OPTIMIZERS)}" if what == "optimizer" else ""
        raise CannotAudit(f"the {what} is written package.module:name or package.module.Class{known}, not {given!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise CannotAudit(f"the {what} {given} cannot be imported: {_described(error)}") from error
    if not callable(found):
        raise CannotAudit(f"the {what} {given} is a {type(found).__name__}, which cannot be called")
    return found


def _refuse_paths(given: str, what: str) -> None:
    path, _, name = given.partition(":")
    if path.endswith(".py") or "/" in path or "\\" in path:
        module = ".".join(path.replace("\\", "/").removesuffix(".py").strip("./").split("/"))
        raise CannotAudit(
            f"the {what} {given} is the path of a file, where a module is named: write {module}:{name or 'NAME'}, in "
            "the folder from which it can be imported"
        )


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        options = [f"{name}={value}" for name, value in function.keywords.items()]
        return " ".join([_name(function.func), *map(_name, function.args), *options])
    return str(getattr(function, "__qualname__", repr(function)))


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters without default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = _parameters(function).values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
