"""The options of parameter groups: plain numbers in their ranges, whoever has written them and whenever."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from .common import OF_THE_WHOLE, check_common, check_storage, fill_in, floats_of
from .plain import make_plain

__all__ = ["GroupOptions"]


class GroupOptions:
    """Checks groups when they come, and again when a step finds that an option was given another value.

    A step costs a comparison of identities per option. What a tensor `lr` holds is not looked at again.
    """

    def __init__(self) -> None:
        self._checked: dict[int, tuple[Any, ...]] = {}  # by the group's id

    def check(self, algorithm: Algorithm, group: dict[str, Any]) -> None:
        """Make the group's numbers plain, and raise ValueError if an option is missing or out of range."""
        fill_in(group)
        make_plain(group, algorithm.plain_options or algorithm.defaults, floats_of(type(algorithm)))
        if "lr" in algorithm.defaults and group.get("lr") is None:
            raise ValueError("lr must be given, to the constructor or to every group: a learning rate such as lr=0.1")
        missing = [name for name in algorithm.defaults if name not in group and name not in OF_THE_WHOLE]
        if missing:
            raise ValueError(f"the group must have the options {', '.join(missing)}, which somebody took out of it")
        check_common(group)
        if algorithm.keeps_own_state:
            check_storage(group)
        algorithm.check(group)
        self._checked[id(group)] = self._values(algorithm, group)

    def check_changes(self, algorithm: Algorithm) -> None:
        """Check the groups in which an option is another object than when it was checked.

        Raises:
            ValueError: Naming the group, the option, its value and its range.
        """
        for index, group in enumerate(algorithm.param_groups):
            values = self._values(algorithm, group)
            checked = self._checked.get(id(group))
            if checked is not None and all(map(operator.is_, values, checked)):
                continue
            try:
                self._check_again(algorithm, group)
            except ValueError as error:
                raise ValueError(f"group {index}: {error}") from None

    def _check_again(self, algorithm: Algorithm, group: dict[str, Any]) -> None:
        lr = group.get("lr")
        if not (isinstance(lr, torch.Tensor) and not lr.is_cpu):
            self.check(algorithm, group)
            return
        group["lr"] = 0.0  # a look at it would wait for the device
        try:
            self.check(algorithm, group)
        finally:
            group["lr"] = lr
        self._checked[id(group)] = self._values(algorithm, group)

    @staticmethod
    def _values(algorithm: Algorithm, group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(map(group.get, algorithm.defaults))
